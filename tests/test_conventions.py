"""The native environments keep the conventions of Gymnasium and of PettingZoo, by the checks that these come with."""

import copy
import gc
import os
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import DictInfoToList, NormalizeReward, RecordEpisodeStatistics
from pettingzoo.test import parallel_api_test, parallel_seed_test

import envs

ROOT = Path(__file__).resolve().parent.parent
LANDERS = [(env_id, continuous) for env_id in envs.SINGLE_AGENT for continuous in (False, True)]
SWARMS = {"Swarm": dict(n_agents=4), "LidarNavigation": dict(n_agents=3), "VmasNavigation": dict(n_agents=2)}
NATIVE = [*((env_id, dict(continuous=continuous)) for env_id, continuous in LANDERS), *SWARMS.items()]

lander = pytest.mark.parametrize(("env_id", "continuous"), LANDERS)
swarm = pytest.mark.parametrize("env_id", SWARMS)
native = pytest.mark.parametrize(("env_id", "env_kwargs"), NATIVE)


def test_every_native_environment_is_in_these_tests():
    assert {env_id for env_id, _ in NATIVE} == set(envs.NATIVE_ENVS)


def same(a, b):
    return data_equivalence(a, b, exact=True)


@pytest.fixture(autouse=True)
def no_display(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


# ----------------------------------------------------------------------------------------------------------------------
# Gymnasium's Env
# ----------------------------------------------------------------------------------------------------------------------


def make(env_id="LunarLander", **kwargs):
    return gym.make(f"CleanSwarm/{env_id}-v0", **kwargs)


@lander
def test_check_env_passes_without_a_warning(env_id, continuous):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make(env_id, continuous=continuous, render_mode="rgb_array")
        assert env.spec.max_episode_steps is None and isinstance(env.unwrapped, envs.NativeEnv)
        check_env(env.unwrapped)  # makes others from its spec, in all render modes


@lander
@pytest.mark.parametrize("render_mode", [None, "rgb_array"])
def test_an_env_goes_where_a_batch_of_one_goes(env_id, continuous, render_mode):
    kwargs = dict(continuous=continuous, max_steps=90)
    env, vector = make(env_id, render_mode=render_mode, **kwargs), envs.make_vec(env_id, 1, **kwargs)
    observation, info = env.reset(seed=3)
    (expected,), _ = vector.reset(seed=3)
    assert same(observation, expected) and info == {}
    env.action_space.seed(3)
    endings = set()
    for _ in range(600):
        action = env.action_space.sample()
        observation, reward, terminated, truncated, info = env.step(action)
        (expected,), (expected_reward,), (termination,), (truncation,), infos = vector.step(np.array([action]))
        assert (reward, terminated, truncated) == (expected_reward, termination, truncation)
        if terminated or truncated:
            endings.add((terminated, truncated))
            assert same(observation, infos["final_obs"][0])
            assert info == {name: values[0] for name, values in infos["episode"].items() if name not in ("r", "l")}
            if render_mode:
                assert env.render().shape == (400, 600, 3)
            observation, info = env.reset()
        assert same(observation, expected) and info == {}
    assert len(endings) == 2  # by termination and by truncation
    env.close()


def test_a_reset_with_a_seed_or_a_start_leaves_the_next_episode_aside():
    for render_mode in (None, "rgb_array"):
        env = make(render_mode=render_mode, max_steps=1)
        first, _ = env.reset(seed=5)
        env.step(0)
        again, _ = env.reset(seed=5)
        assert same(again, first)
        env.step(0)
        start = {"position": (7.0, 11.0), "angle": 0.2}
        placed, _ = env.reset(options=start)
        vector = envs.make_vec("LunarLander", 1, max_steps=1)
        vector.reset(seed=5)
        vector.step(np.array([0]))
        (expected,), _ = vector.reset(options={"position": [(7.0, 11.0)], "angle": [0.2]})
        assert same(placed, expected) and not same(placed, first)


def test_the_picture_after_the_end_is_the_one_before_the_last_step():
    env = make("DenseLunarLander", render_mode="rgb_array", max_steps=3)
    env.reset(seed=1)
    pictures = []
    for _ in range(3):
        pictures.append(env.render())
        *_, truncated, _ = env.step(2)
    assert truncated
    assert same(env.render(), pictures[-1])
    env.reset()
    assert not same(env.render(), pictures[-1])


def test_human_mode_draws_by_itself(monkeypatch):
    env = make("LunarLander", render_mode="human", max_steps=3)
    shown, show = [], type(env.unwrapped.envs).render
    monkeypatch.setattr(envs.NativeVectorEnv, "render", lambda self: shown.append(show(self)))
    env.reset(seed=1)
    for _ in range(3):
        env.step(0)
    assert shown == [None] * 4 and env.unwrapped.envs.window is not None
    env.close()
    assert env.unwrapped.envs.window is None


def test_what_an_env_refuses():
    with pytest.raises(TypeError, match="^graviti is -9.0: LunarLander has no such argument, but continuous,"):
        make(graviti=-9.0)
    with pytest.raises(ValueError, match="^gravity is 1.0"):
        make(gravity=1.0)
    env = make(max_steps=2).unwrapped
    with pytest.raises(gym.error.ResetNeeded, match="step before reset"):
        env.step(0)
    for arguments, message in (
        (dict(seed=-1), "^seed is -1"),
        (dict(options={"position": [(0.0, 0.0)]}), r"^options\['position'\] has shape \(1, 2\): it must be \(2,\)"),
        (dict(options={"angel": 0.0}), r"^options has \['angel'\]: it may hold \['angle', "),
    ):
        with pytest.raises(ValueError, match=message):
            env.reset(**arguments)
    env.reset()
    with pytest.raises(ValueError, match=r"^actions\[0\] is 4: it must be an integer from 0 to 3"):
        env.step(4)
    env.step(0)
    env.step(0)
    with pytest.raises(gym.error.ResetNeeded, match="step after the end of the episode"):
        env.step(0)
    env.close()
    env.close()


def test_gymnasiums_own_vector_envs_and_wrappers_take_an_env():
    env = gym.wrappers.RecordEpisodeStatistics(make(max_steps=5))
    env.reset(seed=0)
    rewards = 0.0
    for _ in range(5):
        *_, reward, _, truncated, info = env.step(0)
        rewards += reward
    assert truncated and info["episode"]["r"] == rewards and info["episode"]["l"] == 5 and info["success"] == 0.0
    own = gym.make_vec("CleanSwarm/LunarLander-v0", num_envs=2, continuous=True)
    assert isinstance(own, envs.LunarLander) and own.spec.id == "CleanSwarm/LunarLander-v0"
    assert own.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert same(own.reset(seed=4), envs.make_vec("LunarLander", 2, continuous=True).reset(seed=4))
    stock = gym.make_vec("CleanSwarm/LunarLander-v0", num_envs=2, vectorization_mode="sync", max_steps=3)
    observations, _ = stock.reset(seed=4)
    for env, seed in enumerate((4, 5)):
        assert same(observations[env], envs.make_vec("LunarLander", 1).reset(seed=seed)[0][0])
    for _ in range(10):
        observations, *_ = stock.step(np.array([0, 2]))
        assert observations in stock.observation_space


def test_the_id_is_one_for_make_vec_too_and_its_spec_a_file():
    vector = envs.make_vec("CleanSwarm/LunarLander-v0", 2, num_workers=0, max_steps=3)
    vector.reset(seed=0)
    for _ in range(3):
        *_, truncations, infos = vector.step(np.zeros(2, int))
    assert truncations.all() and infos["episode"]["l"].tolist() == [3, 3]
    spec = make(gravity=-5.0).spec
    other = type(spec).from_json(spec.to_json()).make()
    assert other.unwrapped.envs.params.gravity == -5.0


def test_importing_envs_again_is_silent():
    code = (
        "import importlib, warnings, gymnasium, envs; warnings.simplefilter('error'); importlib.reload(envs);"
        "print(isinstance(gymnasium.make('CleanSwarm/LunarLander-v0').unwrapped, envs.NativeEnv))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (output.stdout, output.stderr) == ("True\n", "")


# ----------------------------------------------------------------------------------------------------------------------
# PettingZoo's ParallelEnv
# ----------------------------------------------------------------------------------------------------------------------


@swarm
def test_pettingzoos_tests_pass(env_id, capsys):
    kwargs = SWARMS[env_id] | dict(max_steps=40)
    gc.collect()  # or what other tests left open is warned of here
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parallel_api_test(envs.parallel_env(env_id, **kwargs), num_cycles=60)
        parallel_seed_test(lambda: envs.parallel_env(env_id, **kwargs), num_cycles=60)
    assert [str(warning.message) for warning in caught] == [f"options['options'] is not for {env_id}: ignored"]
    assert "Passed" in capsys.readouterr().out


@swarm
@pytest.mark.parametrize("render_mode", [None, "rgb_array"])
def test_a_parallel_env_goes_where_a_batch_of_one_goes(env_id, render_mode):
    kwargs = SWARMS[env_id] | dict(max_steps=10)
    env, vector = envs.parallel_env(env_id, render_mode, **kwargs), envs.make_vec(env_id, 1, **kwargs)
    agents = [f"agent_{i}" for i in range(kwargs["n_agents"])]
    assert env.possible_agents == agents and str(env) == env_id
    assert env.metadata["render_fps"] == vector.metadata["render_fps"]
    rng = np.random.default_rng(0)
    observations, infos = env.reset(seed=3)
    expected, expected_infos = vector.reset(seed=3)
    no_metrics = dict.fromkeys(vector.stat_names[2:], 0.0)
    for step in range(35):
        for i, agent in enumerate(agents):
            assert same(observations[agent], expected[0, i])
            assert observations[agent] in env.observation_space(agent)
            assert same(infos[agent], no_metrics | {name: expected_infos[name][0, i] for name in vector.info_names})
        actions = rng.uniform(-1.0, 1.0, vector.action_space.shape).astype(np.float32)
        by_agent = dict(zip(agents, actions[0], strict=True))
        assert all(action in env.action_space(agent) for agent, action in by_agent.items())
        observations, rewards, terminations, truncations, infos = env.step(by_agent)
        expected, expected_rewards, _, ends, expected_infos = vector.step(actions)
        assert rewards == dict(zip(agents, expected_rewards[0], strict=True))
        assert terminations == dict.fromkeys(agents, False) and truncations == dict.fromkeys(agents, bool(ends[0]))
        assert ends[0] == (step % 10 == 9) and env.agents == ([] if ends[0] else agents)
        if ends[0]:
            metrics = {name: values[0] for name, values in expected_infos["episode"].items() if name not in ("r", "l")}
            for i, agent in enumerate(agents):
                final = {name: expected_infos["final_info"][name][0, i] for name in vector.info_names}
                assert same(observations[agent], expected_infos["final_obs"][0, i])
                assert infos[agent].keys() == metrics.keys() | final.keys()
                assert all(infos[agent][name] == value for name, value in metrics.items())
                assert all(same(infos[agent][name], value) for name, value in final.items())
            if render_mode:
                assert env.render().dtype == np.uint8
            observations, infos = env.reset()
    env.close()


def test_all_agents_of_a_parallel_env_terminate_together():
    env = envs.parallel_env("VmasNavigation", n_agents=2)
    env.reset(seed=0, options={"agent_pos": [[0, 0], [1, 1]], "goal_pos": [[0.05, 0], [1, 0.95]]})
    _, _, terminations, truncations, infos = env.step({agent: np.zeros(2, np.float32) for agent in env.agents})
    assert terminations == {"agent_0": True, "agent_1": True} and not any(truncations.values())
    assert env.agents == [] and infos["agent_1"]["arrived"] == 1


def test_a_start_is_given_as_for_one_environment():
    env = envs.parallel_env("VmasNavigation", n_agents=2)
    position = np.array([[0.5, 0.25], [-0.5, 0.0]])
    observations, _ = env.reset(seed=0, options={"agent_pos": position})
    assert np.array_equal(np.stack([observations[agent][:2] for agent in env.agents]), position)


def test_a_copy_of_a_parallel_env_goes_its_own_way():
    env = envs.parallel_env("Swarm", n_agents=2)
    env.reset(seed=0)
    other = copy.deepcopy(env)
    actions = dict.fromkeys(env.agents, np.float32([0.5, -0.5]))
    first = env.step(actions)
    assert same(other.step(actions), first)


def test_what_a_parallel_env_refuses(monkeypatch):
    for env_id in ("LunarLander", "CartPole-v1", "swarm", None):
        message = r"^env_id is .*: it must be one of \['LidarNavigation', 'Swarm', 'VmasNavigation'\]$"
        with pytest.raises(ValueError, match=message):
            envs.parallel_env(env_id)
    with pytest.raises(ValueError, match="^n_agents is 0"):
        envs.parallel_env("Swarm", n_agents=0)
    env = envs.parallel_env("Swarm", n_agents=2, max_steps=1)
    actions = dict.fromkeys(env.possible_agents, np.float32([0.0, 0.0]))
    with pytest.raises(gym.error.ResetNeeded, match="step before reset"):
        env.step(actions)
    env.reset()
    with pytest.raises(ValueError, match=r"^actions are for \['agent_0'\]: they must be for \['agent_0', 'agent_1'\]"):
        env.step({"agent_0": np.float32([0.0, 0.0])})
    with pytest.raises(ValueError, match="^actions holds NaN"):
        env.step(actions | {"agent_1": np.float32([np.nan, 0.0])})
    env.step(actions)
    with pytest.raises(gym.error.ResetNeeded, match="step after the end of the episode"):
        env.step(actions)
    monkeypatch.setitem(sys.modules, "pettingzoo", None)
    with pytest.raises(ImportError, match="pip install pettingzoo"):
        envs.parallel_env("Swarm")


# ----------------------------------------------------------------------------------------------------------------------
# Gymnasium's VectorEnv
# ----------------------------------------------------------------------------------------------------------------------


def rollout(vector, seed, steps=150):
    """What `reset` returned, and what every `step` did, with the same actions for every seed."""
    start = vector.reset(seed=seed)
    vector.action_space.seed(0)
    return start, [vector.step(vector.action_space.sample()) for _ in range(steps)]


def ended(results):
    """Of every step, what it returned about the episodes that ended in it."""
    infos = [infos for *_, infos in results if "episode" in infos]
    stats = [{name: values[info["_episode"]] for name, values in info["episode"].items()} for info in infos]
    return stats, [info["final_obs"][info["_final_obs"]] for info in infos]


@native
@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_gymnasium_expects_of_a_vector_env(env_id, env_kwargs, num_workers):
    vector = envs.make_vec(env_id, 3, num_workers, **env_kwargs, max_steps=100)
    assert isinstance(vector, gym.vector.VectorEnv) and vector.num_envs == 3
    assert vector.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    single, batched = vector.single_observation_space, vector.observation_space
    assert batched == gym.vector.utils.batch_space(single, 3)
    assert vector.action_space == gym.vector.utils.batch_space(vector.single_action_space, 3)
    assert single.dtype == batched.dtype == np.float32
    (first, infos), results = rollout(vector, 7)
    assert first.dtype == np.float32 and first in batched and infos.keys() == set(vector.info_names)
    n_ended = 0
    for observations, rewards, terminations, truncations, infos in results:
        assert type(observations) is np.ndarray and observations.dtype == np.float32 and observations in batched
        assert rewards.dtype == np.float32 and rewards.shape == (3, *single.shape[:-1])
        assert terminations.dtype == truncations.dtype == bool
        assert terminations.shape == truncations.shape == (3,)
        done = terminations | truncations
        n_ended += done.sum()
        assert ("final_obs" in infos) == ("final_info" in infos) == ("episode" in infos) == done.any()
        if done.any():
            assert all(np.array_equal(infos[name], done) for name in ("_final_obs", "_final_info", "_episode"))
            assert infos["final_obs"].dtype == np.float32 and infos["final_obs"].shape == batched.shape
            assert all(observation in single for observation in infos["final_obs"][done])
            assert all(values.shape == (3,) for values in infos["episode"].values())
    assert n_ended >= 3
    (again, _), repeated = rollout(vector, 7)
    assert same(again, first) and same([result[:4] for result in repeated], [result[:4] for result in results])
    assert same(ended(repeated), ended(results))
    assert not same(vector.reset(seed=8)[0], first)
    with pytest.raises(ValueError, match=r"^seed is \[1, 2\]"):
        vector.reset(seed=[1, 2])
    vector.close()
    vector.close()
    with pytest.raises(gym.error.ClosedEnvironmentError):
        vector.step(vector.action_space.sample())


@lander
def test_gymnasiums_vector_wrappers_take_a_batch(env_id, continuous):
    vector = envs.make_vec(env_id, 3, num_workers=0, continuous=continuous, max_steps=80)
    # "episode" is taken: the environment fills it in itself, by the same rules.
    wrapped = RecordEpisodeStatistics(vector, stats_key="counted")
    wrapped = DictInfoToList(NormalizeReward(wrapped))  # those of observations refuse any autoreset in the same step
    wrapped.reset(seed=0)
    n_ended = 0
    for _ in range(200):
        observations, rewards, terminations, truncations, infos = wrapped.step(wrapped.action_space.sample())
        assert observations.shape == (3, 8) and rewards.shape == (3,)
        for info, done in zip(infos, terminations | truncations, strict=True):
            assert ("episode" in info) == ("counted" in info) == done
            if done:
                n_ended += 1
                assert info["counted"]["l"] == info["episode"]["l"]
                assert info["counted"]["r"] == pytest.approx(info["episode"]["r"], rel=1e-4, abs=1e-3)
    assert n_ended >= 6


@pytest.mark.parametrize("num_workers", (0, 2))
@pytest.mark.parametrize("env_id", (*envs.NATIVE_ENVS, "CartPole-v1"))
def test_with_a_list_of_seeds_each_environment_goes_as_it_would_alone(env_id, num_workers):
    seeds = [7, 7, 2**31]
    together = envs.make_vec(env_id, 3, num_workers)
    together.action_space.seed(0)
    starts, _ = together.reset(seed=seeds)
    actions = [together.action_space.sample() for _ in range(200)]
    steps = [together.step(action) for action in actions]
    for env, seed in enumerate(seeds):
        alone = envs.make_vec(env_id, 1, 0)
        if env_id in envs.NATIVE_ENVS:
            assert same(alone.reset(seed=seed)[0][0], starts[env])
        assert same(alone.reset(seed=[seed])[0][0], starts[env])
        for action, (observations, rewards, terminations, truncations, _) in zip(actions, steps, strict=True):
            expected = alone.step(action[env : env + 1])
            assert same(expected[0][0], observations[env]) and same(expected[1][0], rewards[env])
            assert (expected[2][0], expected[3][0]) == (terminations[env], truncations[env])
    together.close()
    with pytest.raises(ValueError, match="needs one seed"):
        envs.make_vec(env_id, 3, 0).reset(seed=seeds, options={"identical": True})
