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
import time
from functools import partial
from itertools import cycle

import gymnasium as gym
import numpy as np
from common import take_turns

import envs


class Nothing(envs.NativeVectorEnv):
    """An environment whose step is empty: what is left is the hand-over."""

    def __init__(self, num_envs, render_mode=None, first_env=0):
        space = gym.spaces.Box(-1, 1, (1,))  # of observations and of actions
        super().__init__(num_envs, space, space, render_mode, first_env)

    def reset(self, *, seed=None, options=None):
        self.started = True
        return self.buffers["observations"], {}

    def advance(self, actions):
        pass


def nothing(_):
    pass


def stepper(vector):
    """A function that steps, with random actions and whatever that costs left out."""
    rng = np.random.default_rng(0)
    space = vector.single_action_space
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
    contestants = {}
    for label, function, times in (ours, theirs):
        seconds(function, 1 + times // 10)  # warms up
        contestants[label] = partial(seconds, function, times)
    measured = take_turns(contestants, rounds)
    our_seconds, their_seconds = measured.values()
    ratios = np.divide(their_seconds, our_seconds)
    spread = f"{np.median(ratios):6.2f}x  ({ratios.min():.2f} to {ratios.max():.2f})"
    sides = (
        f"{ours[0]} {1e6 * np.median(our_seconds):8.1f} us   {theirs[0]:>10} {1e6 * np.median(their_seconds):8.1f} us"
    )
    print(f"{name:<34} {sides}   {spread}", flush=True)


def hand_over():
    envs.NATIVE_ENVS["Nothing"] = Nothing
    vector = envs.make_vec("Nothing", 2, num_workers=2)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        ours = ("2 workers", stepper(vector), 4000)
        theirs = ("Pool.map", lambda: pool.map(nothing, (0, 1), chunksize=1), 1000)
        compare("1. empty step", ours, theirs)
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
    pooled = envs.make_vec("Swarm", num_envs, 2, n_agents=n_agents)
    alone = envs.make_vec("Swarm", num_envs, 0, n_agents=n_agents)
    times = max(5, 50_000 // agents)
    ours = ("2 workers", stepper(pooled), times)
    theirs = ("none", stepper(alone), times)
    compare(f"3. Swarm, {num_envs} x {n_agents} = {agents} agents", ours, theirs)
    pooled.close()
    alone.close()


if __name__ == "__main__":
    hand_over()
    lunar_lander()
    for num_envs, n_agents in ((8, 10), (32, 10), (64, 10), (128, 10), (512, 10), (2048, 10), (2, 1000), (8, 1000)):
        swarm(num_envs, n_agents)
