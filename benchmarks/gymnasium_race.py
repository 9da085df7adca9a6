"""async_ppo.py beside CleanRL's and Stable-Baselines3's PPO on MuJoCo: steps a second, time to a peer's final return.

    pip install "gymnasium[mujoco]" stable-baselines3==2.9.2
    python benchmarks/gymnasium_race.py CLEANRL/cleanrl/ppo_continuous_action.py [--env-ids Hopper-v5] [--seeds 1 2]

From the repository's root, on a quiet machine with two cores, 20 minutes for HalfCheetah, 30 for Hopper. In turn, seed
after seed: ours trains for the suite's 1 M steps, with one actor, which stands still while, every 50,000 steps, 20
held-out episodes are played, greedy and sampled; these are in nobody's time. SB3, with the settings of its zoo, and
CleanRL's file as of commit 35896b1f (with one argument more, which Gymnasium 1.4 wants) train for 50,000 steps.

Printed: steps per second; and the seconds of training until ours is as good as the return that was published for the
end of a peer's 1 M steps, beside those in which the peer would make these, at its rate. Ours has arrived with the first
evaluation that is as good, of the greedy policy beside the zoo, of the sampled one beside CleanRL, whose returns are
those of training episodes. A peer may have been as good before its end, and its published returns are of older versions
of the environments. Every process has one torch thread; ours are two processes, a peer is one.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import tyro
from common import first_reaching, median_and_range, print_head, print_row, read_events, run_script, training_seconds
from gymnasium_suite import WORLDS

STEPS = 1_000_000
PEER_STEPS = 50_000
EVALUATIONS = "--eval-every 50000 --eval-episodes 20"
ZOO = {  # rl-baselines3-zoo, hyperparams/ppo.yml, for the versions 3 of these
    "HalfCheetah-v5": dict(
        batch_size=64, n_steps=512, gamma=0.98, learning_rate=2.0633e-05, ent_coef=0.000401762, clip_range=0.1,
        n_epochs=20, gae_lambda=0.92, max_grad_norm=0.8, vf_coef=0.58096,
    ),
    "Hopper-v5": dict(
        batch_size=32, n_steps=512, gamma=0.999, learning_rate=9.80828e-05, ent_coef=0.00229519, clip_range=0.2,
        n_epochs=5, gae_lambda=0.99, max_grad_norm=0.7, vf_coef=0.835671,
    ),
}  # fmt: skip


@dataclass
class Options:
    cleanrl: tyro.conf.Positional[Path]  # CleanRL's ppo_continuous_action.py
    env_ids: tuple[Literal[tuple(ZOO)], ...] = tuple(ZOO)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)


def sb3(env_id, seed):
    """Steps per second of Stable-Baselines3's PPO, in this process."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    settings = ZOO[env_id]
    network = dict(
        log_std_init=-2, ortho_init=False, activation_fn=torch.nn.ReLU, net_arch=dict(pi=[256, 256], vf=[256, 256])
    )
    env = VecNormalize(make_vec_env(env_id, seed=seed), gamma=settings["gamma"])
    model = PPO("MlpPolicy", env, policy_kwargs=network, seed=seed, device="cpu", **settings)
    start = time.time()
    model.learn(PEER_STEPS)
    return model.num_timesteps / (time.time() - start)


def run_python(*arguments, folder):
    """What it prints, with one torch thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment).stdout


def rate_of_sb3(env_id, seed):
    code = f"import gymnasium_race; print(gymnasium_race.sb3({env_id!r}, {seed}))"
    return float(run_python("-c", code, folder=Path(__file__).parent).split()[-1])


def rate_of_cleanrl(path, env_id, seed):
    """Steps per second that CleanRL's script prints last."""
    source = path.read_text()
    before = "lambda obs: np.clip(obs, -10, 10))"
    if before not in source:
        raise SystemExit(f"{path} is not CleanRL's PPO for continuous actions as of commit 35896b1f")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "peer.py"
        script.write_text(source.replace(before, "lambda obs: np.clip(obs, -10, 10), env.observation_space)"))
        flags = f"--env-id {env_id} --seed {seed} --no-cuda --total-timesteps {PEER_STEPS}"
        output = run_python(script.name, *flags.split(), folder=folder)
    return float(re.findall(r"SPS: (\d+)", output)[-1])


def flags_of(env_id):
    return f"--num-actors 1 {WORLDS[env_id].flags}"


def ours(env_id, seed):
    """The events of async_ppo.py, whose actor stands still during its evaluations."""
    flags = f"--env-id {env_id} --seed {seed} {flags_of(env_id)} --total-timesteps {STEPS} {EVALUATIONS}"
    with tempfile.TemporaryDirectory() as folder:
        return read_events(run_script("benchmarks/async_paused.py", flags, folder))


def main(options):
    peers = {  # what measures a peer's steps per second, and the curve of ours that is held against its return
        "CleanRL": (partial(rate_of_cleanrl, options.cleanrl), "eval/sampled_r"),
        "rl-zoo": (rate_of_sb3, "eval/r"),
    }
    for env_id in options.env_ids:
        print(f"ours, {env_id}: {flags_of(env_id)}")
    print()
    print_head("environment", "seed", "who", "steps/s", "return after 1 M steps", "seconds", "seconds of ours")
    rates = {}  # {(environment, peer): [rate of ours over the peer's]}
    sooner = {}  # {(environment, peer): [seconds of the peer over those of ours, where ours arrived]}
    for env_id, seed in product(options.env_ids, options.seeds):
        events = ours(env_id, seed)
        _, seconds = training_seconds(events)
        last = max(seconds)
        our_rate = last / seconds[last]
        end = events.Scalars("eval/r")[-1].value
        print_row(env_id, seed, "ours", f"{our_rate:.0f}", f"{end:.0f}", f"{seconds[last]:.0f}", "")
        for peer, (measure, tag) in peers.items():
            rate = measure(env_id, seed)
            target = WORLDS[env_id].published[peer]
            hit = first_reaching(events, tag, target)
            rates.setdefault((env_id, peer), []).append(our_rate / rate)
            sooner.setdefault((env_id, peer), [])
            if hit:
                sooner[env_id, peer].append(STEPS / rate / seconds[hit.step])
            arrived = f"{seconds[hit.step]:.0f}" if hit else "never"
            print_row(env_id, seed, peer, f"{rate:.0f}", target, f"{STEPS / rate:.0f}", arrived)
    for (env_id, peer), factors in sooner.items():
        print(f"\n{env_id}, {peer}: {median_and_range(rates[env_id, peer])} times as many steps in a second")
        print(f"arrived with {len(factors)} of {len(options.seeds)} seeds", end="")
        print(f", sooner by a factor of {median_and_range(factors)}" if factors else "")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
