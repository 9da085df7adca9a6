"""StreamPool keeps its promises whatever its workers do: lag, deaths, exceptions, signals, and leaving nothing behind.

What an actor of async_ppo.py does in it, and what becomes of whole runs, is in test_async_ppo.py.
"""

import contextlib
import gc
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from running import ENVIRONMENT, alive, assert_soon_gone

import envs

SIZE = 3


def vector_of(version):
    return np.float32([version, -version, version % 7])


def make_buffer():
    return envs.shared_array((4 + SIZE,), np.float64)


def fill(pauses, seed, todo, published):
    """What workers do: write down who they are, how many buffers they filled before, and what they filled it by."""
    worker, starts = seed
    rng, vector = np.random.default_rng(starts), np.empty(SIZE, np.float32)
    for number, buffer in enumerate(todo):
        version = published.read(vector)
        buffer[...] = math.nan
        time.sleep(rng.uniform(0, 2) * pauses[worker])
        buffer[...] = (worker, starts, number, version, *vector)
        yield version


def pair(worker, starts):
    """What a worker is told as its seed: which it is, and how many were started before."""
    return worker, starts


def take(pool, count):
    """[(worker, buffer, lag)], as `StreamPool.take` has them."""
    return list(zip(*pool.take(count), strict=True))


@contextlib.contextmanager
def filling(num_workers, max_lag, produce=None, pause=0.0, slow_pause=None):
    """A pool, of which the first worker may be slower than the others."""
    pauses = [pause if slow_pause is None else slow_pause] + [pause] * (num_workers - 1)
    pool = envs.StreamPool(produce or partial(fill, pauses), num_workers, make_buffer, max_lag, pair)
    pool.start(vector_of(0), 0)
    try:
        yield pool
    finally:
        pool.close()
    assert not any(process.is_alive() for process in pool.processes.values())


def learn(pool, version):
    """What its user does with it between one `take` and the next."""
    pool.publish(vector_of(version), version)
    pool.release()


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join()


# ----------------------------------------------------------------------------------------------------------------------
# Lag
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_lag", [0, 1, 3])
@settings(deadline=None, derandomize=True, max_examples=5, phases=[Phase.generate])
@given(pause=st.floats(0, 0.002), slow_pause=st.floats(0, 0.02), busy=st.floats(0, 0.01))
def test_whatever_the_delays_a_buffer_is_of_the_version_it_says_and_that_is_not_older_than_max_lag(
    max_lag, pause, slow_pause, busy
):
    with filling(3, max_lag, pause=pause, slow_pause=slow_pause) as pool:
        numbers = {}
        for newest in range(16):
            discarded, taken = pool.discarded, take(pool, 3)
            held = [buffer.copy() for _, buffer, _ in taken]
            assert len({id(buffer) for _, buffer, _ in taken}) == len(taken) == 3
            for worker, buffer, lag in taken:
                assert 0 <= lag <= max_lag
                assert buffer[0] == worker and buffer[3] == newest - lag
                assert (buffer[4:] == vector_of(newest - lag)).all()
                # Each buffer once, and none left out but those that were too old
                skipped = buffer[2] - numbers.get(worker, -1) - 1
                assert skipped == 0 or 0 < skipped <= pool.discarded
                numbers[worker] = buffer[2]
            time.sleep(busy)
            for (_, buffer, _), copy in zip(taken, held, strict=True):  # nobody writes into what was not released
                assert (buffer == copy).all()
            learn(pool, newest + 1)
            assert pool.discarded >= discarded and (max_lag > 0 or pool.discarded == 0)


def test_a_slow_worker_holds_up_nobody_and_what_it_brings_too_late_is_thrown_away():
    with filling(3, 3, pause=0.005, slow_pause=1.0) as pool:
        start, owners = time.time(), []
        for version in range(1, 41):
            taken = take(pool, 3)
            owners += [owner for owner, _, _ in taken]
            assert max(lag for *_, lag in taken) <= 3
            learn(pool, version)
        assert owners.count(0) <= 4 and min(owners.count(i) for i in (1, 2)) >= 30
        assert time.time() - start < 0.3 * 40 * 1.0
        version, deadline = 40, time.time() + 30
        while not pool.discarded:  # the first slow buffer was begun with version 0
            assert time.time() < deadline
            take(pool, 3)
            version += 1
            learn(pool, version)


