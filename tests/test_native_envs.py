"""What `make_vec` promises of every native environment, tested once for all of NATIVE_ENVS.

`CASES` says of each how to play it, what it returns and what it refuses; an environment without a row there fails every
test. Physics, observations, rewards, metrics and starts are tested in a file of their own for each, and what Gymnasium
and PettingZoo expect in test_conventions.py.
"""

import copy
import functools
import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.box2d import lunar_lander
from gymnasium.utils.env_checker import data_equivalence

import envs

TRUNCATED, TERMINATED = (False, True), (True, False)
SEED = 7  # of the run that the others are laid beside

native = pytest.mark.parametrize("env_id", envs.NATIVE_ENVS)
pooled_or_not = pytest.mark.parametrize("num_workers", [0, 2])
same = functools.partial(data_equivalence, exact=True)  # types and shapes too; NaN equals nothing


# ----------------------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One environment."""

    # How it is played: with randomness in its steps if there can be, until several episodes have ended.
    kwargs: dict
    drive: Callable  # (vector, observations, rng) -> actions
    steps: int
    resume_at: int  # this many steps on, a state is taken to go on from
    endings: set  # how episodes end, (terminated, truncated)
    num_envs: int = 8
    busy: Callable = lambda state: True  # what has to be going on in the state that is gone on from

    # What it returns, for one environment with `kwargs`.
    observation: tuple = ()
    at_rest: slice = slice(0)  # columns of the observation that are zero where an episode begins
    infos: dict = {}  # and their shapes
    stats: tuple = ()
    state: tuple = ()  # some of its entries
    exact_starts: tuple = ()  # entries of the state that a start can be given as
    picture: tuple = ()

    # What it refuses, four of them with `small`.
    small: dict = {}
    variants: tuple = ({},)  # arguments with which actions differ
    actions: tuple = ()  # the shape of four, in each variant
    bad_arguments: dict = {}
    unknown_argument: str = ""
    starts: dict = {}  # the shapes of four
    outside: tuple = ()  # (name of a start, index, value, what is allowed)


def anything(vector, observations, rng, low=-1.0, reach=1.0):
    """Actions from `low` to 1, times `reach`, which may lie beyond the bounds."""
    return (reach * rng.uniform(low, 1.0, vector.action_space.shape)).astype(np.float32)


def to_goals(vector, observations, rng):
    """Actions that take every agent of VMAS to its goal."""
    state = vector.get_state()
    return np.clip(4 * (state["goal_pos"] - state["agent_pos"]) - state["agent_vel"], -1, 1).astype(np.float32)


def land_or_crash(vector, observations, rng):
    """Every second lander is flown by Gymnasium's heuristic, the others anyhow."""
    actions = rng.integers(4, size=len(observations))
    pilot = SimpleNamespace(unwrapped=SimpleNamespace(continuous=False))
    actions[::2] = [lunar_lander.heuristic(pilot, seen) for seen in observations[::2]]
    return actions


NOT_NUMBERS = (math.nan, math.inf, "1", None)
ALL_REFUSE = dict(
    num_envs=(0, -1, 1.5, True), max_steps=(0, -5, 10.0, 1.5, None), render_mode=("x", "ansi", "ascii", 1)
)
SWARM_TERMS = ("alignment", "cohesion", "separation", "turning", "order", "obstacle", "energy")
LIDAR_TERMS = ("progress", "arrival", "collision", "time")

