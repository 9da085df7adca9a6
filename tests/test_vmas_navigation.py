"""VmasNavigation is VMAS's `navigation`.

The judge is the `vmas` package itself, twice over: as shipped, in float32, one step from each of 300 states; and made
to compute in float64, over whole stretches, because contacts amplify rounding errors exponentially. Its one dependence
on other environments (`beside_the_batch`) is computed, counted and taken off.
"""

import math

import numpy as np
import pytest
import torch
import vmas
from gymnasium.utils.env_checker import data_equivalence
from hypothesis import given, settings
from hypothesis import strategies as st

import envs

RADIUS, TOUCH, LIDAR_RANGE = 0.1, 0.2, 0.35
STATS = ("r", "l", "collisions", "arrived", "reward_progress", "reward_final", "reward_collision")

settings.register_profile("vmas", deadline=None, derandomize=True, max_examples=60, print_blob=True)
settings.load_profile("vmas")


# ----------------------------------------------------------------------------------------------------------------------
# VMAS, and helpers
# ----------------------------------------------------------------------------------------------------------------------


class Vmas:
    """A batch of VMAS's worlds that starts where it is told: agent_pos, agent_vel, goal_pos (num_envs, n_agents, 2)."""

    def __init__(self, agent_pos, agent_vel, goal_pos, dtype=torch.float32, **scenario_kwargs):
        num_envs, n_agents, _ = agent_pos.shape
        self.dtype, wide = dtype, dict(world_spawning_x=9, world_spawning_y=9)  # fifty would not fit, and it would hang
        self.envs = vmas.make_env("navigation", num_envs, n_agents=n_agents, seed=0, **wide, **scenario_kwargs)
        self.agents, scenario = self.envs.agents, self.envs.scenario
        if dtype == torch.float64:  # wherever VMAS fixed float32 for good
            angles = torch.linspace(0, 2 * torch.pi, 13, dtype=dtype)[:12].repeat(num_envs, 1)
            scenario.pos_rew, scenario.final_rew = scenario.pos_rew.double(), scenario.final_rew.double()
            scenario.process_action = lambda agent: setattr(agent.action, "u", agent.action.u.double())
            for agent in self.agents:
                agent.sensors[0]._angles = angles
        for i, agent in enumerate(self.agents):
            agent.state.pos, agent.state.vel, agent.goal.state.pos = (
                torch.tensor(array[:, i], dtype=dtype) for array in (agent_pos, agent_vel, goal_pos)
            )
            agent.pos_shaping = (agent.state.pos - agent.goal.state.pos).norm(dim=-1) * scenario.pos_shaping_factor

    def step(self, actions):
        """Observations (num_envs, n_agents, 18), rewards (num_envs, n_agents) and dones (num_envs,)."""
        torch.set_default_dtype(self.dtype)
        try:
            observations, rewards, dones, _ = self.envs.step(
                [torch.tensor(action) for action in actions.swapaxes(0, 1)]
            )
        finally:
            torch.set_default_dtype(torch.float32)
        assert observations[0].dtype == rewards[0].dtype == self.dtype
        return torch.stack(observations, 1).numpy(), torch.stack(rewards, 1).numpy(), dones.numpy()

    @property
    def positions(self):
        return torch.stack([agent.state.pos for agent in self.agents], 1).numpy()

    @property
    def velocities(self):
        return torch.stack([agent.state.vel for agent in self.agents], 1).numpy()