def test_without_a_lag_every_worker_brings_one_buffer_to_every_update():
    with filling(3, 0, pause=0.003, slow_pause=0.03) as pool:
        assert [len(buffers) for buffers in pool.buffers] == [1, 1, 1]
        for version in range(1, 11):
            taken = take(pool, 3)
            assert sorted(owner for owner, _, _ in taken) == [0, 1, 2] and {lag for *_, lag in taken} == {0}
            learn(pool, version)
        assert pool.discarded == 0


def test_versions_go_on_from_the_one_it_started_with():
    pool = envs.StreamPool(partial(fill, [0.0]), 1, make_buffer, 0, pair)
    pool.start(vector_of(41), 41)
    for version in (41, 42, 43):
        ((_, buffer, lag),) = take(pool, 1)
        assert lag == 0 and buffer[3] == version and (buffer[4:] == vector_of(version)).all()
        learn(pool, version + 1)
    pool.close()


def test_a_vector_is_read_whole_however_fast_the_next_are_published():
    size = 50_000  # copied in far more time than it takes to publish a small one

    def read(seed, todo, published):
        vector = np.empty(size, np.float32)
        for buffer in todo:
            versions = []
            for _ in range(1000):
                versions.append(published.read(vector))
                buffer[0] += np.count_nonzero(vector != versions[-1])  # an entry of another version
            buffer[1] = len(set(versions))
            assert versions == sorted(versions)
            yield versions[-1]

    pool = envs.StreamPool(read, 1, make_buffer, 10**9, pair)
    vector = np.zeros(size, np.float32)
    pool.start(vector, 0)
    version, deadline = 0, time.time() + 60
    while not multiprocessing.connection.wait(pool.channels.values(), 0):
        assert time.time() < deadline
        version += 1
        vector[...] = version
        pool.publish(vector, version)
    ((_, buffer, _),) = take(pool, 1)
    assert buffer[0] == 0 and buffer[1] > 1
    pool.close()


def test_workers_work_in_the_stage_that_was_set_last_and_so_does_who_replaces_a_dead_one(capsys):
    def tell(seed, todo, published):
        _, starts = seed
        for buffer in todo:
            buffer[:2] = starts, published.stage
            yield published.version

    pool = envs.StreamPool(tell, 1, make_buffer, 0, pair)
    pool.start(vector_of(0), 0, stage=2)
    try:
        seen = []
        for action in (None, lambda: pool.set_stage(5), lambda: kill(pool.processes[0])):
            if action:
                action()
                pool.release()
            ((_, buffer, _),) = take(pool, 1)
            seen.append((*buffer[:2],))
        assert seen == [(0, 2), (0, 5), (1, 5)]
    finally:
        pool.close()


# ----------------------------------------------------------------------------------------------------------------------
# Deaths and exceptions
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_lag", [0, 1])
def test_who_replaces_a_dead_worker_gets_its_free_buffers_and_a_number_of_its_own(capsys, max_lag):
    with filling(2, max_lag) as pool:
        before, later = {(*buffer[:3],) for _, buffer, _ in take(pool, 2)}, []
        dead = pool.processes[0]
        kill(dead)
        learn(pool, 1)
        for version in range(2, 10):
            taken = take(pool, 2)
            assert taken[0][1] is not taken[1][1]  # no buffer is in two hands
            later += [(owner, (*buffer[:3],)) for owner, buffer, _ in taken]
            learn(pool, version)
        assert pool.processes[0].pid != dead.pid
        assert max_lag > 0 or [owner for owner, _ in later].count(0) == 8
        assert not before & {noted for _, noted in later}
        assert {noted[1] for owner, noted in later if owner == 1} == {1}  # the other went on
        assert max_lag > 0 or {noted[1] for owner, noted in later if owner == 0} == {2}
    lost = "what it was filling is lost, another takes its place"
    assert f"worker process {dead.pid} died, with exit code -9: {lost}" in capsys.readouterr().out


