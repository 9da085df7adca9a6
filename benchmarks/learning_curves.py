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

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
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
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: all, not a sample
    events.Reload()
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


def main(options):
    groups = {}  # {arguments but the seed: (them, {seed: values}, baselines)}
    for folder in sorted({path.parent for top in options.folders for path in top.rglob("model.pt")}):
        run = read(folder, options.tag)
        if run is None:
            print(f"not finished, left out: {folder}")
            continue
        args = arguments(folder)
        seed, args = args.pop("seed"), {name: args[name] for name in args if name not in options.ignore}
        _, seeds, _ = groups.setdefault(repr(sorted(args.items())), (args, {}, run[1]))
        if seed in seeds:
            raise ValueError(f"{folder}: another run has the same arguments and seed")
        seeds[seed] = run[0]
    if not groups:
        raise ValueError("no finished run in these folders")

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    print("| runs of | seeds | last: mean | lowest to highest | minutes |\n|---|---|---|---|---|")
    args, runs, baselines = zip(*groups.values(), strict=True)
    names = labels(args)
    for label, seeds in zip(names, runs, strict=True):
        seeds = list(seeds.values())
        for column, axes in enumerate(panels):
            x, mean, low, high = mean_and_range(seeds, column)
            (line,) = axes.plot(x, mean, label=label)
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15)
        _, minutes, last = np.transpose([run[-1] for run in seeds])
        cells = [label, len(seeds), f"{last.mean():.1f}", f"{last.min():.1f} to {last.max():.1f}"]
        print(f"| {' | '.join(map(str, cells))} | {minutes.mean():.1f} |")
    for name in options.baselines:
        for value in {round(each[name], 3) for each in baselines if name in each}:  # one for each world
            for axes in panels:
                axes.axhline(value, color="gray", linestyle="--", linewidth=1)
            panels[0].text(0.98, value, name, color="gray", ha="right", va="bottom",
                           transform=panels[0].get_yaxis_transform())  # fmt: skip
    agent_steps = any("n_agents" in each for each in args)
    held_out = "held-out return" if options.tag == "eval/r" else options.tag
    panels[0].margins(y=0.1)
    panels[0].set(xlim=(0, None), xlabel=f"million {'agent-' * agent_steps}steps", ylabel=options.ylabel or held_out)
    panels[1].set(xlim=(0, None), xlabel="minutes")
    columns = max(1, 80 // (max(map(len, names)) + 8))  # as many as fit
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=columns)
    figure.savefig(options.out, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
