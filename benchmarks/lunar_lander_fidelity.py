"""Whether LunarLander plays as Gymnasium's LunarLander-v3 does. From the repository's root, in about a minute:

    python benchmarks/lunar_lander_fidelity.py [--model runs/NAME/model.pt]    with a policy of a GRPO script's, too

Every policy flies 1,000 episodes on Box2D (Gymnasium, seeds 0, 1, ...) and 1,000 on ours, each with draws of its own.
The table has the mean return with its standard error, the mean length, and the shares of episodes that returned 200 or
more, ended at rest with both legs down ("success": both legs down, speed < 0.1 and |x| < 0.2 in observation units),
fell asleep ("landed") or touched the ground with the hull ("crashed").

A second table flies both side by side with the same draws: terrain, push, and the engines' dispersion. It has how far
observations are from Box2D's up to the first touch of the ground, and the share of episodes that agree in how and at
which step they end. Other policies: `fidelity(name, policy)` takes any function from observations (n, 8) to actions.
"""

import argparse
import math

import gymnasium as gym
import numpy as np
from common import heuristic, load_policy, print_head, print_row, succeeded

import envs

EPISODES = 1000
SIDE_BY_SIDE = 200
METRICS = ("success", "landed", "crashed")


def random(seed=0):
    rng = np.random.default_rng(seed)
    return lambda observations: rng.integers(4, size=len(observations))


def nothing(observations):
    return np.zeros(len(observations), np.int64)


def trained(path):
    """The greedy policy that a GRPO script has saved."""
    act = load_policy("grpo_perstep", path)(None)
    return lambda observations: act(observations, {})


def on_box2d(policy, episodes, **env_kwargs):
    """The same statistics as ours, {name: (episodes,)}, from Gymnasium's own environment."""
    env = gym.make("LunarLander-v3", **env_kwargs)
    rows = []
    for seed in range(episodes):
        observation, _ = env.reset(seed=seed)
        total = 0.0
        length = 0
        ended = False
        while not ended:
            observation, reward, terminated, truncated, _ = env.step(policy(observation[None])[0])
            total += reward
            length += 1
            ended = terminated or truncated
        landed = not env.unwrapped.lander.awake
        rows.append((total, length, succeeded(observation[None])[0], landed, env.unwrapped.game_over))
    return dict(zip(("r", "l", *METRICS), np.array(rows, float).T, strict=True))


def on_ours(policy, episodes, seed=0, **env_kwargs):
    def make_policy(_):
        return lambda observations, infos: policy(observations)

    stats, _, _ = envs.evaluate(make_policy, "LunarLander", episodes, seed, **env_kwargs)
    return stats


def fidelity(name, policy, episodes=EPISODES, **env_kwargs):
    """Two rows of the table: the policy on Box2D and on ours."""
    worlds = {"Box2D": on_box2d, "ours": on_ours}
    for where, fly in worlds.items():
        stats = fly(policy, episodes, **env_kwargs)
        error = stats["r"].std() / math.sqrt(episodes)
        shares = [np.mean(stats["r"] >= 200)] + [stats[metric].mean() for metric in METRICS]
        cells = [f"{stats['r'].mean():.1f} +- {error:.1f}", f"{stats['l'].mean():.1f}"]
        print_row(name, where, *cells, *(f"{100 * share:.1f}%" for share in shares))


class Replay:
    """Stands in for the random generator of Gymnasium's environment, and draws what ours is about to draw."""

    def __init__(self, rng):
        self.rng = rng.reshape(1, 2).copy()

    def uniform(self, low, high, size=()):
        draws = [envs._uniform(self.rng, 0, low, high) for _ in range(math.prod(size))]
        return np.array(draws).reshape(size)[()]

    def integers(self, low, high):
        return math.floor(envs._uniform(self.rng, 0, float(low), float(high)))


def side_by_side(name, policy, episodes=SIDE_BY_SIDE, **env_kwargs):
    """A row of the second table: the same episodes on both, with the same draws and actions."""
    ours = envs.make_vec("LunarLander", 1, 0, **env_kwargs)
    box2d = gym.make("LunarLander-v3", **env_kwargs)
    ours.reset(seed=0)
    box2d.reset(seed=0)
    flights = []  # the largest difference of observations up to the first touch
    returns = []  # differences of the returns, where the episode ended on both
    exact = 0  # episodes without any difference
    same_end = 0
    for _ in range(episodes):
        box2d.unwrapped.np_random = Replay(ours.state.rng)
        observation = box2d.reset()[0]
        gap = np.abs(ours.reset()[0][0] - observation).max()
        flight = gap  # the largest gap in flight
        largest = gap
        total = 0.0
        ended = False
        touched = False
        while not ended:
            action = policy(observation[None])
            observation, reward, terminated, truncated, _ = box2d.step(action[0])
            following, _, terminations, truncations, infos = ours.step(action)
            total += reward
            ended = terminated or truncated
            our_end = terminations[0] or truncations[0]
            gap = np.abs((infos["final_obs"] if our_end else following)[0] - observation).max()
            largest = max(largest, gap)
            touched = touched or observation[6] + observation[7] > 0 or box2d.unwrapped.game_over
            if not touched:
                flight = max(flight, gap)
            if ended != our_end:
                break
        else:
            same_end += terminated == terminations[0]
            returns.append(abs(infos["episode"]["r"][0] - total))
        flights.append(flight)
        exact += largest == 0
    print_row(
        name,
        f"{np.median(flights):.1e}",
        f"{max(flights):.1e}",
        f"{100 * same_end / episodes:.1f}%",
        f"{100 * exact / episodes:.1f}%",
        f"{np.median(returns):.1e}",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model.pt of a run of a GRPO script")
    options = parser.parse_args()
    policies = {"random": random(), "nothing": nothing, "heuristic": heuristic}
    if options.model:
        policies["trained"] = trained(options.model)
    print(f"{EPISODES} episodes each\n")
    print_head("policy", "on", "return", "length", ">= 200", "success", "landed", "crashed")
    for name, policy in policies.items():
        fidelity(name, policy)
    fidelity("heuristic, wind", heuristic, enable_wind=True)
    print(f"\n{SIDE_BY_SIDE} episodes side by side with the same draws; differences of observations and of returns\n")
    print_head("policy", "flight, median", "flight, largest", "same end", "equal to the last bit", "returns, median")
    for name, policy in policies.items():
        side_by_side(name, policy)
    side_by_side("heuristic, wind", heuristic, enable_wind=True)


if __name__ == "__main__":
    main()
