"""An environment that takes its time, for benchmarks/async_throughput.py; registered as Sleepy-v0 when imported.

A step sleeps for 0 to 4 ms, uniformly, and three times as long in one process: the first one that makes such
environments after the learner itself has.
"""

import multiprocessing
import os
import time

import gymnasium as gym
import numpy as np

EPISODE = 20  # steps
processes = multiprocessing.Array("q", 2)  # the learner, which makes environments to see their spaces; the slow one


class Sleepy(gym.Env):
    """Four random numbers to see, two actions, a reward for the action that has the sign of the first number."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        with processes.get_lock():
            free = [place for place in range(2) if processes[place] == 0]
            if free and os.getpid() not in processes[:]:
                processes[free[0]] = os.getpid()
            self.slowness = 3 if os.getpid() == processes[1] else 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.elapsed = 0
        self.obs = self.np_random.uniform(-1, 1, 4).astype(np.float32)
        return self.obs, {}

    def step(self, action):
        time.sleep(self.slowness * self.np_random.uniform(0.0, 0.004))
        reward = float(action == (self.obs[0] > 0))
        self.elapsed += 1
        self.obs = self.np_random.uniform(-1, 1, 4).astype(np.float32)
        return self.obs, reward, False, self.elapsed == EPISODE, {}


gym.register("Sleepy-v0", Sleepy)
