import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# A shell ignores SIGINT in what it starts in the background, and every process of these tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest.register_assert_rewrite("running")  # its assertions, too, say what they found


def pytest_configure(config):
    """Have the kernels compiled before the workers of pytest-xdist start, or each of these would compile them."""
    if not getattr(config.option, "numprocesses", None) or hasattr(config, "workerinput"):
        return
    code = "import sys, envs; envs.compile_kernels(envs.make_vec(sys.argv[1], 1, num_workers=0))"
    compiling = [
        subprocess.Popen([sys.executable, "-c", code, env_id], cwd=ROOT)
        for env_id in ("Swarm", "LidarNavigation", "VmasNavigation", "LunarLander")
    ]
    for process in compiling:
        process.wait()


@pytest.fixture(scope="session")
def nest():
    """The process that all runs of a session are forked from."""
    from running import Nest

    nest = Nest()
    yield nest
    nest.close()
