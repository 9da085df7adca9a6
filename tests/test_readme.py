"""What the README shows works as shown."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_training_loop_of_ones_own_learns(tmp_path):
    _, code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "own.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = subprocess.run(
        [sys.executable, "own.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout
    lengths = [float(length) for length in re.findall(r"mean length (\d+)", output)]
    assert len(lengths) == 30
    assert max(lengths[-5:]) > 5 * lengths[0]


def test_an_environment_of_ones_own_is_trained_on(tmp_path):
    code, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "reach.py").write_text(code)
    for name in ("envs.py", "async_ppo.py"):
        shutil.copy(ROOT / name, tmp_path)
    (flags,) = re.findall(r"python async_ppo.py (--env-id reach:\S+ .*)", README)
    output = subprocess.run(
        [sys.executable, "async_ppo.py", *flags.split()], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    trained, random = (float(re.search(rf"\| {name} \| (-[\d.]+)", output)[1]) for name in ("async_ppo", "random"))
    assert random < -100 and trained > -15


def test_the_files_that_the_readme_names_exist():
    for name in re.findall(r"`([\w/]+\.(?:py|txt))`|(?<!`)\b((?:benchmarks|docs)/\w+\.\w+)\b", README):
        assert (ROOT / (name[0] or name[1])).exists(), name


def test_the_lines_of_each_script_are_those_that_the_readme_counts():
    counts = dict(re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", README, re.MULTILINE))
    scripts = {path.name for path in ROOT.glob("*.py")} - {"envs.py"}
    assert counts == {name: str(len((ROOT / name).read_text().splitlines())) for name in scripts}


def test_the_diff_that_the_readme_shows_is_that_of_the_files():
    (shown,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    names = ("grpo_perep.py", "grpo_perstep.py")
    command = ["diff", "-u", *(f"--label={name}" for name in names), *names]
    assert shown == subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


def test_the_commands_that_the_readme_shows_have_only_arguments_that_exist():
    text = re.sub(r"\\\n\s*", "", README)  # lines that go on
    text = re.sub(r"(`[^`\n]*)\n([^`\n]*`)", r"\1 \2", text)  # commands broken within a sentence
    shown = re.findall(r"(?:python|torchrun --[\w -]+?) ((?:benchmarks/)?\w+\.py)([^`#\n]*)", text)
    flags = {(script, flag) for script, rest in shown for flag in re.findall(r"(?<!\S)--([a-z0-9-]+)", rest)}
    for script, flag in flags:
        source, name = (ROOT / script).read_text(), flag.removeprefix("no-").replace("-", "_")
        assert re.search(rf"^    {name}: |\"--{flag}\"", source, re.MULTILINE), (script, flag)
    assert len(flags) > 40 and len({script for script, _ in flags}) > 8


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
