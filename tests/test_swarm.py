"""Swarm keeps what its docstring promises.

The kernel is laid beside `Reference`, a slow NumPy swarm written from that docstring alone: all pairs of agents, nine
images of each, headings as angles. Where two answers are right (two neighbours equally far, an agent exactly on a
radius) the reference says so through `margin`, and the example is put aside.
"""

import colorsys
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import envs

AGENT_DIAMETER, OBSTACLE_RADIUS = 0.1, 0.5
TERMS = ("alignment", "cohesion", "separation", "turning", "order", "obstacle", "energy")
DEFAULT_WEIGHTS = (0.0, 0.4, 0.0, 0.01, 0.6, 1.0, 0.0)
SHIFTS = np.array([(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)])

settings.register_profile("swarm", deadline=None, derandomize=True, max_examples=100, print_blob=True)
settings.load_profile("swarm")


# ----------------------------------------------------------------------------------------------------------------------
# Reference
# ----------------------------------------------------------------------------------------------------------------------


def morse(distance):
    """The potential of two agents at a distance in radii."""
    return 8 * np.exp(-distance / 0.08) - np.exp(-distance / 0.2)


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

    def energies(self):
        """(n_agents,), of the Morse potential, which is 0 at the radius."""
        return np.array([(morse(distances / self.radius) - morse(1.0)).sum() for _, _, distances in self.others_seen()])

    def step(self, actions):
        """Rewards (n_agents,); the terms, mean over agents, and the metrics are left in `terms` and `metrics`."""
        energies = self.energies()
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
        terms["energy"] = energies - self.energies()
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

    @staticmethod
    def near(offset):
        """Direction and spacing of an offset in radii."""
        distance = math.hypot(*offset)
        return [*np.divide(offset, distance + 0.05), (distance - 0.1) / (distance + 0.1)]

    def observe(self):
        """Observations (n_agents, 8 * n_neighbors + 12) and neighbours (n_agents, n_neighbors)."""
        observations, neighbors = [], []
        ways, obstacle_ways = self.ways_to(self.position), self.ways_to(self.obstacle)
        for i, others, _ in self.others_seen():
            features = []
            for j in others[: self.n_neighbors]:
                relative = self.heading[j] - self.heading[i]
                features += [*np.divide(self.own_frame(i, ways[i, j]), self.radius)]
                features += [math.cos(relative), math.sin(relative), *self.near(features[-2:]), 1]
            features += [0] * (8 * self.n_neighbors - len(features))
            features += [self.turn[i] / self.max_turn, len(others) / (len(others) + self.n_neighbors)]
            if len(others) > 0:
                relative = self.heading[others] - self.heading[i]
                features += [*np.divide(self.own_frame(i, ways[i, others].mean(axis=0)), self.radius)]
                features += [np.cos(relative).mean(), np.sin(relative).mean(), *self.near(features[-2:])]
            else:
                features += [0] * 7
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


def make(num_envs=1, steering="turn", **env_kwargs):
    return envs.make_vec("Swarm", num_envs, num_workers=0, steering=steering, **env_kwargs)


def random_actions(vector, steps, seed=0, reach=math.pi):
    """(steps, num_envs, n_agents, 1)"""
    return np.random.default_rng(seed).uniform(-reach, reach, (steps, *vector.action_space.shape)).astype(np.float32)


def play(vector, actions):
    """What `step` returns for each of the actions."""
    return [vector.step(action) for action in actions]


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
    widest = 0.19 if obstacle_grid else 0.24 if agent_grid else 0.5
    radius = max(0.12, box_size * draw(st.floats(0.05, widest)))
    fits = int(0.5 * box_size**2 / (math.pi * OBSTACLE_RADIUS**2))
    n_agents = draw(st.integers(10 if agent_grid else 1, 60))
    n_obstacles = draw(st.integers(10, 20) if obstacle_grid else st.integers(0, min(fits, 9)))
    weights = draw(st.lists(st.floats(-2, 2), min_size=7, max_size=7))
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
    start = {"position": [[[5, 5], [5.45, 5.6]]], "heading": [[0, math.pi / 2]]}
    observations, infos = vector.reset(seed=0, options=start)
    # The first looks along x and has the second 0.45 ahead and 0.6 to its left, half a radius away; the second looks
    # along y. Directions are 0.3 / 0.55 and 0.4 / 0.55, spacing (0.5 - 0.1) / (0.5 + 0.1).
    own, no_obstacle = [0, 0.5], [0, 0, 0]
    first = [0.3, 0.4, 0, 1, 6 / 11, 8 / 11, 2 / 3]
    second = [-0.4, 0.3, 0, -1, -8 / 11, 6 / 11, 2 / 3]
    for agent, seen in enumerate((first, second)):
        expected = [*seen, 1, *own, *seen, *no_obstacle]
        np.testing.assert_allclose(observations[0, agent], expected, atol=1e-7)
    np.testing.assert_array_equal(infos["neighbors"], [[[1], [0]]])
    # A quarter turn to the left each, then 0.2 straight ahead: one goes up, the other back along x.
    vector.step(np.full((1, 2, 1), math.pi / 2))
    np.testing.assert_allclose(vector.get_state()["position"][0], [[5, 5.2], [5.25, 5.6]], atol=1e-7)


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
    vector = make(n_agents=100, speed=1e6, dt=1e6)
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
        np.testing.assert_allclose(infos["final_obs"][0, 0], [0] * 48 + own_turn + [0] * 11, atol=1e-7)
        assert not observations.any()


