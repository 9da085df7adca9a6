"""ppo_swarm.py keeps its promises: the mathematics, the networks, and whole runs as a user starts them.

How runs are started and read is in running.py.
"""

import dataclasses
import errno
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from running import (
    BRIEF,
    ENVIRONMENT,
    FEATURES,
    HIGH,
    LOW,
    N_AGENTS,
    NUM_STEPS,
    NUM_UPDATES,
    OWN,
    PER_UPDATE,
    POLICIES,
    RANKS,
    RATIOS,
    SCRIPT,
    SMALL,
    Spaces,
    assert_other_weights,
    assert_same_curves,
    assert_same_weights,
    contents,
    copy_alone,
    crowd,
    curves,
    entropy_by_integration,
    error_of,
    flags,
    folders,
    launch,
    nursery_of,
    parameters,
    reference_log_prob,
    replaced,
    reproducible,
    saved,
    table,
    torchrun,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import envs
import ppo_swarm
from ppo_swarm import Agent, Args, Linear, SquashedNormal, Trunk, compute_gae

nursery = nursery_of("Swarm")


# ----------------------------------------------------------------------------------------------------------------------
# Squashed normal
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1.0, 10.0, 300.0], ids=lambda spread: f"u up to {spread:g}")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-6)], ids=["f64", "f32"])
def test_log_prob_is_that_of_torch_distributions(dtype, tolerance, spread):
    mean, logstd = parameters(dtype)
    u = (spread * torch.linspace(-1, 1, mean.numel(), dtype=torch.float64).view_as(mean)).to(dtype)
    expected = reference_log_prob(mean.double(), logstd.double(), u.double())
    got = SquashedNormal(mean, logstd, LOW.to(dtype), HIGH.to(dtype)).log_prob(u)
    assert got.shape == mean.shape[:-1]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("u", [-1e4, -400.0, -30.0, 0.0, 1e-3, 30.0, 400.0, 1e4])