SWARM = Case(
    kwargs=dict(n_agents=7, n_neighbors=4, n_obstacles=2, noise=0.4, max_steps=8),
    drive=functools.partial(anything, reach=math.pi),
    steps=25,
    resume_at=5,
    endings={TRUNCATED},
    observation=(7, 44),
    at_rest=slice(-12, -11),
    infos={"neighbors": (7, 4)},
    stats=("r", "l", "polar_order", "cohesion", "collisions", *(f"reward_{term}" for term in SWARM_TERMS)),
    state=("position", "direction", "turn", "obstacle", "elapsed", "totals", "rng"),
    exact_starts=("position", "obstacle"),
    picture=(384, 384, 3),
    small=dict(n_agents=3, n_obstacles=1, box_size=10.0),
    variants=({}, {"steering": "turn"}),
    actions=((4, 3, 2), (4, 3, 1)),
    bad_arguments=dict(
        n_agents=(0, -1, 2.5, True, "10", None, math.nan),
        box_size=(0, -1.0, math.nan, math.inf, "10"),
        radius=(5.1, 0, -1, math.nan, "1", None),
        speed=(-1, math.nan, math.inf),
        dt=(0, -0.1, math.nan),
        max_turn=(3.2, 0, -1, math.nan),
        steering=("left", 1, None),
        noise=(-0.1, 6.3, math.nan),
        n_neighbors=(0, -1, 2.5, None),
        n_obstacles=(64, -1, 1.0),
        count_self=("no", 1, None),
        **dict.fromkeys((f"{term}_weight" for term in SWARM_TERMS), (math.nan, math.inf, "1")),
    ),
    unknown_argument="lidar_range",
    starts={"position": (4, 3, 2), "heading": (4, 3), "obstacle": (4, 1, 2)},
)
LIDAR = Case(
    kwargs=dict(goal_visible_steps=2, n_neighbors=3, rooms="3x2", max_steps=30),
    drive=functools.partial(anything, low=-0.2),
    steps=80,
    resume_at=20,
    endings={TRUNCATED},
    observation=(10, 60),
    at_rest=slice(-4, -2),
    infos={"neighbors": (10, 3), "unseen": (10, 2)},
    stats=(
        "r",
        "l",
        "goals",
        "collisions",
        "collisions_per_goal",
        "path_efficiency",
        "contact",
        *(f"reward_{term}" for term in LIDAR_TERMS),
    ),  # fmt: skip
    state=("position", "direction", "wheel", "contact", "goal", "obstacle", "door", "elapsed", "totals", "rng"),
    exact_starts=("position", "goal", "obstacle", "door"),
    picture=(384, 512, 3),
    small=dict(n_agents=2, n_obstacles=1, rooms="2x1"),
    actions=((4, 2, 2),),
    bad_arguments=dict(
        n_agents=(0, -1, 2.5, True, "10", None, 124),
        n_obstacles=(-1, 1.5, None, 16),
        rooms=(1, -1, True, None, "3", "0x2", "3 x 2", "6x1", "1x5", (3, 2)),
        **dict.fromkeys(("width", "height"), (2.9, -1, math.nan, math.inf, "8", None)),
        goal_visible_steps=(0, -1, 1.5, True),
        n_neighbors=(-1, 2.5, None, True),
        radio_range=(0, -1.0, math.nan, math.inf, "3", None),
        **dict.fromkeys((f"{term}_weight" for term in LIDAR_TERMS), NOT_NUMBERS),
    ),
    unknown_argument="box_size",
    starts={"position": (4, 2, 2), "heading": (4, 2), "goal": (4, 2, 2), "obstacle": (4, 1, 3), "door": (4, 1, 2)},
    outside=(
        ("position", (3, 1, 0), 0.05, "from 0.1 to 7.9"),
        ("position", (3, 0, 1), 5.95, "from 0.1 to 5.9"),
        ("goal", (3, 1, 0), 8.5, "from 0 to 8"),
        ("goal", (0, 0, 0), 9.0, "from 0 to 8"),
        ("goal", (3, 0, 1), -1.0, "from 0 to 6"),
        ("obstacle", (3, 0, 2), 0.6, "from 0 to 0.5"),
        ("obstacle", (3, 0, 2), -0.1, "from 0 to 0.5"),
        ("obstacle", (3, 0, 1), 6.1, "from 0 to 6"),
        ("door", (3, 0, 1), 8.1, "from 0 to 8"),
    ),
)
VMAS = Case(
    kwargs=dict(n_neighbors=2, max_steps=25),
    drive=to_goals,
    steps=60,
    resume_at=12,
    endings={TRUNCATED, TERMINATED},
    observation=(3, 34),
    at_rest=slice(-16, -14),
    infos={"neighbors": (3, 2)},
    stats=("r", "l", "collisions", "arrived", "reward_progress", "reward_final", "reward_collision"),
    state=("agent_pos", "agent_vel", "goal_pos", "elapsed", "totals", "rng"),
    exact_starts=("agent_pos", "agent_vel", "goal_pos"),
    picture=(384, 384, 3),
    actions=((4, 3, 2),),
    bad_arguments=dict(
        n_agents=(0, -1, 51, 2.5, True, "3", None),
        n_neighbors=(-1, 2.5, None, True),
        radio_range=(0, -1.0, math.nan, math.inf, "3", None),
        **dict.fromkeys(("pos_shaping_factor", "final_reward", "agent_collision_penalty"), NOT_NUMBERS),
    ),
    unknown_argument="lidar_range",
    starts=dict.fromkeys(("agent_pos", "agent_vel", "goal_pos"), (4, 3, 2)),
)
LANDER = Case(
    kwargs=dict(enable_wind=True, max_steps=300),
    drive=land_or_crash,
    steps=320,
    resume_at=210,
    endings={TRUNCATED, TERMINATED},
    num_envs=40,  # more than the lanes hold at once
    busy=lambda state: (state["touched"] >= 0).any() and (state["contact_impulse"] > 0).any(),
    observation=(8,),
    at_rest=slice(6, 8),
    stats=("r", "l", "success", "landed", "crashed", "speed", "x"),
    state=("terrain", "pose", "velocity", "touched", "contact_impulse", "push", "elapsed", "totals", "rng"),
    exact_starts=("push",),
    picture=(400, 600, 3),
    variants=({}, {"continuous": True}),
    actions=((4,), (4, 2)),
    bad_arguments=dict(
        gravity=(-12.5, 0.5, "low"),
        wind_power=(-1.0,),
        turbulence_power=(math.nan,),
        continuous=(1,),
        enable_wind=("yes",),
        randomize_spawn=(None,),
        sparse_reward=(0,),
    ),
    unknown_argument="n_agents",
    starts={"terrain": (4, 12), "push": (4, 2), "position": (4, 2), "angle": (4,)},
)
CASES = {
    "Swarm": SWARM,
    "LidarNavigation": LIDAR,
    "VmasNavigation": VMAS,
    "LunarLander": LANDER,
    "DenseLunarLander": LANDER._replace(num_envs=16),
    "SparseLunarLander": LANDER._replace(num_envs=16),
}


