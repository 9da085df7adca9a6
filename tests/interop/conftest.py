"""Clients that are too large for every test run. `pytest tests` leaves these files out where they are not installed:

python3 -m venv .venv-interop
.venv-interop/bin/pip install -r requirements.txt -r tests/requirements.txt -r tests/interop/requirements.txt
.venv-interop/bin/python -m pytest tests/interop
"""

from importlib.util import find_spec

collect_ignore = [f"test_{client}.py" for client in ("torchrl", "skrl") if find_spec(client) is None]
