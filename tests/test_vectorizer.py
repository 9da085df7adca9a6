"""What `make_vec` guarantees about workers: the same answers with any number of them, errors instead of hangs, and no
process left behind. With native environments the answers are tested in test_native_envs.py."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest

import envs

ROOT = Path(envs.__file__).parent
SWARM = dict(n_agents=4, max_steps=13, noise=0.3, n_obstacles=1, box_size=6.0)
DEADLINE = 5.0  # seconds in which a dead worker has to be noticed
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes through /proc")


class Scripted(gym.Env):
    """A Gymnasium environment that does as it is told in its third step."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, act=None, dtype="float64", space=None, render_mode=None):
        self.act, self.render_mode = act, render_mode
        self.observation_space = gym.spaces.Box(0, 255, (2,), np.dtype(dtype).type)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (3,), np.float32) if space is None else space

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.kept = 0, None
        return np.full(2, 7 if options is None else options["value"], self.observation_space.dtype), {}

    def step(self, action):
        self.count += 1
        reward = 0.0
        if self.act == "keep":
            reward = 0.0 if self.kept is None else float(np.sum(action) - np.sum(self.kept))
            self.kept = action
        elif self.count == 3 and self.act == "raise":
            self.fall_off()
        elif self.count == 3 and self.act == "exit":
            os._exit(3)
        elif self.count == 3 and self.act == "sleep":
            time.sleep(30)
        return np.full(2, self.count, self.observation_space.dtype), reward, False, False, {}

    def fall_off(self):
        raise ConnectionError("the wing fell off")

    def render(self):
        return np.full((4, 4, 3), self.count, np.uint8)


gym.register("Scripted-v0", Scripted)
gym.register("Dict-v0", lambda: Scripted(space=gym.spaces.Dict({})))


def scripted(num_envs, num_workers, **kwargs):
    made = envs.make_vec("Scripted-v0", num_envs, num_workers, **kwargs)
    made.reset(seed=0)
    return made, np.zeros(made.action_space.shape, made.action_space.dtype)


def actions_for(made, steps):
    """The same random actions for every `made` of one kind, (steps, num_envs, ...)."""
    space, rng = made.action_space, np.random.default_rng(3)
    if space.dtype.kind == "i":
        return rng.integers(0, made.single_action_space.n, (steps, *space.shape))
    return rng.uniform(space.low, space.high, (steps, *space.shape)).astype(np.float32)


def assert_same(a, b, where="result"):
    """Equal to the bit, dicts and tuples included; what a mask declares invalid is not looked at."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if f"_{key}" in a:
                mask = a[f"_{key}"]
                left, right = (x[key] if isinstance(x[key], dict) else {"": x[key]} for x in (a, b))
                assert left.keys() == right.keys(), f"{where}[{key}]"
                for name in left:
                    np.testing.assert_array_equal(left[name][mask], right[name][mask], f"{where}[{key}][{name}]")
            else:
                assert_same(a[key], b[key], f"{where}[{key}]")
    elif isinstance(a, tuple):
        assert len(a) == len(b), where
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{where}[{i}]")
    else:
        assert a.dtype == b.dtype, where
        np.testing.assert_array_equal(a, b, where)


def processes(wanted):
    """Process ids whose /proc entry `wanted(pid)` accepts."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and wanted(int(entry.name)):
                found.append(int(entry.name))
        except OSError:  # gone meanwhile
            pass
    return found


def children():
    """This process's child processes, zombies included."""
    return processes(lambda pid: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1] == str(os.getpid()))


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until(condition, seconds=3.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(autouse=True)
def nothing_left_behind():
    before = set(children())
    yield
    gc.collect()
    assert wait_until(lambda: set(children()) <= before), "worker processes are left"


# The same answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "LunarLander-v3"])
def test_any_number_of_workers_gives_the_same_steps(env_id):
    made = [envs.make_vec(env_id, 5, num_workers) for num_workers in (0, 1, 2, 3)]
    first = [one.reset(seed=11) for one in made]
    ended = 0
    for actions in actions_for(made[0], 210 if env_id == "Pendulum-v1" else 100):
        results = [one.step(actions) for one in made]
        for other in results[1:]:
            assert_same(results[0], other)
        ended += "episode" in results[0][4]
    assert ended > 0, "no episode ended: the test saw no reset"
    for one, other in zip(made, first, strict=True):
        assert_same(first[0], other)
        one.close()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "LunarLander-v3"])
