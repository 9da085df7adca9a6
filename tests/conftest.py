import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# A shell ignores SIGINT in what it starts in the background, and every process of these tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest.register_assert_rewrite("running")  # its assertions, too, say what they found


@pytest.fixture(scope="session")
def nest():
    """The process that all runs of a session are forked from."""
    from running import Nest

    nest = Nest()
    yield nest
    nest.close()
