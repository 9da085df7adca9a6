"""async_ppo.py, with its own flags, whose actors stand still during every evaluation: for two of the races."""

import multiprocessing
import os
import runpy
import signal

from common import ROOT

import envs

evaluate = envs.evaluate


def evaluate_alone(*args, **kwargs):
    children = multiprocessing.active_children()  # whatever pool they belong to
    for child in children:
        os.kill(child.pid, signal.SIGSTOP)
    try:
        return evaluate(*args, **kwargs)
    finally:
        for child in children:
            os.kill(child.pid, signal.SIGCONT)


if __name__ == "__main__":
    envs.evaluate = evaluate_alone
    runpy.run_path(str(ROOT / "async_ppo.py"), run_name="__main__")
