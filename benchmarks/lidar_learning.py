"""What ppo_swarm.py and ppo_swarm_lstm.py learn on LidarNavigation. From the repository's root, an hour on 2 cores:

    python benchmarks/lidar_learning.py                                         the goal always shown
    python benchmarks/lidar_learning.py --hide --folder runs/lidar_hide         a goal that hides, likewise

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

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import tyro
from common import evaluate, load_policy, mean_and_interval, print_head, print_row, train, two_at_once

import envs

FLAGS = {
    "ppo_swarm": "--env-id LidarNavigation --hidden-dim 128 --init-logstd -0.7 --num-steps 32 "
    "--num-minibatches 8 --learning-rate 7e-4 --total-timesteps 12000000 --eval-every 1000000",
    "ppo_swarm_lstm": "",
}
HIDE_FLAGS = {  # the last --total-timesteps counts
    "ppo_swarm": "--total-timesteps 4000000",
    "ppo_swarm_lstm": "--total-timesteps 4000000 --share-lstm --num-steps 128 --num-envs 16",
}
EPISODES = 400  # that a policy is judged on, because single ones differ by far
METRICS = {
    "r": "return",
    "goals": "goals per robot",
    "collisions_per_goal": "collisions per goal",
    "path_efficiency": "path efficiency",
    "contact": "share of steps in contact",
}


@dataclass
class Options:
    folder: Path = Path("runs/lidar_learning")  # where the runs go
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    scripts: tuple[str, ...] = ("ppo_swarm", "ppo_swarm_lstm")
    hide: bool = False  # train the stages in which the goal hides, instead


def stages(options):
    """The environment's arguments in one stage after another."""
    if not options.hide:
        return [{}]
    return [
        {"goal_visible_steps": visible, "max_steps": 200, "n_obstacles": 0, "collision_weight": 0.3}
        for visible in (200, 60, 40, 25)
    ]


def judge(make_policy, **env_kwargs):
    """{metric: mean} over held-out episodes."""
    stats = evaluate(make_policy, "LidarNavigation", EPISODES, **env_kwargs)
    goals = stats["goals"].sum() or np.nan
    stats["collisions_per_goal"] = stats["collisions"].sum() / goals  # not the mean of ratios
    return {name: float(np.mean(stats[name])) for name in METRICS}


def main(options):
    def run_stages(script, seed):
        runs = []
        for stage, env_kwargs in enumerate(stages(options)):
            name = "-".join(map(str, [script, seed, *env_kwargs.values()]))
            flags = f"--seed {seed} {FLAGS[script]}"
            if options.hide:
                flags += f" {HIDE_FLAGS[script]} --env-kwargs"
                for key, value in env_kwargs.items():
                    flags += f" {key} {value}"
            if stage > 0:
                start = envs.load(runs[-1].path / "model.pt")
                start["model"]["actor_logstd"].fill_(start["args"]["init_logstd"])
                envs.save(start, options.folder / f"{name}.pt")
                flags += f" --init-from ../{name}.pt"
            runs.append(train(f"{script}.py", flags, options.folder / name))
        return runs

    all_runs = two_at_once(run_stages, product(options.scripts, options.seeds))
    for script in options.scripts:
        print(f"    python {script}.py --seed S {FLAGS[script]} {HIDE_FLAGS[script] if options.hide else ''}")
    for stage, env_kwargs in enumerate(stages(options)):
        print(f"\n{EPISODES} held-out episodes, {env_kwargs or 'default arguments'}; ", end="")
        print(f"means over seeds {options.seeds} with their 95% intervals\n")
        print_head("policy", *METRICS.values(), "worst seeds: goals, collisions", "minutes")
        for script in options.scripts:
            runs = [all_runs[script, seed][stage] for seed in options.seeds]
            scores = [judge(load_policy(script, run.path / "model.pt"), **env_kwargs) for run in runs]
            cells = [mean_and_interval([score[name] for score in scores]) for name in METRICS]
            fewest = min(score["goals"] for score in scores)
            most = max(score["collisions_per_goal"] for score in scores)
            minutes = np.mean([run.minutes for run in runs])
            print_row(f"{script}.py", *cells, f"{fewest:.3f}, {most:.3f}", f"{minutes:.1f}")
        for name, (make_policy, _) in envs.baselines("LidarNavigation").items():
            score = judge(make_policy, **env_kwargs)
            print_row(name, *(f"{score[metric]:.3f}" for metric in METRICS), "", "")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
