"""async_ppo.py keeps its promises: the mathematics, the actors' lag and deaths, and whole runs as a user starts them.

Most runs skip the comparison at the end and its videos. What the pool that the actors are in promises whatever its
workers do is in test_stream_pool.py.
"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from running import (
    ENVIRONMENT,
    HIGH,
    LOW,
    RATIOS,
    alive,
    assert_other_weights,
    assert_same_curves,
    assert_same_weights,
    assert_soon_gone,
    children,
    contents,
    copy_alone,
    curves,
    entropy_by_integration,
    error_of,
    flags,
    folders,
    nursery_of,
    parameters,
    reference_log_prob,
    replaced,
    reproducible,
    saved,
    table,
)

import async_ppo
import envs
from async_ppo import Agent, Args, Categorical, Novelty, RunningStats, SquashedNormal, act, compute_gae

SCRIPT = Path(async_ppo.__file__)

# An environment of which the actors are as slow as one likes, and the learner, which only evaluates in it, is not
PACED = """
import multiprocessing, pathlib, time
import gymnasium as gym, numpy as np

class Paced(gym.Env):
    observation_space, action_space = gym.spaces.Box(-9, 9, (3,), np.float32), gym.spaces.Discrete(3, start=5)

    def __init__(self, pause=0.0, slow_pause=0.0, fail_at=0, note_seeds=False):
        self.note_seeds = note_seeds
        process, self.steps, self.fail_at = multiprocessing.current_process(), 0, fail_at
        self.in_an_actor = multiprocessing.parent_process() is not None
        third = self.in_an_actor and int(process.name.split("-")[-1]) % 3 == 1  # of those that started
        self.pause = slow_pause if slow_pause and third else pause * self.in_an_actor

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        if self.note_seeds and seed is not None and self.in_an_actor:
            with open("seeds.txt", "a") as file:
                print(seed, file=file)
        return self.observe(), {}

    def close(self):
        if self.note_seeds and self.in_an_actor:
            with open("closed.txt", "a") as file:
                print("closed", file=file)

    def observe(self):
        return self.np_random.normal(size=3).astype(np.float32)

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        if self.steps == self.fail_at and self.in_an_actor:
            raise ArithmeticError("the moon is made of cheese")
        if self.pause:
            time.sleep(self.np_random.uniform(0, 2 * self.pause))
        end = self.np_random.choice(4, p=[0.85, 0.05, 0.05, 0.05])  # none, either or both
        return self.observe(), float(action - 6), end in (1, 3), end in (2, 3), {}

gym.register("Paced-v0", Paced)

class Other(Paced):
    def __init__(self, kind):
        box = gym.spaces.Box
        spaces = [box(-np.inf, np.inf, (2,)), box(0, 9, (2,), np.int64), gym.spaces.MultiDiscrete([2, 2])]
        self.action_space = [*spaces, box(-1, 1, (2, 2))][kind]