@given(seed=st.integers(0, 2**32 - 1), max_turn=st.floats(0.05, math.pi))
def test_a_push_turns_to_the_sum_of_heading_and_push(seed, max_turn):
    world = dict(n_agents=12, n_obstacles=1, max_turn=max_turn, noise=0.3)
    by_turn = make(3, "turn", **world)
    by_push = make(3, "push", **world)
    by_turn.reset(seed=seed)
    by_push.reset(seed=seed)
    pushes = np.random.default_rng(seed).uniform(-1.0, 1.0, (3, 12, 2))
    turns = np.angle(1.0 + 2.0 * (pushes[..., :1] + 1j * pushes[..., 1:]))
    one, other = by_turn.step(turns), by_push.step(pushes)
    np.testing.assert_allclose(other[0], one[0], atol=1e-5)
    np.testing.assert_allclose(other[1], one[1], atol=1e-5)


def test_no_push_is_straight_on_and_a_long_one_is_cut_to_its_bounds():
    turns = {(0.0, 0.0): 0.0, (-0.5, 0.5): math.pi / 2, (5.0, 9.0): math.atan(2 / 3), (-9.0, 0.0): math.pi}
    for action, turn in turns.items():
        vector = make(1, "push", n_agents=1)
        vector.reset(seed=0)
        observations, *_ = vector.step(np.array([[action]]))
        assert observations[0, 0, -12] == pytest.approx(turn / math.pi, abs=1e-6)


def test_headings_stay_unit_vectors_and_positions_in_the_box_over_10000_steps():
    vector = make(n_agents=5, max_steps=20_000, noise=0.1)
    vector.reset(seed=0)
    play(vector, random_actions(vector, 10_000))
    state = vector.get_state()
    np.testing.assert_allclose(np.linalg.norm(state["direction"], axis=-1), 1, rtol=0, atol=1e-15)
    assert (state["position"] >= 0).all() and (state["position"] < vector.params.box_size).all()
    assert state["elapsed"][0] == 10_000


# ----------------------------------------------------------------------------------------------------------------------
# Energy
# ----------------------------------------------------------------------------------------------------------------------


def energies(position, radius, box_size):
    """(n_agents,), by all pairs."""
    ways = position[:, None] - position
    distance = np.linalg.norm(ways - box_size * np.rint(ways / box_size), axis=-1) / radius
    np.fill_diagonal(distance, math.inf)
    return np.where(distance <= 1, morse(distance) - morse(1.0), 0.0).sum(axis=1)


def test_energy_rewards_add_up_to_the_potential_difference_of_the_way():
    only_energy = dict(cohesion_weight=0, order_weight=0, turning_weight=0, obstacle_weight=0, energy_weight=0.5)
    vector = make(n_agents=30, n_obstacles=3, noise=0.5, max_steps=40, **only_energy)
    vector.reset(seed=2)
    for length in (40, 40):  # the second episode starts in the step that ends the first
        before = vector.get_state()["position"][0]
        total = np.zeros(30)
        for action in random_actions(vector, length - 1):
            total += vector.step(action)[1][0]
        middle = vector.get_state()["position"][0]
        box_size = vector.params.box_size
        expected = 0.5 * (energies(before, 1.5, box_size) - energies(middle, 1.5, box_size))
        np.testing.assert_allclose(total, expected, atol=1e-4)
        assert np.abs(total).max() > 0.1
        *_, infos = vector.step(random_actions(vector, 1)[0])
    assert infos["episode"]["reward_energy"][0] == pytest.approx(infos["episode"]["r"][0], abs=1e-12)


def test_energy_comes_and_goes_without_a_jump():
    vector = make(
        n_agents=2, box_size=10, energy_weight=1, cohesion_weight=0, order_weight=0, turning_weight=0, dt=1e-3
    )
    for heading in (0.0, math.pi):  # the second agent crosses the radius of the first, outward and inward
        start = {"position": [[[5, 5], [6.5 - 5e-4 * math.cos(heading), 5]]], "heading": [[math.pi / 2, heading]]}
        vector.reset(seed=0, options=start)
        for _ in range(3):
            assert np.abs(vector.step(np.zeros((1, 2, 1)))[1]).max() < 1e-4


