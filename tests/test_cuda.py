"""On a GPU every script trains to the weights of the CPU, within rounding, and goes on where it was stopped.

Skipped where there is none.
"""

import signal

import pytest
import torch
from running import PER_UPDATE, ROOT, SMALL, assert_same_weights, nursery_of, saved
from test_async_ppo import ASYNC
from test_grpo import SMALL as GRPO

CUDA = dict(cuda=True)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

FEW = dict(eval_episodes=1, eval_every=10**9, checkpoint_every=10**9, learning_rate=1e-4)
FEW |= dict(total_timesteps=3 * PER_UPDATE)
SYNCHRONOUS = ASYNC | FEW | dict(num_actors=0, total_timesteps=512)
RUNS = {  # script and arguments
    "ppo_swarm, mlp": ("ppo_swarm", SMALL | FEW),
    "ppo_swarm, gnn": ("ppo_swarm", SMALL | FEW | dict(policy="gnn", critic="central")),
    "ppo_swarm, attention": ("ppo_swarm", SMALL | FEW | dict(policy="attention", share_policy=False)),
    "ppo_swarm_lstm": ("ppo_swarm_lstm", SMALL | FEW | dict(env_id="Swarm")),
    "grpo_perstep": ("grpo_perstep", GRPO | FEW | dict(total_timesteps=1000)),
    "grpo_perep": ("grpo_perep", GRPO | FEW | dict(total_timesteps=1000)),
    "grpo_hybrid": ("grpo_hybrid", GRPO | FEW | dict(total_timesteps=1000)),
    "async_ppo, discrete, RND": ("async_ppo", SYNCHRONOUS | dict(rnd_coef=0.5, norm_obs=True, vtrace=True)),
    "async_ppo, continuous": ("async_ppo", SYNCHRONOUS | dict(env_id="Pendulum-v1")),
}


nursery = nursery_of("Swarm", "LunarLander", "DenseLunarLander")


@gpu
@pytest.mark.parametrize("name", RUNS)
def test_the_gpu_gives_the_weights_of_the_cpu_within_rounding(nursery, tmp_path, name):
    script, args = RUNS[name]
    jobs = [(tmp_path / device, args | change) for device, change in (("cpu", {}), ("gpu", CUDA))]
    cpu, gpu = nursery.run(*jobs, script=ROOT / f"{script}.py")
    assert [cpu.code, gpu.code] == [0, 0], gpu.output
    before, after = (saved(run.folder / "model.pt")["model"] for run in (cpu, gpu))
    for weight, expected in before.items():
        torch.testing.assert_close(after[weight].cpu(), expected, rtol=1e-2, atol=1e-4)


@gpu
def test_actors_on_the_cpu_feed_a_learner_on_the_gpu(nursery, tmp_path):
    result = nursery.run_one(tmp_path, script=ROOT / "async_ppo.py", **ASYNC | CUDA)
    assert result.code == 0, result.output


@gpu
@pytest.mark.parametrize("script", ["ppo_swarm", "ppo_swarm_lstm", "grpo_hybrid", "async_ppo"])
def test_a_stopped_run_on_the_gpu_ends_with_identical_weights(nursery, tmp_path, script):
    args = {"ppo_swarm": SMALL, "ppo_swarm_lstm": SMALL | dict(env_id="Swarm"), "grpo_hybrid": GRPO}
    args = args.get(script, ASYNC | dict(num_actors=0, env_id="DenseLunarLander")) | CUDA
    file, cwd = ROOT / f"{script}.py", tmp_path / "stopped"
    whole = nursery.run_one(tmp_path / "whole", script=file, **args)
    assert whole.code == 0, whole.output
    cwd.mkdir()
    with nursery.start(cwd, args, script=file) as run:
        run.wait_for("*/checkpoint.pt")
        run.kill(signal.SIGTERM)
        assert run.finish().code == 0, run.output
    result = nursery.run_one(cwd, script=file, **args)
    assert result.code == 0 and "resumed at" in result.output, result.output
    assert_same_weights(result.folder / "model.pt", whole.folder / "model.pt")
