"""What environments of other people's do that ours do not: in process, on workers, and on those of a StreamPool."""

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from operator import methodcaller
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest

import envs

ROOT = Path(envs.__file__).parent
HERE = os.getpid()
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes through /proc")


class Strange(gym.Env):
    """Does something strange in its third step, or all the time."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, act=None, dtype="float32"):
        self.act = act
        self.observation_space = gym.spaces.Box(0, 255, (3,), np.dtype(dtype).type)
        self.process = None
        if act == "slow":
            time.sleep(1.0)
        if act in ("process", "program"):
            if act == "program":
                self.process = subprocess.Popen(["sleep", "1000"])
            else:
                context = multiprocessing.get_context("fork")
                self.process = context.Process(target=time.sleep, args=(1000,), daemon=True)
                self.process.start()

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        observation = np.zeros(3, self.observation_space.dtype)
        if self.act == "draw":
            observation[:] = np.random.uniform(), random.random(), np.random.uniform()
        if self.process is not None:
            observation[0] = self.process.pid % 256
            observation[1] = self.process.pid // 256
        return observation, {}

    def step(self, action):
        self.count += 1
        observation = np.zeros(3, self.observation_space.dtype)
        reward = 1.0
        if self.act == "draw":
            observation[:] = np.random.uniform(), random.random(), np.random.uniform()
        if self.count == 3:
            observation, reward = self.do(observation, reward)
        return observation, reward, False, self.count == 5, {}

    def close(self):
        if self.process is not None and os.getpid() == HERE:  # on workers, it forgets to
            self.process.kill()
            self.process.wait() if self.act == "program" else self.process.join()

    def do(self, observation, reward):
        """(observation, reward) of the third step."""
        if self.act == "hang":
            time.sleep(1000)
        if self.act == "signature":
            raise Signature(3, "the wall")
        if self.act == "pickle":
            raise Unpicklable("holds a generator")
        if self.act == "exit":
            sys.exit(3)
        if self.act == "interrupt":
            raise KeyboardInterrupt
        changed = {
            "nan": np.float32([0, np.nan, 0]),
            "infinity": np.float32([0, np.inf, 0]),
            "halves": np.full(3, 0.5),
            "wide": np.full(3, 300),
            "one": np.zeros(1, observation.dtype),
            "row": np.zeros((1, 3), observation.dtype),
            "none": None,
            "double": np.zeros(3),
            "list": [0, 0, 0],
        }
        rewards = {
            "reward nan": np.nan,
            "reward array": np.array([2.0]),
            "reward two": np.zeros(2),
            "reward none": None,
        }
        return changed.get(self.act, observation), rewards.get(self.act, reward)


class Signature(Exception):
    def __init__(self, code, place):
        super().__init__(f"code {code} at {place}")


class Unpicklable(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.held = (i for i in ())


gym.register("Strange-v0", Strange)
gym.register("Limited-v1", Strange, max_episode_steps=100)


@contextlib.contextmanager
def made(num_workers, **kwargs):
    with contextlib.closing(envs.make_vec("Strange-v0", 4, num_workers, **kwargs)) as vector:
        yield vector


def third_step(num_workers, **kwargs):
    with made(num_workers, **kwargs) as vector:
        vector.reset(seed=0)
        for _ in range(3):
            result = vector.step(np.zeros(4, int))
    return result


def fill(kwargs, worker, todo, published):
    """A StreamPool's worker that steps strange environments."""
    with contextlib.closing(envs.make_vec("Strange-v0", 2, 0, **kwargs)) as vector:
        observations, _ = vector.reset(seed=worker)
        for buffer in todo:
            buffer[0] = observations
            for row in buffer[1:]:
                row[...] = vector.step(np.zeros(2, int))[0]
            yield published.version


