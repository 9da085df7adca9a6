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
    for name in re.findall(r"`([\w/]+\.(?:py|txt))`|(?<!`)\b(benchmarks/\w+\.py)\b", README):
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
    sys.path.insert(0, str(ROOT))
    from ppo_swarm import Args

    flags = {flag.replace("-", "_") for flag in re.findall(r"ppo_swarm\.py[^\n]*?--([a-z-]+)", README)}
    assert len(flags) >= 3 and flags <= set(Args.__dataclass_fields__)


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