gym.register("Other-v0", Other)
"""
PACED_ID = "paced_world:Paced-v0"

# No comparison of the policies when a run is over: it takes longer than such a run
QUICK = "import envs\nenvs.compare = lambda *_, **__: ({}, '')\n"

NUM_ENVS, NUM_STEPS = 4, 16
PER_UPDATE = NUM_ENVS * NUM_STEPS
ASYNC = dict(
    num_envs=NUM_ENVS,
    num_actors=2,
    num_steps=NUM_STEPS,
    total_timesteps=40 * PER_UPDATE,
    num_minibatches=2,
    update_epochs=2,
    eval_episodes=2,
    eval_every=10**9,  # only when finished: model.pt then has the final weights
    checkpoint_every=PER_UPDATE,
)
SLOWED = ASYNC | dict(env_id=PACED_ID, env_kwargs=dict(pause=0.001))
SYNC = dict(env_id="DenseLunarLander", env_kwargs=dict(max_steps=40), rnd_coef=0.5, vtrace=True, norm_obs=True)
SYNC = ASYNC | SYNC | dict(num_actors=0)


@pytest.fixture(scope="module", autouse=True)
def paced_world(tmp_path_factory):
    """The folder of the module paced_world, which this process and those of Nursery can import."""
    folder = tmp_path_factory.mktemp("paced")
    (folder / "paced_world.py").write_text(PACED)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


nursery = nursery_of("DenseLunarLander", script=SCRIPT)


# ----------------------------------------------------------------------------------------------------------------------
# Returns
# ----------------------------------------------------------------------------------------------------------------------


def deltas(rewards, values, last_value, final_values, dones, gamma):
    after = torch.cat([values[1:], last_value[None]])
    return rewards + gamma * torch.where(dones > 0, final_values, after) - values


def gae_by_definition(rewards, values, last_value, final_values, dones, gamma, gae_lambda):
    """The sum over k of (gamma lambda)^k delta_{t+k}, up to the end of the episode or of the fragment."""
    delta, advantages = deltas(rewards, values, last_value, final_values, dones, gamma), torch.zeros_like(rewards)
    for t, env, head in np.ndindex(*rewards.shape):
        for k in range(t, len(rewards)):
            advantages[t, env, head] += (gamma[head] * gae_lambda) ** (k - t) * delta[k, env, head]
            if dones[k, env, head]:
                break
    return advantages, advantages + values


def vtrace_by_definition(rewards, values, last_value, final_values, dones, ratios, gamma, gae_lambda):
    """v_s = V_s + sum over t of gamma^(t-s) (product of the c_i before t) rho_t delta_t."""
    delta, targets = deltas(rewards, values, last_value, final_values, dones, gamma), values.clone()
    for s, env, head in np.ndindex(*rewards.shape):
        product = 1.0
        for t in range(s, len(rewards)):
            rho = min(1.0, float(ratios[t, env, 0]))
            targets[s, env, head] += gamma[head] ** (t - s) * product * rho * delta[t, env, head]
            product *= gae_lambda * rho
            if dones[t, env, head]:
                break
    later = torch.cat([(targets - values)[1:], torch.zeros_like(values[:1])])
    return delta + gamma * gae_lambda * (1 - dones) * later, targets


def fragment(num_steps=9, num_envs=3, heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards, values, final_values = torch.randn(3, num_steps, num_envs, heads, generator=generator).double()
    last_value = torch.randn(num_envs, heads, generator=generator).double()
    return dict(rewards=rewards, values=values, last_value=last_value, final_values=final_values, dones=None)


GAMMA = torch.tensor([0.97, 0.8], dtype=torch.float64)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_with_and_without_a_lag_the_returns_are_their_definitions_for_any_pattern_of_ends(data):
    num_steps, num_envs = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 3))
    batch = fragment(num_steps, num_envs, seed=data.draw(st.integers(0, 99)))
    shape, gae_lambda = batch["rewards"].shape, data.draw(st.sampled_from([0.0, 0.5, 0.95, 1.0]))
    ends = data.draw(st.lists(st.booleans(), min_size=math.prod(shape), max_size=math.prod(shape)))
    batch["dones"] = torch.tensor(ends, dtype=torch.float64).view(shape)
    batch["final_values"] *= torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5  # some terminate
    number = st.floats(0, 3)
    ratios = data.draw(st.lists(number, min_size=num_steps * num_envs, max_size=num_steps * num_envs))
    ratios = torch.tensor(ratios, dtype=torch.float64).view(num_steps, num_envs, 1)
    for got, expected in (
        (
            compute_gae(**batch, rho=torch.ones_like(ratios), gamma=GAMMA, gae_lambda=gae_lambda),
            gae_by_definition(**batch, gamma=GAMMA, gae_lambda=gae_lambda),
        ),
        (
            compute_gae(**batch, rho=ratios.clamp(max=1), gamma=GAMMA, gae_lambda=gae_lambda),
            vtrace_by_definition(**batch, ratios=ratios, gamma=GAMMA, gae_lambda=gae_lambda),
        ),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_nothing_after_an_episodes_end_reaches_what_comes_before_it():
    batch, rho = fragment(), torch.full((9, 3, 1), 0.7, dtype=torch.float64)
    batch["dones"] = torch.zeros(9, 3, 2, dtype=torch.float64)
    batch["dones"][4] = 1
    before = compute_gae(**batch, rho=rho, gamma=GAMMA, gae_lambda=0.9)
    for name in ("rewards", "values", "final_values"):
        batch[name][5:] += 100.0
    batch["last_value"] += 100.0
    after = compute_gae(**batch, rho=rho, gamma=GAMMA, gae_lambda=0.9)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[:5], other[:5]) and not torch.isclose(one[5:], other[5:]).any()


# ----------------------------------------------------------------------------------------------------------------------
# Policies
# ----------------------------------------------------------------------------------------------------------------------


def test_the_categorical_policy_is_that_of_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 30.0):
        logits, actions = scale * torch.randn(50, 4, generator=generator), torch.arange(50) % 4
        ours, theirs = Categorical(logits, 0), torch.distributions.Categorical(logits=logits.double())
        torch.testing.assert_close(ours.log_prob(actions), theirs.log_prob(actions).float())
        torch.testing.assert_close(ours.entropy(), theirs.entropy().float(), rtol=1e-4, atol=1e-6)
        assert torch.equal(ours.mode, theirs.mode)


def test_actions_are_drawn_with_their_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.199, 0.001])
    policy = Categorical(probabilities.log().expand(100_000, 4), 5)
    actions = policy.squash(policy.sample(torch.Generator().manual_seed(0)))
    assert set(actions.tolist()) == {5, 6, 7, 8}
    share = torch.bincount(actions - 5, minlength=4) / len(actions)
    torch.testing.assert_close(share, probabilities, rtol=0, atol=0.006)


@pytest.mark.parametrize("spread", [1.0, 10.0, 300.0], ids=lambda spread: f"u up to {spread:g}")
def test_the_squashed_policy_has_the_log_prob_of_torch_distributions(spread):
    mean, logstd = parameters()
    u = spread * torch.linspace(-1, 1, mean.numel(), dtype=torch.float64).view_as(mean)
    policy = SquashedNormal(mean, logstd, LOW, HIGH)
    torch.testing.assert_close(policy.log_prob(u), reference_log_prob(mean, logstd, u), rtol=1e-11, atol=1e-11)


def test_the_squashed_policy_estimates_the_entropy_and_is_drawn_from_the_normal():
    torch.manual_seed(0)
    count, mean, logstd = 200_000, torch.tensor(-0.7, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
    low, high = torch.tensor([[-3.0], [0.5]], dtype=torch.float64)
    policy = SquashedNormal(mean.expand(count, 1), logstd.expand(count, 1), low, high)
    estimates = policy.entropy()
    error = 4 * estimates.std().item() / math.sqrt(count)
    assert estimates.mean().item() == pytest.approx(entropy_by_integration(mean, logstd, -3.0, 0.5).item(), abs=error)
    u, normal = policy.sample(torch.Generator().manual_seed(0)), torch.distributions.Normal(mean, logstd.exp())
    for share in (0.05, 0.3, 0.5, 0.9):
        below = (u < normal.icdf(torch.tensor(share, dtype=torch.float64))).double().mean().item()
        assert below == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / count))


@torch.no_grad()
def explored(env_id, lasting_noise, progress=0.0):
    """The actions of two fragments of 30 steps of 40 environments, and the policies that acted at each step."""
    torch.manual_seed(0)
    world = envs.make_vec(env_id, 40, 0)
    agent = Agent(Args(lasting_noise=lasting_noise), world)
    fragment = envs.make_fragment(world, 30)
    generator = torch.Generator().manual_seed(0)
    observations, _ = world.reset(seed=0)
    for _ in range(2):
        observations = async_ppo.collect(agent, world, observations, generator, fragment, progress)
        policies = [agent.get_policy(torch.from_numpy(obs)) for obs in fragment["obs"][:-1]]
        actions = torch.from_numpy(fragment["actions"])
        for step, policy in enumerate(policies):
            torch.testing.assert_close(policy.log_prob(actions[step]), torch.from_numpy(fragment["logprobs"][step]))
        yield actions, policies
    world.close()


@pytest.mark.parametrize(("progress", "count"), [(0.0, 10), (0.5, 5), (0.99, 1)])  # of 40; 9.2, 4.6, 0.1 rounded up
def test_noise_lasts_in_its_share_of_the_environments_and_begins_anew_with_every_fragment(progress, count):
    generator = torch.Generator().manual_seed(0)
    for actions, policies in explored("Pendulum-v1", lasting_noise=0.23, progress=progress):
        lasting = torch.randn(count, 1, generator=generator)
        for taken, policy in zip(actions, policies, strict=True):
            noise = torch.randn(40, 1, generator=generator)
            noise[:count] = lasting
            torch.testing.assert_close(taken, policy.mean + policy.logstd.exp() * noise)
            lasting = 0.9 * lasting + math.sqrt(1 - 0.9**2) * torch.randn(count, 1, generator=generator)


def test_an_actor_s_progress_is_that_of_the_policy_that_acts(monkeypatch):
    seen = []
    monkeypatch.setattr(async_ppo, "collect", lambda *arguments: seen.append(arguments[-1]))
    published = SimpleNamespace(read=lambda weights: next(versions), stage=0)
    args = Args(env_id="Pendulum-v1", num_envs=4, num_actors=2, num_steps=6)
    versions = iter((0, 3, 7))
    assert list(act(args, 8, 1, [None] * 3, published)) == [0, 3, 7]
    assert seen == [0, 3 / 8, 7 / 8]


@pytest.mark.parametrize(("env_id", "share"), [("Pendulum-v1", 0.0), ("CartPole-v1", 1.0)])
def test_other_noise_is_the_policy_s_own_and_that_of_discrete_actions_always_is(env_id, share):
    generator = torch.Generator().manual_seed(0)
    for actions, policies in explored(env_id, lasting_noise=share):
        for taken, policy in zip(actions, policies, strict=True):
            torch.testing.assert_close(policy.sample(generator), taken)


class Spaces:
    def __init__(self, action_space, obs_dim=3):
        self.single_observation_space = gym.spaces.Box(-9, 9, (obs_dim,), np.float32)
        self.single_action_space = action_space


@settings(deadline=None, derandomize=True, max_examples=200)
@given(low=st.floats(-100, 100, width=32), width=st.floats(0.125, 100, width=32))
def test_actions_lie_within_the_bounds_of_the_space(low, width):
    space = gym.spaces.Box(np.float32(low), np.float32(low) + np.float32(width), (1,), np.float32)
    policy = Agent(Args(), Spaces(space)).get_policy(torch.zeros(5, 3))
    u = torch.tensor([[-torch.inf], [-50.0], [0.0], [50.0], [torch.inf]])
    actions = policy.squash(u).detach().numpy()
    assert all(space.contains(action) for action in actions), (actions, space)
    np.testing.assert_allclose(actions[[0, -1], 0], [space.low[0], space.high[0]], rtol=1e-6, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Novelty
# ----------------------------------------------------------------------------------------------------------------------


def test_running_stats_are_the_mean_and_variance_of_all_rows():
    rng, stats, seen = np.random.default_rng(0), RunningStats(3), np.empty((0, 3))
    for rows in (1, 7, 300, 2, 64):
        new = rng.normal((0.0, 1e4, -3e5), (1.0, 0.5, 100.0), (rows, 3)) * rng.uniform(0.5, 2)
        stats.update(torch.from_numpy(new), 1)
        seen = np.concatenate([seen, new])
        np.testing.assert_allclose(stats.mean.numpy(), seen.mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(stats.var.numpy(), seen.var(0), rtol=1e-9, atol=1e-6)
        np.testing.assert_allclose(stats.std().numpy(), np.maximum(seen.std(0), 1e-4), rtol=1e-3)
        assert stats.count == len(seen)


def test_novelty_wears_off_where_it_was_trained_and_not_elsewhere():
    torch.manual_seed(0)
    novelty, (here, there) = Novelty(8, 32), torch.randn(2, 200, 8)
    here[:, 4:], there[:, :4] = 0, 0  # two planes
    stats = RunningStats(8)
    stats.update(torch.cat([here, there]), 1)
    before = [novelty(x, stats).mean().item() for x in (here, there)]
    target = [parameter.clone() for parameter in novelty.target.parameters()]
    optimizer = torch.optim.Adam(filter(lambda p: p.requires_grad, novelty.parameters()), lr=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        novelty(here, stats).mean().backward()
        optimizer.step()
    after = [novelty(x, stats).mean().item() for x in (here, there)]
    assert after[0] < 0.1 * before[0] and after[1] > 0.5 * before[1]
    assert all(map(torch.equal, target, novelty.target.parameters()))


def test_the_deviation_is_that_of_discounted_sums_that_each_actor_carries_on_and_dones_end():
    torch.manual_seed(0)
    stats, sums, gamma = async_ppo.RunningStats(2), torch.zeros(3, 2, 2), torch.tensor([0.9, 0.5])
    carried, seen = np.zeros((3, 2, 2)), []
    for owners in ((0, 1, 2), (2, 0, 1), (1, 1, 1), (0, 2, 0), (0, 1, 2)):  # a fast one may fill several in a batch
        rewards, dones = torch.randn(5, 6, 2) + 1, (torch.rand(5, 6, 2) < 0.3).float()  # two environments to an actor
        dones[..., 1] = 0
        async_ppo.update_return_stats(stats, rewards, dones, sums, owners, gamma, 1)
        for column, actor in enumerate(owners):
            for t in range(5):
                own = slice(2 * column, 2 * column + 2)
                carried[actor] = gamma.numpy() * carried[actor] + rewards[t, own].numpy()
                seen.extend(carried[actor].copy())
                carried[actor][dones[t, own].numpy() == 1] = 0
        np.testing.assert_allclose(stats.std().numpy(), np.std(seen, axis=0), rtol=1e-4)
        np.testing.assert_allclose(sums.numpy(), carried, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Actors
# ----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def acting(num_actors, max_lag, seed=0, **env_kwargs):
    args = Args(env_id=PACED_ID, env_kwargs=env_kwargs, num_envs=2 * num_actors, num_actors=num_actors, num_steps=6)
    args.norm_obs = True
    torch.manual_seed(seed)
    world = envs.make_vec(PACED_ID, 2, 0)
    agent = Agent(args, world)
    make_buffer = partial(envs.make_fragment, world, args.num_steps)
    make_seed = partial(envs.make_seed, seed)
    actors = envs.StreamPool(partial(act, args, 100), num_actors, make_buffer, max_lag, make_seed)
    actors.start(as_vector(agent).numpy(), 0)
    try:
        yield agent, actors
    finally:
        actors.close()
    assert not any(process.is_alive() for process in actors.processes.values())


def take(actors, count):
    """[(actor, fragment, lag)], as `StreamPool.take` has them."""
    return list(zip(*actors.take(count), strict=True))


def as_vector(agent):
    return torch.nn.utils.parameters_to_vector(agent.parameters()).detach()


def learn(agent, actors, version):
    """What an update is to the actors."""
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
        agent.obs_std.clamp_(min=0.3)
    actors.publish(as_vector(agent).numpy(), version)
    actors.release()


@pytest.mark.parametrize("max_lag", [0, 1, 3])
@settings(deadline=None, derandomize=True, max_examples=4, phases=[Phase.generate])
@given(seed=st.integers(0, 99), pause=st.floats(0, 0.002), slow_pause=st.floats(0, 0.02))
def test_whatever_the_delays_a_fragment_is_of_the_policy_it_says_and_that_is_not_older_than_max_lag(
    max_lag, seed, pause, slow_pause
):
    with acting(3, max_lag, seed, pause=pause, slow_pause=slow_pause) as (agent, actors):
        versions, last = [as_vector(agent)], {}
        for version in range(1, 16):
            taken = take(actors, 3)
            held = [{name: array.copy() for name, array in fragment.items()} for _, fragment, _ in taken]
            assert len(taken) == 3
            for owner, fragment, lag in taken:
                assert 0 <= lag <= max_lag
                torch.nn.utils.vector_to_parameters(versions[version - 1 - lag], agent.parameters())
                with torch.no_grad():
                    policy = agent.get_policy(torch.from_numpy(fragment["obs"][:-1]))
                logprobs = policy.log_prob(torch.from_numpy(fragment["actions"])).numpy()
                np.testing.assert_allclose(fragment["logprobs"], logprobs, rtol=1e-4, atol=1e-5)
                if owner in last and not actors.discarded:
                    assert (fragment["obs"][0] == last[owner]).all()  # it goes on where it was
                last[owner] = fragment["obs"][-1].copy()
            torch.nn.utils.vector_to_parameters(versions[-1].clone(), agent.parameters())
            time.sleep(0.002)
            for (_, fragment, _), copies in zip(taken, held, strict=True):  # nobody writes into what was not released
                assert all((fragment[name] == copies[name]).all() for name in copies)
            learn(agent, actors, version)
            versions.append(as_vector(agent))


def test_actors_live_in_worlds_of_their_own_and_draw_actions_of_their_own():
    with acting(3, 0) as (_, actors):
        taken = take(actors, 3)
        for name in ("obs", "actions"):
            arrays = [fragment[name].tobytes() for _, fragment, _ in taken]
            assert len(set(arrays)) == 3
    with acting(3, 0) as (_, actors):
        again = {owner: fragment["obs"].copy() for owner, fragment, _ in take(actors, 3)}
    assert all((again[owner] == fragment["obs"]).all() for owner, fragment, _ in taken)  # that depend on the seed
    with acting(1, 0, 1) as (_, actors):
        assert not (take(actors, 1)[0][1]["obs"] == again[0]).all()


@pytest.mark.parametrize("max_lag", [0, 1])
def test_who_replaces_a_dead_actor_gets_its_free_fragments_and_a_world_of_its_own(capsys, max_lag):
    with acting(2, max_lag) as (agent, actors):
        before, later = {fragment["obs"][0].tobytes() for _, fragment, _ in take(actors, 2)}, []
        dead = actors.processes[0]
        os.kill(dead.pid, signal.SIGKILL)
        dead.join()
        learn(agent, actors, 1)
        for version in range(2, 10):
            taken = take(actors, 2)
            assert taken[0][1] is not taken[1][1]  # no fragment is in two hands
            later += [(owner, fragment["obs"][0].tobytes()) for owner, fragment, _ in taken]
            learn(agent, actors, version)
        assert actors.processes[0].pid != dead.pid
        assert max_lag > 0 or [owner for owner, _ in later].count(0) == 8
        assert not before & {observations for _, observations in later}
    assert f"worker process {dead.pid} died, with exit code -9" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs: the algorithm
# ----------------------------------------------------------------------------------------------------------------------

WATCH = (
    QUICK
    + """