def test_a_worker_that_dies_before_its_first_order_is_replaced_as_any_other(monkeypatch, capsys):
    Process = multiprocessing.context.ForkProcess
    start, born = Process.start, []

    def stillborn(self):
        start(self)
        born.append(self)
        if len(born) == 3:  # the first to be replaced
            self.kill()
            self.join()

    with filling(2, 0) as pool:
        born += pool.processes.values()
        monkeypatch.setattr(Process, "start", stillborn)
        take(pool, 2)
        kill(pool.processes[0])
        learn(pool, 1)
        assert sorted(owner for owner, _, _ in take(pool, 2)) == [0, 1]
        assert len(born) == 4 and not born[2].is_alive()
    assert capsys.readouterr().out.count("another takes its place") == 2


def test_what_a_dead_worker_left_is_kept_from_who_replaces_it_until_it_is_released():
    with filling(1, 1) as pool:
        time.sleep(0.5)  # both of its buffers are full
        kill(pool.processes[0])
        take(pool, 1)
        learn(pool, 1)
        taken = take(pool, 2)  # the other, and one of the new worker's
        copies = [buffer.copy() for _, buffer, _ in taken]
        time.sleep(0.3)
        assert taken[0][1] is not taken[1][1] and [copy[1] for copy in copies] == [0, 1]
        for (_, buffer, _), before in zip(taken, copies, strict=True):
            assert (buffer == before).all()


@pytest.mark.parametrize("seconds", [60.0, 0.0])
def test_only_deaths_in_quick_succession_are_an_error(monkeypatch, seconds):
    monkeypatch.setattr(envs, "DEATH_SECONDS", seconds)
    with filling(2, 0) as pool:
        for death in range(1, 6):
            kill(pool.processes[death % 2])
            learn(pool, death)
            if seconds and death == 3:
                with pytest.raises(RuntimeError, match="died, with exit code -9: the last of 3 within 60 seconds"):
                    take(pool, 2)
                return
            take(pool, 2)
        assert seconds == 0.0 and death == 5


def test_a_worker_that_ends_by_itself_has_died():
    def end(seed, todo, published):
        _, starts = seed
        next(todo)
        if starts == 1:
            os._exit(3)
        yield published.version

    with filling(2, 0, end) as pool, pytest.raises(RuntimeError, match="died, with exit code [03]: the last of 3"):
        for version in range(1, 9):
            take(pool, 2)
            learn(pool, version)


