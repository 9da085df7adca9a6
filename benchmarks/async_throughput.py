"""What asynchrony is worth where steps take unequal time. From the repository's root, 3 minutes:

    python benchmarks/async_throughput.py

async_ppo.py on environments that sleep for 0 to 4 ms a step, three times as long in one of the processes
(benchmarks/sleepy.py), with actors and with as many workers of the synchronous mode, by turns. Printed: environment
steps per second that were learned from, over the second half of the training, the learner's idle share, and the lag.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--env-id sleepy:Sleepy-v0 --num-steps 16 --num-minibatches 2 --update-epochs 4 --eval-episodes 2 "
    "--eval-every 1000000000 --checkpoint-every 1000000000"
)
ROUNDS = 3


def run(flags):
    """Steps per second, idle share, mean and largest lag, and fragments thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, ROOT / "async_ppo.py", *FLAGS.split(), *flags.split()]
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        events = EventAccumulator(str(next(Path(folder).glob("runs/*"))))
        events.Reload()
    curves = {tag: [event.value for event in events.Scalars(f"charts/{tag}")] for tag in
              ("SPS", "idle", "lag_mean", "lag_max", "discarded")}  # fmt: skip
    steps = [event.step for event in events.Scalars("charts/SPS")]
    seconds = [step / rate for step, rate in zip(steps, curves["SPS"], strict=True)]
    half = len(steps) // 2
    rate = (steps[-1] - steps[half]) / (seconds[-1] - seconds[half])
    mean = statistics.fmean
    return (
        rate,
        mean(curves["idle"][half:]),
        mean(curves["lag_mean"][half:]),
        max(curves["lag_max"]),
        curves["discarded"][-1],
    )


def main():
    print(f"python async_ppo.py {FLAGS}\n")
    print("| processes | steps/s, async | sync | ratio (lowest to highest) | idle | lag | largest | discarded |")
    print("|---" * 8 + "|")
    for processes in (2, 4, 8):
        flags = f"--num-envs {2 * processes} --total-timesteps {processes * 3000}"
        ours, theirs = [], []
        for seed in range(1, ROUNDS + 1):
            ours.append(run(f"{flags} --seed {seed} --num-actors {processes}"))
            theirs.append(run(f"{flags} --seed {seed} --num-actors 0 --num-workers {processes}"))
        rates, idle, lag, largest, discarded = zip(*ours, strict=True)
        ratios = [mine / their[0] for mine, their in zip(rates, theirs, strict=True)]
        columns = [
            processes,
            f"{statistics.median(rates):,.0f}",
            f"{statistics.median(rate for rate, *_ in theirs):,.0f}",
        ]
        columns += [f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"]
        columns += [
            f"{statistics.fmean(idle):.0%}",
            f"{statistics.fmean(lag):.1f}",
            f"{max(largest):.0f}",
            f"{sum(discarded):.0f}",
        ]
        print(f"| {' | '.join(map(str, columns))} |", flush=True)


if __name__ == "__main__":
    main()
