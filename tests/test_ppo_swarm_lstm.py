"""ppo_swarm_lstm.py keeps its promises about memory; all that it has in common with ppo_swarm.py is tested there.

The networks are laid beside a literal LSTM, one number after the other: a loop over environments, agents and steps.
How whole runs are started and read is in running.py.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import (
    BRIEF,
    ENVIRONMENT,
    NUM_STEPS,
    PER_UPDATE,
    POLICIES,
    RANKS,
    RATIOS,
    ROOT,
    SMALL,
    Spaces,
    assert_same_curves,
    assert_same_weights,
    contents,
    copy_alone,
    crowd,
    curves,
    flags,
    folders,
    nursery_of,
    saved,
    table,
)

import envs
import ppo_swarm
from ppo_swarm_lstm import Agent, Args, RecurrentTrunk, Trunk

SCRIPT = ROOT / "ppo_swarm_lstm.py"
N_AGENTS, HIDDEN, BATCH, STEPS = 5, 6, 4, 7
# (batch, steps), 1 where an episode starts: nowhere; in the middle; first and last; twice running, as after an episode
# of one step
STARTS = torch.zeros(BATCH, STEPS, dtype=torch.float64)
STARTS[1, 3] = STARTS[2, 0] = STARTS[2, 6] = STARTS[3, 3] = STARTS[3, 4] = 1


# ----------------------------------------------------------------------------------------------------------------------
# Reference
# ----------------------------------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def literal_lstm(lstms, x, state, starts):
    """The equations, for each agent alone: x and the outputs (batch, steps, n_agents, hidden), summed, and the state
    after the last.
    """
    x, (h, c) = x.detach().numpy(), state.detach().movedim(2, 0).numpy().copy()
    features = np.zeros_like(x)
    for agent in range(x.shape[2]):
        lstm = lstms[agent if len(lstms) > 1 else 0]
        w_ih, w_hh, b_ih, b_hh = (w.detach().numpy() for w in lstm.parameters())
        for env in range(x.shape[0]):
            for step in range(x.shape[1]):
                if starts[env, step]:
                    h[env, agent] = c[env, agent] = 0
                gates = w_ih @ x[env, step, agent] + b_ih + w_hh @ h[env, agent] + b_hh
                i, f, g, o = np.split(gates, 4)
                c[env, agent] = sigmoid(f) * c[env, agent] + sigmoid(i) * np.tanh(g)
                h[env, agent] = sigmoid(o) * np.tanh(c[env, agent])
                features[env, step, agent] = x[env, step, agent] + h[env, agent]
    return torch.tensor(features), torch.tensor(np.stack([h, c], axis=2))


def agent_of(spaces, **args):
    """Every parameter is random: at the start biases are 0 and the actor's last layer nearly so, which hides much."""
    torch.manual_seed(2)
    args = Args(n_agents=N_AGENTS, hidden_dim=HIDDEN, **args)
    agent = Agent(args, spaces)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.normal_(0, 0.5)
    return agent


def agent_in_doubles(obs_dim, **args):
    return agent_of(Spaces(N_AGENTS, obs_dim), **args).double()


def sequences(seed=0, n_agents=N_AGENTS):
    """Observations and neighbours (batch, steps, n_agents, ...); the state before them (batch, n_agents, 2, hidden)."""
    obs, neighbors = crowd(batch=BATCH * STEPS, n_agents=n_agents, seed=seed)
    state = torch.tensor(np.random.default_rng(seed).normal(size=(BATCH, n_agents, 2, HIDDEN)))
    return obs.view(BATCH, STEPS, *obs.shape[1:]), neighbors.view(BATCH, STEPS, *neighbors.shape[1:]), state


def get_policy(agent, obs, neighbors, state, starts):
    """Of an actor whose critic has the same state; so in get_value."""
    return agent.get_policy(obs, neighbors, starts, torch.stack([state, state], dim=2))


def get_value(agent, obs, neighbors, state, starts):
    return agent.get_value(obs, neighbors, starts, torch.stack([state, state], dim=2))


def mean(agent, *inputs):
    policy, state = get_policy(agent, *inputs)
    return policy.mean, state


def stepwise(function, obs, neighbors, state, starts):
    """As a rollout does it."""
    outputs = []
    for step in range(obs.shape[1]):
        output, state = function(obs[:, step], neighbors[:, step], state, starts[:, step])
        outputs.append(output)
    return torch.stack(outputs, dim=1), state


def literal(agent, what, obs, neighbors, state, starts):
    """Means or values: the trunk, which test_ppo_swarm.py tests, the literal LSTM, and the last layer."""
    trunk = agent.actor if what == "mean" else agent.critic or agent.actor
    features = [Trunk.forward(trunk, obs[:, step], neighbors[:, step]) for step in range(obs.shape[1])]
    features, state = literal_lstm(trunk.memories, torch.stack(features, dim=1), state, starts)
    if what == "mean":
        return agent.actor_mean(features.flatten(0, 1)).view(*obs.shape[:-1], -1), state
    if agent.central:
        features = torch.cat([features, features.mean(dim=2, keepdim=True).expand_as(features)], dim=-1)
    return agent.critic_value(features.flatten(0, 1)).view(obs.shape[:-1]), state


