"""ppo_swarm_lstm.py on LidarNavigation beside sb3-contrib's RecurrentPPO. From the repository's root, 40 minutes:

    pip install stable-baselines3 sb3-contrib
    python benchmarks/lidar_recurrent.py [--minutes 10] [--seeds 1 2 3]

1. Training throughput with the same environments, rollouts, minibatches, epochs and widths, measured in turn. Both have
   an LSTM and two layers for the actor, and as much for the critic (theirs has the layers after the LSTM, ours before).
2. For each seed RecurrentPPO with its own defaults for so many minutes, then the time that ppo_swarm_lstm.py's default
   command, which is stopped after a fifth of these minutes, took to collect as many goals per robot in its training
   episodes. Wall time from the first step, start-up left out.

For RecurrentPPO every robot is an environment of its own, all stepped by the same kernel.
"""

import argparse
import sys
import time

import gymnasium as gym
import numpy as np
from common import first_reaching, median_and_range, print_head, print_row, run_and_read, seconds_at, take_turns

import envs
from ppo_swarm_lstm import Args, torch

try:
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import VecEnv
except ImportError as error:
    sys.exit(f"{error}: pip install stable-baselines3 sb3-contrib")

ROUNDS = 3
ITERATIONS = 6


class Robots(VecEnv):
    """The robots of `num_envs` arenas, as that many environments of Stable-Baselines3."""

    def __init__(self, num_envs, n_agents):
        self.envs = envs.make_vec("LidarNavigation", num_envs, 0, n_agents=n_agents)
        observation = self.envs.single_observation_space
        action = self.envs.single_action_space
        super().__init__(
            num_envs * n_agents,
            gym.spaces.Box(observation.low[0], observation.high[0], dtype=np.float32),
            gym.spaces.Box(action.low[0], action.high[0], dtype=np.float32),
        )
        self.goals = []  # per robot, of every episode so far

    def reset(self):
        return self.envs.reset(seed=1)[0].reshape(self.num_envs, -1)

    def step_async(self, actions):
        self.actions = actions.reshape(self.envs.action_space.shape)

    def step_wait(self):
        observations, rewards, _, truncations, infos = self.envs.step(self.actions)
        dones = np.repeat(truncations, rewards.shape[1])
        each = [{} for _ in range(self.num_envs)]  # infos
        if dones.any():
            final = infos["final_obs"].reshape(self.num_envs, -1)
            for robot in np.flatnonzero(dones):
                each[robot] = {"terminal_observation": final[robot], "TimeLimit.truncated": True}
            self.goals += infos["episode"]["goals"][truncations].tolist()
        return observations.reshape(self.num_envs, -1), rewards.reshape(-1), dones, each

    def close(self):
        self.envs.close()

    def get_attr(self, name, indices=None):
        return [getattr(self, name, None)] * self.num_envs

    def set_attr(self, name, value, indices=None):
        raise NotImplementedError

    def env_method(self, name, *args, indices=None, **kwargs):
        raise NotImplementedError

    def env_is_wrapped(self, wrapper, indices=None):
        return [False] * self.num_envs


class Watch(BaseCallback):
    """When each iteration began, and the goals per robot in the episodes of the one before; stops after `seconds`."""

    def __init__(self, seconds=float("inf")):
        super().__init__()
        self.seconds = seconds
        self.times = []
        self.goals = []

    def _on_rollout_start(self):
        self.times.append(time.perf_counter())
        robots = self.training_env
        self.goals.append(float(np.mean(robots.goals)) if robots.goals else 0.0)
        robots.goals = []

    def _on_step(self):
        return time.perf_counter() - self.times[0] < self.seconds


def script(flags, seconds=None):
    """Events of ppo_swarm_lstm.py, stopped after `seconds`, and the wall time of its first step."""
    events = run_and_read("ppo_swarm_lstm.py", flags, threads=None, seconds=seconds)
    first = events.Scalars("charts/SPS")[0]
    return events, first.wall_time - seconds_at(events)[first.step]


def ours_per_second(args):
    steps = args.num_steps * args.num_envs * args.n_agents
    events, _ = script(f"--total-timesteps {steps * (ITERATIONS + 1)} --eval-every {10**12} --eval-episodes 1")
    logged = [event.wall_time for event in events.Scalars("charts/SPS")]
    return steps * (len(logged) - 1) / (logged[-1] - logged[0])


def theirs_per_second(args):
    steps = args.num_steps * args.num_envs * args.n_agents
    width = args.hidden_dim
    model = RecurrentPPO(
        "MlpLstmPolicy",
        Robots(args.num_envs, args.n_agents),
        n_steps=args.num_steps,
        batch_size=steps // args.num_minibatches,
        n_epochs=args.update_epochs,
        learning_rate=args.learning_rate,
        policy_kwargs={"lstm_hidden_size": width, "net_arch": [width, width]},
        device="cpu",
    )
    watch = Watch()
    model.learn(steps * (ITERATIONS // 2 + 1), callback=watch)
    return steps * (len(watch.times) - 1) / (watch.times[-1] - watch.times[0])


def race(minutes, seed):
    robots = Robots(8, 10)
    watch = Watch(60 * minutes)
    RecurrentPPO("MlpLstmPolicy", robots, seed=seed, device="cpu").learn(10**9, callback=watch)
    best = max(watch.goals)
    seconds = watch.times[watch.goals.index(best)] - watch.times[0]
    events, start = script(f"--seed {seed}", seconds=12 * minutes)
    hit = first_reaching(events, "episode/goals", best)
    ours = hit.wall_time - start if hit else float("inf")
    print_row(seed, f"{best:.2f}", f"{seconds:.0f}", f"{ours:.0f}", f"{seconds / ours:.0f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of RecurrentPPO with its own defaults")
    parser.add_argument("--seeds", type=int, nargs="+", default=(1, 2, 3))
    options = parser.parse_args()
    args = Args()
    rates = take_turns({"ours": lambda: ours_per_second(args), "theirs": lambda: theirs_per_second(args)}, ROUNDS)
    ratios = np.divide(rates["ours"], rates["theirs"])
    print(f"{torch.get_num_threads()} torch threads; agent-steps/s of the whole training, medians of {ROUNDS} rounds\n")
    print_head("ppo_swarm_lstm.py", "RecurrentPPO, same shapes", "ratio (lowest to highest)")
    print_row(f"{np.median(rates['ours']):,.0f}", f"{np.median(rates['theirs']):,.0f}", median_and_range(ratios))
    if options.minutes:
        print(f"\nRecurrentPPO with its defaults, {options.minutes:g} minutes\n")
        print_head("seed", "goals per robot", "after s", "ppo_swarm_lstm.py had as many after s", "times sooner")
        for seed in options.seeds:
            race(options.minutes, seed)


if __name__ == "__main__":
    main()