def test_every_native_environment_is_in_the_table():
    assert set(CASES) == set(envs.NATIVE_ENVS)


# ----------------------------------------------------------------------------------------------------------------------
# Helpers
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def no_display():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDL_VIDEODRIVER", "dummy")
        yield


@pytest.fixture
def make():
    """`make_vec`, and all that it made is closed again."""
    made = []

    def make_one(env_id, num_envs=None, num_workers=0, **env_kwargs):
        made.append(envs.make_vec(env_id, num_envs or CASES[env_id].num_envs, num_workers, **env_kwargs))
        return made[-1]

    yield make_one
    for vector in made:
        vector.close()


class Run(NamedTuple):
    """What an environment says after a seed, over several endings, and in the end to a reset without a seed."""

    start: tuple
    actions: np.ndarray  # (steps, num_envs, ...)
    results: list  # of each step
    midway: dict  # the state after `resume_at` steps
    after: tuple


@functools.cache
def recorded(env_id):
    case = CASES[env_id]
    vector, rng = envs.make_vec(env_id, case.num_envs, 0, **case.kwargs), np.random.default_rng(3)
    start, results, actions = vector.reset(seed=SEED), [], []
    observations, _ = start
    for step in range(case.steps):
        if step == case.resume_at:
            midway = vector.get_state()
        actions.append(case.drive(vector, observations, rng))
        results.append(vector.step(actions[-1]))
        observations = results[-1][0]
    return Run(start, np.array(actions), results, midway, vector.reset())


def play(vector, actions):
    """What `step` returns for each of the actions."""
    return [vector.step(action) for action in actions]


def random_actions(vector, steps, seed=0):
    """(steps, num_envs, ...), within the bounds."""
    space, rng = vector.action_space, np.random.default_rng(seed)
    if space.dtype.kind == "i":
        return rng.integers(0, space.nvec, (steps, *space.shape))
    return rng.uniform(space.low, space.high, (steps, *space.shape)).astype(np.float32)


def part(value, chosen):
    """What a nested return holds for some of the environments."""
    if isinstance(value, dict):
        return {key: part(entry, chosen) for key, entry in value.items()}
    return type(value)(part(entry, chosen) for entry in value) if isinstance(value, tuple | list) else value[chosen]


def valid(results):
    """Of every step, what the masks in its infos declare valid."""
    kept = []
    for *arrays, infos in results:
        if "episode" in infos:
            masked = {name: part(infos[name], infos["_" + name]) for name in ("final_obs", "final_info", "episode")}
            infos = infos | masked
        kept.append((*arrays, infos))
    return kept


def endings(results):
    """The ways in which episodes ended, (terminated, truncated)."""
    flags = [np.stack([terminations, truncations], axis=1) for _, _, terminations, truncations, _ in results]
    return {(bool(terminated), bool(truncated)) for terminated, truncated in np.concatenate(flags)} - {(False, False)}


# ----------------------------------------------------------------------------------------------------------------------
# Seeds and workers
# ----------------------------------------------------------------------------------------------------------------------


@native
def test_the_recorded_run_ends_episodes_in_all_ways_and_is_busy_half_way(env_id):
    case, run = CASES[env_id], recorded(env_id)
    assert endings(run.results) == case.endings
    assert endings(run.results[case.resume_at :]) == case.endings
    assert sum((terminated | ended).sum() for _, _, terminated, ended, _ in run.results[case.resume_at :]) > 10
    assert case.busy(run.midway)


@native
def test_the_same_seed_gives_the_same_run_and_another_seed_another(env_id, make):
    case, run = CASES[env_id], recorded(env_id)
    fresh, used = make(env_id, **case.kwargs), make(env_id, **case.kwargs)
    assert same((fresh.reset(seed=SEED), play(fresh, run.actions), fresh.reset()), (run.start, run.results, run.after))
    assert not np.array_equal(used.reset(seed=SEED + 1)[0], run.start[0])
    assert not np.array_equal(play(used, run.actions)[-1][0], run.results[-1][0])
    assert not np.array_equal(used.reset()[0], run.after[0])
    assert same(used.reset(seed=SEED), run.start)
    assert same(valid(play(used, run.actions)), valid(run.results)) and same(used.reset(), run.after)