def close(got, expected, tolerance=1e-12):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# Network
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_lstm", [False, True], ids=["own LSTM for the critic", "shared LSTM"])
@pytest.mark.parametrize("share", [True, False], ids=["one for all agents", "one for each agent"])
@pytest.mark.parametrize("critic", ["local", "central"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_sequence_is_its_steps_one_by_one_and_both_are_the_literal_lstm(policy, critic, share, share_lstm):
    obs, neighbors, state = sequences()
    kind = dict(policy=policy, critic=critic, share_policy=share, share_critic=share, share_lstm=share_lstm)
    agent = agent_in_doubles(obs.shape[-1], **kind)
    for what, outputs in (("mean", mean), ("value", get_value)):
        function = partial(outputs, agent)
        expected = literal(agent, what, obs, neighbors, state, STARTS)
        assert expected[0].std() > 0.02
        close(function(obs, neighbors, state, STARTS), expected)
        close(stepwise(function, obs, neighbors, state, STARTS), expected)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_memory_is_the_literal_lstm_for_any_pattern_of_starts(data):
    batch, steps, own = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6)), data.draw(st.booleans())
    starts = data.draw(st.lists(st.booleans(), min_size=batch * steps, max_size=batch * steps))
    starts = torch.tensor(starts, dtype=torch.float64).view(batch, steps)
    torch.manual_seed(data.draw(st.integers(0, 9)))
    trunk = RecurrentTrunk(Args(hidden_dim=HIDDEN), 2, 3 if own else None).double()
    obs, state = torch.randn(batch, steps, 3, 2).double(), torch.randn(batch, 3, 2, HIDDEN).double()
    no_neighbors = torch.zeros(batch, steps, 3, 0, dtype=torch.int64)
    features = Trunk.forward(trunk, obs.flatten(0, 1), no_neighbors).view(batch, steps, 3, HIDDEN)
    expected, after = literal_lstm(trunk.memories, features, state, starts)
    close(trunk(obs, no_neighbors, starts, state), (expected.flatten(0, 1), after))


def test_two_halves_of_a_sequence_are_the_whole_of_it():
    obs, neighbors, state = sequences()
    agent = agent_in_doubles(obs.shape[-1])
    for cut in range(1, STEPS):
        first, between = get_value(agent, obs[:, :cut], neighbors[:, :cut], state, STARTS[:, :cut])
        second, last = get_value(agent, obs[:, cut:], neighbors[:, cut:], between, STARTS[:, cut:])
        close((torch.cat([first, second], dim=1), last), get_value(agent, obs, neighbors, state, STARTS))


def test_a_shared_lstm_leaves_the_critic_nothing_of_its_own_but_the_last_layer():
    shared, apart = (dict(agent_in_doubles(24, share_lstm=share).named_parameters()) for share in (True, False))
    assert [name for name in shared if name.startswith("critic")] == ["critic_value.weight", "critic_value.bias"]
    own = [name for name in apart if name not in shared]
    assert own == [name for name in apart if name.startswith("critic.")] != []


@pytest.mark.parametrize("share_lstm", [False, True], ids=["own LSTM for the critic", "shared LSTM"])
@pytest.mark.parametrize("share", [True, False], ids=["one for all agents", "one for each agent"])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_reach_every_parameter_of_every_agent(policy, share, share_lstm):
    obs, neighbors, state = sequences()
    agent = agent_in_doubles(
        obs.shape[-1], policy=policy, share_policy=share, share_critic=share, share_lstm=share_lstm
    )
    distribution, _ = get_policy(agent, obs, neighbors, state, STARTS)
    values, _ = get_value(agent, obs, neighbors, state, STARTS)
    (distribution.log_prob(torch.randn_like(distribution.mean)).mean() + (values - 1).square().mean()).backward()
    for name, parameter in agent.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.any(), name
    assert len(agent.actor.memories) == (1 if share else N_AGENTS)


# ----------------------------------------------------------------------------------------------------------------------
# Gradients and the start of an episode
# ----------------------------------------------------------------------------------------------------------------------

both = pytest.mark.parametrize("what", ["mean", "value"])


def outputs_of(agent, what, *inputs):
    return mean(agent, *inputs) if what == "mean" else get_value(agent, *inputs)


