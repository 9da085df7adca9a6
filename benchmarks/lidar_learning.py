"""What ppo_swarm.py and ppo_swarm_lstm.py learn on LidarNavigation. From the repository's root, 40 minutes on 2 cores:

    python benchmarks/lidar_learning.py                                         the goal always shown
    python benchmarks/lidar_learning.py --hide --folder runs/lidar_hide         a goal that hides, 30 minutes

The second one trains in stages, each of which goes on from the model of the one before, with the standard deviation of
an untrained policy: first the goal is always shown, then in the first 60 observations (3 s) after it was set, in 40 and
in 25, and hidden after them: to one that cannot drive yet, remembering is worth nothing, and to one that forgets, a
hidden goal is lost for the rest of the episode. Therefore, too, episodes are of 10 s; the arena is without obstacles.
The LSTM is shared with the critic, so that its loss, too, tells what to remember, and rollouts are twice as long as by
default.

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
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs
import ppo_swarm
import ppo_swarm_lstm

FLAGS = {
    "ppo_swarm": "--env-id LidarNavigation --hidden-dim 128 --init-logstd -0.7 --num-minibatches 8 "
    "--learning-rate 7e-4 --total-timesteps 12000000 --eval-every 1000000",
    "ppo_swarm_lstm": "",
}
HIDE_FLAGS = {  # the last --total-timesteps counts
    "ppo_swarm": "--total-timesteps 4000000",
    "ppo_swarm_lstm": "--total-timesteps 4000000 --share-lstm --num-steps 128 --num-envs 16",
}
SCRIPTS = {"ppo_swarm": ppo_swarm, "ppo_swarm_lstm": ppo_swarm_lstm}
METRICS = {"r": "return", "goals": "goals per robot", "collisions_per_goal": "collisions per goal",
           "path_efficiency": "path efficiency", "contact": "share of steps in contact"}  # fmt: skip


@dataclass
class Options:
    folder: Path = Path("runs/lidar_learning")  # where the runs go
    seeds: tuple[int, ...] = (1, 2, 3)
    scripts: tuple[str, ...] = ("ppo_swarm", "ppo_swarm_lstm")
    hide: bool = False  # train the stages in which the goal hides, instead


def train(options, script, seed):
    """The folder of the finished run, or with `hide` that of each stage; `minutes` in it holds its wall time."""
    folders = []
    for stage, env_kwargs in enumerate(stages(options)):
        cwd = options.folder / "-".join([script, str(seed), *map(str, env_kwargs.values())])
        if not (cwd / "minutes").exists():
            shutil.rmtree(cwd, ignore_errors=True)  # half a run: its wall time is lost
            cwd.mkdir(parents=True)
            flags = ["--seed", str(seed), *FLAGS[script].split()]
            if options.hide:
                flags += HIDE_FLAGS[script].split()
                flags += ["--env-kwargs", *(str(part) for item in env_kwargs.items() for part in item)]
            if stage > 0:
                last = envs.load(next(folders[-1].glob("runs/*/model.pt")))
                last["model"]["actor_logstd"].fill_(last["args"]["init_logstd"])
                torch.save(last, cwd / "start.pt")
                flags += ["--init-from", "start.pt"]
            start = time.time()
            with open(cwd / "log", "w") as log:
                command = [sys.executable, sys.path[0] + f"/{script}.py", *flags]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                subprocess.run(command, cwd=cwd, env=environment, stdout=log, stderr=log, check=True)
            (cwd / "minutes").write_text(str((time.time() - start) / 60))
        folders.append(cwd)
    return folders


def stages(options):
    """The environment's arguments in one stage after another."""
    if not options.hide:
        return [{}]
    return [
        {"goal_visible_steps": visible, "max_steps": 200, "n_obstacles": 0, "collision_weight": 0.3}
        for visible in (200, 60, 40, 25)
    ]


def judge(script, cwd, **env_kwargs):
    """{metric: mean} of the run's best policy over 100 held-out episodes."""
    saved = envs.load(next(cwd.glob("runs/*/model.pt")))
    args = SCRIPTS[script].Args(**saved["args"])
    agent = SCRIPTS[script].Agent(args, envs.make_vec("LidarNavigation", 1, 0))
    agent.load_state_dict(saved["model"])
    return evaluated(agent.make_policy, **env_kwargs)


def evaluated(make_policy, **env_kwargs):
    stats, _, _ = envs.evaluate(make_policy, "LidarNavigation", 100, ppo_swarm.TEST_SEED, **env_kwargs)
    goals = stats["goals"].sum() or np.nan
    stats["collisions_per_goal"] = stats["collisions"].sum() / goals  # not the mean of ratios
    return {name: float(np.mean(stats[name])) for name in METRICS}


def main(options):
    with ThreadPoolExecutor(2) as pool:
        runs = {
            (script, seed): pool.submit(train, options, script, seed)
            for script, seed in product(options.scripts, options.seeds)
        }
    for script in options.scripts:
        print(f"    python {script}.py --seed S {FLAGS[script]} {HIDE_FLAGS[script] if options.hide else ''}")
    for stage, env_kwargs in enumerate(stages(options)):
        print(f"\n100 held-out episodes, {env_kwargs or 'default arguments'}; mean +- std over seeds {options.seeds}\n")
        print(f"| policy | {' | '.join(METRICS.values())} | minutes |")
        print("|---" * (len(METRICS) + 2) + "|")
        for script in options.scripts:
            folders = [runs[script, seed].result()[stage] for seed in options.seeds]
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
