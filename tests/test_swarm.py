"""Swarm keeps what its docstring promises.

The kernel is laid beside `Reference`, a slow NumPy swarm written from that docstring alone: all pairs of agents, nine
images of each, headings as angles. Where two answers are right (two neighbours equally far, an agent exactly on a
radius) the reference says so through `margin`, and the example is put aside.
"""

import colorsys
import math
import re

import gymnasium
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import envs

AGENT_DIAMETER, OBSTACLE_RADIUS = 0.1, 0.5
TERMS = ("alignment", "cohesion", "separation", "turning", "order", "obstacle")
DEFAULT_WEIGHTS = (0.0, 0.4, 0.0, 0.01, 0.6, 1.0)
SHIFTS = np.array([(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)])

settings.register_profile("swarm", deadline=None, derandomize=True, max_examples=100, print_blob=True)
settings.load_profile("swarm")


# ----------------------------------------------------------------------------------------------------------------------
# Reference
# ----------------------------------------------------------------------------------------------------------------------


class Reference:
    """One swarm by brute force: `position` (n, 2), `heading` (n,), `obstacle` (m, 2), and the env's arguments."""

    def __init__(self, position, heading, obstacle, box_size, radius=1.5, speed=1.0, dt=0.2, max_turn=math.pi,
                 n_neighbors=6, weights=DEFAULT_WEIGHTS, count_self=False):  # fmt: skip
        self.position, self.heading, self.obstacle = np.array(position), np.array(heading), np.array(obstacle)
        self.box_size, self.radius, self.step_length, self.max_turn = box_size, radius, speed * dt, max_turn
        self.n_neighbors, self.weights, self.count_self = n_neighbors, weights, count_self
        self.turn = np.zeros(len(position))
        self.margin = math.inf  # how near a decision has come to a tie, over all steps so far

    def ways_to(self, points):
        """(n_agents, n_points, 2): from every agent the shortest way to any of the nine images of every point."""
        ways = points[None, :, None] + SHIFTS * self.box_size - self.position[:, None, None]
        shortest = np.argmin((ways**2).sum(-1), axis=-1)
        return np.take_along_axis(ways, shortest[..., None, None], axis=2)[:, :, 0]

    def own_frame(self, i, way):
        """Forward and left of agent i."""
        cos, sin = math.cos(self.heading[i]), math.sin(self.heading[i])
        return [way[0] * cos + way[1] * sin, -way[0] * sin + way[1] * cos]

    def decide(self, *gaps):
        for gap in gaps:
            self.margin = min(self.margin, np.min(np.abs(gap), initial=math.inf))

    def closeness(self, distance):
        return np.exp(-((distance - 0.1 * self.radius) ** 2) / (2 * (0.2 * self.radius) ** 2))

    def step(self, actions):
        """Rewards (n_agents,); the terms, mean over agents, and the metrics are left in `terms` and `metrics`."""
        self.turn = np.clip(actions, -self.max_turn, self.max_turn)
        self.heading = self.heading + self.turn
        ahead = np.stack([np.cos(self.heading), np.sin(self.heading)], axis=-1)
        self.position = (self.position + self.step_length * ahead) % self.box_size
        inside = np.zeros(len(self.position))
        for i, ways in enumerate(self.ways_to(self.obstacle)):
            if len(ways) == 0:
                continue
            distances = np.hypot(*ways.T)
            nearest = np.argmin(distances)
            self.decide(distances - OBSTACLE_RADIUS, np.diff(np.sort(distances)))
            if distances[nearest] < OBSTACLE_RADIUS:
                inside[i] = 1
                outward = -ways[nearest] / distances[nearest]
                self.position[i] = (self.obstacle[nearest] + OBSTACLE_RADIUS * outward) % self.box_size

        terms = {name: np.zeros(len(self.position)) for name in TERMS}
        mean = ahead.mean(axis=0)
        self.decide(np.hypot(*mean) * 1e-3)  # the mean of opposite headings has no direction
        for i, others, distances in self.others_seen():
            self.decide(distances - AGENT_DIAMETER)
            if len(others) > 0:
                terms["alignment"][i] = np.cos(self.heading[others] - self.heading[i]).mean()
            counted = np.append(distances, 0.0) if self.count_self else distances
            if len(counted) > 0:
                terms["cohesion"][i] = self.closeness(counted).mean()
            terms["separation"][i] = -(distances < AGENT_DIAMETER).sum()
        terms["turning"] = -np.abs(self.turn)
        terms["order"] = np.cos(self.heading - math.atan2(mean[1], mean[0]))
        terms["obstacle"] = -inside
        self.terms = {name: weight * terms[name].mean() for name, weight in zip(TERMS, self.weights, strict=True)}
        self.metrics = {
            "polar_order": np.hypot(*mean),
            "cohesion": terms["cohesion"].mean(),
            "collisions": -terms["separation"].mean(),
        }
        return sum(weight * terms[name] for name, weight in zip(TERMS, self.weights, strict=True))

    def others_seen(self):
        """For every agent: itself, the others within the radius, nearest first, and their distances."""
        for i, ways in enumerate(self.ways_to(self.position)):
            distances = np.hypot(*ways.T)
            self.decide(np.delete(distances, i) - self.radius)
            others = [j for j in np.argsort(distances) if j != i and distances[j] <= self.radius]
            self.decide(np.diff(distances[others]))
            yield i, np.array(others, int), distances[others]

    def observe(self):
        """Observations (n_agents, 5 * n_neighbors + 9) and neighbours (n_agents, n_neighbors)."""
        observations, neighbors = [], []
        ways, obstacle_ways = self.ways_to(self.position), self.ways_to(self.obstacle)
        for i, others, _ in self.others_seen():
            features = []
            for j in others[: self.n_neighbors]:
                relative = self.heading[j] - self.heading[i]
                features += [*np.divide(self.own_frame(i, ways[i, j]), self.radius)]
                features += [math.cos(relative), math.sin(relative), 1]
            features += [0] * (5 * self.n_neighbors - len(features))
            features += [self.turn[i] / self.max_turn, len(others) / (len(others) + self.n_neighbors)]
            if len(others) > 0:
                relative = self.heading[others] - self.heading[i]
                features += [*np.divide(self.own_frame(i, ways[i, others].mean(axis=0)), self.radius)]
                features += [np.cos(relative).mean(), np.sin(relative).mean()]
            else:
                features += [0, 0, 0, 0]
            distances, reach = np.hypot(*obstacle_ways[i].T), self.radius + OBSTACLE_RADIUS
            self.decide(distances - reach, np.diff(np.sort(distances)))
            if np.any(distances <= reach):
                features += [*np.divide(self.own_frame(i, obstacle_ways[i, np.argmin(distances)]), reach), 1]
            else:
                features += [0, 0, 0]
            observations.append(features)
            absent = self.n_neighbors - min(len(others), self.n_neighbors)
            neighbors.append([*others[: self.n_neighbors], *[i] * absent])
        return np.array(observations, np.float32), np.array(neighbors)


