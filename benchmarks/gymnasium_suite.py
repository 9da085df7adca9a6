"""What async_ppo.py learns on the environments that people bring: MuJoCo's, Box2D's, classic control.

    pip install "gymnasium[mujoco]"
    python benchmarks/gymnasium_suite.py [--env-ids Pendulum-v1 Acrobot-v1] [--seeds 1 2 3 4 5]

From the repository's root, two runs at a time; 10 to 30 minutes for five seeds of a MuJoCo environment, hours for all.
One line of flags for continuous actions, one for discrete ones, printed first; what some environments have besides
stands with their results. A run that is complete under --folder is not trained again, even if its flags have changed
since. Printed, for each environment: the return of the last policy, not the best one, greedy and sampled, in 20
held-out episodes, means over seeds with their 95% bootstrap intervals; the worst seed; minutes of the whole command,
evaluations included. Beside them what others published:

    rl-zoo      rl-baselines3-zoo, benchmark.md: PPO, one run each, on older versions (3 of MuJoCo's environments)
    CleanRL     docs of ppo_continuous_action.py: three seeds or more, versions 2 and 4 of MuJoCo's environments

Draws the curves, mean and range over seeds, with the published returns as dashed lines.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro
from common import mean_and_interval, print_head, print_row, read_events, train, two_at_once
from learning_curves import draw, read
from matplotlib.figure import Figure

REPRODUCIBLE = "--num-actors 0 --num-workers 0"
CONTINUOUS = (
    "--num-envs 64 --gamma 0.99 --gae-lambda 0.95 --num-minibatches 16 --learning-rate 3e-4 --norm-obs --norm-reward"
)
JOINTS = f"{CONTINUOUS} --gae-lambda 0.9"  # for bodies of many joints
FEW = f"{CONTINUOUS} --num-envs 8 --num-steps 256"  # few environments, long fragments
LASTING = f"{FEW} --lasting-noise 1"  # where momentum has to be built up
# Where each stroke pays little, and where each swing costs
STROKES = "--gamma 0.9999 --gae-lambda 0.98 --learning-rate 6e-4 --ent-coef 0.01 --target-kl 0.1"
SWINGS = "--lasting-noise 0.5 --init-logstd 0 --hidden-dim 256 --update-epochs 20 --learning-rate 1e-3 --target-kl 0.05"
FAR = f"{FEW} --gamma 0.999"  # where much is paid at an episode's end
LONG = "--ent-coef 0.01 --target-kl 0.05"  # for many steps, in which the noise would die out
DISCRETE = "--norm-obs"
EVALUATIONS = 10  # in a run, of so many episodes each:
EPISODES = 20


class World(NamedTuple):
    steps: int
    flags: str
    published: dict[str, float]


WORLDS = {
    "HalfCheetah-v5": World(1_000_000, CONTINUOUS, {"rl-zoo": 5819, "CleanRL": 1443}),
    "Hopper-v5": World(1_000_000, FEW, {"rl-zoo": 2410, "CleanRL": 2383}),
    "Walker2d-v5": World(1_000_000, CONTINUOUS, {"rl-zoo": 3479, "CleanRL": 2288}),
    "Ant-v5": World(1_000_000, JOINTS, {"rl-zoo": 1327}),
    "Swimmer-v5": World(1_000_000, f"{LASTING} {STROKES}", {"rl-zoo": 282}),
    "Humanoid-v5": World(1_000_000, JOINTS, {"CleanRL": 716}),
    "Pusher-v5": World(1_000_000, JOINTS, {"CleanRL": -40}),
    "InvertedPendulum-v5": World(1_000_000, CONTINUOUS, {"CleanRL": 963}),
    "BipedalWalker-v3": World(5_000_000, f"{FAR} {LONG}", {"rl-zoo": 213}),
    "LunarLanderContinuous-v3": World(1_000_000, f"{FAR} --gae-lambda 0.98", {"rl-zoo": 271}),
    "Pendulum-v1": World(100_000, f"{FEW} {SWINGS}", {"rl-zoo": -172}),
    "MountainCarContinuous-v0": World(20_000, LASTING, {"rl-zoo": 88}),
    "Acrobot-v1": World(1_000_000, DISCRETE, {"rl-zoo": -74}),
}


@dataclass
class Options:
    env_ids: tuple[Literal[tuple(WORLDS)], ...] = tuple(WORLDS)  # some of them
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    folder: Path = Path("runs/gymnasium_suite")  # where the runs go
    out: Path = Path("runs/gymnasium_suite.png")  # the curves


def command(env_id, seed):
    world = WORLDS[env_id]
    evaluations = f"--eval-every {world.steps // EVALUATIONS} --eval-episodes {EPISODES}"
    flags = f"{REPRODUCIBLE} {world.flags} --total-timesteps {world.steps} {evaluations}"
    return f"--env-id {env_id} --seed {seed} {flags}"


def main(options):
    def run(env_id, seed):
        return train("async_ppo.py", command(env_id, seed), options.folder / f"{env_id}-{seed}")

    runs = two_at_once(run, product(options.env_ids, options.seeds))
    print("continuous:", REPRODUCIBLE, CONTINUOUS)
    print("discrete:  ", REPRODUCIBLE, DISCRETE)
    print(f"\nthe last policy, {EPISODES} held-out episodes; seeds {options.seeds}\n")
    print_head("environment", "besides", "steps", "return", "worst seed", "sampled", "rl-zoo", "CleanRL", "minutes")
    for env_id in options.env_ids:
        world = WORLDS[env_id]
        events = [read_events(runs[env_id, seed].path) for seed in options.seeds]
        greedy = [event.Scalars("eval/r")[-1].value for event in events]
        sampled = [event.Scalars("eval/sampled_r")[-1].value for event in events]
        minutes = np.mean([runs[env_id, seed].minutes for seed in options.seeds])
        besides = world.flags.removeprefix(CONTINUOUS).removeprefix(DISCRETE).strip()
        published = [world.published.get(name, "") for name in ("rl-zoo", "CleanRL")]
        print_row(
            env_id, besides, f"{world.steps:,}", mean_and_interval(greedy, 1), f"{min(greedy):.1f}",
            mean_and_interval(sampled, 1), *published, f"{minutes:.1f}",
        )  # fmt: skip

    # Curves: a row for each environment, against steps and against minutes
    figure = Figure(figsize=(7.2, 2.2 * len(options.env_ids)), layout="constrained")
    panels = figure.subplots(len(options.env_ids), 2, sharey="row", squeeze=False)
    for row, env_id in zip(panels, options.env_ids, strict=True):
        curves = [read(runs[env_id, seed].path, "eval/r")[0] for seed in options.seeds]
        for column, axes in enumerate(row):
            draw(axes, env_id, curves, column)
            for name, value in WORLDS[env_id].published.items():
                axes.axhline(value, color="gray", linestyle="--", linewidth=1)
                axes.text(0.98, value, name, color="gray", ha="right", transform=axes.get_yaxis_transform())
        row[0].set(ylabel=env_id, xlabel="million steps")
        row[1].set(xlabel="minutes")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=100)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