@native
def test_different_seeds_and_different_environments_of_a_batch_differ(env_id, make):
    vector = make(env_id, 8, **CASES[env_id].kwargs)
    starts = np.concatenate([vector.reset(seed=seed)[0] for seed in range(20)])
    assert len(np.unique(starts.reshape(160, -1), axis=0)) == 160


@native
def test_the_whole_range_of_seeds_is_taken(env_id, make):
    starts = {}
    for seed in (0, 5, np.int64(5), 2**31, 2**63 - 2, 2**63 - 1):
        observations = make(env_id, 2, **CASES[env_id].kwargs).reset(seed=seed)[0]
        assert same(starts.setdefault(int(seed), observations), observations)
    assert len(np.unique(np.concatenate([*starts.values()]).reshape(10, -1), axis=0)) == 10


@native
@pytest.mark.parametrize("sizes", [(8,), (1,) * 8, (3, 5), (5, 1, 2)])
def test_a_batch_cut_into_slices_is_the_same_batch(env_id, sizes):
    case, run = CASES[env_id], recorded(env_id)
    factor = case.num_envs // 8
    ends = np.cumsum(sizes) * factor
    sizes = [1] * 8 if len(sizes) == 8 else np.diff(ends, prepend=0)  # each alone, or every one that fills a lane
    for size, end in zip(sizes, ends, strict=True):
        chosen = slice(int(end - size), int(end))
        cut = envs.NATIVE_ENVS[env_id](int(size), first_env=chosen.start, **case.kwargs)
        assert same(cut.reset(seed=SEED), part(run.start, chosen))
        for ours, theirs in zip(play(cut, run.actions[:, chosen]), run.results, strict=True):
            assert same(ours[:4], part(theirs[:4], chosen))
            ended = (ours[2] | ours[3]).any()
            assert ("episode" in ours[4]) == ended
            expected = (
                part(theirs[4], chosen) if ended else part({name: theirs[4][name] for name in case.infos}, chosen)
            )
            assert same(valid([(*ours[:4], ours[4])])[0], valid([(*ours[:4], expected)])[0])
        assert same(cut.reset(), part(run.after, chosen))
    assert end == case.num_envs


@native
def test_reset_without_a_seed_runs_the_streams_on(env_id, make):
    a, b = make(env_id, 3, **CASES[env_id].kwargs), make(env_id, 3, **CASES[env_id].kwargs)
    first, again = a.reset(seed=3)[0], a.reset()[0]
    b.reset(seed=3)
    assert not np.array_equal(first, again)
    assert np.array_equal(again, b.reset()[0])


@native
@pooled_or_not
def test_an_environment_that_was_never_given_a_seed_starts_anywhere(env_id, num_workers, make):
    assert not np.array_equal(make(env_id, 3, num_workers).reset()[0], make(env_id, 3, num_workers).reset()[0])


@native
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_run(env_id, num_workers, make):
    case, run = CASES[env_id], recorded(env_id)
    vector = make(env_id, None, num_workers, **case.kwargs)
    assert same(vector.reset(seed=SEED), run.start)
    assert same(play(vector, run.actions[: case.resume_at]), run.results[: case.resume_at])
    assert same(vector.get_state(), run.midway)
    assert same(play(vector, run.actions[case.resume_at :]), run.results[case.resume_at :])
    assert same(vector.reset(), run.after)


@native
def test_a_start_given_in_options_reaches_every_worker_and_is_taken_as_it_is(env_id, make):
    case = CASES[env_id]
    donor = make(env_id, 5, **case.kwargs)
    donor.reset(seed=99)
    start = {name: donor.get_state()[name] for name in case.exact_starts}
    one, pool = make(env_id, 5, **case.kwargs), make(env_id, 5, 3, **case.kwargs)
    assert same(one.reset(seed=2, options=start), pool.reset(seed=2, options=start))
    assert same(one.get_state(), pool.get_state())
    assert same({name: pool.get_state()[name] for name in start}, start)


# ----------------------------------------------------------------------------------------------------------------------
# State: what get_state returns is all there is
# ----------------------------------------------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_set_state_goes_on_bit_for_bit_in_the_same_or_another_object(env_id, num_workers, make):
    case, run = CASES[env_id], recorded(env_id)
    *_, (observations, _, _, _, infos) = run.results[: case.resume_at]
    infos = {name: infos[name] for name in case.infos}
    vector, state = make(env_id, None, num_workers, **case.kwargs), copy.deepcopy(run.midway)
    for _ in range(2):  # the first time without a reset before: this is how a run is resumed
        assert same(vector.set_state(state), (observations, infos))
        assert same(vector.get_state(), run.midway)
        assert same(valid(play(vector, run.actions[case.resume_at :])), valid(run.results[case.resume_at :]))
        assert same(vector.reset(), run.after)
        assert same(state, run.midway)


@native
def test_a_state_holds_one_entry_per_environment(env_id):
    case, run = CASES[env_id], recorded(env_id)
    assert set(case.state) <= set(run.midway)
    assert all(array.shape[0] == case.num_envs for array in run.midway.values())