def test_gymnasium_environments_step_as_in_a_plain_loop(env_id, num_workers):
    made = envs.make_vec(env_id, 3, num_workers)
    plain = [gym.make(env_id) for _ in range(3)]
    seeds = [int(np.random.SeedSequence(5, spawn_key=(i,)).generate_state(1)[0]) for i in range(3)]
    expected = np.stack([env.reset(seed=seed)[0] for env, seed in zip(plain, seeds, strict=True)])
    observations, infos = made.reset(seed=5)
    assert_same(expected.astype(np.float32), observations)
    assert infos == {}
    returns, lengths, ended = np.zeros(3), np.zeros(3), 0
    for actions in actions_for(made, 210 if env_id == "Pendulum-v1" else 130):
        observations, rewards, terminations, truncations, infos = made.step(actions)
        for i, env in enumerate(plain):
            observation, reward, terminated, truncated, _ = env.step(actions[i])
            returns[i], lengths[i] = returns[i] + reward, lengths[i] + 1
            assert (rewards[i], terminations[i], truncations[i]) == (np.float32(reward), terminated, truncated)
            assert ("episode" in infos and infos["_episode"][i]) == (terminated or truncated)
            if terminated or truncated:
                ended += 1
                np.testing.assert_array_equal(infos["final_obs"][i], observation.astype(np.float32))
                assert infos["_final_obs"][i]
                assert (infos["episode"]["r"][i], infos["episode"]["l"][i]) == (returns[i], lengths[i])
                returns[i] = lengths[i] = 0
                observation, _ = env.reset()
            np.testing.assert_array_equal(observations[i], observation.astype(np.float32))
    assert ended >= 3
    made.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_seeds(num_workers):
    made = envs.make_vec("CartPole-v1", 4, num_workers)
    first, _ = made.reset(seed=3)
    assert len(np.unique(first[:, 0])) == 4, "each environment has its own stream"
    second, _ = made.reset()
    assert not np.array_equal(first, second), "reset without a seed goes on"
    again, _ = made.reset(seed=3)
    np.testing.assert_array_equal(first, again)
    other, _ = made.reset(seed=4)
    assert not np.isin(other, first).any()
    made.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_spaces_and_types(num_workers):
    for dtype, expected in (("float64", np.float32), ("float32", np.float32), ("uint8", np.uint8)):
        made, actions = scripted(4, num_workers, dtype=dtype)
        observations, rewards, terminations, truncations, _ = made.step(actions)
        assert observations.dtype == made.observation_space.dtype == made.single_observation_space.dtype == expected
        assert made.observation_space.contains(observations)
        assert (rewards.dtype, terminations.dtype, truncations.dtype) == (np.float32, bool, bool)
        assert rewards.shape == terminations.shape == truncations.shape == (4,)
        assert made.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP
        made.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_environment_may_keep_its_action(num_workers):
    made, actions = scripted(4, num_workers, act="keep")
    made.step(actions)
    actions += 1.0  # in place: the caller's array and the shared one are both used again
    np.testing.assert_array_equal(made.step(actions)[1], np.full(4, 3.0))
    made.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_gymnasium_options_reach_every_environment(num_workers):
    made, _ = scripted(4, num_workers)
    np.testing.assert_array_equal(made.reset(options={"value": 5})[0], np.full((4, 2), 5))
    made.close()


@pytest.mark.parametrize("num_workers", [0, 3])
def test_render_gives_a_picture_of_every_environment(num_workers):
    made, actions = scripted(4, num_workers, render_mode="rgb_array")
    made.step(actions)
    frames = made.render()
    assert len(frames) == 4 and all(frame.shape == (4, 4, 3) and (frame == 1).all() for frame in frames)
    made.close()
    made, _ = scripted(4, num_workers)
    with pytest.raises(ValueError, match="render_mode is None"):
        made.render()
    made.close()


