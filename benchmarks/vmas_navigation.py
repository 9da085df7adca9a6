"""How much faster VmasNavigation steps than VMAS itself, one thread each. From the repository's root, in two minutes:

    pip install vmas==1.5.2
    python benchmarks/vmas_navigation.py

Both sides step the same scenario with the same random actions, drawn beforehand, and give observations, rewards and
dones. They take turns, round after round in this one run, so that a busy machine slows both. Ours runs whole episodes
of 100 steps, with the reset of each in the time; VMAS runs the first 100 steps of one, or 20 of 4,096 environments, and
its resets are left out. For 50 agents VMAS draws the starts from a square twice as wide: in its own it finds no room.
The table has the median over the rounds in thousand agent-steps/s, and the median ratio of a round with its smallest
and largest value.
"""

import sys
import time
from functools import partial

import numpy as np
import torch
from common import agent_steps_per_second, median_and_range, print_head, print_row, take_turns

import envs

try:
    import vmas
except ImportError:
    sys.exit("VMAS is not installed, and there is nothing to compare with: pip install vmas==1.5.2")

ROUNDS = 7
EPISODE = 100
OUR_AGENT_STEPS = 4_000_000  # at least so many in a round
THEIR_STEPS = {32: EPISODE, 4096: 20}  # in a round, by the number of environments
SIZES = [(3, 32), (10, 32), (10, 4096), (50, 32)]  # agents, environments


def our_speed(vector, actions):
    vector.reset(seed=0)
    return agent_steps_per_second(vector, actions, EPISODE, OUR_AGENT_STEPS)


def their_speed(world, actions):
    world.scenario.env_reset_world_at(None)
    steps = THEIR_STEPS[world.num_envs]
    start = time.perf_counter()
    for step in range(steps):
        world.step(actions[step % len(actions)])
    return steps * world.num_envs * world.n_agents / (time.perf_counter() - start)


def main():
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    heads = ["VmasNavigation, k agent-steps/s", "VMAS", "ratio (lowest to highest)"]
    print_head("VMAS navigation, one thread", *heads)
    for n_agents, num_envs in SIZES:
        actions = rng.uniform(-1, 1, (8, num_envs, n_agents, 2)).astype(np.float32)
        their_actions = [[torch.tensor(action[:, i]) for i in range(n_agents)] for action in actions]
        vector = envs.make_vec("VmasNavigation", num_envs, num_workers=0, n_agents=n_agents, max_steps=EPISODE)
        wide = {"world_spawning_x": 2, "world_spawning_y": 2} if n_agents > 20 else {}  # in its square it would hang
        world = vmas.make_env("navigation", num_envs, n_agents=n_agents, seed=0, **wide)
        vector.reset(seed=0)
        vector.step(actions[0])  # compiles
        world.step(their_actions[0])
        contestants = {
            "ours": partial(our_speed, vector, actions),
            "theirs": partial(their_speed, world, their_actions),
        }
        speeds = take_turns(contestants, ROUNDS)
        ours = np.median(speeds["ours"]) / 1e3
        theirs = np.median(speeds["theirs"]) / 1e3
        ratio = median_and_range(np.divide(speeds["ours"], speeds["theirs"]), 0)
        print_row(f"{n_agents} agents x {num_envs:,} envs", f"{ours:,.0f}", f"{theirs:.1f}", ratio)


if __name__ == "__main__":
    main()
