"""LunarLander keeps what its docstring promises.

Box2D itself is the reference: Gymnasium's LunarLander-v3 flies beside ours with the same draws, because `Replay` stands
in for its random generator and draws what ours is about to draw. benchmarks/lunar_lander_fidelity.py does the same for
thousands of episodes; here a few have to do.
"""

import math

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.box2d import lunar_lander

import envs

VIEW_WIDTH, VIEW_HEIGHT = 20.0, 40.0 / 3.0  # [m]


# ----------------------------------------------------------------------------------------------------------------------
# Helpers
# ----------------------------------------------------------------------------------------------------------------------


def make(num_envs=1, env_id="LunarLander", **env_kwargs):
    return envs.make_vec(env_id, num_envs, num_workers=0, **env_kwargs)


class Replay:
    """Draws what the environment whose generator is at `rng` is about to draw."""

    def __init__(self, rng):
        self.rng = rng.reshape(1, 2).copy()

    def uniform(self, low, high, size=()):
        return np.array([envs._uniform(self.rng, 0, low, high) for _ in range(math.prod(size))]).reshape(size)[()]

    def integers(self, low, high):
        return math.floor(envs._uniform(self.rng, 0, float(low), float(high)))


class Box2DLander(lunar_lander.LunarLander):
    """Gymnasium's, that also starts elsewhere: `position` and `angle` turn lander and legs as one."""

    position, angle = (VIEW_WIDTH / 2, VIEW_HEIGHT), 0.0
    first = False

    def reset(self, **kwargs):
        self.first = True
        return super().reset(**kwargs)

    def step(self, action):
        if self.first and (self.position, self.angle) != ((VIEW_WIDTH / 2, VIEW_HEIGHT), 0.0):
            cos, sin = math.cos(self.angle), math.sin(self.angle)
            self.lander.position, self.lander.angle = self.position, self.angle
            for side, leg in zip((-1, 1), self.legs, strict=True):
                x, y = self.position
                leg.position = x - cos * side * 20 / 30, y - sin * side * 20 / 30
                leg.angle = self.angle + side * 0.05
        self.first = False
        return super().step(action)


def side_by_side(ours, box2d, choose, steps, options=None):
    """One episode on both, with the same draws: (ours, box2d) of (observation, reward, ended) after each step."""
    if not ours.started:
        ours.reset(seed=0)
        box2d.reset(seed=0)
    box2d.np_random = Replay(ours.state.rng)
    observation, _ = ours.reset(options=options)
    expected, _ = box2d.reset()
    yield (observation[0], 0.0, False), (expected, 0.0, False)
    for step in range(steps):
        action = choose(step, expected)
        observations, rewards, terminations, _, infos = ours.step(np.array([action]))
        expected, reward, terminated, _, _ = box2d.step(action)
        final = infos["final_obs"] if terminations[0] else observations
        yield (final[0], rewards[0], terminations[0]), (expected, reward, terminated)
        if terminated or terminations[0]:
            return


def heuristic(observations):
    """gymnasium.envs.box2d.lunar_lander.heuristic, for a whole batch."""
    x, y, vx, vy, angle, spin, right, left = observations.T
    turn = (np.clip(0.5 * x + vx, -0.4, 0.4) - angle) * 0.5 - spin
    climb = (0.55 * np.abs(x) - y) * 0.5 - vy * 0.5
    down = (right > 0) | (left > 0)
    turn, climb = np.where(down, 0.0, turn), np.where(down, -0.5 * vy, climb)
    side = np.where(turn < -0.05, 3, np.where(turn > 0.05, 1, 0))
    return np.where((climb > np.abs(turn)) & (climb > 0.05), 2, side)


def first_episodes(vector, policy, seed=0):
    """Statistics and last observations (num_envs, 8) of the first episode of every environment."""
    observations, _ = vector.reset(seed=seed)
    last, stats = np.zeros_like(observations), {name: np.zeros(vector.num_envs) for name in vector.stat_names}
    running = np.ones(vector.num_envs, bool)
    while running.any():
        observations, _, _, _, infos = vector.step(policy(observations))
        if "episode" in infos:
            ended = running & infos["_episode"]
            last[ended] = infos["final_obs"][ended]
            for name in stats:
                stats[name][ended] = infos["episode"][name][ended]
            running &= ~ended
    return stats, last


