"""How fast LidarNavigation steps in one thread. From the repository's root, in under a minute:

    python benchmarks/lidar_step.py

A step is all of `make_vec("LidarNavigation", ..., num_workers=0).step`: physics, contacts, 32 rays per robot, rewards,
infos, new goals, and the reset of every episode that ends; the random actions are drawn beforehand. The sizes take
turns, round after round and whole episodes of 500 steps each time, so that a busy machine slows them all. Robots and
obstacles are as dense everywhere as 10 and 8 in 8 x 6 m. The table has the median over the rounds in million
agent-steps/s, with its smallest and largest value. A ratio is the cost of a robot's step among 1,000 robots in one
arena over that among 20, in the same round: 1 means that the cost does not grow with the swarm. The 20 robots once
have 50 arenas, as many robots in all, and once one, where Python's share of a step counts against them.
"""

import math

import numpy as np
from common import median_and_range, step_sizes

EPISODE = 500


def arena(n_agents, num_envs):
    scale = math.sqrt(n_agents / 10)
    sides = dict(width=8.0 * scale, height=6.0 * scale)
    return dict(num_envs=num_envs, n_agents=n_agents, n_obstacles=round(0.8 * n_agents), **sides)


SIZES = {
    "10 robots x 32 envs": arena(10, 32),
    "10 robots x 32 envs, no obstacles": arena(10, 32) | dict(n_obstacles=0),
    "10 robots x 32 envs, 4 neighbours": arena(10, 32) | dict(n_neighbors=4),
    "10 robots x 32 envs, 3x2 rooms": arena(10, 32) | dict(rooms="3x2"),
    "10 robots x 1,024 envs": arena(10, 1024),
    "20 robots": arena(20, 1),
    "20 robots x 50 envs": arena(20, 50),
    "1,000 robots": arena(1000, 1),
    "10,000 robots": arena(10_000, 1),
}


def main():
    speeds = step_sizes("LidarNavigation", SIZES, EPISODE)
    for large, small in (
        ("1,000 robots", "20 robots"),
        ("1,000 robots", "20 robots x 50 envs"),
        ("10,000 robots", "20 robots x 50 envs"),
    ):
        ratios = np.divide(speeds[small], speeds[large])
        print(f"cost per agent-step, {large} over {small}: {median_and_range(ratios, 2)}")


if __name__ == "__main__":
    main()