# ----------------------------------------------------------------------------------------------------------------------
# Helpers
# ----------------------------------------------------------------------------------------------------------------------


def make(num_envs=1, **env_kwargs):
    return envs.make_vec("Swarm", num_envs, num_workers=0, **env_kwargs)


def random_actions(vector, steps, seed=0, reach=math.pi):
    """(steps, num_envs, n_agents, 1)"""
    return np.random.default_rng(seed).uniform(-reach, reach, (steps, *vector.action_space.shape)).astype(np.float32)


def play(vector, actions):
    """What `step` returns for each of the actions."""
    return [vector.step(action) for action in actions]


def same(a, b):
    """Whether two nested returns hold the same, to the last bit; NaN equals nothing."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(*pair) for pair in zip(a, b, strict=True))
    return a.dtype == b.dtype and np.array_equal(a, b)


def copied(a):
    if isinstance(a, dict):
        return {key: copied(value) for key, value in a.items()}
    return tuple(copied(value) for value in a) if isinstance(a, (tuple, list)) else a.copy()


def slices(value, part):
    """The part of a nested return that belongs to some of the environments."""
    if isinstance(value, dict):
        return {key: slices(entry, part) for key, entry in value.items()}
    return tuple(slices(entry, part) for entry in value) if isinstance(value, (tuple, list)) else value[part]


def from_uniform(sample, low, high):
    """Kolmogorov and Smirnov's distance from the uniform distribution, over the 0.1 % bound for that many numbers."""
    sample = np.sort((np.ravel(sample) - low) / (high - low))
    assert sample[0] >= 0 and sample[-1] <= 1
    ranks = np.arange(len(sample) + 1) / len(sample)
    distance = max(np.abs(sample - ranks[:-1]).max(), np.abs(sample - ranks[1:]).max())
    return distance / (1.95 / math.sqrt(len(sample)))


def headings(vector):
    direction = vector.get_state()["direction"]
    return np.arctan2(direction[..., 1], direction[..., 0])


# ----------------------------------------------------------------------------------------------------------------------
# Physics, observations and rewards are those of the reference
# ----------------------------------------------------------------------------------------------------------------------


@st.composite
def swarms(draw, agent_grid, obstacle_grid):
    """Arguments of an env, starts for two of them, and actions (steps, 2, n_agents, 1), some beyond the bounds."""
    box_size = draw(st.floats(10.0, 20.0) if obstacle_grid else st.floats(2.0, 20.0))
    widest = 0.19 if obstacle_grid else 0.25 if agent_grid else 0.5
    radius = max(0.12, box_size * draw(st.floats(0.05, widest)))
    fits = int(0.5 * box_size**2 / (math.pi * OBSTACLE_RADIUS**2))
    n_agents = draw(st.integers(10 if agent_grid else 1, 60))
    n_obstacles = draw(st.integers(10, 20) if obstacle_grid else st.integers(0, min(fits, 9)))
    weights = draw(st.lists(st.floats(-2, 2), min_size=6, max_size=6))
    arguments = dict(
        box_size=box_size,
        radius=radius,
        speed=draw(st.floats(0.1, 3.0)),
        dt=draw(st.floats(0.05, 0.5)),
        max_turn=draw(st.floats(0.05, math.pi)),
        n_neighbors=draw(st.integers(1, 12)),
        count_self=draw(st.booleans()),
    )
    steps = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([1.0, 0.3, 0.05]))  # from all over the box to a crowd, often across its edge
    crowd = rng.uniform(0, box_size, (2, 1, 2)) * draw(st.sampled_from([0, 1]))
    start = {
        "position": (crowd + spread * rng.uniform(-0.5, 0.5, (2, n_agents, 2)) * box_size) % box_size,
        "heading": rng.uniform(-math.pi, math.pi, (2, n_agents)),
        "obstacle": rng.uniform(0, box_size, (2, n_obstacles, 2)),
    }
    actions = rng.uniform(-1.5, 1.5, (steps, 2, n_agents, 1)) * arguments["max_turn"]
    return arguments, weights, start, actions.astype(np.float32)


