"""What the benchmarks share: training runs, reading their curves, judging their models, measuring by turns, tables.

It imports NumPy and the standard library alone, and the rest where that is needed: two benchmarks are run in part by
another interpreter, which may have no more. Whoever imports it can import envs.py and the scripts.
"""

import importlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

EPISODES = 100  # that a policy is judged on
STEP_ROUNDS = 5  # of step_sizes
AGENT_STEPS = 500_000  # at least so many of each size in such a round


# -------------------- Training runs -----------------------------------------------------------------------------------


class Run(NamedTuple):
    path: Path  # the folder with model.pt and TensorBoard's events
    minutes: float  # wall time of the whole command


def run_script(script, flags, folder, threads=1, seconds=None):
    """Run `python SCRIPT FLAGS` in `folder`, where its output goes to the file log; returns the folder of the run.

    threads   of torch, None leaves them to torch
    seconds   after so many the script is told to stop, which it does after the iteration
    """
    modules = [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]  # corridor.py and sleepy.py
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(modules)}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, str(ROOT / script), *flags.split()]
    log = Path(folder) / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
    finally:
        process.kill()  # if it still runs, after a Ctrl-C
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    (path,) = Path(folder).glob("runs/*")
    return path


def train(script, flags, folder):
    """The finished run of `python SCRIPT FLAGS` in `folder`; one that is there already is not trained again."""
    minutes = folder / "minutes"
    if not minutes.exists():
        shutil.rmtree(folder, ignore_errors=True)  # half a run: its wall time is lost
        folder.mkdir(parents=True)
        start = time.time()
        run_script(script, flags, folder)
        minutes.write_text(str((time.time() - start) / 60))
    (path,) = folder.glob("runs/*")
    return Run(path, float(minutes.read_text()))


def two_at_once(function, tasks):
    """{task: function(*task)}; the functions wait for a process of their own, as `train` does."""
    tasks = list(tasks)
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda task: function(*task), tasks)
        return dict(zip(tasks, results, strict=True))


# -------------------- Curves ------------------------------------------------------------------------------------------


def read_events(path):
    """What the run in the folder `path` logged: .Scalars(tag) are its events, with step, value and wall_time."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0})  # 0: all of them, not a sample
    events.Reload()
    return events


def run_and_read(script, flags, **options):
    """What `run_script` logged, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        return read_events(run_script(script, flags, folder, **options))


def first_reaching(events, tag, target):
    """The first event of a curve that is at the target or above, or None."""
    for event in events.Scalars(tag):
        if event.value >= target:
            return event
    return None


def seconds_at(events):
    """{step: seconds since the first step of the training}, for every update that was logged."""
    return {event.step: event.step / event.value for event in events.Scalars("charts/SPS")}


def training_seconds(events):
    """When the training began, as time.time(), and {step: seconds since then} of every update, without evaluations."""
    seconds = seconds_at(events)
    logged = {event.step: event.wall_time for event in events.Scalars("charts/SPS")}
    first = min(seconds)  # training began this long before the first update was logged
    started = logged[first] - seconds[first]
    # An evaluation lies between the writing of the update's scalars and that of its own
    pauses = {event.step: event.wall_time - logged[event.step] for event in events.Scalars("eval/r")}
    paused = 0.0
    trained = {}
    for step in sorted(logged):
        trained[step] = logged[step] - paused - started
        paused += pauses.get(step, 0.0)
    return started, trained


# -------------------- Judging policies --------------------------------------------------------------------------------


def load_policy(script, path):
    """make_policy of the Agent of a script, "ppo_swarm" say, with the weights of a model.pt.

    The three GRPO scripts have the same network: any of them will do, and arguments that it does not know are left out.
    """
    import envs

    module = importlib.import_module(script)
    saved = envs.load(path)
    args = {name: value for name, value in saved["args"].items() if name in module.Args.__dataclass_fields__}
    env_kwargs = dict(args["env_kwargs"])
    if "n_agents" in args:
        env_kwargs["n_agents"] = args["n_agents"]
    world = envs.make_vec(args["env_id"], 1, 0, **env_kwargs)
    agent = module.Agent(module.Args(**args), world)
    world.close()
    agent.load_state_dict(saved["model"])
    return agent.make_policy


def evaluate(make_policy, env_id, num_episodes=EPISODES, seed=None, **env_kwargs):
    """{metric: (num_episodes,)}, on the episodes that the scripts' last table is of, or on those of another seed."""
    import envs

    seed = envs.TEST_SEED if seed is None else seed
    stats, _, _ = envs.evaluate(make_policy, env_id, num_episodes, seed, **env_kwargs)
    return stats


