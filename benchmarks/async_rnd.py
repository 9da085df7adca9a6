"""What Random Network Distillation finds that PPO alone does not. From the repository's root, 5 minutes:

    python benchmarks/async_rnd.py

A corridor of 50 cells with a reward of 1 at its far end (benchmarks/corridor.py): in every cell one of two actions
leads on and the other back, and random actions reach the end once in a million episodes. Without a reward PPO has
nothing to tell one action from another by. Printed, for every seed, with RND and without: the return of the best policy
in 20 other episodes, and the steps after which an evaluation of the greedy policy first reached the end.
"""

from common import first_reaching, print_head, print_row, run_and_read, two_at_once

FLAGS = (
    "--env-id corridor:Corridor-v0 --gamma 0.99 --num-steps 128 --num-actors 0 --total-timesteps 300000 "
    "--eval-every 10000 --eval-episodes 20"
)
RND = "--rnd-coef 1"


def run(flags, seed):
    """The return of the best policy, and the step of the first evaluation that reached the end."""
    events = run_and_read("async_ppo.py", f"{FLAGS} {flags} --seed {seed}")
    first = first_reaching(events, "eval/r", 1.0)  # all episodes of a greedy policy are the same here
    return events.Scalars("test/async_ppo")[-1].value, f"{first.step:,}" if first else "never"


def main():
    print(f"python async_ppo.py {FLAGS} [{RND}] --seed S\n")
    print_head("seed", "with RND", "first at the end after", "without", "first at the end after")
    for seed in (1, 2, 3, 4, 5):
        runs = two_at_once(run, [(RND, seed), ("", seed)])
        found, steps = runs[RND, seed]
        plain, plain_steps = runs["", seed]
        print_row(seed, f"{found:.2f}", steps, f"{plain:.2f}", plain_steps)


if __name__ == "__main__":
    main()
