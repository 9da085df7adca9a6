"""What --compile is worth. From the repository's root, on a quiet machine, in 20 minutes:

    pip install "gymnasium[mujoco]"
    python benchmarks/compiled.py

Each command runs with and without --compile, in turn, round after round. A rate is of the whole loop, rollouts and
logging included, from the middle of the run to its last log: by then all is compiled. Evaluations and checkpoints are
left out. Seconds to compile are those by which the first half takes longer than at that rate, less those of a run that
compiles nothing; every run compiles anew.
"""

import os
import tempfile
from dataclasses import dataclass
from functools import partial

import numpy as np
import tyro
from common import median_and_range, print_head, print_row, run_and_read, take_turns
from gymnasium_suite import CONTINUOUS

LIDAR = (
    "--env-id LidarNavigation --hidden-dim 128 --init-logstd -0.7 --num-steps 32 --learning-rate 7e-4 "
    "--num-minibatches 32"
)
MUJOCO = f"--env-id HalfCheetah-v5 --num-actors 0 {CONTINUOUS}"
COMMANDS = {  # name: (script, flags, steps)
    "Swarm": ("ppo_swarm.py", "", 800_000),
    "LidarNavigation": ("ppo_swarm.py", LIDAR, 400_000),
    "LidarNavigation, LSTM": ("ppo_swarm_lstm.py", "", 300_000),
    "LunarLander": ("grpo_perstep.py", "", 1_000_000),
    "HalfCheetah-v5": ("async_ppo.py", MUJOCO, 40_000),
}


@dataclass
class Options:
    names: tuple[str, ...] = tuple(COMMANDS)  # of the commands
    rounds: int = 3


def measure(name, compiled):
    """Steps per second in the second half, and the seconds that the first half takes longer than at this rate."""
    script, flags, steps = COMMANDS[name]
    never = f"--eval-every {10**12} --eval-episodes 1 --checkpoint-every {10**12}"
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        command = f"{flags} --total-timesteps {steps} {never} {'--compile' * compiled}"
        logged = run_and_read(script, command, threads=None).Scalars("charts/SPS")
    middle = logged[len(logged) // 2]
    last = logged[-1]
    rate = (last.step - middle.step) / (last.wall_time - middle.wall_time)
    return rate, middle.step / middle.value - middle.step / rate


def main(options):
    print_head("command", "steps/s", "with --compile", "times as many (lowest to highest)", "seconds to compile")
    for name in options.names:
        contestants = {compiled: partial(measure, name, compiled) for compiled in (False, True)}
        measured = take_turns(contestants, options.rounds)
        plain, plain_seconds = np.transpose(measured[False])
        compiled, seconds = np.transpose(measured[True])
        rates = (f"{np.median(rate):,.0f}" for rate in (plain, compiled))
        print_row(name, *rates, median_and_range(compiled / plain, 2), f"{np.median(seconds - plain_seconds):.0f}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
