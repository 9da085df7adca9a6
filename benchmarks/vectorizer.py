"""What the vectorizer's workers cost and bring. From the repository's root, in about a minute:

    python benchmarks/vectorizer.py

Every figure is a ratio: its two sides are measured in turn, round after round, in this one run, so that a busy machine
slows both. Printed are the medians over the rounds, and the smallest and largest ratio.

    1. a step of two workers that have nothing to do, against `Pool.map` of two tasks that do nothing
    2. Gymnasium's LunarLander-v3 (Box2D), 32 environments on two workers, against `AsyncVectorEnv`'s 32 processes and
       `SyncVectorEnv`'s one; and what no two workers can do better: 16 of them on one process, with no other to wait
       for and nothing to hand over
    3. Swarm on two workers, against none: the batch from which on they pay is the constant envs.POOL_AGENTS
"""

import multiprocessing
import statistics
import sys
import time
from itertools import cycle
from pathlib import Path

import gymnasium as gym
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs


class Nothing(envs.NativeVectorEnv):
    """An environment whose step is empty: what is left is the hand-over."""

    def __init__(self, num_envs, render_mode=None, first_env=0):
        observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,))
        super().__init__(num_envs, observation_space, action_space, render_mode, first_env)

    def reset(self, *, seed=None, options=None):
        self.started = True
        return self.buffers["observations"], {}

    def advance(self, actions):
        pass


def nothing(_):
    pass


def stepper(vector):
    """A function that steps, with random actions and whatever that costs left out."""
    rng, space = np.random.default_rng(0), vector.single_action_space
    if isinstance(space, gym.spaces.Discrete):
        actions = rng.integers(0, space.n, (64, vector.num_envs))
    else:
        actions = rng.uniform(-0.5, 0.5, (4, vector.num_envs, *space.shape)).astype(np.float32)
    endless = cycle(actions)
    vector.reset(seed=0)
    return lambda: vector.step(next(endless))


def seconds(function, times):
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - start) / times


def compare(name, ours, theirs, rounds=9):
    """Print how many times faster `ours` is than `theirs`; each is (label, function, calls in a round)."""
    for _, function, times in (ours, theirs):
        seconds(function, 1 + times // 10)
    measured = [(seconds(*ours[1:]), seconds(*theirs[1:])) for _ in range(rounds)]
    ratios = [b / a for a, b in measured]
    a, b = (1e6 * statistics.median(side) for side in zip(*measured, strict=True))
    spread = f"{statistics.median(ratios):6.2f}x  ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"{name:<34} {ours[0]} {a:8.1f} us   {theirs[0]:>10} {b:8.1f} us   {spread}", flush=True)


def hand_over():
    envs.NATIVE_ENVS["Nothing"] = Nothing
    vector = envs.make_vec("Nothing", 2, num_workers=2)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        ours = ("2 workers", stepper(vector), 4000)
        compare("1. empty step", ours, ("Pool.map", lambda: pool.map(nothing, (0, 1), chunksize=1), 1000))
    vector.close()


def lunar_lander():
    vector = envs.make_vec("LunarLander-v3", 32, num_workers=2)
    processes = gym.vector.AsyncVectorEnv([lambda: gym.make("LunarLander-v3")] * 32)
    serial = gym.vector.SyncVectorEnv([lambda: gym.make("LunarLander-v3")] * 32)
    half = envs.make_vec("LunarLander-v3", 16, num_workers=0)
    theirs = ("32 processes", stepper(processes), 150)
    compare("2. LunarLander-v3, 32 environments", ("2 workers", stepper(vector), 500), theirs)
    compare("   the same", ("2 workers", stepper(vector), 500), ("SyncVector", stepper(serial), 250))
    compare("   half of them alone, the limit", ("1 process", stepper(half), 500), theirs)
    vector.close()
    half.close()
    serial.close()
    processes.close()


def swarm(num_envs, n_agents):
    agents = num_envs * n_agents
    pooled, alone = (envs.make_vec("Swarm", num_envs, workers, n_agents=n_agents) for workers in (2, 0))
    times = max(5, 50_000 // agents)
    ours, theirs = ("2 workers", stepper(pooled), times), ("none", stepper(alone), times)
    compare(f"3. Swarm, {num_envs} x {n_agents} = {agents} agents", ours, theirs)
    pooled.close()
    alone.close()


if __name__ == "__main__":
    hand_over()
    lunar_lander()
    for num_envs, n_agents in ((8, 10), (32, 10), (64, 10), (128, 10), (512, 10), (2048, 10), (2, 1000), (8, 1000)):
        swarm(num_envs, n_agents)