import sys, torch
names = "obs final_obs actions logprobs terminations truncations".split()
trained_on = "obs actions old_logprobs lag_ratios advantages returns values".split()  # the parts of batch
seen = []

def watch(frame, event, result):
    if frame.f_code.co_name == "average" and event == "call" and seen:
        script, gradient = frame.f_back.f_globals, frame.f_locals["tensor"]
        if script.get("weights") is not None and gradient is script["weights"].grad:
            parts = script["agent"].novelty.predictor, script["agent"].critic, script["agent"].novelty.target
            learns = [any(p.grad.any().item() for p in part.parameters()) for part in parts]
            learns += [bool(script["agent"].obs_mean.grad.any()), bool(script["agent"].obs_std.grad.any())]
            seen[-1].setdefault("learns", []).append(learns)
    if frame.f_code.co_name == "compute_gae" and event in ("call", "return"):
        script = frame.f_back.f_globals
        if event == "call":
            batch = {name: x.clone() for name, x in frame.f_locals.items() if torch.is_tensor(x)}
            batch |= {name: script["data"][name].clone() for name in names}
            batch["next_obs"] = script["next_obs"].clone()
            batch["env_rewards"] = torch.from_numpy(script["fragments"][0]["rewards"]).clone()
            with torch.no_grad():
                batch["final"] = script["agent"].get_value(batch["final_obs"])
                batch["new_logprobs"] = script["agent"].get_policy(batch["obs"][:-1]).log_prob(batch["actions"])
                batch["errors"] = script["agent"].novelty(script["next_obs"], script["agent"].obs_stats)
            batch["return_std"] = script["agent"].return_stats.std()
            batch["obs_stats"] = {name: x.clone() for name, x in script["agent"].obs_stats.state_dict().items()}
            batch["in_use"] = script["agent"].obs_mean.clone(), script["agent"].obs_std.clone()
            if seen:
                seen[-1] |= {f"b_{name}": x.clone() for name, x in zip(trained_on, script["batch"], strict=True)}
            seen.append(batch)
            torch.save(seen, "seen.pt")
            if len(seen) == 4:
                raise SystemExit
        else:
            seen[-1]["advantages"], seen[-1]["returns"] = (x.clone() for x in result)

