"""The three GRPO scripts keep their promises: the advantages, the categorical policy, and whole runs by users.

The scripts share all but the advantage, so each of the costlier runs is made with one of them only.
"""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import (
    ENVIRONMENT,
    RATIOS,
    assert_other_weights,
    assert_same_curves,
    assert_same_weights,
    contents,
    copy_alone,
    curves,
    error_of,
    flags,
    folders,
    nursery_of,
    replaced,
    reproducible,
    saved,
    table,
)

import envs
import grpo_hybrid
import grpo_perep
import grpo_perstep

MODULES = {"perstep": grpo_perstep, "perep": grpo_perep, "hybrid": grpo_hybrid}
SCRIPTS = {name: Path(module.__file__) for name, module in MODULES.items()}

GROUP, NUM_STEPS = 8, 60
SMALL = dict(
    num_groups=1,
    group_size=GROUP,
    num_steps=NUM_STEPS,
    total_timesteps=24 * GROUP * NUM_STEPS,
    num_minibatches=2,
    update_epochs=2,
    eval_episodes=4,
    eval_every=4 * GROUP * NUM_STEPS,
    checkpoint_every=3 * GROUP * NUM_STEPS,
    eval_env_kwargs=dict(max_steps=100),
)
BRIEF = SMALL | dict(total_timesteps=3 * GROUP * NUM_STEPS, eval_episodes=2)


# ----------------------------------------------------------------------------------------------------------------------
# Advantages
# ----------------------------------------------------------------------------------------------------------------------


def z_scores(values):
    """A list of numbers, normalised; population standard deviation, at least 1e-8."""
    mean = sum(values) / len(values)
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    return [(value - mean) / max(std, 1e-8) for value in values]


def by_step(rewards, lengths, gamma):
    """{(t, i): the discounted sum of normalised rewards}, word for word."""
    normalised = {}
    for t in range(max(lengths)):
        here = [i for i in range(len(lengths)) if t < lengths[i]]
        if len(here) == 1:
            normalised[t, here[0]] = 0.0
        else:
            for i, score in zip(here, z_scores([rewards[t][i] for i in here]), strict=True):
                normalised[t, i] = score
    return {
        (t, i): sum(gamma ** (later - t) * normalised[later, i] for later in range(t, lengths[i]))
        for t, i in normalised
    }


def by_episode(rewards, lengths):
    returns = [sum(rewards[t][i] for t in range(length)) for i, length in enumerate(lengths)]
    return {(t, i): score for i, score in enumerate(z_scores(returns)) for t in range(lengths[i])}


def by_both(rewards, lengths, gamma, alpha, beta, clip):
    step, episode, found = by_step(rewards, lengths, gamma), by_episode(rewards, lengths), {}
    for key in step:
        size = min(abs(episode[key]) ** alpha * abs(step[key]) ** beta, clip)
        found[key] = size if episode[key] > 0 and step[key] > 0 else -size
    return found


def defined(name, rewards, lengths, gamma=0.9, alpha=1.0, beta=1.0, clip=10.0):
    rewards = rewards.tolist()
    if name == "perep":
        return by_episode(rewards, lengths)
    found = by_step(rewards, lengths, gamma)
    if name == "hybrid":
        found = by_both(rewards, lengths, gamma, alpha, beta, clip)
    return dict(zip(found, z_scores(list(found.values())), strict=True))


def computed(name, rewards, lengths, gamma=0.9, alpha=1.0, beta=1.0, clip=10.0):
    alive = torch.arange(len(rewards))[:, None] < torch.tensor(lengths)
    arguments = {"perstep": (gamma,), "perep": (), "hybrid": (gamma, alpha, beta, clip)}[name]
    advantages = MODULES[name].compute_advantages(rewards, alive, *arguments)
    assert advantages.shape == rewards.shape and advantages.dtype == torch.float32
    assert (advantages[~alive] == 0).all()
    return advantages


def assert_as_defined(name, rewards, lengths, **arguments):
    advantages = computed(name, rewards, lengths, **arguments)
    for (t, i), value in defined(name, rewards, lengths, **arguments).items():
        assert float(advantages[t, i]) == pytest.approx(value, rel=1e-4, abs=1e-5), (t, i)


def some_rewards(num_steps=9, group=4, seed=0):
    return torch.randn(num_steps, group, generator=torch.Generator().manual_seed(seed))


