"""Whether LunarLander plays as Gymnasium's LunarLander-v3 does. From the repository's root, in about a minute:

    python benchmarks/lunar_lander_fidelity.py [--model runs/NAME/model.pt]    with a policy of a GRPO script's, too

Every policy flies 1,000 episodes on Box2D (Gymnasium, seeds 0, 1, ...) and 1,000 on ours, each with draws of its own.
The table has the mean return with its standard error, the mean length, and the shares of episodes that returned 200 or
more, ended at rest with both legs down ("success": both legs down, speed < 0.1 and |x| < 0.2 in observation units),
fell asleep ("landed") or touched the ground with the hull ("crashed").

A second table flies both side by side with the same draws: terrain, push, and the engines' dispersion. It has how far
observations are from Box2D's up to the first touch of the ground, and the share of episodes that agree in how and at
which step they end. Other policies: `fidelity(name, policy)` takes any function from observations (n, 8) to actions.
"""

import argparse
import math
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs

EPISODES, SIDE_BY_SIDE = 1000, 200
METRICS = ("success", "landed", "crashed")


def random(seed=0):
    rng = np.random.default_rng(seed)
    return lambda observations: rng.integers(4, size=len(observations))


def nothing(observations):
    return np.zeros(len(observations), np.int64)


def heuristic(observations):
    """gymnasium.envs.box2d.lunar_lander.heuristic, for a whole batch."""
    x, y, vx, vy, angle, spin, left, right = observations.T
    turn = (np.clip(0.5 * x + vx, -0.4, 0.4) - angle) * 0.5 - spin
    climb = (0.55 * np.abs(x) - y) * 0.5 - vy * 0.5
    down = (left > 0) | (right > 0)
    turn, climb = np.where(down, 0.0, turn), np.where(down, -0.5 * vy, climb)
    side = np.where(turn < -0.05, 3, np.where(turn > 0.05, 1, 0))
    return np.where((climb > np.abs(turn)) & (climb > 0.05), 2, side)


def trained(path):
    """The greedy policy that a GRPO script has saved; the three have the same network."""
    from grpo_perstep import Agent, Args

    saved = envs.load(path)
    args = Args(**{name: value for name, value in saved["args"].items() if name in Args.__dataclass_fields__})
    agent = Agent(args, envs.make_vec("LunarLander", 1, 0))
    agent.load_state_dict(saved["model"])
    act = agent.make_policy(None)
    return lambda observations: act(observations, {})


def on_box2d(policy, episodes, **env_kwargs):
    """The same statistics as ours, {name: (episodes,)}, from Gymnasium's own environment."""
    env = gym.make("LunarLander-v3", **env_kwargs)
    rows = []
    for seed in range(episodes):
        observation, _ = env.reset(seed=seed)
        total, length, ended = 0.0, 0, False
        while not ended:
            observation, reward, terminated, truncated, _ = env.step(policy(observation[None])[0])
            total, length, ended = total + reward, length + 1, terminated or truncated
        speed, legs = math.hypot(*observation[2:4]), observation[6] + observation[7]
        success = legs == 2 and speed < 0.1 and abs(observation[0]) < 0.2
        rows.append((total, length, success, not env.unwrapped.lander.awake, env.unwrapped.game_over))
    return dict(zip(("r", "l", *METRICS), np.array(rows, float).T, strict=True))


def on_ours(policy, episodes, seed=0, **env_kwargs):
    return envs.evaluate(lambda _: lambda observations, infos: policy(observations), "LunarLander", episodes, seed,
                         **env_kwargs)[0]  # fmt: skip


def fidelity(name, policy, episodes=EPISODES, **env_kwargs):
    """Two rows of the table: the policy on Box2D and on ours."""
    for where, stats in (
        ("Box2D", on_box2d(policy, episodes, **env_kwargs)),
        ("ours", on_ours(policy, episodes, **env_kwargs)),
    ):
        error = stats["r"].std() / math.sqrt(episodes)
        shares = " | ".join(f"{100 * share:.1f}%" for share in [np.mean(stats["r"] >= 200)] + [
            stats[metric].mean() for metric in METRICS
        ])  # fmt: skip
        print(f"| {name} | {where} | {stats['r'].mean():.1f} +- {error:.1f} | {stats['l'].mean():.1f} | {shares} |",
              flush=True)  # fmt: skip


class Replay:
    """Stands in for the random generator of Gymnasium's environment, and draws what ours is about to draw."""

    def __init__(self, rng):
        self.rng = rng.reshape(1, 2).copy()

    def uniform(self, low, high, size=()):
        return np.array([envs._uniform(self.rng, 0, low, high) for _ in range(math.prod(size))]).reshape(size)[()]

    def integers(self, low, high):
        return math.floor(envs._uniform(self.rng, 0, float(low), float(high)))


def side_by_side(name, policy, episodes=SIDE_BY_SIDE, **env_kwargs):
    """A row of the second table: the same episodes on both, with the same draws and actions."""
    ours, box2d = envs.make_vec("LunarLander", 1, 0, **env_kwargs), gym.make("LunarLander-v3", **env_kwargs)
    ours.reset(seed=0)
    box2d.reset(seed=0)
    flights, exact, same_end, returns = [], 0, 0, []
    for _ in range(episodes):
        box2d.unwrapped.np_random = Replay(ours.state.rng)
        observation = box2d.reset()[0]
        gaps, ended, touched, total = [np.abs(ours.reset()[0][0] - observation).max()], False, False, 0.0
        flight = gaps[0]
        while not ended:
            action = policy(observation[None])
            observation, reward, terminated, truncated, _ = box2d.step(action[0])
            following, _, terminations, truncations, infos = ours.step(action)
            total, ended = total + reward, terminated or truncated
            our_end = terminations[0] or truncations[0]
            gaps.append(np.abs((infos["final_obs"] if our_end else following)[0] - observation).max())
            touched = touched or observation[6] + observation[7] > 0 or box2d.unwrapped.game_over
            if not touched:
                flight = max(flight, gaps[-1])
            if ended != our_end:
                break
        else:
            same_end += terminated == terminations[0]
            returns.append(abs(infos["episode"]["r"][0] - total))
        flights.append(flight)
        exact += max(gaps) == 0
    print(f"| {name} | {np.median(flights):.1e} | {max(flights):.1e} | {100 * same_end / episodes:.1f}% "
          f"| {100 * exact / episodes:.1f}% | {np.median(returns):.1e} |", flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model.pt of a run of a GRPO script")
    options = parser.parse_args()
    policies = {"random": random(), "nothing": nothing, "heuristic": heuristic}
    if options.model:
        policies["trained"] = trained(options.model)
    print(f"{EPISODES} episodes each\n\n| policy | on | return | length | >= 200 | success | landed | crashed |")
    print("|---" * 8 + "|")
    for name, policy in policies.items():
        fidelity(name, policy)
    fidelity("heuristic, wind", heuristic, enable_wind=True)
    print(f"\n{SIDE_BY_SIDE} episodes side by side with the same draws; differences of observations and of returns\n")
    print("| policy | flight, median | flight, largest | same end | equal to the last bit | returns, median |")
    print("|---" * 6 + "|")
    for name, policy in policies.items():
        side_by_side(name, policy)
    side_by_side("heuristic, wind", heuristic, enable_wind=True)


if __name__ == "__main__":
    main()