sys.setprofile(watch)
"""
)


@pytest.fixture(scope="module", params=[False, True], ids=["rewards as they are", "rewards normalised"])
def watched(nursery, tmp_path_factory, request):
    """What went into compute_gae and what came of it, in three updates of a run in a world where much ends."""
    cwd = tmp_path_factory.mktemp("watched")
    shutil.copy(Path(sys.path[0]) / "paced_world.py", cwd)
    args = ASYNC | dict(env_id=PACED_ID, num_actors=1, max_lag=1, rnd_coef=0.5, gamma=0.9, rnd_gamma=0.7, vtrace=True)
    result = nursery.run_one(
        cwd,
        probe=WATCH,
        **args | dict(learning_rate=0.05, norm_obs=True, norm_reward=request.param, reward_scale=0.3),
    )
    assert (cwd / "seen.pt").exists(), result.output
    return [batch | {"norm_reward": request.param} for batch in torch.load(cwd / "seen.pt")[:3]]


def test_the_run_bootstraps_what_was_cut_off_and_nothing_that_terminated(watched):
    kinds = set()
    for batch in watched:
        for t, env in np.ndindex(NUM_STEPS, NUM_ENVS):
            terminated, truncated = bool(batch["terminations"][t, env]), bool(batch["truncations"][t, env])
            kinds.add((terminated, truncated))
            assert batch["dones"][t, env].tolist() == [float(terminated or truncated), 0.0]
            if truncated and not terminated:
                torch.testing.assert_close(batch["final_values"][t, env], batch["final"][t, env])
            else:
                assert (batch["final_values"][t, env] == 0).all()
    assert len(kinds) == 4


def test_the_run_gives_each_head_its_rewards_and_its_discount_and_cuts_the_ratios(watched):
    for batch in watched:
        torch.testing.assert_close(batch["gamma"], torch.tensor([0.9, 0.7]))
        expected = 0.3 * batch["env_rewards"]
        if batch["norm_reward"]:
            expected = (expected / batch["return_std"][0]).clamp(-10, 10)
        torch.testing.assert_close(batch["rewards"][..., 0], expected)
        torch.testing.assert_close(batch["rewards"][..., 1], batch["errors"] / batch["return_std"][1])
        ended = batch["terminations"] | batch["truncations"]
        assert torch.equal(batch["next_obs"][ended], batch["final_obs"][ended])
        assert (batch["final_obs"][ended] != 0).all() and (batch["final_obs"] != batch["obs"][1:])[ended].all()
        assert torch.equal(batch["next_obs"][~ended], batch["obs"][1:][~ended])
        ratios = (batch["new_logprobs"] - batch["logprobs"]).exp()
        torch.testing.assert_close(batch["rho"][..., 0], ratios.clamp(max=1))
    assert ratios.max() > 1 and ratios.min() < 0.99  # with a lag, which the first update cannot have


def test_the_run_trains_on_the_weighted_advantages_and_the_returns(watched):
    for batch in watched:
        advantages = batch["advantages"][..., 0] + 0.5 * batch["advantages"][..., 1]
        torch.testing.assert_close(batch["b_advantages"], advantages.flatten())
        torch.testing.assert_close(batch["b_returns"], batch["returns"].flatten(0, 1))


def test_the_update_begins_at_a_ratio_of_1_and_is_weighted_by_the_ratio_to_the_policy_that_acted(watched):
    for batch in watched:
        torch.testing.assert_close(batch["b_old_logprobs"], batch["new_logprobs"].flatten())
        ratios = (batch["new_logprobs"] - batch["logprobs"]).exp()
        torch.testing.assert_close(batch["b_lag_ratios"], ratios.flatten())
    first, *later = ((batch["b_lag_ratios"] - 1).abs().max() for batch in watched)
    assert first < 1e-6 and min(later) > 1e-2  # the first update learns from the policy that it starts with


def test_the_run_normalises_by_the_mean_and_deviation_of_all_observations_up_to_the_last_update(watched):
    seen, (mean, std) = np.empty((0, 3)), (np.zeros(3), np.ones(3))
    for batch in watched:
        for used, expected in zip(batch["in_use"], (mean, std), strict=True):
            np.testing.assert_allclose(used.numpy(), expected, rtol=1e-5, atol=1e-6)
        seen = np.concatenate([seen, batch["next_obs"].flatten(0, 1).numpy().astype(float)])
        mean, std = seen.mean(0), seen.std(0)
        np.testing.assert_allclose(batch["obs_stats"]["mean"].numpy(), mean, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(batch["obs_stats"]["var"].numpy(), std**2, rtol=1e-9)
        assert batch["obs_stats"]["count"] == len(seen)


def test_the_predictor_learns_once_a_batch_and_the_random_network_and_the_statistics_never(watched):
    for batch in watched:  # two epochs of two minibatches
        predictor, critic, *others = zip(*batch["learns"], strict=True)
        assert predictor == (True, True, False, False) and all(critic) and not np.any(others)


def test_networks_see_the_deviations_from_the_mean_and_no_outliers():
    agent = Agent(Args(norm_obs=True), Spaces(gym.spaces.Discrete(2)))
    agent.obs_mean.copy_(torch.tensor([1.0, -2.0, 0.0]))
    agent.obs_std.copy_(torch.tensor([0.5, 4.0, 1e-4]))
    obs, seen = torch.tensor([[2.0, 2.0, 1.0]]), torch.tensor([[2.0, 1.0, 10.0]])
    assert torch.equal(agent.get_value(obs), agent.critic(seen))
    assert torch.equal(agent.get_policy(obs).logprobs, agent.actor(seen).log_softmax(-1))
    agent.norm_obs = False
    assert torch.equal(agent.get_value(obs), agent.critic(obs))
    assert torch.equal(agent.get_policy(obs).logprobs, agent.actor(obs).log_softmax(-1))


ALIKE = {
    "discrete": dict(env_id="CartPole-v1"),
    "discrete, V-trace and novelty": dict(env_id="CartPole-v1", vtrace=True, rnd_coef=0.5),
    "continuous, observations normalised": dict(
        env_id="Pendulum-v1", env_kwargs=dict(max_episode_steps=30), norm_obs=True
    ),
    "continuous, V-trace": dict(env_id="Pendulum-v1", env_kwargs=dict(max_episode_steps=30), vtrace=True),
    "discrete, rewards normalised": dict(env_id="CartPole-v1", norm_reward=True),
    "continuous, noise that lasts": dict(
        env_id="Pendulum-v1", env_kwargs=dict(max_episode_steps=30), lasting_noise=1.0
    ),
}


@pytest.fixture(scope="module")
def alike(nursery, tmp_path_factory):
    """{name: a run with an actor that may not lag, a synchronous one}."""
    cwd, jobs = tmp_path_factory.mktemp("alike"), []
    for name, args in ALIKE.items():
        for num_actors in (1, 0):
            change = args | dict(num_actors=num_actors, max_lag=0, total_timesteps=12 * PER_UPDATE)
            jobs.append((cwd / f"{name}-{num_actors}", ASYNC | change))
    results = nursery.run(*jobs, probe=QUICK)
    return dict(zip(ALIKE, zip(results[::2], results[1::2], strict=True), strict=True))


@pytest.mark.parametrize("name", ALIKE)
def test_one_actor_that_may_not_lag_is_the_synchronous_algorithm_bit_for_bit(alike, name):
    actor, synchronous = alike[name]
    assert [actor.code, synchronous.code] == [0, 0], actor.output + synchronous.output
    assert_same_weights(actor.folder / "model.pt", synchronous.folder / "model.pt")
    losses = [
        {tag: points for tag, points in curves(run.folder).items() if tag.startswith("losses/")}
        for run in (actor, synchronous)
    ]
    assert losses[0] == losses[1] and len(losses[0]["losses/value_loss"]) == 12
    if "continuous" in name:
        assert "losses/std" in losses[0]
    weights = saved(actor.folder / "model.pt")["model"]
    assert weights["obs_stats.count"] == 12 * PER_UPDATE * ("novelty" in name or "observations" in name)
    assert weights.get("return_stats.count", 0) == 12 * PER_UPDATE * ("novelty" in name or "rewards" in name)
    mean, std = (weights["obs_stats.mean"], weights["obs_stats.var"].sqrt()) if "observations" in name else (0, 1)
    torch.testing.assert_close(weights["obs_mean"], torch.zeros_like(weights["obs_mean"]) + mean, check_dtype=False)
    torch.testing.assert_close(weights["obs_std"], torch.zeros_like(weights["obs_std"]) + std, check_dtype=False)


@pytest.fixture(scope="module")
def finished(nursery, tmp_path_factory):
    """Synchronous runs with everything that has a state: a whole one, and short ones that differ in one respect."""
    cwd, brief = tmp_path_factory.mktemp("finished"), SYNC | dict(total_timesteps=8 * PER_UPDATE, gae_lambda=0.8)
    changes = dict(first={}, second={}, workers=dict(num_workers=2), seed=dict(seed=2))
    shorter = nursery.run(*((cwd / name, brief | change) for name, change in changes.items()), probe=QUICK)
    whole = nursery.run_one(cwd / "whole", pictures=True, **SYNC)
    for run in (whole, *shorter):
        assert run.code == 0, run.output
    return dict(zip(changes, shorter, strict=True)) | dict(whole=whole)


@pytest.mark.parametrize("other", ["second", "workers"])
def test_the_same_seed_gives_identical_weights_and_curves_with_any_number_of_workers(finished, other):
    assert_same_weights(finished["first"].folder / "model.pt", finished[other].folder / "model.pt")
    assert_same_curves(finished["first"].folder, finished[other].folder)


def test_another_seed_gives_other_weights(finished):
    assert_other_weights(finished["first"].folder / "model.pt", finished["seed"].folder / "model.pt")


@pytest.fixture(scope="module")
def ratios(nursery, tmp_path_factory):
    cwd, read = tmp_path_factory.mktemp("ratios"), {}
    args = ASYNC | dict(num_actors=0, num_minibatches=4, update_epochs=2, learning_rate=1e-2)
    probe = RATIOS.replace("len(bounds) == 2", "len(bounds) == 2 and bounds[0] > 0")  # not those of observations
    for env_id in ("CartPole-v1", "Pendulum-v1"):
        norm_obs = env_id == "Pendulum-v1"
        result = nursery.run_one(cwd / env_id, probe=probe, **args | dict(env_id=env_id, norm_obs=norm_obs))
        read[env_id] = np.reshape(json.loads((cwd / env_id / "ratios.json").read_text()), (12, 8)), result
    return read


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_without_actors_the_ratio_is_1_on_the_first_minibatch_of_every_update(ratios, env_id):
    found, result = ratios[env_id]
    assert result.code == 0, result.output
    assert found[:, 0].max() <= 1e-6, found[:, 0]
    assert found[:, 1:].min() > 1e-4


def test_target_kl_ends_an_update_before_the_gradient_step_that_goes_too_far(nursery, tmp_path):
    args = ASYNC | dict(total_timesteps=4 * PER_UPDATE, target_kl=1e-7, update_epochs=3, num_actors=0)
    result = nursery.run_one(tmp_path, probe=QUICK + RATIOS, **args)
    assert result.code == 0, result.output
    ratios = json.loads((tmp_path / "ratios.json").read_text())
    assert len(ratios) == 8 and max(ratios[::2]) <= 1e-6 < min(ratios[1::2])


@pytest.fixture(scope="module")
def lagging(nursery, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("lagging")
    (cwd / "paced_world.py").write_text(PACED)
    # All equally fast: a second fragment begins when the first is sent, before the update that learns from the first.
    # With slow ones among them, all of theirs may be too old, while the fast ones begin anew after every update.
    args = SLOWED | dict(num_actors=4, env_kwargs=dict(pause=0.0003))
    runs = nursery.run(*((cwd / str(lag), args | dict(max_lag=lag)) for lag in (0, 1, 3)), probe=path_to(cwd) + QUICK)
    for run in runs:
        assert run.code == 0, run.output
    return {lag: curves(run.folder) for lag, run in zip((0, 1, 3), runs, strict=True)}


def path_to(folder):
    return f"import sys\nsys.path.insert(0, {str(folder)!r})\n"


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_no_update_of_a_run_learns_from_a_policy_older_than_max_lag(lagging, max_lag):
    read = lagging[max_lag]
    assert len(read["charts/lag_max"]) == 40
    assert max(value for _, value in read["charts/lag_max"]) <= max_lag
    assert max_lag == 0 or max(value for _, value in read["charts/lag_max"]) >= 1


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_tensorboard_says_how_the_run_went(lagging, max_lag):
    read = {tag: [value for _, value in points] for tag, points in lagging[max_lag].items()}
    assert all(0 <= value <= 1 for value in read["charts/rollout_share"]) and max(read["charts/rollout_share"]) > 0
    assert min(read["charts/SPS"]) > 0 and len(read["charts/episodic_return"]) > 30
    assert all(map(float.__le__, read["charts/lag_mean"], read["charts/lag_max"]))
    assert read["charts/discarded"] == sorted(read["charts/discarded"])
    assert [step for step, _ in lagging[max_lag]["losses/policy_loss"]] == [PER_UPDATE * n for n in range(1, 41)]
    assert all(math.isfinite(value) for values in read.values() for value in values)
    rates = np.array(read["charts/learning_rate"])
    np.testing.assert_allclose(rates, 1e-3 * (1 - np.arange(40) / 40), rtol=1e-5)


def test_it_learns_cartpole_by_itself(nursery, tmp_path):
    args = dict(total_timesteps=25_000, num_envs=8, eval_episodes=20, eval_every=10**9)
    result = nursery.run_one(tmp_path, probe=QUICK, **args | dict(env_kwargs=dict(max_episode_steps=200)))
    assert result.code == 0, result.output
    assert curves(result.folder)["eval/r"][-1][1] > 80  # random: 22


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs: deaths, signals and what they leave
# ----------------------------------------------------------------------------------------------------------------------


def started(nursery, cwd, args=SLOWED):
    (cwd / "paced_world.py").write_text(PACED)
    return nursery.start(cwd, args, probe=path_to(cwd) + QUICK)


def gone_on(nursery, cwd, args=SLOWED):
    """The same command again, to the end."""
    result = nursery.run_one(cwd, probe=path_to(cwd) + QUICK, **args)
    assert result.code == 0 and "resumed at" in result.output, result.output
    return result


def actors_of(run):
    """The actors once they have brought something."""
    run.wait_for("*/checkpoint.pt")
    return children(run.process.pid)


def steps_of(folder):
    return [step for step, _ in curves(folder)["losses/value_loss"]]


ALL_STEPS = [PER_UPDATE * n for n in range(1, 41)]


def test_a_killed_actor_is_replaced_with_a_line_and_the_run_finishes(nursery, tmp_path):
    with started(nursery, tmp_path) as run:
        first, second = actors_of(run)
        os.kill(first, signal.SIGKILL)
        run.wait_until(lambda: len(set(children(run.process.pid)) - {first}) == 2, "another actor")
        last = children(run.process.pid)
        result = run.finish()
    assert result.code == 0, result.output
    lost = "what it was filling is lost, another takes its place"
    assert f"worker process {first} died, with exit code -9: {lost}" in result.output
    assert steps_of(result.folder) == ALL_STEPS
    assert second in last and not any(map(alive, last))


def test_three_deaths_end_the_run_with_a_checkpoint_of_all_that_it_did_from_which_it_goes_on(nursery, tmp_path):
    args = SLOWED | dict(checkpoint_every=10 * PER_UPDATE, env_kwargs=dict(pause=0.002))
    with started(nursery, tmp_path, args) as run:
        seen = set(actors_of(run))
        time.sleep(0.3)  # some updates more
        for deaths in range(3):
            gone = children(run.process.pid)[0]
            os.kill(gone, signal.SIGKILL)
            if deaths < 2:
                run.wait_until(lambda gone=gone: len(set(children(run.process.pid)) - {gone}) == 2, "another actor")
                seen |= set(children(run.process.pid))
        ended = run.finish()
    error = error_of(ended.output)
    assert ended.code == 1 and error.startswith("RuntimeError: worker process") and "3 within 60 seconds" in error
    assert_soon_gone(seen)
    iteration, rest = divmod(saved(ended.folder / "checkpoint.pt")["step"], PER_UPDATE)
    assert rest == 0
    assert iteration >= 10 and steps_of(ended.folder) == ALL_STEPS[:iteration]
    assert steps_of(gone_on(nursery, tmp_path, args).folder) == ALL_STEPS


def test_after_kill_9_of_the_learner_the_folder_is_free_at_once_and_the_actors_are_soon_gone(nursery, tmp_path):
    with started(nursery, tmp_path) as run:
        pids = actors_of(run)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # so that they outlive the learner for sure
        os.kill(run.process.pid, signal.SIGKILL)
        run.process.wait()
        # Linux wakes stopped process groups that nobody is left to wake, and hangs them up: gone at once, or stopped.
        try:
            assert steps_of(gone_on(nursery, tmp_path).folder) == ALL_STEPS
        finally:
            for pid in filter(alive, pids):
                os.kill(pid, signal.SIGCONT)
        assert_soon_gone(pids)


def test_actors_notice_the_learners_death_in_the_middle_of_a_long_fragment(nursery, tmp_path):
    with started(nursery, tmp_path, SLOWED | dict(env_kwargs=dict(pause=1.0), checkpoint_every=10**9)) as run:
        run.wait_until(lambda: len(children(run.process.pid)) == 2, "actors")
        time.sleep(0.5)  # a fragment takes half a minute
        pids = children(run.process.pid)
        os.kill(run.process.pid, signal.SIGKILL)
        assert len(pids) == 2
        assert_soon_gone(pids)


def test_signals_stop_an_asynchronous_run_and_the_same_command_goes_on_in_other_worlds(nursery, tmp_path):
    args = SLOWED | dict(env_kwargs=dict(pause=0.001, note_seeds=True), eval_env_kwargs=dict(note_seeds=False))
    for number, to_all in ((signal.SIGINT, True), (signal.SIGTERM, False)):
        with started(nursery, tmp_path, args) as run:
            folder = run.wait_for("*/checkpoint.pt").parent
            run.wait_until(replaced(folder, 3), "checkpoints")
            pids = children(run.process.pid)
            run.kill(number) if to_all else os.kill(run.process.pid, number)
            stopped = run.finish()
        assert stopped.code == 0 and "goes on from there" in stopped.output, stopped.output
        assert "Traceback" not in stopped.output
        assert len(pids) == 2 and not any(map(alive, pids))
    steps = steps_of(folder)
    assert steps == ALL_STEPS[: len(steps)] and len(steps) < 40
    found = saved(folder / "checkpoint.pt")
    torch.save({"args": found["args"], "model": found["model"], "score": math.inf}, folder / "model.pt")
    result = gone_on(nursery, tmp_path, args)
    assert saved(result.folder / "model.pt")["score"] == math.inf  # as if found after the checkpoint: it must stay
    assert f"resumed at {steps[-1]:,}" in result.output
    assert steps_of(result.folder) == ALL_STEPS
    assert contents(result.folder)[-1] == "model.pt"
    seeds = (tmp_path / "seeds.txt").read_text().split()
    assert len(seeds) == len(set(seeds)) == 3 * NUM_ENVS  # or the actors would live through the same again
    assert (tmp_path / "closed.txt").read_text().split() == ["closed"] * 3 * NUM_ENVS


def test_a_run_without_actors_that_cannot_repeat_itself_keeps_a_better_model(nursery, tmp_path):
    args = SLOWED | dict(num_actors=0, num_workers=2)
    with started(nursery, tmp_path, args) as run:
        folder = run.wait_for("*/checkpoint.pt").parent
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.finish().code == 0
    found = saved(folder / "checkpoint.pt")
    torch.save({"args": found["args"], "model": found["model"], "score": math.inf}, folder / "model.pt")
    result = gone_on(nursery, tmp_path, args)
    assert "resumed at" in result.output and result.folder == folder
    assert saved(folder / "model.pt")["score"] == math.inf


def test_a_synchronous_run_killed_twice_ends_with_identical_weights_and_curves(nursery, finished, tmp_path):
    for times in (0, 2):
        with nursery.start(tmp_path, SYNC) as run:
            folder = run.wait_for("*/checkpoint.pt").parent
            run.wait_until(replaced(folder, times), "checkpoints")
            run.kill(signal.SIGKILL)
            run.finish()
    result = nursery.run_one(tmp_path, probe=QUICK, **SYNC)
    assert result.code == 0 and "resumed at" in result.output, result.output
    assert_same_weights(result.folder / "model.pt", finished["whole"].folder / "model.pt")
    whole = reproducible(curves(finished["whole"].folder))
    assert reproducible(curves(result.folder)) == {tag: points for tag, points in whole.items() if "test/" not in tag}


def test_an_environment_that_raises_is_shown_with_its_own_traceback_and_leaves_no_process(nursery, tmp_path):
    with started(nursery, tmp_path, SLOWED | dict(env_kwargs=dict(pause=0.001, fail_at=100))) as run:
        pids = actors_of(run)
        result = run.finish()
    assert result.code == 1 and error_of(result.output).startswith("ArithmeticError: the moon is made of cheese")
    assert result.output.count("Traceback") == 2 and re.search(r"RuntimeError: worker [01] failed", result.output)
    assert 'raise ArithmeticError("the moon is made of cheese")' in result.output
    assert len(pids) == 2 and not any(map(alive, pids))
    assert (result.folder / "checkpoint.pt").exists()


ONE_PROCESS = (
    QUICK
    + """