@contextlib.contextmanager
def stream(**kwargs):
    make_buffer = partial(envs.shared_array, (4, 2, 3), np.float32)
    actors = envs.StreamPool(partial(fill, kwargs), 2, make_buffer, 0, lambda worker, starts: worker)
    try:
        actors.start(np.zeros(1, np.float32), 0)
        yield actors
    finally:
        actors.close()


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def ended(pid):
    """Whether there is no such process, or only what is left for its parent to see."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


# What they observe and earn ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("act", "dtype", "message"),
    [
        ("nan", "float32", r"Strange-v0 \(environment 0\) came to observations of \[ 0. nan  0.\]"),
        ("infinity", "float32", r"\(environment 0\) came to observations of .*inf"),
        ("reward nan", "float32", r"\(environment 0\) came to rewards of nan"),
        ("reward two", "float32", r"\(environment 0\) gave the reward array\(\[0., 0.\]\): it must be one number"),
        ("reward none", "float32", r"gave the reward None"),
        ("halves", "uint8", r"\(environment 0\) observed float64 \(3,\): its space is Box\(0, 255, \(3,\), uint8\)"),
        ("wide", "uint8", r"observed int64 \(3,\): its space is Box\(0, 255, \(3,\), uint8\)"),
        ("one", "float32", r"observed float32 \(1,\): its space is"),
        ("row", "float32", r"observed float32 \(1, 3\): its space is"),
        ("none", "float32", r"observed object \(\): its space is"),
    ],
)
def test_what_does_not_fit_is_named(act, dtype, message, num_workers):
    with pytest.raises(ValueError, match=message):
        third_step(num_workers, act=act, dtype=dtype)


@pytest.mark.parametrize("act", ["double", "list", "reward array"])
def test_what_loses_nothing_is_taken(act):
    observations, rewards, *_ = third_step(0, act=act)
    assert observations.dtype == np.float32 and observations.shape == (4, 3)
    assert (rewards == (2.0 if act == "reward array" else 1.0)).all()
    third_step(0, act="list", dtype="uint8")


@linux
def test_an_actor_names_what_does_not_fit():
    with stream(act="nan") as actors, pytest.raises(RuntimeError, match=r"environment 0\) came to observations of"):
        actors.take(2)


# What they draw ------------------------------------------------------------------------------------------------------


def play(num_workers, seed):
    with made(num_workers, act="draw", dtype="float64") as vector:
        first, _ = vector.reset(seed=seed)
        return np.stack([first] + [vector.step(np.zeros(4, int))[0] for _ in range(7)])


@pytest.mark.parametrize("num_workers", [0, 2, 4])
def test_draws_from_global_generators_depend_on_the_seed_and_differ_between_environments(num_workers):
    seen = play(num_workers, 1)
    assert np.array_equal(seen, play(num_workers, 1))
    assert not np.isin(seen, play(num_workers, 2)).any()
    assert len(np.unique(seen)) == seen.size
    assert np.array_equal(seen[0], play(0, 1)[0])  # the first episodes' starts, for any number of workers


@pytest.mark.parametrize("num_workers", [0, 4])
def test_identical_starts_hold_for_global_generators(num_workers):
    with made(num_workers, act="draw", dtype="float64") as vector:
        first, _ = vector.reset(seed=1, options={"identical": 2})
        assert (first[0] == first[1]).all() and (first[2] == first[3]).all() and not (first[0] == first[2]).any()
        later = vector.step(np.zeros(4, int))[0]
        assert len(np.unique(later)) == later.size


def test_the_callers_generators_go_on_where_they_were():
    np.random.seed(5)
    random.seed(5)
    expected = [np.random.uniform(), random.random(), np.random.uniform(), random.random()]
    np.random.seed(5)
    random.seed(5)
    seen = [np.random.uniform(), random.random()]
    for num_workers in (0, 2):
        with made(num_workers, act="draw") as vector:
            vector.reset(seed=1)
            vector.step(np.zeros(4, int))
    with contextlib.closing(envs.make_vec("VmasNavigation", 2, 0)) as native:
        native.reset(seed=1)
    assert [*seen, np.random.uniform(), random.random()] == expected


@linux
def test_actors_draw_numbers_of_their_own():
    with stream(act="draw") as actors:
        first, second = (buffer.copy() for buffer in actors.take(2)[1])
    assert not np.isin(first[first > 0], second).any()


# What they raise, and when they hang ---------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("signature", "Signature: code 3 at the wall"),
        ("pickle", "Unpicklable: holds a generator"),
        ("exit", "SystemExit: 3"),
        ("interrupt", "KeyboardInterrupt"),
    ],
)
def test_any_exception_on_a_worker_is_named_with_its_traceback(act, message):
    with pytest.raises(RuntimeError, match=message) as caught:
        third_step(2, act=act)
    assert "in do" in str(caught.value.__cause__)
    with stream(act=act) as actors, pytest.raises(RuntimeError, match=message):
        actors.take(2)


@linux
def test_a_caller_that_waits_for_long_says_for_whom(monkeypatch, capsys):
    monkeypatch.setattr(envs, "PATIENCE_SECONDS", 0.1)
    with made(2, act="slow"):
        assert capsys.readouterr().out.count("waiting for worker ") == 1
    with stream(act="slow") as actors:
        actors.take(2)
        assert capsys.readouterr().out.count("waiting for workers [0, 1], since") == 1


@linux
def test_a_stream_that_hangs_can_be_stopped():
    with stream(act="hang") as actors:
        start = time.monotonic()
        run = SimpleNamespace(signals=[], write_checkpoint=lambda: written.append(time.monotonic() - start))
        written = []
        threading.Timer(0.5, lambda: run.signals.append(time.monotonic())).start()
        with pytest.raises(RuntimeError, match=r"stopped while waiting for workers \[0, 1\], since"):
            actors.take(2, run)
        assert len(written) == 1 and written[0] < time.monotonic() - start < 10


# What they start -----------------------------------------------------------------------------------------------------


def started(observations):
    return [int(row[0]) + 256 * int(row[1]) for row in observations]


@linux
@pytest.mark.parametrize("act", ["process", "program"])
@pytest.mark.parametrize("ending", ["close", "worker killed", "exception"])
def test_processes_of_an_environments_end_with_its_worker(act, ending):
    with made(2, act=act, dtype="int64") as vector:
        pids = started(vector.reset(seed=0)[0])
        assert len(set(pids)) == 4 and not any(map(ended, pids))
        if ending == "worker killed":
            for pid in vector.shared.pids.tolist():
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(RuntimeError, match="died"):
                vector.step(np.zeros(4, int))
        elif ending == "exception":
            with pytest.raises(AttributeError, match="no_such_method"):
                vector._tell(envs.CALL, [methodcaller("no_such_method")] * 2)
    assert wait_until(lambda: all(map(ended, pids)))


@linux
@pytest.mark.parametrize("act", ["process", "program"])
def test_processes_of_an_actors_environments_end_with_it(act):
    with stream(act=act) as actors:
        before = [pid for buffer in actors.take(2)[1] for pid in started(buffer[0])]
        actors.processes[0].kill()
        actors.release()
        after = [pid for buffer in actors.take(2)[1] for pid in started(buffer[0])]
        assert len(set(before)) == 4 and not any(map(ended, after[2:]))
    assert wait_until(lambda: all(map(ended, before + after)))


@linux
@pytest.mark.parametrize("kind", ["pool", "stream"])
def test_processes_of_environments_end_when_the_caller_is_killed(kind):
    text = f"""
