"""What ppo_swarm.py and ppo_swarm_lstm.py learn on LidarNavigation. From the repository's root, on 2 cores:

    python benchmarks/lidar_learning.py                     the default world, an hour
    python benchmarks/lidar_learning.py --world hidden      goals that hide, two hours
    python benchmarks/lidar_learning.py --world rooms       six rooms, an hour
    python benchmarks/lidar_learning.py --world narrow      20 robots in a narrow arena

In the default world a collision costs somewhat more in training than in the judgement. hidden shows a goal in 25
observations (1.25 s) only, in episodes of 10 s without obstacles, and a collision costs 0.3. There the LSTM guesses, in
training, where the goal is now (--guess-coef), and beside it stand the same without that guess, a curriculum in its
place, with goals that hide ever sooner, and the network without memory. rooms compares the LSTM with the network
without memory, narrow what robots learn that are alone, that know where their 4 nearest neighbours are, and that hear
messages from these.

Trains two runs side by side with one torch thread each, and prints what the best policy of each run does in 400
held-out episodes, greedy and sampled, mean over seeds with its 95% bootstrap interval, beside the baselines. Minutes
are wall time of the whole command. A run that is already complete in the folder is not trained again.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from common import evaluate, load_policy, mean_and_interval, print_head, print_row, train, two_at_once

import envs

MLP = (
    "--env-id LidarNavigation --hidden-dim 128 --init-logstd -0.7 --num-steps 32 --learning-rate 7e-4 "
    "--eval-every 1000000"
)
MEMORY = (
    "--share-lstm --num-steps 128 --num-envs 16 --learning-rate 2e-3 --num-minibatches 8 "
    "--total-timesteps 6000000 --eval-every 1000000"
)
NEIGHBORS = {"n_neighbors": 4}
WORLDS = {  # arguments of the environment
    "shown": {"n_agents": 10},
    "hidden": {"n_agents": 10, "goal_visible_steps": 25, "max_steps": 200, "n_obstacles": 0, "collision_weight": 0.3},
    "rooms": {"n_agents": 10, "rooms": "3x2"},
    "narrow": {"n_agents": 20, "width": 5.0, "height": 4.0, "n_obstacles": 4},
}
COMMANDS = {  # of each world: {policy: (script, flags, what is added to the world)}
    "shown": {
        "mlp": (
            "ppo_swarm",
            f"{MLP} --num-minibatches 32 --total-timesteps 12000000 --train-kwargs collision_weight 1.15",
            {},
        ),
        "lstm": (
            "ppo_swarm_lstm",
            "--total-timesteps 10000000 --eval-every 1000000 --train-kwargs collision_weight 1.4",
            {},
        ),
    },
    "hidden": {
        "lstm, guessing": ("ppo_swarm_lstm", f"{MEMORY} --guess-coef 1.5", {}),
        "lstm, stages": ("ppo_swarm_lstm", f"{MEMORY} --train-kwargs goal_visible_steps 200,60,25", {}),
        "lstm": ("ppo_swarm_lstm", MEMORY, {}),
        "mlp": ("ppo_swarm", f"{MLP} --num-minibatches 16 --total-timesteps 6000000", {}),
    },
    "rooms": {
        "lstm": ("ppo_swarm_lstm", "--total-timesteps 6000000 --eval-every 1000000", {}),
        "mlp": ("ppo_swarm", f"{MLP} --num-minibatches 16 --total-timesteps 6000000", {}),
    },
    "narrow": {
        "alone": ("ppo_swarm", f"{MLP} --num-minibatches 16 --total-timesteps 8000000", {}),
        "neighbours": ("ppo_swarm", f"{MLP} --num-minibatches 16 --total-timesteps 8000000", NEIGHBORS),
        "messages": ("ppo_swarm", f"{MLP} --num-minibatches 16 --total-timesteps 8000000 --policy gnn", NEIGHBORS),
    },
}
EPISODES = 400  # that a policy is judged on, because single ones differ by far
METRICS = {
    "r": "return",
    "goals": "goals per robot",
    "collisions_per_goal": "collisions per goal",
    "path_efficiency": "path efficiency",
    "contact": "share of steps in contact",
}


@dataclass
class Options:
    world: Literal["shown", "hidden", "rooms", "narrow"] = "shown"  # what is learned
    folder: Path | None = None  # where the runs go; None: runs/lidar_ and the world
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    policies: tuple[str, ...] = ()  # some of the world's, as in "lstm, stages"; none: all


def judge(make_policy, **env_kwargs):
    """{metric: mean} over held-out episodes."""
    stats = evaluate(make_policy, "LidarNavigation", EPISODES, **env_kwargs)
    goals = stats["goals"].sum() or np.nan
    stats["collisions_per_goal"] = stats["collisions"].sum() / goals  # not the mean of ratios
    return {name: float(np.mean(stats[name])) for name in METRICS}


def main(options):
    world = WORLDS[options.world]
    names = options.policies or tuple(COMMANDS[options.world])
    if set(names) - set(COMMANDS[options.world]):
        raise ValueError(f"policies are {names}: {options.world} has {', '.join(COMMANDS[options.world])}")
    folder = options.folder or Path(f"runs/lidar_{options.world}")
    commands = {}  # {policy: (script, its flags)}
    env_kwargs = {}  # {policy: what it is judged in}
    for name in names:
        script, flags, added = COMMANDS[options.world][name]
        env_kwargs[name] = world | added
        pairs = [f"{key} {value}" for key, value in env_kwargs[name].items() if key != "n_agents"]
        words = [flags, f"--n-agents {world['n_agents']}", *(["--env-kwargs", *pairs] if pairs else [])]
        commands[name] = (script, " ".join(words).strip())

    def run(name, seed):
        script, flags = commands[name]
        return train(f"{script}.py", f"--seed {seed} {flags}", folder / f"{name}-{seed}".replace(", ", "-"))

    runs = two_at_once(run, product(commands, options.seeds))
    for script, flags in commands.values():
        print(f"    python {script}.py --seed S {flags}")
    print(f"\n{EPISODES} held-out episodes; means over seeds {options.seeds} with their 95% intervals\n")
    print_head("policy", *METRICS.values(), "worst seeds: goals, collisions per goal", "minutes")
    for name, (script, _) in commands.items():
        policies = [load_policy(script, runs[name, seed].path / "model.pt") for seed in options.seeds]
        minutes = np.mean([runs[name, seed].minutes for seed in options.seeds])
        for greedy in (True, False):
            scores = [judge(partial(make_policy, greedy=greedy), **env_kwargs[name]) for make_policy in policies]
            cells = [mean_and_interval([score[metric] for score in scores]) for metric in METRICS]
            fewest = min(score["goals"] for score in scores)
            most = max(score["collisions_per_goal"] for score in scores)
            row = name if greedy else f"{name}, sampled"
            print_row(row, *cells, f"{fewest:.3f}, {most:.3f}", f"{minutes:.1f}" if greedy else "")
    for name, (make_policy, _) in envs.baselines("LidarNavigation").items():
        score = judge(make_policy, **world)
        print_row(name, *(f"{score[metric]:.3f}" for metric in METRICS), "", "")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
