"""How fast Swarm steps in one thread. From the repository's root, in under a minute:

    python benchmarks/swarm_step.py

A step is all of `make_vec("Swarm", ..., num_workers=0).step`: physics, observations, rewards, infos, and the reset of
every episode that ends; the random actions are drawn beforehand. The sizes take turns, round after round and whole
episodes of 250 steps each time, so that a busy machine slows them all. The table has the median over the rounds in
million agent-steps/s, with its smallest and largest value. A ratio is the cost of an agent-step among 10,000 agents
over that among 100, at the same density and in the same round: 1 means that the cost does not grow with the swarm.
"""

import numpy as np
from common import median_and_range, step_sizes

EPISODE = 250
SIZES = {
    "10 agents x 32 envs": dict(num_envs=32, n_agents=10),
    "10 agents x 4,096 envs": dict(num_envs=4096, n_agents=10),
    "100 agents": dict(num_envs=1, n_agents=100),
    "1,000 agents": dict(num_envs=1, n_agents=1000),
    "10,000 agents": dict(num_envs=1, n_agents=10_000),
    "100 agents, 10 obstacles": dict(num_envs=1, n_agents=100, n_obstacles=10),
    "10,000 agents, 1,000 obstacles": dict(num_envs=1, n_agents=10_000, n_obstacles=1000),
}


def main():
    speeds = step_sizes("Swarm", SIZES, EPISODE)
    for large, small in (
        ("10,000 agents", "100 agents"),
        ("10,000 agents", "1,000 agents"),
        ("10,000 agents, 1,000 obstacles", "100 agents, 10 obstacles"),
    ):
        ratios = np.divide(speeds[small], speeds[large])
        print(f"cost per agent-step, {large} over {small}: {median_and_range(ratios, 2)}")


if __name__ == "__main__":
    main()
