"""async_ppo.py beside Stable-Baselines3's PPO with its zoo's settings: seconds until 20 episodes go well.

    pip install stable-baselines3==2.9.2
    python benchmarks/async_race.py CartPole-v1         [--sb3 INTERPRETER] [--seeds 1 2 ... 10]
    python benchmarks/async_race.py LunarLander-v3
    python benchmarks/async_race.py LunarLander-v3 --judge runs/NAME ...       only that last part, of finished runs

From the repository's root; 4 and, with three seeds, 30 minutes. Both play 20 greedy, held-out episodes every so many
steps, CartPole-v1 or Gymnasium's own LunarLander-v3, and have arrived when the mean return reaches 475 or 200. Printed,
for each seed: the steps and the seconds from the first one of training; the same seconds plus start-up, from the launch
of the process. The evaluations are in nobody's time, and async_ppo.py's actors stand still during its own. It trains on
to the end of its budget: the best policy is then judged on 100 other episodes. Each process has one torch thread.
Kernels are compiled before.
"""

import argparse
import operator
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import (
    evaluate,
    first_reaching,
    judge_on_box2d,
    load_policy,
    median_and_range,
    print_head,
    print_row,
    read_events,
    run_script,
    training_seconds,
)

TARGETS = {"CartPole-v1": 475.0, "LunarLander-v3": 200.0}
LANDER = (
    "--num-steps 128 --gamma 0.999 --gae-lambda 0.98 --num-minibatches 8 --update-epochs 5 --learning-rate 2e-3 "
    "--reward-scale 0.02 --ent-coef 0.003"
)
JUDGED = "--eval-env-id LunarLander-v3 --eval-every 50000 --eval-episodes 20"
FLAGS = {
    "CartPole-v1": {"async_ppo.py": "--total-timesteps 100000 --eval-every 2048 --eval-episodes 20"},
    "LunarLander-v3": {
        "on the native lander": f"{LANDER} {JUDGED} --env-id LunarLander --num-actors 1 --total-timesteps 4000000",
        "on Box2D": f"{LANDER} {JUDGED} --env-id LunarLander-v3 --total-timesteps 4000000",
    },
}
ZOO = {  # rl-baselines3-zoo, hyperparams/ppo.yml; lin_x falls linearly to 0
    "CartPole-v1": dict(
        n_envs=8, n_timesteps=100_000, n_steps=32, batch_size=256, gae_lambda=0.8, gamma=0.98, n_epochs=20,
        ent_coef=0.0, learning_rate="lin_0.001", clip_range="lin_0.2",
    ),
    "LunarLander-v3": dict(
        n_envs=16, n_timesteps=1_000_000, n_steps=1024, batch_size=64, gae_lambda=0.98, gamma=0.999, n_epochs=4,
        ent_coef=0.01,
    ),
}  # fmt: skip
EVAL_EVERY = {"CartPole-v1": 2048, "LunarLander-v3": 50_000}
NAN = float("nan")  # of what did not happen


class Result(NamedTuple):
    """What it took until the target, and how good the best policy was in the end."""

    steps: float
    training: float  # seconds from the first step
    with_startup: float  # seconds from the launch of the process
    end: str


