"""Stages of training: --train-kwargs with several values, by share of the steps or by held-out returns."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from running import (
    BRIEF,
    ROOT,
    assert_same_curves,
    assert_same_weights,
    curves,
    error_of,
    nursery_of,
    saved,
)
from test_async_ppo import ASYNC
from test_async_ppo import PER_UPDATE as PER_BATCH
from test_grpo import BRIEF as GRPO
from test_grpo import GROUP

import envs
import ppo_swarm

nursery = nursery_of("Swarm", "LidarNavigation", "DenseLunarLander", "LunarLander")


# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------


def test_several_values_are_stages_one_after_the_other():
    train_kwargs = {"a": "1,2.5,x", "b": "True,False,True", "c": 7, "d": "3x2"}
    first, second, third = envs.split_stages({"a": 0, "e": 5}, train_kwargs)
    assert first == {"a": 1, "b": True, "c": 7, "d": "3x2", "e": 5} and type(first["a"]) is int
    assert second == {"a": 2.5, "b": False, "c": 7, "d": "3x2", "e": 5}
    assert third == {"a": "x", "b": True, "c": 7, "d": "3x2", "e": 5}


def test_without_several_values_there_is_one_stage():
    assert envs.split_stages({"a": 0}, {}) == [{"a": 0}]
    assert envs.split_stages({"a": 0}, {"a": 1}) == [{"a": 1}]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (dict(train_kwargs={"dt": "1,2", "radius": "1,2,3"}), "dt must have 3 values, as others have, or one"),
        (dict(env_kwargs={"n_agents": 4}), "env_kwargs is .* n_agents must be given by itself, as --n-agents"),
        (dict(train_kwargs={"count_self": "True,false"}), "count_self is 'false', a text"),
        (dict(train_kwargs={"dt": "1,2"}, stage_returns="1,2"), "stage_returns is '1,2': with 2 .* must be 1 numbers"),
        (dict(train_kwargs={"dt": "1,2"}, stage_returns="soon"), "stage_returns is 'soon': .* must be 1 numbers"),
        (dict(train_kwargs={"dt": "1,2"}, stage_returns="nan"), "stage_returns is 'nan': .* must be 1 numbers"),
        (dict(stage_returns="1"), "stage_returns is '1': with 1 stages .* must be left out"),
        (dict(stage_returns="soon"), "stage_returns is 'soon': with 1 stages .* must be left out"),
        (dict(train_kwargs={"dt": "1,2,"}), "train_kwargs is .* dt must have a value beside every comma"),
        (dict(train_kwargs={"dt": "1,,2"}), "train_kwargs is .* dt must have a value beside every comma"),
        (dict(env_kwargs={"count_self": "false"}, train_kwargs={"count_self": True}), "count_self is 'false', a text"),
    ],
)
def test_arguments_that_make_no_stages_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        ppo_swarm.Args(**args)


@pytest.mark.parametrize("n_neighbors", [4, "4,4", "6,4"])
def test_agents_must_observe_and_act_as_in_the_task_itself(n_neighbors):
    args = ppo_swarm.Args(train_kwargs={"n_neighbors": n_neighbors})
    with pytest.raises(ValueError, match="must observe and act as without it, .* not with .*'n_neighbors': 4"):
        envs.make_all(args, 2, 0, {})


@pytest.mark.parametrize("own", [{"share_policy": False}, {"share_critic": False}])
def test_agents_with_a_network_of_their_own_stay_as_many(own):
    args = ppo_swarm.Args(train_kwargs={"n_agents": "10,4"}, **own)
    with pytest.raises(ValueError, match="must be as many as without it, which they are not with .*'n_agents': 4"):
        envs.make_all(args, 2, 0, {"n_agents": 10})


def test_a_task_that_cannot_be_made_is_said_at_the_start():
    with pytest.raises(ValueError, match="radius is -1"):
        envs.make_all(ppo_swarm.Args(train_kwargs={"radius": 1}), 2, 0, {"radius": -1})


def test_swarms_train_in_short_episodes_unless_max_steps_is_given():
    assert ppo_swarm.Args().train_kwargs == {"max_steps": 60}
    assert ppo_swarm.Args(env_kwargs={"max_steps": 100}).train_kwargs == {}
    assert ppo_swarm.Args(train_kwargs={"max_steps": "9,8", "dt": 1}).train_kwargs == {"max_steps": "9,8", "dt": 1}
    assert ppo_swarm.Args(env_id="LidarNavigation").train_kwargs == {}


@pytest.mark.parametrize("saved_kwargs", [{}, {"max_steps": "9,8"}])
def test_an_evaluation_begins_without_the_stages_of_the_training(monkeypatch, tmp_path, saved_kwargs):
    trained = ppo_swarm.Args(train_kwargs=saved_kwargs, stage_returns="1" if saved_kwargs else None)
    envs.save({"args": dataclasses.asdict(trained), "model": {}}, tmp_path / "model.pt")
    words = ["ppo_swarm.py", "--evaluate", str(tmp_path / "model.pt")]
    monkeypatch.setattr(sys, "argv", words)
    args = envs.parse_args(ppo_swarm.Args, "A script.")
    assert args.train_kwargs == {"max_steps": 60} and args.stage_returns is None
    monkeypatch.setattr(sys, "argv", [*words, "--train-kwargs", "max_steps", "7,6"])  # a training's command, repeated
    assert envs.parse_args(ppo_swarm.Args, "A script.").train_kwargs == {"max_steps": "7,6"}


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------

SHORT = dict(env_kwargs=dict(max_steps=20), eval_every=10**9, num_envs=8, n_agents=4)
STAGED = dict(train_kwargs=dict(max_steps="5,3"))
PER_ITERATION = 8 * 4 * BRIEF["num_steps"]
PPO = BRIEF | SHORT | STAGED | dict(env_id="LidarNavigation", total_timesteps=4 * PER_ITERATION, checkpoint_every=1)
LANDER = dict(eval_env_kwargs=dict(max_steps=30), checkpoint_every=1, eval_every=10**9)
LANDER |= dict(train_kwargs=dict(max_steps="9,6"))
RUNS = {  # script, arguments
    "ppo_swarm": PPO,
    "ppo_swarm_lstm": PPO,
    "grpo_perstep": GRPO | LANDER | dict(total_timesteps=8 * GROUP * 6),
    "grpo_perep": GRPO | LANDER | dict(total_timesteps=8 * GROUP * 6),
    "grpo_hybrid": GRPO | LANDER | dict(total_timesteps=8 * GROUP * 6),
    "async_ppo": ASYNC | LANDER | dict(num_actors=0, env_id="LunarLander", total_timesteps=4 * PER_BATCH),
}
GYMNASIUM = ASYNC | dict(num_actors=0, num_workers=2, env_id="Pendulum-v1", env_kwargs=dict(max_episode_steps=20))
GYMNASIUM |= dict(train_kwargs=dict(max_episode_steps="8,4"), total_timesteps=8 * PER_BATCH, checkpoint_every=1)
# Ends a run, as by a SIGTERM, after its N-th iteration
STOP = """
import itertools, os, signal, envs
log, count = envs.Run.log, itertools.count(1)
def log_and_stop(run, step, scalars):
    log(run, step, scalars)
    if next(count) == N:
        os.kill(os.getpid(), signal.SIGTERM)