# ----------------------------------------------------------------------------------------------------------------------
# Episodes: autoreset in the same step, statistics, copies
# ----------------------------------------------------------------------------------------------------------------------


@native
@pooled_or_not
def test_the_step_that_ends_an_episode_returns_its_last_observation_and_the_next_ones_first(env_id, num_workers, make):
    case = CASES[env_id]
    ours = make(env_id, 3, num_workers, **case.kwargs | {"max_steps": 5})
    longer = make(env_id, 3, **case.kwargs | {"max_steps": 100})
    assert same(ours.reset(seed=2), longer.reset(seed=2))
    actions = random_actions(ours, 8)
    assert same(play(ours, actions[:4]), play(longer, actions[:4]))
    observations, rewards, terminations, truncations, infos = ours.step(actions[4])
    last_observations, last_rewards, _, _, last_infos = longer.step(actions[4])
    assert truncations.all() and not terminations.any()
    assert all(infos[mask].all() for mask in ("_final_obs", "_final_info", "_episode"))
    assert same(infos["final_obs"], last_observations) and same(infos["final_info"], last_infos)
    if env_id != "SparseLunarLander":  # whose only reward comes at the end
        assert same(rewards, last_rewards)
    # The next episode starts as a second reset would have started it.
    first_observations, first_infos = longer.reset()
    assert same(observations, first_observations) and not same(observations, last_observations)
    assert same({name: infos[name] for name in case.infos}, first_infos)
    assert not observations[..., case.at_rest].any()
    state = ours.get_state()
    assert not state["elapsed"].any() and not state["totals"].any()
    assert same(state, longer.get_state())
    assert same(play(ours, actions[5:]), play(longer, actions[5:]))


@native
def test_an_episode_is_as_long_as_max_steps_every_time(env_id, make):
    vector = make(env_id, 2, max_steps=3)
    vector.reset(seed=0)
    results = play(vector, random_actions(vector, 10))
    assert [truncations.tolist() for _, _, _, truncations, _ in results] == [[n % 3 == 0] * 2 for n in range(1, 11)]
    assert all((infos["episode"]["l"] == 3).all() for *_, truncations, infos in results if truncations.any())
    assert not any(terminations.any() for _, _, terminations, _, _ in results)


@native
@pooled_or_not
def test_staggered_first_episodes_end_at_different_times_and_later_ones_are_whole(env_id, num_workers, make):
    vector = make(env_id, 5, num_workers, max_steps=10)
    plain, _ = vector.reset(seed=0)
    staggered, _ = vector.reset(seed=0, options={"stagger": True})
    assert same(plain, staggered)
    ends, lengths = [[] for _ in range(5)], []
    for step, (*_, truncations, infos) in enumerate(play(vector, random_actions(vector, 25)), start=1):
        for env in np.flatnonzero(truncations):
            ends[env].append(step)
            lengths.append(infos["episode"]["l"][env] == step - ([0, *ends[env]])[-2])
    assert ends == [[10, 20], [4, 14, 24], [8, 18], [2, 12, 22], [6, 16]]
    assert all(lengths)


@native
def test_a_reset_in_mid_episode_starts_the_count_and_the_sums_again(env_id, make):
    kwargs = CASES[env_id].kwargs | {"max_steps": 4}
    vector, fresh = make(env_id, 2, **kwargs), make(env_id, 2, **kwargs)
    actions = random_actions(vector, 7)
    vector.reset(seed=0)
    play(vector, actions[:3])
    state = vector.get_state()
    vector.reset()
    fresh.set_state(state)
    fresh.step(actions[0])  # which ends the episode, unlike the reset
    fresh.set_state(state)
    fresh.reset()
    assert same(vector.get_state(), fresh.get_state())
    assert not vector.get_state()["elapsed"].any() and not vector.get_state()["totals"].any()
    results = play(vector, actions[3:])
    assert same(valid(results), valid(play(fresh, actions[3:])))
    assert [truncations.all() for *_, truncations, _ in results] == [False, False, False, True]
    assert (results[-1][4]["episode"]["l"] == 4).all()
    returns = sum(rewards.reshape(2, -1).mean(axis=1) for _, rewards, *_ in results)
    np.testing.assert_allclose(results[-1][4]["episode"]["r"], returns, rtol=1e-5, atol=1e-5)