EPISODES = {
    "equal lengths": [9, 9, 9, 9],
    "unequal lengths": [3, 9, 5, 8],
    "a lone survivor": [2, 2, 9, 1],
    "one step": [1, 1, 1, 1],
}


@pytest.mark.parametrize("lengths", EPISODES.values(), ids=EPISODES.keys())
@pytest.mark.parametrize("name", MODULES)
def test_advantages_are_the_definition(name, lengths):
    assert_as_defined(name, some_rewards(), lengths)


@pytest.mark.parametrize("name", MODULES)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_advantages_are_the_definition_for_any_episodes(name, data):
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=6))
    rewards = some_rewards(7, len(lengths), data.draw(st.integers(0, 2**20)))
    gamma = data.draw(st.sampled_from([0.0, 0.5, 0.99, 1.0]))
    # A power of a difference that is only a rounding error is no definition: exponents of at least 1/2
    alpha, beta = data.draw(st.sampled_from([0.5, 1.0, 2.0])), data.draw(st.sampled_from([0.5, 1.0]))
    assert_as_defined(name, rewards, lengths, gamma=gamma, alpha=alpha, beta=beta, clip=0.7)


@pytest.mark.parametrize("reward", [0.0, 1.0, -0.3, 1e-3, 100.0])
@pytest.mark.parametrize("name", MODULES)
def test_rewards_without_any_spread_give_advantages_of_0(name, reward):
    for group in (2, 3, 7, 32):
        assert computed(name, torch.full((30, group), reward), [30] * group).abs().max() < 1e-5


@pytest.mark.parametrize("name", MODULES)
def test_an_episode_by_itself_has_advantages_of_0(name):
    assert (computed(name, some_rewards(9, 1), [6]) == 0).all()


def test_a_lone_survivor_has_nothing_to_be_compared_with():
    lengths = [4, 9, 3]
    first, second = some_rewards(9, 3), some_rewards(9, 3)
    second[4:, 1] = 1000.0  # when only episode 1 is left
    assert torch.equal(computed("perstep", first, lengths), computed("perstep", second, lengths))
    assert not torch.equal(computed("perep", first, lengths), computed("perep", second, lengths))


@pytest.mark.parametrize("name", MODULES)
def test_what_comes_after_an_episodes_end_changes_nothing(name):
    lengths, first, second = [3, 9, 5, 8], some_rewards(), some_rewards()
    for i, length in enumerate(lengths):
        second[length:, i] = 1000.0
    assert torch.equal(computed(name, first, lengths), computed(name, second, lengths))


@pytest.mark.parametrize("name", MODULES)
def test_advantages_have_mean_0_and_deviation_1(name):
    lengths = [3, 9, 5, 8]
    advantages = computed(name, some_rewards(), lengths)
    alive = torch.arange(9)[:, None] < torch.tensor(lengths)
    # over episodes for outcome supervision, over valid steps for the others
    values = (advantages[0] if name == "perep" else advantages[alive]).double()
    assert float(values.mean()) == pytest.approx(0, abs=1e-6)
    assert float(values.std(correction=0)) == pytest.approx(1, abs=1e-6)


def test_hybrid_is_positive_only_where_both_are():
    lengths, rewards = [3, 9, 5, 8], some_rewards()
    step, episode = by_step(rewards.tolist(), lengths, 0.9), by_episode(rewards.tolist(), lengths)
    advantages = computed("hybrid", rewards, lengths)
    both = [float(advantages[key]) for key in step if step[key] > 0 and episode[key] > 0]
    other = [float(advantages[key]) for key in step if not (step[key] > 0 and episode[key] > 0)]
    assert both and other and min(both) > max(other)  # less the mean that the normalisation takes off all of them


def test_hybrid_clip_bounds_the_size_and_none_does_not():
    lengths, rewards = [9, 9, 9, 9], some_rewards()
    rewards[4, 0] = 100.0
    clipped, free = (computed("hybrid", rewards, lengths, clip=clip) for clip in (1e-3, None))
    assert len(set(clipped.flatten().round(decimals=3).tolist())) < len(set(free.flatten().round(decimals=3).tolist()))
    assert_as_defined("hybrid", rewards, lengths, clip=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Policy
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=MODULES)
def categorical(request):
    return partial(MODULES[request.param].Categorical, first_action=0)