@both
@pytest.mark.parametrize("share_lstm", [False, True], ids=["own LSTM for the critic", "shared LSTM"])
@pytest.mark.parametrize("share", [True, False], ids=["one for all agents", "one for each agent"])
def test_gradients_flow_back_to_the_start_of_the_episode_and_not_a_step_further(what, share, share_lstm):
    obs, neighbors, state = sequences()
    agent = agent_in_doubles(obs.shape[-1], share_policy=share, share_critic=share, share_lstm=share_lstm)
    obs.requires_grad_(), state.requires_grad_()
    outputs, _ = outputs_of(agent, what, obs, neighbors, state, STARTS)
    for env in range(BATCH):
        for step in range(STEPS):
            to_obs, to_state = torch.autograd.grad(outputs[env, step].sum(), (obs, state), retain_graph=True)
            starts = [s for s in range(step + 1) if STARTS[env, s]]
            begin = starts[-1] if starts else 0  # other environments' starts are no reason to stop
            reached = to_obs.abs().amax(dim=(2, 3)) > 0  # (batch, steps)
            expected = torch.zeros(BATCH, STEPS, dtype=torch.bool)
            expected[env, begin : step + 1] = True
            assert torch.equal(reached, expected), (env, step)
            assert to_obs[env, begin : step + 1].abs().amax(dim=-1).all()  # of every agent
            assert bool(to_state[env].abs().amax(dim=-1).all()) == (not starts)
            assert bool(to_state.any()) == (not starts)