# ----------------------------------------------------------------------------------------------------------------------
# Physics: Box2D's
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [{}, {"continuous": True}, {"enable_wind": True}, {"gravity": -3.0, "enable_wind": True, "wind_power": 4.0}],
    ids=lambda arguments: " ".join(arguments) or "discrete",
)
def test_flight_equals_box2d(arguments):
    ours, box2d = make(**arguments), Box2DLander(**arguments)
    rng = np.random.default_rng(3)

    def hover(step, observation):  # with side engines at random
        if arguments.get("continuous"):
            return np.float32([rng.uniform(-0.5, 1.5) if observation[3] < -0.1 else -1, rng.uniform(-1.5, 1.5)])
        return 2 if observation[3] < -0.1 and step % 4 else int(rng.integers(4))

    longest, equal = 0, []
    for _ in range(4):
        for step, (got, expected) in enumerate(side_by_side(ours, box2d, hover, 250)):
            if expected[0][6:].any() or expected[2]:
                break
            np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=2e-7)
            assert got[1] == pytest.approx(expected[1], abs=1e-4)
            longest = max(longest, step)
            equal.append(np.array_equal(got[0], expected[0]))
    assert longest >= 120 and np.mean(equal) > 0.9


def test_a_start_given_in_the_options_equals_box2d():
    rng, compared = np.random.default_rng(1), 0
    ours, box2d = make(), Box2DLander()
    for _ in range(5):
        box2d.position, box2d.angle = (rng.uniform(4, 16), rng.uniform(10, 13)), rng.uniform(-0.5, 0.5)
        heights, push = rng.uniform(0, VIEW_HEIGHT / 2, 12), rng.uniform(-1000, 1000, 2)
        options = dict(position=[box2d.position], angle=[box2d.angle], terrain=[heights], push=[push])

        ours.reset(seed=0)
        box2d.reset(seed=0)
        replay = Replay(ours.state.rng)
        draw, box2d.np_random = replay.uniform, replay

        pushes = iter(push)

        def given(low, high, size=(), draw=draw, heights=heights, push=pushes):
            drawn = draw(low, high, size)
            return heights.copy() if size else next(push) if high == 1000 else drawn

        replay.uniform = given
        observation, _ = ours.reset(options=options)
        expected, _ = box2d.reset()
        np.testing.assert_allclose(observation[0], expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(ours.state.terrain[0, :-1], [poly[0][1] for poly in box2d.sky_polys], atol=1e-6)
        for _ in range(40):
            action = int(rng.integers(4))
            got, expected = ours.step(np.array([action]))[0][0], box2d.step(action)[0]
            if expected[6:].any() or box2d.game_over:
                break
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
            compared += 1
    assert compared > 100


@pytest.mark.parametrize("arguments", [{}, {"enable_wind": True}, {"continuous": True}], ids=str)
def test_whole_landings_end_as_on_box2d(arguments):
    """A millimetre in where a leg first hits may grow afterwards: nearly all episodes have to agree, not all."""
    ours, box2d = make(**arguments), Box2DLander(**arguments)
    agree, gaps = 0, []
    for _ in range(12):
        for got, expected in side_by_side(ours, box2d, lambda _, seen: lunar_lander.heuristic(box2d, seen), 1000):
            ours_and_theirs = got, expected
        got, expected = ours_and_theirs
        agree += got[2] == expected[2] and abs(got[1] - expected[1]) < 1.0
        gaps.append(np.abs(got[0] - expected[0]).max())
    assert agree >= 10
    assert np.median(gaps) < 1e-5


@pytest.mark.parametrize("continuous", [False, True])
def test_the_baseline_is_gymnasiums_heuristic(continuous):
    vector = make(50, continuous=continuous)
    pilot = Box2DLander(continuous=continuous)
    policy = envs.heuristic_policy(vector)
    observations, infos = vector.reset(seed=0)
    for _ in range(250):  # until most of them stand on the ground
        actions = policy(observations, infos)
        expected = [lunar_lander.heuristic(pilot, seen) for seen in observations]
        np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-6)
        observations, _, _, _, infos = vector.step(actions)
    for env_id in ("LunarLander", "SparseLunarLander", "LunarLander-v3"):
        assert list(envs.baselines(env_id)) == ["heuristic", "random"]


