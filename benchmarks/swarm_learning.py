"""What ppo_swarm.py learns on Swarm, against a tuned Vicsek model. From the repository's root, 45 minutes on 2 cores:

    python benchmarks/swarm_learning.py

Trains every network with every critic, for 10 agents and for the published setting of 40, with seeds 1, 2 and 3, two
runs side by side with one torch thread each, by the command `python ppo_swarm.py --n-agents N --policy P --critic C
--seed S` and default flags else. Prints one table of the reward per agent-step on 100 held-out episodes, and one of the
policies trained with 10 agents, run with 100 and 1,000 at the same density. Minutes are wall time of the whole command.
A run that is already complete under --folder is not trained again.
"""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs
from ppo_swarm import TEST_SEED, VALIDATION_SEED, Agent, Args, load

EPISODES = 100


@dataclass
class Options:
    folder: Path = Path("runs/swarm_learning")  # where the runs go
    seeds: tuple[int, ...] = (1, 2, 3)
    n_agents: tuple[int, ...] = (10, 40)
    policies: tuple[str, ...] = ("mlp", "gnn", "attention")
    critics: tuple[str, ...] = ("local", "central")


def train(options, n_agents, policy, critic, count_self, seed):
    """The folder of the finished run; `minutes` in it holds its wall time."""
    cwd = options.folder / f"{n_agents}-{policy}-{critic}-{count_self}-{seed}"
    if not (cwd / "minutes").exists():
        shutil.rmtree(cwd, ignore_errors=True)  # half a run: its wall time is lost
        cwd.mkdir(parents=True)
        command = [sys.executable, sys.path[0] + "/ppo_swarm.py", "--n-agents", n_agents, "--policy", policy]
        command += ["--critic", critic, "--seed", seed] + ["--env-kwargs", "count_self", "True"] * count_self
        start = time.time()
        with open(cwd / "log", "w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(map(str, command), cwd=cwd, env=environment, stdout=log, stderr=log, check=True)
        (cwd / "minutes").write_text(str((time.time() - start) / 60))
    return cwd


def per_step(make_policy, num_episodes=EPISODES, seed=TEST_SEED, **env_kwargs):
    """Mean reward per agent-step and mean polar order."""
    stats, _, _ = envs.evaluate(make_policy, "Swarm", num_episodes, seed, **env_kwargs)
    return np.array([(stats["r"] / stats["l"]).mean(), stats["polar_order"].mean()])


def trained(cwd, **env_kwargs):
    """make_policy of the model in a run's folder."""
    saved = load(next(cwd.glob("runs/*/model.pt")))
    agent = Agent(Args(**saved["args"]), envs.make_vec("Swarm", 1, 0, **env_kwargs))
    agent.load_state_dict(saved["model"])
    return agent.make_policy


def tuned_vicsek(**env_kwargs):
    """The best of a grid over its radius and noise on other episodes; it sees its 40 nearest within the radius."""
    env_kwargs["n_neighbors"] = min(env_kwargs["n_agents"] - 1, 40)
    grid = [
        partial(envs.vicsek_policy, radius=radius, noise=noise)
        for radius in (0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.25, 1.5)
        for noise in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
    ]
    best = max(grid, key=lambda policy: per_step(policy, seed=VALIDATION_SEED, **env_kwargs)[0])
    return per_step(best, **env_kwargs), f"radius {best.keywords['radius']:g}, noise {best.keywords['noise']:g}"


def spread(values):
    return f"{np.mean(values):.3f} +- {np.std(values):.3f}"


def main(options):
    settings = list(product(options.n_agents, options.policies, options.critics, (False,)))
    settings += [(40, "mlp", "local", True)] if 40 in options.n_agents else []
    with ThreadPoolExecutor(2) as pool:
        folders = {
            (*setting, seed): pool.submit(train, options, *setting, seed)
            for setting, seed in product(settings, options.seeds)
        }
    folders = {key: future.result() for key, future in folders.items()}

    print(f"\nReward per agent-step on {EPISODES} held-out episodes; mean +- std over seeds {options.seeds}\n")
    columns = (
        "agents | own cohesion | policy | critic | trained | worst seed | polar order | minutes | tuned Vicsek | random"
    )
    print(f"| {columns} |\n{'|---' * 10}|")
    baselines = {}
    for n_agents, policy, critic, count_self in settings:
        env_kwargs = dict(n_agents=n_agents, count_self=count_self)
        if (n_agents, count_self) not in baselines:
            (vicsek, _), best = tuned_vicsek(**env_kwargs)
            random = per_step(envs.random_policy, **env_kwargs)[0]
            baselines[n_agents, count_self] = f"{vicsek:.3f} ({best}) | {random:.3f}"
        runs = [folders[n_agents, policy, critic, count_self, seed] for seed in options.seeds]
        scores, orders = np.transpose([per_step(trained(run, **env_kwargs), **env_kwargs) for run in runs])
        minutes = np.mean([float((run / "minutes").read_text()) for run in runs])
        row = [n_agents, "counted" if count_self else "no", policy, critic, spread(scores), f"{scores.min():.3f}"]
        row += [spread(orders), f"{minutes:.1f}", baselines[n_agents, count_self]]
        print(f"| {' | '.join(map(str, row))} |", flush=True)

    print(
        "\nTrained with 10 agents, run with more at the same density: reward per agent-step, polar order; 20 episodes\n"
    )
    print("| policy | critic | 10 | 100 | 1,000 |\n|---|---|---|---|---|")
    sizes = (10, 100, 1000)
    for policy, critic in product(options.policies, options.critics):
        cells = []
        for n_agents in sizes:
            runs = [folders[10, policy, critic, False, seed] for seed in options.seeds]
            scores = [per_step(trained(run, n_agents=10), 20, n_agents=n_agents) for run in runs]
            cells.append(", ".join(spread(column) for column in np.transpose(scores)))
        print(f"| {policy} | {critic} | {' | '.join(cells)} |", flush=True)
    for name in ("vicsek", "random"):
        cells = []
        for n_agents in sizes:
            make_policy, env_kwargs = envs.baselines("Swarm", n_agents=n_agents)[name]
            cells.append(", ".join(f"{value:.3f}" for value in per_step(make_policy, 20, **env_kwargs)))
        print(f"| {name} | | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