# Bad arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_workers=5), "num_workers is 5.*from 0 to 4"),
        (dict(num_workers=-1), "num_workers is -1.*from 0 to 4"),
        (dict(num_workers=1.5), "num_workers is 1.5.*integer"),
        (dict(num_workers=True), "num_workers is True.*integer"),
        (dict(num_envs=0), "num_envs is 0.*from 1 to"),
        (dict(env_id="CartPole-v9"), "env_id is 'CartPole-v9'.*Swarm"),
        (dict(env_id="LunarLander-v2"), "env_id is 'LunarLander-v2'"),
        (dict(env_id="no such environment"), "env_id is 'no such environment'"),
        (dict(env_id=None), "env_id is None"),
        (dict(env_id=["Swarm"]), r"env_id is \['Swarm'\]"),
        (dict(env_id="Dict-v0"), "Dict-v0.*only Box and Discrete"),
        (dict(env_id="Blackjack-v1"), "Blackjack-v1.*only Box observations"),
        (dict(render_mode="ansi"), "render_mode is 'ansi'"),
        (dict(render_mode="human", num_workers=2), "num_workers is 2.*human"),
        (dict(env_id="Swarm", n_agents=0), "n_agents is 0.*from 1 to"),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_arguments_are_refused_before_anything_starts(arguments, message, num_workers):
    arguments = dict(env_id="CartPole-v1", num_envs=4, num_workers=num_workers) | arguments
    if arguments["num_envs"] == 0:
        arguments["num_workers"] = None
    before = children()
    with pytest.raises(ValueError, match=message):
        envs.make_vec(**arguments)
    assert children() == before


@pytest.mark.parametrize(
    ("env_id", "actions", "message"),
    [
        ("CartPole-v1", [0, 1, 2, 0], r"actions\[2\] is 2.*from 0 to 1"),
        ("CartPole-v1", [0, -1, 0, 0], r"actions\[1\] is -1.*from 0 to 1"),
        ("CartPole-v1", [0.0, 1.0, 0.5, 0.0], "float64.*integers"),
        ("CartPole-v1", [0, 1, 0], r"\(3,\).*\(4,\)"),
        ("CartPole-v1", [[0], [1], [0], [1]], r"\(4, 1\).*\(4,\)"),
        ("Pendulum-v1", [[0.0], [np.nan], [0.0], [0.0]], "actions.*NaN"),
        ("Pendulum-v1", [[0.0], [np.inf], [0.0], [0.0]], "actions.*infinity"),
        ("Pendulum-v1", [0.0] * 4, r"actions.*\(4,\).*\(4, 1\)"),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_actions_are_refused_and_leave_the_pool_usable(env_id, actions, message, num_workers):
    made = envs.make_vec(env_id, 4, num_workers)
    made.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        made.step(actions)
    made.step(np.zeros(made.action_space.shape, made.action_space.dtype))
    made.close()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"identical": 1.5}, r"options\['identical'\] is 1.5"),
        ({"identical": 2}, r"options\['identical'\] is 2.*needs one seed"),
    ],
)
def test_bad_options_leave_the_pool_usable(options, message, num_workers):
    made = envs.make_vec("CartPole-v1", 4, num_workers)
    before, _ = made.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        made.reset(options=options)
    np.testing.assert_array_equal(made.reset(seed=0)[0], before)
    made.close()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("env_kwargs", "message"),
    [
        ({"first_env": 5}, "first_env is 5: it is set here"),
        ({"disable_env_checker": False}, "disable_env_checker is False: it is set here"),
        ({"max_episode_steps": -5}, r"env_kwargs is \{'max_episode_steps': -5\}: CartPole-v1 refuses it"),
    ],
)
def test_arguments_that_gymnasium_refuses_are_named(env_kwargs, message, num_workers):
    with pytest.raises(ValueError, match=message):
        envs.make_vec("CartPole-v1", 2, num_workers, **env_kwargs)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_argument_that_a_gymnasium_environment_lacks_is_a_type_error(num_workers):
    message = r"env_kwargs is \{'gears': 5\}: CartPole-v1 refuses it .*unexpected keyword argument 'gears'"
    with pytest.raises(TypeError, match=message):
        envs.make_vec("CartPole-v1", 2, num_workers, gears=5)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_gymnasium_environments_cannot_be_saved(num_workers):
    made, actions = scripted(4, num_workers)
    with pytest.raises(NotImplementedError, match="Gymnasium environments"):
        made.get_state()
    with pytest.raises(NotImplementedError, match="Gymnasium environments"):
        made.set_state({})
    made.step(actions)
    made.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_step_before_reset_and_after_close(num_workers):
    made = envs.make_vec("CartPole-v1", 4, num_workers, render_mode="rgb_array")
    with pytest.raises(gym.error.ResetNeeded, match="before reset"):
        made.step([0] * 4)
    made.reset()
    made.step([0] * 4)
    made.close()
    made.close()
    for call in (lambda: made.step([0] * 4), made.reset, made.render):
        with pytest.raises(gym.error.ClosedEnvironmentError, match="these environments are closed"):
            call()


