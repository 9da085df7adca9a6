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
import os
import statistics
import sys
import time

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import envs

ROUNDS = 5
EPISODE = 500
AGENT_STEPS = 500_000  # at least so many of each size in a round


def arena(n_agents, num_envs):
    scale = math.sqrt(n_agents / 10)
    sides = dict(width=8.0 * scale, height=6.0 * scale)
    return dict(num_envs=num_envs, n_agents=n_agents, n_obstacles=round(0.8 * n_agents), **sides)


SIZES = {
    "10 robots x 32 envs": arena(10, 32),
    "10 robots x 32 envs, no obstacles": arena(10, 32) | dict(n_obstacles=0),
    "10 robots x 1,024 envs": arena(10, 1024),
    "20 robots": arena(20, 1),
    "20 robots x 50 envs": arena(20, 50),
    "1,000 robots": arena(1000, 1),
    "10,000 robots": arena(10_000, 1),
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
        vectors[name] = envs.make_vec("LidarNavigation", num_workers=0, max_steps=EPISODE, **arguments)
        vectors[name].reset(seed=0)
        actions[name] = rng.uniform(-1.0, 1.0, (8, *vectors[name].action_space.shape)).astype(np.float32)
        vectors[name].step(actions[name][0])  # compiles
        vectors[name].reset(seed=0)
    for _ in range(ROUNDS):
        for name, vector in vectors.items():
            speeds[name].append(agent_steps_per_second(vector, actions[name]))

    print("| LidarNavigation, one thread | M agent-steps/s | smallest to largest | us per step |\n|---|---|---|---|")
    for name, vector in vectors.items():
        median, agents = statistics.median(speeds[name]), math.prod(vector.action_space.shape[:2])
        print(
            f"| {name} | {median / 1e6:.2f} | {min(speeds[name]) / 1e6:.2f} to {max(speeds[name]) / 1e6:.2f} "
            f"| {1e6 * agents / median:.1f} |"
        )
    print()
    for large, small in (
        ("1,000 robots", "20 robots"),
        ("1,000 robots", "20 robots x 50 envs"),
        ("10,000 robots", "20 robots x 50 envs"),
    ):
        ratios = sorted(b / a for a, b in zip(speeds[large], speeds[small], strict=True))
        print(
            f"cost per agent-step, {large} over {small}: {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
