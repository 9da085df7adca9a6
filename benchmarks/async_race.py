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
import multiprocessing
import operator
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

TARGETS = {"CartPole-v1": 475.0, "LunarLander-v3": 200.0}
LANDER = (
    "--num-steps 128 --gamma 0.999 --gae-lambda 0.98 --num-minibatches 8 --update-epochs 5 --learning-rate 2e-3 "
    "--reward-scale 0.02 --ent-coef 0.003 "
)
JUDGED = "--eval-env-id LunarLander-v3 --eval-every 50000 --eval-episodes 20 "
FLAGS = {
    "CartPole-v1": {"async_ppo.py": "--total-timesteps 100000 --eval-every 2048 --eval-episodes 20"},
    "LunarLander-v3": {
        "on the native lander": LANDER + JUDGED + "--env-id LunarLander --num-actors 1 --total-timesteps 4000000",
        "on Box2D": LANDER + JUDGED + "--env-id LunarLander-v3 --total-timesteps 4000000",
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
ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "benchmarks")}
RUN_PAUSED = "import async_race; async_race.run_paused()"


def sb3(env_id, seed, launch):
    """Trains until the target; prints steps, seconds of training, and those since `launch` (time.time())."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    settings = dict(ZOO[env_id])
    n_envs, total = settings.pop("n_envs"), settings.pop("n_timesteps")
    for name, value in settings.items():
        if isinstance(value, str):
            first = float(value.removeprefix("lin_"))
            settings[name] = partial(operator.mul, first)  # of the share of the training that is left

    class Race(BaseCallback):
        start, pause, last = time.time(), 0.0, 0

        def _on_training_start(self):
            self.start = time.time()

        def _on_step(self):
            if self.num_timesteps - self.last < EVAL_EVERY[env_id]:
                return True
            self.last, now = self.num_timesteps, time.time()
            mean, _ = evaluate_policy(self.model, held_out, n_eval_episodes=20)
            if mean >= TARGETS[env_id]:
                print(self.num_timesteps, now - self.start - self.pause, now - launch - self.pause)
            self.pause += time.time() - now
            return mean < TARGETS[env_id]

    held_out = make_vec_env(env_id, n_envs=20, seed=1_000_000)
    model = PPO("MlpPolicy", make_vec_env(env_id, n_envs=n_envs, seed=seed), seed=seed, device="cpu", **settings)
    model.learn(total, callback=Race())


def run_paused():
    """async_ppo.py with the flags of this process; its actors stand still during every evaluation."""
    sys.path.insert(0, str(ROOT))
    import envs

    def paused(*args, evaluate=envs.evaluate, **kwargs):
        actors = [process.pid for process in multiprocessing.active_children()]
        for pid in actors:
            os.kill(pid, signal.SIGSTOP)
        result = evaluate(*args, **kwargs)
        for pid in actors:
            os.kill(pid, signal.SIGCONT)
        return result

    envs.evaluate = paused
    runpy.run_path(str(ROOT / "async_ppo.py"), run_name="__main__")


def ours(env_id, flags, seed):
    """Steps, seconds of training and since the launch until the target; return and success of the best policy."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tempfile.TemporaryDirectory() as folder:
        launch = time.time()
        command = [sys.executable, "-c", RUN_PAUSED, *flags.split(), "--seed", str(seed)]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, env=ENVIRONMENT)
        (run,) = Path(folder).glob("runs/*")
        events = EventAccumulator(str(run))
        events.Reload()
        end = judge(env_id, run / "model.pt")
    seconds = {event.step: event.step / event.value for event in events.Scalars("charts/SPS")}
    hit = next((event for event in events.Scalars("eval/r") if event.value >= TARGETS[env_id]), None)
    if hit is None:
        return *(float("nan"),) * 3, end
    logged = {event.step: event.wall_time for event in events.Scalars("charts/SPS")}
    first = min(seconds)  # training began this long before the first update was logged
    started = logged[first] - seconds[first]
    # An evaluation lies between the writing of the update's scalars and that of its own.
    pause = sum(event.wall_time - logged[event.step] for event in events.Scalars("eval/r") if event.step < hit.step)
    arrived = logged[hit.step] - pause
    return hit.step, arrived - started, arrived - launch, end


def judge(env_id, path):
    """Return of the best policy and, of a lander, the share of successes (lunar_lander_fidelity.py's), 100 episodes."""
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    from grpo_learning import judge as on_box2d

    import envs
    from async_ppo import TEST_SEED, Agent, Args

    saved = envs.load(path)
    agent = Agent(Args(**saved["args"]), envs.make_vec(env_id, 1, 0))
    agent.load_state_dict(saved["model"])
    if env_id == "LunarLander-v3":
        return "{:.1f} | {:.2f}".format(*on_box2d(agent.make_policy))
    stats, _, _ = envs.evaluate(agent.make_policy, env_id, 100, TEST_SEED)
    return f"{stats['r'].mean():.1f} | "


def theirs(interpreter, env_id, seed):
    """The same of SB3, which stops at the target."""
    command = [interpreter, __file__, env_id, "--seeds", str(seed), "--launch", str(time.time())]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout.split()
    return *([float(x) for x in output[-3:]] or [float("nan")] * 3), " | "


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("env_id", choices=TARGETS)
    parser.add_argument("--sb3", default=sys.executable, help="the interpreter that can import stable_baselines3")
    parser.add_argument("--seeds", type=int, nargs="+", default=tuple(range(1, 11)))
    parser.add_argument("--judge", type=Path, nargs="+", help="finished runs: judge their policies, no race")
    parser.add_argument("--launch", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for run in options.judge or ():
        print(f"| {run.name} | {judge(options.env_id, run / 'model.pt')} |")
    if options.judge:
        return
    if options.launch:
        sb3(options.env_id, options.seeds[0], options.launch)
        return
    env_id, names = options.env_id, FLAGS[options.env_id]
    for name, flags in names.items():
        print(f"{name}: python async_ppo.py {flags} --seed S")
    print("\n| seed | what | steps | seconds | with start-up | the best policy at the end | success |")
    print("|---" * 7 + "|")
    times = {}
    for flags in names.values():  # compiles the kernels, which would else count for the first seed
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, ROOT / "async_ppo.py", *flags.split(), "--total-timesteps", "8192"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
    for seed in options.seeds:
        results = {name: ours(env_id, flags, seed) for name, flags in names.items()}
        results["SB3"] = theirs(options.sb3, env_id, seed)
        for name, (steps, training, all_in, end) in results.items():
            times.setdefault(name, []).append((training, all_in, steps))
            print(f"| {seed} | {name} | {steps:,.0f} | {training:.1f} | {all_in:.1f} | {end} |", flush=True)
    for name in names:
        ratios = np.array(times["SB3"]) / np.array(times[name])
        training, all_in, steps = ratios[np.isfinite(ratios).all(axis=1)].T  # (seeds where both arrived,) each
        print(f"\n{name}: both arrived with {len(steps)} of {len(ratios)} seeds")
        if not len(steps):
            continue
        for of, values in (("of training", training), ("with start-up", all_in)):
            spread = f"{values.min():.1f} to {values.max():.1f}"
            print(f"seconds {of}: sooner by a factor of {np.median(values):.1f} ({spread})")
        print(f"{1 / steps.max():.2f} to {1 / steps.min():.2f} times the steps, ", end="")
        print(f"{(training / steps).min():.1f} to {(training / steps).max():.1f} times as many in a second")


if __name__ == "__main__":
    main()
