"""LidarNavigation and VmasNavigation with neighbours: who they are, how they are observed, and that policies hear them.

Swarm's neighbours are tested in test_swarm.py, and that no number of workers, saved state or ending loses any in
test_native_envs.py.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import N_AGENTS, PER_UPDATE, POLICIES, ROOT, Nursery

import envs

FEATURES = 8
RADIO = {"LidarNavigation": 3.0, "VmasNavigation": 0.35}
OWN = {"LidarNavigation": 36, "VmasNavigation": 18}

both = pytest.mark.parametrize("env_id", RADIO)
examples = settings(deadline=None, derandomize=True, max_examples=40, print_blob=True)


@pytest.fixture(autouse=True)
def no_display(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


def make(env_id, num_envs=1, **env_kwargs):
    return envs.make_vec(env_id, num_envs, num_workers=0, **env_kwargs)


def random_actions(vector, steps, low=-0.3, seed=0):
    return np.random.default_rng(seed).uniform(low, 1, (steps, *vector.action_space.shape)).astype(np.float32)


def poses(env_id, vector):
    """Positions, and headings of robots as (cos, sin) or velocities of discs, each (num_envs, n_agents, 2)."""
    state = vector.get_state()
    names = ("position", "direction") if env_id == "LidarNavigation" else ("agent_pos", "agent_vel")
    return tuple(state[name] for name in names)


def blocks(observations, n_neighbors):
    """(num_envs, n_agents, n_neighbors, FEATURES)"""
    return observations[..., : n_neighbors * FEATURES].reshape(*observations.shape[:2], n_neighbors, FEATURES)


def reference(env_id, position, motion, n_neighbors, reach):
    """Blocks and indices of one environment by brute force, and how near a decision was to a tie."""
    n_agents = len(position)
    features = np.zeros((n_agents, n_neighbors, FEATURES))
    neighbors = np.tile(np.arange(n_agents)[:, None], n_neighbors)
    margin = math.inf
    for i in range(n_agents):
        distance = np.hypot(*(position - position[i]).T)
        others = [j for j in np.argsort(distance, kind="stable") if j != i]
        margin = min([margin, *np.abs(distance[others] - reach), *np.diff(distance[others])])
        for k, j in enumerate([j for j in others if distance[j] < reach][:n_neighbors]):
            offset, seen = (position[j] - position[i]) / reach, motion[j] - motion[i]
            if env_id == "LidarNavigation":
                into_body = np.array([[motion[i, 0], motion[i, 1]], [-motion[i, 1], motion[i, 0]]])
                offset, seen = into_body @ offset, into_body @ motion[j]
            length = np.hypot(*offset)
            features[i, k] = *offset, *seen, *offset / (length + 0.05), (length - 0.1) / (length + 0.1), 1
            neighbors[i, k] = j
    return features, neighbors, margin


@both
@examples
@given(data=st.data())
def test_neighbours_match_the_reference(env_id, data):
    n_agents, n_neighbors = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 8))
    reach = RADIO[env_id] * data.draw(st.sampled_from([0.2, 0.5, 1.0, 4.0]))
    arena = dict(n_obstacles=0, width=18.0, height=12.0) if env_id == "LidarNavigation" else {}
    vector = make(env_id, 2, n_agents=n_agents, n_neighbors=n_neighbors, radio_range=reach, **arena)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    spread = data.draw(st.sampled_from([0.1, 0.5, 1.0]))
    if env_id == "LidarNavigation":
        position = rng.uniform(0.1, np.array([17.9, 11.9]) * spread, (2, n_agents, 2))
        start = {"position": position, "heading": rng.uniform(-math.pi, math.pi, (2, n_agents))}
    else:
        start = {
            "agent_pos": rng.uniform(-3, 3, (2, n_agents, 2)) * spread,
            "agent_vel": rng.normal(size=(2, n_agents, 2)),
        }
    observations, infos = vector.reset(seed=0, options=start)
    assert infos["neighbors"].dtype == np.int64 and vector.observation_space.contains(observations)
    for env, (position, motion) in enumerate(zip(*poses(env_id, vector), strict=True)):
        expected, neighbors, margin = reference(env_id, position, motion, n_neighbors, reach)
        if margin > 1e-9:
            np.testing.assert_array_equal(infos["neighbors"][env], neighbors)
            np.testing.assert_allclose(blocks(observations, n_neighbors)[env], expected, rtol=1e-6, atol=1e-6)


def test_a_grid_of_radios_misses_nobody():
    vector = make("LidarNavigation", n_agents=300, n_obstacles=0, n_neighbors=5, radio_range=1.0, width=20, height=14)
    assert vector.params.radio_cells > 10
    vector.reset(seed=0)
    for action in random_actions(vector, 20):
        observations, *_, infos = vector.step(action)
    (position,), (motion,) = poses("LidarNavigation", vector)
    expected, neighbors, margin = reference("LidarNavigation", position, motion, 5, 1.0)
    assert margin > 1e-9 and 0.3 < (neighbors != np.arange(300)[:, None]).mean() < 1
    np.testing.assert_array_equal(infos["neighbors"][0], neighbors)
    np.testing.assert_allclose(blocks(observations, 5)[0], expected, atol=1e-6)


@both
def test_the_rest_of_an_observation_and_all_that_happens_is_as_without_neighbours(env_id):
    kwargs = dict(n_agents=8, max_steps=30)
    vector, deaf = make(env_id, 3, n_neighbors=4, **kwargs), make(env_id, 3, **kwargs)
    assert deaf.single_observation_space.shape == (8, OWN[env_id])
    assert "neighbors" not in deaf.info_names
    assert vector.single_observation_space.shape == (8, OWN[env_id] + 4 * FEATURES)
    (observations, infos), (expected, no_infos) = vector.reset(seed=1), deaf.reset(seed=1)
    assert set(infos) == {"neighbors", *no_infos} and "neighbors" not in no_infos
    for action in random_actions(vector, 70):
        assert np.array_equal(observations[..., 4 * FEATURES :], expected)
        observations, *ours, infos = vector.step(action)
        expected, *others, expected_infos = deaf.step(action)
        assert all(np.array_equal(a, b) for a, b in zip(ours, others, strict=True))
        assert set(infos) - set(expected_infos) == {"neighbors"}
        if "final_obs" in infos:
            assert np.array_equal(infos["final_obs"][..., 4 * FEATURES :], expected_infos["final_obs"])
            assert set(infos["final_info"]) - set(expected_infos["final_info"]) == {"neighbors"}


@both
def test_the_last_neighbours_of_an_episode_are_those_of_its_last_observation(env_id):
    short, long = (make(env_id, 2, n_agents=6, n_neighbors=2, max_steps=max_steps) for max_steps in (5, 50))
    short.reset(seed=3), long.reset(seed=3)
    for action in random_actions(short, 5):
        *_, ended = short.step(action)
        expected, *_, going_on = long.step(action)
    assert np.array_equal(ended["final_obs"], expected)
    assert np.array_equal(ended["final_info"]["neighbors"], going_on["neighbors"])
    assert not np.array_equal(ended["final_info"]["neighbors"], ended["neighbors"])


@examples
@given(seed=st.integers(0, 2**32 - 1), angle=st.floats(-math.pi, math.pi))
def test_moving_and_turning_the_arena_changes_no_block_of_a_robot(seed, angle):
    rng = np.random.default_rng(seed)
    vector = make("LidarNavigation", n_agents=12, n_obstacles=0, n_neighbors=5, radio_range=2.0, width=30, height=30)
    position = 15 + rng.uniform(-2, 2, (1, 12, 2))
    heading = rng.uniform(-math.pi, math.pi, (1, 12))
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])  # of row vectors
    before, infos = vector.reset(seed=0, options={"position": position, "heading": heading})
    there = {"position": (position - 15) @ turn + rng.uniform(8, 22, 2), "heading": heading + angle}
    after, other_infos = vector.reset(options=there)
    np.testing.assert_allclose(blocks(after, 5), blocks(before, 5), atol=1e-6)
    assert np.array_equal(infos["neighbors"], other_infos["neighbors"])


@examples
@given(seed=st.integers(0, 2**32 - 1), shift=st.tuples(st.floats(-9, 9), st.floats(-9, 9)), quarters=st.integers(0, 3))
def test_moving_the_plane_changes_no_block_of_a_disc_and_turning_it_turns_them(seed, shift, quarters):
    rng = np.random.default_rng(seed)
    start = {name: rng.uniform(-0.5, 0.5, (1, 10, 2)) for name in ("agent_pos", "agent_vel")}
    turn = np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), quarters)  # of row vectors
    vector = make("VmasNavigation", n_agents=10, n_neighbors=4)
    before, infos = vector.reset(seed=0, options=start)
    there = {"agent_pos": start["agent_pos"] @ turn + shift, "agent_vel": start["agent_vel"] @ turn}
    after, other_infos = vector.reset(options=there)
    expected = blocks(before, 4).copy()
    for pair in (slice(0, 2), slice(2, 4), slice(4, 6)):
        expected[..., pair] = expected[..., pair] @ turn
    np.testing.assert_allclose(blocks(after, 4), expected, atol=1e-5)
    assert np.array_equal(infos["neighbors"], other_infos["neighbors"])


def test_two_robots_by_hand():
    vector = make("LidarNavigation", n_agents=2, n_obstacles=0, n_neighbors=2, width=20, height=20)
    start = {"position": [[[10, 10], [10.9, 11.2]]], "heading": [[0, math.pi / 2]]}
    observations, infos = vector.reset(seed=0, options=start)
    # Half a radio range apart: direction 0.3 / 0.55 and 0.4 / 0.55, spacing 0.4 / 0.6.
    first = [0.3, 0.4, 0, 1, 0.3 / 0.55, 0.4 / 0.55, 0.4 / 0.6, 1]
    second = [-0.4, 0.3, 0, -1, -0.4 / 0.55, 0.3 / 0.55, 0.4 / 0.6, 1]
    np.testing.assert_allclose(observations[0, :, :8], [first, second], atol=1e-6)
    assert not observations[..., 8:16].any()
    assert infos["neighbors"].tolist() == [[[1, 0], [0, 1]]]


def test_two_discs_by_hand():
    vector = make("VmasNavigation", n_agents=2, n_neighbors=1, radio_range=1.0)
    start = {"agent_pos": [[[0, 0], [0.3, 0.4]]], "agent_vel": [[[0.5, 0], [0, 2]]]}
    observations, infos = vector.reset(seed=0, options=start)
    first = np.array([0.3, 0.4, -0.5, 2, 0.3 / 0.55, 0.4 / 0.55, 0.4 / 0.6, 1])
    np.testing.assert_allclose(observations[0, :, :8], [first, first * [-1, -1, -1, -1, -1, -1, 1, 1]], atol=1e-6)
    assert infos["neighbors"].tolist() == [[[1], [0]]]


@pytest.mark.parametrize("policy", ["steering", "planning"])
def test_the_drivers_drive_as_without_neighbours(policy):
    make_policy, kwargs = envs.baselines("LidarNavigation", max_steps=150)[policy]
    alone, _, _ = envs.evaluate(make_policy, "LidarNavigation", 4, 1, **kwargs)
    together, _, _ = envs.evaluate(make_policy, "LidarNavigation", 4, 1, **kwargs, n_neighbors=3)
    assert all(np.array_equal(alone[name], together[name]) for name in alone)


@both
def test_links_are_drawn_between_neighbours_only(env_id):
    there = "position" if env_id == "LidarNavigation" else "agent_pos"
    goal = "goal" if env_id == "LidarNavigation" else "goal_pos"
    goals = [[[5, 5.9], [6, 5.9]]] if env_id == "LidarNavigation" else [[[1, 1], [1, 0.9]]]
    for apart, linked in ((0.9, True), (1.1, False)):
        places = [[[2, 2], [2 + apart, 2]]] if env_id == "LidarNavigation" else [[[-1, -1], [-1 + apart, -1]]]
        start = {there: places, goal: goals}
        shown = []
        for n_neighbors in (0, 1):
            kwargs = dict(n_agents=2, n_neighbors=n_neighbors, radio_range=1.0, render_mode="rgb_array")
            kwargs |= dict(n_obstacles=0) if env_id == "LidarNavigation" else {}
            vector = make(env_id, **kwargs)
            vector.reset(seed=0, options=start)
            shown.append(vector.render()[0])
        assert (shown[0] != shown[1]).any() == linked


@pytest.fixture(scope="module")
def nursery(nest, tmp_path_factory):
    return Nursery(nest, tmp_path_factory.mktemp("nursery"), tuple(RADIO))


@both
@pytest.mark.parametrize("script", ["ppo_swarm.py", "ppo_swarm_lstm.py"])
def test_policies_that_pass_messages_train(env_id, script, nursery, tmp_path):
    args = dict(
        env_id=env_id,
        n_agents=N_AGENTS,
        env_kwargs=dict(n_neighbors=2, max_steps=20),
        num_envs=8,
        num_steps=32,
        total_timesteps=2 * PER_UPDATE,
        num_minibatches=2,
        update_epochs=1,
        eval_episodes=2,
        eval_every=2 * PER_UPDATE,
    )
    jobs = [(tmp_path / policy, args | dict(policy=policy)) for policy in POLICIES]
    for result in nursery.run(*jobs, script=ROOT / script):
        assert result.code == 0, result.output
        assert (result.folder / "model.pt").exists()
