"""What the tests of the scripts have in common: how to start runs, look into them, and read what they leave behind.

Runs are real: the script itself, in a folder of its own, with a small budget. Most are forked from one process that has
already imported everything (`Nest`, one for all tests of a session), because importing torch would take most of the
time; some are started as a user starts them (`launch`, `torchrun`). A probe is a few lines that are executed before the
script, to look at what it does from inside without changing a line of it.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import AffineTransform, Normal, TanhTransform, TransformedDistribution

import envs

ROOT = Path(envs.__file__).parent
SCRIPT = ROOT / "ppo_swarm.py"  # that runs are of, where nothing else is said
PATIENCE = 120  # seconds after which a run counts as hung
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

POLICIES = ("mlp", "gnn", "attention")
NUM_ENVS, N_AGENTS, NUM_STEPS, NUM_UPDATES = 8, 4, 32, 24
PER_UPDATE = NUM_ENVS * N_AGENTS * NUM_STEPS  # agent-steps
SMALL = dict(
    num_envs=NUM_ENVS,
    n_agents=N_AGENTS,
    num_steps=NUM_STEPS,
    total_timesteps=NUM_UPDATES * PER_UPDATE,
    eval_episodes=4,
    eval_every=4 * PER_UPDATE,
    checkpoint_every=3 * PER_UPDATE,
    env_kwargs=dict(max_steps=50),  # so that episodes end in the middle of rollouts
)
BRIEF = SMALL | dict(total_timesteps=4 * PER_UPDATE, num_minibatches=2, update_epochs=1, eval_episodes=2)


# ----------------------------------------------------------------------------------------------------------------------
# Starting
# ----------------------------------------------------------------------------------------------------------------------


def flags(**args):
    """Command-line flags, as in flags(n_agents=4, share_policy=False)."""
    words = []
    for name, value in args.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, dict):
            words += [f"--{option}", *(str(word) for pair in value.items() for word in pair)]
        else:
            words += [f"--{option}", str(value)]
    return words


class Finished:
    """What a run left behind."""

    def __init__(self, code, output, cwd):
        self.code, self.output, self.cwd = code, output, cwd

    @property
    def folder(self):
        assert len(folders(self.cwd)) == 1, f"one folder expected, not {folders(self.cwd)}\n{self.output}"
        return folders(self.cwd)[0]


class Running:
    """A run in a session of its own, as a terminal would start it. `process` is a Popen, or a Forked."""

    def __init__(self, cwd, process, log):
        self.cwd, self.process, self.log = cwd, process, log

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def output(self):
        return self.log.read_text(errors="replace")

    def wait_until(self, condition, what):
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"the run ended before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {what} in {PATIENCE} s:\n{self.output}"
            time.sleep(0.002)

    def wait_for(self, pattern):
        """Until a path that matches, inside runs/, exists; returns it."""
        self.wait_until(lambda: any((self.cwd / "runs").glob(pattern)), pattern)
        return next((self.cwd / "runs").glob(pattern))

    def kill(self, number):
        """To the whole group, as Ctrl-C in a terminal does."""
        os.killpg(self.process.pid, number)

    def finish(self):
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {PATIENCE} s:\n{self.output}")
        return Finished(code, self.output, self.cwd)


def new_log(cwd):
    return cwd / f"output-{time.monotonic_ns()}.txt"


def launch(cwd, args, command=(sys.executable, str(SCRIPT)), **popen):
    """Start a run as a user does."""
    path = new_log(cwd)
    with open(path, "wb") as log:
        process = subprocess.Popen(
            [*command, *flags(**args)],
            cwd=cwd,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **popen,
        )
    return Running(cwd, process, path)


NEST = """
import gc, json, os, runpy, signal, sys, time
import matplotlib.backends.backend_agg, matplotlib.figure, moviepy, pygame, torch, torch.utils.tensorboard
import envs, ppo_swarm

torch.use_deterministic_algorithms(True)  # imports half of torch
loaded, codes, child = set(), {}, None

def load(env_ids):
    for env_id in set(env_ids) - loaded:
        env = envs.make_vec(env_id, 1, num_workers=0)  # loads the kernels
        env.reset(seed=0)
        env.step(env.action_space.sample())
        loaded.add(env_id)
        gc.freeze()  # or every child looks through all of torch once more before it ends