import contextlib, gc, json, os, runpy, signal, sys

def held():
    gc.collect()
    descriptors = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # of the one that lists them
            descriptors.append(os.readlink(f"/proc/self/fd/{number}"))
    with open("/proc/self/maps") as maps, open("/proc/self/task/%d/children" % os.getpid()) as children:
        shared = sum("/dev/zero" in line for line in maps)
        return sorted(descriptors), shared, children.read(), len(os.listdir("/proc/self/task"))

def run(seed):
    sys.argv = [*ARGV, "--seed", str(seed)]
    runpy.run_path(SCRIPT, run_name="__main__")

def stop(self, step, scalars):
    log(self, step, scalars)
    if step == 3 * PER_UPDATE:
        os.kill(os.getpid(), signal.SIGTERM)

ARGV, found, log = [SCRIPT, *sys.argv[1:]], [], envs.Run.log
for seed in range(5):
    run(seed)
    found.append(held())
envs.Run.log = stop
run(5)
found.append(held())
envs.Run.log = log
run(5)
found.append(held())
json.dump(found, open("found.json", "w"))
"""
)


def test_runs_in_one_process_leave_nothing_in_it_and_a_stopped_one_goes_on_there(nursery, tmp_path):
    names = f"SCRIPT, PER_UPDATE = {str(SCRIPT)!r}, {PER_UPDATE}\n"
    (tmp_path / "one_process.py").write_text(names + ONE_PROCESS)
    result = nursery.run_one(tmp_path, script=tmp_path / "one_process.py", **ASYNC)
    assert result.code == 0, result.output
    first, *later = json.loads((tmp_path / "found.json").read_text())
    assert later == [first] * 6 and first[1:3] == [0, ""]
    assert f"stopped at {3 * PER_UPDATE:,}" in result.output and f"resumed at {3 * PER_UPDATE:,}" in result.output
    assert len(folders(tmp_path)) == 6
    assert all(steps_of(folder) == ALL_STEPS for folder in folders(tmp_path))


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(finished, tmp_path_factory):
    return Path(shutil.copy(finished["whole"].folder / "model.pt", tmp_path_factory.mktemp("model")))


def test_a_run_leaves_its_events_model_plot_and_video_and_nothing_else(finished):
    run = finished["whole"]
    assert [name.split(".")[0] for name in contents(run.folder)] == ["eval", "eval", "events", "model"]
    assert "Warning" not in run.output
    assert list(table(run.output))[1:] == ["async_ppo", "sampled", "heuristic", "random"]


def test_in_a_world_that_draws_no_pictures_policies_are_compared_without_a_video(capsys, tmp_path):
    policy = Agent(Args(), envs.make_vec(PACED_ID, 1, 0)).make_policy
    scores, printed = envs.compare({"mine": policy}, PACED_ID, 3, 0, tmp_path)
    assert list(scores) == list(table(printed))[1:] == ["mine", "random"]
    envs.film({"mine": policy}, PACED_ID, 0, tmp_path / "eval.mp4")
    assert f"no eval.mp4: {PACED_ID} draws no pictures" in capsys.readouterr().out
    assert contents(tmp_path) == ["eval.png"]


def test_the_model_holds_what_measures_novelty(model):
    weights = saved(model)["model"]
    assert {"novelty.target.0.weight", "novelty.predictor.0.weight"} <= weights.keys()
    assert weights["obs_stats.count"] == weights["return_stats.count"] == 40 * PER_UPDATE
    assert weights["critic.4.weight"].shape[0] == 2
    torch.manual_seed(1)
    first = Agent(Args(rnd_coef=0.5), envs.make_vec("DenseLunarLander", 1)).state_dict()
    for name in ("novelty.target.0.weight", "novelty.predictor.0.weight", "actor.0.weight", "critic.0.weight"):
        assert torch.equal(first[name], weights[name]) == ("target" in name)  # which is all that does not learn


def test_evaluate_prints_the_table_of_the_run_again_and_judges_elsewhere(nursery, finished, model, tmp_path):
    elsewhere = dict(eval_env_id="LunarLander-v3", eval_env_kwargs=dict(max_episode_steps=40))
    jobs = []
    for name, change in (("again", {}), ("elsewhere", elsewhere), ("trained", dict(env_kwargs=dict(gravity=-9)))):
        (tmp_path / name).mkdir()
        jobs.append((tmp_path / name, dict(evaluate=shutil.copy(model, tmp_path / name)) | change))
    again, other, refused = nursery.run(*jobs)
    assert [again.code, other.code] == [0, 0], again.output + other.output
    assert refused.code == 1 and "env_kwargs is {'gravity': -9}: with evaluate they must be left out" in refused.output
    assert table(again.output) == table(finished["whole"].output)
    assert list(table(other.output))[1:] == ["async_ppo", "sampled", "heuristic", "random"]
    assert table(other.output) != table(again.output)
    (drawn,) = (tmp_path / "again").glob("evaluate-*")
    assert contents(drawn) == ["eval.mp4", "eval.png"] and not folders(tmp_path / "again")


def test_evaluate_takes_the_actions_of_the_world_that_the_model_was_trained_in(nursery, tmp_path):
    args = ASYNC | dict(env_id="DenseLunarLander", env_kwargs=dict(continuous=True, max_steps=30))
    trained = nursery.run_one(tmp_path, **args | dict(total_timesteps=2 * PER_UPDATE))
    assert trained.code == 0, trained.output
    again = nursery.run_one(tmp_path / "again", evaluate=trained.folder / "model.pt")
    assert again.code == 0, again.output
    assert table(again.output) == table(trained.output)


def test_init_from_starts_with_the_weights_of_the_saved_model(nursery, model, tmp_path):
    args = SYNC | dict(num_actors=2, learning_rate=1e-10, init_from=model, total_timesteps=2 * PER_UPDATE)
    result = nursery.run_one(tmp_path, probe=QUICK, **args)
    assert result.code == 0, result.output
    before, after = saved(model)["model"], saved(result.folder / "model.pt")["model"]
    for name in before:
        if "_stats." not in name and name not in ("obs_mean", "obs_std"):
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-7)
    assert after["obs_stats.count"] == before["obs_stats.count"] + 2 * PER_UPDATE


# ----------------------------------------------------------------------------------------------------------------------
# torchrun and the command line
# ----------------------------------------------------------------------------------------------------------------------

RANKS = (
    QUICK
    + """