def test_scripted_policies_score_as_on_box2d():
    """Bounds around what 1,000 Box2D episodes gave: -182, -132 and 243 on average; 91% of the landings 200 or more."""
    rng = np.random.default_rng(0)
    random, _ = first_episodes(make(400), lambda seen: rng.integers(4, size=len(seen)))
    nothing, _ = first_episodes(make(400), lambda seen: np.zeros(len(seen), int))
    landing, last = first_episodes(make(400), heuristic)
    assert -202 < random["r"].mean() < -162 and 89 < random["l"].mean() < 98 and random["landed"].mean() < 0.02
    assert -142 < nothing["r"].mean() < -122 and nothing["crashed"].all() and 67 < nothing["l"].mean() < 73
    assert 225 < landing["r"].mean() < 260 and 240 < landing["l"].mean() < 275
    assert 0.86 < (landing["r"] >= 200).mean() < 0.95 and 0.89 < landing["landed"].mean() < 0.97
    speed = np.hypot(last[:, 2], last[:, 3])
    np.testing.assert_allclose(landing["speed"], speed, atol=1e-6)
    np.testing.assert_allclose(landing["x"], last[:, 0], atol=1e-6)
    success = (last[:, 6:].sum(axis=1) == 2) & (speed < 0.1) & (np.abs(last[:, 0]) < 0.2)
    np.testing.assert_array_equal(landing["success"], success)
    assert 0.4 < success.mean() < 0.7


def test_bodies_are_those_of_box2d():
    box2d = lunar_lander.LunarLander()
    box2d.reset(seed=0)
    for b, body in enumerate([box2d.lander, *box2d.legs]):
        shape = body.fixtures[0].shape
        assert envs.BODY_MASS[b] == np.float32(body.mass) and envs.BODY_CENTER[b] == np.float32(body.localCenter[1])
        at_origin = envs.BODY_INERTIA[b] + envs.BODY_MASS[b] * envs.BODY_CENTER[b] ** 2
        assert at_origin == np.float32(body.inertia)
        np.testing.assert_array_equal(envs.BODY_CORNERS[b, : envs.BODY_N_CORNERS[b]], np.float32(shape.vertices))
        np.testing.assert_array_equal(envs.BODY_FACES[b, : envs.BODY_N_CORNERS[b]], np.float32(shape.normals))


# ----------------------------------------------------------------------------------------------------------------------
# Episodes: how they end, and what they pay
# ----------------------------------------------------------------------------------------------------------------------


def test_coming_to_rest_ends_an_episode_with_100():
    vector = make(1)
    observations, _ = vector.reset(seed=1)
    ended = False
    while not ended:
        still = observations[0]
        observations, rewards, terminations, truncations, infos = vector.step(heuristic(observations))
        ended = terminations[0]
    assert infos["episode"]["landed"][0] == 1 and not truncations[0] and rewards[0] == 100
    np.testing.assert_array_equal(infos["final_obs"][0, [2, 3, 5, 6, 7]], [0, 0, 0, 1, 1])
    assert np.abs(still[2:4]).max() < 0.01  # it was slow before it slept


def test_a_crash_and_leaving_the_view_end_an_episode_with_minus_100():
    vector = make(2)
    vector.reset(seed=0, options={"position": [[10, 8], [19.0, 13]], "push": [[0, 0], [1000, 0]]})
    ended = np.zeros(2, bool)
    while not ended.all():
        _, rewards, terminations, _, infos = vector.step(np.zeros(2, int))
        for env in np.flatnonzero(terminations & ~ended):
            assert rewards[env] == -100
            assert infos["episode"]["crashed"][env] == (env == 0)
            assert (abs(infos["final_obs"][env, 0]) >= 1) == (env == 1)
        ended |= terminations


