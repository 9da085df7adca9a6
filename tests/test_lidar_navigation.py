"""LidarNavigation keeps what its docstring promises.

The lidar is laid beside `readings`, a slow NumPy one without grids, the motion beside fine steps through its
differential equation, the statistics beside loops over recorded trajectories.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import envs

DT, RADIUS, AXLE, LAG, RANGE, RAYS, GOAL_RADIUS = 0.05, 0.1, 0.2, 0.1, 3.0, 32, 0.25
TERMS = ("progress", "arrival", "collision", "time")
DEPTH = 1e-4  # two discs that overlap by less are not in contact

examples = settings(deadline=None, derandomize=True, max_examples=60, print_blob=True)


# ----------------------------------------------------------------------------------------------------------------------
# References and helpers
# ----------------------------------------------------------------------------------------------------------------------


def make(num_envs=1, **env_kwargs):
    return envs.make_vec("LidarNavigation", num_envs, num_workers=0, **env_kwargs)


def alone(n_agents=1, obstacle=(), side=20.0, **env_kwargs):
    """One env with just these obstacles (x, y, radius) in it."""
    vector = make(n_agents=n_agents, n_obstacles=len(obstacle), width=side, height=side, **env_kwargs)
    return vector, {"obstacle": np.reshape(obstacle, (1, -1, 3))}


def readings(position, heading, obstacle, width, height, pieces=()):
    """Lidar readings (n_agents, RAYS) by brute force, and how near each is to missing or meeting something else [m].

    pieces (n, 2, 2) are those of inner walls, from where to where.
    """
    expected, margin = np.ones((len(position), RAYS)), np.full((len(position), RAYS), math.inf)
    for i, (x, y) in enumerate(position):
        others = [(*other, RADIUS) for j, other in enumerate(position) if j != i]
        for k in range(RAYS):
            angle = heading[i] + 2 * math.pi * k / RAYS
            dx, dy = math.cos(angle), math.sin(angle)
            distances = [math.inf]
            for place, step, end in ((x, dx, width), (y, dy, height)):
                if step != 0:
                    distances.append(((end if step > 0 else 0.0) - place) / step)
            for begin, end in pieces:
                axis = 0 if begin[0] == end[0] else 1  # across the piece
                ray, place = (dx, dy), (x, y)
                if ray[axis] == 0:
                    continue
                length = (begin[axis] - place[axis]) / ray[axis]
                along = place[1 - axis] + length * ray[1 - axis]
                if length > 0:
                    margin[i, k] = min(margin[i, k], abs(along - begin[1 - axis]), abs(along - end[1 - axis]))
                    if begin[1 - axis] <= along <= end[1 - axis]:
                        distances.append(length)
            for cx, cy, radius in [*others, *obstacle]:
                gap = math.hypot(cx - x, cy - y) - radius
                if radius > 0 and gap <= 0:
                    distances.append(0.0)
                    continue
                # The point of the ray that is nearest to the centre, and from there half a chord back.
                along = (cx - x) * dx + (cy - y) * dy
                apart = math.hypot(x + along * dx - cx, y + along * dy - cy)
                if along > 0:
                    margin[i, k] = min(margin[i, k], abs(apart - radius), gap)
                    if apart < radius:
                        distances.append(along - math.sqrt(radius**2 - apart**2))
            expected[i, k] = min(1.0, min(distances) / RANGE)
    return expected, margin


def drive(x, y, heading, wheel, action, steps=400):
    """Pose and wheels a step later, by the fourth-order Runge-Kutta method on the differential equation."""
    target = np.clip(np.asarray(action, float), -1, 1)

    def slope(state):
        left, right = state[3:]
        speed = (left + right) / 2
        turn = (right - left) / AXLE
        return np.array([speed * math.cos(state[2]), speed * math.sin(state[2]), turn, *((target - state[3:]) / LAG)])

    state, h = np.array([x, y, heading, *wheel]), DT / steps
    for _ in range(steps):
        a = slope(state)
        b = slope(state + h / 2 * a)
        c = slope(state + h / 2 * b)
        state = state + h / 6 * (a + 2 * b + 2 * c + slope(state + h * c))
    return state


def random_actions(vector, steps, seed=0, low=-1.2):
    return np.random.default_rng(seed).uniform(low, 1.2, (steps, *vector.action_space.shape)).astype(np.float32)


def play(vector, actions):
    return [vector.step(action) for action in actions]


def headings(vector):
    direction = vector.get_state()["direction"]
    return np.arctan2(direction[..., 1], direction[..., 0])


def deepest_overlap(vector):
    """Over all pairs of robots, and of a robot and an obstacle or wall [m]."""
    deepest, state, params = -math.inf, vector.get_state(), vector.params
    for position, obstacle in zip(state["position"], state["obstacle"], strict=True):
        gaps = np.linalg.norm(position[:, None] - position, axis=-1) - 2 * RADIUS
        np.fill_diagonal(gaps, math.inf)
        obstacle_gaps = np.linalg.norm(position[:, None] - obstacle[:, :2], axis=-1) - obstacle[:, 2] - RADIUS
        walls = np.minimum(position, np.array([params.width, params.height]) - position) - RADIUS
        deepest = max(deepest, -gaps.min(), -obstacle_gaps.min(initial=math.inf), -walls.min())
    return deepest


def chase(vector, target):
    """Actions that drive every robot to one place."""
    state = vector.get_state()
    way = target - state["position"]
    angle = np.arctan2(way[..., 1], way[..., 0]) - headings(vector)
    angle = (angle + math.pi) % (2 * math.pi) - math.pi
    turn, forward = np.clip(angle, -0.5, 0.5), np.maximum(np.cos(angle), 0)
    return np.stack([forward - turn, forward + turn], axis=-1).clip(-1, 1).astype(np.float32)


def ranges(observations):
    """How far the rays get, in lidar ranges."""
    return envs.lidar_distance(observations[..., :RAYS].astype(float)) / 3


# ----------------------------------------------------------------------------------------------------------------------
# The lidar
# ----------------------------------------------------------------------------------------------------------------------


def test_walls_obstacles_and_robots_are_seen_where_they_are_and_nothing_is_exactly_one():
    vector, start = alone(3, [(10, 12, 0.5), (7, 7, 0.2)])
    start |= {"position": [[[10, 10], [8.5, 10], [1.5, 10]]], "heading": [[math.pi / 2, 0, math.pi]]}
    observations, _ = vector.reset(seed=0, options=start)
    scan = ranges(observations[0])
    # The first looks up at an obstacle 1.5 m away; the second robot is 1.4 m to its left, behind that all is free.
    assert scan[0, 0] == pytest.approx(1.5 / 3, abs=1e-6)
    assert scan[0, 8] == pytest.approx(1.4 / 3, abs=1e-6)
    assert (scan[0, [4, 12, 16, 20, 24, 28]] == 1.0).all()
    # The second looks at the first; the small obstacle is 3.354 m off, its surface beyond the range.
    assert scan[1, 0] == pytest.approx(1.4 / 3, abs=1e-6)
    assert (np.delete(scan[1], [0, 31, 1]) == 1.0).sum() >= 26
    # The third looks at the wall, 1.5 m ahead; at 45 degrees to it the way is longer.
    assert scan[2, 0] == pytest.approx(1.5 / 3, abs=1e-6)
    assert scan[2, 4] == scan[2, 28] == pytest.approx(1.5 * math.sqrt(2) / 3, abs=1e-6)
    assert (scan[2, 8:25] == 1.0).all()


@pytest.mark.parametrize("k", range(RAYS))
def test_rays_are_counted_counter_clockwise_from_straight_ahead(k):
    vector, start = alone(2)
    bearing = 0.3 + 2 * math.pi * k / RAYS
    there = [10 + 2 * math.cos(bearing), 10 + 2 * math.sin(bearing)]
    observations, _ = vector.reset(seed=0, options=start | {"position": [[[10, 10], there]], "heading": [[0.3, 0]]})
    expected = np.ones(RAYS)
    expected[k] = 1.9 / 3
    np.testing.assert_allclose(ranges(observations[0, 0]), expected, atol=1e-6)


@pytest.mark.parametrize("distance", [3.099, 3.101])
def test_what_is_beyond_the_range_by_a_millimetre_is_not_seen(distance):
    vector, start = alone(2)
    start |= {"position": [[[10, 10], [10 + distance, 10]]], "heading": [[0, 0]]}
    reading = ranges(vector.reset(seed=0, options=start)[0][0, 0])[0]
    assert reading == (1.0 if distance > 3.1 else pytest.approx(2.999 / 3, abs=1e-6))


@pytest.mark.parametrize("grid", [False, True])
@examples
@given(data=st.data())
def test_scans_match_the_reference(grid, data):
    width = data.draw(st.floats(17, 30) if grid else st.floats(3, 12))
    height = data.draw(st.floats(3, 30) if grid else st.floats(3, 12))
    n_agents, n_obstacles = data.draw(st.integers(12, 25) if grid else st.integers(1, 12)), data.draw(st.integers(0, 2))
    vector = make(2, n_agents=n_agents, n_obstacles=n_obstacles + 10 * grid, width=width, height=height)
    assert (vector.params.lidar_cells > 3) == grid
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    low, high = np.array([RADIUS, RADIUS]), np.array([width, height]) - RADIUS
    position = rng.uniform(low, high, (2, n_agents, 2))
    if data.draw(st.booleans()):  # a crowd, robots inside one another too
        position[:] = np.clip(position[:, :1] + rng.normal(0, 0.6, position.shape), low, high)
    heading = rng.uniform(-math.pi, math.pi, (2, n_agents))
    sizes = rng.uniform(0, 0.5, (2, n_obstacles + 10 * grid, 1))
    obstacle = np.concatenate([rng.uniform(0, [width, height], (*sizes.shape[:2], 2)), sizes], axis=-1)
    observations, _ = vector.reset(seed=0, options={"position": position, "heading": heading, "obstacle": obstacle})
    for env in range(2):
        expected, margin = readings(position[env], heading[env], obstacle[env], width, height)
        error = np.abs(ranges(observations[env]) - expected)
        assert error[margin > 1e-5].max() < 3e-5 and (margin > 1e-5).mean() > 0.9
        assert (observations[env, :, :RAYS][(expected == 1) & (margin > 1e-5)] == 1).all()


def test_the_scans_of_a_hundred_robots_under_way_match_the_reference():
    vector = make(n_agents=100, n_obstacles=40, width=30, height=18)
    vector.reset(seed=3)
    assert vector.params.lidar_cells > 7 and vector.params.contact_cells > 7
    observations = play(vector, random_actions(vector, 30, low=-0.3))[-1][0]
    state = vector.get_state()
    expected, margin = readings(state["position"][0], headings(vector)[0], state["obstacle"][0], 30, 18)
    assert np.abs(ranges(observations[0]) - expected)[margin > 1e-5].max() < 3e-5
    assert 0.1 < (expected < 1).mean() < 0.9


@pytest.mark.parametrize("k", [1, 5, 16, 31])
def test_turning_the_body_turns_the_scan_and_the_goal(k):
    vector = make(n_agents=8)
    observations, _ = vector.reset(seed=1)
    state = vector.get_state()
    start = {name: state[name] for name in ("position", "goal", "obstacle")}
    turned, _ = vector.reset(options=start | {"heading": headings(vector) + 2 * math.pi * k / RAYS})
    np.testing.assert_allclose(ranges(turned), np.roll(ranges(observations), -k, axis=-1), atol=2e-3)
    angle = 2 * math.pi * k / RAYS
    forward, left = observations[..., 34], observations[..., 35]
    np.testing.assert_allclose(turned[..., 34], math.cos(angle) * forward + math.sin(angle) * left, atol=1e-6)
    np.testing.assert_allclose(turned[..., 35], math.cos(angle) * left - math.sin(angle) * forward, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Motion
# ----------------------------------------------------------------------------------------------------------------------


@examples
@given(st.lists(st.tuples(st.floats(-1.5, 1.5), st.floats(-1.5, 1.5)), min_size=1, max_size=6), st.floats(-3, 3))
def test_motion_matches_the_differential_equation(actions, heading):
    vector, start = alone()
    vector.reset(seed=0, options=start | {"position": [[[10, 10]]], "heading": [[heading]]})
    for action in np.float32(actions):
        state = vector.get_state()
        expected = drive(*state["position"][0, 0], headings(vector)[0, 0], state["wheel"][0, 0], action, steps=40)
        observations = vector.step(action[None, None])[0][0, 0]
        state = vector.get_state()
        assert np.abs(state["position"][0, 0] - expected[:2]).max() < 1e-5
        np.testing.assert_allclose(state["direction"][0, 0], [math.cos(expected[2]), math.sin(expected[2])], atol=1e-7)
        np.testing.assert_allclose(state["wheel"][0, 0], expected[3:], atol=1e-7)
        left, right = expected[3:]
        np.testing.assert_allclose(observations[32:34], [(left + right) / 2, (right - left) / 2], atol=1e-6)


def test_full_speed_ahead_and_on_the_spot():
    vector, start = alone()
    vector.reset(seed=0, options=start | {"position": [[[2, 10]]], "heading": [[0]]})
    play(vector, np.ones((100, 1, 1, 2)))
    x, y = vector.get_state()["position"][0, 0]
    assert x == pytest.approx(2 + 5 - LAG, abs=1e-9) and y == pytest.approx(10, abs=1e-12)  # the lag costs 0.1 s
    vector.reset(seed=0, options=start | {"position": [[[2, 10]]], "heading": [[0]]})
    play(vector, np.tile([-1.0, 1.0], (100, 1, 1, 1)))
    np.testing.assert_allclose(vector.get_state()["position"][0, 0], [2, 10], atol=1e-12)
    turned = 2 / AXLE * (5 - LAG)
    assert math.cos(headings(vector)[0, 0] - turned) == pytest.approx(1, abs=1e-12)


def test_a_steady_arc_is_exact():
    vector, start = alone()
    vector.reset(seed=0, options=start | {"position": [[[10, 10]]], "heading": [[0.4]]})
    vector.set_state(vector.get_state() | {"wheel": np.array([[[0.5, 0.75]]])})  # a circle of radius 0.5, left
    play(vector, np.tile([0.5, 0.75], (37, 1, 1, 1)))
    turned = 37 * DT * 0.25 / AXLE
    expected = 10 + 0.5 * np.array([math.sin(0.4 + turned) - math.sin(0.4), math.cos(0.4) - math.cos(0.4 + turned)])
    np.testing.assert_allclose(vector.get_state()["position"][0, 0], expected, atol=1e-7)


def test_free_robots_never_slip_sideways():
    vector = make(4, n_agents=10)
    vector.reset(seed=2)
    free_steps = 0
    for action in random_actions(vector, 200, low=-0.2):
        before = vector.get_state()
        vector.step(action)
        after = vector.get_state()
        free = ~after["contact"]
        moved = (after["position"] - before["position"])[free]
        middle = (after["direction"] + before["direction"])[free]  # of an arc
        middle /= np.linalg.norm(middle, axis=-1, keepdims=True)
        sideways = np.abs(moved[:, 1] * middle[:, 0] - moved[:, 0] * middle[:, 1])
        assert sideways.max() < 2e-3  # wheels that change their speed bend the arc by so little
        free_steps += free.sum()
    assert free_steps > 4000


# ----------------------------------------------------------------------------------------------------------------------
# Contacts
# ----------------------------------------------------------------------------------------------------------------------


def test_a_robot_that_drives_into_a_wall_stops_there_and_pays_on_every_step():
    vector, start = alone(progress_weight=0, time_weight=0, collision_weight=0.5)
    vector.reset(seed=0, options=start | {"position": [[[19.5, 10]]], "heading": [[0]], "goal": [[[1, 1]]]})
    rewards = [vector.step(np.ones((1, 1, 2)))[1][0, 0] for _ in range(40)]
    observations = vector.step(np.ones((1, 1, 2)))[0]
    np.testing.assert_allclose(vector.get_state()["position"], [[[19.9, 10]]], atol=1e-12)
    assert rewards[0] == 0 and rewards[-20:] == [-0.5] * 20
    assert abs(observations[0, 0, 32]) < 1e-6  # it gets nowhere, so its wheels stand
    assert ranges(observations)[0, 0, 0] == pytest.approx(0.1 / 3, abs=1e-6)


def test_a_robot_slides_along_a_wall_that_it_meets_at_an_angle():
    vector, start = alone()
    vector.reset(seed=0, options=start | {"position": [[[19.9, 5]]], "heading": [[math.pi / 3]]})
    observations = play(vector, np.ones((40, 1, 1, 2)))[-1][0]
    x, y = vector.get_state()["position"][0, 0]
    assert x == pytest.approx(19.9, abs=1e-12) and y > 5.5
    before = y
    vector.step(np.ones((1, 1, 2)))
    along = (vector.get_state()["position"][0, 0, 1] - before) / DT
    assert observations[0, 0, 32] == pytest.approx(along * math.sin(math.pi / 3), abs=1e-3)


def test_two_robots_that_meet_share_the_push_and_an_obstacle_does_not_yield():
    vector, start = alone(2)
    start |= {"position": [[[9.9, 10], [10.09, 10]]], "heading": [[0, 1]]}
    vector.reset(seed=0, options=start)
    vector.step(np.zeros((1, 2, 2)))
    np.testing.assert_allclose(vector.get_state()["position"][0], [[9.895, 10], [10.095, 10]], atol=1e-9)
    assert vector.get_state()["contact"].all()
    vector.step(np.zeros((1, 2, 2)))
    vector.step(np.zeros((1, 2, 2)))
    assert not vector.get_state()["contact"].any()
    vector, start = alone(1, [(10, 10, 0.3)])
    vector.reset(seed=0, options=start | {"position": [[[10, 10.35]]]})
    vector.step(np.zeros((1, 1, 2)))
    np.testing.assert_allclose(vector.get_state()["position"][0], [[10, 10.4]], atol=1e-9)
    assert vector.get_state()["contact"].all()


def test_robots_on_one_spot_and_in_the_centre_of_an_obstacle_get_clear():
    vector, start = alone(12, [(10, 10, 0.5)])
    start |= {"position": [[[10, 10]] + [[5, 5]] * 11]}
    vector.reset(seed=0, options=start)
    play(vector, np.zeros((10, 1, 12, 2)))
    assert deepest_overlap(vector) < 1e-3


@pytest.mark.parametrize("n_agents", [10, 50])
@pytest.mark.parametrize("target", [(4, 3), (0, 0), (8, 6), (4, 0), (8, 3)])
def test_a_crowd_does_not_overlap_and_never_crosses_a_wall(n_agents, target):
    vector = make(n_agents=n_agents, collision_weight=1)
    vector.reset(seed=4)
    contacts = 0
    for _ in range(250):
        vector.step(chase(vector, np.array(target)))
        position = vector.get_state()["position"]
        assert (position >= RADIUS).all() and (position <= np.array([8, 6]) - RADIUS).all()
        assert deepest_overlap(vector) < (1e-3 if n_agents == 50 else 2e-4)
        contacts += vector.get_state()["contact"].sum()
    assert contacts > 10 * n_agents


@pytest.mark.parametrize("sizes", [dict(), dict(n_agents=60, n_obstacles=40, width=25, height=12)])
def test_robots_are_in_contact_when_their_way_would_overlap_something_and_else_move_freely(sizes):
    vector = make(n_agents=sizes.pop("n_agents", 25), **sizes)
    vector.reset(seed=6)
    seen = set()
    for action in random_actions(vector, 60, low=0.0):
        before, heading = vector.get_state(), headings(vector)
        vector.step(action)
        after = vector.get_state()
        free = np.array(
            [
                drive(*before["position"][0, i], heading[0, i], before["wheel"][0, i], action[0, i], steps=20)[:2]
                for i in range(action.shape[1])
            ]
        )
        obstacle = after["obstacle"][0]
        gaps = np.linalg.norm(free[:, None] - free, axis=-1) - 2 * RADIUS
        np.fill_diagonal(gaps, math.inf)
        obstacle_gaps = np.linalg.norm(free[:, None] - obstacle[:, :2], axis=-1) - obstacle[:, 2] - RADIUS
        walls = np.minimum(free, np.array([vector.params.width, vector.params.height]) - free) - RADIUS
        nearest = np.minimum(np.minimum(gaps.min(1), obstacle_gaps.min(1)), walls.min(1))
        contact = after["contact"][0]
        assert contact[nearest < -DEPTH - 2e-5].all()
        clear = nearest > 0.15  # nobody who is pushed can push these
        assert not contact[clear].any()
        assert np.abs(after["position"][0] - free)[clear].max(initial=0) < 1e-5
        if (nearest > -DEPTH + 2e-5).all():
            assert not contact.any()
        seen |= set(contact)
    assert seen == {False, True}


# ----------------------------------------------------------------------------------------------------------------------
# Goals, rewards and statistics
# ----------------------------------------------------------------------------------------------------------------------


def test_the_goal_is_observed_forward_and_left_over_one_plus_its_distance():
    vector, start = alone()
    start |= {"position": [[[10, 10]]], "heading": [[math.pi / 2]], "goal": [[[9, 13]]]}
    goal = vector.reset(seed=0, options=start)[0][0, 0, 34:]
    np.testing.assert_allclose(goal, np.array([3, 1]) / (1 + math.sqrt(10)), atol=1e-7)


def test_progress_telescopes_and_an_arrival_brings_a_new_goal_in_the_same_step():
    vector, start = alone(time_weight=0, arrival_weight=10, goal_visible_steps=3)
    start |= {"position": [[[10, 10]]], "heading": [[0]], "goal": [[[12, 10]]]}
    vector.reset(seed=0, options=start)
    total = 0.0
    after = vector.get_state()
    while after["elapsed"][0] < 100:
        before = after["goal"]
        observations, rewards, _, _, _ = vector.step(np.ones((1, 1, 2)))
        after = vector.get_state()
        total += rewards[0, 0]
        if not np.array_equal(after["goal"], before):
            break
        assert np.hypot(*(after["position"] - before)[0, 0]) > GOAL_RADIUS
    left_over = np.hypot(*(after["position"] - before)[0, 0])
    assert left_over <= GOAL_RADIUS and 30 < after["elapsed"][0] < 45
    assert total == pytest.approx(2 - left_over + 10, abs=1e-5)
    way = (after["goal"] - after["position"])[0, 0]
    assert np.hypot(*way) >= 1.0
    np.testing.assert_allclose(observations[0, 0, 34:], way / (1 + np.hypot(*way)), atol=1e-6)  # heading 0, and shown


@pytest.mark.parametrize("visible", [1, 2, 7])
def test_a_goal_is_shown_for_its_first_observations_and_then_hidden(visible):
    vector, always = make(2, goal_visible_steps=visible, max_steps=20), make(2, max_steps=20)
    (observations, infos), (shown, _) = vector.reset(seed=0), always.reset(seed=0)
    age = np.zeros((2, 10), int)
    for action in random_actions(vector, 45, low=-0.5):
        hidden = age >= visible
        assert (observations[hidden][:, 34:] == 0).all() and (observations[~hidden][:, 34:] != 0).all()
        expected = np.where(hidden[..., None], 0, shown[..., 34:])
        assert np.array_equal(observations[..., 34:], expected)
        assert np.array_equal(observations[..., :34], shown[..., :34])
        distance = np.linalg.norm(shown[..., 34:].astype(float), axis=-1, keepdims=True)
        where = shown[..., 34:] / (1 - distance) / envs.LIDAR_RANGE  # where it is, in lidar ranges
        np.testing.assert_allclose(infos["unseen"], where, atol=1e-5)
        goal = vector.get_state()["goal"]
        (observations, _, _, truncations, infos), (shown, _, _, _, last) = vector.step(action), always.step(action)
        if truncations.any():
            assert np.array_equal(infos["final_info"]["unseen"], last["final_info"]["unseen"])
            distance = np.linalg.norm(last["final_obs"][..., 34:].astype(float), axis=-1, keepdims=True)
            where = last["final_obs"][..., 34:] / (1 - distance) / envs.LIDAR_RANGE
            np.testing.assert_allclose(infos["final_info"]["unseen"], where, atol=1e-5)
        arrived = (vector.get_state()["goal"] != goal).any(-1)
        age = np.where(arrived | truncations[:, None], 0, age + 1)


def walls(columns, rows):
    """For every inner wall: the two rooms (column, row) that it parts, and the axis across it."""
    beside = [((c, r), (c + 1, r), 0) for r in range(rows) for c in range(columns - 1)]
    return beside + [((c, r), (c, r + 1), 1) for r in range(rows - 1) for c in range(columns)]


def shortest_way(vector, door, start, goal):
    """From start to goal through the middles of doors, by Floyd's and Warshall's algorithm."""
    columns, rows = vector.params.columns, vector.params.rows
    side = np.array([vector.params.room_width, vector.params.room_height])
    points, rooms = [start, goal], [{tuple((start // side).astype(int))}, {tuple((goal // side).astype(int))}]
    for (one, other, axis), (begin, end) in zip(walls(columns, rows), door, strict=True):
        if end > begin:
            middle = np.full(2, 0.5 * (begin + end))
            middle[axis] = other[axis] * side[axis]
            points.append(middle)
            rooms.append({one, other})
    ways = np.full((len(points), len(points)), np.inf)
    for a in range(len(points)):
        for b in range(len(points)):
            if rooms[a] & rooms[b]:
                ways[a, b] = math.dist(points[a], points[b])
    for via in range(len(points)):
        ways = np.minimum(ways, ways[:, via, None] + ways[None, via])
    return ways[0, 1]


@pytest.mark.parametrize(
    ("weights", "rooms"),
    [
        ({}, 0),
        (dict(progress_weight=0.3, arrival_weight=5, collision_weight=2, time_weight=1), 0),
        ({}, "2x1"),
    ],
)
def test_statistics_match_loops_over_the_trajectories(weights, rooms):
    num_envs, n_agents, steps = 3, 12, 400
    sizes = dict(n_agents=n_agents, n_obstacles=12, rooms=rooms) | weights
    vector, endless = make(num_envs, max_steps=steps, **sizes), make(num_envs, max_steps=steps + 1, **sizes)
    policy = envs.planning_policy(vector, width=0.05, brake=0.01)  # reckless enough to collide
    observations, infos = vector.reset(seed=8)
    endless.reset(seed=8)
    given = dict(progress=1.0, arrival=2.0, collision=1.0, time=0.01)
    given |= {name.removesuffix("_weight"): value for name, value in weights.items()}
    expected = [dict.fromkeys(vector.stat_names, 0.0) for _ in range(num_envs)]
    shortest, driven, goals, onsets, contacts = (np.zeros(num_envs) for _ in range(5))
    begun, way = endless.get_state()["position"].copy(), np.zeros((num_envs, n_agents))
    for _ in range(steps):
        before, actions = endless.get_state(), policy(observations, infos)
        rewards = endless.step(actions)[1]
        after = endless.get_state()
        observations, same_rewards, _, truncations, infos = vector.step(actions)
        assert np.array_equal(rewards, same_rewards)
        for env in range(num_envs):
            expected[env]["l"] += 1
            for i in range(n_agents):
                old, new, goal = before["position"][env, i], after["position"][env, i], before["goal"][env, i]
                contact, arrived = float(after["contact"][env, i]), math.dist(new, goal) <= GOAL_RADIUS
                assert arrived == (goal != after["goal"][env, i]).any()
                ways = [shortest_way(endless, before["door"][env], place, goal) for place in (old, new)]
                progress = ways[0] - ways[1]
                terms = dict(progress=progress, arrival=float(arrived), collision=-contact, time=-1.0)
                for name in TERMS:
                    expected[env]["reward_" + name] += given[name] * terms[name] / n_agents
                reward = sum(given[name] * terms[name] for name in TERMS)
                assert rewards[env, i] == pytest.approx(reward, abs=1e-6)
                expected[env]["r"] += reward / n_agents
                way[env, i] += math.dist(old, new)
                onsets[env] += contact and not before["contact"][env, i]
                contacts[env] += contact
                if arrived:
                    goals[env] += 1
                    shortest[env] += shortest_way(endless, before["door"][env], begun[env, i], goal) - GOAL_RADIUS
                    driven[env] += way[env, i]
                    begun[env, i], way[env, i] = new, 0.0
    assert truncations.all() and (goals > (10 if rooms else 20)).all()
    assert (onsets > 5).all() and (contacts > onsets).all()
    for env in range(num_envs):
        expected[env] |= {
            "goals": goals[env] / n_agents,
            "collisions": onsets[env] / n_agents,
            "collisions_per_goal": onsets[env] / goals[env],
            "path_efficiency": shortest[env] / driven[env],
            "contact": contacts[env] / (steps * n_agents),
        }
        episode = {name: infos["episode"][name][env] for name in vector.stat_names}
        assert episode == pytest.approx(expected[env], abs=1e-9)
        assert sum(episode["reward_" + name] for name in TERMS) == pytest.approx(episode["r"], abs=1e-9)


def test_statistics_of_an_episode_in_which_nothing_happens():
    vector, start = alone(max_steps=5)
    vector.reset(seed=0, options=start | {"position": [[[5, 5]]], "goal": [[[15, 15]]]})
    episode = play(vector, np.zeros((5, 1, 1, 2)))[-1][4]["episode"]
    expected = dict.fromkeys(vector.stat_names, 0.0) | {"r": -0.05, "l": 5, "reward_time": -0.05}
    assert {name: episode[name][0] for name in vector.stat_names} == pytest.approx(expected, abs=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Starts
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, dict(n_agents=50), dict(n_obstacles=15), dict(n_obstacles=15, n_agents=120)])
def test_starts_keep_their_distances(sizes):
    vector = make(40, **sizes)
    vector.reset(seed=0)
    state, corner = vector.get_state(), np.array([8, 6])
    for position, goal, obstacle in zip(state["position"], state["goal"], state["obstacle"], strict=True):
        assert (obstacle[:, 2] >= 0.2).all() and (obstacle[:, 2] <= 0.5).all()
        between = (
            np.linalg.norm(obstacle[:, None, :2] - obstacle[:, :2], axis=-1) - obstacle[:, None, 2] - obstacle[:, 2]
        )
        np.fill_diagonal(between, math.inf)
        walls = np.minimum(obstacle[:, :2], corner - obstacle[:, :2]).min(axis=-1) - obstacle[:, 2]
        assert min(between.min(), walls.min()) >= 0.3 - 1e-12
        apart = np.linalg.norm(position[:, None] - position, axis=-1)
        np.fill_diagonal(apart, math.inf)
        assert apart.min() >= 0.3 - 1e-12
        for points in (position, goal):
            assert (points >= 0.5).all() and (points <= corner - 0.5).all()
            gaps = np.linalg.norm(points[:, None] - obstacle[:, :2], axis=-1) - obstacle[:, 2]
            assert gaps.min() >= 0.2 - 1e-12
        assert np.linalg.norm(goal - position, axis=-1).min() >= 1.0
    assert not state["wheel"].any() and not state["contact"].any()
    assert len(np.unique(np.round(headings(vector), 9))) == headings(vector).size
    radii = state["obstacle"][..., 2]
    assert radii.min() < 0.25 and radii.max() > 0.4


def test_the_smallest_arena_with_all_that_it_holds_never_hangs():
    vector = make(50, width=3, height=3, n_agents=14, n_obstacles=2, max_steps=3)
    vector.reset(seed=0)
    play(vector, random_actions(vector, 20))
    assert np.isfinite(vector.get_state()["position"]).all()


def test_any_part_of_a_start_can_be_given_and_the_rest_is_random():
    vector = make(2, n_agents=4, n_obstacles=3, max_steps=2)
    vector.reset(seed=5)
    state = vector.get_state()
    parts = {name: state[name] for name in ("position", "goal", "obstacle")} | {"heading": headings(vector)}
    for name, value in parts.items():
        other = make(2, n_agents=4, n_obstacles=3, max_steps=2)
        other.reset(seed=6, options={name: value})
        given = other.get_state() | {"heading": headings(other)}
        np.testing.assert_allclose(given[name], value, atol=1e-12)
        assert all(not np.array_equal(given[rest], value) for rest, value in parts.items() if rest != name)
        assert np.linalg.norm(given["goal"] - given["position"], axis=-1).min() >= (name != "goal")
        play(other, random_actions(other, 2))
        assert not np.allclose(other.get_state()["obstacle"], given["obstacle"])


# ----------------------------------------------------------------------------------------------------------------------
# Rooms
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns, rows", [(3, 2), (1, 3), (5, 4)])
def test_all_rooms_are_connected_by_doors_that_keep_off_corners(columns, rows):
    width, height = 3.0 * columns, 2.0 * rows
    vector = make(1000, n_agents=1, n_obstacles=0, width=width, height=height, rooms=f"{columns}x{rows}", max_steps=1)
    vector.reset(seed=0)
    vector.step(np.zeros((1000, 1, 2)))  # the second episode has other doors
    doors = vector.get_state()["door"]
    assert doors.shape == (1000, len(walls(columns, rows)), 2)
    n_doors = []
    for door in doors:
        reached, waiting = {(0, 0)}, [(0, 0)]
        while waiting:
            room = waiting.pop()
            for (one, other, _), (begin, end) in zip(walls(columns, rows), door, strict=True):
                if end > begin and room in (one, other) and not {one, other} <= reached:
                    waiting += {one, other} - reached
                    reached |= {one, other}
        assert len(reached) == columns * rows
        for ((column, row), _, axis), (begin, end) in zip(walls(columns, rows), door, strict=True):
            corner, length = (row * height / rows, height / rows) if axis == 0 else (column * width / columns, 3.0)
            if end > 0:
                assert end - begin == pytest.approx(0.6)
                assert corner + 0.3 <= begin + 1e-9 and end <= corner + length - 0.3 + 1e-9
        n_doors.append((door[:, 1] > 0).sum())
    tree = columns * rows - 1
    spare = len(walls(columns, rows)) - tree
    assert min(n_doors) >= tree and np.mean(n_doors) == pytest.approx(tree + 0.3 * spare, abs=0.2)
    assert (np.diff(doors[:2], axis=0) != 0).any()


def test_all_spanning_trees_of_four_rooms_are_equally_likely():
    vector = make(4000, n_agents=1, n_obstacles=0, rooms="2x2")
    vector.reset(seed=1)
    closed = vector.get_state()["door"][..., 1] == 0
    assert closed.sum(axis=1).max() == 1  # of a ring of four walls
    np.testing.assert_allclose(closed.mean(axis=0), 0.7 / 4, atol=0.03)


@examples
@given(seed=st.integers(0, 2**32 - 1))
def test_scans_match_the_reference_among_rooms(seed):
    rng = np.random.default_rng(seed)
    columns, rows = rng.integers(1, 5, 2)
    width, height = columns * rng.uniform(1.5, 4) + 2, rows * rng.uniform(1.5, 4) + 2
    vector = make(n_agents=6, n_obstacles=2, width=width, height=height, rooms=f"{columns}x{rows}")
    position = rng.uniform(0.1, np.array([width, height]) - 0.1, (1, 6, 2))
    heading = rng.uniform(-math.pi, math.pi, (1, 6))
    observations, _ = vector.reset(seed=seed, options={"position": position, "heading": heading})
    obstacle = vector.get_state()["obstacle"][0]
    expected, margin = readings(position[0], heading[0], obstacle, width, height, vector.wall_pieces(0))
    assert np.abs(ranges(observations[0]) - expected)[margin > 1e-5].max() < 3e-5 and (margin > 1e-5).mean() > 0.9


@pytest.mark.parametrize("crowd", [{}, dict(n_agents=25, width=4.6, height=3.2, n_obstacles=0)])
def test_no_robot_ever_crosses_a_wall(crowd):
    vector = make(8, rooms="3x2", max_steps=10**6, **dict(n_agents=10, n_obstacles=3) | crowd)
    vector.reset(seed=2)
    params, rng = vector.params, np.random.default_rng(0)
    size = np.array([params.room_width, params.room_height])
    crossings = 0
    for step in range(4000):
        if step % 40 == 0:  # straight for one corner or another, so that they lean against walls and posts
            target = rng.uniform(0, [params.width, params.height], (8, vector.single_action_space.shape[0], 2))
        before = vector.get_state()
        vector.step(np.clip(chase(vector, target) + rng.normal(0, 0.2, vector.action_space.shape), -1, 1))
        old, new = before["position"], vector.get_state()["position"]
        for env, i in np.argwhere(((old // size) != (new // size)).any(-1)):
            here, there = tuple(map(int, old[env, i] // size)), tuple(map(int, new[env, i] // size))
            wall = next(n for n, (*rooms, _) in enumerate(walls(3, 2)) if {here, there} == set(rooms))
            axis = walls(3, 2)[wall][2]
            line = size[axis] * max(here[axis], there[axis])
            share = (line - old[env, i, axis]) / (new[env, i, axis] - old[env, i, axis])
            along = old[env, i, 1 - axis] + share * (new[env, i, 1 - axis] - old[env, i, 1 - axis])
            begin, end = before["door"][env, wall]
            assert begin < along < end
            crossings += 1
        for env in range(8):  # nor does a robot reach into one, by more than the rounding
            begin, end = np.moveaxis(vector.wall_pieces(env), 1, 0)
            way, length = new[env, :, None] - begin, np.linalg.norm(end - begin, axis=-1)
            along = ((end - begin) / np.maximum(length, 1e-9)[:, None] * way).sum(-1).clip(0, length)
            nearest = begin + along[..., None] * (end - begin) / np.maximum(length, 1e-9)[:, None]
            gaps = np.linalg.norm(new[env, :, None] - nearest, axis=-1)[:, length > 0]
            assert gaps.min() > RADIUS - 2e-3
    assert crossings > 100


def test_starts_keep_off_inner_walls():
    vector = make(200, rooms="3x2", n_agents=15, n_obstacles=6)
    vector.reset(seed=0)
    state = vector.get_state()
    assert (state["obstacle"][..., 2] > 0).mean() > 0.99
    for name, clearance in (("position", 0.2), ("goal", 0.2), ("obstacle", state["obstacle"][..., 2] + 0.3)):
        x, y = np.moveaxis(state[name][..., :2], -1, 0)
        gaps = np.minimum(np.abs(x[..., None] - [8 / 3, 16 / 3]).min(-1), np.abs(y - 3))
        assert (gaps >= clearance - 1e-12)[state["obstacle"][..., 2] > 0 if name == "obstacle" else ...].all()
        assert len(np.unique(np.stack([x // (8 / 3), y // 3], -1).reshape(-1, 2), axis=0)) == 6


def test_a_robot_drives_through_a_door_and_stops_at_a_wall():
    vector = make(n_agents=2, n_obstacles=0, rooms="2x1")
    start = {"position": [[[3.5, 3.0], [3.5, 5.0]]], "heading": [[0, 0]], "goal": [[[7, 1], [7, 5]]]}
    observations, _ = vector.reset(seed=0, options=start | {"door": [[[2.7, 3.3]]]})
    assert ranges(observations)[0, 0, 0] == 1 and ranges(observations)[0, 1, 0] == pytest.approx(0.5 / 3, abs=1e-6)
    play(vector, np.ones((40, 1, 2, 2)))
    state = vector.get_state()
    np.testing.assert_allclose(state["position"], [[[3.5 + 2 - LAG, 3], [3.9, 5]]], atol=1e-9)
    assert state["contact"].tolist() == [[False, True]]


def test_a_robot_slides_off_the_post_of_a_door():
    vector = make(n_agents=1, n_obstacles=0, rooms="2x1")
    start = {"position": [[[3.5, 3.25]]], "heading": [[0]], "goal": [[[7, 1]]], "door": [[[2.7, 3.3]]]}
    vector.reset(seed=0, options=start)
    play(vector, np.ones((60, 1, 1, 2)))
    x, y = vector.get_state()["position"][0, 0]
    assert x > 4.5 and y == pytest.approx(3.2, abs=0.01)


@pytest.mark.parametrize(("columns", "rows"), [(2, 1), (1, 3), (3, 2), (4, 4)])
def test_progress_is_made_on_the_shortest_way_through_the_doors(columns, rows):
    sizes = dict(n_agents=3, n_obstacles=0, width=2.0 * columns + 1.0, height=2.0 * rows + 1.0)
    weights = dict(arrival_weight=0.0, collision_weight=0.0, time_weight=0.0)
    vector = make(4, rooms=f"{columns}x{rows}", **sizes, **weights)
    vector.reset(seed=0)
    through_doors = 0
    for action in random_actions(vector, 60, low=0.2):
        before = vector.get_state()
        _, rewards, *_ = vector.step(action)
        after = vector.get_state()
        for env, i in np.ndindex(4, 3):
            goal = before["goal"][env, i]
            door = before["door"][env]
            old, new = (shortest_way(vector, door, state["position"][env, i], goal) for state in (before, after))
            assert rewards[env, i] == pytest.approx(old - new, abs=1e-6)
            through_doors += old > math.dist(before["position"][env, i], goal) + 1e-9
    assert through_doors > 100


def test_behind_doors_that_lead_nowhere_progress_is_made_through_the_wall():
    vector = make(n_agents=1, n_obstacles=0, rooms="2x1", collision_weight=0.0, time_weight=0.0)
    start = {"position": [[[1, 3]]], "goal": [[[7, 3]]], "heading": [[0.0]], "door": [[[0.0, 0.0]]]}
    vector.reset(seed=0, options=start)
    _, rewards, *_ = vector.step(np.ones((1, 1, 2)))
    assert rewards[0, 0] == pytest.approx(vector.get_state()["position"][0, 0, 0] - 1, abs=1e-6) and rewards[0, 0] > 0


def test_one_room_is_the_arena_without():
    one, none = make(2, rooms="1x1"), make(2)
    assert np.array_equal(one.reset(seed=0)[0], none.reset(seed=0)[0])
    for action in random_actions(one, 20):
        assert np.array_equal(one.step(action)[0], none.step(action)[0])


def test_inner_walls_are_drawn_but_for_their_doors():
    vector = make(n_agents=1, n_obstacles=0, rooms="2x1", render_mode="rgb_array")
    start = {"position": [[[1, 1]]], "goal": [[[7, 1]]], "heading": [[0.0]], "door": [[[2.7, 3.3]]]}
    vector.reset(seed=0, options=start)
    picture = vector.render()[0].astype(int)
    assert (picture[round((6 - 5) * 64), 256] < 50).all() and (picture[round((6 - 3) * 64), 256] > 200).all()


# ----------------------------------------------------------------------------------------------------------------------
# Symmetry, spaces, pictures, baselines
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, dict(n_agents=60, n_obstacles=30, width=20, height=15), dict(rooms="3x2")])
def test_renaming_the_robots_renames_everything(sizes):
    vector, renamed = make(**sizes), make(**sizes)
    vector.reset(seed=1)
    state = vector.get_state()
    n_agents = state["position"].shape[1]
    names = np.random.default_rng(0).permutation(n_agents)
    per_robot = ("position", "direction", "wheel", "contact", "goal", "goal_age", "shortest", "driven")
    renamed.reset(seed=1)
    renamed.set_state(state | {name: state[name][:, names] for name in per_robot})
    for action in random_actions(vector, 25, low=-0.2):
        before = vector.get_state()["goal"]
        a, b = vector.step(action), renamed.step(action[:, names])
        if not np.array_equal(before, vector.get_state()["goal"]):
            break  # new goals are drawn in the robots' order
        np.testing.assert_allclose(a[0][:, names], b[0], atol=2e-3)
        np.testing.assert_allclose(a[1][:, names], b[1], atol=1e-6)
        np.testing.assert_allclose(vector.get_state()["position"][:, names], renamed.get_state()["position"], atol=1e-7)
    assert vector.get_state()["elapsed"][0] > 5


@pytest.mark.parametrize("goal_visible_steps", [None, 5])
def test_observations_lie_in_the_declared_space(goal_visible_steps):
    vector = make(4, n_agents=30, goal_visible_steps=goal_visible_steps)
    assert vector.single_observation_space.shape == (30, 36) and vector.single_action_space.shape == (30, 2)
    observations, _ = vector.reset(seed=0)
    for action in random_actions(vector, 200, low=-0.5):
        assert vector.observation_space.contains(observations)
        observations, rewards, _, _, _ = vector.step(action)
        assert rewards.dtype == np.float32 and rewards.shape == (4, 30)


def test_the_picture_shows_robots_goals_obstacles_and_rays_where_they_are():
    vector = make(n_agents=2, n_obstacles=1, render_mode="rgb_array")
    start = {"position": [[[2, 3], [6, 5]]], "heading": [[0.0, math.pi]], "goal": [[[1, 1], [7, 1]]]}
    vector.reset(seed=0, options=start | {"obstacle": [[[4, 2, 0.5]]]})
    picture = vector.render()[0].astype(int)
    assert picture.shape == (384, 512, 3)

    def pixel(x, y):
        return picture[round((6 - y) * 64), round(x * 64)]

    red, cyan = np.array([204, 41, 41]), np.array([41, 204, 204])
    assert np.abs(pixel(2, 3.06) - red).max() < 10 and np.abs(pixel(6, 5.06) - cyan).max() < 10
    assert (pixel(2.05, 3) > 200).all() and (pixel(5.95, 5) > 200).all()  # the marks
    assert np.abs(pixel(1.24, 1) - red).max() < 120 and (pixel(1, 1) == 255).all()  # a ring
    assert np.abs(pixel(7.24, 1) - cyan).max() < 120
    assert len(set(pixel(4, 2))) == 1 and 150 < pixel(4, 2)[0] < 200
    ray = picture[188:197, 192].min(axis=0)  # straight ahead of the first robot, a pixel wide
    assert ray[0] > 250 and 180 < ray[1] < 240
    assert (pixel(5, 4) == 255).all()


def test_the_baselines_drive_to_many_goals_and_rarely_collide():
    scores = {}
    for name, (policy, kwargs) in envs.baselines("LidarNavigation").items():
        scores[name], _, _ = envs.evaluate(policy, "LidarNavigation", 8, 1, **kwargs)
    assert scores["planning"]["goals"].mean() > 4.5 > 0.2 > scores["random"]["goals"].mean()
    assert scores["planning"]["collisions_per_goal"].mean() < 0.3
    assert scores["planning"]["path_efficiency"].mean() > 0.8
    assert scores["planning"]["goals"].mean() > scores["steering"]["goals"].mean() > 4
    assert scores["steering"]["collisions_per_goal"].mean() < 0.6


def test_the_baseline_remembers_a_hidden_goal():
    stats, _, _ = envs.evaluate(envs.planning_policy, "LidarNavigation", 8, 1, goal_visible_steps=1)
    assert stats["goals"].mean() > 4


def test_near_things_get_most_of_the_scale():
    distance = np.linspace(0.1, 3, 50)
    vector, start = alone(1)
    start |= {"heading": [[0.0]]}
    readings = []
    for d in distance:  # of the wall ahead
        start["position"] = [[[20 - d, 10]]]
        readings.append(vector.reset(seed=0, options=start)[0][0, 0, 0])
    np.testing.assert_allclose(readings, (6 * (distance / 3) - 1) / (1 + 4 * (distance / 3)), atol=2e-6)
    np.testing.assert_allclose(envs.lidar_distance(np.array(readings)), distance, atol=1e-5)
