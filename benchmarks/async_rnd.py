"""What Random Network Distillation finds that PPO alone does not. From the repository's root, 15 minutes:

    python benchmarks/async_rnd.py

A corridor of 50 cells with a reward of 1 at its far end (benchmarks/corridor.py): in every cell one of two actions
leads on and the other back, and random actions reach the end once in a million episodes. Without a reward PPO has
nothing to tell one action from another by. Printed, for ten seeds, with RND, with RND and normalised advantages, and
without RND: the steps after which an evaluation of the greedy policy first reached the end. The last row counts the
seeds whose last evaluation, after 290,000 steps or more, still does.
"""

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


def run(flags, seed):
    """The step of the first evaluation that reached the end, and whether the last one did."""
    events = run_and_read("async_ppo.py", f"{FLAGS} {flags} --seed {seed}")
    first = first_reaching(events, "eval/r", 1.0)  # all episodes of a greedy policy are the same here
    return f"{first.step:,}" if first else "never", events.Scalars("eval/r")[-1].value == 1.0


def main():
    for name, flags in WAYS.items():
        print(f"{name}: python async_ppo.py {FLAGS} {flags} --seed S")
    print()
    print_head("seed", *WAYS)
    arrived = dict.fromkeys(WAYS, 0)
    for seed in SEEDS:
        runs = two_at_once(run, [(flags, seed) for flags in WAYS.values()])
        for name, flags in WAYS.items():
            arrived[name] += runs[flags, seed][1]
        print_row(seed, *[runs[flags, seed][0] for flags in WAYS.values()])
    print_row("there at the end", *[f"{count} of {len(SEEDS)}" for count in arrived.values()])


if __name__ == "__main__":
    main()
