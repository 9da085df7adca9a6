"""No kernel reads or writes outside its arrays, however outlandish the state: compiled with bounds checks, it raises.

As installed, the kernels are compiled without, and would go on with whatever lies there.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PLAY = """
import envs

def play(steps, env_id, far=None, options=None, **env_kwargs):
    world = envs.make_vec(env_id, 3, 0, **env_kwargs)
    world.action_space.seed(0)
    world.reset(seed=0, options=options)
    if far:
        state = world.get_state()
        world.set_state(state | {"position": far * state["position"]})
    for _ in range(steps):
        world.step(world.action_space.sample())

"""
GAMES = {
    "Swarm": """
swarm = dict(n_agents=100, n_obstacles=20, box_size=20.0, max_steps=20)
play(30, "Swarm", **swarm)
play(3, "Swarm", far=-1e9, **swarm)
play(3, "Swarm", n_agents=100, speed=1e6, dt=1e6)
""",
    "LidarNavigation": """
play(30, "LidarNavigation", n_agents=20, max_steps=20)
play(3, "LidarNavigation", far=-1e9, n_agents=20)
play(30, "LidarNavigation", n_agents=12, n_obstacles=0, n_neighbors=4, rooms="3x2", max_steps=20)
play(3, "LidarNavigation", far=-1e9, n_agents=12, n_obstacles=0, rooms="3x2")
""",
    "VmasNavigation": """
play(30, "VmasNavigation", n_agents=10, max_steps=20)
""",
    "LunarLander": """
play(150, "LunarLander", enable_wind=True)
play(5, "LunarLander", options={"position": [[1e30, 5], [-1e6, -1e6], [10, -1e30]]})
""",
}

# All ways in which envs.py compiles, and a kernel that reads past the end of its array.
LEAVE = """
import sys

import numpy as np

import envs

@getattr(envs, sys.argv[1])
def entry(array, i):
    return array[i]

entry(np.zeros(3), 3)
"""


def start(code, folder, *arguments):
    (folder / "code.py").write_text(code)
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "code.py", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    """All at once, because most of the time goes into compiling."""
    games = {
        name: start(PLAY + code + "print('played')", tmp_path_factory.mktemp(name)) for name, code in GAMES.items()
    }
    yield games
    for process in games.values():  # those that no test has waited for
        process.kill()


@pytest.mark.parametrize("env_id", GAMES)
def test_no_kernel_leaves_its_arrays(games, env_id):
    output, errors = games[env_id].communicate()
    assert (games[env_id].returncode, output) == (0, "played\n"), errors


@pytest.mark.parametrize("decorator", ["kernel", "uncounted"])
def test_a_kernel_that_leaves_its_array_would_be_found(tmp_path, decorator):
    process = start(LEAVE, tmp_path, decorator)
    _, errors = process.communicate()
    assert process.returncode == 1 and "IndexError: index is out of bounds" in errors