def test_the_time_limit_truncates():
    vector = make(3, max_steps=20)
    vector.reset(seed=0)
    for step in range(1, 41):
        observations, _, terminations, truncations, infos = vector.step(np.full(3, 2))
        assert not terminations.any()
        np.testing.assert_array_equal(truncations, step % 20 == 0)
        if step % 20 == 0:
            assert (infos["episode"]["l"] == 20).all() and infos["_final_obs"].all()
            assert np.abs(infos["final_obs"] - observations).max() > 0.1  # observations are the next episode's first
            assert np.abs(observations[:, 0]).max() < 0.02 and (observations[:, 1] > 1.3).all()


def test_returns_and_lengths_are_the_sums_of_rewards():
    vector, rng = make(40), np.random.default_rng(0)
    vector.reset(seed=0)
    sums, ends = np.zeros((2, 40)), 0
    for _ in range(200):
        _, rewards, terminations, truncations, infos = vector.step(rng.integers(4, size=40))
        sums += [rewards, np.ones(40)]
        done = terminations | truncations
        if done.any():
            np.testing.assert_allclose(infos["episode"]["r"][done], sums[0, done], atol=1e-3)
            np.testing.assert_array_equal(infos["episode"]["l"][done], sums[1, done])
        sums[:, done], ends = 0, ends + done.sum()
    assert ends > 40


@pytest.mark.parametrize("max_steps", [60, 1000])
def test_the_sparse_reward_is_the_published_formula(max_steps):
    vector = make(200, "SparseLunarLander", max_steps=max_steps)
    stats, last = first_episodes(vector, heuristic)
    legs_seen = set()
    for env in range(200):
        x, y, vx, vy, angle, _, right, left = last[env].astype(float)
        speed, legs = math.sqrt(vx**2 + vy**2), right + left
        if stats["landed"][env] or (legs == 2 and speed < 0.01 and abs(x) <= 0.2):
            expected = 200
        else:
            expected = -10 * speed - 10 * math.sqrt(x**2 + y**2) - 10 * abs(angle) + 20 * legs - 5 * (abs(x) >= 1)
            expected += 100 * (legs == 2) * max(0, 1 - math.sqrt(speed)) * max(0, 1 - x**2)
            legs_seen.add(legs)
        assert stats["r"][env] == pytest.approx(expected, abs=1e-3)
    assert (stats["r"] == 200).any() == (max_steps == 1000) and len(legs_seen) > 1 - (max_steps == 60)


def test_sparse_rewards_are_zero_until_the_end():
    vector, rng = make(16, "SparseLunarLander"), np.random.default_rng(0)
    vector.reset(seed=0)
    for _ in range(150):
        _, rewards, terminations, truncations, _ = vector.step(rng.integers(4, size=16))
        np.testing.assert_array_equal(rewards[~(terminations | truncations)], 0)


# ----------------------------------------------------------------------------------------------------------------------
# Starts and seeds
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_spawns_are_spread_in_every_environment_of_every_worker(num_workers):
    with_spawn = envs.make_vec("DenseLunarLander", 64, num_workers, max_steps=1)
    without = envs.make_vec("DenseLunarLander", 64, num_workers, max_steps=1, randomize_spawn=False)
    starts, fixed = [with_spawn.reset(seed=0)[0]], without.reset(seed=0)[0]
    for _ in range(30):  # every step ends an episode, and starts the next
        starts.append(with_spawn.step(np.zeros(64, int))[0])
        fixed = without.step(np.zeros(64, int))[0]
    x, y, angle = np.moveaxis(np.array(starts), -1, 0)[[0, 1, 4]]  # (31, 64)
    top, bottom = 1.41, 0.81  # of y, and a little more for the push in the first step
    for values, low, high in ((x, -0.8, 0.8), (y, bottom, top), (angle, -0.25, 0.25)):
        assert values.min() > low - 0.02 and values.max() < high + 0.02
        assert values.min() < low + 0.05 and values.max() > high - 0.05
        assert (values.std(axis=0) > 0.15 * (high - low)).all()  # in every environment
        assert (values.std(axis=1) > 0.15 * (high - low)).all()  # and across them
    assert np.abs(fixed[:, 0]).max() < 0.02 and np.ptp(fixed[:, 1]) < 0.05 and np.abs(fixed[:, 4]).max() < 0.02
    with_spawn.close()
    without.close()