def fork(job):
    global child
    pid = os.fork()
    codes.pop(pid, None)  # of one that had this number before
    if pid == 0:
        child = job
        if job["session"]:
            os.setsid()
    while pid and job["session"] and os.getpgid(pid) != pid:
        time.sleep(1e-4)  # or a signal to its group would find none
    return pid

def reap(options):
    pid, status = os.waitpid(-1, options)
    if pid:
        codes[pid] = os.waitstatus_to_exitcode(status)

def answer(request):
    load(request["env_ids"])
    if "start" in request:
        return fork(request["start"])
    if "poll" in request:
        if request["poll"] not in codes:
            reap(os.WNOHANG)
        return codes.get(request["poll"])
    waiting, pids = request["run"], []
    while waiting or not codes.keys() >= set(pids):
        if waiting and len(set(pids) - codes.keys()) < 2:
            pids.append(fork(waiting.pop(0)))
            if child:
                return None
        else:
            reap(0)
    return [codes[pid] for pid in pids]

while child is None and (line := sys.stdin.readline()):
    reply = answer(json.loads(line))
    if child is None:
        print(json.dumps(reply), flush=True)
if child:
    log = os.open(child["log"], os.O_WRONLY | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(log, 1), os.dup2(log, 2)
    signal.alarm(child["patience"])
    if not child["pictures"]:
        envs._film = lambda entries, captions, env_id, seed, path, env_kwargs: open(path, "wb").close()
    os.chdir(child["cwd"])
    os.environ |= child["environment"]
    sys.argv = [child["file"], *child["flags"]]
    runpy.run_path(child["file"], run_name="__main__")
"""


class Nest:
    """The process that runs are forked from. It starts when it is first asked for something."""

    def __init__(self):
        self.process = None

    def ask(self, env_ids=(), **request):
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", NEST], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        self.process.stdin.write(json.dumps(request | dict(env_ids=env_ids)) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        if self.process:
            self.process.stdin.close()
            self.process.wait(PATIENCE)


class Forked:
    """A child of the nest's, with the methods of Popen that are needed here."""

    def __init__(self, nest, pid):
        self.nest, self.pid = nest, pid

    def poll(self):
        return self.nest.ask(poll=self.pid)

    def wait(self, timeout=PATIENCE):
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.005)
        return code


class Nursery:
    """Runs of one module of tests: of `script`, where nothing else is said, in `env_ids`."""

    def __init__(self, nest, folder, env_ids=("Swarm",), script=SCRIPT):
        self.nest, self.folder, self.env_ids, self.script, self.count = nest, folder, env_ids, script, 0

    def job(self, cwd, args, log=None, probe=None, script=None, pictures=False, session=False, environment=None):
        """`probe` is source executed before the script.

        Videos take longer than the rest of many a run: without `pictures` they are empty files.
        """
        self.count += 1
        cwd.mkdir(parents=True, exist_ok=True)
        script = script or self.script
        file = with_probe(probe, self.folder / f"probe-{self.count}.py", script) if probe else script
        log = log or self.folder / f"output-{self.count}.txt"
        job = dict(cwd=str(cwd), file=str(file), flags=flags(**args), log=str(log), environment=environment or {})
        return job | dict(pictures=pictures, session=session, patience=PATIENCE)

    def run(self, *jobs, **options):
        """Each job is (cwd, args); two at a time. Returns a Finished for each."""
        return self.finish([self.job(cwd, args, **options) for cwd, args in jobs])

    def run_one(self, cwd, probe=None, script=None, pictures=False, **args):
        return self.run((cwd, args), probe=probe, script=script, pictures=pictures)[0]

    def run_ranks(self, cwd, args, **options):
        """Two processes that think that torchrun has started them; a Finished for each."""
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        place = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        return self.finish(
            [
                self.job(cwd, args, environment=place | dict(RANK=str(rank), LOCAL_RANK=str(rank)), **options)
                for rank in range(2)
            ]
        )

    def finish(self, jobs):
        codes = self.nest.ask(self.env_ids, run=jobs)
        return [
            Finished(code, Path(job["log"]).read_text(errors="replace"), Path(job["cwd"]))
            for code, job in zip(codes, jobs, strict=True)
        ]

    def start(self, cwd, args, **options):
        """A run to watch, signal and kill."""
        log = new_log(cwd)
        job = self.job(cwd, args, log=log, session=True, **options)
        return Running(cwd, Forked(self.nest, self.nest.ask(self.env_ids, start=job)), log)


