"""What ppo_swarm.py learns on Swarm, against a tuned Vicsek model. From the repository's root, 45 minutes on 2 cores:

    python benchmarks/swarm_learning.py

Trains every network with every critic, for 10 agents and for the published setting of 40, with seeds 1, 2 and 3, two
runs side by side with one torch thread each, by the command `python ppo_swarm.py --n-agents N --policy P --critic C
--seed S` and default flags else. Prints one table of the reward per agent-step on 100 held-out episodes, and one of the
policies trained with 10 agents, run with 100 and 1,000 at the same density. Minutes are wall time of the whole command.
A run that is already complete under --folder is not trained again.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import tyro
from common import EPISODES, evaluate, load_policy, print_head, print_row, spread, train, two_at_once

import envs

SIZES = (10, 100, 1000)  # agents, that policies trained with 10 are run with


@dataclass
class Options:
    folder: Path = Path("runs/swarm_learning")  # where the runs go
    seeds: tuple[int, ...] = (1, 2, 3)
    n_agents: tuple[int, ...] = (10, 40)
    policies: tuple[str, ...] = ("mlp", "gnn", "attention")
    critics: tuple[str, ...] = ("local", "central")


def per_step(make_policy, num_episodes=EPISODES, seed=None, **env_kwargs):
    """Mean reward per agent-step and mean polar order."""
    stats = evaluate(make_policy, "Swarm", num_episodes, seed, **env_kwargs)
    return np.array([(stats["r"] / stats["l"]).mean(), stats["polar_order"].mean()])


def trained(run):
    return load_policy("ppo_swarm", run.path / "model.pt")


def tuned_vicsek(**env_kwargs):
    """The best of a grid over its radius and noise on other episodes; it sees its 40 nearest within the radius."""
    env_kwargs["n_neighbors"] = min(env_kwargs["n_agents"] - 1, 40)
    grid = [
        partial(envs.vicsek_policy, radius=radius, noise=noise)
        for radius in (0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.25, 1.5)
        for noise in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
    ]
    best = max(grid, key=lambda policy: per_step(policy, seed=envs.VALIDATION_SEED, **env_kwargs)[0])
    return per_step(best, **env_kwargs), f"radius {best.keywords['radius']:g}, noise {best.keywords['noise']:g}"


def main(options):
    def run(n_agents, policy, critic, count_self, seed):
        flags = f"--n-agents {n_agents} --policy {policy} --critic {critic} --seed {seed}"
        if count_self:
            flags += " --env-kwargs count_self True"
        return train("ppo_swarm.py", flags, options.folder / f"{n_agents}-{policy}-{critic}-{count_self}-{seed}")

    settings = list(product(options.n_agents, options.policies, options.critics, (False,)))
    if 40 in options.n_agents:
        settings.append((40, "mlp", "local", True))
    runs = two_at_once(run, [(*setting, seed) for setting in settings for seed in options.seeds])

    print(f"\nReward per agent-step on {EPISODES} held-out episodes; mean +- std over seeds {options.seeds}\n")
    heads = "agents, own cohesion, policy, critic, trained, worst seed, polar order, minutes, tuned Vicsek, random"
    print_head(*heads.split(", "))
    baselines = {}
    for n_agents, policy, critic, count_self in settings:
        env_kwargs = dict(n_agents=n_agents, count_self=count_self)
        if (n_agents, count_self) not in baselines:
            (vicsek, _), best = tuned_vicsek(**env_kwargs)
            random, _ = per_step(envs.random_policy, **env_kwargs)
            baselines[n_agents, count_self] = (f"{vicsek:.3f} ({best})", f"{random:.3f}")
        mine = [runs[n_agents, policy, critic, count_self, seed] for seed in options.seeds]
        scores, orders = np.transpose([per_step(trained(run), **env_kwargs) for run in mine])
        print_row(
            n_agents,
            "counted" if count_self else "no",
            policy,
            critic,
            spread(scores, 3),
            f"{scores.min():.3f}",
            spread(orders, 3),
            f"{np.mean([run.minutes for run in mine]):.1f}",
            *baselines[n_agents, count_self],
        )

    print(
        "\nTrained with 10 agents, run with more at the same density: reward per agent-step, polar order; 20 episodes\n"
    )
    print_head("policy", "critic", *(f"{n_agents:,}" for n_agents in SIZES))
    for policy, critic in product(options.policies, options.critics):
        cells = []
        for n_agents in SIZES:
            mine = [runs[10, policy, critic, False, seed] for seed in options.seeds]
            scores, orders = np.transpose([per_step(trained(run), 20, n_agents=n_agents) for run in mine])
            cells.append(f"{spread(scores, 3)}, {spread(orders, 3)}")
        print_row(policy, critic, *cells)
    for name in ("vicsek", "random"):
        cells = []
        for n_agents in SIZES:
            make_policy, env_kwargs = envs.baselines("Swarm", n_agents=n_agents)[name]
            score, order = per_step(make_policy, 20, **env_kwargs)
            cells.append(f"{score:.3f}, {order:.3f}")
        print_row(name, "", *cells)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