def test_log_prob_keeps_its_digits_where_tanh_is_1(u):
    mean, logstd = 0.9 * u, math.log(abs(0.1 * u) + 1.0)
    z = (u - mean) / math.exp(logstd)
    log_det = 2 * (math.log(2) - np.logaddexp(u, -u)) + math.log(3.0)  # log(1 - tanh(u)^2) = -2 log cosh(u)
    expected = -0.5 * z**2 - logstd - 0.5 * math.log(2 * math.pi) - log_det
    policy = SquashedNormal(*(torch.tensor([x], dtype=torch.float64) for x in (mean, logstd, -3.0, 3.0)))
    assert policy.log_prob(torch.tensor([u], dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("spread", [1.0, 10.0, 300.0], ids=lambda spread: f"u up to {spread:g}")
def test_gradients_of_log_prob_are_those_of_torch_distributions(spread):
    leaves = []
    for log_prob in (reference_log_prob, lambda mean, logstd, u: SquashedNormal(mean, logstd, LOW, HIGH).log_prob(u)):
        mean, logstd = parameters()
        u = (spread * torch.linspace(-1, 1, mean.numel(), dtype=torch.float64).view_as(mean)).requires_grad_()
        log_prob(mean, logstd, u).sum().backward()
        leaves.append((mean.grad, logstd.grad, u.grad))
    for expected, got in zip(*leaves, strict=True):
        assert torch.isfinite(got).all() and got.abs().max() > 0
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mean, logstd", [(0.0, -2.0), (0.7, -1.0), (-1.5, -0.5), (0.3, 0.0)])
def test_entropy_estimate_has_the_mean_and_the_gradient_of_the_integral(mean, logstd):
    count = 400_000
    torch.manual_seed(0)
    mean, logstd = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (mean, logstd))
    exact = entropy_by_integration(mean, logstd, -3.0, 0.5)
    exact_gradient = torch.autograd.grad(exact, (mean, logstd))
    each_mean, each_logstd = (x.detach().expand(count, 1).clone().requires_grad_() for x in (mean, logstd))
    low, high = torch.tensor([-3.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    estimates = SquashedNormal(each_mean, each_logstd, low, high).entropy()
    gradient = torch.autograd.grad(estimates.sum(), (each_mean, each_logstd))
    for samples, expected in zip((estimates, *gradient), (exact, *exact_gradient), strict=True):
        error = samples.std().item() / math.sqrt(count)
        assert samples.mean().item() == pytest.approx(expected.item(), abs=4 * error + 1e-6)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(low=st.floats(-100, 100, width=32), width=st.floats(0.125, 100, width=32), logstd=st.floats(-5, 3))
def test_squashed_samples_lie_within_the_bounds(low, width, logstd):
    torch.manual_seed(0)
    low, high = np.float32(low), np.float32(low) + np.float32(width)
    low, high = torch.tensor([low]), torch.tensor([high])
    policy = SquashedNormal(torch.zeros(500, 1), torch.full((500, 1), logstd), low, high)
    u = torch.cat([policy.sample(), torch.tensor([[-torch.inf], [-50.0], [50.0], [torch.inf]])])
    actions = policy.squash(u)
    assert actions.min() >= low and actions.max() <= high
    assert actions[-1] == pytest.approx(high.item(), rel=1e-5, abs=1e-5) and actions.std() > 0


def test_squashed_samples_of_a_swarm_are_never_outside_its_action_space():
    torch.manual_seed(0)
    for max_turn in (math.pi, 1.0, 0.3, 1e-3):
        space = envs.make_vec("Swarm", 1, num_workers=0, max_turn=max_turn).single_action_space
        low, high = torch.tensor(space.low), torch.tensor(space.high)
        policy = SquashedNormal(torch.zeros(1000, *low.shape), torch.tensor(1.5), low, high)
        actions = policy.squash(policy.sample()).numpy()
        assert all(space.contains(action) for action in actions)
        assert space.contains(policy.squash(torch.full(low.shape, torch.inf)).numpy())


# ----------------------------------------------------------------------------------------------------------------------
# Advantages
# ----------------------------------------------------------------------------------------------------------------------


def gae_by_definition(rewards, values, last_value, final_values, dones, gamma, gae_lambda):
    """The sum over l of (gamma lambda)^l delta_{t+l}, up to the end of the episode or of the rollout."""
    num_steps, num_envs, n_agents = rewards.shape
    advantages = torch.zeros_like(rewards)
    for env in range(num_envs):
        for agent in range(n_agents):
            for t in range(num_steps):
                for k in range(t, num_steps):
                    if dones[k, env]:
                        value_after = final_values[k, env, agent]
                    elif k + 1 < num_steps:
                        value_after = values[k + 1, env, agent]
                    else:
                        value_after = last_value[env, agent]
                    delta = rewards[k, env, agent] + gamma * value_after - values[k, env, agent]
                    advantages[t, env, agent] += (gamma * gae_lambda) ** (k - t) * delta
                    if dones[k, env]:
                        break
    return advantages


def rollout(num_steps=9, num_envs=3, n_agents=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards, values, final_values = torch.randn(3, num_steps, num_envs, n_agents, generator=generator).double()
    last_value = torch.randn(num_envs, n_agents, generator=generator).double()
    return dict(rewards=rewards, values=values, last_value=last_value, final_values=final_values, dones=None)


ENDS = {
    "no end": [],
    "a truncation": [(4, 0, "truncation")],
    "a termination": [(4, 0, "termination")],
    "both, in two environments at once": [(4, 0, "truncation"), (4, 1, "termination")],
    "one after the other": [(2, 0, "truncation"), (3, 0, "termination"), (6, 0, "truncation")],
    "at the first and the last step": [(0, 0, "termination"), (8, 0, "truncation"), (8, 1, "termination")],
}


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS.keys())
@pytest.mark.parametrize("gamma, gae_lambda", [(0.95, 0.95), (1.0, 1.0), (0.9, 0.0)])
def test_gae_is_the_definition(ends, gamma, gae_lambda):
    batch = rollout()
    batch["dones"] = torch.zeros(9, 3, 1, dtype=torch.float64)
    for t, env, kind in ends:
        batch["dones"][t, env] = 1
        batch["final_values"][t, env] *= kind == "truncation"
    expected = gae_by_definition(**batch, gamma=gamma, gae_lambda=gae_lambda)
    got = compute_gae(**batch, gamma=gamma, gae_lambda=gae_lambda)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_gae_is_the_definition_for_any_pattern_of_ends(data):
    num_steps, num_envs = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 3))
    batch = rollout(num_steps, num_envs, seed=data.draw(st.integers(0, 99)))
    ends = data.draw(st.lists(st.booleans(), min_size=num_steps * num_envs, max_size=num_steps * num_envs))
    batch["dones"] = torch.tensor(ends, dtype=torch.float64).view(num_steps, num_envs, 1)
    expected = gae_by_definition(**batch, gamma=0.97, gae_lambda=0.9)
    torch.testing.assert_close(compute_gae(**batch, gamma=0.97, gae_lambda=0.9), expected, rtol=1e-12, atol=1e-12)


def test_nothing_after_an_episodes_end_reaches_an_advantage_before_it():
    batch = rollout()
    batch["dones"] = torch.zeros(9, 3, 1, dtype=torch.float64)
    batch["dones"][4] = 1
    before = compute_gae(**batch, gamma=0.99, gae_lambda=0.95)
    for name in ("rewards", "values", "final_values"):
        batch[name][5:] += 100.0
    batch["last_value"] += 100.0
    after = compute_gae(**batch, gamma=0.99, gae_lambda=0.95)
    assert torch.equal(after[:5], before[:5])
    assert not torch.isclose(after[5:], before[5:]).any()


def test_a_truncation_bootstraps_the_final_value_and_a_termination_cuts_it():
    batch = rollout(num_steps=1, num_envs=2)
    batch["dones"] = torch.ones(1, 2, 1, dtype=torch.float64)
    batch["final_values"][0, 0], batch["final_values"][0, 1] = 10.0, 0.0
    advantages = compute_gae(**batch, gamma=0.5, gae_lambda=0.9)
    own = batch["rewards"] - batch["values"]
    assert torch.equal(advantages[0, 0], own[0, 0] + 0.5 * 10.0)
    assert torch.equal(advantages[0, 1], own[0, 1])


ENDING = """
import sys, torch, envs

class Ending(envs.Swarm):  # of the episodes that end, every third is cut off, one terminates, one does both
    def step(self, actions):
        observations, rewards, terminations, truncations, infos = super().step(actions)
        kind = torch.arange(self.num_envs).numpy() % 3
        terminations, truncations = truncations & (kind != 0), truncations & (kind != 1)
        if watching:
            steps.append((torch.tensor(rewards), torch.tensor(terminations), torch.tensor(truncations), infos))
        return observations, rewards, terminations, truncations, infos

def watch(frame, event, result):
    if frame.f_code.co_name != "compute_gae" or event not in ("call", "return"):
        return
    if event == "call":
        agent = frame.f_back.f_globals["agent"]
        batch = {name: x.clone() if torch.is_tensor(x) else x for name, x in frame.f_locals.items()}
        batch["bootstraps"] = torch.full_like(batch["rewards"], torch.nan)
        for t, (_, terminated, truncated, infos) in enumerate(steps):
            if truncated.any():
                ended = torch.tensor(infos["final_obs"]), torch.tensor(infos["final_info"]["neighbors"])
                with torch.no_grad():
                    batch["bootstraps"][t] = agent.get_value(*ended)
        batch["env_rewards"], batch["terminated"], batch["truncated"] = (
            torch.stack([step[i] for step in steps]) for i in range(3)
        )
        seen.append(batch)
        steps.clear()
    elif event == "return":
        seen[-1]["advantages"] = result
        torch.save(seen, "seen.pt")
        if len(seen) == 3:
            raise SystemExit

envs.NATIVE_ENVS["Ending"] = Ending
steps, seen, watching = [], [], True
sys.setprofile(watch)
"""


@pytest.fixture(scope="module")
def watched_rollouts(nursery, tmp_path_factory):
    """What went into compute_gae in three updates of a run, and what the environment had really said."""
    cwd = tmp_path_factory.mktemp("ending")
    args = SMALL | dict(env_id="Ending", policy="gnn", env_kwargs=dict(max_steps=20), num_workers=0, team_reward=0.25)
    result = nursery.run_one(cwd, probe=ENDING, **args)
    assert (cwd / "seen.pt").exists(), result.output
    return saved(cwd / "seen.pt")


def test_the_run_bootstraps_what_was_cut_off_with_the_value_of_its_last_observation(watched_rollouts):
    ends = 0
    for batch in watched_rollouts:
        cut_off = batch["truncated"] & ~batch["terminated"]
        ends += int(cut_off.sum())
        assert torch.equal(batch["final_values"][cut_off], batch["bootstraps"][cut_off])
    assert ends > 0


def test_the_run_bootstraps_nothing_that_terminated_even_if_also_cut_off(watched_rollouts):
    both = 0
    for batch in watched_rollouts:
        both += int((batch["terminated"] & batch["truncated"]).sum())
        assert not batch["final_values"][batch["terminated"]].any()
        assert torch.equal(batch["dones"], (batch["terminated"] | batch["truncated"]).float().unsqueeze(-1))
    assert both > 0


def test_the_run_trains_on_the_advantages_of_the_definition(watched_rollouts):
    for update, batch in enumerate(watched_rollouts):
        share = 0.25 * (1 - update / NUM_UPDATES)  # --team-reward falls to 0
        expected = (1 - share) * batch["env_rewards"] + share * batch["env_rewards"].mean(-1, keepdim=True)
        torch.testing.assert_close(batch["rewards"], expected)
        names = ("rewards", "values", "last_value", "final_values", "dones")
        expected = gae_by_definition(*(batch[name].double() for name in names), batch["gamma"], batch["gae_lambda"])
        torch.testing.assert_close(batch["advantages"].double(), expected, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Networks
# ----------------------------------------------------------------------------------------------------------------------

message_passing = pytest.mark.parametrize("policy", ["gnn", "attention"])


def chain(n_agents, n_neighbors=1):
    """Agent i hears agent i + 1 and nobody else; the last hears nobody."""
    obs, neighbors = crowd(1, n_agents, n_neighbors, presence=0.0)
    obs[:, :-1, FEATURES - 1] = 1
    neighbors[:, :-1, 0] = torch.arange(1, n_agents)
    return obs, neighbors


def trunk(policy, obs, n_agents=None, **args):
    torch.manual_seed(1)
    return Trunk(Args(policy=policy, **dict(hidden_dim=8, hops=2) | args), obs.shape[-1], n_agents).double()


def test_a_layer_for_each_agent_is_that_many_separate_layers():
    torch.manual_seed(0)
    layer, x = Linear(5, 3, 4), torch.randn(6, 4, 5)
    with torch.no_grad():
        layer.bias.normal_()
    got = layer(x)
    assert got.shape == (6, 4, 3)
    for agent in range(4):
        single = torch.nn.Linear(5, 3)
        with torch.no_grad():
            single.weight.copy_(layer.weight[agent])
            single.bias.copy_(layer.bias[agent])
        torch.testing.assert_close(got[:, agent], single(x[:, agent]), rtol=1e-5, atol=1e-6)
        assert agent == 0 or not torch.equal(layer.weight[agent], layer.weight[0])


def test_a_shared_layer_treats_every_agent_alike_and_takes_any_number_of_them():
    torch.manual_seed(0)
    layer, x = Linear(5, 3, None), torch.randn(6, 9, 5)
    single = torch.nn.Linear(5, 3)
    with torch.no_grad():
        layer.bias.normal_()
        single.weight.copy_(layer.weight[0])
        single.bias.copy_(layer.bias[0])
    torch.testing.assert_close(layer(x), single(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
def test_permuting_the_agents_permutes_the_output(policy):
    obs, neighbors = crowd()
    network = trunk(policy, obs)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    permuted = network(obs[:, order], torch.argsort(order)[neighbors[:, order]])
    assert network(obs, neighbors).std(dim=1).min() > 1e-3
    torch.testing.assert_close(permuted, network(obs, neighbors)[:, order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_environment_hears_nothing_from_the_others_of_its_batch(policy):
    obs, neighbors = crowd()
    network = trunk(policy, obs)
    alone = network(obs[:1], neighbors[:1])
    torch.testing.assert_close(network(obs, neighbors)[:1], alone, rtol=1e-12, atol=1e-12)


@message_passing
def test_the_order_of_the_neighbours_does_not_matter(policy):
    obs, neighbors = crowd()
    network = trunk(policy, obs)
    seen, own = obs[..., :-OWN].unflatten(-1, (-1, FEATURES)), obs[..., -OWN:]
    with torch.no_grad():  # embed sees the neighbours in their order: let it see only the agent's own features
        network.embed.weight[..., :-OWN] = 0
    other_way_round = torch.cat([seen.flip(-2).flatten(-2), own], dim=-1)
    got = network(other_way_round, neighbors.flip(-1))
    torch.testing.assert_close(got, network(obs, neighbors), rtol=1e-12, atol=1e-12)


@message_passing
def test_an_absent_neighbour_has_no_influence_whatever_its_index(policy):
    obs, neighbors = crowd()
    network = trunk(policy, obs)
    absent = obs[..., FEATURES - 1 : -OWN : FEATURES] == 0
    assert absent.any() and not absent.all()
    expected = network(obs, neighbors)
    for index in range(neighbors.shape[1]):
        assert torch.equal(network(obs, neighbors.masked_fill(absent, index)), expected)
    present_moved = neighbors.where(absent, (neighbors + 1) % neighbors.shape[1])
    assert not torch.allclose(network(obs, present_moved), expected)


@message_passing
def test_an_agent_without_any_neighbour_gives_finite_output_and_gradients(policy):
    obs, neighbors = crowd(presence=0.0)
    network = trunk(policy, obs)
    output = network(obs, neighbors)
    output.square().sum().backward()
    assert torch.isfinite(output).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


@message_passing
@pytest.mark.parametrize("hops", [1, 2, 3])
def test_information_travels_one_neighbour_further_with_every_hop(policy, hops):
    obs, neighbors = chain(n_agents=5)
    network, changed = trunk(policy, obs, hops=hops), obs.clone()
    changed[:, -1, -OWN:] += 1.0
    difference = (network(changed, neighbors) - network(obs, neighbors)).abs().amax(dim=(0, 2))
    reached = [agent >= 4 - hops for agent in range(5)]
    assert (difference > 1e-9).tolist() == reached, difference


@pytest.mark.parametrize("policy", POLICIES)
def test_only_a_central_critic_sees_an_agent_far_away(policy):
    obs, neighbors = chain(n_agents=6)
    changed = obs.clone()
    changed[:, -1, -OWN:] += 1.0
    for critic in ("local", "central"):
        network = agent_of(obs, policy=policy, critic=critic)
        difference = network.get_value(changed, neighbors) - network.get_value(obs, neighbors)
        assert bool(difference[0, 0] != 0) == (critic == "central")
        assert network.get_policy(changed, neighbors).mean[0, 0].equal(network.get_policy(obs, neighbors).mean[0, 0])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("critic", ["local", "central"])
def test_shared_networks_take_another_number_of_agents(policy, critic):
    network = agent_of(crowd(n_agents=4)[0], policy=policy, critic=critic)
    for n_agents in (4, 5, 30):
        obs, neighbors = crowd(n_agents=n_agents)
        assert network.get_value(obs, neighbors).shape == (2, n_agents)
        assert network.get_policy(obs, neighbors).mean.shape == (2, n_agents, 1)


def test_a_central_critic_sees_the_mean_of_the_swarm_not_its_size():
    obs, neighbors = crowd(n_agents=4)
    network = agent_of(obs, critic="central")
    doubled = network.get_value(torch.cat([obs, obs], dim=1), torch.cat([neighbors, neighbors], dim=1))
    torch.testing.assert_close(doubled[:, :4], network.get_value(obs, neighbors), rtol=1e-12, atol=1e-12)


def agent_of(obs, **args):
    torch.manual_seed(2)
    args = Args(n_agents=obs.shape[1], **dict(hidden_dim=8) | args)
    return Agent(args, Spaces(obs.shape[1], obs.shape[2])).double()


@pytest.mark.parametrize("share_critic", [True, False], ids=["one critic", "own critics"])
@pytest.mark.parametrize("share_policy", [True, False], ids=["one policy", "own policies"])
@pytest.mark.parametrize("critic", ["local", "central"])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_reach_every_parameter_of_every_agent(policy, critic, share_policy, share_critic):
    obs, neighbors = crowd(batch=16)
    network = agent_of(obs, policy=policy, critic=critic, share_policy=share_policy, share_critic=share_critic)
    actor_critic = network.get_policy(obs, neighbors)
    loss = actor_critic.log_prob(torch.randn_like(actor_critic.mean)).square().mean()
    loss = loss + (network.get_value(obs, neighbors) - 1).square().mean()
    loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        for gradient in parameter.grad.flatten(1):  # a row for every agent that has its own
            assert torch.isfinite(gradient).all() and gradient.any(), name
    own = {name for name, parameter in network.named_parameters() if len(parameter) == 7 and "edge" not in name}
    assert any(name.startswith("actor") for name in own) == (not share_policy)
    assert any(name.startswith("critic") for name in own) == (not share_critic)


@pytest.mark.parametrize("policy", POLICIES)
def test_agents_that_share_nothing_learn_from_their_own_experience_only(policy):
    obs, neighbors = crowd(presence=0.0)
    network = agent_of(obs, policy=policy, share_policy=False, share_critic=False)
    network.get_value(obs, neighbors)[:, 2].sum().backward()
    for name, parameter in network.critic.named_parameters():
        if "edge" not in name:  # how i sees j is the same map for all
            others = torch.arange(7) != 2
            assert not parameter.grad[others].any(), name


# ----------------------------------------------------------------------------------------------------------------------
# A whole run
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twins(nursery, tmp_path_factory):
    """The same command twice at once; the second starts while the first, frozen, has an unfinished checkpoint."""
    cwd = tmp_path_factory.mktemp("twins")
    with nursery.start(cwd, SMALL, pictures=True) as first:
        checkpoint = first.wait_for("*/checkpoint.pt")
        first.kill(signal.SIGSTOP)
        shutil.copy(checkpoint, cwd / "checkpoint.pt")
        with nursery.start(cwd, SMALL) as second:
            second.wait_until(lambda: len(folders(cwd)) == 2, "a folder of its own")
            first.kill(signal.SIGCONT)
            results = first.finish(), second.finish()
    results[0].own, results[1].own = checkpoint.parent, next(f for f in folders(cwd) if f != checkpoint.parent)
    return results


@pytest.fixture(scope="module")
def finished(twins):
    """One uninterrupted run."""
    assert twins[0].code == 0, twins[0].output
    return twins[0]


def test_a_run_leaves_its_events_model_plot_and_video_and_nothing_else(finished):
    events, rest = [], []
    for name in contents(finished.own):
        (events if name.startswith("events.out.tfevents") else rest).append(name)
    assert len(events) == 1 and rest == ["eval.mp4", "eval.png", "model.pt"]


def test_a_run_names_its_folder_and_the_files_in_it(finished):
    for name in (finished.own.name, "model.pt", "eval.png", "eval.mp4"):
        assert name in finished.output


def test_a_run_warns_of_nothing(finished):
    assert "Warning" not in finished.output


CLEANRL_TAGS = (
    "charts/episodic_return",
    "charts/SPS",
    "charts/learning_rate",
    "losses/value_loss",
    "losses/policy_loss",
    "losses/entropy",
    "losses/old_approx_kl",
    "losses/approx_kl",
    "losses/clipfrac",
    "losses/explained_variance",
)


def test_tensorboard_has_all_tags(finished):
    tags = curves(finished.own).keys()
    assert set(CLEANRL_TAGS) <= tags
    assert {"charts/episodic_length", "losses/std", "eval/r"} <= tags
    for metric in envs.Swarm.stat_names[2:]:
        assert {f"episode/{metric}", f"eval/{metric}", f"eval/sampled_{metric}"} <= tags
    assert any("rollout" in tag for tag in tags) and any("update" in tag for tag in tags)
    assert {f"test/{policy}" for policy in ("ppo_swarm", "sampled", "boids", "vicsek", "random")} <= tags


def test_tensorboard_holds_no_nan(finished):
    for tag, points in curves(finished.own).items():
        assert points and all(math.isfinite(value) for _, value in points), tag


def test_the_x_axis_counts_agent_steps(finished):
    read = curves(finished.own)
    every_update = [PER_UPDATE * (update + 1) for update in range(NUM_UPDATES)]
    for tag in CLEANRL_TAGS[1:]:
        assert [step for step, _ in read[tag]] == every_update, tag
    assert [step for step, _ in read["eval/r"]] == every_update[3::4]
    # Episodes of 50 steps that begin at different times: in each rollout of 32 some end.
    assert [step for step, _ in read["charts/episodic_return"]] == every_update


def test_the_reward_terms_add_up_to_the_return(finished):
    read = curves(finished.own)
    terms = [[value for _, value in read[f"episode/reward_{term}"]] for term in envs.SWARM_REWARD_TERMS]
    returns = [value for _, value in read["charts/episodic_return"]]
    np.testing.assert_allclose(np.sum(terms, axis=0), returns, rtol=1e-5, atol=1e-4)


def test_the_learning_rate_is_lowered_linearly_to_0(finished):
    rates = np.array([value for _, value in curves(finished.own)["charts/learning_rate"]])
    np.testing.assert_allclose(rates, rates[0] * (1 - np.arange(NUM_UPDATES) / NUM_UPDATES), rtol=1e-5)


def seconds_passed(folder):
    """(agent-steps, seconds by charts/SPS, seconds by the clock) from the first update logged to the last."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    first, *_, last = events.Scalars("charts/SPS")
    return last.step - first.step, last.step / last.value - first.step / first.value, last.wall_time - first.wall_time


def test_sps_counts_agent_steps_by_the_clock(finished):
    read = curves(finished.own)
    steps, counted, passed = seconds_passed(finished.own)
    assert steps == (NUM_UPDATES - 1) * PER_UPDATE and counted == pytest.approx(passed, rel=0.05, abs=0.02)
    seconds = [sum(v for _, v in read[f"charts/{part}_seconds"]) for part in ("rollout", "update")]
    assert read["charts/SPS"][-1][1] <= NUM_UPDATES * PER_UPDATE / sum(seconds) * 1.001  # evaluations are in it, too


def test_the_closing_table_compares_with_vicsek_and_random(finished):
    rows = table(finished.output)
    assert list(rows)[1:] == ["ppo_swarm", "sampled", "boids", "vicsek", "random"]
    header = rows.pop(next(iter(rows)))
    assert "polar_order" in header and all(len(cells) == len(header) for cells in rows.values())
    for cells in rows.values():
        assert all(re.fullmatch(r"-?\d+\.\d+ \+- \d+\.\d+", cell) for cell in cells)


def test_the_plot_opens(finished):
    with Image.open(finished.own / "eval.png") as plot:
        plot.load()
        assert plot.format == "PNG" and min(plot.size) > 200
        assert len(plot.convert("RGB").getcolors(10**6)) > 10


def decoded(path, panels=1):
    """Frames (steps, height, width, 3) of a video of so many square panels, captions cut off, as integers."""
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    return np.array(frames).astype(int)[:, height - width // panels :]


def test_the_video_shows_four_swarms_that_start_alike_and_go_their_own_ways(finished):
    frames = decoded(finished.own / "eval.mp4", panels=4)
    assert abs(len(frames) - 50) <= 1  # a frame for each step of the episode
    shown = next(imageio_ffmpeg.read_frames(str(finished.own / "eval.mp4")))
    assert shown["fps"] == envs.Swarm.metadata["render_fps"]
    panels = np.split(frames, 4, axis=2)
    for panel in panels:
        assert np.abs(panel[0] - panel[len(panel) // 2]).max() > 100  # agents have moved
        assert (panel < 128).any() and (panel > 250).mean() > 0.5  # dark figures on white ground
    for a, b in itertools.combinations(range(4), 2):
        assert np.abs(panels[a][-1] - panels[b][-1]).max() > 100
        assert np.abs(panels[a][0] - panels[b][0]).mean() < np.abs(panels[a][-1] - panels[b][-1]).mean()


def test_a_third_of_a_million_steps_of_the_default_command_are_enough_to_beat_vicsek(nursery, tmp_path):
    result = nursery.run_one(tmp_path, total_timesteps=330_000, eval_episodes=20)
    assert result.code == 0, result.output
    per_step = {name: float(cells[2].split()[0]) for name, cells in list(table(result.output).items())[1:]}
    assert per_step["ppo_swarm"] > per_step["vicsek"] > 0.6, per_step
    for seed in range(3):  # the untrained ones fly straight on, more or less
        torch.manual_seed(seed)
        untrained = Agent(Args(), envs.make_vec("Swarm", 1, 0)).make_policy
        before, _, _ = envs.evaluate(untrained, "Swarm", 20, envs.TEST_SEED)
        assert (before["r"] / before["l"]).mean() < 0.55


def test_a_saved_model_holds_its_arguments_and_loads_without_running_code(finished):
    content = saved(finished.own / "model.pt")
    assert set(content) == {"args", "model", "score"}
    assert content["score"] == pytest.approx(max(score for _, score in curves(finished.own)["eval/r"]), rel=1e-6)
    assert content["args"]["n_agents"] == N_AGENTS and content["args"]["env_kwargs"] == {"max_steps": 50}
    assert all(torch.isfinite(tensor).all() for tensor in content["model"].values())


def test_a_checkpoint_holds_the_run_so_far_and_loads_without_running_code(twins):
    content = saved(twins[0].cwd / "checkpoint.pt")
    assert set(content) == {"args", "step", "stage", "ranks", "model", "optimizer"}
    assert content["args"] == saved(twins[0].own / "model.pt")["args"]
    assert content["step"] == 3 * PER_UPDATE and [set(own) for own in content["ranks"]] == [{"rng", "envs"}]


def test_every_evaluation_prints_its_means_and_says_which_was_the_best_so_far(finished):
    read, best = curves(finished.own), -math.inf
    line = r"step ([\d,]+): held-out return (\S+), (\S+) a step, length (\d+), with noise ([\d.]+)(, the best so far)?"
    printed = re.findall(line, finished.output)
    assert len(printed) == len(read["eval/r"]) == NUM_UPDATES // 4
    for (step, score, per_step, length, noisy, said), (at, r), (_, steps), (_, sampled) in zip(
        printed, read["eval/r"], read["eval/l"], read["eval/sampled_r"], strict=True
    ):
        assert (int(step.replace(",", "")), int(length)) == (at, steps)
        assert float(score) == pytest.approx(r, abs=0.006) and float(per_step) == pytest.approx(r / steps, abs=6e-4)
        assert float(noisy) == pytest.approx(sampled, abs=0.006) and sampled != r
        assert bool(said) == (r > best)
        best = max(best, r)


def test_training_cuts_episodes_off_earlier_than_evaluation_unless_max_steps_is_given(nursery, tmp_path):
    jobs = {"train": dict(env_kwargs={}, train_kwargs=dict(max_steps=10)), "both": dict(env_kwargs=dict(max_steps=20))}
    jobs = [(tmp_path / name, BRIEF | args) for name, args in jobs.items()]
    for run, training, evaluation in zip(nursery.run(*jobs), (10, 20), (250, 20), strict=True):
        assert run.code == 0, run.output
        read = curves(run.folder)
        lengths = [length for _, length in read["charts/episodic_length"]]
        assert lengths[0] < training and lengths[1:] == [training] * (len(lengths) - 1)  # at first staggered
        assert {length for _, length in read["eval/l"]} == {evaluation}
        assert table(run.output)["ppo_swarm"][1].split()[0] == f"{evaluation}.000"


def test_capture_video_records_the_start_and_every_new_best(nursery, tmp_path):
    result = nursery.run_one(tmp_path, pictures=True, capture_video=True, **BRIEF | dict(eval_every=10**9))
    videos = [name for name in contents(result.folder) if name.endswith(".mp4") and name != "eval.mp4"]
    assert len(videos) == 2, videos  # before the first update, and after the last, the only evaluation
    for name in videos:
        assert len(decoded(result.folder / name)) > 10


@pytest.fixture(scope="module")
def ratios(nursery, tmp_path_factory):
    """{policy: largest |ratio - 1| in each minibatch of a run, (updates, minibatches)}."""
    cwd = tmp_path_factory.mktemp("ratios")
    args = SMALL | dict(total_timesteps=12 * PER_UPDATE, num_minibatches=4, update_epochs=2, eval_every=10**9)
    jobs = [(cwd / policy, args | dict(policy=policy, env_kwargs=dict(max_steps=10))) for policy in POLICIES]
    for result in nursery.run(*jobs, probe=RATIOS):
        assert result.code == 0, result.output
    read = {policy: json.loads((cwd / policy / "ratios.json").read_text()) for policy in POLICIES}
    return {policy: np.reshape(values, (12, 8)) for policy, values in read.items()}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_ratio_is_1_on_the_first_minibatch_of_every_update(ratios, policy):
    assert ratios[policy][:, 0].max() <= 1e-6, ratios[policy][:, 0]
    assert ratios[policy][:, 1:].min() > 1e-4  # and the policy moves after that


def test_target_kl_ends_an_update_before_the_gradient_step_that_goes_too_far(nursery, tmp_path):
    result = nursery.run_one(tmp_path, probe=RATIOS, **BRIEF | dict(target_kl=1e-7, update_epochs=3))
    assert result.code == 0, result.output
    ratios = json.loads((tmp_path / "ratios.json").read_text())
    assert len(ratios) == 8  # in each of the four updates one gradient step, and the minibatch that then went too far
    assert max(ratios[::2]) <= 1e-6 < min(ratios[1::2])


def test_the_same_seed_gives_identical_weights_and_curves(twins):
    assert_same_weights(twins[0].own / "model.pt", twins[1].own / "model.pt")
    assert reproducible(curves(twins[0].own)) == reproducible(curves(twins[1].own))


def test_two_identical_commands_at_once_write_into_two_folders(twins):
    assert [result.code for result in twins] == [0, 0], twins[1].output
    assert twins[0].own != twins[1].own and contents(twins[0].own)[:2] == contents(twins[1].own)[:2]
    assert twins[0].own.name in twins[1].output  # it says which run it leaves alone
    for result in twins:
        assert len([name for name in contents(result.own) if name.startswith("events")]) == 1


def test_another_seed_gives_other_weights(finished, strangers):
    assert_other_weights(finished.own / "model.pt", strangers.new / "model.pt")


def test_the_number_of_workers_changes_nothing(nursery, tmp_path):
    args = SMALL | dict(total_timesteps=8 * PER_UPDATE)
    runs = nursery.run(*((tmp_path / str(count), args | dict(num_workers=count)) for count in (0, 2)))
    assert [run.code for run in runs] == [0, 0], runs[1].output
    assert_same_weights(*(run.folder / "model.pt" for run in runs))
    assert reproducible(curves(runs[0].folder)) == reproducible(curves(runs[1].folder))


# ----------------------------------------------------------------------------------------------------------------------
# Interrupted runs
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(nursery, tmp_path_factory):
    """SIGKILL at the first checkpoint, then midway, then in the final evaluation, each time started again."""
    cwd = tmp_path_factory.mktemp("killed")
    with nursery.start(cwd, SMALL) as run:
        folder = run.wait_for("*/checkpoint.pt").parent
        run.kill(signal.SIGKILL)
        run.finish()
    with nursery.start(cwd, SMALL) as run:
        run.wait_until(replaced(folder, times=2), "two more checkpoints")
        run.kill(signal.SIGKILL)
        run.finish()
    with nursery.start(cwd, SMALL, pictures=True) as run:
        run.wait_for("*/eval.png")
        assert (folder / "checkpoint.pt").exists(), "the checkpoint goes last, when all else is there"
        run.kill(signal.SIGKILL)
        run.finish()
    return nursery.run_one(cwd, **SMALL)


def test_a_run_killed_at_three_moments_goes_on_in_its_folder(killed):
    assert killed.code == 0, killed.output
    assert killed.folder.name in killed.output
    assert [name for name in contents(killed.folder) if not name.startswith("events")] == [
        "eval.mp4",
        "eval.png",
        "model.pt",
    ]


def test_a_run_killed_at_three_moments_ends_with_identical_weights(killed, finished):
    assert_same_weights(killed.folder / "model.pt", finished.own / "model.pt")
    assert table(killed.output) == table(finished.output)


def test_a_run_killed_at_three_moments_has_identical_curves(killed, finished):
    assert_same_curves(killed.folder, finished.own)


@pytest.fixture(scope="module")
def interrupted(nursery, tmp_path_factory):
    """The outputs of a run that got SIGINT, its continuation that got SIGTERM, and the rest."""
    cwd, results = tmp_path_factory.mktemp("interrupted"), []
    args = SMALL | dict(checkpoint_every=10**9)  # so that the checkpoints are those of the signals
    for number in (signal.SIGINT, signal.SIGTERM):
        # The first as a user starts it
        with nursery.start(cwd, args) if results else launch(cwd, args) as run:
            if not results:
                run.wait_for("*/events*")
            before = len(curves_steps(cwd))
            run.wait_until(lambda before=before: len(curves_steps(cwd)) > before, "an evaluation")
            run.kill(number)
            results.append(run.finish())
            results[-1].checkpoints = [path.name for path in folders(cwd)[0].glob("checkpoint*")]
    with nursery.start(cwd, args) as run:
        results.append(run.finish())
    return results


def curves_steps(cwd):
    """The evaluations printed so far, over all processes of the folder."""
    return [line for log in cwd.glob("output-*.txt") for line in re.findall(r"held-out|resumed", log.read_text())]


@pytest.mark.parametrize("which", [0, 1], ids=["SIGINT", "SIGTERM"])
def test_a_signal_saves_a_checkpoint_says_so_and_exits_with_0(interrupted, which):
    result = interrupted[which]
    assert result.code == 0, result.output
    assert result.checkpoints == ["checkpoint.pt"]
    assert "Traceback" not in result.output
    assert interrupted[-1].folder.name in result.output.splitlines()[-1]


def test_a_run_interrupted_by_signals_ends_with_identical_weights(interrupted, finished):
    assert interrupted[-1].code == 0, interrupted[-1].output
    assert_same_weights(interrupted[-1].folder / "model.pt", finished.own / "model.pt")


def test_a_run_interrupted_by_signals_has_identical_curves(interrupted, finished):
    assert_same_curves(interrupted[-1].folder, finished.own)


def hostile(path, target):
    """A file that would create `target` if unpickled carelessly, in torch's format."""

    class Bomb:
        def __reduce__(self):
            return (open, (str(target), "w"))

    torch.save({"args": Bomb(), "model": Bomb(), "ranks": [Bomb()]}, path)
    torch.load(path, weights_only=False)
    assert target.exists(), "the bomb has to be live"
    target.unlink()


STRANGERS = ("other arguments", "truncated", "random bytes", "empty", "hostile")


@pytest.fixture(scope="module")
def strangers(nursery, twins, tmp_path_factory):
    """A new run among unfinished runs that it must not touch."""
    cwd = tmp_path_factory.mktemp("strangers")
    whole = (twins[0].cwd / "checkpoint.pt").read_bytes()
    noise = np.random.default_rng(0).bytes(5000)
    bytes_of = {"other arguments": whole, "truncated": whole[: len(whole) // 2], "random bytes": noise, "empty": b""}
    paths, before = {}, {}
    for name in STRANGERS:
        path = paths[name] = cwd / "runs" / f"Swarm__ppo_swarm__1__{name.replace(' ', '-')}" / "checkpoint.pt"
        path.parent.mkdir(parents=True)
        if name == "hostile":
            hostile(path, cwd / "created")
        else:
            path.write_bytes(bytes_of[name])
        before[name] = path.read_bytes()
    result = nursery.run_one(cwd, **SMALL | dict(seed=2, total_timesteps=4 * PER_UPDATE))
    result.paths, result.before = paths, before
    result.new = next(folder for folder in folders(cwd) if folder not in {path.parent for path in paths.values()})
    return result


@pytest.mark.parametrize("name", STRANGERS)
def test_a_checkpoint_that_is_not_this_runs_is_named_and_left_as_it_was(strangers, name):
    path = strangers.paths[name]
    assert path.parent.name in strangers.output
    assert path.read_bytes() == strangers.before[name] and contents(path.parent) == ["checkpoint.pt"]


def test_a_new_run_starts_beside_them(strangers):
    assert strangers.code == 0, strangers.output
    assert len(folders(strangers.cwd)) == len(STRANGERS) + 1
    assert "model.pt" in contents(strangers.new)


def test_a_hostile_checkpoint_runs_no_code(strangers):
    assert not (strangers.cwd / "created").exists()


OTHER_FORMATS = {"a tensor": torch.zeros(3), "no arguments": {"model": {}}, "other arguments": {"args": {"lr": 1}}}


@pytest.mark.parametrize("content", OTHER_FORMATS.values(), ids=OTHER_FORMATS.keys())
def test_a_checkpoint_of_another_format_does_not_stop_a_new_run(nursery, tmp_path, content):
    path = tmp_path / "runs" / "Swarm__ppo_swarm__1__other" / "checkpoint.pt"
    path.parent.mkdir(parents=True)
    torch.save(content, path)
    result = nursery.run_one(tmp_path, **BRIEF)
    assert result.code == 0, result.output
    assert path.parent.name in result.output and path.exists()


def test_a_full_disk_while_checkpointing_does_not_stop_training(tmp_path):
    def limit():  # of a file's size: room for model.pt and the video, not for checkpoint.pt, which is 3 times model.pt
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))

    with launch(tmp_path, SMALL | dict(hidden_dim=200, total_timesteps=8 * PER_UPDATE), preexec_fn=limit) as run:
        result = run.finish()
    assert result.code == 0, result.output
    assert "checkpoint" in result.output and os.strerror(errno.EFBIG) in result.output
    assert [name for name in contents(result.folder) if not name.startswith("events")] == [
        "eval.mp4",
        "eval.png",
        "model.pt",
    ]
    assert curves(result.folder)["losses/value_loss"][-1][0] == 8 * PER_UPDATE


def test_a_death_while_saving_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "checkpoint.pt"
    envs.save({"model": {"weight": torch.ones(3)}}, path)
    old = path.read_bytes()
    for dies_in in ("os.fsync", "os.replace"):
        code = f"import os, torch, envs; {dies_in} = lambda *_: os._exit(9)\n"
        code += f"envs.save({{'model': {{'weight': torch.zeros(3)}}}}, {str(path)!r})"
        assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT).returncode == 9
        assert path.read_bytes() == old


# ----------------------------------------------------------------------------------------------------------------------
# Saved models
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(finished, tmp_path_factory):
    """A copy of the model of the finished run, in a folder of its own."""
    return Path(shutil.copy(finished.own / "model.pt", tmp_path_factory.mktemp("model")))


def test_evaluate_draws_and_prints_the_comparison_of_the_run_again(nursery, finished, model, tmp_path):
    result = nursery.run_one(tmp_path, pictures=True, evaluate=model)
    assert result.code == 0, result.output
    assert table(result.output) == table(finished.output)
    (drawn,) = model.parent.glob("evaluate-*")  # beside the model, but not over the plot and video of its training
    assert contents(drawn) == ["eval.mp4", "eval.png"] and contents(model.parent) == [drawn.name, "model.pt"]
    assert not folders(tmp_path)
    assert len(decoded(drawn / "eval.mp4")) > 10


SIZES = [("gnn", "central", True), ("attention", "local", True), ("mlp", "local", False)]


@pytest.fixture(scope="module")
def larger(nursery, tmp_path_factory):
    """Models of every kind with a shared policy, evaluated with another number of agents."""
    cwd = tmp_path_factory.mktemp("larger")
    kinds = {(p, c, s): cwd / f"{p}-{c}-{s}" for p, c, s in SIZES}
    args = BRIEF | dict(env_kwargs=dict(max_steps=12))
    trained = nursery.run(
        *((path, args | dict(policy=p, critic=c, share_critic=s)) for (p, c, s), path in kinds.items())
    )
    evaluated = nursery.run(*((run.cwd, dict(evaluate=run.folder / "model.pt", n_agents=9)) for run in trained))
    return dict(zip(kinds, zip(trained, evaluated, strict=True), strict=True))


@pytest.mark.parametrize("policy, critic, share_critic", SIZES)
def test_evaluate_takes_another_number_of_agents(larger, policy, critic, share_critic):
    trained, evaluated = larger[policy, critic, share_critic]
    assert trained.code == 0, trained.output
    assert evaluated.code == 0, evaluated.output
    assert list(table(evaluated.output))[1:] == ["ppo_swarm", "sampled", "boids", "vicsek", "random"]
    assert table(evaluated.output) != table(trained.output)


def test_evaluate_keeps_the_saved_world_but_for_what_is_given(nursery, model, tmp_path):
    given = dict(kept={}, repeated=dict(env_kwargs=dict(max_steps=50)), changed=dict(env_kwargs=dict(speed=0.0)))
    jobs = []
    for name, args in given.items():
        (tmp_path / name).mkdir()
        jobs.append((tmp_path / name, dict(evaluate=shutil.copy(model, tmp_path / name)) | args))
    results = nursery.run(*jobs)
    kept, repeated, changed = (table(result.output) for result in results)
    assert [result.code for result in results] == [0, 0, 0], "".join(result.output for result in results)
    assert kept == repeated != changed


def test_init_from_starts_with_the_weights_of_the_saved_model_and_evaluate_does_without_it(nursery, model, tmp_path):
    start = shutil.copy(model, tmp_path / "start.pt")
    result = nursery.run_one(tmp_path, init_from=start, **BRIEF | dict(learning_rate=1e-10))
    assert result.code == 0, result.output
    before, after = saved(model)["model"], saved(result.folder / "model.pt")["model"]
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-7)
    start.unlink()
    again = nursery.run_one(tmp_path / "again", evaluate=result.folder / "model.pt")
    assert again.code == 0 and table(again.output) == table(result.output), again.output


@pytest.mark.parametrize("legacy", [False, True], ids=["torch's zip", "bare pickle"])
def test_loading_a_hostile_file_runs_no_code_and_names_it(tmp_path, legacy):
    path, created = tmp_path / "model.pt", tmp_path / "created"
    hostile(path, created)
    if legacy:

        class Bomb:
            def __reduce__(self):
                return (open, (str(created), "w"))

        path.write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        envs.load(path)
    assert not created.exists()


BAD_MODELS = ("hostile", "truncated", "missing", "not a model")


@pytest.fixture(scope="module")
def refused(nursery, model, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("refused")
    paths = {name: cwd / name.replace(" ", "-") / "model.pt" for name in BAD_MODELS}
    for path in paths.values():
        path.parent.mkdir()
    hostile(paths["hostile"], cwd / "created")
    paths["truncated"].write_bytes(model.read_bytes()[:-2000])
    torch.save(torch.zeros(3), paths["not a model"])
    keys = [(name, flag) for name in BAD_MODELS for flag in ("evaluate", "init_from")]
    runs = nursery.run(*((cwd, {flag: paths[name]} | (BRIEF if flag == "init_from" else {})) for name, flag in keys))
    return cwd, paths, dict(zip(keys, runs, strict=True))


@pytest.mark.parametrize("flag", ["evaluate", "init_from"])
@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_model_that_cannot_be_used_is_refused_by_name_and_nothing_starts(refused, name, flag):
    cwd, paths, results = refused
    result = results[name, flag]
    assert result.code == 1
    assert str(paths[name]) in result.output.splitlines()[-1] or str(paths[name]) in error_of(result.output)
    assert not folders(cwd) and not (cwd / "created").exists()


# ----------------------------------------------------------------------------------------------------------------------
# torchrun
# ----------------------------------------------------------------------------------------------------------------------

TORCHRUN = SMALL | dict(total_timesteps=12 * 2 * PER_UPDATE, checkpoint_every=2 * 2 * PER_UPDATE, max_grad_norm=1e9)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("ranks")
    with torchrun(cwd, TORCHRUN, RANKS) as run:
        result = run.finish()
    assert result.code == 0, result.output
    result.traces = [torch.load(cwd / f"trace-{rank}.pt") for rank in range(2)]
    return result


def test_torchrun_trains_in_one_folder_with_one_model(ranks):
    names = contents(ranks.folder)
    assert names[:2] == ["eval.mp4", "eval.png"] and names[-1] == "model.pt" and len(names) == 4
    assert list(table(ranks.output))[1:] == ["ppo_swarm", "sampled", "boids", "vicsek", "random"]
    assert curves(ranks.folder)["losses/value_loss"][0][0] == 2 * PER_UPDATE


def test_torchrun_ranks_agree_on_the_weights_after_every_gradient_step(ranks):
    first, second = (trace["weights"] for trace in ranks.traces)
    assert first == second and len(set(first)) == len(first) >= 12


def test_torchrun_ranks_see_observations_of_their_own(ranks):
    first, second = (trace["observations"] for trace in ranks.traces)
    assert len(first) == len(second) == 12 * NUM_STEPS + 1
    assert not set(first) & set(second)


def test_torchrun_ranks_draw_actions_and_minibatches_of_their_own(ranks):
    first, second = (trace["seed"] for trace in ranks.traces)
    assert first != second


def test_torchrun_ranks_use_the_mean_of_their_gradients(ranks):
    first, second = (trace["own"] for trace in ranks.traces)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(ranks.traces[0]["used"], (first + second) / 2)


PID = "import os, pathlib; pathlib.Path(f'pid-{os.environ[\"RANK\"]}').write_text(str(os.getpid()))"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_torchrun_stopped_by_a_signal_to_the_launcher_goes_on_to_identical_weights(ranks, tmp_path, number):
    with torchrun(tmp_path, TORCHRUN, PID) as run:
        folder = run.wait_for("*/checkpoint.pt").parent
        run.kill(signal.SIGSTOP)
        pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in range(2)]
        os.kill(run.process.pid, signal.SIGCONT)
        if number == signal.SIGKILL:  # a machine that goes down takes the ranks with it
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        os.kill(run.process.pid, number)
        run.kill(signal.SIGCONT)
        run.finish()
    assert (folder / "checkpoint.pt").exists() and not (folder / "eval.mp4").exists(), run.output
    with torchrun(tmp_path, TORCHRUN, PID) as run:
        result = run.finish()
    assert result.code == 0, result.output
    assert_same_weights(result.folder / "model.pt", ranks.folder / "model.pt")
    assert_same_curves(result.folder, ranks.folder)


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def test_the_script_and_envs_alone_in_an_empty_folder_run(tmp_path):
    copy_alone(SCRIPT, tmp_path)
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, SCRIPT.name, *flags(**BRIEF)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "model.pt" in contents(folders(tmp_path)[0])


@pytest.fixture(scope="module")
def help_text():
    result = subprocess.run(
        [sys.executable, SCRIPT, "--help"], env=ENVIRONMENT | {"COLUMNS": "120"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def documented():
    """{field: the comment that stands beside it or above it in Args}."""
    body = re.search(r"class Args:\n(.*?)\n    def ", SCRIPT.read_text(), re.S).group(1)
    found, above = {}, ""
    for line in body.splitlines():
        if match := re.match(r"    (\w+): .*?(?:  # (.*))?$", line):
            found[match[1]], above = match[2] or above, "" if match[2] else above
        else:
            above = line.strip(" #")
    return found


def test_help_explains_every_argument(help_text):
    text = " ".join(re.sub("[│╭╰╮╯─]", " ", help_text).split())
    comments = documented()
    assert comments.keys() == {field.name for field in dataclasses.fields(Args)}
    for name, comment in comments.items():
        assert comment and f"--{name.replace('_', '-')}" in text, name
        assert comment in text, name


def test_help_shows_the_docstring_as_it_stands(help_text):
    shown = [line.strip() for line in help_text.splitlines()]
    for line in ppo_swarm.__doc__.splitlines():
        assert line.strip() in shown, line


def test_help_fits_into_120_columns(help_text):
    assert max(len(line) for line in help_text.splitlines()) <= 120


BAD_ARGUMENTS = {
    **dict.fromkeys(("num_envs", "num_steps", "num_minibatches", "update_epochs", "hidden_dim", "hops"), (0, -3)),
    **dict.fromkeys(("eval_every", "eval_episodes", "checkpoint_every"), (0, -1)),
    **dict.fromkeys(("gamma", "gae_lambda"), (-0.1, 1.1, math.nan)),
    **dict.fromkeys(("learning_rate", "clip_coef", "max_grad_norm"), (0.0, -1.0, math.nan, math.inf)),
    **dict.fromkeys(("ent_coef", "vf_coef", "init_logstd"), (math.nan, math.inf)),
    "guess_coef": (-0.1, math.nan),
    "target_kl": (-0.1, 0.0, math.nan),
    "seed": (-1, envs.VALIDATION_SEED, envs.TEST_SEED),
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD_ARGUMENTS.items() for value in values])
def test_a_bad_argument_is_refused_by_name_with_its_value_and_what_is_allowed(name, value):
    with pytest.raises(ValueError) as caught:
        Args(**{name: value})
    message = str(caught.value)
    assert name in message and str(value) in message and "must" in message


def test_minibatches_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="num_minibatches is 5: it must divide 384"):  # num_steps * num_envs
        Args(num_envs=12, num_steps=32, num_minibatches=5)


def test_minibatches_of_one_advantage_which_has_no_deviation_are_refused():
    with pytest.raises(ValueError, match="num_minibatches is 384: .* two steps or more to a minibatch"):
        Args(num_envs=12, num_steps=32, num_minibatches=384, n_agents=1)
    Args(num_envs=12, num_steps=32, num_minibatches=384, n_agents=2)


NO_NEIGHBOURS = """
import envs
class Alone(envs.Swarm):
    info_names = ()
envs.NATIVE_ENVS["Alone"] = Alone
envs.Alone = Alone
"""
BAD_COMMANDS = {
    "total_timesteps": (dict(total_timesteps=PER_UPDATE - 1), str(PER_UPDATE - 1)),
    "num_minibatches": (dict(num_minibatches=7), "7"),
    "n_agents": (dict(n_agents=0), "0"),
    "num_envs": (dict(num_envs=0), "0"),
    "learning_rate": (dict(learning_rate=-1), "-1"),
    "speed": (dict(env_kwargs=dict(speed=-1)), "-1"),
    "warp": (dict(env_kwargs=dict(warp=9)), "warp"),
    "n_agents in env_kwargs": (dict(env_kwargs=dict(n_agents=1)), "n_agents"),
    "policy": (dict(policy="transformer"), "transformer"),
    "seed": (dict(seed=-1), "-1"),
    "env_id": (dict(env_id="Swarn"), "Swarn"),
}


@pytest.fixture(scope="module")
def bad_commands(nursery, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("bad")
    jobs = [(cwd / name.replace(" ", "-"), BRIEF | change) for name, (change, _) in BAD_COMMANDS.items()]
    return dict(zip(BAD_COMMANDS, nursery.run(*jobs), strict=True))


@pytest.mark.parametrize("name", BAD_COMMANDS)
def test_a_bad_command_is_refused_by_name_before_anything_starts(bad_commands, name):
    result, value = bad_commands[name], BAD_COMMANDS[name][1]
    error = error_of(result.output) or result.output
    assert result.code != 0 and value in error
    assert re.search(name.split()[0].replace("_", "[_-]"), error), error
    assert not (result.cwd / "runs").exists()


@message_passing
def test_message_passing_without_neighbours_is_refused(nursery, tmp_path, policy):
    result = nursery.run_one(tmp_path, probe=NO_NEIGHBOURS, **BRIEF | dict(env_id="Alone", policy=policy))
    error = error_of(result.output)
    assert result.code == 1 and error.startswith("ValueError")
    assert policy in error and "Alone" in error and "mlp" in error
    assert not folders(tmp_path)


def test_mlp_runs_without_neighbours(nursery, tmp_path):
    result = nursery.run_one(tmp_path, probe=NO_NEIGHBOURS, **BRIEF | dict(env_id="Alone"))
    assert result.code == 0, result.output
    assert list(table(result.output))[1:] == ["ppo_swarm", "sampled", "random"]