@pytest.mark.parametrize("grids", ["no grid", "agents in a grid", "obstacles in a grid"])
@given(data=st.data())
def test_episodes_match_the_reference(grids, data):
    agent_grid, obstacle_grid = grids == "agents in a grid", grids == "obstacles in a grid"
    arguments, weights, start, actions = data.draw(swarms(agent_grid, obstacle_grid))
    sizes = dict(n_agents=actions.shape[2], n_obstacles=start["obstacle"].shape[1], max_steps=len(actions))
    named_weights = {f"{name}_weight": weight for name, weight in zip(TERMS, weights, strict=True)}
    vector = make(2, **sizes, **named_weights, **arguments)
    assert (vector.params.cells > 3) >= agent_grid and (vector.params.obstacle_cells > 3) == obstacle_grid
    references = [
        Reference(*(start[name][env] for name in ("position", "heading", "obstacle")), weights=weights, **arguments)
        for env in range(2)
    ]

    def laid_beside(observations, neighbors):
        for env, reference in enumerate(references):
            expected, expected_neighbors = reference.observe()
            assume(reference.margin > 1e-9)
            np.testing.assert_allclose(observations[env], expected, rtol=0, atol=1e-6)
            np.testing.assert_array_equal(neighbors[env], expected_neighbors)
            assert vector.single_observation_space.contains(observations[env])

    observations, infos = vector.reset(seed=0, options=start)
    laid_beside(observations, infos["neighbors"])
    expected_stats = [dict.fromkeys(vector.stat_names, 0.0) for _ in range(2)]
    for step, action in enumerate(actions, start=1):
        observations, rewards, terminations, truncations, infos = vector.step(action)
        for env, reference in enumerate(references):
            expected = reference.step(action[env, :, 0].astype(float))
            assume(reference.margin > 1e-9)
            np.testing.assert_allclose(rewards[env], expected, rtol=1e-6, atol=5e-5)  # 59 collisions, in float32
            stats = expected_stats[env]
            stats["r"] += expected.mean()
            stats["l"] += 1
            for name, value in reference.metrics.items():
                stats[name] += value / len(actions)
            for name, value in reference.terms.items():
                stats["reward_" + name] += value
        assert not terminations.any() and (truncations == (step == len(actions))).all()
        if step < len(actions):
            laid_beside(observations, infos["neighbors"])
    laid_beside(infos["final_obs"], infos["final_info"]["neighbors"])
    for env in range(2):
        for name, value in expected_stats[env].items():
            np.testing.assert_allclose(infos["episode"][name][env], value, rtol=1e-7, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("n_obstacles", [0, 60])
def test_a_swarm_of_hundreds_in_a_grid_matches_the_reference(n_obstacles):
    vector = make(n_agents=400, n_obstacles=n_obstacles, max_steps=10)
    vector.reset(seed=5)
    state = vector.get_state()
    reference = Reference(state["position"][0], headings(vector)[0], state["obstacle"][0], vector.params.box_size)
    assert vector.params.cells > 15 and (vector.params.obstacle_cells > 5) == (n_obstacles > 0)
    for action in random_actions(vector, 3):
        observations, rewards, _, _, infos = vector.step(action)
        expected, (expected_observations, neighbors) = reference.step(action[0, :, 0]), reference.observe()
        np.testing.assert_allclose(rewards[0], expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(observations[0], expected_observations, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(infos["neighbors"][0], neighbors)
    assert reference.margin > 1e-9


def test_two_agents_by_hand():
    vector = make(n_agents=2, n_neighbors=1, box_size=10)
    start = {"position": [[[5, 5], [5.6, 5.3]]], "heading": [[0, math.pi / 2]]}
    observations, infos = vector.reset(seed=0, options=start)
    # The first looks along x and has the second 0.6 ahead and 0.3 to its left; the second looks along y.
    crowding, no_obstacle = 0.5, [0, 0, 0]
    np.testing.assert_allclose(
        observations[0, 0], [0.4, 0.2, 0, 1, 1, 0, crowding, 0.4, 0.2, 0, 1, *no_obstacle], atol=1e-7
    )
    np.testing.assert_allclose(
        observations[0, 1], [-0.2, 0.4, 0, -1, 1, 0, crowding, -0.2, 0.4, 0, -1, *no_obstacle], atol=1e-7
    )
    np.testing.assert_array_equal(infos["neighbors"], [[[1], [0]]])
    # A quarter turn to the left each, then 0.2 straight ahead: one goes up, the other back along x.
    vector.step(np.full((1, 2, 1), math.pi / 2))
    np.testing.assert_allclose(vector.get_state()["position"][0], [[5, 5.2], [5.4, 5.3]], atol=1e-7)


def test_an_agent_that_leaves_the_box_comes_in_on_the_other_side():
    vector = make(n_agents=4, box_size=10)
    start = {"position": [[[9.9, 5], [0.1, 5], [5, 9.9], [5, 0.1]]]}
    vector.reset(seed=0, options=start | {"heading": [[0, math.pi, math.pi / 2, -math.pi / 2]]})
    vector.step(np.zeros((1, 4, 1)))
    np.testing.assert_allclose(vector.get_state()["position"][0], [[0.1, 5], [9.9, 5], [5, 0.1], [5, 9.9]], atol=1e-12)


def test_an_agent_that_ends_inside_an_obstacle_is_put_back_on_its_edge_and_pays_once():
    vector = make(n_agents=1, n_obstacles=1, box_size=10, order_weight=0, turning_weight=0)
    start = {"position": [[[9.25, 0]]], "heading": [[0]], "obstacle": [[[9.9, 0]]]}
    observations, _ = vector.reset(seed=0, options=start)
    np.testing.assert_allclose(observations[0, 0, -3:], [0.65 / 2, 0, 1], atol=1e-7)
    observations, rewards, _, _, _ = vector.step(np.zeros((1, 1, 1)))
    np.testing.assert_allclose(vector.get_state()["position"], [[[9.4, 0]]], atol=1e-12)
    np.testing.assert_allclose(observations[0, 0, -3:], [0.5 / 2, 0, 1], atol=1e-7)
    assert rewards[0, 0] == -1
    assert vector.step(np.full((1, 1, 1), math.pi))[1][0, 0] == 0


def test_an_agent_that_ends_on_the_centre_of_an_obstacle_goes_back_the_way_it_came():
    vector = make(n_agents=1, n_obstacles=1, box_size=10)
    vector.reset(seed=0, options={"position": [[[4.8, 5]]], "heading": [[0]], "obstacle": [[[5, 5]]]})
    vector.step(np.zeros((1, 1, 1)))
    np.testing.assert_allclose(vector.get_state()["position"], [[[4.5, 5]]], atol=1e-6)


@pytest.mark.parametrize("box_size", [6.0, 7.0, 10.0])
def test_agents_on_cell_edges_and_exactly_a_radius_apart_see_each_other_both_ways(box_size):
    side = np.arange(10) * box_size / 10
    lattice = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1).reshape(1, 100, 2)
    vector = make(n_agents=100, box_size=box_size, radius=box_size / 10, n_neighbors=8)
    _, infos = vector.reset(seed=0, options={"position": lattice})
    sees = np.zeros((100, 100), bool)
    sees[np.arange(100)[:, None], infos["neighbors"][0]] = True
    assert (sees == sees.T).all() and sees.sum() > 100  # everybody is in their own list where a neighbour is absent


def test_positions_out_of_all_bounds_stay_within_memory():
    vector = make(n_agents=100, speed=1e20)
    vector.reset(seed=0)
    play(vector, random_actions(vector, 20))
    state = vector.get_state()
    vector.set_state(state | {"position": state["position"] - 1e9})
    assert np.isfinite(vector.step(vector.action_space.low)[1]).all()


def test_an_agent_put_back_over_the_edge_of_the_box_comes_in_on_the_other_side():
    vector = make(n_agents=1, n_obstacles=1, box_size=10)
    vector.reset(seed=0, options={"position": [[[9.9, 5]]], "heading": [[0]], "obstacle": [[[0.45, 5]]]})
    vector.step(np.zeros((1, 1, 1)))
    np.testing.assert_allclose(vector.get_state()["position"], [[[9.95, 5]]], atol=1e-12)


def test_a_start_is_wrapped_into_the_box_and_the_episode_after_it_starts_at_random():
    vector, states = make(n_agents=2, n_obstacles=1, box_size=10, max_steps=1), []
    for boxes, turns in ((0, 0), (3, 2), (-2, -1)):
        start = {"position": np.array([[[1, 2], [9, 8]]]), "obstacle": np.array([[[4, 5]]])}
        start = {name: points + 10.0 * boxes for name, points in start.items()}
        vector.reset(seed=0, options=start | {"heading": np.array([[0.5, -0.5]]) + 2 * math.pi * turns})
        states.append(vector.get_state())
    for state in states[1:]:
        for name, array in state.items():
            np.testing.assert_allclose(array, states[0][name], atol=1e-12)
    vector.step(np.zeros((1, 2, 1)))
    after = vector.get_state()
    for name in ("position", "direction", "obstacle"):
        assert not np.isclose(after[name], states[0][name], atol=0.01).all(axis=-1).any()


def test_the_default_reward_is_the_published_one():
    for count_self in (False, True):
        vector = make(n_agents=40, count_self=count_self)
        assert vector.params.box_size == pytest.approx(10)
        vector.reset(seed=1)
        action = random_actions(vector, 1)[0]
        rewards = vector.step(action)[1][0]
        position, heading = vector.get_state()["position"][0], headings(vector)[0]
        mean_heading = math.atan2(np.sin(heading).sum(), np.cos(heading).sum())
        for i in range(40):
            bells = [math.exp(-((0 - 0.15) ** 2) / (2 * 0.3**2))] if count_self else []
            for j in range(40):
                dx, dy = ((position[j] - position[i] + 5) % 10) - 5
                if j != i and math.hypot(dx, dy) <= 1.5:
                    bells.append(math.exp(-((math.hypot(dx, dy) - 0.15) ** 2) / (2 * 0.3**2)))
            cohesion = sum(bells) / max(len(bells), 1)
            expected = 0.4 * cohesion + 0.6 * math.cos(heading[i] - mean_heading) - 0.01 * abs(action[0, i, 0])
            assert rewards[i] == pytest.approx(expected, abs=1e-6)


def test_count_self_gives_a_lone_agent_cohesion_and_nothing_else():
    for count_self, cohesion in ((False, 0.0), (True, math.exp(-0.125))):
        vector = make(n_agents=1, count_self=count_self, separation_weight=1, max_steps=1)
        observations, _ = vector.reset(seed=0)
        _, rewards, _, _, infos = vector.step(np.full((1, 1, 1), 0.5))
        assert rewards[0, 0] == pytest.approx(0.4 * cohesion + 0.6 - 0.01 * 0.5, abs=1e-6)
        assert infos["episode"]["cohesion"][0] == pytest.approx(cohesion, abs=1e-12)
        assert infos["episode"]["collisions"][0] == 0
        own_turn = [0.5 / math.pi]  # all else is zero: no neighbours, no crowding, no obstacle
        np.testing.assert_allclose(infos["final_obs"][0, 0], [0] * 30 + own_turn + [0] * 8, atol=1e-7)
        assert not observations.any()


def test_actions_beyond_the_bounds_act_as_the_bounds():
    within, beyond = make(2, max_turn=0.3), make(2, max_turn=0.3)
    within.reset(seed=0), beyond.reset(seed=0)
    for action in random_actions(within, 20, reach=3):
        assert same(within.step(np.clip(action, -0.3, 0.3)), beyond.step(action))


def test_headings_stay_unit_vectors_and_positions_in_the_box_over_10000_steps():
    vector = make(n_agents=5, max_steps=20_000, noise=0.1)
    vector.reset(seed=0)
    play(vector, random_actions(vector, 10_000))
    state = vector.get_state()
    np.testing.assert_allclose(np.linalg.norm(state["direction"], axis=-1), 1, rtol=0, atol=1e-15)
    assert (state["position"] >= 0).all() and (state["position"] < vector.params.box_size).all()
    assert state["elapsed"][0] == 10_000


# ----------------------------------------------------------------------------------------------------------------------
# Symmetry: nothing depends on where the world is, how it is turned, or who is called what
# ----------------------------------------------------------------------------------------------------------------------

WORLD = dict(n_agents=30, box_size=8.0, n_obstacles=3)


def random_start(seed, box_size=8.0, within=8.0, n_agents=30, n_obstacles=3):
    """Starts of two environments, everything within a square of that side in the middle of the box."""
    rng = np.random.default_rng(seed)
    low, high = (box_size - within) / 2, (box_size + within) / 2
    return {
        "position": rng.uniform(low, high, (2, n_agents, 2)),
        "heading": rng.uniform(-math.pi, math.pi, (2, n_agents)),
        "obstacle": rng.uniform(low, high, (2, n_obstacles, 2)),
    }


def rollout(start, actions, **env_kwargs):
    """Observations, neighbours (steps + 1, ...) and rewards (steps, ...) from a given start."""
    vector = make(2, **env_kwargs)
    observations, infos = vector.reset(seed=0, options=start)
    steps = play(vector, actions)
    return (
        np.stack([observations, *(step[0] for step in steps)]),
        np.stack([infos["neighbors"], *(step[4]["neighbors"] for step in steps)]),
        np.stack([step[1] for step in steps]),
    )


def assert_same_rollout(a, b):
    np.testing.assert_allclose(a[0], b[0], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(a[1], b[1])
    np.testing.assert_allclose(a[2], b[2], rtol=0, atol=1e-5)


def turned(points, angle, center):
    cos, sin = math.cos(angle), math.sin(angle)
    return (points - center) @ np.array([[cos, sin], [-sin, cos]]) + center


@given(seed=st.integers(0, 2**32 - 1), shift=st.tuples(st.floats(-20, 20), st.floats(-20, 20)))
def test_moving_the_world_changes_nothing(seed, shift):
    start, actions = random_start(seed), random_actions(make(2, **WORLD), 6, seed)
    moved = start | {name: (start[name] + shift) % 8.0 for name in ("position", "obstacle")}
    assert_same_rollout(rollout(start, actions, **WORLD), rollout(moved, actions, **WORLD))


@given(seed=st.integers(0, 2**32 - 1), quarters=st.integers(1, 3))
def test_quarter_turns_of_the_whole_box_change_nothing(seed, quarters):
    start, actions = random_start(seed), random_actions(make(2, **WORLD), 6, seed)
    angle = quarters * math.pi / 2
    rotated = {name: turned(start[name], angle, center=4.0) % 8.0 for name in ("position", "obstacle")}
    rotated["heading"] = start["heading"] + angle
    assert_same_rollout(rollout(start, actions, **WORLD), rollout(rotated, actions, **WORLD))


@given(seed=st.integers(0, 2**32 - 1), angle=st.floats(-math.pi, math.pi))
def test_turning_a_swarm_far_from_the_edges_changes_nothing(seed, angle):
    # Nobody comes nearer to an edge than half the radius: 10 - 2.5 sqrt(2) - 6 * 0.2 is more than that.
    world = WORLD | {"box_size": 20.0}
    start, actions = random_start(seed, box_size=20.0, within=5.0), random_actions(make(2, **world), 6, seed)
    rotated = {name: turned(start[name], angle, center=10.0) for name in ("position", "obstacle")}
    rotated["heading"] = start["heading"] + angle
    assert_same_rollout(rollout(start, actions, **world), rollout(rotated, actions, **world))


@given(seed=st.integers(0, 2**32 - 1))
def test_a_mirrored_world_with_mirrored_actions_is_mirrored(seed):
    start, actions = random_start(seed), random_actions(make(2, **WORLD), 6, seed)
    mirrored = {name: start[name] * (1, -1) % 8.0 for name in ("position", "obstacle")}
    mirrored["heading"] = -start["heading"]
    observations, neighbors, rewards = rollout(start, actions, **WORLD)
    sign = np.concatenate(
        [np.tile([1, -1, 1, -1, 1], 6), [-1, 1, 1, -1, 1, -1, 1, -1, 1]]
    )  # left, sin and turn change sign
    assert_same_rollout((observations * sign, neighbors, rewards), rollout(mirrored, -actions, **WORLD))


@given(seed=st.integers(0, 2**32 - 1))
def test_renaming_the_agents_renames_everything(seed):
    start, actions = random_start(seed), random_actions(make(2, **WORLD), 6, seed)
    old_name = np.random.default_rng(seed).permutation(30)
    new_name = np.argsort(old_name)
    renamed = start | {name: start[name][:, old_name] for name in ("position", "heading")}
    observations, neighbors, rewards = rollout(start, actions, **WORLD)
    expected = observations[:, :, old_name], new_name[neighbors[:, :, old_name]], rewards[:, :, old_name]
    assert_same_rollout(expected, rollout(renamed, actions[:, :, old_name], **WORLD))


# ----------------------------------------------------------------------------------------------------------------------
# Randomness: seeds, starts and noise
# ----------------------------------------------------------------------------------------------------------------------

RANDOM = dict(n_agents=7, n_obstacles=2, noise=0.4, max_steps=8)


def seeded_run(vector, seed, steps=20):
    """Everything the environment says after a seed, over two autoresets and a reset without a seed."""
    actions = random_actions(vector, steps)
    return vector.reset(seed=seed), play(vector, actions), vector.reset(), play(vector, actions)


def test_the_same_seed_gives_the_same_run():
    used = make(3, **RANDOM)
    seeded_run(used, 1)
    assert same(seeded_run(used, 7), seeded_run(make(3, **RANDOM), 7))


def test_different_seeds_and_different_environments_of_a_batch_differ():
    starts = np.concatenate([make(8, **RANDOM).reset(seed=seed)[0] for seed in range(20)])
    assert len(np.unique(starts.reshape(160, -1), axis=0)) == 160


@pytest.mark.parametrize("seed", [0, 2**63 - 1, np.int64(5)])
def test_the_whole_range_of_seeds_is_taken(seed):
    assert same(make(2, **RANDOM).reset(seed=seed), make(2, **RANDOM).reset(seed=int(seed)))


@pytest.mark.parametrize("sizes", [(8,), (1,) * 8, (3, 5), (5, 1, 2)])
def test_a_batch_cut_into_slices_is_the_same_batch(sizes):
    whole = seeded_run(make(8, **RANDOM), 11)
    first = 0
    for size in sizes:
        part = envs.Swarm(size, first_env=first, **RANDOM)
        actions = random_actions(make(8, **RANDOM), 20)[:, first : first + size]
        ours = part.reset(seed=11), play(part, actions), part.reset(), play(part, actions)
        assert same(slices(ours, slice(None)), slices(whole, slice(first, first + size)))
        first += size


def test_reset_without_a_seed_runs_the_streams_on():
    a, b = make(3, **RANDOM), make(3, **RANDOM)
    first, again = a.reset(seed=3)[0], a.reset()[0]
    b.reset(seed=3)
    assert not np.array_equal(first, again)
    assert np.array_equal(again, b.reset()[0])


def test_an_environment_that_was_never_given_a_seed_starts_anywhere():
    assert not np.array_equal(make(3).reset()[0], make(3).reset()[0])


def test_starts_are_uniform_over_the_box_and_all_headings():
    vector = make(1000, n_agents=10, n_obstacles=3, box_size=9.0)
    vector.reset(seed=0)
    state = vector.get_state()
    assert from_uniform(headings(vector), -math.pi, math.pi) < 1
    for axis in range(2):
        assert from_uniform(state["obstacle"][..., axis], 0, 9) < 1
    free = make(1000, n_agents=10, box_size=9.0)
    free.reset(seed=0)
    position = free.get_state()["position"]
    for axis in range(2):
        assert from_uniform(position[..., axis], 0, 9) < 1
    counts, _, _ = np.histogram2d(*position.reshape(-1, 2).T, bins=10, range=[[0, 9], [0, 9]])
    assert ((counts - 100) ** 2 / 100).sum() < 148  # chi squared, 99 degrees of freedom, 0.1 %


def test_the_agents_of_a_start_are_independent():
    vector = make(4000, n_agents=2, box_size=9.0)
    vector.reset(seed=0)
    position, heading = vector.get_state()["position"], headings(vector)
    drawn = np.concatenate([position.reshape(4000, 4), heading], axis=1)  # (4000, 6)
    correlation = np.corrcoef(drawn.T) - np.eye(6)
    assert np.abs(correlation).max() < 4 / math.sqrt(4000)


def test_no_agent_starts_inside_an_obstacle():
    vector = make(200, n_agents=20, n_obstacles=20, max_steps=1)
    vector.reset(seed=0)
    for _ in range(3):  # the first start and the two of the autoresets
        state = vector.get_state()
        box_size = vector.params.box_size
        ways = state["position"][:, :, None] - state["obstacle"][:, None]
        ways = (ways + box_size / 2) % box_size - box_size / 2
        assert np.hypot(ways[..., 0], ways[..., 1]).min() > OBSTACLE_RADIUS
        vector.step(np.zeros(vector.action_space.shape))


@pytest.mark.parametrize("noise", [0.2, 2 * math.pi])
def test_noise_is_uniform_and_as_wide_as_it_says(noise):
    vector = make(20, n_agents=50, noise=noise, max_steps=100)
    vector.reset(seed=0)
    turns = []
    for _ in range(10):
        before = headings(vector)
        observations, _, _, _, _ = vector.step(np.zeros(vector.action_space.shape))
        turns.append((headings(vector) - before + math.pi) % (2 * math.pi) - math.pi)
        assert not observations[..., -9].any()  # the last turn that is seen is the commanded one
    turns = np.array(turns)  # (10, 20, 50)
    assert np.abs(turns).max() <= noise / 2 + 1e-12
    assert from_uniform(np.clip(turns, -noise / 2, noise / 2), -noise / 2, noise / 2) < 1
    assert turns.var() == pytest.approx(noise**2 / 12, rel=0.05)
    for axis in range(3):  # steps, environments and agents are independent
        first, second = (np.take(turns, range(k, turns.shape[axis] - 1 + k), axis).ravel() for k in (0, 1))
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(len(first))


def test_noise_costs_no_reward_by_itself():
    vector = make(2, noise=0.5, max_steps=5)
    vector.reset(seed=0)
    infos = play(vector, np.zeros((5, *vector.action_space.shape)))[-1][4]
    assert not infos["episode"]["reward_turning"].any()


def test_without_noise_a_step_draws_nothing():
    vector = make(2, noise=0.0)
    vector.reset(seed=0)
    before = vector.get_state()["rng"]
    play(vector, random_actions(vector, 5))
    assert np.array_equal(vector.get_state()["rng"], before)


# ----------------------------------------------------------------------------------------------------------------------
# Episodes: autoreset in the same step, statistics, copies
# ----------------------------------------------------------------------------------------------------------------------


def test_the_step_that_ends_an_episode_returns_its_last_observation_and_the_next_ones_first():
    # Without noise the steps draw nothing, so that the next start is what a second reset would have drawn.
    quiet = RANDOM | {"noise": 0.0, "max_steps": 5}
    vector, longer, fresh = make(3, **quiet), make(3, **quiet | {"max_steps": 100}), make(3, **quiet)
    for each in (vector, longer, fresh):
        each.reset(seed=2)
    actions = random_actions(vector, 8)
    ours, theirs = play(vector, actions[:5]), play(longer, actions[:5])
    for (*before, infos), (*expected, expected_infos) in zip(ours[:4], theirs[:4], strict=True):
        assert same(before, expected) and same(infos, expected_infos)
    observations, rewards, terminations, truncations, infos = ours[4]
    last_observations, last_rewards, _, _, last_infos = theirs[4]
    assert truncations.all() and not terminations.any()
    assert same(infos["final_obs"], last_observations)
    assert same(infos["final_info"], last_infos)
    assert same(rewards, last_rewards)
    first_observations, first_infos = fresh.reset()
    assert same(observations, first_observations)
    assert same(infos["neighbors"], first_infos["neighbors"])
    assert not observations[..., -9].any()  # nobody has turned yet
    assert same(play(vector, actions[5:]), play(fresh, actions[5:]))


def test_a_step_before_the_first_reset_is_refused():
    with pytest.raises(gymnasium.error.ResetNeeded, match="reset"):
        make().step(np.zeros((1, 10, 1)))


def test_an_episode_is_as_long_as_max_steps_every_time():
    vector = make(2, max_steps=3)
    vector.reset(seed=0)
    steps = play(vector, random_actions(vector, 10))
    assert [step[3].tolist() for step in steps] == [[n % 3 == 0] * 2 for n in range(1, 11)]
    assert all((step[4]["episode"]["l"] == 3).all() for step in steps if step[3].any())
    assert not any(step[2].any() for step in steps)


def test_a_reset_in_mid_episode_starts_the_count_and_the_sums_again():
    vector, fresh = make(2, max_steps=4), make(2, max_steps=4)
    actions = random_actions(vector, 7)
    vector.reset(seed=0)
    play(vector, actions[:3])
    fresh.reset(seed=0)
    fresh.reset()
    vector.reset()
    assert same(play(vector, actions[3:]), play(fresh, actions[3:]))


def test_environments_out_of_step_end_one_by_one_each_behind_its_mask():
    parts = [envs.Swarm(1, first_env=env, **RANDOM) for env in range(3)]
    for env, part in enumerate(parts):
        part.reset(seed=4)
        play(part, random_actions(part, 2 * env))
    batch = make(3, **RANDOM)
    states = [part.get_state() for part in parts]
    batch.set_state({name: np.concatenate([state[name] for state in states]) for name in states[0]})
    ends = []
    for action in random_actions(batch, 9):
        returned = batch.step(action)
        infos, done = returned[4], returned[3]
        ends.append(done.tolist())
        for env, part in enumerate(parts):
            alone = part.step(action[env : env + 1])
            assert same(slices(returned[:4], slice(env, env + 1)), alone[:4])
            if done[env]:
                assert same(slices(infos, slice(env, env + 1)), alone[4])
        for name in ("_final_obs", "_final_info", "_episode"):
            assert (name in infos) == done.any() and (not done.any() or same(infos[name], done))
    assert [n for n, end in enumerate(ends, start=1) if any(end)] == [4, 6, 8]
    assert (np.sum(ends, axis=0) == 1).all()


def test_infos_hold_what_the_contract_names_with_its_shapes_and_types():
    vector = make(3, n_agents=7, n_neighbors=4, max_steps=2)
    shape = vector.observation_space.shape
    _, reset_infos = vector.reset(seed=0)
    going_on, ended = (step[4] for step in play(vector, random_actions(vector, 2)))
    assert set(reset_infos) == set(going_on) == {"neighbors"}
    assert set(ended) == {"neighbors", "final_obs", "_final_obs", "final_info", "_final_info", "episode", "_episode"}
    assert ended["neighbors"].shape == ended["final_info"]["neighbors"].shape == (3, 7, 4)
    assert ended["final_obs"].shape == shape == (3, 7, 29) and ended["final_obs"].dtype == np.float32
    metrics = {"r", "l", "polar_order", "cohesion", "collisions", *(f"reward_{term}" for term in TERMS)}
    assert set(ended["episode"]) == metrics
    assert all(values.shape == (3,) for values in ended["episode"].values())
    assert all(ended[mask].dtype == bool and ended[mask].shape == (3,) for mask in ended if mask.startswith("_"))


def test_the_reward_terms_add_up_to_the_return():
    weights = {f"{term}_weight": 0.3 + n for n, term in enumerate(TERMS)}
    vector = make(4, n_agents=20, n_obstacles=10, max_steps=30, **weights)
    vector.reset(seed=0)
    steps = play(vector, random_actions(vector, 30))
    episode = steps[-1][4]["episode"]
    terms = np.array([episode[f"reward_{term}"] for term in TERMS])  # (6, 4)
    np.testing.assert_allclose(terms.sum(axis=0), episode["r"], rtol=1e-12)
    assert (np.abs(terms) > 0).all()
    np.testing.assert_allclose(sum(step[1].mean(axis=1) for step in steps), episode["r"], rtol=1e-5)


def test_returned_arrays_stay_as_they_are_and_writing_to_them_changes_nothing():
    vector, other = make(2, **RANDOM), make(2, **RANDOM)
    returned = [vector.reset(seed=0), vector.get_state()]
    other.reset(seed=0)
    actions = random_actions(vector, 20)
    before = list(copied(returned))
    for action in actions:
        step = vector.step(action)
        returned.append(step)
        before.append(copied(step))
        scribbled = other.step(action)
        assert same(step, scribbled)
        for array in (*scribbled[:2], *other.get_state().values()):
            array[...] = 1
    assert same(returned, before)


def test_actions_are_left_as_they_were():
    vector = make(2, max_turn=0.1)
    vector.reset(seed=0)
    actions = random_actions(vector, 1)[0]
    given_actions = actions.copy()
    vector.step(actions)
    assert np.array_equal(actions, given_actions)


# ----------------------------------------------------------------------------------------------------------------------
# State: what get_state returns is all there is
# ----------------------------------------------------------------------------------------------------------------------


def test_set_state_goes_on_bit_for_bit_over_an_autoreset_in_the_same_or_another_object():
    vector = make(3, **RANDOM)
    vector.reset(seed=9)
    actions = random_actions(vector, 25)
    *_, (observations, _, _, _, infos) = play(vector, actions[:5])
    state = vector.get_state()
    kept = copied(state)
    expected = play(vector, actions[5:]), vector.reset()
    assert same(state, kept)
    for other in (vector, make(3, **RANDOM)):
        assert same(other.set_state(state), (observations, infos))
        assert same((play(other, actions[5:]), other.reset()), expected)
    assert same(state, kept)


def test_a_state_holds_one_entry_per_environment():
    vector = make(3, **RANDOM)
    vector.reset(seed=0)
    assert all(array.shape[0] == 3 for array in vector.get_state().values())


# ----------------------------------------------------------------------------------------------------------------------
# Arguments: each bad one is a ValueError that names it
# ----------------------------------------------------------------------------------------------------------------------

BAD_ARGUMENTS = [
    *(("n_agents", value) for value in (0, -1, 2.5, True, "10", None, math.nan)),
    *(("box_size", value) for value in (0, -1.0, math.nan, math.inf, "10")),
    *(("radius", value) for value in (5.1, 0, -1, math.nan, "1", None)),
    *(("speed", value) for value in (-1, math.nan, math.inf)),
    *(("dt", value) for value in (0, -0.1, math.nan)),
    *(("max_turn", value) for value in (3.2, 0, -1, math.nan)),
    *(("noise", value) for value in (-0.1, 6.3, math.nan)),
    *(("n_neighbors", value) for value in (0, -1, 2.5, None)),
    *(("n_obstacles", value) for value in (64, -1, 1.0)),
    *(("max_steps", value) for value in (0, -5, 10.0, None)),
    *(("count_self", value) for value in ("no", 1, None)),
    *((f"{term}_weight", value) for term in TERMS for value in (math.nan, math.inf, "1")),
    *(("render_mode", value) for value in ("x", "ansi", 1)),
    *(("num_envs", value) for value in (0, -1, 1.5, True)),
]


@pytest.mark.parametrize(("name", "value"), BAD_ARGUMENTS, ids=[f"{name}={value!r}" for name, value in BAD_ARGUMENTS])
def test_a_bad_argument_is_named_with_its_value(name, value):
    arguments = {"num_envs": 1, "box_size": 10.0} | {name: value}
    with pytest.raises(ValueError, match=rf"^{name} is {re.escape(repr(value))}: .*(must be|at most)"):
        make(**arguments)


def test_the_largest_allowed_values_are_taken():
    vector = make(2, box_size=10.0, radius=5.0, max_turn=math.pi, noise=2 * math.pi, n_obstacles=63, n_neighbors=100)
    vector.reset(seed=0)
    observations = play(vector, random_actions(vector, 3))[-1][0]
    assert vector.observation_space.contains(observations)


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0", 2**63])
def test_a_bad_seed_is_named(seed):
    with pytest.raises(ValueError, match=rf"^seed is {re.escape(repr(seed))}: .*integer"):
        make().reset(seed=seed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": np.zeros((2, 3, 2))}, r"options.*positions.*position"),
        ({"position": np.zeros((2, 3))}, r"options\['position'\] has shape \(2, 3\).*\(2, 3, 2\)"),
        ({"position": np.full((2, 3, 2), math.nan)}, r"options\['position'\].*NaN"),
        ({"heading": np.zeros((2, 3, 1))}, r"options\['heading'\] has shape \(2, 3, 1\).*\(2, 3\)"),
        ({"heading": np.full((2, 3), math.inf)}, r"options\['heading'\].*infinity"),
        ({"obstacle": np.zeros((2, 2, 2))}, r"options\['obstacle'\] has shape \(2, 2, 2\).*\(2, 1, 2\)"),
    ],
    ids=["unknown key", "position shape", "position NaN", "heading shape", "heading infinite", "obstacle shape"],
)
def test_bad_options_are_named_and_leave_the_episode_going(options, message):
    vector = make(2, n_agents=3, n_obstacles=1)
    vector.reset(seed=0)
    before = vector.get_state()
    with pytest.raises(ValueError, match=message):
        vector.reset(seed=1, options=options)
    assert same(vector.get_state(), before)


@pytest.mark.parametrize(
    "actions",
    [
        np.zeros((2, 3)),
        np.zeros((3, 2, 1)),
        np.zeros(6),
        0.0,
        np.full((2, 3, 1), math.nan),
        [[[0], [0], [math.inf]]] * 2,
        [[[0], [0, 1]], [[0]]],
        "turn",
        {},
    ],
    ids=["no action axis", "axes exchanged", "flat", "scalar", "NaN", "infinite", "ragged", "text", "a dict"],
)
def test_bad_actions_are_named_and_leave_the_episode_going(actions):
    vector = make(2, n_agents=3)
    vector.reset(seed=0)
    before = vector.get_state()
    with pytest.raises(ValueError, match=r"^actions (has shape .* must be \(2, 3, 1\)|holds NaN|is .* must be)"):
        vector.step(actions)
    assert same(vector.get_state(), before)


@pytest.mark.parametrize("missing", ["position", "direction", "turn", "obstacle", "elapsed", "totals", "rng"])
def test_a_state_with_an_entry_missing_is_refused(missing):
    vector = make()
    vector.reset(seed=0)
    state = vector.get_state()
    del state[missing]
    with pytest.raises(ValueError, match=f"^state .*{missing}"):
        vector.set_state(state)


def test_a_state_of_another_size_or_with_nan_is_refused():
    vector, larger = make(2), make(2, n_agents=11)
    vector.reset(seed=0), larger.reset(seed=0)
    with pytest.raises(ValueError, match=r"^state\['position'\] has shape \(2, 11, 2\): it must be \(2, 10, 2\)"):
        vector.set_state(larger.get_state())
    with pytest.raises(ValueError, match=r"^state\['turn'\] holds NaN"):
        vector.set_state(vector.get_state() | {"turn": np.full((2, 10), math.nan)})


def test_a_refused_state_leaves_the_old_one_whole():
    vector = make(2)
    vector.reset(seed=0)
    before = vector.get_state()
    with pytest.raises(ValueError, match=r"^state\['turn'\] holds NaN"):
        vector.set_state(before | {"position": before["position"] + 1, "turn": np.full((2, 10), math.nan)})
    assert same(vector.get_state(), before)


# ----------------------------------------------------------------------------------------------------------------------
# Spaces
# ----------------------------------------------------------------------------------------------------------------------


def test_spaces_have_the_shapes_types_and_bounds_of_the_contract():
    vector = make(4, n_agents=7, n_neighbors=3, max_turn=0.5)
    assert vector.single_observation_space.shape == (7, 24) and vector.observation_space.shape == (4, 7, 24)
    assert vector.single_action_space.shape == (7, 1) and vector.action_space.shape == (4, 7, 1)
    assert (vector.action_space.low == -0.5).all() and (vector.action_space.high == 0.5).all()
    assert vector.observation_space.dtype == vector.action_space.dtype == np.float32
    observations, _ = vector.reset(seed=0)
    returned = vector.step(vector.action_space.sample())
    assert observations.dtype == returned[0].dtype == returned[1].dtype == np.float32
    assert returned[1].shape == (4, 7)
    assert all(flags.dtype == bool and flags.shape == (4,) for flags in returned[2:4])


def test_the_box_defaults_to_the_published_density():
    assert make(n_agents=40).params.box_size == pytest.approx(10.0)
    assert make(n_agents=4000).params.box_size == pytest.approx(100.0)
    assert make(n_agents=2, radius=1.5).params.box_size == 3.0  # but never less than the radius needs


@pytest.mark.parametrize("n_agents", [1, 10, 200])
def test_observations_of_random_runs_lie_in_the_space_and_reach_its_bounds(n_agents):
    vector = make(8, n_agents=n_agents, box_size=12.0, n_obstacles=20, max_steps=20, noise=0.3)
    observations = [vector.reset(seed=0)[0], *(step[0] for step in play(vector, random_actions(vector, 60, reach=4)))]
    assert all(vector.observation_space.contains(each) for each in observations)
    own = np.array(observations)[..., -9:]
    assert own[..., 0].min() == -1 and own[..., 0].max() == 1  # actions of 4 are turns of max_turn
    assert own[..., 6:8].min() < -0.9 and own[..., 6:8].max() > 0.9  # obstacles are seen all round


def test_max_turn_in_float32_is_inside_the_observation_space():
    for max_turn in (math.pi, 0.1, 1 / 3):
        vector = make(max_turn=max_turn)
        vector.reset(seed=0)
        for action in (vector.action_space.low, vector.action_space.high):
            assert vector.observation_space.contains(vector.step(action)[0])


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------


def lone_agent(position, heading, **env_kwargs):
    vector = make(n_agents=1, box_size=4.0, render_mode="rgb_array", **env_kwargs)
    vector.reset(seed=0, options={"position": [[position]], "heading": [[heading]]})
    return vector


def pixel(picture, x, y, box_size=4.0):
    """The colour at a point of the box; x goes to the right, y up."""
    size = len(picture)
    return picture[min(int((1 - y / box_size) * size), size - 1), min(int(x / box_size * size), size - 1)].astype(int)


def test_render_gives_one_picture_for_every_environment():
    vector = make(3, render_mode="rgb_array")
    vector.reset(seed=0)
    pictures = vector.render()
    assert len(pictures) == 3
    assert all(picture.dtype == np.uint8 and picture.shape == pictures[0].shape for picture in pictures)
    assert pictures[0].shape[0] == pictures[0].shape[1] and pictures[0].shape[2] == 3
    assert not np.array_equal(pictures[0], pictures[1])


@pytest.mark.parametrize("heading", [0.0, 0.5, math.pi / 2, math.pi, -2.0])
def test_an_agent_is_drawn_where_it_is_in_the_colour_of_its_heading(heading):
    picture = lone_agent((1.0, 3.1), heading).render()[0]
    expected = np.array(colorsys.hsv_to_rgb(heading / (2 * math.pi) % 1, 0.85, 0.8)) * 255
    assert np.abs(pixel(picture, 1.0, 3.1) - expected).max() < 5
    rows, columns = np.nonzero((picture != 255).any(axis=-1))
    x, y = columns.mean() / len(picture) * 4, 4 - rows.mean() / len(picture) * 4
    assert math.hypot(x - 1.0, y - 3.1) < 0.08
    assert np.ptp(rows) < 40 and np.ptp(columns) < 40  # nothing else is in the picture


@pytest.mark.parametrize("heading", [0.0, 0.8, math.pi / 2, -2.0])
def test_the_arrowhead_points_where_the_agent_goes(heading):
    picture = lone_agent((2.0, 2.0), heading).render()[0]
    ahead = 0.08 * np.array([math.cos(heading), math.sin(heading)])
    assert (pixel(picture, *(2.0 + ahead)) < 250).any()
    assert (pixel(picture, *(2.0 - ahead)) == 255).all()  # the notch


def test_an_obstacle_over_the_edge_is_drawn_on_both_sides():
    vector = make(n_agents=1, box_size=4.0, n_obstacles=1, render_mode="rgb_array")
    vector.reset(seed=0, options={"position": [[[2, 2]]], "obstacle": [[[0, 1]]]})
    picture = vector.render()[0]
    for x in (0.1, 0.4, 3.6, 3.9):
        red, green, blue = pixel(picture, x, 1.0)
        assert red == green == blue < 250
    assert (pixel(picture, 0.6, 1.0) == 255).all() and (pixel(picture, 0.1, 3.0) == 255).all()


def test_the_same_state_gives_the_same_picture():
    vector, other = make(2, render_mode="rgb_array", **RANDOM), make(2, render_mode="rgb_array", **RANDOM)
    vector.reset(seed=0), other.reset(seed=1)
    before = vector.render()
    assert not same(before, other.render())
    other.set_state(vector.get_state())
    assert same(before, other.render()) and same(before, vector.render())


def test_rendering_changes_nothing_that_follows():
    vector, unseen = make(2, render_mode="rgb_array", **RANDOM), make(2, **RANDOM)
    vector.reset(seed=0), unseen.reset(seed=0)
    for action in random_actions(vector, 10):
        vector.render()
        assert same(vector.step(action), unseen.step(action))


def test_render_without_a_mode_is_refused():
    vector = make()
    vector.reset(seed=0)
    with pytest.raises(ValueError, match="^render_mode is None"):
        vector.render()


def test_human_mode_opens_a_window_of_the_pictures_size_and_close_shuts_it(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    import pygame

    vector = make(2, render_mode="human")
    vector.reset(seed=0)
    assert vector.render() is None
    shown = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
    assert np.array_equal(shown, vector.draw(0))
    vector.close()
    assert not pygame.display.get_init()
