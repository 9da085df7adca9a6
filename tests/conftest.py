import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# A shell ignores SIGINT in what it starts in the background, and every process of these tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