import sys, time
sys.path.insert(0, "tests")
import numpy as np
import test_strangers as strangers
if {kind == "pool"}:
    vector = strangers.envs.make_vec("Strange-v0", 4, 2, act="program", dtype="int64")
    pids = strangers.started(vector.reset(seed=0)[0])
else:
    actors = strangers.stream(act="program")
    pids = [pid for buffer in actors.__enter__().take(2)[1] for pid in strangers.started(buffer[0])]
print(*pids, flush=True)
time.sleep(1000)
"""
    caller = subprocess.Popen([sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in caller.stdout.readline().split()]
    assert len(set(pids)) == 4 and not any(map(ended, pids))
    caller.kill()
    caller.wait()
    caller.stdout.close()
    assert wait_until(lambda: all(map(ended, pids)))


@linux
def test_streams_leave_no_descriptor_and_no_shared_memory():
    def held():
        shared = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/zero" in line]
        return len(os.listdir("/proc/self/fd")), len(shared)

    for closes in range(4):
        with stream() as actors:
            actors.take(2)
        del actors
        if closes == 0:
            before = held()
    assert held() == before


# Where they are run --------------------------------------------------------------------------------------------------


def in_daemon():
    default = envs.make_vec("Strange-v0", 4)
    default.close()
    try:
        envs.make_vec("Strange-v0", 4, 2)
    except ValueError as error:
        return isinstance(default, envs.GymnasiumVectorEnv), str(error)


@linux
def test_a_daemonic_process_steps_by_itself_and_says_why():
    with multiprocessing.get_context("fork").Pool(1) as pool:
        in_process, error = pool.apply(in_daemon)
    assert in_process and "workers are 2: this process is daemonic" in error


@pytest.mark.parametrize(
    ("files", "cores"),
    [({}, 8), ({"max": "max 100000\n"}, 8), ({"max": "150000 100000\n"}, 2), ({"q": "-1\n", "p": "100000\n"}, 8),
     ({"q": "50000\n", "p": "100000\n"}, 1)],
)  # fmt: skip
def test_cores_are_counted_as_the_container_grants_them(files, cores, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    quotas = [(tmp_path / "max", tmp_path / "max"), (tmp_path / "q", tmp_path / "p")]
    monkeypatch.setattr(envs, "CORE_QUOTAS", quotas)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert envs.count_cores() == cores


def test_an_id_needs_no_version():
    with contextlib.closing(envs.make_vec("CartPole", 2, 0)) as vector:
        assert vector.spec.id == "CartPole-v1"
    with contextlib.closing(envs.make_vec("test_strangers:Limited", 2, 0)) as vector:
        assert vector.spec.id == "Limited-v1"


SPACES = {
    "point": gym.spaces.Box(np.float32([-1, 2]), np.float32([1, 2])),
    "huge": gym.spaces.Box(-3e38, 3e38, (2,)),
}


class Acting(Strange):
    def __init__(self, space):
        super().__init__()
        self.action_space = SPACES[space]


gym.register("Acting-v0", Acting)


@pytest.mark.parametrize("space", SPACES)
def test_actions_without_a_range_are_refused_at_the_start(space):
    args = SimpleNamespace(env_id="Acting-v0", eval_env_id="Acting-v0", eval_env_kwargs={"space": space})
    message = "env_id is 'Acting-v0': low < high must hold in every action"
    vector = envs.make_vec("Acting-v0", 2, 0, space=space)
    with contextlib.closing(vector), pytest.raises(ValueError, match=message):
        envs.check_spaces(args, vector)


@pytest.mark.parametrize("space", SPACES)
def test_nor_may_a_native_environment_have_such_actions(space):
    with pytest.raises(ValueError, match="NativeVectorEnv: low < high must hold in every action"):
        envs.NativeVectorEnv(2, gym.spaces.Box(-1.0, 1.0, (1, 3), np.float32), SPACES[space])


@pytest.mark.parametrize("env_id", ["Strange-v0", "Limited-v1"])
def test_a_missing_time_limit_is_said_at_the_start(env_id, capsys):
    args = SimpleNamespace(env_id=env_id, eval_env_id=env_id, eval_env_kwargs={})
    with contextlib.closing(envs.make_vec(env_id, 2, 0)) as vector:
        envs.check_spaces(args, vector)
    assert capsys.readouterr().out.count("registered without a time limit") == (env_id == "Strange-v0")


def test_actors_do_not_say_it_again(capsys):
    args = SimpleNamespace(env_id="Strange-v0", eval_env_id="Strange-v0", eval_env_kwargs={}, train_kwargs={})
    for checked, times in ((False, 1), (True, 0)):
        envs.make_all(args, 2, 0, {}, checked=checked).close()
        assert capsys.readouterr().out.count("registered without a time limit") == times


@pytest.mark.parametrize("env_id", ["Strange-v0", "LunarLander", "test_strangers:Strange-v0", "Nothing"])
def test_a_script_for_swarms_says_who_trains_a_single_agent(env_id):
    args = SimpleNamespace(env_id=env_id, n_agents=10, train_kwargs={})
    with pytest.raises(ValueError, match=rf"env_id is '{env_id}': .*Swarm.* as 'module:id'; async_ppo.py trains one"):
        envs.make_all(args, 2, 0, {"n_agents": 10})


@pytest.mark.parametrize("module", ["no_such_module", "pathlib.nothing", ".relative"])
def test_a_module_that_cannot_be_imported_is_named(module):
    with pytest.raises(ValueError, match=rf"env_id is '{module}:Id': {module} must be a module to import"):
        envs.make_vec(f"{module}:Id", 1)


REFUSED = {
    "policy": dict(policy="gnn", env_id="LidarNavigation"),
    "observations": dict(policy="mlp", env_id="LidarNavigation", train_kwargs=dict(n_neighbors="0,4")),
    "argument": dict(policy="mlp", env_id="Swarm", train_kwargs=dict(max_steps="9,-1")),
    "spaces": dict(env_id="Swarm", eval_env_id="LunarLander", eval_env_kwargs={}),
}


@pytest.mark.parametrize("given", REFUSED.values(), ids=REFUSED)
def test_what_was_made_of_environments_that_are_refused_is_closed(monkeypatch, given):
    made = []
    make_vec = envs.make_vec

    def kept(*args, **kwargs):
        made.append(make_vec(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(envs, "make_vec", kept)
    with pytest.raises(ValueError, match="must"):
        envs.make_all(SimpleNamespace(**{"train_kwargs": {}} | given), 2, 0, {})
    assert made and all(vector.closed for vector in made)


# The kernels' files --------------------------------------------------------------------------------------------------

KERNEL = """
import sys
sys.path.insert(0, {root!r})
import envs
@envs.kernel
def twice(x):
    return 2 * x
