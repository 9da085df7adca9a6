"""What Random Network Distillation finds that PPO alone does not. From the repository's root, 6 minutes:

    python benchmarks/async_rnd.py

MountainCar-v0: -1 a step until the car is up the hill, or for 200 steps. Random actions practically never get there, so
that all returns are -200 and PPO has nothing to tell one action from another by; the way up begins with driving away
from the goal. Printed, for every seed, with RND and without: the mean return of the best policy in 100 held-out
episodes (Gymnasium calls -110 solved), and the steps after which an evaluation first was above -200.
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
    "--env-id MountainCar-v0 --norm-obs --gamma 0.99 --num-steps 128 --num-actors 0 --total-timesteps 300000 "
    "--eval-every 10000 --eval-episodes 20"
)
RND = "--rnd-coef 100"


def run(flags, seed):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "async_ppo.py", *FLAGS.split(), *flags.split(), "--seed", str(seed)]
        subprocess.run(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        events = EventAccumulator(str(next(Path(folder).glob("runs/*"))))
        events.Reload()
        first = next((f"{event.step:,}" for event in events.Scalars("eval/r") if event.value > -200), "never")
        return events.Scalars("test/async_ppo")[-1].value, first


def main():
    print(f"python async_ppo.py {FLAGS} [{RND}] --seed S\n")
    print("| seed | with RND | first above -200 after | without | first above -200 after |")
    print("|---" * 5 + "|")
    seeds = (1, 2, 3, 4, 5)
    with ThreadPoolExecutor(2) as pool:
        runs = {(seed, flags): pool.submit(run, flags, seed) for seed in seeds for flags in (RND, "")}
        for seed in seeds:
            (found, steps), (plain, plain_steps) = (runs[seed, flags].result() for flags in (RND, ""))
            print(f"| {seed} | {found:.1f} | {steps} | {plain:.1f} | {plain_steps} |", flush=True)


if __name__ == "__main__":
    main()
