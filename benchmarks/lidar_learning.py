"""What ppo_swarm.py and ppo_swarm_lstm.py learn on LidarNavigation. From the repository's root, 40 minutes on 2 cores:

    python benchmarks/lidar_learning.py                     both scripts, the goal always shown
    python benchmarks/lidar_learning.py --visible 10        ... for 10 observations after it was set, then hidden

The second one trains the models of the first one for 4 M steps more, with the goal hidden from then on: to one that
cannot drive yet, remembering the goal is worth nothing.

Trains with seeds 1, 2 and 3, two runs side by side with one torch thread each, and prints what the best policy of each
run does in 100 held-out episodes, mean and standard deviation over seeds, beside the baselines. Minutes are wall time
of the whole command. A run that is already complete under --folder is not trained again.
"""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs
import ppo_swarm
import ppo_swarm_lstm

FLAGS = {
    "ppo_swarm": "--env-id LidarNavigation --hidden-dim 128 --init-logstd -0.7 --gamma 0.98 --num-minibatches 8 "
    "--learning-rate 7e-4 --total-timesteps 12000000 --eval-every 1000000",
    "ppo_swarm_lstm": "",
}
SCRIPTS = {"ppo_swarm": ppo_swarm, "ppo_swarm_lstm": ppo_swarm_lstm}
METRICS = {"r": "return", "goals": "goals per robot", "collisions_per_goal": "collisions per goal",
           "path_efficiency": "path efficiency", "contact": "share of steps in contact"}  # fmt: skip


@dataclass
class Options:
    folder: Path = Path("runs/lidar_learning")  # where the runs go
    seeds: tuple[int, ...] = (1, 2, 3)
    scripts: tuple[str, ...] = ("ppo_swarm", "ppo_swarm_lstm")
    visible: int | None = None  # goal_visible_steps


def train(options, script, seed, visible):
    """The folder of the finished run; `minutes` in it holds its wall time."""
    cwd = options.folder / f"{script}-{visible}-{seed}"
    if visible is not None:
        model = next(train(options, script, seed, None).glob("runs/*/model.pt")).resolve()
    if not (cwd / "minutes").exists():
        shutil.rmtree(cwd, ignore_errors=True)  # half a run: its wall time is lost
        cwd.mkdir(parents=True)
        start = time.time()
        with open(cwd / "log", "w") as log:
            command = [sys.executable, sys.path[0] + f"/{script}.py", "--seed", str(seed), *FLAGS[script].split()]
            if visible is not None:
                command += ["--env-kwargs", "goal_visible_steps", str(visible), "--init-from", str(model)]
                command += ["--total-timesteps", "4000000"]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, cwd=cwd, env=environment, stdout=log, stderr=log, check=True)
        (cwd / "minutes").write_text(str((time.time() - start) / 60))
    return cwd


def judge(script, cwd, **env_kwargs):
    """{metric: mean} of the run's best policy over 100 held-out episodes."""
    saved = envs.load(next(cwd.glob("runs/*/model.pt")))
    args = SCRIPTS[script].Args(**saved["args"])
    agent = SCRIPTS[script].Agent(args, envs.make_vec("LidarNavigation", 1, 0))
    agent.load_state_dict(saved["model"])
    return evaluated(agent.make_policy, **env_kwargs)


def evaluated(make_policy, **env_kwargs):
    stats, _, _ = envs.evaluate(make_policy, "LidarNavigation", 100, ppo_swarm.TEST_SEED, **env_kwargs)
    stats["collisions_per_goal"] = stats["collisions"].sum() / max(stats["goals"].sum(), 1)  # not the mean of ratios
    return {name: float(np.mean(stats[name])) for name in METRICS}


def main(options):
    env_kwargs = {} if options.visible is None else {"goal_visible_steps": options.visible}
    with ThreadPoolExecutor(2) as pool:
        runs = {
            (script, seed): pool.submit(train, options, script, seed, options.visible)
            for script, seed in product(options.scripts, options.seeds)
        }
    shown = "always" if options.visible is None else f"for {options.visible} observations"
    print(f"\n100 held-out episodes, the goal shown {shown}; mean +- std over seeds {options.seeds}\n")
    for script in options.scripts:
        print(f"    python {script}.py --seed S {FLAGS[script]}")
    print(f"\n| policy | {' | '.join(METRICS.values())} | minutes |")
    print("|---" * (len(METRICS) + 2) + "|")
    for script in options.scripts:
        folders = [runs[script, seed].result() for seed in options.seeds]
        scores = [judge(script, cwd, **env_kwargs) for cwd in folders]
        columns = [
            f"{np.mean([score[name] for score in scores]):.3f} +- {np.std([score[name] for score in scores]):.3f}"
            for name in METRICS
        ]
        minutes = np.mean([float((cwd / "minutes").read_text()) for cwd in folders])
        print(f"| {script}.py | {' | '.join(columns)} | {minutes:.1f} |", flush=True)
    for name, (make_policy, _) in envs.baselines("LidarNavigation").items():
        score = evaluated(make_policy, **env_kwargs)
        print(f"| {name} | {' | '.join(f'{score[metric]:.3f}' for metric in METRICS)} | |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