assert twice(3) == 6
"""


def run(folder, cache):
    (folder / "twice.py").write_text(KERNEL.format(root=str(ROOT)))
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-W", "always", str(folder / "twice.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr


def test_a_damaged_file_of_a_kernel_costs_only_its_compilation(tmp_path):
    cache = tmp_path / "cache"
    assert "damaged" not in run(tmp_path, cache)
    for damage in (lambda data: b"", lambda data: data[: len(data) // 2], lambda data: bytes(len(data))):
        for kind in ("nbi", "nbc"):
            (file,) = cache.rglob(f"*.{kind}")
            whole = file.read_bytes()
            file.write_bytes(damage(whole))
            assert "compiled anew, because of a damaged file" in run(tmp_path, cache)
            (file,) = cache.rglob(f"*.{kind}")
            assert len(file.read_bytes()) == len(whole) and any(file.read_bytes())
    assert "damaged" not in run(tmp_path, cache)


def test_without_a_place_kernels_are_compiled_and_nothing_ends(monkeypatch):
    def nowhere(self, function):
        raise RuntimeError("no locator available")

    monkeypatch.setattr(envs.KernelCache, "__init__", nowhere)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        kernels = [envs.kernel(function) for function in (lambda x: x + 1, lambda x: x + 2)]
    assert [kernel(1) for kernel in kernels] == [2, 3]
    assert ["NUMBA_CACHE_DIR" in str(warning.message) for warning in caught] == [True]