@both
def test_gradients_of_the_weights_are_those_of_the_episodes_apart(what):
    """One sequence with a start in its middle, against two sequences of which the second has an empty state."""
    obs, neighbors, state = sequences()
    agent, cut = agent_in_doubles(obs.shape[-1]), 3
    starts = torch.zeros(BATCH, STEPS, dtype=torch.float64)
    starts[:, cut] = 1
    outputs, _ = outputs_of(agent, what, obs, neighbors, state, starts)
    before, _ = outputs_of(agent, what, obs[:, :cut], neighbors[:, :cut], state, 0 * starts[:, :cut])
    after, _ = outputs_of(agent, what, obs[:, cut:], neighbors[:, cut:], 0 * state, 0 * starts[:, cut:])
    parameters = [parameter for name, parameter in agent.named_parameters() if "memories" in name]
    weight = torch.randn_like(outputs)
    losses = (outputs * weight).sum(), (torch.cat([before, after], dim=1) * weight).sum()
    got, expected = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses)
    used = [(a, b) for a, b in zip(got, expected, strict=True) if a is not None]
    assert len(used) == 4  # the weights of one LSTM
    close(*zip(*used, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Every agent for itself
# ----------------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("policy", POLICIES)
def test_permuting_the_agents_permutes_outputs_and_states(policy, what):
    obs, neighbors, state = sequences()
    agent = agent_in_doubles(obs.shape[-1], policy=policy)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = obs[:, :, order], torch.argsort(order)[neighbors[:, :, order]], state[:, order]
    outputs, last = outputs_of(agent, what, obs, neighbors, state, STARTS)
    assert outputs.std(dim=2).min() > 1e-3
    close(outputs_of(agent, what, *permuted, STARTS), (outputs[:, :, order], last[:, order]))


@both
@pytest.mark.parametrize("share", [True, False], ids=["one for all agents", "one for each agent"])
def test_what_one_robot_saw_changes_what_it_does_later_and_nothing_that_others_do(share, what):
    obs, neighbors, state = sequences()
    agent = agent_in_doubles(obs.shape[-1], share_policy=share, share_critic=share)
    changed = obs.clone()
    changed[0, 2, 1] += 1.0  # what robot 1 of the first environment, in which no episode ends, sees at step 2
    outputs, last = outputs_of(agent, what, obs, neighbors, state, STARTS)
    others, other_last = outputs_of(agent, what, changed, neighbors, state, STARTS)
    differs = (outputs - others).view(BATCH, STEPS, N_AGENTS).abs() > 1e-9
    expected = torch.zeros_like(differs)
    expected[0, 2:, 1] = True
    assert torch.equal(differs, expected)
    differs = ((last - other_last).abs() > 1e-9).any(dim=-1).any(dim=-1)  # (batch, n_agents)
    assert differs.nonzero().tolist() == [[0, 1]]


def test_a_central_critic_learns_of_it_and_the_actors_still_do_not():
    obs, neighbors, state = sequences()
    agent = agent_in_doubles(obs.shape[-1], critic="central")
    changed = obs.clone()
    changed[0, 2, 1] += 1.0
    values, others = (get_value(agent, x, neighbors, state, STARTS)[0] for x in (obs, changed))
    assert ((values - others)[0, 2:].abs() > 1e-9).all() and torch.equal(values[0, :2], others[0, :2])
    means, others = (mean(agent, x, neighbors, state, STARTS)[0] for x in (obs, changed))
    assert (means - others)[0, :, [0, 2, 3, 4]].abs().max() < 1e-12


# ----------------------------------------------------------------------------------------------------------------------
# The policy that is evaluated
# ----------------------------------------------------------------------------------------------------------------------


def lidar(num_envs=BATCH, max_steps=5):
    """Environments whose first episodes end at different steps."""
    made = envs.make_vec("LidarNavigation", num_envs, 0, n_agents=N_AGENTS, max_steps=max_steps)
    observations, infos = made.reset(seed=3)
    made.state.elapsed[:] = np.arange(num_envs) % max_steps
    return made, observations, infos


def test_a_policy_carries_its_state_and_starts_anew_exactly_where_an_episode_ended():
    made, observations, infos = lidar()
    agent = agent_of(made)
    act, begun = agent.make_policy(made), np.zeros(BATCH)
    seen, starts, actions = [], [], []
    for _ in range(2 * STEPS):
        seen.append(observations)
        starts.append(begun)
        actions.append(act(observations, infos))
        observations, _, terminations, truncations, infos = made.step(actions[-1])
        begun = (terminations | truncations).astype(float)
    starts = np.stack(starts, axis=1)
    assert starts.sum(axis=0).max() < BATCH and (starts.sum(axis=1) > 1).all()  # never all at once, each twice
    obs = torch.tensor(np.stack(seen, axis=1)).double()
    neighbors, state = torch.zeros(*obs.shape[:-1], 0, dtype=torch.int64), torch.zeros(BATCH, N_AGENTS, 2, HIDDEN)
    expected, _ = literal(agent.double(), "mean", obs, neighbors, state.double(), starts)
    low, high = agent.action_low, agent.action_high
    expected = (high - low) / 2 * expected[..., :2].tanh() + (high + low) / 2  # behind the two is the guess
    np.testing.assert_allclose(np.stack(actions, axis=1), expected.detach(), atol=1e-5)


def test_every_policy_made_starts_empty_and_has_a_state_of_its_own():
    made, observations, infos = lidar()
    agent = agent_of(made)
    act, actions = agent.make_policy(made), []
    for _ in range(4):  # the same observation: what differs is memory
        actions.append(act(observations, {}))
    assert np.abs(np.diff(actions, axis=0)).max(axis=(1, 2, 3)).min() > 1e-3
    other = agent.make_policy(made)
    for expected in actions:
        act(observations, infos)  # in between, the first one goes on
        assert np.array_equal(other(observations, {}), expected)


def test_evaluations_do_not_remember_each_other():
    agent = agent_of(lidar()[0])
    runs = [
        envs.evaluate(agent.make_policy, "LidarNavigation", count, 5, n_agents=N_AGENTS, max_steps=12)[1]
        for count in (3, 3, 2)
    ]
    assert np.array_equal(runs[0], runs[1])
    np.testing.assert_allclose(runs[2], runs[0][:, :2], atol=1e-6)  # and an episode is the same in other company


# ----------------------------------------------------------------------------------------------------------------------
# Rollout and update
# ----------------------------------------------------------------------------------------------------------------------


nursery = nursery_of("LidarNavigation", "VmasNavigation", "Swarm", script=SCRIPT)


STAGGERED = """
import atexit, sys, numpy as np, torch, envs

class Staggered(envs.VmasNavigation):  # episodes end at different steps: every second of them by termination
    def reset(self, **kwargs):
        result = super().reset(**kwargs)
        self.state.elapsed[:] = 3 * np.arange(self.num_envs) % self.params.max_steps
        return result

    def step(self, actions):
        observations, rewards, terminations, truncations, infos = super().step(actions)
        terminations = terminations | truncations & (np.arange(self.num_envs) % 2 == 1)
        truncations = truncations & ~terminations
        if self.num_envs == 8:
            final = infos.get("final_obs", np.zeros_like(observations))
            steps.append([torch.tensor(x) for x in (terminations, truncations, final)])
        return observations, rewards, terminations, truncations, infos

steps = []
envs.NATIVE_ENVS["Staggered"] = Staggered
"""
# In double precision: rounding would hide what a sequence run again makes of a memory that is slightly wrong
DOUBLES = """
import numpy as np, torch

def doubled(make):
    def made(data, **named):
        return make(data.astype(float) if getattr(data, "dtype", None) == np.float32 else data, **named)
    return made

torch.set_default_dtype(torch.float64)
torch.tensor, torch.as_tensor = doubled(torch.tensor), doubled(torch.as_tensor)
"""
# The values of a minibatch beside those of the rollout, at the moment at which RATIOS looks at the ratio
VALUES = """
differences, with_ratios = [], torch.Tensor.clamp

def watched(self, *bounds, **named):
    if len(bounds) == 2:
        run = sys._getframe(1).f_locals
        differences.append(float((run["newvalue"] - run["values"]).detach().abs().max()))
    return with_ratios(self, *bounds, **named)

torch.Tensor.clamp = watched
atexit.register(lambda: json.dump(differences, open("differences.json", "w")))
"""
KINDS = {
    "lidar": dict(),
    "own networks": dict(env_id="Staggered", share_policy=False, share_critic=False),
    "shared LSTM": dict(env_id="Staggered", share_lstm=True, critic="central"),
    "attention": dict(env_id="Swarm", policy="attention", critic="central"),
}


@pytest.fixture(scope="module")
def first_minibatches(nursery, tmp_path_factory):
    """{kind: largest |ratio - 1|, largest |value - that of the rollout|}, each (updates, minibatches)."""
    cwd = tmp_path_factory.mktemp("ratios")
    args = SMALL | dict(total_timesteps=12 * PER_UPDATE, update_epochs=2, eval_every=10**9)
    args["env_kwargs"] = dict(max_steps=10)  # no divisor of num_steps
    jobs = [(cwd / name, args | kind) for name, kind in KINDS.items()]
    for result in nursery.run(*jobs, probe=STAGGERED + DOUBLES + RATIOS + VALUES):
        assert result.code == 0, result.output
    files = ("ratios.json", "differences.json")
    return {
        name: [np.reshape(json.loads((cwd / name / file).read_text()), (12, 8)) for file in files] for name in KINDS
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_ratio_is_1_on_the_first_minibatch_of_every_update(first_minibatches, kind):
    ratios, _ = first_minibatches[kind]
    assert ratios[:, 0].max() <= 1e-6, ratios[:, 0]
    assert ratios[:, 1:].min() > 1e-4  # and the policy moves after that


@pytest.mark.parametrize("kind", KINDS)
def test_the_values_on_the_first_minibatch_of_every_update_are_those_of_the_rollout(first_minibatches, kind):
    _, differences = first_minibatches[kind]
    assert differences[:, 0].max() <= 1e-5, differences[:, 0]
    assert differences[:, 1:].min() > 1e-4


WATCH = """
seen, randperm = [], torch.randperm

def watching(*args, **kwargs):  # what an update begins with: the rollout, and the weights that acted
    run = sys._getframe(1).f_globals
    if run["run"].step // run["steps_per_iteration"] == len(seen):  # the first minibatch of an update
        names = "obs neighbors values last_value final_values dones"
        batch = {name: run[name].clone() for name in names.split()}
        batch["next"] = [x.clone() for x in run["to_tensors"](run["observations"], run["infos"], "cpu")]
        batch["terminated"], batch["truncated"], batch["final"] = map(torch.stack, zip(*steps))
        seen.append(batch | {"model": {name: x.clone() for name, x in run["agent"].state_dict().items()}})
        steps.clear()
        torch.save(seen, "seen.pt")
    if len(seen) == 4:
        raise SystemExit
    return randperm(*args, **kwargs)

torch.randperm = watching
"""


@pytest.mark.parametrize("share_lstm", [False, True], ids=["own LSTM for the critic", "shared LSTM"])
def test_values_of_a_run_are_those_of_memory_that_never_breaks_within_an_episode(nursery, tmp_path, share_lstm):
    """Across rollouts too; and the last observation of an episode cut off is valued with the memory of that episode."""
    args = SMALL | dict(env_id="Staggered", share_lstm=share_lstm, num_workers=0, env_kwargs=dict(max_steps=20))
    result = nursery.run_one(tmp_path, probe=STAGGERED + WATCH, **args)
    assert (tmp_path / "seen.pt").exists(), result.output
    made = envs.make_vec("VmasNavigation", 1, 0, n_agents=SMALL["n_agents"])
    agent = Agent(Args(**args), made)
    state = torch.zeros(SMALL["num_envs"], SMALL["n_agents"], 2, agent.actor.memories[0].hidden_size)
    start, cut_off = torch.zeros(SMALL["num_envs"]), 0
    for batch in saved(tmp_path / "seen.pt"):
        agent.load_state_dict(batch["model"])
        assert torch.equal(batch["dones"], (batch["terminated"] | batch["truncated"]).float().unsqueeze(-1))
        assert batch["dones"].sum(dim=1).max() < SMALL["num_envs"]
        for step in range(NUM_STEPS):
            neighbors = batch["neighbors"][step]
            with torch.no_grad():
                value, state = get_value(agent, batch["obs"][step], neighbors, state, start)
                final, _ = get_value(agent, batch["final"][step], neighbors, state, torch.zeros_like(start))
            close([batch["values"][step]], [value], 1e-5)
            final[~batch["truncated"][step]] = 0
            close([batch["final_values"][step]], [final], 1e-5)
            start, cut_off = batch["dones"][step], cut_off + int(batch["truncated"][step].sum())
        with torch.no_grad():
            last_value, _ = get_value(agent, *batch["next"], state, start)
        close([batch["last_value"]], [last_value], 1e-5)
    assert cut_off > 10


# ----------------------------------------------------------------------------------------------------------------------
# A task for which one has to remember
# ----------------------------------------------------------------------------------------------------------------------

CUE = """
from typing import NamedTuple
import gymnasium as gym, numpy as np, envs

class CueState(NamedTuple):
    cue: np.ndarray  # (num_envs, n_agents), -1 or 1
    left: np.ndarray  # (num_envs,), steps until the answer
    length: np.ndarray
    rng: np.ndarray

class Cue(envs.NativeVectorEnv):  # every agent sees a sign at the first step, and has to repeat it at the last
    stat_names = ("r", "l", "accuracy")

    def __init__(self, num_envs=1, n_agents=2, render_mode=None, first_env=0):
        spaces = gym.spaces.Box(-1, 1, (n_agents, 2), np.float32), gym.spaces.Box(-1, 1, (n_agents, 1), np.float32)
        super().__init__(num_envs, *spaces, render_mode, first_env)
        self.start_shapes, steps = {}, np.zeros((2, num_envs), np.int64)
        self.state = CueState(np.zeros((num_envs, n_agents)), *steps, np.zeros((num_envs, 2), np.int64))

    def restart(self, start):
        for env in range(self.num_envs):
            self.begin(env)

    def begin(self, env):
        draw = [envs._uniform(self.state.rng, env, 0.0, 1.0) for _ in range(1 + self.state.cue.shape[1])]
        self.state.left[env] = self.state.length[env] = 3 + int(3 * draw[0])
        self.state.cue[env] = np.where(np.array(draw[1:]) < 0.5, -1, 1)

    def observe(self):
        first, last = self.state.left == self.state.length, self.state.left == 1
        self.buffers["observations"][..., 0] = self.state.cue * first[:, None]
        self.buffers["observations"][..., 1] = last[:, None]

    def advance(self, actions):
        answer = np.asarray(actions)[..., 0] * self.state.cue
        self.state.left[:] -= 1
        ended = self.state.left == 0
        self.buffers["rewards"][...] = answer * ended[:, None]
        self.buffers["terminations"][...] = ended
        stats = answer.mean(axis=1), self.state.length, (answer > 0).mean(axis=1)
        self.buffers["stats"][...] = np.stack(stats, axis=1)
        for env in np.flatnonzero(ended):
            self.begin(env)
        self.observe()

    def draw(self, env):
        return np.full((160, 160, 3), 255, np.uint8)

envs.NATIVE_ENVS["Cue"] = Cue
"""
CUE_ARGS = dict(
    env_id="Cue",
    n_agents=2,
    num_envs=32,
    num_workers=0,
    hidden_dim=16,
    init_logstd=-1.0,
    learning_rate=5e-3,
    total_timesteps=12 * 2048,  # a learner with memory answers all of them after 8
    eval_every=10**9,
    eval_episodes=200,
    num_steps=32,
)


def test_the_lstm_solves_a_task_that_needs_memory_and_the_mlp_cannot(nursery, tmp_path):
    lstm = nursery.run((tmp_path / "lstm", CUE_ARGS), probe=CUE)[0]
    mlp = nursery.run((tmp_path / "mlp", CUE_ARGS), probe=CUE, script=ppo_swarm.__file__)[0]
    assert (lstm.code, mlp.code) == (0, 0), lstm.output + mlp.output
    accuracy = [curves(result.folder)["eval/accuracy"][-1][1] for result in (lstm, mlp)]
    assert accuracy[0] >= 0.9, accuracy
    assert abs(accuracy[1] - 0.5) < 0.15, accuracy  # 400 answers, so 6 standard deviations


# ----------------------------------------------------------------------------------------------------------------------
# A whole run
# ----------------------------------------------------------------------------------------------------------------------

# A checkpoint every 64 steps, episodes of 48: the first is in the middle of all episodes, the third at the end of the
# first environment's.
RUN = SMALL | dict(
    total_timesteps=10 * PER_UPDATE,
    checkpoint_every=2 * PER_UPDATE,
    guess_coef=1.0,
    env_kwargs=dict(max_steps=48, goal_visible_steps=5),
)
KILL = """
import os, shutil, signal, envs
save, count = envs.save, 0

def save_and_die(content, path):
    global count
    done, count = save(content, path), count + (path.name == "checkpoint.pt")
    if count == {count}:
        shutil.copy(path, "killed-{count}.pt")
        os.kill(os.getpid(), signal.SIGKILL)
    return done

envs.save = save_and_die
"""


@pytest.fixture(scope="module")
def runs(nursery, tmp_path_factory):
    """The same command twice, and with workers."""
    cwd = tmp_path_factory.mktemp("runs")
    changes = dict(first=dict(), again=dict(), workers=dict(num_workers=3))
    jobs = [(cwd / name, RUN | dict(num_workers=0) | change) for name, change in changes.items()]
    results = nursery.run(*jobs, pictures=True)
    assert [result.code for result in results] == [0] * len(changes), "".join(result.output for result in results)
    return dict(zip(changes, results, strict=True))


def test_a_run_leaves_its_events_model_plot_and_video_and_warns_of_nothing(runs):
    result = runs["first"]
    assert [name for name in contents(result.folder) if not name.startswith("events")] == [
        "eval.mp4",
        "eval.png",
        "model.pt",
    ]
    assert list(table(result.output))[1:] == ["ppo_swarm_lstm", "sampled", "steering", "planning", "random"]
    (share,) = re.findall(r"minutes, (\d+)% of them evaluations", result.output)
    assert 1 <= int(share) < 100
    assert "Warning" not in result.output


def test_the_same_seed_gives_identical_weights_and_curves(runs):
    assert_same_weights(runs["first"].folder / "model.pt", runs["again"].folder / "model.pt")
    assert_same_curves(runs["first"].folder, runs["again"].folder)


def test_the_number_of_workers_changes_nothing(runs):
    assert_same_weights(runs["first"].folder / "model.pt", runs["workers"].folder / "model.pt")
    assert_same_curves(runs["first"].folder, runs["workers"].folder)


@pytest.fixture(scope="module")
def killed(nursery, tmp_path_factory):
    """SIGKILL at the first checkpoint and at the third, each time started again."""
    cwd, args = tmp_path_factory.mktemp("killed"), RUN | dict(num_workers=0)
    for count in (1, 2):  # the second process writes the second and the third
        result = nursery.run_one(cwd, probe=KILL.format(count=count), **args)
        assert result.code == -signal.SIGKILL, result.output
    return nursery.run_one(cwd, **args)


def test_the_kills_were_in_the_middle_of_all_episodes_and_at_the_end_of_one(killed):
    for count, ended in ((1, []), (2, [0])):
        (own,) = saved(killed.cwd / f"killed-{count}.pt")["ranks"]
        memory = own["memory"].flatten(1)  # (num_envs, ...), of actor and critic
        assert (memory == 0).all(dim=1).nonzero().flatten().tolist() == ended  # zero where the next episode starts
        assert memory[len(ended) :].all()


def test_a_run_killed_twice_ends_with_identical_weights_and_curves(killed, runs):
    assert killed.code == 0, killed.output
    assert "resumed at" in killed.output
    assert_same_weights(killed.folder / "model.pt", runs["first"].folder / "model.pt")
    assert_same_curves(killed.folder, runs["first"].folder)
    assert table(killed.output) == table(runs["first"].output)


# ----------------------------------------------------------------------------------------------------------------------
# What is not seen
# ----------------------------------------------------------------------------------------------------------------------

UNSEEN = """
import atexit, sys, torch
targets, index_select = [], torch.Tensor.index_select

def watching(self, dim, index):  # the first minibatch of an update begins with this
    run = sys._getframe(1).f_globals
    if "batch" in run and len(targets) == run["run"].step // run["steps_per_iteration"]:
        targets.append({name: run[name].clone() for name in ("obs", "unseen")})
    return index_select(self, dim, index)

torch.Tensor.index_select = watching
atexit.register(lambda: torch.save(targets, "targets.pt"))
"""


def test_guesses_aim_at_where_the_goal_is_when_they_are_made_and_get_better(nursery, tmp_path):
    args = SMALL | dict(total_timesteps=30 * PER_UPDATE, eval_every=10**9, env_kwargs=dict(max_steps=50))
    jobs = [(tmp_path / f"{coef}", args | dict(guess_coef=coef)) for coef in (0.0, 3.0)]
    alone, guessing = nursery.run(*jobs, probe=UNSEEN)
    assert alone.code == guessing.code == 0, alone.output + guessing.output
    for rollout in torch.load(tmp_path / "3.0" / "targets.pt")[:3]:
        shown = rollout["obs"][..., -2:]  # a goal that is always shown says itself where it is
        distance = shown.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(rollout["unseen"], shown / (1 - distance) / envs.LIDAR_RANGE, rtol=1e-4, atol=1e-5)
    without, losses = (curves(run.folder)["losses/guess_loss"] for run in (alone, guessing))
    assert losses[-1][1] < 0.5 * losses[0][1] and losses[-1][1] < 0.5 * without[-1][1]


def test_the_guess_leaves_actions_and_values_alone():
    obs, neighbors, state = sequences()
    agent = agent_of(Spaces(N_AGENTS, obs.shape[-1], unseen_dim=3)).double()
    policy, _ = get_policy(agent, obs, neighbors, state, STARTS)
    assert policy.mean.shape == (BATCH, STEPS, N_AGENTS, 1) and policy.guess.shape == (BATCH, STEPS, N_AGENTS, 3)
    before = policy.log_prob(policy.mode)
    with torch.no_grad():
        agent.actor_mean.weight[:, 1:] += 1
    policy, _ = get_policy(agent, obs, neighbors, state, STARTS)
    assert torch.equal(policy.log_prob(policy.mode), before)
    policy.guess.square().mean().backward()
    assert agent.actor_mean.weight.grad[:, 0].eq(0).all() and agent.actor.embed.weight.grad.any()
    assert all(parameter.grad is None for parameter in agent.critic.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Saved models
# ----------------------------------------------------------------------------------------------------------------------


def test_evaluate_prints_the_comparison_of_the_run_again(nursery, runs, tmp_path):
    model = shutil.copy(runs["first"].folder / "model.pt", tmp_path)
    result = nursery.run_one(tmp_path, evaluate=model)
    assert result.code == 0, result.output
    assert table(result.output) == table(runs["first"].output)
    (drawn,) = tmp_path.glob("evaluate-*")
    assert contents(drawn) == ["eval.mp4", "eval.png"] and not folders(tmp_path)


SIZES = {
    "a critic for each agent": dict(share_critic=False),
    "a shared LSTM": dict(share_lstm=True, critic="central", env_id="Swarm", policy="attention"),
}


@pytest.fixture(scope="module")
def larger(nursery, tmp_path_factory):
    """Models of every kind with a shared policy, evaluated with another number of agents."""
    cwd, args = tmp_path_factory.mktemp("larger"), BRIEF | dict(env_kwargs=dict(max_steps=12))
    trained = nursery.run(*((cwd / name, args | size) for name, size in SIZES.items()))
    assert [run.code for run in trained] == [0] * len(SIZES), "".join(run.output for run in trained)
    evaluated = nursery.run(*((run.cwd, dict(evaluate=run.folder / "model.pt", n_agents=7)) for run in trained))
    return dict(zip(SIZES, zip(trained, evaluated, strict=True), strict=True))


@pytest.mark.parametrize("size", SIZES)
def test_evaluate_takes_another_number_of_agents(larger, size):
    trained, evaluated = larger[size]
    assert evaluated.code == 0, evaluated.output
    assert list(table(evaluated.output))[1] == "ppo_swarm_lstm"
    assert table(evaluated.output) != table(trained.output)


# ----------------------------------------------------------------------------------------------------------------------
# torchrun
# ----------------------------------------------------------------------------------------------------------------------


def test_torchrun_ranks_agree_on_the_weights_and_see_observations_of_their_own(nursery, tmp_path):
    args = SMALL | dict(total_timesteps=4 * 2 * PER_UPDATE, eval_every=10**9, max_grad_norm=1e9)
    result, other = nursery.run_ranks(tmp_path, args, probe=RANKS)
    assert [result.code, other.code] == [0, 0], result.output + other.output
    assert "model.pt" in contents(result.folder)
    first, second = (torch.load(tmp_path / f"trace-{rank}.pt") for rank in range(2))
    assert first["weights"] == second["weights"] and len(set(first["weights"])) == 4 * 4 * 4
    assert len(first["observations"]) == 4 * NUM_STEPS + 1
    assert not set(first["observations"]) & set(second["observations"])
    assert not torch.allclose(first["own"], second["own"])
    torch.testing.assert_close(first["used"], (first["own"] + second["own"]) / 2)


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def test_the_script_and_envs_alone_in_an_empty_folder_run(tmp_path):
    copy_alone(SCRIPT, tmp_path)
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    command = [sys.executable, SCRIPT.name, *flags(**BRIEF)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "model.pt" in contents(folders(tmp_path)[0])


@pytest.mark.parametrize("num_envs, num_minibatches", [(8, 3), (2, 4), (6, 4)])
def test_minibatches_that_do_not_divide_the_environments_are_refused(num_envs, num_minibatches):
    with pytest.raises(ValueError, match=f"num_minibatches is {num_minibatches}: it must divide {num_envs},"):
        Args(num_envs=num_envs, num_minibatches=num_minibatches)


def test_bad_commands_are_refused_by_name_before_anything_starts(nursery, tmp_path):
    changes = dict(num_minibatches=dict(num_minibatches=32), policy=dict(policy="gnn"))  # 32 divides the steps
    results = nursery.run(*((tmp_path / name, BRIEF | change) for name, change in changes.items()))
    for name, result in zip(changes, results, strict=True):
        assert result.code != 0 and f"{name} is {changes[name][name]!r}: " in result.output, result.output
        assert not (result.cwd / "runs").exists()


def test_help_explains_what_is_new(nursery, tmp_path):
    result = nursery.run_one(tmp_path, help=True)
    shown = " ".join(re.sub("[│╭╰╮╯─]", " ", result.output).split())
    comment = re.search(r"share_lstm: bool = False  # (.*)", SCRIPT.read_text())[1]
    assert result.code == 0 and "--share-lstm" in shown and comment in shown
    assert max(len(line) for line in result.output.splitlines()) <= 120


# ----------------------------------------------------------------------------------------------------------------------
# The diff
# ----------------------------------------------------------------------------------------------------------------------

MOST_REMOVED, MOST_ADDED = 23, 70  # lines; memory, and three defaults for another environment, cost no more


def test_ppo_swarm_differs_by_few_lines():
    command = ["diff", ppo_swarm.__file__, str(SCRIPT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    removed, added = (len(re.findall(f"^{sign}", result.stdout, re.M)) for sign in "<>")
    assert removed <= MOST_REMOVED and added <= MOST_ADDED, (removed, added)
