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

import numpy as np
from async_race import LANDER
from common import first_reaching, print_head, print_row, run_and_read, two_at_once

EVALUATE = "--eval-every 4096 --eval-episodes 20"
FLAGS = {
    "CartPole-v1": "--total-timesteps 100000",
    "LunarLander": f"{LANDER} --env-id LunarLander --total-timesteps 1000000",
}
TARGETS = {"CartPole-v1": 475.0, "LunarLander": 200.0}
MODES = {"asynchronous": "", "synchronous": "--num-actors 0"}


def run(env_id, mode, seed):
    """(steps until the target, whether it got there, mean of all evaluations, mean lag)."""
    events = run_and_read("async_ppo.py", f"{FLAGS[env_id]} {EVALUATE} {MODES[mode]} --seed {seed}")
    curve = events.Scalars("eval/r")
    hit = first_reaching(events, "eval/r", TARGETS[env_id])
    steps = hit.step if hit else curve[-1].step
    area = np.mean([event.value for event in curve])
    lag = np.mean([event.value for event in events.Scalars("charts/lag_mean")])
    return steps, hit is not None, area, lag


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env-ids", nargs="+", choices=FLAGS, default=list(FLAGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=range(1, 13))
    options = parser.parse_args()
    for env_id in options.env_ids:
        print(f"python async_ppo.py {FLAGS[env_id]} {EVALUATE} [{MODES['synchronous']}] --seed S")
    print()
    print_head("environment", "mode", "steps until the target", "got there", "mean of all evaluations", "lag")
    arrived = {}  # mean steps until then
    for env_id, mode in itertools.product(options.env_ids, MODES):
        runs = two_at_once(run, [(env_id, mode, seed) for seed in options.seeds])
        rows = np.array(list(runs.values()), float)
        steps, share, area, lag = rows.mean(axis=0)
        steps_std, _, area_std, _ = rows.std(axis=0, ddof=1)
        arrived[env_id, mode] = steps
        cells = [f"{steps:,.0f} +- {steps_std:,.0f}", f"{share:.0%}", f"{area:.1f} +- {area_std:.1f}", f"{lag:.2f}"]
        print_row(env_id, mode, *cells)
    for env_id in options.env_ids:
        ratio = arrived[env_id, "asynchronous"] / arrived[env_id, "synchronous"]
        print(f"\n{env_id}: asynchronous takes {ratio:.2f} times the steps.")


if __name__ == "__main__":
    main()