def test_terrain_and_push_differ_and_the_pad_is_level():
    vector = make(64)
    vector.reset(seed=0)
    terrain = vector.get_state()["terrain"]
    assert np.unique(terrain[:, 0]).size == np.unique(terrain[:, 10]).size == 64
    assert np.ptp(terrain[:, 4:7]) == 0  # the level of the pad; 0.33 of three heights, as in Gymnasium
    assert terrain[0, 5] == np.float32(0.99 * VIEW_HEIGHT / 4)
    push = vector.get_state()["push"]
    assert push.min() < -900 and push.max() > 900 and np.abs(push).max() <= 1000


# ----------------------------------------------------------------------------------------------------------------------
# The contract
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("continuous", [False, True])
def test_spaces_are_those_of_gymnasium(continuous):
    ours, theirs = make(3, continuous=continuous), gym.make("LunarLander-v3", continuous=continuous)
    assert ours.single_observation_space == theirs.observation_space
    assert ours.single_action_space == theirs.action_space
    observations, _ = ours.reset(seed=0)
    _, rewards, terminations, truncations, _ = ours.step(ours.action_space.sample())
    assert observations.shape == (3, 8) and observations.dtype == np.float32
    assert rewards.shape == terminations.shape == truncations.shape == (3,) and rewards.dtype == np.float32


def test_a_start_far_outside_stays_within_memory():
    vector = make(3)
    vector.reset(seed=0, options={"position": [[1e30, 5], [-1e6, -1e6], [10, -1e30]]})
    for _ in range(5):
        vector.step(np.full(3, 2))
    vector.reset(seed=0)
    assert np.isfinite(vector.step(np.full(3, 2))[0]).all()


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------


def count(picture, color):
    return (np.abs(picture.astype(int) - color).max(axis=-1) < 12).sum()


def test_the_picture_shows_lander_ground_and_flames():
    vector = make(2, render_mode="rgb_array")
    vector.reset(seed=0, options={"position": [[5, 10], [15, 10]]})
    vector.step(np.array([0, 2]))
    pictures = vector.render()
    for picture, x in zip(pictures, (5, 15), strict=True):
        assert picture.shape == (400, 600, 3) and picture.dtype == np.uint8
        hull = np.abs(picture.astype(int) - (128, 102, 230)).max(axis=-1) < 12
        rows, columns = np.nonzero(hull)
        assert abs(columns.mean() - 30 * x) < 5 and abs(400 - rows.mean() - 300) < 15
        assert (picture[-1] == 255).all() and (picture[0] == 0).all() and count(picture, (204, 204, 0)) > 100
    orange = (255, 165, 0)
    assert count(pictures[0], orange) == 0 < count(pictures[1], orange)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64])
def test_actions_of_every_integer_type_are_checked_at_both_ends(dtype):
    landers = envs.make_vec("LunarLander", 5, num_workers=0)
    landers.reset(seed=0)
    every_second = np.array([0, 9, 1, 9, 2, 9, 3, 9, 0], dtype)[::2]
    landers.step(every_second)
    limits = np.iinfo(dtype)
    for wrong in {4, limits.max, limits.min} - {0}:
        actions = every_second.copy()
        actions[3] = wrong
        with pytest.raises(ValueError, match=rf"^actions\[3\] is {wrong}: it must be an integer from 0 to 3$"):
            landers.step(actions)