import hashlib, os, torch
weights, arrays, step, shared_array = [], [], torch.optim.Adam.step, envs.shared_array

def kept(*args):
    arrays.append(shared_array(*args))
    return arrays[-1]

def recorded(self, *args, **kwargs):
    result = step(self, *args, **kwargs)
    weights.append(hashlib.sha256(self.param_groups[0]["params"][0].numpy().tobytes()).hexdigest())
    observations = [torch.from_numpy(array.copy()) for array in arrays if array.shape[1:] == (2, 4)]
    torch.save((weights, observations), f"trace-{os.environ['RANK']}.pt")
    return result

torch.optim.Adam.step, envs.shared_array = recorded, kept
"""
)


def test_torchrun_ranks_agree_on_the_weights_after_every_gradient_step_and_have_actors_of_their_own(nursery, tmp_path):
    args = ASYNC | dict(rnd_coef=0.5, total_timesteps=2 * 6 * PER_UPDATE)
    result, other = nursery.run_ranks(tmp_path, args, probe=RANKS)
    assert [result.code, other.code] == [0, 0], result.output + other.output
    (first, seen), (second, others) = (torch.load(tmp_path / f"trace-{rank}.pt") for rank in range(2))
    assert first == second and len(set(first)) == len(first) == 6 * 4
    assert steps_of(result.folder) == [2 * PER_UPDATE * n for n in range(1, 7)]
    assert saved(result.folder / "model.pt")["model"]["obs_stats.count"] == 2 * 6 * PER_UPDATE
    seen, others = ({tuple(row) for x in xs for row in x.view(-1, 4).tolist() if any(row)} for xs in (seen, others))
    assert len(seen) > PER_UPDATE and not seen & others


def test_the_script_and_envs_alone_in_an_empty_folder_run(tmp_path):
    copy_alone(SCRIPT, tmp_path)
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"}
    args = ASYNC | dict(total_timesteps=3 * PER_UPDATE, eval_env_kwargs=dict(max_episode_steps=20))
    run = subprocess.run(
        [sys.executable, SCRIPT.name, *flags(**args)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "model.pt" in contents(folders(tmp_path)[0])


BAD_ARGUMENTS = {
    **dict.fromkeys(("num_envs", "num_steps", "num_minibatches", "update_epochs"), (0, -3)),
    **dict.fromkeys(("eval_every", "eval_episodes", "checkpoint_every"), (0, -1)),
    **dict.fromkeys(("learning_rate", "clip_coef", "max_grad_norm", "target_kl"), (0.0, -1.0, math.nan)),
    "reward_scale": (0.0, -1.0, math.inf),
    **dict.fromkeys(("ent_coef", "vf_coef", "rnd_coef"), (-0.1, math.inf, math.nan)),
    **dict.fromkeys(("gamma", "gae_lambda", "rnd_gamma"), (-0.1, 1.1, math.nan)),
    "num_actors": (-1, 3, 64),  # of 32 environments
    "num_workers": (1, 2),  # with actors
    "max_lag": (-1,),
    "init_logstd": (-21.0, math.nan),
    "lasting_noise": (-0.1, 1.5, math.nan),
    "hidden_dim": (1,),
    "seed": (-1, 2**32, envs.VALIDATION_SEED),
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD_ARGUMENTS.items() for value in values])
def test_a_bad_argument_is_refused_by_name_with_its_value_and_what_is_allowed(name, value):
    with pytest.raises(ValueError) as caught:
        Args(**{name: value})
    message = str(caught.value)
    assert name in message and str(value) in message and "must" in message


ALLOWED = "must be an environment of one agent, with vector observations and discrete or bounded real actions"
OTHERS = dict(unbounded="Other.*" + ALLOWED, integer="Other.*" + ALLOWED, several="Other.*can be stepped")
OTHERS["matrices of"] = OTHERS["integer"]
BAD_COMMANDS = {
    "total_timesteps": (dict(total_timesteps=PER_UPDATE - 1), f"{PER_UPDATE - 1}"),
    "num_minibatches": (dict(num_minibatches=9), "9.*must divide"),
    "num_minibatches of one": (dict(num_minibatches=PER_UPDATE), f"{PER_UPDATE}.*two steps or more"),
    "num_actors": (dict(num_actors=3), "3.*must divide num_envs, 4"),
    "num_workers with actors": (dict(num_workers=1), "1.*must be 0"),
    "num_workers": (dict(num_actors=0, num_workers=5), "5.*from 0 to 4"),
    "env_id": (dict(env_id="LunarLandr"), "LunarLandr.*must be"),
    "env_id of a swarm": (dict(env_id="Swarm"), f"Swarm.*{ALLOWED}"),
    "env_id with images": (dict(env_id="CarRacing-v3"), f"CarRacing-v3.*{ALLOWED}"),
    **{
        f"env_id with {name} actions": (dict(env_id="paced_world:Other-v0", env_kwargs=dict(kind=kind)), pattern)
        for kind, (name, pattern) in enumerate(OTHERS.items())
    },
    "eval_env_id": (dict(eval_env_id="Pendulum-v1"), "Pendulum-v1.*must observe and act as CartPole-v1"),
    "warp": (dict(env_id="DenseLunarLander", env_kwargs=dict(warp=9)), "9.*no such argument"),
}


@pytest.fixture(scope="module")
def bad_commands(nursery, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("bad")
    (cwd / "paced_world.py").write_text(PACED)
    jobs = [(cwd / name.replace(" ", "-"), ASYNC | change) for name, (change, _) in BAD_COMMANDS.items()]
    return dict(zip(BAD_COMMANDS, nursery.run(*jobs, probe=path_to(cwd)), strict=True))


@pytest.mark.parametrize("name", BAD_COMMANDS)
def test_a_bad_command_is_refused_by_name_before_anything_starts(bad_commands, name):
    result, pattern = bad_commands[name], BAD_COMMANDS[name][1]
    error = error_of(result.output) or " ".join(re.sub("[│╭╰╮╯─]", " ", result.output).split())
    assert result.code != 0 and re.search(f"{name.split()[0]} is .*{pattern}", error), result.output
    assert not (result.cwd / "runs").exists()


def test_help_explains_every_argument():
    text = subprocess.run(
        [sys.executable, SCRIPT, "--help"], env=ENVIRONMENT | {"COLUMNS": "120"}, capture_output=True, text=True
    ).stdout
    flat = " ".join(re.sub("[│╭╰╮╯─]", " ", text).split())
    for field in Args.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in flat, field
    for line in async_ppo.__doc__.splitlines():
        assert line.strip() in [shown.strip() for shown in text.splitlines()], line
    assert max(map(len, text.splitlines())) <= 120
