"""How fast LunarLander steps in one thread, beside EnvPool and Gymnasium. From the repository's root, two minutes:

    python benchmarks/lunar_lander_speed.py [--envpool /path/to/python] [--model runs/NAME/model.pt]

EnvPool needs NumPy of its own version, so it may live in another virtual environment (`pip install envpool`), whose
interpreter is named by --envpool; without it, and where this one cannot import it, its rows are left out. Policies:
random actions, mostly in flight; Gymnasium's heuristic, which lands and comes to rest; with --model, the greedy policy
that a GRPO script has saved. A step is all of `envs.step`, resets included; the time that the policy takes is not
counted. The contestants take turns, round after round, so that a busy machine slows them all. The table has the median
over the rounds in thousand steps/s, with the smallest and largest, and the ratio to EnvPool in the same round and with
the same policy.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from functools import partial

import numpy as np
from common import heuristic, print_head, print_row, take_turns

ROUNDS = 5
STEPS = {"ours": 400_000, "EnvPool": 60_000, "Gymnasium": 20_000}  # of a contestant in a round, all envs together,
EPISODE = 300  # but at least so many of each environment: whole episodes, with landing and reset


def random(rng, observations):
    return rng.integers(4, size=len(observations))


def trained(layers, observations):
    """The likeliest actions of a network with tanh between its layers; NumPy: EnvPool may have no torch."""
    for weight, bias in layers[:-1]:
        observations = np.tanh(observations @ weight.T + bias)
    weight, bias = layers[-1]
    return (observations @ weight.T + bias).argmax(-1)


def load_policies(path):
    """The policies by name; `path` is a file of the trained network's arrays, or "" if there is none."""
    policies = {"random": partial(random, np.random.default_rng(0)), "heuristic": heuristic}
    if path:
        arrays = [*np.load(path).values()]
        policies["trained"] = partial(trained, [*zip(arrays[::2], arrays[1::2], strict=True)])
    return policies


def steps_per_second(vector, num_envs, policy, steps):
    observations, _ = vector.reset()
    total = max(steps // num_envs, EPISODE)
    spent = 0.0
    for _ in range(total):
        actions = policy(observations)
        start = time.perf_counter()
        observations = vector.step(actions)[0]
        spent += time.perf_counter() - start
    return total * num_envs / spent


class Single:
    """Gymnasium's environment behind the interface of a batch of one."""

    def __init__(self):
        import gymnasium

        self.env = gymnasium.make("LunarLander-v3")

    def reset(self):
        observation, info = self.env.reset()
        return observation[None], info

    def step(self, actions):
        observation, reward, terminated, truncated, info = self.env.step(actions[0])
        if terminated or truncated:
            observation, info = self.env.reset()
        return observation[None], reward, terminated, truncated, info


def serve_envpool(path):
    """In EnvPool's interpreter: one measurement for every line that comes in."""
    import envpool

    policies = load_policies(path)
    vectors = {}
    print("ready", flush=True)
    for line in sys.stdin:
        policy, number = line.split()
        num_envs = int(number)
        if num_envs not in vectors:
            vectors[num_envs] = envpool.make_gymnasium("LunarLander-v3", num_envs=num_envs, num_threads=1, seed=0)
        print(steps_per_second(vectors[num_envs], num_envs, policies[policy], STEPS["EnvPool"]), flush=True)


def main(interpreter, model, path):
    import envs

    if model:
        np.savez(path, *(weights.numpy() for weights in envs.load(model)["model"].values()))
    policies = load_policies(path if model else "")
    command = [interpreter, __file__, "--serve", path if model else ""]
    pool = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with_envpool = pool.stdout.readline() == "ready\n"

    def in_envpool(policy, num_envs):
        print(policy, num_envs, file=pool.stdin, flush=True)
        return float(pool.stdout.readline())

    ours = {}
    for num_envs in (32, 1024):
        ours[num_envs] = envs.make_vec("LunarLander", num_envs, num_workers=0)
        ours[num_envs].reset(seed=0)
        ours[num_envs].step(np.zeros(num_envs, int))  # compiles
    single = Single()
    contestants = {}
    for name, policy in policies.items():
        for num_envs, vector in ours.items():
            measure = partial(steps_per_second, vector, num_envs, policy, STEPS["ours"])
            contestants[name, "ours", num_envs] = measure
        for num_envs in ours if with_envpool else ():
            contestants[name, "EnvPool", num_envs] = partial(in_envpool, name, num_envs)
        contestants[name, "Gymnasium", 1] = partial(steps_per_second, single, 1, policy, STEPS["Gymnasium"])
    speeds = take_turns(contestants, ROUNDS)

    print_head(
        "policy", "", "envs", "k steps/s", "smallest to largest", "x EnvPool, same number of envs", "x Gymnasium"
    )
    for (name, who, num_envs), values in speeds.items():
        ratios = ["", ""]
        for place, other in enumerate([(name, "EnvPool", num_envs), (name, "Gymnasium", 1)]):
            if who == "ours" and other in speeds:
                ratios[place] = f"{np.median(np.divide(values, speeds[other])):.1f}"
        thousands = np.divide(values, 1e3)
        lowest_to_highest = f"{thousands.min():.1f} to {thousands.max():.1f}"
        print_row(name, who, num_envs, f"{np.median(thousands):.1f}", lowest_to_highest, *ratios)
    pool.stdin.close()
    pool.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envpool", default=sys.executable, help="the interpreter that can import envpool")
    parser.add_argument("--model", help="a model of a GRPO script")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve_envpool(options.serve)
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(options.envpool, options.model, f"{folder}/layers.npz")
