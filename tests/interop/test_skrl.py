"""skrl's trainers take the environments: PPO and multi-agent PPO, whose critic sees the state."""

import copy

import gymnasium as gym
import pytest
import torch
from skrl.agents.torch.ppo import PPO
from skrl.envs.wrappers.torch import wrap_env

import envs


def placeholder():
    return copy, gym, pytest, torch, PPO, wrap_env, envs
