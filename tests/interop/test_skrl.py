"""skrl's trainers take the environments: PPO, and MAPPO, whose critic sees PettingZoo's state."""

import gymnasium as gym
import pytest
from skrl.envs.wrappers.torch import wrap_env
from skrl.utils.runner.torch import Runner

import envs


def learn(client, agent, policy, value_input, timesteps=70):
    network = [{"name": "net", "input": "OBSERVATIONS", "layers": [16], "activations": "tanh"}]
    critic = [network[0] | {"input": value_input}]
    # skrl 2.1.1 takes no empty kwargs for several agents, not even its own defaults.
    kwargs = {"learning_rate_scheduler": "KLAdaptiveLR", "learning_rate_scheduler_kwargs": {"kl_threshold": 0.01}}
    for name in ("observation", "state", "value"):
        kwargs[f"{name}_preprocessor"] = "RunningStandardScaler"
        kwargs[f"{name}_preprocessor_kwargs"] = {"epsilon": 1e-8}
    config = {
        "seed": 1,
        "models": {
            "separate": True,
            "policy": {"class": policy, "network": network, "output": "ACTIONS"},
            "value": {"class": "DeterministicMixin", "network": critic, "output": "ONE"},
        },
        "memory": {"class": "RandomMemory", "memory_size": -1},
        "agent": {
            "class": agent,
            "rollouts": 32,
            "mini_batches": 2,
            "learning_epochs": 1,
            "experiment": {"write_interval": 0, "checkpoint_interval": 0},
            **(kwargs if agent == "MAPPO" else {}),
        },
        "trainer": {
            "class": "SequentialTrainer",
            "timesteps": timesteps,
            "disable_progressbar": True,
            "close_environment_at_exit": False,
            "headless": isinstance(client.unwrapped, gym.vector.VectorEnv),  # it would call a method of SyncVectorEnv
        },
    }
    runner = Runner(client, config)
    runner.run("train")


@pytest.mark.parametrize("env_id", ["Swarm", "LidarNavigation", "VmasNavigation"])
def test_mappo_learns_on_a_parallel_env(env_id):
    env = envs.parallel_env(env_id, n_agents=2, max_steps=20)
    learn(wrap_env(env, wrapper="pettingzoo"), "MAPPO", "GaussianMixin", "STATES")


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize(
    ("name", "policy"), [("LunarLander", "CategoricalMixin"), ("LunarLanderContinuous", "GaussianMixin")]
)
def test_ppo_learns_on_an_id(name, policy, vectorized):
    make = gym.make_vec if vectorized else gym.make
    env = make(f"CleanSwarm/{name}-v0", **({"num_envs": 3} if vectorized else {}), max_steps=20)
    learn(wrap_env(env, wrapper="gymnasium"), "PPO", policy, "OBSERVATIONS")
