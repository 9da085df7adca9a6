"""What asynchrony is worth where steps take unequal time. From the repository's root, 3 minutes:

    python benchmarks/async_throughput.py

async_ppo.py on environments that sleep for 0 to 4 ms a step, three times as long in one of the processes
(benchmarks/sleepy.py), with actors and with as many workers of the synchronous mode, by turns. Printed: environment
steps per second that were learned from, over the second half of the training, the learner's idle share, and the lag.
"""

from statistics import fmean, median
from typing import NamedTuple

from common import median_and_range, print_head, print_row, run_and_read, seconds_at

FLAGS = (
    "--env-id sleepy:Sleepy-v0 --num-steps 16 --num-minibatches 2 --update-epochs 4 --eval-episodes 2 "
    "--eval-every 1000000000 --checkpoint-every 1000000000"
)
ROUNDS = 3


class Measured(NamedTuple):
    rate: float  # steps per second, this and the next two over the second half of the training
    idle: float  # share of the time that the learner waits
    lag: float
    largest_lag: float
    discarded: float  # fragments


def run(flags):
    events = run_and_read("async_ppo.py", f"{FLAGS} {flags}")
    curves = {}
    for name in ("rollout_share", "lag_mean", "lag_max", "discarded"):
        curves[name] = [event.value for event in events.Scalars(f"charts/{name}")]
    seconds = seconds_at(events)
    steps = list(seconds)
    half = len(steps) // 2
    return Measured(
        rate=(steps[-1] - steps[half]) / (seconds[steps[-1]] - seconds[steps[half]]),
        idle=fmean(curves["rollout_share"][half:]),
        lag=fmean(curves["lag_mean"][half:]),
        largest_lag=max(curves["lag_max"]),
        discarded=curves["discarded"][-1],
    )


def main():
    print(f"python async_ppo.py {FLAGS}\n")
    print_head(
        "processes", "steps/s, async", "sync", "ratio (lowest to highest)", "idle", "lag", "largest", "discarded"
    )
    for processes in (2, 4, 8):
        flags = f"--num-envs {2 * processes} --total-timesteps {processes * 3000}"
        ours = []
        theirs = []
        for seed in range(1, ROUNDS + 1):
            ours.append(run(f"{flags} --seed {seed} --num-actors {processes}"))
            theirs.append(run(f"{flags} --seed {seed} --num-actors 0 --num-workers {processes}"))
        print_row(
            processes,
            f"{median(our.rate for our in ours):,.0f}",
            f"{median(their.rate for their in theirs):,.0f}",
            median_and_range([our.rate / their.rate for our, their in zip(ours, theirs, strict=True)]),
            f"{fmean(our.idle for our in ours):.0%}",
            f"{fmean(our.lag for our in ours):.1f}",
            f"{max(our.largest_lag for our in ours):.0f}",
            f"{sum(our.discarded for our in ours):.0f}",
        )


if __name__ == "__main__":
    main()