def nursery_of(*env_ids, script=SCRIPT):
    """A fixture: the nursery of a module."""

    @pytest.fixture(scope="module")
    def nursery(nest, tmp_path_factory):
        return Nursery(nest, tmp_path_factory.mktemp("nursery"), env_ids, script)

    return nursery


def with_probe(probe, path, script=SCRIPT):
    path.write_text(f"import runpy\n{probe}\nrunpy.run_path({str(script)!r}, run_name='__main__')\n")
    return path


def copy_alone(script, folder):
    """A script and envs.py into an empty folder. Compiled kernels come along: compiling takes as long as many tests."""
    (folder / "__pycache__").mkdir()
    for file in (script, ROOT / "envs.py", *ROOT.glob("__pycache__/envs.*.nb[ic]")):
        shutil.copy2(file, folder / file.relative_to(ROOT))


def torchrun(cwd, args, probe, script=SCRIPT):
    file = with_probe(probe, cwd / "launch.py", script)
    return launch(
        cwd,
        args,
        (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(file)),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Processes
# ----------------------------------------------------------------------------------------------------------------------


def children(pid):
    """Of a process: those that are not dead, in the order of their start."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):  # the second: it ended between the open and the read
        return []
    return [int(child) for child in found if alive(int(child))]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):  # the second: it ended between the open and the read
        return False


def assert_soon_gone(pids, seconds=5.0):
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, f"still alive: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.01)


# ----------------------------------------------------------------------------------------------------------------------
# What runs leave behind
# ----------------------------------------------------------------------------------------------------------------------


def folders(cwd):
    return sorted(path for path in (cwd / "runs").glob("*") if path.is_dir())


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def saved(path):
    return torch.load(path, weights_only=True)


def curves(folder):
    """{tag: [(step, value), ...]} of all event files of a run."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def reproducible(curves):
    """All curves but those that measure time."""
    return {tag: points for tag, points in curves.items() if not re.search("SPS|_seconds|_share", tag)}


def table(output):
    """{policy: cells} of the printed comparison."""
    rows = [line.strip("| ").split("|") for line in output.splitlines() if line.startswith("| ")]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}


def error_of(output):
    """The message of the exception that ended a run."""
    lines = output.splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r"[A-Za-z_.]*(Error|Exception)\b", line)]
    return "\n".join(lines[starts[-1] :]) if starts else ""


def replaced(folder, times):
    """A condition: checkpoint.pt has been written anew so many times since the first look."""
    seen = []

    def look():
        path = folder / "checkpoint.pt"
        number = path.stat().st_mtime_ns if path.exists() else None
        if number is not None and number not in seen:
            seen.append(number)
        return len(seen) > times

    return look


def assert_same_weights(a, b):
    a, b = saved(a)["model"], saved(b)["model"]
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs by up to {(a[name] - b[name]).abs().max()}"


def assert_other_weights(a, b):
    a, b = saved(a)["model"], saved(b)["model"]
    assert not any(torch.equal(a[name], b[name]) for name in a if name.endswith("weight"))


def assert_same_curves(a, b):
    """Point for point: none lost, none twice."""
    a, b = reproducible(curves(a)), reproducible(curves(b))
    assert a.keys() == b.keys()
    for tag in a:
        assert a[tag] == b[tag], tag


# ----------------------------------------------------------------------------------------------------------------------
# Probes
# ----------------------------------------------------------------------------------------------------------------------