@native
def test_environments_out_of_step_end_one_by_one_each_behind_its_mask(env_id, make):
    case = CASES[env_id]
    kwargs = case.kwargs | {"max_steps": 8}
    alone = [envs.NATIVE_ENVS[env_id](1, first_env=env, **kwargs) for env in range(3)]
    for env, one in enumerate(alone):
        one.reset(seed=4)
        play(one, random_actions(one, 2 * env))
    batch = make(env_id, 3, **kwargs)
    states = [one.get_state() for one in alone]
    batch.set_state({name: np.concatenate([state[name] for state in states]) for name in states[0]})
    ends = []
    for action in random_actions(batch, 9):
        returned = batch.step(action)
        infos, done = returned[4], returned[3]
        ends.append(done.tolist())
        for env, one in enumerate(alone):
            chosen = slice(env, env + 1)
            expected = one.step(action[chosen])
            assert same(part(returned[:4], chosen), expected[:4])
            if done[env]:
                assert same(part(infos, chosen), expected[4])
        for name in ("_final_obs", "_final_info", "_episode"):
            assert (name in infos) == done.any() and (not done.any() or same(infos[name], done))
    assert [n for n, end in enumerate(ends, start=1) if any(end)] == [4, 6, 8]
    assert (np.sum(ends, axis=0) == 1).all()


@native
def test_infos_hold_what_the_contract_names_with_its_shapes_and_types(env_id, make):
    case = CASES[env_id]
    vector = make(env_id, 4, **case.kwargs | {"max_steps": 2})
    _, reset_infos = vector.reset(seed=0)
    going_on, ended = (infos for *_, infos in play(vector, random_actions(vector, 2)))
    names = {"final_obs", "_final_obs", "final_info", "_final_info", "episode", "_episode"}
    assert set(reset_infos) == set(going_on) == set(ended["final_info"]) == set(case.infos)
    assert set(ended) == set(case.infos) | names
    for name, shape in case.infos.items():
        assert ended[name].shape == ended["final_info"][name].shape == (4, *shape)
    assert ended["final_obs"].shape == vector.observation_space.shape == (4, *case.observation)
    assert ended["final_obs"].dtype == np.float32
    assert tuple(ended["episode"]) == vector.stat_names == case.stats
    assert all(values.shape == (4,) for values in ended["episode"].values())
    assert all(ended[mask].dtype == bool and ended[mask].shape == (4,) for mask in names if mask.startswith("_"))


@native
@pooled_or_not
def test_returned_arrays_stay_as_they_are_and_writing_to_them_changes_nothing(env_id, num_workers, make):
    def scribble(value):
        for entry in value.values() if isinstance(value, dict) else value:
            if isinstance(entry, np.ndarray):
                entry[...] = 1
            else:
                scribble(entry)

    kwargs = CASES[env_id].kwargs | {"max_steps": 8}
    vector, other = make(env_id, 4, num_workers, **kwargs), make(env_id, 4, num_workers, **kwargs)
    scribble(other.reset(seed=0))
    returned = [vector.reset(seed=0), vector.get_state()]
    before = copy.deepcopy(returned)
    for action in random_actions(vector, 20):
        returned.append(vector.step(action))
        before.append(copy.deepcopy(returned[-1]))
        scribbled = other.step(action)
        assert same(scribbled, before[-1])
        scribble(scribbled)
        scribble(other.get_state())
    vector.reset(seed=9)
    assert same(returned, before) and sum("episode" in infos for *_, infos in returned[2:]) == 2


@native
def test_actions_beyond_the_bounds_act_as_the_bounds_and_are_left_as_they_were(env_id, make):
    kwargs = CASES[env_id].variants[-1] | ({"max_turn": 0.3} if env_id == "Swarm" else {})
    within, beyond = make(env_id, 2, **kwargs), make(env_id, 2, **kwargs)
    low, high = within.action_space.low, within.action_space.high
    within.reset(seed=0), beyond.reset(seed=0)
    actions = np.concatenate([3 * random_actions(within, 20), np.stack([7 * high, 7 * low])])
    for action in actions:
        given = action.copy()
        assert same(within.step(np.clip(action, low, high)), beyond.step(given))
        assert np.array_equal(action, given)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused, with a ValueError that names it
# ----------------------------------------------------------------------------------------------------------------------

BAD_ARGUMENTS = [
    pytest.param(env_id, name, value, id=f"{env_id}-{name}={value!r}")
    for env_id in envs.NATIVE_ENVS
    for name, values in (CASES[env_id].bad_arguments | ALL_REFUSE).items()
    for value in values
]


@pytest.mark.parametrize(("env_id", "name", "value"), BAD_ARGUMENTS)
def test_a_bad_argument_is_named_with_its_value(env_id, name, value):
    arguments = {"num_envs": 1} | CASES[env_id].small | {name: value}
    for call in (functools.partial(envs.make_vec, env_id, num_workers=0), envs.NATIVE_ENVS[env_id]):
        with pytest.raises(ValueError, match=rf"^{name} is {re.escape(repr(value))}: .*(must be|at most)"):
            call(**arguments)


@native
def test_an_unknown_argument_is_named(env_id, make):
    name = CASES[env_id].unknown_argument
    with pytest.raises(TypeError, match=f"^{name} is 3: {env_id} has no such argument, but "):
        make(env_id, 1, **{name: 3})