# How many workers ----------------------------------------------------------------------------------------------------


def test_default_number_of_workers():
    cores = len(os.sched_getaffinity(0))
    small = envs.make_vec("Swarm", 4, **SWARM)
    assert isinstance(small, envs.Swarm)
    lone = envs.make_vec("CartPole-v1", 1)
    assert isinstance(lone, envs.GymnasiumVectorEnv)
    many = envs.make_vec("CartPole-v1", 4)
    large = envs.make_vec("Swarm", 40, n_agents=-(-envs.POOL_AGENTS // 40))
    for made, num_envs in ((many, 4), (large, 40)):
        assert isinstance(made, envs.PoolVectorEnv) == (cores > 1)
        assert cores == 1 or len(made.shared.pids) == min(cores, num_envs)
    for made in (small, lone, many, large):
        made.close()


def test_without_fork_it_says_so_and_steps_in_process(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.warns(UserWarning, match="fork"):
        made = envs.make_vec("CartPole-v1", 4, 2)
    assert isinstance(made, envs.GymnasiumVectorEnv)
    made.close()


# Errors, not hangs ---------------------------------------------------------------------------------------------------


def test_an_exception_comes_with_the_traceback_of_the_worker():
    made, actions = scripted(4, 2, act="raise")
    made.step(actions)
    made.step(actions)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="the wing fell off") as caught:
        made.step(actions)
    assert "in fall_off" in str(caught.value.__cause__)
    assert time.monotonic() - start < DEADLINE
    with pytest.raises(gym.error.ClosedEnvironmentError):
        made.step(actions)
    made.close()


def test_an_exception_in_a_rare_call_comes_with_its_traceback():
    made, _ = scripted(4, 2)
    with pytest.raises(KeyError, match="value") as caught:
        made.reset(options={"speed": 5})
    assert "in reset" in str(caught.value.__cause__)
    made.close()


def killed(made, actions, signal_number=signal.SIGKILL, call=None):
    """Kill a worker and return how long the next call takes to raise."""
    os.kill(int(made.shared.pids[1]), signal_number)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="worker process .* died"):
        made.step(actions) if call is None else call()
    return time.monotonic() - start


def test_a_worker_killed_between_steps_raises():
    made, actions = scripted(4, 2)
    made.step(actions)
    assert killed(made, actions) < DEADLINE
    start = time.monotonic()
    made.close()
    assert time.monotonic() - start < 1.0


def test_a_worker_killed_between_steps_raises_in_rare_calls():
    made, actions = scripted(4, 2)
    assert killed(made, actions, call=made.reset) < DEADLINE
    made = envs.make_vec("Swarm", 4, 2, **SWARM)
    state = made.get_state()
    assert killed(made, actions, call=lambda: made.set_state(state)) < DEADLINE


def test_a_worker_killed_in_mid_step_raises():
    made, actions = scripted(4, 2, act="sleep")
    made.step(actions)
    made.step(actions)
    pid = int(made.shared.pids[0])
    killer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(0.5); os.kill({pid}, 9)"])
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=f"worker process {pid} died"):
        made.step(actions)
    assert time.monotonic() - start < 0.5 + DEADLINE
    assert killer.wait() == 0


def test_a_worker_that_exits_raises():
    made, actions = scripted(4, 2, act="exit")
    made.step(actions)
    made.step(actions)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="died"):
        made.step(actions)
    assert time.monotonic() - start < DEADLINE