RATIOS = """
import atexit, json, torch
ratios, clamp = [], torch.Tensor.clamp

def recorded(self, *bounds, **named):
    if len(bounds) == 2:  # ratio.clamp(1 - clip_coef, 1 + clip_coef)
        ratios.append(float((self.detach() - 1).abs().max()))
    if len(ratios) == 12 * 8:
        raise SystemExit
    return clamp(self, *bounds, **named)

torch.Tensor.clamp = recorded
atexit.register(lambda: json.dump(ratios, open("ratios.json", "w")))
"""
RANKS = """
import hashlib, os, torch, torch.distributed as dist, envs
rank, trace = os.environ["RANK"], {"weights": [], "observations": []}
adam_step, all_reduce, make_vec = torch.optim.Adam.step, dist.all_reduce, envs.make_vec

def hashed(array):
    return hashlib.sha256(array.tobytes()).hexdigest()

def step(self, *args, **kwargs):
    parameters = [parameter for group in self.param_groups for parameter in group["params"]]
    if not trace["weights"]:
        trace["seed"] = torch.initial_seed() % 2**32  # all that torch's generator on the CPU reads of it
        trace["used"] = torch.cat([parameter.grad.flatten() for parameter in parameters])
    result = adam_step(self, *args, **kwargs)
    trace["weights"].append(hashed(torch.cat([p.detach().flatten() for p in parameters]).numpy()))
    torch.save(trace, f"trace-{rank}.pt")
    return result

def reduce(tensor, *args, **kwargs):
    if tensor.numel() > 100 and "own" not in trace:
        trace["own"] = tensor.clone()
    return all_reduce(tensor, *args, **kwargs)

def make(*args, **kwargs):
    made = make_vec(*args, **kwargs)
    reset, step = made.reset, made.step
    def watched_reset(**kwargs):
        result = reset(**kwargs)
        trace["observations"].append(hashed(result[0]))
        return result
    def watched_step(actions):
        result = step(actions)
        trace["observations"].append(hashed(result[0]))
        return result
    made.reset, made.step = watched_reset, watched_step
    envs.make_vec = make_vec
    return made

torch.optim.Adam.step, dist.all_reduce, envs.make_vec = step, reduce, make
"""


# ----------------------------------------------------------------------------------------------------------------------
# The squashed normal, by torch.distributions
# ----------------------------------------------------------------------------------------------------------------------

LOW, HIGH = torch.tensor([-3.0, 0.5], dtype=torch.float64), torch.tensor([3.0, 0.75], dtype=torch.float64)


def parameters(dtype=torch.float64, shape=(5, 3, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean, logstd = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return mean.to(dtype).requires_grad_(), (0.5 * logstd - 1).to(dtype).requires_grad_()


def reference_log_prob(mean, logstd, u):
    """By torch.distributions; the cached inverse keeps u as it is."""
    affine = AffineTransform((HIGH + LOW) / 2, (HIGH - LOW) / 2, cache_size=1)
    transforms = [TanhTransform(cache_size=1), affine]
    squashed = TransformedDistribution(Normal(mean, logstd.exp()), transforms)
    action = transforms[1](transforms[0](u))
    return squashed.log_prob(action).sum(-1)


def entropy_by_integration(mean, logstd, low, high, points=200_001):
    """-p log p of one action, summed over its interval; p by torch.distributions."""
    y = torch.linspace(low, high, points, dtype=torch.float64)[1:-1]
    transforms = [TanhTransform(), AffineTransform((high + low) / 2, (high - low) / 2)]
    log_p = TransformedDistribution(Normal(mean, logstd.exp()), transforms).log_prob(y)
    return -(log_p.exp() * log_p).sum() * (high - low) / (points - 1)


# ----------------------------------------------------------------------------------------------------------------------
# Inputs of networks
# ----------------------------------------------------------------------------------------------------------------------

FEATURES, OWN = envs.NEIGHBOR_FEATURES, 3


def crowd(batch=2, n_agents=7, n_neighbors=3, presence=0.7, seed=0):
    """Random observations and neighbours, in float64; nobody is its own neighbour."""
    rng = np.random.default_rng(seed)
    obs = rng.normal(size=(batch, n_agents, n_neighbors * FEATURES + OWN))
    obs[..., FEATURES - 1 : n_neighbors * FEATURES : FEATURES] = rng.random((batch, n_agents, n_neighbors)) < presence
    neighbors = np.zeros((batch, n_agents, n_neighbors), np.int64)
    for b in range(batch):
        for i in range(n_agents):
            neighbors[b, i] = rng.choice(np.delete(np.arange(n_agents), i), n_neighbors, replace=False)
    return torch.tensor(obs), torch.tensor(neighbors)


class Spaces:
    """All that Agent wants to know of an environment."""

    def __init__(self, n_agents, obs_dim, unseen_dim=0):
        self.unseen_dim = unseen_dim
        self.single_observation_space = envs.gym.spaces.Box(-1, 1, (n_agents, obs_dim), np.float32)
        self.single_action_space = envs.gym.spaces.Box(-2, 2, (n_agents, 1), np.float32)
