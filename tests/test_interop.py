"""Other libraries take the environments: copies, autoreset, PettingZoo, SuperSuit, Stable-Baselines3, ids."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import supersuit
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import (
    ClipAction,
    DictInfoToList,
    NormalizeObservation,
    NormalizeReward,
    RecordEpisodeStatistics,
    RescaleAction,
)
from pettingzoo.test.state_test import test_parallel_env as check_parallel_state
from pettingzoo.test.state_test import test_state as check_state
from pettingzoo.test.state_test import test_state_space as check_state_space
from pettingzoo.utils.conversions import parallel_to_aec
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

import envs

ROOT = Path(__file__).resolve().parent.parent
SWARMS = {"Swarm": dict(n_agents=4), "LidarNavigation": dict(n_agents=3), "VmasNavigation": dict(n_agents=2)}
LANDERS = {env_id: {} for env_id in envs.SINGLE_AGENT}
NEXT_STEP = AutoresetMode.NEXT_STEP
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda env: pickle.loads(pickle.dumps(env))}

native = pytest.mark.parametrize(("env_id", "env_kwargs"), [*SWARMS.items(), *LANDERS.items()])
swarm = pytest.mark.parametrize("env_id", SWARMS)
copied = pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
workers = pytest.mark.parametrize("num_workers", [0, 2])


def same(a, b):
    return data_equivalence(a, b, exact=True)


@pytest.fixture(autouse=True)
def no_display(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


def act(vector, observations):
    """Actions that depend on the observations alone, so that the same episodes follow in both modes."""
    if isinstance(vector.single_action_space, gym.spaces.Discrete):
        return (np.abs(observations).sum(axis=-1) * 1000).astype(np.int64) % vector.single_action_space.n
    size = vector.action_space.shape[-1]
    return np.sin(7.0 * observations[..., :size]).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Copies
# ----------------------------------------------------------------------------------------------------------------------


def assert_alike(a, b, steps=40):
    """Two batches go the same way from here, from a seed and from a state, and neither moves the other."""
    for seed in (None, 3):
        if seed is not None:
            assert same(a.reset(seed=seed), b.reset(seed=seed))
        for _ in range(steps):
            actions = a.action_space.sample()
            assert same(a.step(actions), b.step(actions))
        assert same(a.get_state(), b.get_state())
    state = a.get_state()
    a.step(actions)
    assert same(b.get_state(), state)
    assert same(b.set_state(a.get_state()), a.set_state(a.get_state()))
    assert same(a.step(actions), b.step(actions))


@native
@copied
def test_a_copy_of_a_batch_is_whole_and_its_own(env_id, env_kwargs, make_copy):
    for mode in (AutoresetMode.SAME_STEP, NEXT_STEP):
        vector = envs.make_vec(env_id, 3, 0, autoreset_mode=mode, max_steps=30, **env_kwargs)
        vector.reset(seed=1)
        for _ in range(7):
            vector.step(vector.action_space.sample())
        twice = make_copy(make_copy(vector))
        assert twice.autoreset_mode is mode
        assert_alike(vector, twice)


@copied
@pytest.mark.parametrize("name", ["LunarLander", "LunarLanderContinuous", "SparseLunarLander"])
def test_a_copy_of_an_env_is_whole_and_its_own(name, make_copy):
    env = gym.make(f"CleanSwarm/{name}-v0", max_steps=20)
    env.reset(seed=1)
    for _ in range(20):  # to the end: the start of the next episode comes along
        env.step(env.action_space.sample())
    other = make_copy(env)
    for seed in (None, 5, None):
        assert same(env.reset(seed=seed), other.reset(seed=seed))
        for _ in range(20):
            action = env.action_space.sample()
            assert same(env.step(action), other.step(action))


@swarm
@copied
def test_a_copy_of_a_parallel_env_is_whole_and_its_own(env_id, make_copy):
    env = envs.parallel_env(env_id, **SWARMS[env_id], max_steps=20)
    env.reset(seed=1)
    other = make_copy(env)
    assert str(other) == env_id and other.possible_agents == env.possible_agents
    for seed in (None, 5, None):
        while env.agents:
            actions = {agent: env.action_space(agent).sample() for agent in env.agents}
            assert same(env.step(actions), other.step(actions))
            assert same(env.state(), other.state())
        assert same(env.reset(seed=seed), other.reset(seed=seed))
    env.step(actions)
    assert not same(env.state(), other.state())


def test_a_copy_opens_a_window_of_its_own():
    env = gym.make("CleanSwarm/LunarLander-v0", render_mode="human")
    env.reset(seed=0)
    assert env.unwrapped.envs.window is not None
    for make_copy in COPIES.values():
        other = make_copy(env)
        assert other.unwrapped.envs.window is None
        other.step(0)
        other.close()


def test_a_pool_says_that_it_cannot_be_copied():
    vector = envs.make_vec("LunarLander", 2, 2)
    for make_copy in COPIES.values():
        with pytest.raises(TypeError, match="run in processes and cannot be copied: make them with num_workers=0"):
            make_copy(vector)
    vector.reset(seed=0)  # and goes on
    vector.step(np.zeros(2, int))
    vector.close()


# ----------------------------------------------------------------------------------------------------------------------
# Autoreset
# ----------------------------------------------------------------------------------------------------------------------


def stagger(vector, env_id):
    """A start from which the environments do not end together."""
    observations, _ = vector.reset(seed=4)
    if env_id in envs.NATIVE_ENVS:
        state = vector.get_state()
        state["elapsed"] += 3 * np.arange(vector.num_envs)
        observations, _ = vector.set_state(state)
    return observations


def transitions(vector, env_id, steps):
    """Of each environment, (observation, action, reward, termination, truncation, next observation, stats) in turn."""
    observations = stagger(vector, env_id)
    found = [[] for _ in range(vector.num_envs)]
    ended = np.zeros(vector.num_envs, bool)
    for _ in range(steps):
        actions = act(vector, observations)
        following, rewards, terminations, truncations, infos = vector.step(actions)
        assert observations.flags.owndata and not np.may_share_memory(following, vector.buffers["observations"])
        done = terminations | truncations
        assert ("episode" in infos) == done.any()
        assert ("final_obs" in infos) == ("final_info" in infos) == (done.any() and vector.autoreset_mode != NEXT_STEP)
        final, final_infos = infos.get("final_obs", following), infos.get("final_info", infos)
        for env in range(vector.num_envs):
            if ended[env]:
                assert not rewards[env].any() and not done[env]
                continue
            last, last_infos = (final, final_infos) if done[env] else (following, infos)
            stats = {name: values[env] for name, values in infos["episode"].items()} if done[env] else None
            own_infos = {name: last_infos[name][env] for name in vector.info_names}
            flags = (terminations[env], truncations[env])
            found[env].append((observations[env], actions[env], rewards[env], *flags, last[env], own_infos, stats))
        if vector.autoreset_mode is NEXT_STEP:
            ended = done
        observations = following
    return found


@pytest.mark.parametrize(
    ("env_id", "env_kwargs"),
    [
        *((env_id, env_kwargs | dict(max_steps=11)) for env_id, env_kwargs in SWARMS.items()),
        ("Swarm", dict(n_agents=2, max_steps=1)),
        *((env_id, dict(max_steps=80)) for env_id in LANDERS),
        ("LunarLander", dict(continuous=True, enable_wind=True, max_steps=60)),
        ("CartPole-v1", {}),
        ("CartPole-v1", dict(max_episode_steps=1)),
    ],
)
@workers
def test_the_episodes_are_the_same_in_both_modes(env_id, env_kwargs, num_workers):
    vectors = [
        envs.make_vec(env_id, 4, num_workers, autoreset_mode=mode, **env_kwargs) for mode in ("SameStep", NEXT_STEP)
    ]
    expected, found = (transitions(vector, env_id, 200) for vector in vectors)
    for a, b in zip(expected, found, strict=True):
        episodes = sum(terminated or truncated for _, _, _, terminated, truncated, *_ in b)
        assert len(b) + episodes - len(a) in (0, 1)  # each reset took a step; one may be due
        assert episodes >= 2
        assert same(tuple(a[: len(b)]), tuple(b))
    for vector in vectors:
        vector.close()


@workers
@pytest.mark.parametrize("env_id", [*envs.NATIVE_ENVS])
def test_a_state_of_next_step_knows_who_stands_still(env_id, num_workers):
    vector = envs.make_vec(env_id, 3, num_workers, autoreset_mode="NextStep", max_steps=9)
    other = envs.make_vec(env_id, 3, 0, autoreset_mode="NextStep", max_steps=9)
    stagger(vector, env_id)
    stood = 0
    for _ in range(25):
        state = vector.get_state()
        stood += state["ended"].sum()
        other.set_state(state)
        actions = vector.action_space.sample()
        assert same(vector.step(actions), other.step(actions))
    assert stood >= 6
    assert not vector.get_state()["ended"].all()
    vector.reset()
    assert not vector.get_state()["ended"].any()
    vector.close()


@workers
def test_gymnasiums_environments_go_as_behind_its_own_vector_env(num_workers):
    ours = envs.make_vec("CartPole-v1", 3, num_workers, autoreset_mode=NEXT_STEP)
    theirs = gym.make_vec("CartPole-v1", num_envs=3, vectorization_mode="sync")
    assert same(ours.reset(seed=[1, 2, 3])[0], theirs.reset(seed=[1, 2, 3])[0])
    for _ in range(150):
        actions = ours.action_space.sample()
        for a, b in zip(ours.step(actions)[:4], theirs.step(actions)[:4], strict=True):
            assert np.array_equal(a, b)
    ours.close()


@pytest.mark.parametrize("name", [*envs.SINGLE_AGENT, "LunarLanderContinuous"])
def test_a_registered_batch_goes_as_gymnasiums_own_of_the_id(name):
    ours = gym.make_vec(f"CleanSwarm/{name}-v0", num_envs=3, max_steps=70)
    theirs = gym.make_vec(f"CleanSwarm/{name}-v0", num_envs=3, max_steps=70, vectorization_mode="sync")
    assert isinstance(ours, envs.LunarLander) and ours.single_action_space == theirs.single_action_space
    assert ours.metadata["autoreset_mode"] is ours.autoreset_mode is theirs.metadata["autoreset_mode"] is NEXT_STEP
    assert same(ours.reset(seed=[1, 2, 3]), theirs.reset(seed=[1, 2, 3]))
    ended = 0
    for _ in range(200):
        actions = ours.action_space.sample()
        *a, infos = ours.step(actions)
        *b, expected = theirs.step(actions)
        assert all(np.array_equal(x, y) for x, y in zip(a[:1] + a[2:], b[:1] + b[2:], strict=True))
        assert np.array_equal(a[1], b[1].astype(np.float32))
        assert infos.keys() == expected.keys()
        for name, values in expected.items():
            mask = expected[name if name.startswith("_") else "_" + name]
            ended += mask.sum()
            assert np.array_equal(infos[name][mask], values[mask])
    assert ended > 0


@workers
def test_gymnasiums_vector_wrappers_fit(num_workers):
    for make in (
        lambda: gym.make_vec("CleanSwarm/LunarLanderContinuous-v0", num_envs=3, num_workers=num_workers),
        lambda: envs.make_vec("LunarLander", 3, num_workers, None, NEXT_STEP, False, continuous=True),
        lambda: envs.make_vec("MountainCarContinuous-v0", 3, num_workers, None, NEXT_STEP, False, max_episode_steps=50),
    ):
        vector = make()
        wrapped = RecordEpisodeStatistics(ClipAction(RescaleAction(vector, -2.0, 2.0)))
        wrapped = DictInfoToList(NormalizeReward(NormalizeObservation(wrapped)))
        wrapped.reset(seed=0)
        lengths, running = [], np.zeros(3, int)
        ended = np.zeros(3, bool)
        for _ in range(250):
            observations, _, terminations, truncations, infos = wrapped.step(wrapped.action_space.sample())
            assert np.isfinite(observations).all()
            running = np.where(ended, 0, running + 1)
            ended = terminations | truncations
            for env in np.flatnonzero(ended):
                assert infos[env]["episode"]["l"] == running[env]
                lengths.append(running[env])
        assert len(lengths) >= 3
        wrapped.close()


def test_episode_info_can_be_left_out_in_either_mode():
    for mode in (AutoresetMode.SAME_STEP, NEXT_STEP):
        vector = envs.make_vec("LunarLander", 2, 0, autoreset_mode=mode, episode_info=False, max_steps=1)
        vector.reset(seed=0)
        infos = RecordEpisodeStatistics(vector).step(np.zeros(2, int))[-1]
        assert infos["episode"].keys() == {"r", "l", "t"} and infos["_success"].all() and infos["success"].shape == (2,)


def test_modes_that_are_refused():
    for mode in ("Disabled", AutoresetMode.DISABLED, "next", None, 1):
        with pytest.raises(ValueError, match=r"^autoreset_mode is .*: it must be AutoresetMode.SAME_STEP or NEXT_STEP"):
            envs.make_vec("LunarLander", 2, autoreset_mode=mode)
    assert envs.make_vec("LunarLander", 2, 0).autoreset_mode is AutoresetMode.SAME_STEP
    pool = envs.make_vec("Swarm", 2, 2, autoreset_mode="NextStep")
    assert pool.autoreset_mode is pool.metadata["autoreset_mode"] is NEXT_STEP
    assert pool.reward_space.shape == (2, 10)  # TorchRL asks for it
    pool.close()


# ----------------------------------------------------------------------------------------------------------------------
# PettingZoo and SuperSuit
# ----------------------------------------------------------------------------------------------------------------------


@swarm
@pytest.mark.filterwarnings("ignore:Environment's m")  # velocities have no bounds in VmasNavigation
@pytest.mark.filterwarnings("ignore:The base environment")
def test_pettingzoos_state_test_passes(env_id):
    kwargs = SWARMS[env_id] | dict(max_steps=20)
    check_state_space(envs.parallel_env(env_id, **kwargs))
    check_parallel_state(envs.parallel_env(env_id, **kwargs))
    check_state(parallel_to_aec(envs.parallel_env(env_id, **kwargs)), 15)


@swarm
def test_infos_have_the_same_names_and_kinds_in_every_step(env_id):
    env = envs.parallel_env(env_id, **SWARMS[env_id], max_steps=3)
    _, infos = env.reset(seed=0)
    kinds = {name: type(value) for name, value in infos["agent_0"].items()}
    metrics = set(kinds) - {"neighbors", "unseen"}
    assert metrics and all(kinds[name] is float for name in metrics)
    assert not any(infos["agent_1"][name] for name in metrics)
    while env.agents:
        _, rewards, *_, infos = env.step({agent: env.action_space(agent).sample() for agent in env.agents})
        assert all(type(reward) is float for reward in rewards.values())
        for info in infos.values():
            assert {name: type(value) for name, value in info.items()} == kinds
    assert any(infos["agent_1"][name] for name in metrics)


def test_the_state_is_all_observations():
    env = envs.parallel_env("Swarm", n_agents=3, max_steps=2)
    with pytest.raises(gym.error.ResetNeeded, match="state before reset"):
        env.state()
    observations, _ = env.reset(seed=0)
    while True:
        state = env.state()
        assert same(state, np.concatenate(list(observations.values()))) and state in env.state_space
        state[:] = 0.0
        observations["agent_0"][:] = 0.0
        assert env.state().any()
        if not env.agents:
            break
        observations, *_ = env.step(dict.fromkeys(env.agents, [0.1, 0.0]))


def test_after_the_end_nobody_acts():
    env = envs.parallel_env("Swarm", n_agents=2, max_steps=1)
    with pytest.raises(gym.error.ResetNeeded, match="step before reset"):
        env.step({})
    env.reset(seed=0)
    env.step(dict.fromkeys(env.agents, [0.1, 0.0]))
    assert env.step({}) == ({}, {}, {}, {}, {})
    with pytest.raises(gym.error.ResetNeeded, match="step after the end"):
        env.step(dict.fromkeys(env.possible_agents, [0.1, 0.0]))
    env.reset()
    with pytest.raises(ValueError, match="^actions are for"):
        env.step({})


def test_actions_of_any_shape_of_the_right_size():
    env = envs.parallel_env("Swarm", n_agents=2, steering="turn")
    results = []
    for action in (0.5, np.float64(0.5), [0.5], np.float32([0.5]), np.array([[0.5]]), np.array(0.5)):
        env.reset(seed=0)
        results.append(env.step(dict.fromkeys(env.agents, action)))
    assert all(same(result, results[0]) for result in results)
    env = envs.parallel_env("VmasNavigation", n_agents=2)
    for action in ([[0.5, -0.5]], np.array([[0.5], [-0.5]])):
        env.reset(seed=0)
        env.step(dict.fromkeys(env.agents, action))
    for action in (0.5, [0.5], [0.5] * 3, "left", None):
        with pytest.raises(ValueError, match="^actions"):
            env.step(dict.fromkeys(env.agents, action))


@swarm
def test_supersuit_steps_many_of_a_parallel_env(env_id):
    env = envs.parallel_env(env_id, **SWARMS[env_id], max_steps=10)
    n_agents = len(env.possible_agents)
    vector = supersuit.concat_vec_envs_v1(supersuit.pettingzoo_env_to_vec_env_v1(env), 2, num_cpus=0)
    observations, _ = vector.reset(seed=3)
    assert observations.shape == (2 * n_agents, *env.observation_space("agent_0").shape)
    assert not same(observations[:n_agents], observations[n_agents:])
    ended = 0
    for _ in range(25):
        actions = np.stack([vector.action_space.sample() for _ in range(2 * n_agents)])
        observations, _, terminations, truncations, _ = vector.step(actions)
        ended += truncations.astype(bool).sum()
    assert ended == 2 * 2 * n_agents and not terminations.any()


def test_stable_baselines3_learns_a_swarm_through_supersuit():
    vector = supersuit.pettingzoo_env_to_vec_env_v1(envs.parallel_env("Swarm", n_agents=3, max_steps=20))
    vector = supersuit.concat_vec_envs_v1(vector, 2, num_cpus=0, base_class="stable_baselines3")
    model = stable_baselines3.PPO("MlpPolicy", vector, n_steps=32, batch_size=64, device="cpu")
    model.learn(2 * 3 * 32)


def test_supersuits_copies_of_an_env_differ():
    vector = supersuit.gym_vec_env_v0(gym.make("CleanSwarm/LunarLander-v0"), 3, multiprocessing=False)
    observations, _ = vector.reset(seed=3)
    alone = envs.make_vec("LunarLander", 1, 0)
    for env in range(3):
        assert same(observations[env], alone.reset(seed=3 + env)[0][0])


# ----------------------------------------------------------------------------------------------------------------------
# Stable-Baselines3
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*envs.SINGLE_AGENT, "LunarLanderContinuous"])
def test_stable_baselines3_learns_on_the_ids(name):
    check_env(gym.make(f"CleanSwarm/{name}-v0").unwrapped, warn=True, skip_render_check=True)
    model = stable_baselines3.PPO("MlpPolicy", f"CleanSwarm/{name}-v0", n_steps=64, batch_size=64, device="cpu")
    model.learn(64)


def test_stable_baselines3_forks_them():
    makers = [lambda: gym.make("CleanSwarm/LunarLander-v0", max_steps=5)] * 2
    forked, here = SubprocVecEnv(makers, start_method="fork"), DummyVecEnv(makers)
    for vector in (forked, here):
        vector.seed(3)
    assert same(forked.reset(), here.reset())
    for _ in range(7):
        a, b = forked.step(np.array([0, 2])), here.step(np.array([0, 2]))
        assert same(a[0], b[0]) and same(a[1].astype(np.float32), b[1]) and same(a[2], b[2])
    forked.close()


# ----------------------------------------------------------------------------------------------------------------------
# Ids
# ----------------------------------------------------------------------------------------------------------------------

IDS = [f"CleanSwarm/{name}-v0" for name in (*envs.SINGLE_AGENT, "LunarLanderContinuous")]


@pytest.mark.parametrize("id", IDS)
def test_an_id_says_what_it_is_and_can_be_cut_short(id):
    assert gym.spec(id).reward_threshold == 200.0
    continuous = "Continuous" in id
    env = gym.make(id, max_episode_steps=3)
    vector = gym.make_vec(id, num_envs=2, max_episode_steps=3)
    one = gym.make_vec(id)
    assert isinstance(env.action_space, gym.spaces.Box) is continuous and one.num_envs == 1
    again = gym.make_vec(vector.spec)
    assert again.num_envs == 2 and type(again) is type(vector)
    for batch in (vector, again):
        env.reset(seed=0)
        batch.reset(seed=0)
        for step in range(3):
            *_, truncated, _ = env.step(env.action_space.sample())
            *_, truncations, _ = batch.step(batch.action_space.sample())
            assert truncated == truncations.all() == truncations.any() == (step == 2)
    both = gym.make_vec(id, max_steps=2, max_episode_steps=3)
    both.reset()
    both.step(both.action_space.sample())
    *_, truncations, _ = both.step(both.action_space.sample())
    assert truncations.all()


def test_an_unknown_argument_is_a_type_error_in_pythons_words():
    for make in (
        lambda: envs.make_vec("LunarLander", 2, frameskip=4),
        lambda: gym.make("CleanSwarm/LunarLander-v0", frameskip=4),
        lambda: gym.make_vec("CleanSwarm/LunarLander-v0", num_envs=2, frameskip=4),
        lambda: envs.parallel_env("Swarm", frameskip=4),
    ):
        with pytest.raises(
            TypeError, match=r"^frameskip is 4: .* has no such argument, but .*keyword argument 'frames"
        ):
            make()
    for name in ("autoreset_mode", "num_workers"):
        with pytest.raises(TypeError, match=name):
            gym.make("CleanSwarm/LunarLander-v0", **{name: "NextStep"})


def test_module_and_id_need_no_import_and_the_file_may_have_another_name(tmp_path):
    (tmp_path / "renamed.py").write_bytes((ROOT / "envs.py").read_bytes())
    code = (
        "import gymnasium as gym\n"
        "env = gym.make('renamed:CleanSwarm/LunarLander-v0')\n"
        "vector = gym.make_vec('renamed:CleanSwarm/LunarLanderContinuous-v0', num_envs=2)\n"
        "print(type(env.unwrapped).__module__, type(vector).__module__, vector.num_envs)\n"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert output.stdout == "renamed renamed 2\n"
