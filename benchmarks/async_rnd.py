"""What Random Network Distillation finds that PPO alone does not. From the repository's root, under an hour:

    python benchmarks/async_rnd.py

A corridor of 50 cells with a reward of 1 at its far end (benchmarks/corridor.py): in every cell one of two actions
leads on and the other back, and random actions reach the end once in a million episodes. Without a reward PPO has
nothing to tell one action from another by. Printed, for ten seeds, with RND, with RND and normalised advantages, and
without RND: the steps after which an evaluation of the greedy policy first reached the end, and, in the last row, how
many seeds' last policy does.
"""

from itertools import product
from typing import NamedTuple

from common import first_reaching, print_head, print_row, run_and_read, two_at_once

FLAGS = (
    "--env-id corridor:Corridor-v0 --gamma 0.99 --num-steps 128 --num-actors 0 --total-timesteps 300000 "
    "--eval-every 10000 --eval-episodes 20"
)
WAYS = {
    "with RND": "--no-norm-adv --rnd-coef 1",
    "with RND, advantages normalised": "--rnd-coef 1",
    "without RND": "--no-norm-adv",
}
SEEDS = range(1, 11)


class Outcome(NamedTuple):
    first: str  # the steps after which an evaluation first reached the end
    there: bool  # whether the last one did


def run(flags, seed):
    events = run_and_read("async_ppo.py", f"{FLAGS} {flags} --seed {seed}")
    first = first_reaching(events, "eval/r", 1.0)  # all episodes of a greedy policy are the same here
    return Outcome(f"{first.step:,}" if first else "never", events.Scalars("eval/r")[-1].value == 1.0)


def main():
    for name, flags in WAYS.items():
        print(f"{name}: python async_ppo.py {FLAGS} {flags} --seed S")
    print()
    print_head("seed", *WAYS)
    runs = two_at_once(run, product(WAYS.values(), SEEDS))
    for seed in SEEDS:
        print_row(seed, *[runs[flags, seed].first for flags in WAYS.values()])
    arrived = [sum(runs[flags, seed].there for seed in SEEDS) for flags in WAYS.values()]
    print_row("there at the end", *[f"{count} of {len(SEEDS)}" for count in arrived])


if __name__ == "__main__":
    main()
