"""How fast Swarm steps in one thread. From the repository's root, in under a minute:

    python benchmarks/swarm_step.py

A step is all of `make_vec("Swarm", ..., num_workers=0).step`: physics, observations, rewards, infos, and the reset of
every episode that ends; the random actions are drawn beforehand. The sizes take turns, round after round and whole
episodes of 250 steps each time, so that a busy machine slows them all. The table has the median over the rounds in
million agent-steps/s, with its smallest and largest value. A ratio is the cost of an agent-step among 10,000 agents
over that among 100, at the same density and in the same round: 1 means that the cost does not grow with the swarm.

The last ratio is to PlainSwarm, the same step in NumPy, on whole batches. Before they are timed both play an episode,
and have to see and to earn the same.
"""

import numpy as np
from common import STEP_ROUNDS, agent_steps_per_second, median_and_range, step_sizes, take_turns

import envs

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


class PlainSwarm:
    """Swarm with its default arguments, as one would write it in NumPy."""

    def __init__(self, num_envs, n_agents):
        world = envs.make_vec("Swarm", num_envs, 0, n_agents=n_agents)
        self.action_space = world.action_space
        self.params = world.params
        _, _, self.n_neighbors = world.buffers["neighbors"].shape
        self.rng = np.random.default_rng(0)
        self.reset()

    def reset(self):
        num_envs, n_agents, _ = self.action_space.shape
        self.position = self.rng.uniform(0, self.params.box_size, (num_envs, n_agents, 2))
        self.heading = self.rng.uniform(-np.pi, np.pi, (num_envs, n_agents))
        self.turn = np.zeros((num_envs, n_agents))
        self.elapsed = 0
        self.totals = np.zeros(num_envs)  # returns of the episode so far
        return self.observe()

    def step(self, actions):
        forward, left = np.moveaxis(np.clip(actions.astype(float), -1, 1), -1, 0)
        turn = np.arctan2(envs.SWARM_PUSH * left, 1 + envs.SWARM_PUSH * forward)
        self.turn = np.clip(turn, -self.params.max_turn, self.params.max_turn)
        self.heading = self.heading + self.turn
        direction = np.stack([np.cos(self.heading), np.sin(self.heading)], axis=-1)
        self.position = (self.position + self.params.speed * self.params.dt * direction) % self.params.box_size

        observations = self.observe()
        radius = self.params.radius
        bell = np.exp(-((self.distance - 0.1 * radius) ** 2) / (2 * (0.2 * radius) ** 2))
        cohesion = (bell * self.seen).sum(-1) / self.seen.sum(-1).clip(1)
        mean = direction.mean(axis=1, keepdims=True)
        order = (direction * mean).sum(-1) / np.sqrt((mean**2).sum(-1)).clip(1e-9)
        rewards = 0.4 * cohesion - 0.01 * np.abs(self.turn) + 0.6 * order
        self.totals += rewards.mean(-1)

        self.elapsed += 1
        truncations = np.full(len(rewards), self.elapsed == EPISODE)
        infos = {"neighbors": self.neighbors}
        if truncations[0]:
            infos |= {"final_obs": observations, "episode": {"r": self.totals}}
            observations = self.reset()
        return observations, rewards.astype(np.float32), np.zeros_like(truncations), truncations, infos

    def observe(self):
        """(num_envs, n_agents, 8 * n_neighbors + 12)"""
        params = self.params
        offset = self.position[:, None] - self.position[:, :, None]  # (num_envs, n_agents, n_agents, 2), i to j
        offset -= params.box_size * np.rint(offset / params.box_size)
        self.distance = np.sqrt((offset**2).sum(-1))
        self.seen = (self.distance <= params.radius) & ~np.eye(offset.shape[1], dtype=bool)
        nearest = np.where(self.seen, self.distance, np.inf).argsort(-1)[..., : self.n_neighbors]
        present = np.take_along_axis(self.seen, nearest, -1)  # (num_envs, n_agents, n_neighbors)
        self.neighbors = np.where(present, nearest, np.arange(offset.shape[1])[:, None])

        # Offsets and headings of all others in the own frame of each
        cos, sin = np.cos(self.heading)[..., None], np.sin(self.heading)[..., None]
        forward = (cos * offset[..., 0] + sin * offset[..., 1]) / params.radius
        left = (cos * offset[..., 1] - sin * offset[..., 0]) / params.radius
        relative = self.heading[:, None] - self.heading[..., None]
        pose = np.stack([forward, left, np.cos(relative), np.sin(relative)], axis=-1)

        count = self.seen.sum(-1, keepdims=True)
        mean = (pose * self.seen[..., None]).sum(-2) / count.clip(1)  # (num_envs, n_agents, 4)
        mean = np.concatenate([mean, near(mean)], axis=-1) * (count > 0)
        pose = np.take_along_axis(pose, nearest[..., None], -2)
        neighbors = np.concatenate([pose, near(pose), np.ones_like(pose[..., :1])], axis=-1) * present[..., None]
        observations = [
            neighbors.reshape(*neighbors.shape[:2], -1),
            self.turn[..., None] / params.max_turn,
            count / (count + self.n_neighbors),
            mean,
            np.zeros((*mean.shape[:2], 3)),  # no obstacles
        ]
        return np.concatenate(observations, axis=-1).astype(np.float32)