@pytest.mark.parametrize("error", [ArithmeticError("the moon is made of cheese"), SystemExit(0), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [0, 3])
def test_an_exception_in_a_worker_is_raised_by_take_with_its_traceback(error, at):
    def fail(seed, todo, published):
        worker, _ = seed
        if worker == 1 and at == 0:  # before its first order
            raise error
        for number, _ in enumerate(todo):
            if worker == 1 and number == at:
                raise error
            yield published.version

    with filling(2, 0, fail) as pool:
        for version in range(1, at + 1):
            take(pool, 2)
            learn(pool, version)
        with pytest.raises(RuntimeError) as caught:
            take(pool, 2)
        others = [process.pid for process in pool.processes.values()]
    message = str(caught.value)
    assert message.startswith("worker 1 failed:\nTraceback") and ", in fail\n    raise error\n" in message
    assert type(error).__name__ in message and str(error) in message
    assert_soon_gone(others)


# ----------------------------------------------------------------------------------------------------------------------
# Closing
# ----------------------------------------------------------------------------------------------------------------------


def closing(notes, seconds, seed, todo, published):
    """Note, once told to stop, that there was time to close what it has."""
    with contextlib.closing(notes) as notes:
        for number, _ in enumerate(todo):
            if number:
                time.sleep(seconds)
            yield published.version


class Notes:
    def __init__(self):
        self.closed = envs.shared_array((1,), np.int64)

    def close(self):
        self.closed[0] = os.getpid()


@pytest.mark.parametrize("seconds", [0.0, 0.5], ids=["waiting", "filling"])
def test_workers_close_what_they_have_whether_they_wait_or_fill(seconds):
    notes = Notes()
    with filling(1, 1, partial(closing, notes, seconds)) as pool:
        take(pool, 1)
        time.sleep(0.2)
        pid = pool.processes[0].pid
    assert notes.closed[0] == pid and not alive(pid)


def test_a_worker_that_does_not_end_in_time_is_killed_and_all_that_it_held_is_gone():
    before, notes = held(), Notes()
    start = time.time()
    with filling(2, 1, partial(closing, notes, 600.0)) as pool:
        take(pool, 2)
        pids = [process.pid for process in pool.processes.values()]
        time.sleep(0.2)
    assert time.time() - start < envs.CLOSE_SECONDS + 5 and notes.closed[0] == 0
    assert not any(map(os.path.exists, (f"/proc/{pid}" for pid in pids)))  # not even as zombies
    pool.close()  # once more does no harm
    del pool, notes
    assert held() == before


def held():
    """How many descriptors and arrays in shared memory this process has."""
    gc.collect()
    with open("/proc/self/maps") as maps:
        return len(os.listdir("/proc/self/fd")), sum("/dev/zero" in line for line in maps)


def test_pools_that_were_closed_keep_no_descriptors_and_no_shared_memory():
    before = held()
    for _ in range(5):
        with filling(3, 1) as pool:
            take(pool, 3)
            during = held()
            kill(pool.processes[1])
            for version in range(1, 4):
                learn(pool, version)
                take(pool, 3)
            take(pool, 4)
        gc.disable()  # nothing has to be found by the collector
        del pool
        gc.enable()
        assert during[0] > before[0] and during[1] == before[1] + 6 + 2
        assert held() == before


def test_a_pool_that_nobody_has_any_more_ends_its_workers():
    pool = envs.StreamPool(partial(fill, [0.0, 0.0]), 2, make_buffer, 1, pair)
    pool.start(vector_of(0), 0)
    take(pool, 1)
    pids = [process.pid for process in pool.processes.values()]
    del pool
    gc.collect()
    assert not any(map(alive, pids))


def test_a_copy_in_another_fork_is_not_the_pool():
    with filling(2, 0) as pool:
        take(pool, 2)
        child = os.fork()
        if child == 0:
            pool.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        learn(pool, 1)
        assert sorted(owner for owner, _, _ in take(pool, 2)) == [0, 1] and pool.starts == 2


ALONE = """
import os, signal, sys, time
import numpy as np
import envs

def fill(seed, todo, published):
    for number, _ in enumerate(todo):
        if number:
            time.sleep(600)
        yield published.version

pool = envs.StreamPool(fill, 2, lambda: envs.shared_array((1,), np.int64), 1, lambda worker, starts: worker)
pool.start(np.zeros(1, np.float32), 0)
pool.take(2)
print(*(process.pid for process in pool.processes.values()), flush=True)
"""


@pytest.mark.parametrize(
    "end, code",
    [
        ("", 0),
        ("raise ValueError", 1),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("[os.kill(p.pid, signal.SIGSTOP) for p in pool.processes.values()]", 0),
    ],
    ids=["end", "exception", "SIGTERM", "SIGKILL", "stopped"],
)
def test_however_a_process_ends_its_workers_are_soon_gone_even_in_the_middle_of_a_buffer(end, code):
    start = time.time()
    run = subprocess.run(
        [sys.executable, "-c", f"{ALONE}\n{end}"], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, timeout=100
    )
    pids = [int(pid) for pid in run.stdout.split()]
    assert run.returncode == code and len(pids) == 2 and time.time() - start < 100
    assert_soon_gone(pids)


# ----------------------------------------------------------------------------------------------------------------------
# Signals
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_worker_changes_nothing(number):
    with filling(2, 0, pause=0.01) as pool:
        for version in range(1, 6):
            take(pool, 2)
            for process in pool.processes.values():
                os.kill(process.pid, number)
            learn(pool, version)
        assert [buffer[2] for _, buffer, _ in take(pool, 2)] == [5, 5] and pool.starts == 2


def test_programs_that_a_worker_starts_ignore_no_signals():
    def start(seed, todo, published):
        for buffer in todo:
            status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
            masks = dict(line.split(":", 1) for line in status.splitlines())
            for i, name in enumerate(("SigIgn", "SigBlk")):
                mask = int(masks[name], 16)
                buffer[i] = any(mask >> (number - 1) & 1 for number in envs.SIGNALS)
            buffer[2] = 1
            yield published.version

    with filling(1, 0, start) as pool:
        ((_, buffer, _),) = take(pool, 1)
        assert buffer[:3].tolist() == [0, 0, 1]