def test_a_state_goes_on_with_its_energy():
    vector, other = (make(2, n_agents=12, energy_weight=1, noise=0.3) for _ in range(2))
    vector.reset(seed=0), other.reset(seed=1)
    play(vector, random_actions(vector, 5))
    other.set_state(vector.get_state())
    for action in random_actions(vector, 5, seed=1):
        assert np.array_equal(vector.step(action)[1], other.step(action)[1])


def test_a_weight_of_the_energy_changes_nothing_but_the_reward():
    vector, other = make(2, n_agents=12, energy_weight=0.3), make(2, n_agents=12)
    assert np.array_equal(vector.reset(seed=0)[0], other.reset(seed=0)[0])
    total = np.zeros((2, 12))
    for action in random_actions(vector, 250):
        (observations, rewards, *_, infos), (expected, others, *_, plain) = vector.step(action), other.step(action)
        assert np.array_equal(observations, expected)
        total += rewards.astype(float) - others
    assert (plain["episode"]["reward_energy"] == 0).all()
    np.testing.assert_allclose(infos["episode"]["reward_energy"], total.mean(axis=1), atol=1e-4)


@pytest.mark.parametrize("n_agents", [2, 5])
def test_morse_turns_down_the_gradient_of_its_energy(n_agents):
    rng = np.random.default_rng(n_agents)
    vector = make(n_agents=n_agents, box_size=10, n_neighbors=4)
    position = 5 + rng.uniform(-0.6, 0.6, (1, n_agents, 2))
    heading = rng.uniform(-math.pi, math.pi, (1, n_agents))
    start = vector.reset(seed=0, options={"position": position, "heading": heading})
    turn = envs.morse_policy(vector, align=0.0, gain=0.7)(*start)[0, :, 0]
    for i in range(n_agents):
        force = np.zeros(2)
        for axis in range(2):
            ends = []
            for step in (-1e-5, 1e-5):
                moved = position[0].copy()
                moved[i, axis] += step
                ends.append(energies(moved, 1.5, 10.0)[i])
            force[axis] = (ends[0] - ends[1]) / 2e-5 * 1.5  # per radius
        way = np.array([math.cos(heading[0, i]), math.sin(heading[0, i])]) + 0.7 * force
        expected = math.atan2(way[1], way[0]) - heading[0, i]
        assert math.remainder(turn[i] - expected, 2 * math.pi) == pytest.approx(0, abs=1e-4)


def test_morse_keeps_its_distance_and_saves_more_energy_than_other_rules():
    weights = dict(cohesion_weight=0, order_weight=0, turning_weight=0, energy_weight=1)
    rules = envs.baselines("Swarm", **weights)
    assert list(rules) == ["boids", "vicsek", "morse", "random"]
    scores = {
        name: envs.evaluate(rules[name][0], "Swarm", 16, 1, **rules[name][1])[0]
        for name in ("boids", "morse", "random")
    }
    assert scores["morse"]["r"].mean() > 0.3 > scores["random"]["r"].mean() > scores["boids"]["r"].mean()
    assert scores["morse"]["collisions"].mean() < 1e-3


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
    of_one = [1, -1, 1, -1, 1, -1, 1]  # left and sin change sign
    sign = np.concatenate([np.tile([*of_one, 1], 6), [-1, 1], of_one, [1, -1, 1]])  # and the turn
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
# Randomness: starts and noise
# ----------------------------------------------------------------------------------------------------------------------


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
        assert not observations[..., -12].any()  # the last turn that is seen is the commanded one
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
# Statistics
# ----------------------------------------------------------------------------------------------------------------------


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


# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------


def test_the_largest_allowed_values_are_taken():
    vector = make(2, box_size=10.0, radius=5.0, max_turn=math.pi, noise=2 * math.pi, n_obstacles=63, n_neighbors=100)
    vector.reset(seed=0)
    observations = play(vector, random_actions(vector, 3))[-1][0]
    assert vector.observation_space.contains(observations)


# ----------------------------------------------------------------------------------------------------------------------
# Spaces
# ----------------------------------------------------------------------------------------------------------------------


def test_spaces_have_the_shapes_types_and_bounds_of_the_contract():
    vector = make(4, n_agents=7, n_neighbors=3, max_turn=0.5)
    assert vector.single_observation_space.shape == (7, 36) and vector.observation_space.shape == (4, 7, 36)
    assert vector.single_action_space.shape == (7, 1) and vector.action_space.shape == (4, 7, 1)
    assert (vector.action_space.low == -0.5).all() and (vector.action_space.high == 0.5).all()
    pushes = make(4, "push", n_agents=7, max_turn=0.5).action_space
    assert pushes.shape == (4, 7, 2) and (pushes.low == -1).all() and (pushes.high == 1).all()
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
    own = np.array(observations)[..., -12:]
    assert own[..., 0].min() == -1 and own[..., 0].max() == 1  # actions of 4 are turns of max_turn
    assert own[..., 9:11].min() < -0.9 and own[..., 9:11].max() > 0.9  # obstacles are seen all round


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
