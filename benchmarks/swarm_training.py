"""How near ppo_swarm.py's loop comes to what torch alone needs. From the repository's root, in about 3 minutes:

    python benchmarks/swarm_training.py

Torch alone does the forwards, backwards and optimiser steps of an iteration on tensors of the same shapes: no
environment, no sampling, no advantages, no losses, no gathering of minibatches, no logging. The script runs with
default flags; its time is wall time from the first iteration's log to the last one's, checkpoints included, evaluations
not. Both are measured in turn, round after round; printed are agent-steps per second and the median ratio.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs
from ppo_swarm import Agent, Args, torch

ITERATIONS, ROUNDS = 40, 5


def script(policy, critic):
    """Agent-steps per second of the script's loop."""
    args = Args()
    steps = args.num_steps * args.num_envs * args.n_agents
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, sys.path[0] + "/ppo_swarm.py", "--policy", policy, "--critic", critic]
        command += ["--total-timesteps", str(steps * (ITERATIONS + 1))]
        command += ["--eval-every", str(10**12), "--eval-episodes", "1"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        events = EventAccumulator(str(next(Path(folder).glob("runs/*"))))
        events.Reload()
        logged = [event.wall_time for event in events.Scalars("charts/SPS")]
    return steps * (len(logged) - 1) / (logged[-1] - logged[0])


def torch_alone(policy, critic):
    """Agent-steps per second of the same forwards, backwards and optimiser steps."""
    args = Args(policy=policy, critic=critic)
    vector = envs.make_vec(args.env_id, args.num_envs, 0, n_agents=args.n_agents)
    agent = Agent(args, vector)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-9, eps=1e-5, fused=True)
    observations, infos = vector.reset(seed=0)
    obs, neighbors = torch.as_tensor(observations), torch.as_tensor(infos["neighbors"])
    rollout_obs, rollout_neighbors = obs.repeat(args.num_steps, 1, 1), neighbors.repeat(args.num_steps, 1, 1)
    mb_obs, mb_neighbors = rollout_obs.chunk(args.num_minibatches)[0], rollout_neighbors.chunk(args.num_minibatches)[0]

    def iteration():
        with torch.no_grad():
            for _ in range(args.num_steps):
                agent.actor_mean(agent.actor(obs, neighbors))
            agent.get_value(rollout_obs, rollout_neighbors)
            agent.get_value(obs, neighbors)
        for _ in range(args.update_epochs * args.num_minibatches):
            mean = agent.actor_mean(agent.actor(mb_obs, mb_neighbors))
            loss = mean.mean() + agent.get_value(mb_obs, mb_neighbors).mean() + agent.actor_logstd.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    iteration()
    start = time.perf_counter()
    for _ in range(ITERATIONS // 2):
        iteration()
    return ITERATIONS // 2 * args.num_steps * args.num_envs * args.n_agents / (time.perf_counter() - start)


if __name__ == "__main__":
    print(f"{torch.get_num_threads()} torch threads; agent-steps/s, medians of {ROUNDS} rounds\n")
    print("| policy | critic | ppo_swarm.py | torch alone | ratio (lowest to highest) |\n|---|---|---|---|---|")
    for policy, critic in (("mlp", "local"), ("mlp", "central"), ("gnn", "local")):
        pairs = [(script(policy, critic), torch_alone(policy, critic)) for _ in range(ROUNDS)]
        ours, bound = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratios = sorted(ours / bound for ours, bound in pairs)
        low, middle, high = ratios[0], statistics.median(ratios), ratios[-1]
        print(
            f"| {policy} | {critic} | {ours:,.0f} | {bound:,.0f} | {middle:.2f} ({low:.2f} to {high:.2f}) |", flush=True
        )