envs.Run.log = log_and_stop
"""


@pytest.mark.parametrize("script", RUNS)
def test_a_run_goes_through_its_stages_and_stopped_before_or_after_the_change_ends_the_same(nursery, tmp_path, script):
    args, file = RUNS[script], ROOT / f"{script}.py"
    whole = nursery.run_one(tmp_path / "whole", script=file, **args)
    assert whole.code == 0, whole.output
    read = curves(whole.folder)
    stages = [stage for _, stage in read["charts/stage"]]
    assert stages == sorted(stages) and set(stages) == {1, 2}
    name, values = next(iter(args["train_kwargs"].items()))
    assert f"stage 2 of 2, {name} {values.split(',')[1]}" in whole.output
    longest = [int(value) for value in values.split(",")]
    lengths = dict(read["charts/episodic_length"])
    for stage, steps in enumerate(longest, 1):
        assert max(lengths.get(at, 0) for at, now in read["charts/stage"] if now == stage) == steps
    assert max(length for _, length in read["eval/l"]) > max(longest)  # evaluations are of the task itself

    change = stages.index(2)  # iterations in the first stage
    for count in (change - 1, change, change + 1):
        cwd = tmp_path / f"stopped-{count}"
        first = nursery.run_one(cwd, script=file, probe=f"N = {count}\n{STOP}", **args)
        assert first.code == 0 and "stopped at" in first.output, first.output
        checkpoint = saved(first.folder / "checkpoint.pt")
        assert checkpoint["stage"] == (count >= change)
        second = nursery.run_one(cwd, script=file, **args)
        assert second.code == 0 and "resumed at" in second.output, second.output
        assert_same_weights(second.folder / "model.pt", whole.folder / "model.pt")
        assert_same_curves(second.folder, whole.folder)


GROWING = BRIEF | SHORT | dict(train_kwargs=dict(max_steps=9, n_agents="2,6"), checkpoint_every=1)
GROWING |= dict(total_timesteps=4 * PER_ITERATION)


@pytest.mark.parametrize("script", ["ppo_swarm", "ppo_swarm_lstm"])
@pytest.mark.parametrize("policy", [dict(env_id="Swarm", policy="gnn"), dict(env_id="LidarNavigation")])
def test_a_swarm_grows_from_stage_to_stage(nursery, tmp_path, script, policy):
    args, file = GROWING | policy, ROOT / f"{script}.py"
    whole = nursery.run_one(tmp_path / "whole", script=file, **args)
    assert whole.code == 0, whole.output
    at, stages = zip(*curves(whole.folder)["charts/stage"], strict=True)
    small, large = PER_ITERATION // 4 * 2, PER_ITERATION // 4 * 6  # agent-steps of an iteration, of 2 and of 6 agents
    assert np.diff([0, *at]).tolist() == [small] * 4 + [large] * 2  # half of the steps each, the last ones whole
    assert stages == (1, 1, 1, 1, 2, 2)
    for count in (3, 4, 5):
        cwd = tmp_path / f"stopped-{count}"
        first = nursery.run_one(cwd, script=file, probe=f"N = {count}\n{STOP}", **args)
        assert first.code == 0 and "stopped at" in first.output, first.output
        second = nursery.run_one(cwd, script=file, **args)
        assert second.code == 0 and "resumed at" in second.output, second.output
        assert_same_weights(second.folder / "model.pt", whole.folder / "model.pt")
        assert_same_curves(second.folder, whole.folder)


def test_actors_go_on_to_the_next_stage(nursery, tmp_path):
    args = ASYNC | dict(num_actors=1, env_id="Pendulum-v1", env_kwargs=dict(max_episode_steps=20))
    args |= dict(train_kwargs=dict(max_episode_steps="8,4"), total_timesteps=40 * PER_BATCH)
    result = nursery.run_one(tmp_path, script=ROOT / "async_ppo.py", **args)
    assert result.code == 0, result.output
    lengths = [length for _, length in curves(result.folder)["charts/episodic_length"]]
    assert lengths[0] == 8 and lengths[-1] == 4
    assert sorted(lengths, reverse=True) == lengths  # one change, and a batch at most holds both


def test_environments_on_workers_go_on_in_the_stage_in_which_the_run_was_stopped(nursery, tmp_path):
    file = ROOT / "async_ppo.py"
    first = nursery.run_one(tmp_path, script=file, probe=f"N = 5\n{STOP}", **GYMNASIUM)
    assert first.code == 0 and "stopped at" in first.output, first.output
    second = nursery.run_one(tmp_path, script=file, **GYMNASIUM)
    assert second.code == 0 and "resumed at" in second.output, second.output
    lengths = [length for _, length in curves(second.folder)["charts/episodic_length"]]
    assert lengths == [8] * 4 + [4] * 4


def test_a_policy_trained_in_stages_is_evaluated_in_the_task_itself(nursery, tmp_path):
    args = BRIEF | SHORT | dict(env_id="LidarNavigation", train_kwargs=dict(width="4,3", height="3,4"))
    args |= dict(env_kwargs=dict(max_steps=20, n_obstacles=1), stage_returns="1e9")
    trained = nursery.run_one(tmp_path, **args)
    assert trained.code == 0, trained.output
    model = trained.folder / "model.pt"
    larger = nursery.run_one(tmp_path, evaluate=model, env_kwargs=dict(width=20, height=20, n_obstacles=40))
    assert larger.code == 0 and "| ppo_swarm |" in larger.output, larger.output
    again = nursery.run_one(tmp_path, **args | dict(evaluate=model, train_kwargs=dict(width="4,3"), stage_returns="1"))
    assert again.code == 0, again.output


def test_held_out_returns_begin_the_stages(nursery, tmp_path):
    args = BRIEF | SHORT | dict(env_id="LidarNavigation", total_timesteps=4 * PER_ITERATION, eval_every=PER_ITERATION)
    args |= dict(train_kwargs=dict(max_steps="5,4,3"), stage_returns="-1e9,1e9")
    result = nursery.run_one(tmp_path, **args)
    assert result.code == 0, result.output
    assert [stage for _, stage in curves(result.folder)["charts/stage"]] == [1, 2, 2, 2]
    assert f"step {PER_ITERATION:,}: stage 2 of 3, max_steps 4" in result.output and "stage 3" not in result.output


def test_the_processes_of_a_torchrun_go_on_together(nursery, tmp_path):
    args = BRIEF | SHORT | dict(env_id="LidarNavigation", total_timesteps=6 * PER_ITERATION)
    args |= dict(train_kwargs=dict(max_steps="5,4"), stage_returns="-1e9", eval_every=2 * PER_ITERATION)
    results = nursery.run_ranks(tmp_path, args, probe=LAST_STAGE)
    assert [result.code for result in results] == [0, 0], results[0].output
    assert [np.load(tmp_path / f"stages-{rank}.npy").tolist() for rank in range(2)] == [[0, 1, 1]] * 2


LAST_STAGE = """
import os, numpy as np, envs
evaluate, stages = envs.Run.evaluate, []
def evaluate_and_note(run, model):
    stages.append(run.stage)
    evaluate(run, model)
    np.save(f"stages-{run.rank}.npy", stages)
envs.Run.evaluate = evaluate_and_note
"""


def test_bad_arguments_of_a_later_stage_are_said_at_the_start(nursery, tmp_path):
    result = nursery.run_one(tmp_path, **BRIEF | dict(train_kwargs=dict(radius="1.5,-1")))
    assert result.code != 0 and "radius is -1" in error_of(result.output)
    assert not (tmp_path / "runs").exists()


def test_agents_of_a_stage_have_no_memory_of_the_stage_before(nursery, tmp_path):
    args = PPO | dict(env_kwargs=dict(max_steps=500), train_kwargs=dict(max_steps="500,400"))
    result = nursery.run_one(tmp_path, script=ROOT / "ppo_swarm_lstm.py", probe=f"N = 2\n{STOP}", **args)
    (own,) = saved(result.folder / "checkpoint.pt")["ranks"]
    assert torch.count_nonzero(own["memory"]) == 0
    other = nursery.run_one(tmp_path / "before", script=ROOT / "ppo_swarm_lstm.py", probe=f"N = 1\n{STOP}", **args)
    (own,) = saved(other.folder / "checkpoint.pt")["ranks"]
    assert torch.count_nonzero(own["memory"]) > 0
