"""The world of async_rnd.py: a corridor with a reward at its far end, and nothing on the way that points there."""

import gymnasium as gym
import numpy as np

LENGTH = 50  # cells
STEPS = 100  # before the episode is cut off


class Corridor(gym.Env):
    """Observes the cell, one-hot. In each, one of two actions leads on and the other back; which is drawn once for all.

    So no habit such as always going right will do: an agent has to learn every cell's action, as in bsuite's deep sea
    (Osband et al., arXiv 1908.03568). Random actions reach the end once in a million episodes.
    """

    observation_space = gym.spaces.Box(0.0, 1.0, (LENGTH,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self):
        self.leads_on = np.random.default_rng(0).integers(2, size=LENGTH)

    def observe(self):
        return np.eye(LENGTH, dtype=np.float32)[self.cell]

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = 0
        return self.observe(), {}

    def step(self, action):
        self.cell = max(0, self.cell + (1 if action == self.leads_on[self.cell] else -1))
        arrived = self.cell == LENGTH - 1
        return self.observe(), float(arrived), arrived, False, {}


gym.register("Corridor-v0", Corridor, max_episode_steps=STEPS)
