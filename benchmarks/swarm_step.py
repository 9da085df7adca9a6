"""How fast Swarm steps in one thread. From the repository's root, in under a minute:

    python benchmarks/swarm_step.py

A step is all of `make_vec("Swarm", ..., num_workers=0).step`: physics, observations, rewards, infos, and the reset of
every episode that ends; the random actions are drawn beforehand. The sizes take turns, round after round and whole
episodes of 250 steps each time, so that a busy machine slows them all. The table has the median over the rounds in
million agent-steps/s, with its smallest and largest value. A ratio is the cost of an agent-step among 10,000 agents
over that among 100, at the same density and in the same round: 1 means that the cost does not grow with the swarm.
"""

import math
import os
import statistics
import sys
import time

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import envs

ROUNDS = 5
EPISODE = 250
AGENT_STEPS = 500_000  # at least so many of each size in a round
SIZES = {
    "10 agents x 32 envs": dict(num_envs=32, n_agents=10),
    "10 agents x 4,096 envs": dict(num_envs=4096, n_agents=10),
    "100 agents": dict(num_envs=1, n_agents=100),
    "1,000 agents": dict(num_envs=1, n_agents=1000),
    "10,000 agents": dict(num_envs=1, n_agents=10_000),
    "100 agents, 10 obstacles": dict(num_envs=1, n_agents=100, n_obstacles=10),
    "10,000 agents, 1,000 obstacles": dict(num_envs=1, n_agents=10_000, n_obstacles=1000),
}


def agent_steps_per_second(vector, actions):
    num_envs, n_agents, _ = vector.action_space.shape
    episodes = math.ceil(AGENT_STEPS / (num_envs * n_agents * EPISODE))
    ended = 0
    start = time.perf_counter()
    for step in range(episodes * EPISODE):
        _, _, _, truncations, _ = vector.step(actions[step % len(actions)])
        ended += truncations[0]
    elapsed = time.perf_counter() - start
    assert ended == episodes, "the resets have to be in the time"
    return episodes * EPISODE * num_envs * n_agents / elapsed


def main():
    rng = np.random.default_rng(0)
    vectors, actions, speeds = {}, {}, {name: [] for name in SIZES}
    for name, arguments in SIZES.items():
        vectors[name] = envs.make_vec("Swarm", num_workers=0, max_steps=EPISODE, **arguments)
        vectors[name].reset(seed=0)
        shape = (8, *vectors[name].action_space.shape)
        actions[name] = rng.uniform(-math.pi, math.pi, shape).astype(np.float32)
        vectors[name].step(actions[name][0])  # compiles
        vectors[name].reset(seed=0)
    for _ in range(ROUNDS):
        for name, vector in vectors.items():
            speeds[name].append(agent_steps_per_second(vector, actions[name]))

    print("| Swarm, one thread | M agent-steps/s | smallest to largest | us per step |\n|---|---|---|---|")
    for name, vector in vectors.items():
        median, agents = statistics.median(speeds[name]), math.prod(vector.action_space.shape)
        print(
            f"| {name} | {median / 1e6:.2f} | {min(speeds[name]) / 1e6:.2f} to {max(speeds[name]) / 1e6:.2f} "
            f"| {1e6 * agents / median:.1f} |"
        )
    print()
    for large, small in (
        ("10,000 agents", "100 agents"),
        ("10,000 agents", "1,000 agents"),
        ("10,000 agents, 1,000 obstacles", "100 agents, 10 obstacles"),
    ):
        ratios = sorted(b / a for a, b in zip(speeds[large], speeds[small], strict=True))
        print(
            f"cost per agent-step, {large} over {small}: {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
