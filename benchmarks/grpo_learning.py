"""What the three GRPO scripts learn, judged by Gymnasium's own lander. From the repository root, 12 minutes on 2 cores:

    python benchmarks/grpo_learning.py                                     the three scripts with default flags
    python benchmarks/grpo_learning.py --identical-g True False --plot docs/identical_starts.png \
        --folder runs/identical_starts                                     identical starts, and different ones
    python benchmarks/grpo_learning.py --env-ids SparseLunarLander         trained on the reward at the end only

Trains every script with seeds 1, 2 and 3, two runs side by side with one torch thread each, by the command `python
grpo_X.py --seed S` and no flags but those that the options above name. Prints a table of the mean return on 100
held-out episodes of Box2D's LunarLander-v3, of the greedy and the sampled policy, and their share of successes (both
legs down, speed below 0.1, |x| below 0.2 at the end). Minutes are wall time of the whole command. A run that is already
complete under --folder is not trained again.
"""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs
from grpo_perstep import TEST_SEED, Agent, Args, load  # the network and the files are the same in all three

EPISODES = 100


@dataclass
class Options:
    folder: Path = Path("runs/grpo_learning")  # where the runs go
    seeds: tuple[int, ...] = (1, 2, 3)
    scripts: tuple[str, ...] = ("perstep", "perep", "hybrid")
    env_ids: tuple[str, ...] = ("DenseLunarLander",)  # trained on
    identical_g: tuple[bool, ...] = ()  # none: as each script has it by default
    flags: str = ""  # further flags of the scripts, as in: --flags="--total-timesteps 3000000"
    plot: Path | None = None  # draw the held-out return during the training there


def train(options, script, env_id, identical_g, seed):
    """The folder of the finished run; `minutes` in it holds its wall time."""
    flags = ["--seed", str(seed), "--env-id", env_id, *options.flags.split()]
    if identical_g is not None:
        flags.append("--identical-g" if identical_g else "--no-identical-g")
    cwd = options.folder / f"{script}-{'_'.join(flags).replace('--', '')}"
    if not (cwd / "minutes").exists():
        shutil.rmtree(cwd, ignore_errors=True)  # half a run: its wall time is lost
        cwd.mkdir(parents=True)
        start = time.time()
        with open(cwd / "log", "w") as log:
            command = [sys.executable, sys.path[0] + f"/grpo_{script}.py", *flags]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, cwd=cwd, env=environment, stdout=log, stderr=log, check=True)
        (cwd / "minutes").write_text(str((time.time() - start) / 60))
    return cwd


def trained(cwd):
    """The saved policy of a run: a function of environments, and of whether to be greedy."""
    saved = load(next(cwd.glob("runs/*/model.pt")))
    known = {name: value for name, value in saved["args"].items() if name in Args.__dataclass_fields__}
    agent = Agent(Args(**known), envs.make_vec("LunarLander", 1, 0))
    agent.load_state_dict(saved["model"])
    return agent.make_policy


def judge(make_policy):
    """Mean return and share of successes over the first episodes of as many environments, on Box2D."""
    world = envs.make_vec("LunarLander-v3", EPISODES)
    policy, running = make_policy(world), np.ones(EPISODES, bool)
    returns, success = np.zeros(EPISODES), np.zeros(EPISODES, bool)
    observations, infos = world.reset(seed=TEST_SEED)
    while running.any():
        observations, _, _, _, infos = world.step(policy(observations, infos))
        if "episode" in infos:
            ended = running & infos["_episode"]
            x, _, speed_x, speed_y, _, _, left, right = infos["final_obs"].T
            landed = (left + right == 2) & (np.hypot(speed_x, speed_y) < 0.1) & (np.abs(x) < 0.2)
            returns[ended], success[ended] = infos["episode"]["r"][ended], landed[ended]
            running &= ~ended
    world.close()
    return returns.mean(), success.mean()


def plot(curves, path):
    """{label: [run's folder]}: the held-out return through the training, mean and range over the seeds."""
    from matplotlib.figure import Figure
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, folders in curves.items():
        runs = []
        for folder in folders:
            events = EventAccumulator(str(next(folder.glob("runs/*"))))
            events.Reload()
            runs.append([(event.step, event.value) for event in events.Scalars("eval/r")])
        runs = np.array([run[: min(map(len, runs))] for run in runs])  # (seeds, evaluations, step and return)
        steps, returns = runs[:, :, 0].mean(0) / 1e6, runs[:, :, 1]
        (line,) = axes.plot(steps, returns.mean(0), label=label)
        axes.fill_between(steps, returns.min(0), returns.max(0), color=line.get_color(), alpha=0.15)
    axes.set(xlabel="million steps", ylabel="held-out return of the greedy policy")
    axes.legend()
    figure.savefig(path, dpi=100)


def spread(values, digits=0):
    return f"{np.mean(values):.{digits}f} +- {np.std(values):.{digits}f}"


def main(options):
    settings = list(product(options.scripts, options.env_ids, options.identical_g or (None,)))
    with ThreadPoolExecutor(2) as pool:
        futures = {
            (*setting, seed): pool.submit(train, options, *setting, seed)
            for setting, seed in product(settings, options.seeds)
        }
    print(f"\n{EPISODES} held-out episodes of Box2D's LunarLander-v3; mean +- std over seeds {options.seeds}\n")
    print("| script | trained on | starts | greedy | worst seed | success | sampled | success | minutes |")
    print("|---" * 9 + "|")
    curves = {}
    for script, env_id, identical_g in settings:
        runs = [futures[script, env_id, identical_g, seed].result() for seed in options.seeds]
        greedy, sampled = (
            np.transpose([judge(partial(trained(run), greedy=greedy)) for run in runs]) for greedy in (True, False)
        )
        minutes = np.mean([float((run / "minutes").read_text()) for run in runs])
        starts = {None: "by default", True: "identical", False: "different"}[identical_g]
        curves[f"{script}, {starts} starts"] = runs
        row = [f"grpo_{script}.py", env_id, starts, spread(greedy[0]), f"{greedy[0].min():.0f}", spread(greedy[1], 2)]
        row += [spread(sampled[0]), spread(sampled[1], 2), f"{minutes:.1f}"]
        print(f"| {' | '.join(row)} |", flush=True)
    if options.plot:
        plot(curves, options.plot)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
