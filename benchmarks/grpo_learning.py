"""What the three GRPO scripts learn, judged by Gymnasium's own lander. From the repository's root, in an hour:

    python benchmarks/grpo_learning.py                                     the three scripts with default flags
    python benchmarks/grpo_learning.py --env-ids DenseLunarLander --identical-g True False \
        --plot docs/identical_starts.png --folder runs/identical_starts    identical starts, and different ones
    python benchmarks/grpo_learning.py --env-ids SparseLunarLander \
        --folder runs/grpo_sparse                                          trained on the reward at the end only

Trains every script with seeds 1 to 5, two runs side by side with one torch thread each, by the command `python
grpo_X.py --seed S` and no flags but those that the options above name. Prints the mean return over 100 held-out
episodes of Box2D's LunarLander-v3, of the greedy and the sampled policy and of Gymnasium's heuristic, and their share
of successes (both legs down, speed below 0.1, |x| below 0.2 at the end): means over seeds with their 95% bootstrap
intervals. Minutes are wall time of the whole command. A run that is already complete under --folder is not trained
again.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import tyro
from common import EPISODES, judge_on_box2d, load_policy, mean_and_interval, print_head, print_row, train, two_at_once
from learning_curves import draw, read
from matplotlib.figure import Figure

import envs

STARTS = {None: "by default", True: "identical", False: "different"}  # of the episodes of a group, by --identical-g


@dataclass
class Options:
    folder: Path = Path("runs/grpo_learning")  # where the runs go
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    scripts: tuple[str, ...] = ("perstep", "perep", "hybrid")
    env_ids: tuple[str, ...] = ()  # trained on; none: what each script has by default
    identical_g: tuple[bool, ...] = ()  # likewise
    flags: str = ""  # further flags of the scripts, as in: --flags="--total-timesteps 3000000"
    plot: Path | None = None  # draw the held-out return during the training there


def plot(curves, path):
    """{label: [run]}: the held-out return through the training, mean and range over the seeds."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, runs in curves.items():
        values = [read(run.path, "eval/r")[0] for run in runs]
        draw(axes, label, values, column=0)
    axes.set(xlabel="million steps", ylabel="held-out return of the greedy policy")
    axes.legend()
    figure.savefig(path, dpi=100)


def main(options):
    def run(script, env_id, identical_g, seed):
        flags = f"--seed {seed} {options.flags}"
        if env_id is not None:
            flags += f" --env-id {env_id}"
        if identical_g is not None:
            flags += " --identical-g" if identical_g else " --no-identical-g"
        name = "_".join(flags.split()).replace("--", "")
        return train(f"grpo_{script}.py", flags, options.folder / f"{script}-{name}")

    settings = list(product(options.scripts, options.env_ids or (None,), options.identical_g or (None,)))
    runs = two_at_once(run, [(*setting, seed) for setting in settings for seed in options.seeds])
    print(f"\n{EPISODES} held-out episodes of Box2D's LunarLander-v3; means over seeds {options.seeds}\n")
    print_head("script", "trained on", "starts", "greedy", "worst seed", "success", "sampled", "success", "minutes")
    score, success = judge_on_box2d(envs.heuristic_policy)
    print_row("heuristic", "", "", f"{score:.0f}", "", f"{success:.2f}", "", "", "")
    curves = {}
    for script, env_id, identical_g in settings:
        mine = [runs[script, env_id, identical_g, seed] for seed in options.seeds]
        policies = [load_policy("grpo_perstep", run.path / "model.pt") for run in mine]
        greedy = [judge_on_box2d(partial(make_policy, greedy=True)) for make_policy in policies]
        sampled = [judge_on_box2d(partial(make_policy, greedy=False)) for make_policy in policies]
        greedy_return, greedy_success = np.transpose(greedy)
        sampled_return, sampled_success = np.transpose(sampled)
        print_row(
            f"grpo_{script}.py",
            env_id or envs.load(mine[0].path / "model.pt")["args"]["env_id"],
            STARTS[identical_g],
            mean_and_interval(greedy_return, 0),
            f"{greedy_return.min():.0f}",
            mean_and_interval(greedy_success, 2),
            mean_and_interval(sampled_return, 0),
            mean_and_interval(sampled_success, 2),
            f"{np.mean([run.minutes for run in mine]):.1f}",
        )
        curves[f"{script}, {STARTS[identical_g]} starts"] = mine
    if options.plot:
        plot(curves, options.plot)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