def test_killing_a_worker_and_its_replacement_hangs_nothing():
    before = set(children())
    made, actions = scripted(4, 2)
    pids = set(children()) - before
    os.kill(int(made.shared.pids[0]), signal.SIGKILL)
    assert wait_until(lambda: set(children()) - before - pids), "the Pool starts a replacement"
    time.sleep(0.2)  # now it waits for a task, and holds the lock that `terminate` asks for
    for pid in set(children()) - before - pids:
        os.kill(pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="died"):
        made.step(actions)
    assert time.monotonic() - start < DEADLINE
    for process in multiprocessing.active_children():  # the next replacement, which waits for that lock for ever
        process.kill()
        process.join()


def test_ctrl_c_in_mid_step_closes_the_pool():
    made, actions = scripted(4, 2, act="sleep")
    made.step(actions)
    made.step(actions)
    pids = made.shared.pids.tolist()
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        made.step(actions)
    signal.signal(signal.SIGALRM, previous)
    assert time.monotonic() - start < DEADLINE
    assert not set(pids) & set(children())
    with pytest.raises(gym.error.ClosedEnvironmentError):
        made.step(actions)


def test_a_forked_copy_does_not_stop_the_workers():
    made, actions = scripted(4, 2)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            made.close()
            status = 0
        finally:  # or it would go on with the tests
            os._exit(status)
    assert os.waitpid(pid, 0) == (pid, 0)
    made.step(actions)
    made.close()


def test_pools_are_independent():
    first, actions = scripted(4, 2)
    second, _ = scripted(4, 2)
    first.close()
    second.step(actions)
    assert killed(second, actions) < DEADLINE


def test_idle_workers_leave_the_cores_alone():
    made, actions = scripted(4, 2)
    made.step(actions)
    time.sleep(0.1)
    before = sum(cpu_seconds(pid) for pid in made.shared.pids)
    time.sleep(1.0)
    assert sum(cpu_seconds(pid) for pid in made.shared.pids) - before <= 0.03
    made.close()


# No process left behind ----------------------------------------------------------------------------------------------

START = """
import os, signal, sys, time
import numpy as np
import envs
made = envs.make_vec("CartPole-v1", 4, num_workers=2)
made.reset(seed=0)
actions = np.zeros(4, int)
def ready():
    made.step(actions)
    print("ready", flush=True)
"""
FOREVER = START + "ready()\nwhile True:\n    made.step(actions)\n"
IDLE = START + "ready()\nwhile True:\n    time.sleep(1)\n"
FLAGGED = (
    START
    + """
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
ready()
while not asked:
    made.step(actions)
for _ in range(1000):
    made.step(actions)
time.sleep(0.7)
made.reset()
made.close()
print("saved")
"""
)


class Script:
    """A script in a session of its own; a mark in its environment, which its workers inherit, tells its processes."""

    def __init__(self, text):
        self.mark = f"VECTORIZER_TEST={uuid.uuid4()}"
        environment = os.environ | dict([self.mark.split("=")])
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        command = [sys.executable, "-c", text]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)

    def alive(self):
        return processes(lambda pid: self.mark.encode() in Path(f"/proc/{pid}/environ").read_bytes())

    def ready(self):
        assert self.process.stdout.readline() == "ready\n", self.process.stderr.read()
        assert len(self.alive()) >= 3

    def end(self):
        """(exit status, stdout, stderr), when no process of its is left."""
        assert wait_until(lambda: not self.alive()), "processes are left"
        out, err = self.process.communicate(timeout=5)
        return self.process.returncode, out, err

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.mark.parametrize("text", [FOREVER, IDLE], ids=["stepping", "idle"])
@pytest.mark.parametrize(
    ("send", "number"),
    [
        (os.kill, signal.SIGINT),
        (os.killpg, signal.SIGINT),  # what Ctrl-C does
        (os.kill, signal.SIGTERM),
        (os.killpg, signal.SIGTERM),  # what timeout and many job schedulers do
        (os.kill, signal.SIGKILL),
    ],
)
def test_a_signal_leaves_no_process(text, send, number):
    with Script(text) as script:
        script.ready()
        send(script.process.pid, number)
        status, _, err = script.end()
        assert status == -number
        if number == signal.SIGINT:
            assert err.count("Traceback") == 1 and err.rstrip().endswith("KeyboardInterrupt")
        else:
            assert err == ""


