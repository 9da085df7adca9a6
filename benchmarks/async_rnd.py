"""What Random Network Distillation finds that PPO alone does not. From the repository's root, 5 minutes:

    python benchmarks/async_rnd.py

A corridor of 50 cells with a reward of 1 at its far end (benchmarks/corridor.py): in every cell one of two actions
leads on and the other back, and random actions reach the end once in a million episodes. Without a reward PPO has
nothing to tell one action from another by. Printed, for every seed, with RND and without: the return of the best policy
in 20 other episodes, and the steps after which an evaluation of the greedy policy first reached the end.
"""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--env-id corridor:Corridor-v0 --gamma 0.99 --num-steps 128 --num-actors 0 --total-timesteps 300000 "
    "--eval-every 10000 --eval-episodes 20"
)
RND = "--rnd-coef 1"


def run(flags, seed):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "async_ppo.py", *FLAGS.split(), *flags.split(), "--seed", str(seed)]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks"), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        events = EventAccumulator(str(next(Path(folder).glob("runs/*"))))
        events.Reload()
        first = next((f"{event.step:,}" for event in events.Scalars("eval/r") if event.value > 0), "never")
        return events.Scalars("test/async_ppo")[-1].value, first


def main():
    print(f"python async_ppo.py {FLAGS} [{RND}] --seed S\n")
    print("| seed | with RND | first at the end after | without | first at the end after |")
    print("|---" * 5 + "|")
    seeds = (1, 2, 3, 4, 5)
    with ThreadPoolExecutor(2) as pool:
        runs = {(seed, flags): pool.submit(run, flags, seed) for seed in seeds for flags in (RND, "")}
        for seed in seeds:
            (found, steps), (plain, plain_steps) = (runs[seed, flags].result() for flags in (RND, ""))
            print(f"| {seed} | {found:.2f} | {steps} | {plain:.2f} | {plain_steps} |", flush=True)


if __name__ == "__main__":
    main()
