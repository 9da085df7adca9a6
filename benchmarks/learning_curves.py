"""Learning curves of finished runs, against steps and against time. From the repository's root, seconds:

    python benchmarks/learning_curves.py FOLDER... --out docs/NAME.png      [--baselines vicsek random]

Trains nothing: reads the TensorBoard events and the model.pt of every finished run in the folders, at any depth. Runs
that differ in nothing but the seed are one line: their mean, as far as all of them reach, and their range around it.
Its label has the first arguments that tell it from the other lines, and no more: name in --ignore what is beside the
point. Drawn is the held-out return, or another --tag. Minutes begin with the run's first event: start-up is not in
them, evaluations are, and so is a pause before a run was resumed. A baseline is dashed, at its return on the other
held-out episodes of the end. Prints, for each line, how many runs it is, mean and range of their last values, and the
minutes until then.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from common import print_head, print_row, read_events
from matplotlib.figure import Figure

import envs


@dataclass
class Options:
    folders: tyro.conf.Positional[tuple[Path, ...]]  # of runs, or of folders of runs
    out: Path = Path("runs/learning_curves.png")
    tag: str = "eval/r"
    ylabel: str | None = None  # None: "held-out return", or the tag
    baselines: tuple[str, ...] = ()  # NAME as in the tag test/NAME
    ignore: tuple[str, ...] = ()  # further arguments in which the runs of a line may differ, as in: eval_every


def read(folder, tag):
    """(steps in millions, minutes, value) of a run, (n, 3), and {baseline: return}; None of a run that is not finished.

    A run that trains on may change under our eyes; its last act is to log the baselines.
    """
    events = read_events(folder)
    tests = [name for name in events.Tags()["scalars"] if name.startswith("test/")]
    if not tests:
        return None
    start = events.FirstEventTimestamp()
    values = [(event.step / 1e6, (event.wall_time - start) / 60, event.value) for event in events.Scalars(tag)]
    return np.array(values), {name.removeprefix("test/"): events.Scalars(name)[-1].value for name in tests}


def arguments(folder):
    """{name: value} of a run, env_kwargs among them; of init_from only whether: each seed has a model of its own."""
    args = envs.load(folder / "model.pt")["args"]
    return args | args["env_kwargs"] | {"env_kwargs": None, "init_from": args["init_from"] is not None}


def labels(groups):
    """For each {name: value} what tells it from the others: a string as it is, any other value after its name."""
    parts = [()] * len(groups)
    for name in dict.fromkeys(name for group in groups for name in group):
        values = [group.get(name, "default") for group in groups]
        named = [value if isinstance(value, str) else f"{name} {value}" for value in values]
        finer = [(*part, value) for part, value in zip(parts, named, strict=True)]
        if len(set(finer)) > len(set(parts)):
            parts = finer
    return [", ".join(part) or group["exp_name"] for part, group in zip(parts, groups, strict=True)]


def mean_and_range(runs, column):
    """x, mean, lowest and highest at every x that one of the runs has a value at, straight lines between them."""
    x = np.unique(np.concatenate([run[:, column] for run in runs]))
    x = x[(x >= max(run[0, column] for run in runs)) & (x <= min(run[-1, column] for run in runs))]
    values = np.array([np.interp(x, run[:, column], run[:, 2]) for run in runs])
    return x, values.mean(0), values.min(0), values.max(0)


def draw(axes, label, runs, column):
    """A line, the mean of the runs, and the range around it; the column is 0 for steps and 1 for minutes."""
    x, mean, low, high = mean_and_range(runs, column)
    (line,) = axes.plot(x, mean, label=label)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15)


def collect(options):
    """Of each line (arguments but the seed, {seed: values}, baselines)."""
    groups = {}
    for folder in sorted({path.parent for top in options.folders for path in top.rglob("model.pt")}):
        run = read(folder, options.tag)
        if run is None:
            print(f"not finished, left out: {folder}")
            continue
        values, baselines = run
        args = arguments(folder)
        seed = args.pop("seed")
        args = {name: args[name] for name in args if name not in options.ignore}
        _, seeds, _ = groups.setdefault(repr(sorted(args.items())), (args, {}, baselines))
        if seed in seeds:
            raise ValueError(f"{folder}: another run has the same arguments and seed")
        seeds[seed] = values
    if not groups:
        raise ValueError("no finished run in these folders")
    return list(groups.values())


def main(options):
    groups = collect(options)
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    print_head("runs of", "seeds", "last: mean", "lowest to highest", "minutes")
    names = labels([args for args, _, _ in groups])
    for label, (_, seeds, _) in zip(names, groups, strict=True):
        runs = list(seeds.values())
        for column, axes in enumerate(panels):
            draw(axes, label, runs, column)
        _, minutes, last = np.transpose([run[-1] for run in runs])
        lowest_to_highest = f"{last.min():.1f} to {last.max():.1f}"
        print_row(label, len(runs), f"{last.mean():.1f}", lowest_to_highest, f"{minutes.mean():.1f}")
    for name in options.baselines:
        for value in {round(scores[name], 3) for _, _, scores in groups if name in scores}:  # one for each world
            for axes in panels:
                axes.axhline(value, color="gray", linestyle="--", linewidth=1)
            place = dict(ha="right", va="bottom", transform=panels[0].get_yaxis_transform())
            panels[0].text(0.98, value, name, color="gray", **place)
    agent_steps = any("n_agents" in args for args, _, _ in groups)
    held_out = "held-out return" if options.tag == "eval/r" else options.tag
    panels[0].margins(y=0.1)
    panels[0].set(xlim=(0, None), xlabel=f"million {'agent-' * agent_steps}steps", ylabel=options.ylabel or held_out)
    panels[1].set(xlim=(0, None), xlabel="minutes")
    columns = max(1, 80 // (max(map(len, names)) + 8))  # as many as fit
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=columns)
    figure.savefig(options.out, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