def sb3(env_id, seed, launch):
    """Trains until the target; prints steps, seconds of training, and those since `launch` (time.time())."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    settings = dict(ZOO[env_id])
    n_envs = settings.pop("n_envs")
    total = settings.pop("n_timesteps")
    for name, value in settings.items():
        if isinstance(value, str):
            first = float(value.removeprefix("lin_"))
            settings[name] = partial(operator.mul, first)  # of the share of the training that is left

    class Race(BaseCallback):
        start = time.time()
        pause = 0.0  # seconds of evaluations
        last = 0  # step of the last one

        def _on_training_start(self):
            self.start = time.time()

        def _on_step(self):
            if self.num_timesteps - self.last < EVAL_EVERY[env_id]:
                return True
            self.last = self.num_timesteps
            now = time.time()
            mean, _ = evaluate_policy(self.model, held_out, n_eval_episodes=20)
            if mean >= TARGETS[env_id]:
                print(self.num_timesteps, now - self.start - self.pause, now - launch - self.pause)
            self.pause += time.time() - now
            return mean < TARGETS[env_id]

    held_out = make_vec_env(env_id, n_envs=20, seed=1_000_000)
    model = PPO("MlpPolicy", make_vec_env(env_id, n_envs=n_envs, seed=seed), seed=seed, device="cpu", **settings)
    model.learn(total, callback=Race())


def ours(env_id, flags, seed):
    """The result of async_ppo.py, whose actors stand still during its evaluations."""
    with tempfile.TemporaryDirectory() as folder:
        launch = time.time()
        run = run_script("benchmarks/async_paused.py", f"{flags} --seed {seed}", folder)
        events = read_events(run)
        end = judge(env_id, run / "model.pt")
    hit = first_reaching(events, "eval/r", TARGETS[env_id])
    if hit is None:
        return Result(NAN, NAN, NAN, end)
    started, seconds = training_seconds(events)
    return Result(hit.step, seconds[hit.step], started + seconds[hit.step] - launch, end)


def judge(env_id, path):
    """Return of the best policy and, of a lander, the share of successes, in 100 episodes; two cells of a table."""
    make_policy = load_policy("async_ppo", path)
    if env_id == "LunarLander-v3":
        returned, success = judge_on_box2d(make_policy)
        return f"{returned:.1f} | {success:.2f}"
    return f"{evaluate(make_policy, env_id)['r'].mean():.1f} | "


def theirs(interpreter, env_id, seed):
    """The result of SB3, which stops at the target."""
    command = [interpreter, __file__, env_id, "--seeds", str(seed), "--launch", str(time.time())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()
    steps, training, with_startup = [float(word) for word in output[-3:]] or [NAN, NAN, NAN]
    return Result(steps, training, with_startup, " | ")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("env_id", choices=TARGETS)
    parser.add_argument("--sb3", default=sys.executable, help="the interpreter that can import stable_baselines3")
    parser.add_argument("--seeds", type=int, nargs="+", default=tuple(range(1, 11)))
    parser.add_argument("--judge", type=Path, nargs="+", help="finished runs: judge their policies, no race")
    parser.add_argument("--launch", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    env_id = options.env_id
    if options.launch:
        sb3(env_id, options.seeds[0], options.launch)
    elif options.judge:
        for run in options.judge:
            print_row(run.name, judge(env_id, run / "model.pt"))
    else:
        race(env_id, options.seeds, options.sb3)


def race(env_id, seeds, interpreter):
    flags = FLAGS[env_id]
    for name in flags:
        print(f"{name}: python async_ppo.py {flags[name]} --seed S")
    print()
    print_head("seed", "what", "steps", "seconds", "with start-up", "the best policy at the end", "success")
    for name in flags:  # compiles the kernels, which would else count for the first seed
        with tempfile.TemporaryDirectory() as folder:
            run_script("async_ppo.py", f"{flags[name]} --total-timesteps 8192", folder)
    results = {name: [] for name in [*flags, "SB3"]}
    for seed in seeds:
        for name in results:
            result = theirs(interpreter, env_id, seed) if name == "SB3" else ours(env_id, flags[name], seed)
            results[name].append(result)
            seconds = [f"{result.training:.1f}", f"{result.with_startup:.1f}"]
            print_row(seed, name, f"{result.steps:,.0f}", *seconds, result.end)
    for name in flags:
        pairs = [  # of the seeds with which both arrived
            (our, their)
            for our, their in zip(results[name], results["SB3"], strict=True)
            if np.isfinite([our.steps, their.steps]).all()
        ]
        print(f"\n{name}: both arrived with {len(pairs)} of {len(seeds)} seeds")
        if not pairs:
            continue
        training = np.array([their.training / our.training for our, their in pairs])
        with_startup = np.array([their.with_startup / our.with_startup for our, their in pairs])
        steps = np.array([our.steps / their.steps for our, their in pairs])
        rate = steps * training
        print(f"seconds of training: sooner by a factor of {median_and_range(training)}")
        print(f"seconds with start-up: sooner by a factor of {median_and_range(with_startup)}")
        print(f"{steps.min():.2f} to {steps.max():.2f} times the steps, ", end="")
        print(f"{rate.min():.1f} to {rate.max():.1f} times as many in a second")


if __name__ == "__main__":
    main()
