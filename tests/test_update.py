"""The update of every script is its formula: the loss and its gradient, the clipping of that, Adam, the learning rate.

A probe stops a run at every gradient step, works out from the minibatch what it should be, the loss term by term and
Adam by its recursion, and notes how far the script's is from that. What networks, log-probs and advantages give is
taken as it is: tests of their own see to that.
"""

import json

import numpy as np
import pytest
import torch
from running import PER_UPDATE, ROOT, SMALL, Nursery, saved
from test_async_ppo import ASYNC, QUICK
from test_grpo import SMALL as GRPO

PROBE = (
    QUICK
    + """
import atexit, json, math, sys, torch
if "--compile" in sys.argv:
    import torch._dynamo
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # or torch goes on without compiling
randn, adam_step, noted, adam = torch.randn, torch.optim.Adam.step, [], {"steps": 0, "m": 0, "v": 0}

def watched_randn(*args, **kwargs):
    adam["noise"] = randn(*args, **kwargs)  # the last to draw any before a gradient step is the entropy
    return adam["noise"]

def clip(x, low, high):
    return torch.minimum(torch.maximum(x, torch.as_tensor(low)), torch.as_tensor(high))

def minibatch(script, name):  # by the names of the rollout, not in the order in which the loss is given them
    if "b_" + name in script:
        return script["b_" + name][script["mb_inds"]]
    x = script[name]
    return (x.transpose(0, 1) if "first_memory" in script else x.flatten(0, 1))[script["mb_inds"]]

def networks(script):
    agent, obs = script["agent"], [minibatch(script, name) for name in ("obs", "neighbors") if name in script]
    if "first_memory" in script:
        dones, memory = script["dones"], script["first_memory"][script["mb_inds"]]
        starts = torch.cat([0 * dones[:1], dones[:-1]]).transpose(0, 1)[script["mb_inds"]]
        return agent.get_policy(*obs, starts, memory)[0], agent.get_value(*obs, starts, memory)[0]
    return agent.get_policy(*obs), agent.get_value(*obs) if hasattr(agent, "critic") else None

def expected_loss(script, note):
    args = script["args"]
    policy, value = networks(script)
    if hasattr(policy, "logprobs"):
        actions, p = minibatch(script, "actions"), policy.logprobs.exp()
        log_prob, entropy = policy.logprobs[torch.arange(len(actions)), actions], -(p * policy.logprobs).sum(-1).mean()
    else:
        log_prob = policy.log_prob(minibatch(script, "raw_actions" if "raw_actions" in script else "actions"))
        u = policy.mean + policy.logstd.exp() * adam["noise"]
        log_det = torch.log((policy.high - policy.low) / 2 * (1 - torch.tanh(u) ** 2))
        entropy = (0.5 + 0.5 * math.log(2 * math.pi) + policy.logstd + log_det).sum(-1).mean()

    advantage = minibatch(script, "advantages")
    n = advantage.numel()
    advantage = advantage - advantage.sum() / n
    advantage = advantage / (((advantage**2).sum() / (n if value is None else n - 1)) ** 0.5 + 1e-8)
    before = "old_logprobs" if "old_logprobs" in script else "logprobs"  # async_ppo.py's policy may have moved on
    ratio = (log_prob - minibatch(script, before)).exp()
    clipped = clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)  # arXiv 1707.06347, equation 7
    note["ratios clipped"] = int((surrogate < ratio * advantage).sum())
    log_ratio, beyond = torch.log(ratio), (ratio < 1 - args.clip_coef) | (ratio > 1 + args.clip_coef)
    note["moved"] = [float(x.mean()) for x in (-log_ratio, ratio - 1 - log_ratio, beyond.double())]
    note["logged"] = script["terms"][-3:].tolist()  # old_approx_kl, approx_kl, clipfrac
    if "lag_ratios" in script:  # arXiv 2110.00641, equation 4
        surrogate = minibatch(script, "lag_ratios") * surrogate
        note["lag"] = float((script["lag_ratios"] - 1).abs().max())
    loss = -surrogate.mean() - args.ent_coef * entropy
    if value is None:  # arXiv 2402.03300, equation 3, with the divergence itself
        return loss + script["kl_coef"] * (p * (policy.logprobs - minibatch(script, "reference"))).sum(-1).mean()
    old, target = minibatch(script, "values"), minibatch(script, "returns")
    error, bounded = (value - target) ** 2, (clip(value, old - args.clip_coef, old + args.clip_coef) - target) ** 2
    note["values clipped"] = int((bounded > error).sum())
    return loss + args.vf_coef * 0.5 * (torch.maximum(error, bounded) if args.clip_vloss else error).mean()

def off(found, expected):
    return float((found - expected).norm() / expected.norm())

def watched_step(self, *arguments, **named):
    frame = sys._getframe()
    while "mb_inds" not in frame.f_globals:
        frame = frame.f_back
    script, note = frame.f_globals, {}
    args, weights, parameters = script["args"], script["weights"], list(script["agent"].parameters())
    with torch.enable_grad():
        learned = [parameter for parameter in parameters if parameter.requires_grad]
        grads = iter(torch.autograd.grad(expected_loss(script, note), learned))
    grad = torch.cat([(next(grads) if p.requires_grad else torch.zeros_like(p)).flatten() for p in parameters])
    note["norm"], used = float(grad.norm()), weights.grad.double()
    note["gradient"] = off(used, grad.double() * min(1.0, args.max_grad_norm / note["norm"]))

    adam["steps"] += 1
    adam["m"], adam["v"] = 0.9 * adam["m"] + 0.1 * used, 0.999 * adam["v"] + 0.001 * used**2
    m, v = adam["m"] / (1 - 0.9 ** adam["steps"]), adam["v"] / (1 - 0.999 ** adam["steps"])
    share = script["run"].step / script.get("total_steps", args.total_timesteps)  # of the run that is over
    change = -args.learning_rate * (1 - share * args.anneal_lr) * m / (v.sqrt() + 1e-5)
    before = weights.detach().double().clone()
    adam_step(self, *arguments, **named)
    note["step"] = off(weights.detach().double() - before, change)
    noted.append(note)

torch.randn = torch.compiler.disable(watched_randn)  # it is not for --compile to see through
torch.optim.Adam.step = watched_step
atexit.register(lambda: json.dump(noted, open("noted.json", "w")))
"""
)

