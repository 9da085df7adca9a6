"""What acting with old weights costs: async_ppo.py's sample efficiency beside --num-actors 0. From the root, 30 min:

    python benchmarks/async_lag.py

Both train with the same flags on as many steps, CartPole-v1 with the script's defaults and the lander with the flags of
benchmarks/async_race.py, over the same seeds, two runs at once; over twelve, because the steps until the target spread
by a third to three quarters of their mean. Printed, as mean and standard deviation over the seeds: the steps until 20
held-out, greedy episodes average 475 or 200, the whole budget for a run that never gets there; how many did; and the
mean of all evaluations, the area under the learning curve, which no single lucky evaluation decides.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from async_race import LANDER
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
EVALUATE = "--eval-every 4096 --eval-episodes 20"
FLAGS = {
    "CartPole-v1": "--total-timesteps 100000",
    "LunarLander": LANDER + "--env-id LunarLander --total-timesteps 1000000",
}
TARGETS = {"CartPole-v1": 475.0, "LunarLander": 200.0}
MODES = {"asynchronous": "", "synchronous": "--num-actors 0"}


def run(env_id, mode, seed):
    """(steps until the target, whether it got there, mean of all evaluations, mean lag)."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"{FLAGS[env_id]} {EVALUATE} {MODES[mode]} --seed {seed}"
        command = [sys.executable, ROOT / "async_ppo.py", *flags.split()]
        subprocess.run(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        events = EventAccumulator(str(next(Path(folder).glob("runs/*"))), size_guidance={"scalars": 0})
        events.Reload()
    curve = events.Scalars("eval/r")
    hits = [event.step for event in curve if event.value >= TARGETS[env_id]]
    lags = [event.value for event in events.Scalars("charts/lag_mean")]
    return [*hits, curve[-1].step][0], bool(hits), np.mean([event.value for event in curve]), np.mean(lags)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env-ids", nargs="+", choices=FLAGS, default=list(FLAGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=range(1, 13))
    options = parser.parse_args()
    for env_id in options.env_ids:
        print(f"python async_ppo.py {FLAGS[env_id]} {EVALUATE} [{MODES['synchronous']}] --seed S")
    print("\n| environment | mode | steps until the target | got there | mean of all evaluations | lag |")
    print("|---" * 6 + "|")
    arrived = {}
    for env_id, mode in itertools.product(options.env_ids, MODES):
        with ThreadPoolExecutor(2) as pool:
            rows = [*pool.map(partial(run, env_id, mode), options.seeds)]
        (steps, share, area, lag), (spread, _, area_spread, _) = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1)
        arrived[env_id, mode] = steps
        row = f"{steps:,.0f} +- {spread:,.0f} | {share:.0%} | {area:.1f} +- {area_spread:.1f} | {lag:.2f}"
        print(f"| {env_id} | {mode} | {row} |", flush=True)
    for env_id in options.env_ids:
        ratio = arrived[env_id, "asynchronous"] / arrived[env_id, "synchronous"]
        print(f"\n{env_id}: asynchronous takes {ratio:.2f} times the steps.")


if __name__ == "__main__":
    main()
