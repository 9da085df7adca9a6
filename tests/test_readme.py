"""What the README and the pages in docs/ show works as shown."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from pettingzoo.test import parallel_api_test, parallel_seed_test

import envs

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.relative_to(ROOT): path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
README, RUNNING = PAGES[Path("README.md")], PAGES[Path("docs/running.md")]
SCRIPTS = {path.name: path.read_text() for path in ROOT.glob("*.py") if path.name != "envs.py"}
TEMPLATES = ("reach.py", "gather.py")  # files that the pages show whole
COMMANDS = (
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python ppo_swarm.py",
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt -r tests/requirements.txt"
    " && .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests",
)

page = pytest.mark.parametrize("page", PAGES, ids=str)


def shown(sign, language="python"):
    """The one block of code in all pages that contains this."""
    blocks = [code for text in PAGES.values() for code in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]
    (code,) = (code for code in blocks if sign in code)
    return code


def fields(source):
    """The arguments of a script, as flags."""
    (args,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    return {node.target.id.replace("_", "-") for node in args.body if isinstance(node, ast.AnnAssign)}


# ----------------------------------------------------------------------------------------------------------------------
# Code
# ----------------------------------------------------------------------------------------------------------------------


def test_the_training_loop_of_ones_own_learns(tmp_path):
    (tmp_path / "own.py").write_text(shown("loss.backward()"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = subprocess.run(
        [sys.executable, "own.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout
    lengths = [float(length) for length in re.findall(r"mean length (\d+)", output)]
    assert len(lengths) == 30
    assert max(lengths[-5:]) > 5 * lengths[0]


def test_the_first_steps_of_the_readme_run():
    exec(shown("envs.action_space.sample()"), names := {})
    assert names["observations"].shape[:2] == names["rewards"].shape == (32, 10)


def test_an_environment_of_ones_own_is_trained_on(tmp_path):
    (tmp_path / "reach.py").write_text(shown("# reach.py"))
    for name in ("envs.py", "async_ppo.py"):
        shutil.copy(ROOT / name, tmp_path)
    (flags,) = re.findall(r"python async_ppo.py (--env-id reach:\S+ .*)", README)
    output = subprocess.run(
        [sys.executable, "async_ppo.py", *flags.split()], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    trained, random = (float(re.search(rf"\| {name} \| (-[\d.]+)", output)[1]) for name in ("async_ppo", "random"))
    assert random < -100 and trained > -15


# ----------------------------------------------------------------------------------------------------------------------
# The native environment to copy
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gather(tmp_path_factory):
    path = tmp_path_factory.mktemp("gather") / "gather.py"
    path.write_text(shown("# gather.py"))
    spec = importlib.util.spec_from_file_location("gather", path)
    module = sys.modules["gather"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gather"], envs.NATIVE_ENVS["Gather"]


def same(a, b):
    return data_equivalence(a, b, exact=True)


def play(world, observations, steps, seed=0):
    """(actions, what `step` returned) of so many steps; the first environments gather, the others wander about."""
    rng, history = np.random.default_rng(seed), []
    for _ in range(steps):
        actions = rng.uniform(-1.0, 1.0, world.action_space.shape).astype(np.float32)
        actions[:3] = np.clip(10.0 * observations[:3], -1.0, 1.0)
        observations, *rest, infos = world.step(actions)
        if "episode" in infos:  # without what is left from before where no episode ended
            done = infos["_episode"]
            infos = infos | {"final_obs": infos["final_obs"] * done[:, None, None]}
            infos["episode"] = {name: value * done for name, value in infos["episode"].items()}
        history.append((actions, (observations, *rest, infos)))
    return history


def run(num_workers, seed, steps=40, **kwargs):
    world = envs.make_vec("Gather", 5, num_workers, max_steps=15, **kwargs)
    observations, _ = world.reset(seed=seed)
    history = play(world, observations, steps)
    world.close()
    return observations, history


def test_the_same_seed_gives_the_same_trajectories_for_any_number_of_workers(gather):
    first = run(0, seed=3)
    for num_workers in (0, 1, 2, 5):
        assert same(run(num_workers, seed=3), first)
    assert not same(run(0, seed=4)[0], first[0])


def test_with_a_list_of_seeds_each_goes_as_it_would_alone(gather):
    together, _ = envs.make_vec("Gather", 3).reset(seed=[7, 8, 7])
    for env, seed in enumerate((7, 8, 7)):
        assert same(together[env], envs.make_vec("Gather", 1).reset(seed=seed)[0][0])


def test_an_episode_that_ends_is_reset_in_the_same_step(gather):
    world = envs.make_vec("Gather", 5, max_steps=15)
    observations, infos = world.reset(seed=1)
    assert observations in world.observation_space and observations.dtype == np.float32 and infos == {}
    returns, lengths, endings, state = np.zeros(5), np.zeros(5), set(), world.get_state()
    history = play(world, observations, 60)
    for _, (observations, rewards, terminations, truncations, infos) in history:
        assert rewards.shape == (5, 5) and rewards.dtype == np.float32 and observations in world.observation_space
        returns, lengths, done = returns + rewards.mean(1), lengths + 1, terminations | truncations
        endings |= {*zip(terminations.tolist(), truncations.tolist(), strict=True)}
        assert ("episode" in infos) == ("final_obs" in infos) == done.any()
        last = observations if not done.any() else np.where(done[:, None, None], infos["final_obs"], observations)
        np.testing.assert_allclose(rewards, -np.linalg.norm(last, axis=-1), rtol=1e-5, atol=1e-6)
        assert (terminations == (np.linalg.norm(last, axis=-1).max(-1) < gather.GATHER_RADIUS)).all()
        assert (truncations == (lengths == 15)).all()
        if done.any():
            assert same(infos["_episode"], done) and same(infos["_final_obs"], done)
            assert list(infos["episode"]) == list(world.stat_names)
            np.testing.assert_allclose(infos["episode"]["r"][done], returns[done], rtol=1e-5)
            assert (infos["episode"]["l"][done] == lengths[done]).all()
            np.testing.assert_allclose(infos["episode"]["spread"][done], -rewards.mean(1)[done], rtol=1e-5)
            assert not same(observations[done], infos["final_obs"][done])
            returns[done], lengths[done] = 0.0, 0.0
    assert {(True, False), (False, True), (False, False)} <= endings
    assert not same(world.get_state()["rng"], state["rng"])


def test_a_new_episode_starts_as_reset_starts_one(gather):
    world = envs.make_vec("Gather", 4, max_steps=1)
    world.reset(seed=1)
    for _ in range(50):
        observations, *_ = world.step(np.ones((4, 5, 2), np.float32))
        state = world.get_state()
        assert (np.abs(state["position"]) <= 1.0).all() and not state["elapsed"].any() and not state["totals"].any()
        position = state["position"]
        np.testing.assert_allclose(observations, position.mean(1, keepdims=True) - position, atol=1e-6)


def test_a_state_is_gone_back_to_bit_for_bit(gather):
    for before, after in ((0, 0), (2, 0), (0, 2)):
        world = envs.make_vec("Gather", 5, before, max_steps=15)
        observations, _ = world.reset(seed=2)
        observations = play(world, observations, 10)[-1][1][0]
        state = world.get_state()
        expected = play(world, observations, 40, seed=1)
        other = envs.make_vec("Gather", 5, after, max_steps=15)
        restored, infos = other.set_state(state)
        assert same(restored, observations) and infos == {}
        assert same(play(other, restored, 40, seed=1), expected)
        world.close()
        other.close()


def test_starts_are_those_that_are_given(gather):
    position = np.random.default_rng(0).uniform(-3, 3, (4, 5, 2))
    for num_workers in (0, 2):
        world = envs.make_vec("Gather", 4, num_workers)
        observations, _ = world.reset(seed=1, options={"position": position})
        assert same(world.get_state()["position"], position)
        np.testing.assert_allclose(observations, position.mean(1, keepdims=True) - position, atol=1e-6)
        alike, _ = world.reset(seed=1, options={"identical": 2})
        assert same(alike[0], alike[1]) and same(alike[2], alike[3]) and not same(alike[0], alike[2])
        observations, *_ = world.step(np.zeros((4, 5, 2), np.float32))
        assert not same(observations[0], observations[1])  # noise of their own
        world.close()


def test_what_it_refuses(gather):
    for kwargs, message in (
        (dict(n_agents=0), "^n_agents is 0"),
        (dict(noise=-1.0), "^noise is -1.0"),
        (dict(noise=float("nan")), "^noise is nan"),
        (dict(max_steps=0), "^max_steps is 0"),
        (dict(render_mode="ascii"), "^render_mode is 'ascii'"),
    ):
        with pytest.raises(ValueError, match=message):
            envs.make_vec("Gather", 2, **kwargs)
    with pytest.raises(TypeError, match="^agents is 3: Gather has no such argument, but n_agents,"):
        envs.make_vec("Gather", 2, agents=3)
    world = envs.make_vec("Gather", 2)
    with pytest.raises(gym.error.ResetNeeded):
        world.step(np.zeros((2, 5, 2)))
    for options in ({"position": np.zeros((2, 4, 2))}, {"place": 0}):
        with pytest.raises(ValueError, match="^options"):
            world.reset(options=options)
    world.reset()
    for actions in (np.zeros((2, 5)), np.full((2, 5, 2), np.nan)):
        with pytest.raises(ValueError, match="^actions"):
            world.step(actions)


def test_it_does_what_its_docstring_says(gather):
    one, other = (envs.make_vec("Gather", 1, n_agents=2, noise=0.0, max_steps=9) for _ in range(2))
    start = [[[-1.0, 0.0], [1.0, 0.0]]]
    observations, _ = one.reset(seed=0, options={"position": start})
    assert same(observations, np.float32([[[1.0, 0.0], [-1.0, 0.0]]]))
    other.reset(seed=0, options={"position": start})
    (observation,), (reward,), *_ = one.step([[[1.0, 0.5], [0.0, 0.5]]])
    np.testing.assert_allclose(observation, [[0.95, 0.0], [-0.95, 0.0]], atol=1e-6)
    np.testing.assert_allclose(reward, [-0.95, -0.95], atol=1e-6)
    assert same(other.step([[[7.0, 0.5], [0.0, 0.5]]])[0][0], observation)  # more acts as the bound


def test_it_draws_pictures(gather):
    pictures = []
    for num_workers in (0, 2):
        world = envs.make_vec("Gather", 2, num_workers, render_mode="rgb_array")
        world.reset(seed=1)
        pictures.append(world.render())
        world.close()
    assert same(*pictures) and not same(*pictures[0])
    assert pictures[0][0].shape == (384, 384, 3) and pictures[0][0].dtype == np.uint8


def test_pettingzoo_takes_it(gather, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parallel_api_test(envs.parallel_env("Gather", max_steps=20), num_cycles=50)
        parallel_seed_test(lambda: envs.parallel_env("Gather", max_steps=20), num_cycles=50)
    assert "Passed" in capsys.readouterr().out


def test_its_kernels_do_not_leave_their_arrays(tmp_path):
    (tmp_path / "gather.py").write_text(shown("# gather.py"))
    code = (
        "import envs, gather; world = envs.make_vec('Gather', 3, 0, n_agents=4, max_steps=5); world.reset(seed=0);"
        "[world.step(world.action_space.sample()) for _ in range(20)]"
    )
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_script_trains_on_it(tmp_path):
    (tmp_path / "gather.py").write_text(shown("# gather.py"))
    for name in ("envs.py", "ppo_swarm.py"):
        shutil.copy(ROOT / name, tmp_path)

    def run(*words):
        command = [sys.executable, "ppo_swarm.py", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    (flags,) = re.findall(r"python ppo_swarm.py (--env-id gather:Gather .*)", PAGES[Path("docs/environments.md")])
    trained = run(*flags.split())
    assert trained.returncode == 0, trained.stderr
    scores = {name: float(re.search(rf"\| {name} \| (-[\d.]+)", trained.stdout)[1]) for name in ("ppo_swarm", "random")}
    assert scores["random"] < -30 and scores["ppo_swarm"] > -4
    (video,) = tmp_path.glob("runs/gather:Gather__ppo_swarm__1__*/eval.mp4")
    model = str(video.with_name("model.pt"))
    assert "say --env-id gather:Gather to allow it" in run("--evaluate", model).stderr
    again = run("--evaluate", model, "--env-id", "gather:Gather", "--n-agents", "9")
    assert again.returncode == 0 and "| ppo_swarm | -" in again.stdout, again.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_has_the_two_commands():
    lines = README.splitlines()
    assert len(lines) <= 220
    assert [line.strip() for line in lines if "python3 -m venv" in line] == [*COMMANDS]
    assert next(line for line in lines if "python -m pytest" in line).strip() == COMMANDS[1]  # .ci/run takes this one


@page
def test_the_files_that_a_page_names_exist(page):
    for name in re.findall(r"`([\w/]+\.(?:py|txt))`|(?<!`)\b((?:benchmarks|docs)/\w+\.\w+)\b", PAGES[page]):
        path = name[0] or name[1]
        assert path in TEMPLATES or any((ROOT / folder / path).exists() for folder in (".", "benchmarks")), path


@page
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        other = (ROOT / page).parent / path if path else ROOT / page
        assert other.exists(), target
        if anchor:
            code_left_out = re.sub(r"```.*?```", "", other.read_text(), flags=re.DOTALL)
            heads = re.findall(r"^#+ (.*)$", code_left_out, re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, target


@page
def test_lines_of_prose_are_not_long(page):
    lines = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL).splitlines()
    long = [line for line in lines if len(line) > 120 and not line.startswith("|") and line.strip() not in COMMANDS]
    assert not long


def test_tables_name_every_script_every_page_and_every_benchmark():
    assert set(re.findall(r"^\| \[`(\w+\.py)`\]", README, re.MULTILINE)) == set(SCRIPTS)
    assert set(re.findall(r"^\| \[(\w+\.md)\]", README, re.MULTILINE)) == {path.name for path in ROOT.glob("docs/*.md")}
    listed = set(re.findall(r"^\| `(\w+\.py)` \|", PAGES[Path("docs/benchmarks.md")], re.MULTILINE))
    helpers = {"corridor.py", "sleepy.py", "async_paused.py", "common.py"}  # what they import or run
    assert listed == {path.name for path in ROOT.glob("benchmarks/*.py")} - helpers


def test_the_diff_that_is_shown_is_that_of_the_files():
    names = ("grpo_perep.py", "grpo_perstep.py")
    command = ["diff", "-u", *(f"--label={name}" for name in names), *names]
    assert shown("", "diff") == subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


def test_the_commands_that_are_shown_have_only_arguments_that_exist():
    flags = set()
    for text in PAGES.values():
        text = re.sub(r"\\\n\s*", "", text)  # lines that go on
        text = re.sub(r"(`[^`\n]*)\n([^`\n]*`)", r"\1 \2", text)  # commands broken within a sentence
        command = r"(?:python(?: gather\.py)?|torchrun --[\w -]+?(?: \S+:\d+)?) ((?:benchmarks/)?\w+\.py)([^`#\n;]*)"
        for script, rest in re.findall(command, text):
            flags |= {(script, flag) for flag in re.findall(r"(?<!\S)--([a-z0-9-]+)", rest)}
    shared = ROOT / "benchmarks" / "common.py"
    for script, flag in flags:
        if script in TEMPLATES:
            continue
        source, name = (ROOT / script).read_text(), flag.removeprefix("no-").replace("-", "_")
        if script.startswith("benchmarks/") and shared.exists():
            source += shared.read_text()
        assert re.search(rf"^    {name}: |\"--{flag}\"", source, re.MULTILINE), (script, flag)
    assert len(flags) > 40 and len({script for script, _ in flags}) > 8


def test_running_md_explains_every_flag_and_no_other():
    explained = set(re.findall(r"`--([a-z-]+)`", "\n".join(re.findall(r"^\| `--.*$", RUNNING, re.MULTILINE))))
    assert explained - {"no-"} == set.union(*map(fields, SCRIPTS.values()))


@page
def test_the_flags_that_are_named_in_text_exist(page):
    known = set.union(*map(fields, SCRIPTS.values()))
    sources = "".join(path.read_text() for path in ROOT.glob("benchmarks/*.py"))
    known |= set(re.findall(r"\"--([a-z0-9-]+)\"", sources))
    known |= {name.replace("_", "-") for name in re.findall(r"^    (\w+): ", sources, re.MULTILINE)}
    known |= {"", "help", "logdir"} | {"nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint"}  # torchrun's
    known |= {"dist", "loadscope-reorder"}  # pytest's
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", text):
        assert flag.removeprefix("no-") in known, flag


def test_running_md_explains_every_tag_and_no_other():
    sources = "".join([*SCRIPTS.values(), (ROOT / "envs.py").read_text()])
    logged = set(re.findall(r"\b((?:charts|losses)/\w+)", sources))
    assert len(logged) > 15
    explained = set(re.findall(r"`((?:charts|losses)/\w+)`", RUNNING))
    assert not logged - explained
    for tag in explained - logged:  # some names are put together
        name = tag.partition("/")[2]
        part, _, kind = name.partition("_")
        timed = f'run.clock("{part}")' in sources and f"charts/{{part}}_{kind}" in sources
        assert timed or re.search(rf"[\"']{name}[\"']", sources), tag
    for family in ("eval", "test", "episode"):
        assert f"`{family}/<" in RUNNING and re.search(rf"{family}/\{{", sources)


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------

IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        print(name)
    except SystemExit as error:  # of one that compares with something that is not here
        assert "pip install" in str(error), f"{name}: {error}"
"""


def test_every_benchmark_finds_what_it_takes_from_the_scripts():
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    command = [sys.executable, "-c", IMPORT_ALL, *names]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) >= len(names) - 3


def test_envs_gives_no_name_twice():
    # A kernel reads a global when it is first compiled, after the whole file: a second meaning would change the first.
    tree = ast.parse((ROOT / "envs.py").read_text())
    names = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    assert len(names) > 50 and len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)