HARD = dict(learning_rate=1e-2, clip_coef=0.05, ent_coef=0.03, max_grad_norm=0.1, num_minibatches=2, update_epochs=3)
HARD |= dict(eval_episodes=1, eval_every=10**9)
SWARM = SMALL | HARD | dict(vf_coef=0.7, clip_vloss=True, total_timesteps=10 * PER_UPDATE)
ACTORS = ASYNC | HARD | dict(vf_coef=0.7, clip_vloss=True, num_actors=1, max_lag=1, checkpoint_every=10**9)
RUNS = {  # script and arguments
    "ppo_swarm": ("ppo_swarm", SWARM),
    "ppo_swarm, values not clipped, rate not annealed": ("ppo_swarm", SWARM | dict(clip_vloss=False, anneal_lr=False)),
    "ppo_swarm, compiled": ("ppo_swarm", SWARM | dict(compile=True)),
    "ppo_swarm_lstm": ("ppo_swarm_lstm", SWARM),
    "ppo_swarm_lstm, compiled": ("ppo_swarm_lstm", SWARM | dict(compile=True)),
    "grpo_perep": ("grpo_perep", GRPO | HARD | dict(kl_coef=0.5, target_kl=1e3)),
    "grpo_perep, compiled": ("grpo_perep", GRPO | HARD | dict(kl_coef=0.5, target_kl=1e3, compile=True)),
    "async_ppo, discrete": ("async_ppo", ACTORS | dict(env_id="CartPole-v1")),
    "async_ppo, continuous": ("async_ppo", ACTORS | dict(env_id="Pendulum-v1")),
}


@pytest.fixture(scope="module")
def noted(nest, tmp_path_factory):
    """{run: [what the probe noted at each gradient step]}."""
    nursery = Nursery(nest, tmp_path_factory.mktemp("nursery"), ("Swarm", "LunarLander"))
    cwd, read = tmp_path_factory.mktemp("runs"), {}
    for i, (name, (script, args)) in enumerate(RUNS.items()):
        result = nursery.run_one(cwd / str(i), probe=PROBE, script=ROOT / f"{script}.py", **args)
        assert result.code == 0, result.output
        read[name] = json.loads((cwd / str(i) / "noted.json").read_text())
    return read


@pytest.mark.parametrize("name", RUNS)
def test_every_gradient_is_that_of_the_loss_and_clipped(noted, name):
    steps = noted[name]
    off = [step["gradient"] for step in steps]
    assert len(steps) >= 60 and np.quantile(off, 0.9) < 1e-5
    assert max(off) < 1e-2  # in single precision a ratio on the very edge may be clipped by one and not by the other
    assert sum(step["norm"] > 0.1 for step in steps) > 10  # so that they are clipped; likewise ratios and values
    assert sum(step["ratios clipped"] > 0 for step in steps) > 10
    for kind in {"values clipped", "lag"} & set(steps[0]):
        assert sum(step[kind] > 1e-3 for step in steps) > 10


def test_a_compiled_run_is_the_same_run_within_rounding(nest, tmp_path):
    nursery = Nursery(nest, tmp_path, ("Swarm",))
    args = SMALL | dict(total_timesteps=2 * PER_UPDATE, ent_coef=0.03)  # the entropy is an estimate by random numbers
    results = nursery.run(*[(tmp_path / f"{kind}", args | dict(compile=kind)) for kind in (False, True)])
    assert [result.code for result in results] == [0, 0], results[1].output
    plain, compiled = (saved(result.folder / "model.pt")["model"] for result in results)
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, rtol=0, atol=1e-5)
    assert any(not torch.equal(compiled[name], plain[name]) for name in plain)  # or nothing was compiled


@pytest.mark.parametrize("name", RUNS)
def test_how_far_the_policy_moved_is_measured_on_every_minibatch(noted, name):
    moved, logged = (np.array([step[kind] for step in noted[name]]) for kind in ("moved", "logged"))
    np.testing.assert_allclose(logged, moved, rtol=1e-3, atol=1e-5)
    assert (moved.max(axis=0) > [0.001, 0.001, 0.05]).all()


@pytest.mark.parametrize("name", RUNS)
def test_every_step_is_adams_at_the_annealed_rate(noted, name):
    assert max(step["step"] for step in noted[name]) < 1e-3