def test_a_job_that_handles_sigterm_keeps_its_workers_to_save_what_they_hold():
    with Script(FLAGGED) as script:
        script.ready()
        os.killpg(script.process.pid, signal.SIGTERM)
        assert script.end() == (0, "saved\n", "")


@pytest.mark.parametrize(
    ("ending", "status", "error"),
    [
        ("", 0, ""),
        ("made.close()", 0, ""),
        ("import atexit; atexit.register(made.close)", 0, ""),
        ("os.kill(made.shared.pids[0], 9)", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("1 / 0", 1, "ZeroDivisionError"),
    ],
)
def test_an_end_leaves_no_process_and_says_nothing(ending, status, error):
    with Script(START + "ready()\n" + ending) as script:
        script.ready_line = script.process.stdout.readline()
        got, out, err = script.end()
        assert (script.ready_line, got, out) == ("ready\n", status, "")
        assert err.rstrip().endswith("division by zero") and err.count("Traceback") == 1 if error else err == ""


def test_forgotten_environments_are_closed_when_they_are_forgotten():
    before = set(children())
    made, actions = scripted(4, 2)
    made.step(actions)
    assert len(set(children()) - before) == 2
    del made
    gc.collect()
    assert wait_until(lambda: set(children()) <= before)


def test_close_closes_the_environments(tmp_path):
    class Telling(Scripted):
        def close(self):
            (tmp_path / f"{os.getpid()}-{id(self)}").touch()

    gym.register("Telling-v0", Telling)
    made = envs.make_vec("Telling-v0", 4, 2)
    pids = made.shared.pids.tolist()
    made.close()
    closed = [path.name.split("-")[0] for path in tmp_path.iterdir()]
    assert sum(closed.count(str(pid)) for pid in pids) == 4


def test_threads_of_torch_before_the_fork_hang_no_worker():
    text = """
import sys, time
import gymnasium as gym, numpy as np, torch
import envs
torch.set_num_threads(2)
torch.rand(600, 600) @ torch.rand(600, 600)
class Thinking(gym.Env):
    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (1,)), gym.spaces.Discrete(2)
    def reset(self, seed=None, options=None):
        return np.zeros(1, np.float32), {}
    def step(self, action):
        torch.rand(600, 600) @ torch.rand(600, 600)
        return np.full(1, torch.get_num_threads(), np.float32), 0.0, False, False, {}
gym.register("Thinking-v0", Thinking)
made = envs.make_vec("Thinking-v0", 2, num_workers=2)
made.reset()
print("ready", flush=True)
print(made.step([0, 0])[0].ravel().tolist(), torch.get_num_threads())
made.close()
"""
    pytest.importorskip("torch")
    with Script(text) as script:
        script.ready()
        assert script.end() == (0, "[1.0, 1.0] 2\n", "")


def test_random_actions_are_of_the_space_of_any_kind():
    spaces = [
        gym.spaces.Discrete(3, start=5),
        gym.spaces.Box(-2, 3, (2,), np.float32),
        gym.spaces.Box(0, 9, (2,), np.int64),
        gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
    ]
    for space in spaces:
        batch = gym.vector.utils.batch_space(space, 50)
        draw = [envs.random_policy(SimpleNamespace(single_action_space=space, num_envs=50), seed) for seed in (1, 1, 2)]
        first, same, other = (policy(None, None) for policy in draw)
        assert batch.contains(first) and np.array_equal(first, same) and not np.array_equal(first, other)
        assert len(np.unique(first)) > 2


def test_evaluation_gives_up_an_episode_that_no_time_limit_ends(monkeypatch):
    monkeypatch.setattr(envs, "LONGEST_EPISODE", 30)
    stats, _, _ = envs.evaluate(envs.random_policy, "Pendulum-v1", 2, 0, max_episode_steps=30)
    assert stats["l"].tolist() == [30, 30]
    with pytest.raises(RuntimeError, match="Pendulum-v1 did not end within 30 steps: give it a time limit"):
        envs.evaluate(envs.random_policy, "Pendulum-v1", 2, 0, max_episode_steps=-1)
