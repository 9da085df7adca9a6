"""TorchRL, and with it BenchMARL, takes the environments."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from torchrl.envs import GymEnv, GymWrapper, PettingZooWrapper, check_env_specs

import envs

pytestmark = [pytest.mark.filterwarnings("ignore:PettingZoo in TorchRL"), pytest.mark.filterwarnings("ignore:The info")]


@pytest.mark.parametrize("env_id", ["Swarm", "LidarNavigation", "VmasNavigation"])
def test_a_parallel_env_over_several_episodes(env_id):
    client = PettingZooWrapper(envs.parallel_env(env_id, n_agents=3, max_steps=20), return_state=True)
    check_env_specs(client)
    rollout = client.rollout(50, break_when_any_done=False)
    done = rollout["next", "agent", "done"].squeeze(-1)
    assert rollout.batch_size == (50,) and done.any(dim=1).sum() >= 2
    assert torch.equal(rollout["state"], rollout["agent", "observation"].flatten(1))
    name = {"Swarm": "polar_order", "LidarNavigation": "path_efficiency", "VmasNavigation": "reward_progress"}[env_id]
    metric = rollout["next", "agent", "info", name]
    assert not metric[~done].any()
    assert metric[done].any() or name == "path_efficiency"  # of no goals reached it is 0


@pytest.mark.parametrize("name", ["LunarLander", "LunarLanderContinuous", "DenseLunarLander", "SparseLunarLander"])
def test_an_id(name):
    for prefix in ("", "envs:"):
        client = GymEnv(f"{prefix}CleanSwarm/{name}-v0", max_steps=20, frame_skip=2)
        check_env_specs(client)
        assert client.rollout(50, break_when_any_done=False).batch_size == (50,)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("env_id", [*envs.NATIVE_ENVS, "CartPole-v1"])
def test_a_batch_with_its_final_observations(env_id, num_workers):
    kwargs = dict(max_episode_steps=9) if env_id == "CartPole-v1" else dict(max_steps=9)
    vector = envs.make_vec(env_id, 3, num_workers, **kwargs)
    steps = []
    step = vector.step

    def remember(actions):
        steps.append(step(actions))
        return steps[-1]

    vector.step = remember
    client = GymWrapper(vector)
    steps.clear()
    rollout = client.rollout(30, break_when_any_done=False)
    assert rollout["next", "done"].any(dim=1).sum() >= 3
    for at, (observations, rewards, terminations, truncations, infos) in enumerate(steps[-30:]):
        done = terminations | truncations
        expected = observations.copy()
        if done.any():
            expected[done] = infos["final_obs"][done]
        assert np.array_equal(rollout["next", "observation"][:, at].numpy(), expected)
        assert np.array_equal(rollout["next", "reward"][:, at].numpy().reshape(rewards.shape), rewards)
        assert np.array_equal(rollout["next", "done"][:, at, 0].numpy(), done)
    vector.close()


def test_what_torchrl_does_not_take_it_says():
    with pytest.raises(RuntimeError, match="auto-reset mode must be one of SAME_STEP"):
        GymWrapper(gym.make_vec("CleanSwarm/LunarLander-v0", num_envs=2))