@pytest.fixture
def refusing(make):
    """A function that makes calls that have to be refused, and leave the episode going as that of an untouched twin."""

    def refuse(env_id, num_workers, bad_calls, **env_kwargs):
        vector, twin = (make(env_id, 4, number, **env_kwargs) for number in (num_workers, 0))
        assert same(vector.reset(seed=0), twin.reset(seed=0))
        before, actions = vector.get_state(), random_actions(vector, 3)
        for call, message in bad_calls(vector):
            with pytest.raises(ValueError, match=message):
                call()
            assert same(vector.get_state(), before), message
        assert same(play(vector, actions), play(twin, actions)) and same(vector.reset(), twin.reset())

    return refuse


def exactly(text):
    return f"^{re.escape(text)}"


@native
@pooled_or_not
def test_bad_seeds_are_named_and_leave_the_episode_going(env_id, num_workers, refusing):
    def bad_calls(vector):
        for seed in (-1, 1.5, 0.5, True, "0", 2**63, math.nan):
            yield lambda seed=seed: vector.reset(seed=seed), f"^seed is {re.escape(repr(seed))}: .*integer"
        for seed in ([], [1, 2], [1] * 5):
            yield (
                lambda seed=seed: vector.reset(seed=seed),
                exactly(f"seed is {seed}: a list must have one for each of 4"),
            )
        yield lambda: vector.reset(seed=[1, 2, 3, -1]), "^seed is -1: .*integer"
        for identical in (-1, 1.5, "2"):
            options = {"identical": identical}
            message = exactly(f"options['identical'] is {identical!r}: it must be True, False or the size of a group")
            yield lambda options=options: vector.reset(seed=0, options=options), message
        for seed in (None, [1, 2, 3, 4]):
            yield lambda seed=seed: vector.reset(seed=seed, options={"identical": 2}), "needs one seed"
        yield (
            lambda: vector.reset(seed=0, options={"stagger": 1}),
            exactly("options['stagger'] is 1: it must be True or"),
        )

    refusing(env_id, num_workers, bad_calls)


@native
@pooled_or_not
def test_bad_options_are_named_and_leave_the_episode_going(env_id, num_workers, refusing):
    starts, outside = CASES[env_id].starts, CASES[env_id].outside

    def bad_options():
        for unknown in ("positions", "altitude"):
            yield {unknown: np.zeros((4, 3, 2))}, exactly(f"options has ['{unknown}']: it may hold {sorted(starts)}")
        for name, shape in starts.items():
            good, what = np.full(shape, 0.2), f"options['{name}']"
            shapes = (good[:3], good[..., 0], good[..., :-1], good[..., None], good.ravel()[:1], good.ravel()[0])
            for wrong in shapes:
                yield {name: wrong}, exactly(f"{what} has shape {wrong.shape}: it must be {shape}")
            for value in (math.nan, math.inf, -math.inf):
                wrong = good.copy()
                wrong.flat[-1] = value
                yield {name: wrong}, exactly(f"{what} holds NaN or infinity: every entry must be finite")
            yield {name: "here"}, exactly(f"{what} is 'here': it must be an array of numbers of shape {shape}")
        for name, index, value, allowed in outside:
            wrong = np.full(starts[name], 0.2)
            wrong[index] = value
            yield {name: wrong}, exactly(f"options['{name}']{list(index)} is {value:g}: it must be {allowed}")

    def bad_calls(vector):
        for options, message in bad_options():
            yield lambda options=options: vector.reset(seed=1, options=options), message
            yield lambda options=options: vector.reset(options=options), message

    refusing(env_id, num_workers, bad_calls, **CASES[env_id].small)


@native
@pooled_or_not
def test_bad_actions_are_named_and_leave_the_episode_going(env_id, num_workers, refusing):
    def wrong_floats(shape):
        zeros = np.zeros(shape)
        axes_exchanged = zeros.swapaxes(0, 1)
        for wrong in (zeros[..., 0], axes_exchanged, zeros.ravel(), zeros[:3], zeros[..., None], zeros[..., :0]):
            yield wrong, exactly(f"actions has shape {wrong.shape}: it must be {shape}")
        yield 0.0, exactly(f"actions has shape (): it must be {shape}")
        for value in (math.nan, math.inf, -math.inf):
            zeros.flat[-1] = value
            yield zeros.copy(), "^actions holds NaN or infinity: every entry must be finite"
            yield zeros.tolist(), "^actions holds NaN or infinity: every entry must be finite"
        for wrong in ([[[0], [0, 1]], [[0]]], "left", {}, None):
            message = f"actions is {wrong!r}: it must be an array of numbers of shape {shape}"
            yield wrong, exactly(message) if wrong is not None else "^actions "

    def wrong_integers(shape):
        for index, value in ((1, 4), (3, 4), (3, -1), (0, -1)):
            wrong = np.zeros(shape, int)
            wrong[index] = value
            yield wrong, f"^actions\\[{index}\\] is {value}: it must be an integer from 0 to 3$"
        shapes = ([0] * 3, [[0]] * 4, [[0, 1, 0, 1]], 0)
        for wrong in (*shapes, [0.0, 1.0, 0.0, 1.0], [0, math.nan, 0, 0], "left", {}, None, [[0], [0, 1]]):
            yield wrong, r"^actions are .*: they must be integers \(4,\)$"

    for variant, shape in zip(CASES[env_id].variants, CASES[env_id].actions, strict=True):

        def bad_calls(vector, shape=shape):
            assert vector.action_space.shape == shape
            wrong_actions = wrong_integers if vector.action_space.dtype.kind == "i" else wrong_floats
            for actions, message in wrong_actions(shape):
                yield lambda actions=actions: vector.step(actions), message

        refusing(env_id, num_workers, bad_calls, **CASES[env_id].small, **variant)