def succeeded(observations):
    """Which landers, by their last observations (n, 8), stand on both legs, at rest, and near the middle of the pad."""
    x, _, speed_x, speed_y, _, _, left, right = observations.T
    return (left + right == 2) & (np.hypot(speed_x, speed_y) < 0.1) & (np.abs(x) < 0.2)


def judge_on_box2d(make_policy, num_episodes=EPISODES):
    """Mean return and share of successes over the first episodes of as many of Gymnasium's own landers."""
    import envs

    world = envs.make_vec("LunarLander-v3", num_episodes)
    policy = make_policy(world)
    returns = np.zeros(num_episodes)
    success = np.zeros(num_episodes, bool)
    running = np.ones(num_episodes, bool)
    observations, infos = world.reset(seed=envs.TEST_SEED)
    while running.any():
        observations, _, _, _, infos = world.step(policy(observations, infos))
        if "episode" in infos:
            ended = running & infos["_episode"]
            returns[ended] = infos["episode"]["r"][ended]
            success[ended] = succeeded(infos["final_obs"])[ended]
            running &= ~ended
    world.close()
    return returns.mean(), success.mean()


def heuristic(observations):
    """gymnasium.envs.box2d.lunar_lander.heuristic, for a whole batch (n, 8)."""
    x, y, vx, vy, angle, spin, left, right = observations.T
    down = (left > 0) | (right > 0)
    turn = (np.clip(0.5 * x + vx, -0.4, 0.4) - angle) * 0.5 - spin
    turn = np.where(down, 0.0, turn)
    climb = (0.55 * np.abs(x) - y) * 0.5 - vy * 0.5
    climb = np.where(down, -0.5 * vy, climb)
    side = np.where(turn < -0.05, 3, np.where(turn > 0.05, 1, 0))
    return np.where((climb > np.abs(turn)) & (climb > 0.05), 2, side)


# -------------------- Measuring ---------------------------------------------------------------------------------------


def take_turns(contestants, rounds):
    """{name: [a measurement of each round]} of {name: function}, one after the other: a busy machine slows them all."""
    measured = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, measure in contestants.items():
            measured[name].append(measure())
    return measured


def agent_steps_per_second(vector, actions, episode, at_least=AGENT_STEPS):
    """Of many agents, over whole episodes of so many steps, with the reset of each in the time."""
    num_envs, n_agents, _ = vector.action_space.shape
    episodes = math.ceil(at_least / (num_envs * n_agents * episode))
    ended = 0  # of the first environment
    start = time.perf_counter()
    for step in range(episodes * episode):
        _, _, terminations, truncations, _ = vector.step(actions[step % len(actions)])
        ended += terminations[0] or truncations[0]
    elapsed = time.perf_counter() - start
    assert ended >= episodes, "the resets have to be in the time"
    return episodes * episode * num_envs * n_agents / elapsed


def step_sizes(env_id, sizes, episode):
    """{name: [agent-steps/s in each round]} of {name: arguments of make_vec}, in one thread; prints their table."""
    import envs

    rng = np.random.default_rng(0)
    contestants = {}
    for name, arguments in sizes.items():
        vector = envs.make_vec(env_id, num_workers=0, max_steps=episode, **arguments)
        space = vector.action_space
        actions = rng.uniform(space.low, space.high, (8, *space.shape)).astype(np.float32)
        vector.reset(seed=0)
        vector.step(actions[0])  # compiles
        vector.reset(seed=0)
        contestants[name] = lambda vector=vector, actions=actions: agent_steps_per_second(vector, actions, episode)
    speeds = take_turns(contestants, STEP_ROUNDS)
    print_head(f"{env_id}, one thread", "M agent-steps/s", "smallest to largest", "us per step")
    for name, values in speeds.items():
        millions = np.divide(values, 1e6)
        agents = sizes[name]["num_envs"] * sizes[name]["n_agents"]
        lowest_to_highest = f"{millions.min():.2f} to {millions.max():.2f}"
        print_row(name, f"{np.median(millions):.2f}", lowest_to_highest, f"{agents / np.median(millions):.1f}")
    print()
    return speeds


# -------------------- Tables ------------------------------------------------------------------------------------------


def print_head(*names):
    """The first two lines of a Markdown table."""
    print_row(*names)
    print("|---" * len(names) + "|", flush=True)


def print_row(*cells):
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def mean_and_interval(values, digits=3):
    """Mean over seeds, and the 95% interval of the mean by bootstrap over them."""
    values = np.asarray(values)
    draws = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def median_and_range(values, digits=1):
    return f"{np.median(values):.{digits}f} ({np.min(values):.{digits}f} to {np.max(values):.{digits}f})"