def test_log_probs_entropy_and_kl_are_those_of_torch_distributions(categorical):
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 30.0):
        logits, others = (scale * torch.randn(50, 4, generator=generator) for _ in range(2))
        ours, other = categorical(logits), categorical(others)
        theirs, reference = (torch.distributions.Categorical(logits=x.double()) for x in (logits, others))
        actions = torch.randint(4, (50,), generator=generator)
        expected_kl = torch.distributions.kl_divergence(theirs, reference).float()
        torch.testing.assert_close(ours.log_prob(actions), theirs.log_prob(actions).float())
        torch.testing.assert_close(ours.entropy(), theirs.entropy().float(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours.kl(other), expected_kl, rtol=1e-4, atol=1e-6)
        assert (ours.kl(categorical(logits)) == 0).all()


def test_gradients_of_the_kl_are_those_of_torch_distributions(categorical):
    generator, gradients = torch.Generator().manual_seed(0), []
    logits, others = (torch.randn(20, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    for ours in (True, False):
        x = logits.clone().requires_grad_()
        if ours:
            kl = categorical(x).kl(categorical(others))
        else:
            make = torch.distributions.Categorical
            kl = torch.distributions.kl_divergence(make(logits=x), make(logits=others))
        kl.sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_actions_are_drawn_with_their_probabilities(categorical):
    probabilities = torch.tensor([0.5, 0.3, 0.199, 0.001])
    generator = torch.Generator().manual_seed(0)
    actions = categorical(probabilities.log().expand(100_000, 4)).sample(generator)
    share = torch.bincount(actions, minlength=4) / len(actions)
    torch.testing.assert_close(share, probabilities, rtol=0, atol=0.006)
    assert share[3] > 0


# ----------------------------------------------------------------------------------------------------------------------
# The scripts as a family
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one, other, removed, added",
    [("perep", "perstep", 15, 22), ("perep", "hybrid", 14, 30), ("perstep", "hybrid", 20, 30)],
)
def test_two_scripts_differ_by_few_lines(one, other, removed, added):
    output = subprocess.run(["diff", SCRIPTS[one], SCRIPTS[other]], capture_output=True, text=True).stdout
    changed = [line[0] for line in output.splitlines()]
    assert 0 < changed.count("<") <= removed and 0 < changed.count(">") <= added


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_opens_with_how_it_departs_from_the_paper_and_keeps_to_its_length(name):
    text = SCRIPTS[name].read_text()
    assert "2402.03300" in MODULES[name].__doc__ and "\n1. " in MODULES[name].__doc__
    assert 300 <= len(text.splitlines()) <= 500


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs
# ----------------------------------------------------------------------------------------------------------------------


nursery = nursery_of("DenseLunarLander", "LunarLander", script=SCRIPTS["hybrid"])


def command(name):
    return (sys.executable, str(SCRIPTS[name]))


@pytest.fixture(scope="module")
def twins(nursery, tmp_path_factory):
    """The same command twice, in two folders."""
    cwd = tmp_path_factory.mktemp("twins")
    jobs = [(cwd / which, SMALL) for which in ("first", "second")]
    return nursery.run(*jobs, script=SCRIPTS["hybrid"], pictures=True)


@pytest.fixture(scope="module")
def finished(twins):
    assert twins[0].code == 0, twins[0].output
    return twins[0]


@pytest.fixture(scope="module")
def model(finished, tmp_path_factory):
    return Path(shutil.copy(finished.folder / "model.pt", tmp_path_factory.mktemp("model")))


def test_the_same_seed_gives_identical_weights_and_curves(twins):
    assert_same_weights(*(run.folder / "model.pt" for run in twins))
    assert_same_curves(*(run.folder for run in twins))
    assert table(twins[0].output) == table(twins[1].output)


def test_a_run_leaves_its_events_model_plot_and_video_and_nothing_else(finished):
    assert [name.split(".")[0] for name in contents(finished.folder)] == ["eval", "eval", "events", "model"]
    assert "Warning" not in finished.output
    assert list(table(finished.output))[1:] == ["grpo_hybrid", "sampled", "heuristic", "random"]
    assert table(finished.output)["policy"][:2] == ["return", "length"]


def test_curves_count_the_steps_of_the_episodes(finished):
    read = curves(finished.folder)
    cleanrl = {f"losses/{name}" for name in ("policy_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")}
    cleanrl |= {f"charts/{name}" for name in ("episodic_return", "episodic_length", "SPS", "learning_rate")}
    assert cleanrl | {"losses/kl", "losses/kl_coef", "charts/cut_off", "eval/r", "eval/success"} <= read.keys()
    assert all(math.isfinite(value) for tag in read for _, value in read[tag])
    steps = [step for step, _ in read["losses/policy_loss"]]
    lengths = [GROUP * value for _, value in read["charts/episodic_length"]]
    np.testing.assert_allclose(steps, np.cumsum(lengths), rtol=1e-6)
    assert steps[-2] < SMALL["total_timesteps"] <= steps[-1]
    rates = [value for _, value in read["charts/learning_rate"]]
    progress = np.array([0, *steps[:-1]]) / SMALL["total_timesteps"]
    np.testing.assert_allclose(rates, rates[0] * (1 - progress), rtol=1e-5)


def test_the_weight_of_the_kl_follows_the_kl(finished):
    read = curves(finished.folder)
    kl, weight = ([value for _, value in read[f"losses/{name}"]] for name in ("kl", "kl_coef"))
    target, before = saved(finished.folder / "model.pt")["args"]["kl_coef_target"], 0.01
    for divergence, after in zip(kl, weight, strict=True):
        expected = before * 1.5 if divergence > target else before / 1.5
        assert after == pytest.approx(min(max(expected, 1e-4), 1.0), rel=1e-5)
        before = after


@pytest.mark.parametrize("name", ["perstep", "perep"])
def test_every_script_runs(nursery, tmp_path, name):
    result = nursery.run_one(tmp_path, script=SCRIPTS[name], **BRIEF)
    assert result.code == 0, result.output
    env_id = MODULES[name].Args().env_id
    assert result.folder.name.startswith(f"{env_id}__grpo_{name}__1__")


def test_the_number_of_workers_changes_nothing_and_another_seed_does(nursery, finished, tmp_path):
    changes = dict(workers=dict(num_workers=2), seed=dict(seed=2))
    runs = nursery.run(*((tmp_path / key, SMALL | change) for key, change in changes.items()), script=SCRIPTS["hybrid"])
    assert [run.code for run in runs] == [0, 0], runs[0].output
    assert_same_weights(runs[0].folder / "model.pt", finished.folder / "model.pt")
    assert reproducible(curves(runs[0].folder)) == reproducible(curves(finished.folder))
    assert_other_weights(runs[1].folder / "model.pt", finished.folder / "model.pt")


def test_the_ratio_is_1_on_the_first_minibatch_of_every_update(nursery, tmp_path):
    args = SMALL | dict(num_minibatches=4, update_epochs=2, target_kl=1e3, learning_rate=1e-2)
    result = nursery.run_one(tmp_path, probe=RATIOS, script=SCRIPTS["perep"], **args)
    assert result.code == 0, result.output
    ratios = np.reshape(json.loads((tmp_path / "ratios.json").read_text()), (12, 8))
    assert ratios[:, 0].max() <= 1e-6, ratios[:, 0]
    assert ratios[:, 1:].min() > 1e-4


def test_target_kl_ends_an_update_before_the_gradient_step_that_goes_too_far(nursery, tmp_path):
    result = nursery.run_one(tmp_path, script=SCRIPTS["perep"], **BRIEF | dict(target_kl=1e-9))
    assert result.code == 0, result.output
    assert {value for _, value in curves(result.folder)["losses/minibatches"]} == {2}  # the second went too far


STARTS = """
import atexit, numpy as np, envs
found, reset, step = {"starts": [], "actions": [], "later": []}, envs.NativeVectorEnv.reset, envs.NativeVectorEnv.step
fresh = []

def watched_reset(self, **kwargs):
    observations, infos = reset(self, **kwargs)
    if self.num_envs == 8:
        found["starts"].append(observations)
        fresh.append(True)
    return observations, infos

def watched_step(self, actions):
    result = step(self, actions)
    if fresh:
        fresh.clear()
        found["actions"].append(actions)
        found["later"].append(result[0])
    return result

envs.NativeVectorEnv.reset, envs.NativeVectorEnv.step = watched_reset, watched_step
atexit.register(lambda: np.savez("starts.npz", **found))
"""


@pytest.fixture(scope="module")
def starts(nursery, tmp_path_factory):
    """Observations of the start, the first actions and what came of them; with identical starts of two groups."""
    cwd, read = tmp_path_factory.mktemp("starts"), {}
    groups = {False: {}, True: dict(num_groups=2, group_size=GROUP // 2)}
    jobs = [(cwd / str(identical), BRIEF | dict(identical_g=identical) | groups[identical]) for identical in groups]
    for identical, run in zip((False, True), nursery.run(*jobs, probe=STARTS, script=SCRIPTS["perstep"]), strict=True):
        assert run.code == 0, run.output
        read[identical] = dict(np.load(run.cwd / "starts.npz"))
    return read


def test_identical_g_starts_a_group_in_one_state_and_draws_other_actions(starts):
    first, actions, later = (starts[True][name] for name in ("starts", "actions", "later"))
    first = first.reshape(len(first), 2, GROUP // 2, -1)
    assert len(first) >= 3 and (first == first[:, :, :1]).all()
    assert all(len(set(group.tolist())) > 1 for group in actions)
    for observations in later:  # by the actions, and by the engines' dispersion even where those are the same
        assert len(np.unique(observations, axis=0)) > 1
    assert len(np.unique(first[:, :, 0].reshape(2 * len(first), -1), axis=0)) == 2 * len(first)  # but groups elsewhere


def test_without_identical_g_all_starts_differ(starts):
    first = starts[False]["starts"]
    assert len(np.unique(first.reshape(-1, first.shape[-1]), axis=0)) == first.shape[0] * GROUP


STARTING = {"Swarm": dict(noise=0.5), "LidarNavigation": {}, "VmasNavigation": {}}
STARTING |= {"DenseLunarLander": {}, "LunarLander-v3": {}, "CartPole-v1": {}}


@pytest.mark.parametrize("env_id", STARTING)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_identical_starts_are_those_of_the_first_of_a_group_and_only_the_starts_are_identical(env_id, num_workers):
    world = envs.make_vec(env_id, 4, num_workers, **STARTING[env_id])
    plain, _ = world.reset(seed=5)
    same, _ = world.reset(seed=5, options={"identical": True})
    assert (same == plain[0]).all() and len(np.unique(plain, axis=0)) == 4
    if env_id == "Swarm":  # whose headings are noisy
        assert len(np.unique(world.step(np.zeros(world.action_space.shape, np.float32))[0], axis=0)) == 4
    if "Lander" in env_id:  # whose engines' thrust is dispersed at random
        assert len(np.unique(world.step(np.full(4, 2))[0], axis=0)) == 4
    pairs, _ = world.reset(seed=5, options={"identical": 2})
    assert (pairs == plain[[0, 0, 2, 2]]).all()
    for alone in (False, 1):
        again, _ = world.reset(seed=5, options={"identical": alone})
        assert (again == plain).all()
    world.close()


@pytest.mark.parametrize("env_id", ["DenseLunarLander", "CartPole-v1"])
def test_identical_starts_need_a_seed(env_id):
    with pytest.raises(ValueError, match="identical.*True.*seed"):
        envs.make_vec(env_id, 2, 0).reset(options={"identical": True})
    for wrong in (-3, 1.5, "all"):
        with pytest.raises(ValueError, match=f"identical.*{wrong}"):
            envs.make_vec(env_id, 2, 0).reset(seed=1, options={"identical": wrong})


def killed_run(nursery, cwd, args):
    """SIGKILL after some checkpoints, and again; then to the end."""
    for times in (0, 2):
        with nursery.start(cwd, args) as run:
            folder = run.wait_for("*/checkpoint.pt").parent
            run.wait_until(replaced(folder, times), "checkpoints")
            run.kill(signal.SIGKILL)
            run.finish()
    return nursery.run_one(cwd, **args)


def test_a_run_killed_twice_ends_with_identical_weights_and_curves(nursery, finished, tmp_path):
    result = killed_run(nursery, tmp_path, SMALL)
    assert result.code == 0 and "resumed at" in result.output, result.output
    assert_same_weights(result.folder / "model.pt", finished.folder / "model.pt")
    assert_same_curves(result.folder, finished.folder)
    assert table(result.output) == table(finished.output)


GYMNASIUM = SMALL | dict(env_id="CartPole-v1", num_workers=0, ref_update_freq=3)
GYMNASIUM |= dict(eval_env_kwargs=dict(max_episode_steps=40))


def test_a_signal_saves_and_the_rest_is_identical_in_a_gymnasium_environment_too(nursery, tmp_path):
    (whole,) = nursery.run((tmp_path / "whole", GYMNASIUM), script=SCRIPTS["hybrid"])
    assert whole.code == 0, whole.output
    cwd = tmp_path / "interrupted"
    cwd.mkdir()
    with nursery.start(cwd, GYMNASIUM) as run:
        run.wait_for("*/checkpoint.pt")
        run.kill(signal.SIGTERM)
        stopped = run.finish()
    assert stopped.code == 0 and "goes on from there" in stopped.output, stopped.output
    (result,) = nursery.run((cwd, GYMNASIUM), script=SCRIPTS["hybrid"])
    assert result.code == 0 and "resumed at" in result.output, result.output
    assert_same_weights(result.folder / "model.pt", whole.folder / "model.pt")
    assert_same_curves(result.folder, whole.folder)


def test_outcome_supervision_learns_cartpole(nursery, tmp_path):
    args = dict(env_id="CartPole-v1", num_workers=0, total_timesteps=60_000)
    args |= dict(group_size=16, num_minibatches=8, eval_episodes=20, eval_every=10**9, learning_rate=3e-3)
    args |= dict(eval_env_kwargs=dict(max_episode_steps=200))
    result = nursery.run_one(tmp_path, script=SCRIPTS["perep"], **args)
    assert result.code == 0, result.output
    assert float(table(result.output)["grpo_perep"][0].split()[0]) > 60  # random: 22


def test_evaluate_prints_the_table_of_the_run_again_and_judges_elsewhere(nursery, finished, model, tmp_path):
    elsewhere = dict(eval_env_id="LunarLander-v3", eval_env_kwargs=dict(max_episode_steps=40))
    jobs = []
    for name, change in (("again", {}), ("elsewhere", elsewhere), ("trained", dict(env_kwargs=dict(gravity=-9)))):
        (tmp_path / name).mkdir()
        jobs.append((tmp_path / name, dict(evaluate=shutil.copy(model, tmp_path / name)) | change))
    again, other, refused = nursery.run(*jobs, script=SCRIPTS["hybrid"])
    assert [again.code, other.code] == [0, 0], again.output + other.output
    assert refused.code == 1 and "env_kwargs is {'gravity': -9}: with evaluate they must be left out" in refused.output
    assert table(again.output) == table(finished.output)
    assert list(table(other.output))[1:] == ["grpo_hybrid", "sampled", "heuristic", "random"]
    (drawn,) = (tmp_path / "again").glob("evaluate-*")
    assert contents(drawn) == ["eval.mp4", "eval.png"] and not folders(tmp_path / "again")


def test_init_from_starts_with_the_weights_of_the_saved_model(nursery, model, tmp_path):
    args = BRIEF | dict(learning_rate=1e-10, init_from=model)
    result = nursery.run_one(tmp_path, script=SCRIPTS["hybrid"], **args)
    assert result.code == 0, result.output
    before, after = saved(model)["model"], saved(result.folder / "model.pt")["model"]
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-7)


RANKS = """
import atexit, hashlib, os, torch
weights, step = [], torch.optim.Adam.step

def recorded(self, *args, **kwargs):
    result = step(self, *args, **kwargs)
    weights.append(hashlib.sha256(self.param_groups[0]["params"][0].numpy().tobytes()).hexdigest())
    return result

torch.optim.Adam.step = recorded
atexit.register(lambda: torch.save(weights, f"weights-{os.environ['RANK']}.pt"))
"""


def test_torchrun_ranks_agree_on_the_weights_after_every_gradient_step(nursery, tmp_path):
    result, other = nursery.run_ranks(tmp_path, BRIEF, probe=RANKS, script=SCRIPTS["perstep"])
    assert [result.code, other.code] == [0, 0], result.output + other.output
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in range(2))
    assert first == second and len(set(first)) == len(first) >= 4
    assert contents(result.folder)[-1] == "model.pt"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_and_envs_alone_in_an_empty_folder_run(tmp_path, name):
    copy_alone(SCRIPTS[name], tmp_path)
    arguments = flags(**BRIEF) if name == "perep" else ["--help"]  # one whole run is enough
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, SCRIPTS[name].name, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert name != "perep" or "model.pt" in contents(folders(tmp_path)[0])


BAD_ARGUMENTS = {
    **dict.fromkeys(("num_groups", "num_steps", "num_minibatches", "update_epochs", "ref_update_freq"), (0, -3)),
    **dict.fromkeys(("eval_every", "eval_episodes", "checkpoint_every", "total_timesteps"), (0, -1)),
    **dict.fromkeys(("learning_rate", "clip_coef", "max_grad_norm", "target_kl"), (0.0, -1.0, math.nan)),
    "group_size": (1, -2),
    "kl_coef": (1e-5, 1.5, math.nan),
    "kl_coef_target": (0.0, -1.0, math.nan),
    "kl_adjust": (0.9, math.nan),
    "ent_coef": (-0.1, math.inf),
    "hidden_dim": (1,),
    "seed": (-1, envs.VALIDATION_SEED),
}
OF_HYBRID = {
    "gamma": (-0.1, 1.1),
    **dict.fromkeys(("hybrid_alpha", "hybrid_beta"), (-1.0, math.nan)),
    "hybrid_clip": (0.0,),
}


@pytest.mark.parametrize(
    "module, name, value",
    [(module, name, value) for name, values in BAD_ARGUMENTS.items() for value in values for module in MODULES]
    + [("hybrid", name, value) for name, values in OF_HYBRID.items() for value in values],
)
def test_a_bad_argument_is_refused_by_name_with_its_value_and_what_is_allowed(module, name, value):
    with pytest.raises(ValueError) as caught:
        MODULES[module].Args(**{name: value})
    message = str(caught.value)
    assert name in message and str(value) in message and "must" in message


@pytest.mark.parametrize("module", MODULES.values())
def test_policies_are_evaluated_where_they_train_but_on_landers_that_start_in_the_middle(module):
    for env_id in ("DenseLunarLander", "SparseLunarLander", "LunarLander"):
        args = module.Args(env_id=env_id, env_kwargs=dict(gravity=-9), eval_env_kwargs=dict(max_steps=50))
        assert args.eval_env_id == "LunarLander"
        assert args.eval_env_kwargs == dict(gravity=-9, max_steps=50) and args.env_kwargs == dict(gravity=-9)
    assert module.Args(env_id="CartPole-v1").eval_env_id == "CartPole-v1"
    given = module.Args(eval_env_id="LunarLander-v3", env_kwargs=dict(gravity=-9))
    assert (given.eval_env_id, given.eval_env_kwargs) == ("LunarLander-v3", {})


BAD_COMMANDS = {
    "num_minibatches": (dict(num_minibatches=9), "9.*at most 8"),
    "env_id": (dict(env_id="LunarLandr"), "LunarLandr"),
    "env_id of a swarm": (dict(env_id="Swarm", eval_env_kwargs={}), "Swarm.*discrete actions"),
    "env_id continuous": (dict(env_kwargs=dict(continuous=True)), "'LunarLander'.*discrete actions"),
    "eval_env_id": (dict(eval_env_id="CartPole-v1", eval_env_kwargs={}), "CartPole-v1.*as LunarLander"),
    "gravity": (dict(env_kwargs=dict(gravity=9)), "9"),
    "warp": (dict(eval_env_kwargs=dict(warp=9)), "9"),
}


@pytest.fixture(scope="module")
def bad_commands(nursery, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("bad")
    jobs = [(cwd / name.replace(" ", "-"), BRIEF | change) for name, (change, _) in BAD_COMMANDS.items()]
    return dict(zip(BAD_COMMANDS, nursery.run(*jobs, script=SCRIPTS["hybrid"]), strict=True))


@pytest.mark.parametrize("name", BAD_COMMANDS)
def test_a_bad_command_is_refused_by_name_before_anything_starts(bad_commands, name):
    result, pattern = bad_commands[name], BAD_COMMANDS[name][1]
    error = error_of(result.output) or " ".join(re.sub("[│╭╰╮╯─]", " ", result.output).split())
    assert result.code != 0 and re.search(f"{name.split()[0]}.*{pattern}", error), result.output
    assert not (result.cwd / "runs").exists()


def test_help_explains_every_argument():
    for name in SCRIPTS:
        environment = ENVIRONMENT | {"COLUMNS": "120"}
        text = subprocess.run(
            [*command(name), "--help"], env=environment, capture_output=True, text=True, check=True
        ).stdout
        flat = " ".join(re.sub("[│╭╰╮╯─]", " ", text).split())
        for field in MODULES[name].Args.__dataclass_fields__:
            assert f"--{field.replace('_', '-')}" in flat, field
        for line in MODULES[name].__doc__.splitlines():
            assert line.strip() in [shown.strip() for shown in text.splitlines()], line
        assert max(map(len, text.splitlines())) <= 120
