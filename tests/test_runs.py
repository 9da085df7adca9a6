"""A run's bookkeeping outside our own examples: what it is to survive, what it refuses, and what it says.

Most of it is tested on `envs.Run` itself, in this process; what needs a whole script is at the end.
"""

import dataclasses
import errno
import fcntl
import importlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from running import nursery_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import envs

ROOT = Path(envs.__file__).parent


@dataclasses.dataclass
class Args:
    exp_name: str = "tiny"
    env_id: str = "Swarm"
    seed: int = 1
    total_timesteps: int = 100
    eval_every: int = 10
    eval_episodes: int = 2
    checkpoint_every: int = 10
    torch_deterministic: bool = False
    cuda: bool = False
    track: bool = False
    capture_video: bool = False
    train_kwargs: dict = dataclasses.field(default_factory=dict)
    stage_returns: str | None = None


WORLD = dict(n_agents=2, max_steps=5)


class Straight(torch.nn.Module):
    """A policy that flies straight on, with one weight."""

    def __init__(self, weight=0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def make_policy(self, vector, greedy=True):
        return lambda observations, infos: np.zeros(vector.action_space.shape, np.float32)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """In a folder of its own, and with the signals as they were."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in envs.SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for folder in list(envs._locks):
        envs._unlock(folder)


def start(agent=None, args=None, **world):
    return envs.Run(args or Args(), (agent or Straight()).make_policy, 100, "Swarm", WORLD | world)


def step(run, agent, number, loss=0.5):
    """What a script does after an update."""
    run.log(number, {"losses/policy_loss": loss, "losses/explained_variance": math.nan})
    run.evaluate(agent.state_dict())
    if run.checkpoint_due():
        run.save({"model": agent.state_dict()})


def points(folder, tag):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


def file_names(folder):
    return sorted(path.name.split(".out.")[0] for path in folder.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------


RED = np.zeros((4, 6, 3), np.uint8)
RED[..., 0] = 255


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (RED, RED),
        (RED.astype(np.int64), RED),
        (RED / 255.0, RED),
        ((RED / 255.0).astype(np.float32), RED),
        (np.dstack([RED, np.full((4, 6), 255, np.uint8)]), RED),
        (np.dstack([RED / 255.0, np.ones((4, 6))]), RED),
        (np.zeros((4, 6, 4), np.uint8), np.full((4, 6, 3), 255, np.uint8)),  # wholly transparent
        (np.full((4, 6), 7, np.uint8), np.full((4, 6, 3), 7, np.uint8)),
        (np.full((4, 6, 1), 7, np.uint8), np.full((4, 6, 3), 7, np.uint8)),
        (np.ones((4, 6), bool), np.full((4, 6, 3), 255, np.uint8)),
    ],
    ids=["rgb", "integers", "floats", "float32", "rgba", "rgba floats", "transparent", "grey", "one channel", "bits"],
)
def test_pictures_of_any_usual_form_are_shown_as_they_are_meant(picture, expected):
    shown = envs._as_rgb(picture)
    assert shown.dtype == np.uint8
    assert np.array_equal(shown, expected)


@pytest.mark.parametrize("picture", [None, "text", np.zeros(3), np.zeros((2, 3, 5)), [RED, RED]])
def test_what_is_no_picture_is_named(picture):
    with pytest.raises(ValueError, match="render returned"):
        envs._as_rgb(picture)


class Drawn(gym.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode=None, picture="raises"):
        self.render_mode = render_mode
        self.picture = picture

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.time += 1
        return np.zeros(3, np.float32), 1.0, self.time == 5, False, {}

    def render(self):
        if self.picture == "raises":
            raise RuntimeError("no OpenGL here")
        return None if self.picture == "none" else np.full((32, 48, 4), 255, np.uint8)


gym.register("Drawn-v0", entry_point=Drawn)


@pytest.mark.parametrize(("picture", "reason"), [("raises", "no OpenGL here"), ("none", "render returned object")])
def test_a_picture_that_cannot_be_drawn_is_said_and_nothing_more(picture, reason, tmp_path, capsys):
    envs.film({"mine": envs.random_policy}, "Drawn-v0", 1, tmp_path / "eval.mp4", picture=picture)
    envs.record(envs.random_policy, "Drawn-v0", 1, tmp_path / "0.mp4", picture=picture)
    said = capsys.readouterr().out
    assert f"no eval.mp4: {reason}" in said and f"no 0.mp4: {reason}" in said
    assert not list(tmp_path.glob("*.mp4"))


def test_a_video_of_pictures_with_opacity_is_written(tmp_path, capsys):
    envs.film({"mine": envs.random_policy}, "Drawn-v0", 1, tmp_path / "eval.mp4", picture="opaque")
    assert (tmp_path / "eval.mp4").stat().st_size > 0
    assert capsys.readouterr().out == ""


def test_without_ffmpeg_there_is_no_video_and_a_word(tmp_path, capsys, monkeypatch):
    def no_video(*args, **kwargs):
        raise OSError("no ffmpeg")

    monkeypatch.setattr(envs, "write_video", no_video)
    envs.film({"mine": envs.random_policy}, "Drawn-v0", 1, tmp_path / "eval.mp4", picture="opaque")
    assert "no eval.mp4: no ffmpeg" in capsys.readouterr().out


def test_the_table_comes_before_the_picture_fails(tmp_path, capsys, monkeypatch):
    def broken(self, env, size=0):
        raise RuntimeError("no display")

    monkeypatch.setattr(envs.Swarm, "draw", broken)
    agent = Straight()
    run = start(agent)
    step(run, agent, 100)
    run.finish(agent)
    said = capsys.readouterr().out
    assert 0 < said.index("| tiny |") < said.index("no eval.mp4: no display")
    assert file_names(run.folder) == ["eval.png", "events", "model.pt"]


def test_the_parts_of_an_iteration_are_timed_and_nothing_else_is(monkeypatch):
    run = start()
    logged = []
    monkeypatch.setattr(run.events, "add_scalars", lambda scalars, step: logged.append(scalars))
    now = time.time()
    monkeypatch.setattr(envs.time, "time", lambda: now)
    for _ in range(2):
        run.clock("rollout")
        now += 3
        run.clock("update")
        now += 1
        run.log(run.step + 5, {})
        now += 10  # evaluations and checkpoints
    for scalars in logged:
        assert scalars["charts/rollout_seconds"] == 3 and scalars["charts/update_seconds"] == 1
        assert scalars["charts/rollout_share"] == 0.75 and scalars["charts/update_share"] == 0.25


# ----------------------------------------------------------------------------------------------------------------------
# What is not finite
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("tag", ["losses/policy_loss", "losses/value_loss", "losses/kl", "charts/episodic_return"])
def test_a_run_ends_at_the_first_loss_or_return_that_is_not_finite(tag, value):
    agent = Straight(1.0)
    run = start(agent)
    step(run, agent, 10)
    with pytest.raises(FloatingPointError, match=rf"{tag} is {value} in the iteration from step 10 to step 20"):
        run.log(20, {tag: value})
    assert envs.load(run.folder / "checkpoint.pt")["step"] == 10
    assert envs.load(run.folder / "model.pt")["model"]["weight"] == 1.0


def test_a_run_does_not_save_weights_that_are_not_finite():
    agent = Straight(1.0)
    run = start(agent)
    step(run, agent, 10)
    agent.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="a weight of weight is nan"):
        step(run, agent, 20)
    assert envs.load(run.folder / "checkpoint.pt")["model"]["weight"] == 1.0


def test_a_held_out_return_that_is_not_finite_ends_the_run(monkeypatch):
    agent = Straight()
    run = start(agent)
    stats = {"r": np.array([math.nan]), "l": np.array([1.0])}
    monkeypatch.setattr(envs, "evaluate", lambda *args, **kwargs: (stats, np.zeros((1, 1)), []))
    with pytest.raises(FloatingPointError, match="the held-out return is nan"):
        step(run, agent, 10)


def test_what_says_little_may_be_undefined():
    agent = Straight()
    run = start(agent)
    run.log(5, {"losses/explained_variance": -math.inf, "losses/approx_kl": math.inf})


# ----------------------------------------------------------------------------------------------------------------------
# A full disk, output that is gone
# ----------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_once_and_logging_goes_on_later(monkeypatch, capsys):
    agent = Straight()
    run = start(agent)
    add_scalar = SummaryWriter.add_scalar

    def full(self, *args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    step(run, agent, 10)
    step(run, agent, 20)
    monkeypatch.setattr(SummaryWriter, "add_scalar", add_scalar)
    time.sleep(1.1)  # TensorBoard reads files in the order of their names, which begin with the second
    step(run, agent, 100)
    run.finish(agent)
    assert capsys.readouterr().out.count("not logged") == 1
    assert [at for at, _ in points(run.folder, "losses/policy_loss")] == [100]


class Gone:
    encoding = "utf-8"

    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise BrokenPipeError


def test_output_that_cannot_be_written_is_given_up(monkeypatch):
    output = envs._Output(Gone())
    assert print("hello", file=output) is None
    output.flush()
    assert output.encoding == "utf-8"
    print("hello", file=envs._Output(None))  # as after 2>&-


# ----------------------------------------------------------------------------------------------------------------------
# Signals
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [[signal.SIGTERM] * 3, [signal.SIGINT, signal.SIGTERM], [signal.SIGINT] * 2])
def test_several_signals_within_a_moment_leave_a_checkpoint(numbers):
    agent = Straight()
    run = start(agent)
    for number in numbers:
        os.kill(os.getpid(), number)
    step(run, agent, 3)
    assert run.stopping
    assert envs.load(run.folder / "checkpoint.pt")["step"] == 3


def test_a_signal_seconds_after_the_first_ends_the_run_at_once(monkeypatch):
    run = start()
    raised = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    os.kill(os.getpid(), signal.SIGTERM)
    run.signals[0] -= envs.SIGNAL_SECONDS + 1
    os.kill(os.getpid(), signal.SIGTERM)
    assert raised == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ----------------------------------------------------------------------------------------------------------------------
# Going on, locks
# ----------------------------------------------------------------------------------------------------------------------


def stopped(args, agent):
    """A run that a signal ended after its first iteration; returns its folder."""
    run = start(agent, args)
    os.kill(os.getpid(), signal.SIGINT)
    step(run, agent, 10)
    run.finish(agent)
    return run.folder


@pytest.mark.parametrize("name", ["plain", "lr[1e-3]", "a*b", "a?b", "sweep/one", "données 1", "[", "**"])
def test_a_run_of_any_name_is_found_again(name):
    args = Args(exp_name=name)
    folder = stopped(args, Straight())
    again = start(args=args)
    assert again.folder == folder and again.checkpoint["step"] == 10


def test_a_run_that_ended_in_this_process_by_an_exception_is_taken_up_again():
    agent = Straight()
    run = start(agent)
    step(run, agent, 10)
    with pytest.raises(FloatingPointError):
        run.log(20, {"losses/policy_loss": math.nan})
    assert start(agent).folder == run.folder  # though `run` is still there, and its lock


def test_a_run_in_hand_of_another_process_is_left_alone(capsys):
    folder = stopped(Args(), Straight())
    code = (
        f"import envs, time; assert envs.lock({str(folder.resolve())!r}); print('locked', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        assert start().folder != folder
        assert "another process has in hand" in capsys.readouterr().out
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_a_file_system_without_locks_lets_training_start(monkeypatch, number):
    def no_locks(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    folder = stopped(Args(), Straight())
    assert start().folder == folder


def test_a_forked_child_does_not_keep_the_lock():
    folder = stopped(Args(), Straight())
    unlock = envs.lock(folder)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"1")
        time.sleep(30)
        os._exit(0)
    os.read(reader, 1)
    unlock()
    code = f"import envs; print(envs.lock({str(folder.resolve())!r}) is not None)"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert output == "True\n"


def test_what_differs_is_said(capsys):
    folder = stopped(Args(), Straight())
    assert start(args=Args(eval_every=20, checkpoint_every=5)).folder != folder
    assert "with other arguments (eval_every, checkpoint_every)" in capsys.readouterr().out
    checkpoint = envs.load(folder / "checkpoint.pt")
    envs.save(checkpoint | {"ranks": checkpoint["ranks"] * 3}, folder / "checkpoint.pt")
    assert start().folder != folder
    assert "an unfinished run of 3 processes, where there are 1" in capsys.readouterr().out


def test_runs_started_within_a_second_have_folders_of_their_own():
    folders = {envs.open_run(dataclasses.asdict(Args()), 1)[0] for _ in range(3)}
    assert len(folders) == 3


# ----------------------------------------------------------------------------------------------------------------------
# Damaged files, other versions
# ----------------------------------------------------------------------------------------------------------------------


def test_a_damaged_file_is_loaded_whole_or_not_at_all(tmp_path):
    path = tmp_path / "model.pt"
    content = {"args": {"seed": 1, "name": "x" * 300}, "model": {"w": torch.randn(1000)}, "score": 1.0}
    envs.save(content, path)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(300):
        damaged = bytearray(data)
        at = int(rng.integers(len(data)))
        if trial % 3 == 0:
            damaged[at : at + 512] = bytes(len(damaged[at : at + 512]))
        elif trial % 3 == 1:
            del damaged[at:]
        else:
            damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            loaded = envs.load(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:  # a bit that means nothing, such as a time stamp
            assert loaded["args"] == content["args"] and loaded["score"] == 1.0
            assert torch.equal(loaded["model"]["w"], content["model"]["w"])
    assert refused > 200


@pytest.mark.parametrize("content", [[1, 2], {"args": {}}, {"args": 3, "model": {}}, {"args": {}, "model": [1]}])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model.pt is damaged, or not a file of these scripts"):
        envs.load(tmp_path / "model.pt")


@pytest.mark.parametrize("missing", ["ranks", "model", "stage", "step"])
def test_a_checkpoint_without_an_entry_is_said_and_left(missing, capsys):
    folder = stopped(Args(), Straight())
    checkpoint = envs.load(folder / "checkpoint.pt")
    del checkpoint[missing]
    torch.save(checkpoint, folder / "checkpoint.pt")
    assert start().folder != folder
    said = capsys.readouterr().out
    assert "not resumed, and left where it is" in said and str(folder / "checkpoint.pt") in said


def test_a_checkpoint_that_does_not_fit_is_set_aside_and_the_same_command_starts_anew():
    folder = stopped(Args(), Straight())
    run = start()
    words = r"checkpoint.pt is not of this version .* now checkpoint-unfit.pt"
    with pytest.raises(SystemExit, match=words), run.restoring():
        torch.nn.Linear(1, 1).load_state_dict(run.checkpoint["model"])
    assert file_names(folder) == ["checkpoint-unfit.pt", "events", "model.pt"]
    assert start().folder != folder


def test_torchs_random_numbers_go_on_where_the_checkpoint_was():
    agent = Straight()
    first = start()
    torch.rand(3)
    first.log(10, {})
    assert first.checkpoint_due()
    first.save({"model": agent.state_dict()}, {"own": 5})
    expected = torch.rand(4)
    first.unlock()
    run = start()
    assert not torch.equal(torch.rand(4), expected)
    with run.restoring():
        assert run.own["own"] == 5
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("damage", ["gone", "damaged"])
def test_a_best_score_counts_only_while_its_model_is_there(damage, capsys):
    agent = Straight(1.0)
    folder = stopped(Args(), agent)
    if damage == "gone":
        (folder / "model.pt").unlink()
    else:
        (folder / "model.pt").write_bytes(b"nothing")
    run = start(agent)
    assert run.folder == folder and run.best_score == -math.inf
    step(run, agent, 100)
    run.finish(agent)
    assert envs.load(folder / "model.pt")["model"]["weight"] == 1.0
    assert "| tiny |" in capsys.readouterr().out


def test_a_run_whose_best_model_is_lost_at_its_end_is_judged_by_its_last(capsys):
    agent = Straight(1.0)
    run = start(agent)
    step(run, agent, 100)
    (run.folder / "model.pt").unlink()
    run.finish(agent)
    said = capsys.readouterr().out
    assert "what follows is the last policy" in said and "| tiny |" in said
    assert envs.load(run.folder / "model.pt")["model"]["weight"] == 1.0


def test_a_kill_in_the_closing_lines_doubles_no_score(monkeypatch):
    agent = Straight()
    run = start(agent)
    step(run, agent, 100)
    unlink = Path.unlink

    def killed(path, *args, **kwargs):
        if path.name == "checkpoint.pt":
            raise InterruptedError
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(InterruptedError):
        run.finish(agent)
    monkeypatch.setattr(Path, "unlink", unlink)
    again = start(agent)
    assert again.folder == run.folder and again.step == 100
    again.finish(agent)
    assert len(points(run.folder, "test/tiny")) == len(points(run.folder, "losses/policy_loss")) == 1
    assert file_names(run.folder).count("events") == 2 and "checkpoint.pt" not in file_names(run.folder)


# ----------------------------------------------------------------------------------------------------------------------
# Names and numbers
# ----------------------------------------------------------------------------------------------------------------------


BASELINES = [("Swarm", "random"), ("Swarm", "vicsek"), ("LidarNavigation", "planning")]


@pytest.mark.parametrize(("env_id", "name"), BASELINES)
def test_a_policy_named_as_a_baseline_has_a_row_of_its_own(env_id, name):
    world = dict(n_agents=2, max_steps=9)
    mine, _ = envs.compare({"mine": Straight().make_policy}, env_id, 2, 1, **world)
    scores, table = envs.compare({name: Straight().make_policy}, env_id, 2, 1, **world)
    assert scores[f"{name} (trained)"] == mine["mine"] and scores[name] == mine[name]
    assert f"| {name} (trained) |" in table


def test_a_policy_named_sampled_is_told_from_the_sampled_one():
    policies = envs._policies("sampled", Straight().make_policy)
    assert list(policies) == ["sampled (greedy)", "sampled"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eval_episodes", 2147483648),
        ("num_envs", 2**63),
        ("hidden_dim", 10**9),
        ("num_steps", 2**40),
        ("total_timesteps", 2**64),
        ("seed", -1),
        ("seed", 2**32),
        ("learning_rate", math.nan),
        ("gamma", 1.5),
        ("kl_coef", 2.0),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(name, value):
    args = type("Given", (), {"env_kwargs": {}, name: value})
    with pytest.raises(ValueError, match=f"^{name} is "):
        envs.check_args(args)


@pytest.mark.parametrize(
    ("env_id", "world"),
    [
        ("Swarm", {"alignment_weight": 1e150}),
        ("Swarm", {"n_agents": 2**40}),
        ("Swarm", {"max_steps": 2**63}),
        ("LidarNavigation", {"collision_weight": -1e300}),
        ("VmasNavigation", {"final_reward": 1e38}),
        ("LunarLander", {"enable_wind": True, "wind_power": 1e38}),
        ("LunarLander", {"max_steps": 2**31}),
    ],
)
def test_arguments_of_environments_out_of_range_are_refused_by_name(env_id, world):
    with pytest.raises(ValueError, match=f"^{list(world)[-1]} is "):
        envs.make_vec(env_id, 1, **world)


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class CommandLine:
    exp_name: str = "tiny"
    evaluate: str | None = None
    init_from: str | None = None
    cuda: bool = False
    env_id: str = "Swarm"
    env_kwargs: dict[str, int | float | bool | str] = dataclasses.field(default_factory=dict)
    train_kwargs: dict[str, int | float | bool | str] = dataclasses.field(default_factory=dict)
    stage_returns: str | None = None


@pytest.fixture
def parse(monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # `parse_args` puts its own there
    monkeypatch.setattr(sys, "stderr", sys.stderr)

    def parse(*words):
        monkeypatch.setattr(sys, "argv", ["script.py", *words])
        return envs.parse_args(CommandLine, "A script.")

    return parse


def test_env_kwargs_are_texts_numbers_and_truth_values(parse):
    given = parse("--env-kwargs", "map_name", "8x8", "gravity", "-9", "size", "0.5", "windy", "True").env_kwargs
    assert given == {"map_name": "8x8", "gravity": -9, "size": 0.5, "windy": True}
    assert [type(value) for value in given.values()] == [str, int, float, bool]


@pytest.mark.parametrize("script", ["ppo_swarm", "ppo_swarm_lstm", "grpo_perep", "async_ppo"])
def test_truth_values_that_would_be_taken_for_texts_are_refused(script):
    Args = importlib.import_module(script).Args
    for word in ("true", "false", "FALSE"):
        for name in {"env_kwargs", "eval_env_kwargs"} & set(Args.__dataclass_fields__):
            with pytest.raises(ValueError, match=f"windy is '{word}', a text: .* must be True or False"):
                Args(**{name: {"windy": word}})
    assert Args(env_kwargs={"windy": False}).env_kwargs == {"windy": False}


@pytest.mark.parametrize("name", ["env", "train", "eval-env"])
def test_env_kwargs_given_twice_are_refused(parse, name):
    with pytest.raises(ValueError, match=f"--{name}-kwargs is given twice"):
        parse(f"--{name}-kwargs", "a", "1", f"--{name.replace('-', '_')}_kwargs", "b", "2")


def saved_model(path, **changes):
    args = dataclasses.asdict(CommandLine()) | changes
    envs.save({"args": args, "model": {}}, path)
    return str(path)


def test_a_model_of_another_script_is_named(parse, tmp_path):
    path = saved_model(tmp_path / "model.pt", exp_name="grpo_perep", num_groups=8)
    with pytest.raises(ValueError, match="model.pt was saved by 'grpo_perep', another script or version.* num_groups"):
        parse("--evaluate", path)


def test_a_model_cannot_choose_what_is_imported(parse, tmp_path):
    path = saved_model(tmp_path / "model.pt", env_id="evil:World-v0")
    with pytest.raises(ValueError, match="asks for evil:World-v0, which runs that module"):
        parse("--evaluate", path)
    assert parse("--evaluate", path, "--env-id", "evil:World-v0").env_id == "evil:World-v0"


def test_saved_arguments_are_the_defaults_of_an_evaluation(parse, tmp_path):
    path = saved_model(tmp_path / "model.pt", env_kwargs={"noise": 0.1, "dt": 0.2})
    assert parse("--evaluate", path, "--env-kwargs", "dt", "0.3").env_kwargs == {"noise": 0.1, "dt": 0.3}


# ----------------------------------------------------------------------------------------------------------------------
# Whole scripts
# ----------------------------------------------------------------------------------------------------------------------

SHORT = "--num-actors 0 --num-workers 0 --num-envs 4 --num-steps 16 --total-timesteps 256 --eval-episodes 2"
SHORT += " --eval-env-kwargs max_episode_steps 20"  # a short video


def run_script(cwd, shell):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd)}
    command = f"{sys.executable} {ROOT / 'async_ppo.py'} {SHORT} {shell}"
    return subprocess.run(["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("shell", ["2>&1 | true", "2>&-", ">/dev/full 2>&1"], ids=["pipe", "closed", "disk"])
def test_a_training_without_an_output_comes_to_its_end(tmp_path, shell):
    assert run_script(tmp_path, shell).returncode == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert {"eval.png", "model.pt"} <= set(file_names(folder)) and "checkpoint.pt" not in file_names(folder)


nursery = nursery_of(script=ROOT / "async_ppo.py")

KILLED = """
import sys, envs
write = envs.Run.write_checkpoint

def stop(self):
    write(self)
    sys.exit("killed")

envs.Run.write_checkpoint = stop
"""


def test_a_checkpoint_of_another_network_ends_one_command_and_not_the_next(nursery, tmp_path):
    args = dict(num_actors=0, num_workers=0, num_envs=4, num_steps=16, total_timesteps=256, eval_episodes=2)
    args |= dict(checkpoint_every=64)
    assert "killed" in nursery.run_one(tmp_path, probe=KILLED, **args).output
    (path,) = tmp_path.glob("runs/*/checkpoint.pt")
    checkpoint = envs.load(path)
    del checkpoint["model"]["actor.0.weight"]
    torch.save(checkpoint, path)
    first, second = (nursery.run_one(tmp_path, **args) for _ in range(2))
    assert first.code == 1
    assert f"{path.relative_to(tmp_path)} is not of this version" in first.output
    assert second.code == 0 and "| async_ppo |" in second.output
