"""What ppo_swarm.py learns on Swarm, against the best rules of a grid. From the repository's root:

    python benchmarks/swarm_learning.py                                              10 agents, over an hour on 2 cores
    python benchmarks/swarm_learning.py --n-agents 40 --seeds 1 2 3 4 5
    python benchmarks/swarm_learning.py --policies gnn attention --critics local central --seeds 1 2 3 4 5
    python benchmarks/swarm_learning.py --flags="--team-reward 0"                    an ablation

For each setting `python ppo_swarm.py --n-agents N --policy P --critic C --seed S`, with FLAGS for 40 agents and default
flags else, two runs side by side with one torch thread each. Prints one table of the reward per agent-step on held-out
episodes, mean over seeds with its 95% bootstrap interval, and one of the policies run with other numbers of agents at
the same density; SIZES says in how many episodes, 400 for 10 agents, because single ones differ by far. Minutes are
wall time of the whole command. The rules, boids and Vicsek, are the best of a grid over their parameters, picked on
other episodes. A run that is already complete under --folder is not trained again.
"""

from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import tyro
from common import EPISODES, evaluate, load_policy, mean_and_interval, print_head, print_row, train, two_at_once

import envs

FLAGS = {40: "--num-envs 32 --total-timesteps 8000000"}  # by the number of agents
SIZES = {10: 400, 40: 200, 100: 100, 1000: 10}  # agents, that policies are run with, and in how many episodes


@dataclass
class Options:
    folder: Path = Path("runs/swarm_learning")  # where the runs go
    seeds: tuple[int, ...] = tuple(range(1, 11))
    n_agents: tuple[int, ...] = (10,)
    policies: tuple[str, ...] = ("mlp",)
    critics: tuple[str, ...] = ("local",)
    count_self: bool = False  # the published reward to the letter: an agent counts among its own neighbours
    flags: str = ""  # further ones of ppo_swarm.py for all runs, as in: --team-reward 0


def per_step(make_policy, seed=None, **env_kwargs):
    """Mean reward per agent-step and mean polar order."""
    num_episodes = SIZES.get(env_kwargs["n_agents"], EPISODES)
    stats = evaluate(make_policy, "Swarm", num_episodes, seed, **env_kwargs)
    return np.array([(stats["r"] / stats["l"]).mean(), stats["polar_order"].mean()])


def trained(run):
    return load_policy("ppo_swarm", run.path / "model.pt")


def tuned(rule, grid, **env_kwargs):
    """(score, polar order, description) of the best of a grid {argument: values} for a rule."""
    names = list(grid)
    candidates = [partial(rule, **dict(zip(names, values, strict=True))) for values in product(*grid.values())]
    scores = [per_step(policy, envs.VALIDATION_SEED, **env_kwargs)[0] for policy in candidates]
    best = candidates[int(np.argmax(scores))]
    score, order = per_step(best, **env_kwargs)
    return score, order, ", ".join(f"{name} {value:g}" for name, value in best.keywords.items())


@cache
def tuned_boids(**env_kwargs):
    grid = {
        "own": (0.1, 0.3, 1.0),
        "align": (0.25, 0.5, 1.0, 2.0),
        "cohesion": (3.0, 6.0, 12.0),
        "keep": (0.0, 0.05, 0.1),
    }
    return tuned(envs.boids_policy, grid, **env_kwargs)


def tuned_vicsek(**env_kwargs):
    """It sees its 40 nearest within the radius."""
    env_kwargs["n_neighbors"] = min(env_kwargs["n_agents"] - 1, 40)
    grid = {"radius": (0.2, 0.3, 0.5, 0.75, 1.0, 1.5), "noise": (0.0, 0.1, 0.2, 0.4)}
    return tuned(envs.vicsek_policy, grid, **env_kwargs)


def main(options):
    def run(n_agents, policy, critic, seed):
        flags = f"--n-agents {n_agents} --policy {policy} --critic {critic} --seed {seed} {FLAGS.get(n_agents, '')}"
        if options.count_self:
            flags += " --env-kwargs count_self True"
        flags += f" {options.flags}"
        name = f"{n_agents}-{policy}-{critic}-{options.count_self}{options.flags.replace(' ', '')}-{seed}"
        return train("ppo_swarm.py", flags, options.folder / name)

    settings = list(product(options.n_agents, options.policies, options.critics))
    runs = two_at_once(run, [(*setting, seed) for setting in settings for seed in options.seeds])

    print(f"\nReward per agent-step on held-out episodes; seeds {options.seeds}\n")
    print_head("agents", "policy", "critic", "reward", "worst seed", "sampled", "polar order", "minutes")
    for n_agents in options.n_agents:
        env_kwargs = dict(n_agents=n_agents, count_self=options.count_self)
        for name, rule in (("boids", tuned_boids), ("Vicsek", tuned_vicsek)):
            score, order, description = rule(**env_kwargs)
            print_row(n_agents, f"{name} ({description})", "", f"{score:.3f}", "", "", f"{order:.3f}", "")
        score, order = per_step(envs.random_policy, **env_kwargs)
        print_row(n_agents, "random", "", f"{score:.3f}", "", "", f"{order:.3f}", "")
        for policy, critic in product(options.policies, options.critics):
            mine = [runs[n_agents, policy, critic, seed] for seed in options.seeds]
            scores, orders = np.transpose([per_step(trained(run), **env_kwargs) for run in mine])
            sampled = [per_step(partial(trained(run), greedy=False), **env_kwargs)[0] for run in mine]
            print_row(
                n_agents,
                policy,
                critic,
                mean_and_interval(scores),
                f"{scores.min():.3f}",
                mean_and_interval(sampled),
                mean_and_interval(orders),
                f"{np.mean([run.minutes for run in mine]):.1f}",
            )

    print("\nRun with other numbers of agents at the same density: reward per agent-step, polar order\n")
    print_head("policy", "critic", "trained with", *(f"{size:,}" for size in SIZES))
    rules = {size: tuned_boids(n_agents=size, count_self=options.count_self) for size in SIZES}
    print_row("boids, tuned", "", "", *(f"{score:.3f}, {order:.3f}" for score, order, _ in rules.values()))
    for n_agents, policy, critic in settings:
        cells = []
        mine = [runs[n_agents, policy, critic, seed] for seed in options.seeds]
        for size in SIZES:
            env_kwargs = dict(n_agents=size, count_self=options.count_self)
            scores, orders = np.transpose([per_step(trained(run), **env_kwargs) for run in mine])
            cells.append(f"{mean_and_interval(scores)}, {orders.mean():.3f}")
        print_row(policy, critic, n_agents, *cells)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
