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

import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
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
    num_envs, n_agents, _ = vector.action_space.shape
    steps = EPISODE * math.ceil(OUR_AGENT_STEPS / (num_envs * n_agents * EPISODE))
    ended = 0
    start = time.perf_counter()
    for step in range(steps):
        _, _, terminations, truncations, _ = vector.step(actions[step % len(actions)])
        ended += (terminations | truncations).sum()
    elapsed = time.perf_counter() - start
    assert ended >= num_envs * (steps // EPISODE), "the resets have to be in the time"
    return steps * num_envs * n_agents / elapsed


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
    print("| VMAS navigation, one thread | VmasNavigation, k agent-steps/s | VMAS | ratio (lowest to highest) |")
    print("|---|---|---|---|")
    for n_agents, num_envs in SIZES:
        actions = rng.uniform(-1, 1, (8, num_envs, n_agents, 2)).astype(np.float32)
        their_actions = [[torch.tensor(action[:, i]) for i in range(n_agents)] for action in actions]
        vector = envs.make_vec("VmasNavigation", num_envs, num_workers=0, n_agents=n_agents, max_steps=EPISODE)
        wide = {"world_spawning_x": 2, "world_spawning_y": 2} if n_agents > 20 else {}  # in its square it would hang
        world = vmas.make_env("navigation", num_envs, n_agents=n_agents, seed=0, **wide)
        vector.reset(seed=0)
        vector.step(actions[0])  # compiles
        world.step(their_actions[0])
        measured = []
        for _ in range(ROUNDS):
            vector.reset(seed=0)
            measured.append((our_speed(vector, actions), their_speed(world, their_actions)))
        ours, theirs = (statistics.median(side) / 1e3 for side in zip(*measured, strict=True))
        ratios = [ours / theirs for ours, theirs in measured]
        print(
            f"| {n_agents} agents x {num_envs:,} envs | {ours:,.0f} | {theirs:.1f} "
            f"| {statistics.median(ratios):.0f} ({min(ratios):.0f} to {max(ratios):.0f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