@native
@pooled_or_not
def test_bad_states_are_named_and_leave_the_old_one_whole(env_id, num_workers, refusing):
    def bad_calls(vector):
        state = vector.get_state()
        states = [({}, state), ({**state, "altitude": np.zeros(4)}, state)]
        states += [({name: array for name, array in state.items() if name != missing}, state) for missing in state]
        for wrong, _ in states:
            message = exactly(f"state has {sorted(wrong)}: it must hold {sorted(state)}")
            yield lambda wrong=wrong: vector.set_state(wrong), message
        for name, array in state.items():
            sizes = [array[:3], array[..., None]]
            if array.ndim > 1:
                sizes.append(np.concatenate([array, array[:, :1]], axis=1))  # one agent more
            for wrong in sizes:
                message = exactly(f"state['{name}'] has shape {wrong.shape}: it must be {array.shape}")
                yield lambda wrong=state | {name: wrong}: vector.set_state(wrong), message
            if array.dtype.kind == "f":
                for value in (math.nan, math.inf):
                    wrong = array.copy()
                    wrong.flat[-1] = value
                    others = {other: entry + 1 for other, entry in state.items() if entry.dtype.kind == "f"}
                    message = exactly(f"state['{name}'] holds NaN or infinity")
                    yield lambda wrong=state | others | {name: wrong}: vector.set_state(wrong), message

    refusing(env_id, num_workers, bad_calls, **CASES[env_id].small)


@native
@pooled_or_not
def test_nothing_is_done_before_the_first_reset_or_after_close(env_id, num_workers, make):
    vector = make(env_id, 4, num_workers, render_mode="rgb_array")
    action = random_actions(vector, 1)[0]
    with pytest.raises(gym.error.ResetNeeded, match="step before reset"):
        vector.step(action)
    vector.reset()
    vector.step(action)
    state = vector.get_state()
    vector.close()
    vector.close()
    calls = [
        vector.reset,
        vector.render,
        vector.get_state,
        lambda: vector.set_state(state),
        lambda: vector.set_state({}),
    ]
    for call in (*calls, lambda: vector.step(action)):
        with pytest.raises(gym.error.ClosedEnvironmentError, match="these environments are closed"):
            call()


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------


@native
def test_render_gives_one_picture_for_every_environment(env_id, make):
    vector = make(env_id, 3, render_mode="rgb_array")
    vector.reset(seed=0)
    pictures = vector.render()
    assert len(pictures) == 3
    assert all(picture.dtype == np.uint8 and picture.shape == CASES[env_id].picture for picture in pictures)
    assert not np.array_equal(pictures[0], pictures[1])


@native
@pooled_or_not
def test_the_same_state_gives_the_same_picture(env_id, num_workers, make):
    kwargs = CASES[env_id].kwargs | {"render_mode": "rgb_array"}
    vector, other = make(env_id, 3, **kwargs), make(env_id, 3, num_workers, **kwargs)
    vector.reset(seed=0), other.reset(seed=1)
    play(vector, random_actions(vector, 10))
    before = vector.render()
    assert not same(before, other.render())
    other.set_state(vector.get_state())
    assert same(before, other.render()) and same(before, vector.render())


@native
@pooled_or_not
def test_rendering_changes_nothing_that_follows(env_id, num_workers, make):
    kwargs = CASES[env_id].kwargs | {"max_steps": 8}
    vector, unseen = make(env_id, 2, num_workers, render_mode="rgb_array", **kwargs), make(env_id, 2, **kwargs)
    assert same(vector.reset(seed=0), unseen.reset(seed=0))
    for action in random_actions(vector, 10):
        vector.render()
        assert same(vector.step(action), unseen.step(action))


@native
@pooled_or_not
def test_render_without_a_mode_is_refused(env_id, num_workers, make):
    vector = make(env_id, 2, num_workers)
    vector.reset(seed=0)
    with pytest.raises(ValueError, match="^render_mode is None"):
        vector.render()


@native
def test_human_mode_opens_a_window_of_the_pictures_size_and_close_shuts_it(env_id, make):
    import pygame

    vector = make(env_id, 2, render_mode="human")
    vector.reset(seed=0)
    assert vector.render() is None
    shown = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
    assert np.array_equal(shown, vector.draw(0))
    vector.close()
    assert not pygame.display.get_init()
