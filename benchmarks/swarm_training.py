"""How near ppo_swarm.py's loop comes to what torch alone needs. From the repository's root, in about 3 minutes:

    python benchmarks/swarm_training.py

Torch alone does the forwards, backwards and optimiser steps of an iteration on tensors of the same shapes: no
environment, no sampling, no advantages, no losses, no gathering of minibatches, no logging. The script runs with
default flags; its time is wall time from the first iteration's log to the last one's, checkpoints included, evaluations
not. Both are measured in turn, round after round; printed are agent-steps per second and the median ratio.
"""

import time
from functools import partial

import numpy as np
from common import median_and_range, print_head, print_row, run_and_read, take_turns

import envs
from ppo_swarm import Agent, Args, torch

ITERATIONS = 40
ROUNDS = 5


def script(policy, critic):
    """Agent-steps per second of the script's loop."""
    args = Args()
    steps = args.num_steps * args.num_envs * args.n_agents
    flags = f"--policy {policy} --critic {critic} --total-timesteps {steps * (ITERATIONS + 1)}"
    events = run_and_read("ppo_swarm.py", f"{flags} --eval-every {10**12} --eval-episodes 1", threads=None)
    logged = [event.wall_time for event in events.Scalars("charts/SPS")]
    return steps * (len(logged) - 1) / (logged[-1] - logged[0])


def torch_alone(network, critic):
    """Agent-steps per second of the same forwards, backwards and optimiser steps."""
    args = Args(policy=network, critic=critic)
    vector = envs.make_vec(args.env_id, args.num_envs, 0, n_agents=args.n_agents)
    agent = Agent(args, vector)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-9, eps=1e-5, fused=True)
    observations, infos = vector.reset(seed=0)
    obs = torch.as_tensor(observations)
    neighbors = torch.as_tensor(infos["neighbors"])
    rollout_obs = obs.repeat(args.num_steps, 1, 1)
    rollout_neighbors = neighbors.repeat(args.num_steps, 1, 1)
    mb_obs = rollout_obs.chunk(args.num_minibatches)[0]
    mb_neighbors = rollout_neighbors.chunk(args.num_minibatches)[0]

    def iteration():
        with torch.no_grad():
            for _ in range(args.num_steps):
                agent.get_policy(obs, neighbors)
            agent.get_value(rollout_obs, rollout_neighbors)
            agent.get_value(obs, neighbors)
        for _ in range(args.update_epochs * args.num_minibatches):
            policy = agent.get_policy(mb_obs, mb_neighbors)
            loss = policy.mean.mean() + policy.logstd.sum() + agent.get_value(mb_obs, mb_neighbors).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    iteration()
    start = time.perf_counter()
    for _ in range(ITERATIONS // 2):
        iteration()
    return ITERATIONS // 2 * args.num_steps * args.num_envs * args.n_agents / (time.perf_counter() - start)


def main():
    print(f"{torch.get_num_threads()} torch threads; agent-steps/s, medians of {ROUNDS} rounds\n")
    print_head("policy", "critic", "ppo_swarm.py", "torch alone", "ratio (lowest to highest)")
    for network, critic in (("mlp", "local"), ("mlp", "central"), ("gnn", "local")):
        contestants = {"ours": partial(script, network, critic), "torch": partial(torch_alone, network, critic)}
        rates = take_turns(contestants, ROUNDS)
        ours = f"{np.median(rates['ours']):,.0f}"
        bound = f"{np.median(rates['torch']):,.0f}"
        print_row(network, critic, ours, bound, median_and_range(np.divide(rates["ours"], rates["torch"]), 2))


if __name__ == "__main__":
    main()