def near(pose):
    """Direction and spacing of an offset in radii."""
    distance = np.sqrt((pose[..., :2] ** 2).sum(-1, keepdims=True))
    return np.concatenate([pose[..., :2] / (distance + 0.05), (distance - 0.1) / (distance + 0.1)], axis=-1)


def play_alike(vector, plain, actions):
    """Play an episode with both."""
    vector.reset(seed=0, options={"position": plain.position, "heading": plain.heading})
    for step in range(EPISODE):
        observations, rewards, _, _, infos = vector.step(actions[step % len(actions)])
        plain_observations, plain_rewards, _, _, plain_infos = plain.step(actions[step % len(actions)])
        np.testing.assert_allclose(plain_rewards, rewards, atol=1e-5)
        np.testing.assert_array_equal(plain_infos["neighbors"], infos.get("final_info", infos)["neighbors"])
        if step < EPISODE - 1:
            np.testing.assert_allclose(plain_observations, observations, atol=1e-5)
    np.testing.assert_allclose(plain_infos["final_obs"], infos["final_obs"], atol=1e-5)
    np.testing.assert_allclose(plain_infos["episode"]["r"], infos["episode"]["r"], rtol=1e-5)


def main():
    speeds = step_sizes("Swarm", SIZES, EPISODE)
    for large, small in (
        ("10,000 agents", "100 agents"),
        ("10,000 agents", "1,000 agents"),
        ("10,000 agents, 1,000 obstacles", "100 agents, 10 obstacles"),
    ):
        ratios = np.divide(speeds[small], speeds[large])
        print(f"cost per agent-step, {large} over {small}: {median_and_range(ratios, 2)}")

    num_envs, n_agents = SIZES["10 agents x 32 envs"].values()
    vector = envs.make_vec("Swarm", num_envs, 0, n_agents=n_agents)
    plain = PlainSwarm(num_envs, n_agents)
    space = vector.action_space
    actions = np.random.default_rng(0).uniform(space.low, space.high, (8, *space.shape)).astype(np.float32)
    play_alike(vector, plain, actions)
    contestants = {
        "ours": lambda: agent_steps_per_second(vector, actions, EPISODE),
        "NumPy": lambda: agent_steps_per_second(plain, actions, EPISODE),
    }
    speeds = take_turns(contestants, STEP_ROUNDS)
    ratios = np.divide(speeds["ours"], speeds["NumPy"])
    print(f"times as fast as NumPy, {n_agents} agents x {num_envs} envs: {median_and_range(ratios)}")


if __name__ == "__main__":
    main()