@pytest.fixture(autouse=True)
def one_torch_thread():
    """Threads would gain nothing, and a process that has used them must not fork."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(num_envs=1, **env_kwargs):
    return envs.make_vec("VmasNavigation", num_envs, num_workers=0, **env_kwargs)


def random_actions(vector, steps, seed=0):
    """(steps, num_envs, n_agents, 2)"""
    return np.random.default_rng(seed).uniform(-1, 1, (steps, *vector.action_space.shape)).astype(np.float32)


def play(vector, actions):
    """What `step` returns for each of the actions."""
    return [vector.step(action) for action in actions]


def distances(position):
    """(..., n_agents, n_agents) between the agents; infinity from an agent to itself."""
    ways = position[..., :, None, :] - position[..., None, :, :]
    return np.hypot(ways[..., 0], ways[..., 1]) + np.diag(np.full(position.shape[-2], math.inf))


def beside_the_batch(position):
    """What VMAS adds to the rewards (num_envs, n_agents) because of the other environments of its batch.

    It penalises two agents up to 0.005 apart, but only looks if these two touch in some environment.
    """
    between = distances(position)
    near = (between > TOUCH) & (between <= TOUCH + 0.005)
    return -(near & (between <= TOUCH).any(axis=0)).sum(axis=-1)


def grazing(position):
    """Which lidar readings (..., n_agents, 12) the rounding of a position to float32 can move by 1e-5 or more."""
    ways = position[..., None, :, :] - position[..., :, None, :]  # (..., i, j, 2), from i to j
    angles = np.arange(12) * math.pi / 6
    aside = ways[..., None, 0] * np.sin(angles) - ways[..., None, 1] * np.cos(angles)
    others = ~np.eye(position.shape[-2], dtype=bool)[..., None]
    return ((np.abs(RADIUS**2 - aside**2) < 3e-5) & others).any(axis=-2)


# ----------------------------------------------------------------------------------------------------------------------
# The same as VMAS
# ----------------------------------------------------------------------------------------------------------------------


def crowded_run(n_agents, steps=300, seed=0):
    """One of our worlds in which agents keep pushing to the middle, recorded: starts, actions and what `step` said."""
    rng = np.random.default_rng(seed)
    vector = make(n_agents=n_agents, max_steps=steps + 1)
    angle, far = rng.uniform(0, 2 * math.pi, (1, n_agents)), rng.uniform(3, 4, (1, n_agents))
    start = {
        "agent_pos": rng.uniform(-0.25, 0.25, (1, n_agents, 2)) * math.sqrt(n_agents),
        "agent_vel": rng.uniform(-0.4, 0.4, (1, n_agents, 2)),
        "goal_pos": np.stack([far * np.cos(angle), far * np.sin(angle)], axis=-1),  # so far that no episode ends
    }
    vector.reset(seed=0, options=start)
    run = {name: [] for name in ("agent_pos", "agent_vel", "goal_pos", "actions", "observations", "rewards")}
    for _ in range(steps):
        state = vector.get_state()
        to_the_middle = -2 * state["agent_pos"] + rng.uniform(-1, 1, (1, n_agents, 2))
        actions = np.clip(to_the_middle, -1, 1).astype(np.float32)
        observations, rewards, terminations, truncations, _ = vector.step(actions)
        assert not terminations.any() and not truncations.any()
        for name in ("agent_pos", "agent_vel", "goal_pos"):
            run[name].append(state[name][0])
        for name, value in (("actions", actions), ("observations", observations), ("rewards", rewards)):
            run[name].append(value[0])
    state = vector.get_state()
    run["agent_pos"].append(state["agent_pos"][0]), run["agent_vel"].append(state["agent_vel"][0])
    return {name: np.array(values) for name, values in run.items()}


@pytest.mark.parametrize("n_agents", [1, 2, 3, 10, 50])
def test_each_of_300_steps_is_that_of_vmas_as_shipped(n_agents):
    run = crowded_run(n_agents)
    before, after = run["agent_pos"][:-1], run["agent_pos"][1:]
    world = Vmas(before, run["agent_vel"][:-1], run["goal_pos"])
    observations, rewards, dones = world.step(run["actions"])
    np.testing.assert_allclose(run["observations"][..., :6], observations[..., :6], rtol=0, atol=1e-5)
    extra, between = beside_the_batch(after), distances(after)
    tie = (np.abs(between - TOUCH) < 1e-6).any(axis=(1, 2))
    np.testing.assert_allclose((rewards - extra)[~tie], run["rewards"][~tie], rtol=0, atol=1e-5)
    skipped = grazing(after)
    apart = np.abs(run["observations"][..., 6:] - observations[..., 6:])
    assert apart[~skipped].max() < 1e-5 and not dones.any()
    touching, batch_dependent = int((between <= TOUCH).sum()) // 2, int((extra != 0).any(axis=1).sum())
    print(f"{touching} contacts; {batch_dependent} env-steps depend on the batch, {tie.sum()} skipped as ties;")
    print(f"{skipped.mean():.2%} of the lidar readings skipped as grazing")
    assert tie.sum() <= 10 and skipped.mean() < 0.03
    if n_agents > 1:
        assert touching > 50 and batch_dependent > 20


@pytest.mark.parametrize(("n_agents", "stretch"), [(1, 300), (2, 300), (3, 300), (10, 50), (50, 15)])
def test_whole_stretches_are_those_of_vmas_in_float64(n_agents, stretch):
    run = crowded_run(n_agents)
    at = np.arange(0, 300, stretch)  # where each stretch begins; VMAS steps them all at once
    world = Vmas(*(run[name][at] for name in ("agent_pos", "agent_vel", "goal_pos")), dtype=torch.float64)
    dependent = 0
    for step in range(stretch):
        observations, rewards, dones = world.step(run["actions"][at + step])
        now = run["agent_pos"][at + step + 1]
        np.testing.assert_allclose(now, world.positions, rtol=0, atol=1e-8)
        np.testing.assert_allclose(run["agent_vel"][at + step + 1], world.velocities, rtol=0, atol=1e-7)
        np.testing.assert_allclose(run["observations"][at + step], observations, rtol=0, atol=1e-6)
        extra = beside_the_batch(now)
        np.testing.assert_allclose(run["rewards"][at + step], rewards - extra, rtol=0, atol=1e-6)
        dependent += (extra != 0).any(axis=1).sum()
        assert not dones.any()
    assert (dependent > 0) == (len(at) > 1)  # alone in its batch a world is its own judge


def test_rewards_do_not_depend_on_the_other_environments_as_those_of_vmas_do():
    # The first two stay 0.003 apart, the other two run into each other.
    pair, goals = np.array([[[0, 0], [0.203, 0]], [[0, 0], [0.21, 0]]]), np.full((2, 2, 2), 5.0)
    velocity, still = np.array([np.zeros((2, 2)), [[0.3, 0], [-0.3, 0]]]), np.zeros((2, 2, 2), np.float32)
    vector = make(2, n_agents=2)
    vector.reset(seed=0, options={"agent_pos": pair, "agent_vel": velocity, "goal_pos": goals})
    ours = vector.step(still)[1]
    _, alone, _ = Vmas(pair[:1], velocity[:1], goals[:1]).step(still[:1])
    _, together, _ = Vmas(pair, velocity, goals).step(still)
    np.testing.assert_allclose(alone[0], 0, atol=1e-6)
    np.testing.assert_allclose(together, -1, atol=1e-2)
    np.testing.assert_allclose(ours[0], alone[0], atol=1e-6)
    np.testing.assert_allclose(ours[1], together[1], atol=1e-6)


def test_the_push_of_two_agents_is_that_of_vmas_at_every_distance():
    apart = np.concatenate([[0, 5e-7, 2e-6], np.geomspace(1e-5, 0.1, 20), 0.2 + np.linspace(-0.01, 0.002, 21)])
    angle = np.arange(len(apart)) * 0.7
    start = {"agent_pos": np.zeros((len(apart), 2, 2)), "agent_vel": np.zeros((len(apart), 2, 2))}
    start["agent_pos"][:, 1] = apart[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    start["goal_pos"] = np.full((len(apart), 2, 2), 5.0)
    vector, still = make(len(apart), n_agents=2), np.zeros((len(apart), 2, 2), np.float32)
    vector.reset(seed=0, options=start), vector.step(still)
    world = Vmas(**start, dtype=torch.float64)
    world.step(still)
    ours = vector.get_state()["agent_vel"]
    np.testing.assert_allclose(ours, world.velocities, rtol=1e-9, atol=1e-12)
    pushed = np.hypot(*ours[:, 0].T)
    assert not pushed[apart < 1e-6].any() and (pushed[2:23] > 0.1).all() and not pushed[apart > 0.2001].any()


@pytest.mark.parametrize("n_agents", [2, 6, 20])
def test_lidar_sees_as_that_of_vmas_among_and_inside_others(n_agents):
    rng = np.random.default_rng(n_agents)
    start = {
        "agent_pos": rng.uniform(-1, 1, (400, n_agents, 2)) * rng.uniform(0.05, 1.0, (400, 1, 1)),
        "agent_vel": np.zeros((400, n_agents, 2)),
        "goal_pos": np.full((400, n_agents, 2), 5.0),
    }
    world = Vmas(**start, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    expected = torch.stack([world.envs.scenario.observation(agent) for agent in world.agents], 1).numpy()
    torch.set_default_dtype(torch.float32)
    vector = make(400, n_agents=n_agents)
    observations, _ = vector.reset(seed=0, options=start)
    np.testing.assert_allclose(observations, expected, rtol=0, atol=1e-6)
    assert vector.observation_space.contains(observations)
    lidar = observations[..., 6:]
    assert lidar.min() == 0 and 0.41 < lidar.max() <= LIDAR_RANGE + RADIUS + 1e-6
    assert ((lidar > 0).mean(axis=(0, 1)) > 0.1).all()


@pytest.mark.parametrize("n_agents", [1, 3])
def test_ends_and_final_rewards_are_those_of_vmas(n_agents):
    rng = np.random.default_rng(1)
    goal = np.tile(np.stack([np.arange(n_agents) * 0.5, np.zeros(n_agents)], axis=-1), (1000, 1, 1))
    angle = rng.uniform(0, 2 * math.pi, (1000, n_agents))
    start = {
        "agent_pos": goal + np.stack([np.cos(angle), np.sin(angle)], -1) * rng.uniform(0, 0.13, (1000, n_agents, 1)),
        "agent_vel": rng.uniform(-0.3, 0.3, goal.shape),
        "goal_pos": goal,
    }
    actions = rng.uniform(-1, 1, goal.shape).astype(np.float32)
    vector, longer = make(1000, n_agents=n_agents), make(1000, n_agents=n_agents)
    vector.reset(seed=0, options=start), longer.reset(seed=0, options=start)
    observations, rewards, dones = Vmas(**start, dtype=torch.float64).step(actions)
    ours, our_rewards, terminations, truncations, infos = vector.step(actions)
    np.testing.assert_array_equal(terminations, dones)
    np.testing.assert_allclose(our_rewards, rewards, rtol=0, atol=1e-6)
    np.testing.assert_allclose(infos["final_obs"][dones], observations[dones], rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours[~dones], observations[~dones], rtol=0, atol=1e-6)
    to_goal = np.hypot(*np.moveaxis(observations[..., 4:6], -1, 0))
    final = (to_goal < 0.05).all(axis=1)
    assert 50 < dones.sum() < 950 and 10 < final.sum() < dones.sum() and not truncations.any()
    episode = infos["episode"]
    np.testing.assert_allclose(episode["reward_final"][dones], 0.01 * final[dones], atol=1e-12)
    assert (episode["arrived"][dones] == 1).all() and (episode["l"][dones] == 1).all()
    assert np.array_equal(infos["_final_obs"], dones) and np.array_equal(infos["_episode"], dones)


def test_the_weights_are_those_of_vmas():
    weights = dict(pos_shaping_factor=2.5, final_reward=3.0, agent_collision_penalty=-0.7)
    rng = np.random.default_rng(0)
    start = {"agent_pos": rng.uniform(-0.2, 0.2, (200, 2, 2)), "agent_vel": np.zeros((200, 2, 2))}
    start["goal_pos"] = start["agent_pos"] + rng.uniform(-0.05, 0.05, (200, 2, 2))
    vector = make(200, n_agents=2, **weights)
    vector.reset(seed=0, options=start)
    actions = random_actions(vector, 1)[0]
    world = Vmas(**start, dtype=torch.float64, **weights)
    expected = world.step(actions)[1]
    expected -= 0.7 * beside_the_batch(world.positions)
    rewards = vector.step(actions)[1]
    np.testing.assert_allclose(rewards, expected, rtol=0, atol=1e-5)
    assert (rewards > 2).any() and (rewards < -0.5).any()


def test_two_agents_by_hand():
    vector = make(n_agents=2)
    start = {
        "agent_pos": [[[0, 0], [0.25, 0]]],
        "agent_vel": [[[0.2, 0.0], [0, 0]]],
        "goal_pos": [[[1, 0], [0.25, 1]]],
    }
    observations, _ = vector.reset(seed=0, options=start)
    facing = 0.35 - (0.25 - 0.1)
    right, left = [facing] + [0] * 11, [0] * 6 + [facing] + [0] * 5
    np.testing.assert_allclose(observations[0, 0], [0, 0, 0.2, 0, -1, 0, *right], atol=1e-6)
    np.testing.assert_allclose(observations[0, 1], [0.25, 0, 0, 0, 0, -1, *left], atol=1e-6)
    observations, rewards, *_ = vector.step(np.array([[[1, 0], [0, 1]]]))
    # Drag once, then two pushes: the first moves at 0.75 * 0.2 + 0.05 and + 0.1, the second at 0.05 and 0.1.
    first, second = 0.05 * (0.2 + 0.25), 0.05 * (0.05 + 0.1)
    np.testing.assert_allclose(observations[0, :, :4], [[first, 0, 0.25, 0], [0.25, second, 0, 0.1]], atol=1e-6)
    np.testing.assert_allclose(rewards, first + second, atol=1e-6)


def test_agents_on_the_same_spot_neither_push_nor_see_but_touch_each_other():
    vector = make(n_agents=2)
    observations, _ = vector.reset(seed=0, options={"agent_pos": np.zeros((1, 2, 2)), "goal_pos": np.ones((1, 2, 2))})
    assert not observations[..., 6:].any()
    observations, rewards, *_ = vector.step(np.zeros((1, 2, 2)))
    assert not observations[..., :4].any() and (rewards == -1).all()


# ----------------------------------------------------------------------------------------------------------------------
# Symmetry
# ----------------------------------------------------------------------------------------------------------------------


def world(seed, n_agents=8):
    """A start of two crowded worlds and actions (6, 2, n_agents, 2)."""
    rng = np.random.default_rng(seed)
    start = {
        "agent_pos": rng.uniform(-0.5, 0.5, (2, n_agents, 2)),
        "agent_vel": rng.uniform(-0.4, 0.4, (2, n_agents, 2)),
        "goal_pos": rng.uniform(-1, 1, (2, n_agents, 2)),
    }
    return start, rng.uniform(-1, 1, (6, 2, n_agents, 2)).astype(np.float32)


def rollout(start, actions):
    """Observations (7, ...), rewards (6, ...) and the state at the end."""
    vector = make(2, n_agents=actions.shape[2])
    first, _ = vector.reset(seed=0, options=start)
    steps = play(vector, actions)
    assert not any(step[2].any() for step in steps)
    return np.stack([first, *(step[0] for step in steps)]), np.stack([step[1] for step in steps])


def assert_alike(a, b):
    """Contacts amplify rounding, and a grazing ray of the lidar may miss: a few readings may differ."""
    np.testing.assert_allclose(a[0][..., :6], b[0][..., :6], rtol=0, atol=1e-5)
    np.testing.assert_allclose(a[1], b[1], rtol=0, atol=1e-4)
    assert (np.abs(a[0][..., 6:] - b[0][..., 6:]) > 1e-4).mean() < 2e-3


@given(seed=st.integers(0, 2**32 - 1))
def test_renaming_the_agents_renames_everything(seed):
    start, actions = world(seed)
    names = np.random.default_rng(seed).permutation(8)
    observations, rewards = rollout(start, actions)
    renamed = rollout({name: array[:, names] for name, array in start.items()}, actions[:, :, names])
    assert_alike((observations[:, :, names], rewards[:, :, names]), renamed)


@given(seed=st.integers(0, 2**32 - 1), quarters=st.integers(1, 3))
def test_turning_the_world_turns_what_is_seen_and_shifts_the_rays(seed, quarters):
    start, actions = world(seed)
    matrix = np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), quarters)  # turns row vectors to the left
    observations, rewards = rollout(start, actions)
    turned = (observations[..., :6].reshape(7, 2, 8, 3, 2) @ matrix).reshape(7, 2, 8, 6)
    expected = np.concatenate([turned, np.roll(observations[..., 6:], 3 * quarters, axis=-1)], axis=-1)
    ours = rollout({name: array @ matrix for name, array in start.items()}, (actions @ matrix).astype(np.float32))
    assert_alike((expected, rewards), ours)


@given(seed=st.integers(0, 2**32 - 1))
def test_a_mirrored_world_is_seen_mirrored(seed):
    start, actions = world(seed)
    observations, rewards = rollout(start, actions)
    rays = np.concatenate([observations[..., 6:7], observations[..., :6:-1]], axis=-1)  # 0, then 11 down to 1
    expected = np.concatenate([observations[..., :6] * [1, -1, 1, -1, 1, -1], rays], axis=-1)
    ours = rollout({name: array * [1, -1] for name, array in start.items()}, actions * np.float32([1, -1]))
    assert_alike((expected, rewards), ours)


@given(seed=st.integers(0, 2**32 - 1), shift=st.tuples(st.floats(-20, 20), st.floats(-20, 20)))
def test_moving_the_world_moves_the_positions_and_nothing_else(seed, shift):
    start, actions = world(seed)
    observations, rewards = rollout(start, actions)
    moved = {name: array if name == "agent_vel" else array + shift for name, array in start.items()}
    assert_alike((observations + np.float32([*shift] + [0] * 16), rewards), rollout(moved, actions))


@given(seed=st.integers(0, 2**32 - 1), loner=st.integers(0, 7))
def test_forces_in_contact_are_equal_and_opposite_and_who_touches_nobody_stays_at_rest(seed, loner):
    start, _ = world(seed)
    start["agent_vel"][:] = 0
    start["agent_pos"][:, loner] = 3
    start["agent_pos"][:, loner - 1] = start["agent_pos"][:, loner - 2] + [0.1, 0]  # two touch for certain
    vector = make(2, n_agents=8)
    vector.reset(seed=0, options=start)
    vector.step(np.zeros((2, 8, 2)))
    velocity = vector.get_state()["agent_vel"]
    np.testing.assert_allclose(velocity.sum(axis=1), 0, atol=1e-12)
    assert np.abs(velocity).max() > 0.05
    assert not velocity[:, loner].any()


# ----------------------------------------------------------------------------------------------------------------------
# Starts
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_agents", [1, 3, 10, 20])
def test_starts_are_at_rest_in_the_square_and_a_quarter_apart(n_agents):
    vector = make(300, n_agents=n_agents, max_steps=1)
    vector.reset(seed=0)
    for _ in range(2):  # the first start, and that after an autoreset
        state = vector.get_state()
        everything = np.concatenate([state["agent_pos"], state["goal_pos"]], axis=1)
        assert np.abs(everything).max() <= 1 and distances(everything).min() >= 0.25
        assert not state["agent_vel"].any() and not state["elapsed"].any() and not state["totals"].any()
        assert len(np.unique(everything.reshape(300, -1), axis=0)) == 300
        vector.step(np.zeros((300, n_agents, 2)))


def test_starts_are_distributed_as_those_of_vmas():
    vector = make(20_000, n_agents=4)
    vector.reset(seed=0)
    state = vector.get_state()
    world = vmas.make_env("navigation", 20_000, n_agents=4, seed=0)
    theirs = [(agent.state.pos.numpy(), agent.goal.state.pos.numpy()) for agent in world.agents]
    for i, (position, goal) in enumerate(theirs):
        ours = state["agent_pos"][:, i], state["goal_pos"][:, i]
        for mine, other in (
            (ours[0][:, 0], position[:, 0]),
            (ours[0][:, 1], position[:, 1]),
            (ours[1][:, 0], goal[:, 0]),
            (np.hypot(*(ours[0] - ours[1]).T), np.hypot(*(position - goal).T)),
        ):
            grid = np.linspace(-1, 3, 400)
            ranks = [np.searchsorted(np.sort(sample), grid) / 20_000 for sample in (mine, other)]
            assert np.abs(ranks[0] - ranks[1]).max() < 1.95 * math.sqrt(2 / 20_000)  # Kolmogorov-Smirnov, 0.1 %


def test_fifty_agents_start_without_hanging_and_without_touching():
    vector = make(20, n_agents=50)
    vector.reset(seed=0)
    state = vector.get_state()
    assert distances(state["agent_pos"]).min() > TOUCH
    assert distances(np.concatenate([state["agent_pos"], state["goal_pos"]], axis=1)).min() > 0.1
    assert np.abs(state["goal_pos"]).max() <= 1


def test_a_start_given_in_part_is_taken_as_it_is_and_the_next_is_random():
    vector, free = make(2, max_steps=1), make(2, max_steps=1)
    given_goals = np.random.default_rng(0).uniform(-9, 9, (2, 3, 2))
    vector.reset(seed=0, options={"goal_pos": given_goals}), free.reset(seed=0)
    state, expected = vector.get_state(), free.get_state()
    assert np.array_equal(state["goal_pos"], given_goals)
    assert data_equivalence(state | {"goal_pos": expected["goal_pos"]}, expected, exact=True)
    still = np.zeros((2, 3, 2))
    assert np.array_equal(vector.step(still)[0], free.step(still)[0])


# ----------------------------------------------------------------------------------------------------------------------
# Episodes and statistics
# ----------------------------------------------------------------------------------------------------------------------


def to_goals(vector):
    """Actions that take every agent to its goal."""
    state = vector.get_state()
    return np.clip(4 * (state["goal_pos"] - state["agent_pos"]) - state["agent_vel"], -1, 1).astype(np.float32)


def test_statistics_are_those_of_the_episode():
    vector = make(64, n_agents=5, max_steps=40, final_reward=0.5)
    observations, _ = vector.reset(seed=0)
    summed, touched, steps = np.zeros((64, 5)), np.zeros(64), np.zeros(64)
    first_distance = np.hypot(*np.moveaxis(observations[..., 4:6], -1, 0)).sum(axis=1)
    kinds = set()
    for _ in range(100):
        observations, rewards, terminations, truncations, infos = vector.step(to_goals(vector))
        done = terminations | truncations
        last = np.where(done[:, None, None], infos["final_obs"], observations) if done.any() else observations
        between = distances(last[..., :2].astype(float))
        assert (np.abs(between - TOUCH) > 1e-8).all()
        touched += (between <= TOUCH).sum(axis=(1, 2)) / 5
        summed, steps = summed + rewards, steps + 1
        assert (truncations == (steps == 40)).all()
        distance = np.hypot(*np.moveaxis(last[..., 4:6], -1, 0))
        assert (terminations == (distance < RADIUS).all(axis=1)).all()
        assert ("episode" in infos) == done.any()
        for env in np.flatnonzero(done):
            episode = {name: values[env] for name, values in infos["episode"].items()}
            kinds.add((bool(terminations[env]), episode["collisions"] > 0))
            assert tuple(episode) == STATS and episode["l"] == steps[env]
            assert episode["r"] == pytest.approx(summed[env].mean(), abs=1e-4)
            assert episode["collisions"] == pytest.approx(touched[env] / steps[env])
            assert episode["arrived"] == pytest.approx((distance[env] < RADIUS).mean())
            assert episode["reward_collision"] == pytest.approx(-touched[env])
            assert episode["reward_progress"] == pytest.approx(first_distance[env] - distance[env].sum(), abs=1e-5)
            terms = [episode[f"reward_{term}"] for term in ("progress", "final", "collision")]
            assert sum(terms) == pytest.approx(episode["r"], abs=1e-12)
        first_distance[done] = np.hypot(*np.moveaxis(observations[..., 4:6], -1, 0)).sum(axis=1)[done]
        summed[done], touched[done], steps[done] = 0, 0, 0
    assert kinds >= {(True, False), (True, True), (False, True)}


def test_an_episode_that_arrives_in_its_last_step_is_terminated_and_truncated():
    start = {"agent_pos": np.zeros((1, 1, 2)), "goal_pos": np.full((1, 1, 2), 0.01)}
    for max_steps, truncated in ((1, True), (2, False)):
        vector = make(n_agents=1, max_steps=max_steps)
        vector.reset(seed=0, options=start)
        _, _, terminations, truncations, _ = vector.step(np.zeros((1, 1, 2)))
        assert terminations[0] and truncations[0] == truncated


def test_spaces_are_those_of_the_contract():
    vector = make(4, n_agents=7)
    assert vector.observation_space.shape == (4, 7, 18) and vector.action_space.shape == (4, 7, 2)
    low, high = vector.single_observation_space.low, vector.single_observation_space.high
    assert (low[:, :6] == -np.inf).all() and (high[:, :6] == np.inf).all()
    assert (low[:, 6:] == 0).all() and (high[:, 6:] == np.float32(0.45)).all()
    assert (vector.action_space.low == -1).all() and (vector.action_space.high == 1).all()


def test_a_step_draws_nothing():
    vector = make(2)
    vector.reset(seed=0)
    before = vector.get_state()["rng"]
    assert not any(step[2].any() for step in play(vector, random_actions(vector, 5)))
    assert np.array_equal(vector.get_state()["rng"], before)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------


def at(picture, point, half=1.2):
    """The colour at a point; x goes to the right, y up."""
    column, row = (np.array([point[0], -point[1]]) / half + 1) / 2 * len(picture)
    return picture[int(row), int(column)].astype(int)


def test_agents_are_discs_and_goals_rings_of_the_same_colour_in_a_faint_range():
    vector = make(n_agents=2, render_mode="rgb_array")
    start = {"agent_pos": [[[-0.5, 0.6], [0.5, 0]]], "goal_pos": [[[-0.4, -0.7], [0.9, -0.9]]]}
    vector.reset(seed=0, options=start)
    (picture,) = vector.render()
    assert picture.dtype == np.uint8 and picture.shape == (384, 384, 3)
    first, second = at(picture, (-0.5, 0.6)), at(picture, (0.5, 0))
    assert np.abs(first - second).max() > 100 and (first < 240).any() and (second < 240).any()
    for color, goal in ((first, (-0.4, -0.7)), (second, (0.9, -0.9))):
        around = [at(picture, (goal[0] + r * c, goal[1] + r * s)) for r in (0.09, 0.095) for c, s in ((1, 0), (0, -1))]
        assert min(np.abs(pixel - color).max() for pixel in around) < 60
        assert (at(picture, goal) == 255).all()
    faint = np.array([at(picture, (0.5, r)) for r in np.linspace(0.33, 0.36, 9)])
    assert 200 < faint.min() < 250 and (at(picture, (0.5, 0.25)) == 255).all()


def test_an_agent_far_out_is_still_in_the_picture():
    vector = make(n_agents=1, render_mode="rgb_array")
    vector.reset(seed=0, options={"agent_pos": [[[-6.0, 5.0]]], "goal_pos": [[[0.0, 0.0]]]})
    (picture,) = vector.render()
    assert (at(picture, (-6.0, 5.0), half=6.2) < 240).any()


# ----------------------------------------------------------------------------------------------------------------------
# The baseline
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_neighbors", [0, 2])
def test_the_rule_brings_nearly_all_agents_home_and_they_hardly_touch(n_neighbors):
    make_policy, kwargs = envs.baselines("VmasNavigation", n_neighbors=n_neighbors)["homing"]
    stats, _, _ = envs.evaluate(make_policy, "VmasNavigation", 100, 7, **kwargs)
    assert stats["arrived"].mean() > 0.95 and stats["collisions"].mean() < 0.01
    vector = envs.make_vec("VmasNavigation", 100, 0)
    vector.reset(seed=7)
    state = vector.get_state()
    to_go = np.linalg.norm(state["goal_pos"] - state["agent_pos"], axis=-1).sum(-1)  # what coming near can pay
    assert 0.94 < stats["r"].mean() / to_go.mean() < 1.0  # the last agent has arrived when it is within 0.1


def test_the_rule_pushes_to_the_goal_and_away_to_the_left_of_what_is_near():
    vector = envs.make_vec("VmasNavigation", 1, 0, n_agents=2)
    start = {"agent_pos": [[[0.0, 0.0], [0.25, 0.0]]], "goal_pos": [[[0.0, 0.0], [0.25, 0.02]]]}
    observations, infos = vector.reset(seed=0, options=start | {"agent_vel": [[[0.0, 0.0], [0.0, 0.0]]]})
    ((first, second),) = envs.homing_policy(vector, push=0.1, aside=0.05)(observations, infos)
    weight = (LIDAR_RANGE - 0.15) / LIDAR_RANGE  # the other's edge is 0.15 away, on one ray of each
    np.testing.assert_allclose(first, [-0.1 * weight, -0.05 * weight], atol=1e-6)
    np.testing.assert_allclose(second, [0.1 * weight, 0.05 * weight + 16 * 0.02], atol=1e-6)
