"""A step in which nobody gets on is ended, and whoever the others waited for is named; with stand-ins for processes."""

import os
import threading
import time
import weakref
from types import SimpleNamespace

import psutil
import pytest

from nanovllm.engine import watchdog, workers
from nanovllm.engine.parallel_runner import ParallelRunner
from nanovllm.engine.watchdog import Watchdog
from nanovllm.engine.workers import Workers
from nanovllm.utils.parallel import TensorParallel


class Process:
    """Stands in for one that runs until `end`; killing it is noted and no more, as if a driver held it."""

    def __init__(self, pid: int):
        self.pid, self.is_killed = pid, False
        self.sentinel, self._other_end = os.pipe()

    def kill(self) -> None:
        self.is_killed = True

    def end(self) -> None:
        os.close(self._other_end)


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr(watchdog, "INTERVAL", 0.01)
    monkeypatch.setattr(watchdog, "_is_stopped", lambda pid: False)
    return [Process(pid) for pid in (101, 102, 103)]


def wait_until(condition) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def has_ended(dog: Watchdog) -> bool:
    return wait_until(lambda: not dog._thread.is_alive())


@pytest.mark.parametrize(
    ("progress", "stopped", "expected"),
    [
        ([7, 7, 6, 7], [], "rank 2 hangs"),
        ([6, 7, 7, 7], [], "rank 0 hangs"),
        ([7, 6, 6, 7], [], "one of ranks 1, 2 hangs"),
        ([7, 7, 7, 7], [103], "rank 3 hangs"),  # in the middle of a collective
        ([7, 6, 7, 7], [103], "rank 3 hangs"),
    ],
)
def test_the_rank_that_is_stopped_or_behind_is_named_and_all_are_killed(
    processes, monkeypatch, progress, stopped, expected
):
    monkeypatch.setattr(watchdog, "_is_stopped", lambda pid: pid in stopped)
    aborted = threading.Event()
    dog = Watchdog(processes, progress, timeout=0.1)
    dog.abort, dog.is_stepping = aborted.set, True
    assert has_ended(dog) and aborted.is_set()  # also where killing does not end the processes
    assert dog.verdict.startswith(f"tensor-parallel {expected}: a step made no progress for 0.1 s")
    assert all(process.is_killed for process in processes)


def test_progress_of_any_rank_and_the_time_between_steps_are_no_hanging(processes):
    progress = [0, 0, 0, 0]
    dog = Watchdog(processes, progress, timeout=0.3)
    for is_stepping in (True, False, True):
        dog.is_stepping = is_stepping
        deadline = time.monotonic() + 0.6
        while time.monotonic() < deadline:
            progress[3] += is_stepping
            time.sleep(0.005)
    dog.end()
    assert dog.verdict is None and not any(process.is_killed for process in processes)


def test_only_time_in_which_the_watchdog_looks_counts(processes):
    """A terminal's Ctrl-Z stops all ranks; when they go on, hours may have passed."""
    looks = iter([False] * 20 + [True])
    dog = Watchdog(processes, [0] * 4, timeout=0.5)  # 50 looks of 0.01 s
    dog._is_told_to_end = SimpleNamespace(wait=lambda seconds: time.sleep(0.05) or next(looks))
    dog.is_stepping = True
    assert has_ended(dog) and dog.verdict is None  # after a second of the clock


def test_the_end_of_a_process_breaks_off_what_rank_0_waits_for(processes):
    aborted = threading.Event()
    dog = Watchdog(processes, [0] * 4, timeout=60)
    processes[1].end()
    time.sleep(0.05)  # before there is anything to break off
    dog.abort = aborted.set
    assert aborted.wait(10) and has_ended(dog)
    assert dog.verdict is None and not any(process.is_killed for process in processes)


def test_no_thread_is_left_after_the_end_from_whichever_thread_it_comes(processes):
    dog = Watchdog(processes, [0] * 4, timeout=60)
    dog.end()
    dog.end()
    assert not dog._thread.is_alive()
    dog = Watchdog(processes, [0] * 4, timeout=60)
    processes[0].end()
    dog.abort = dog.end  # as when garbage is collected there
    assert has_ended(dog)


def test_a_stopped_process_is_told_from_one_that_waits_or_is_gone():
    assert not watchdog._is_stopped(os.getpid())
    process = psutil.Popen(["sleep", "60"])
    try:
        process.suspend()
        assert wait_until(lambda: watchdog._is_stopped(process.pid))
    finally:
        process.kill()
        process.wait()
    assert not watchdog._is_stopped(process.pid)


def test_ranks_are_taken_down_in_the_order_graphs_communicators_watchdog_processes_directory(monkeypatch):
    """Graphs hold communicators, and what waits for one must be broken off before the processes can end."""
    events = []

    class Graphs:
        pass

    class Worker:
        pid, sentinel = 1, os.pipe()[0]
        join = close = is_alive = lambda *args: False

        def kill(self):
            events.append("processes")

    remove, end = workers.shutil.rmtree, Watchdog.end
    monkeypatch.setattr(workers.shutil, "rmtree", lambda *args, **kw: events.append("directory") or remove(*args, **kw))
    monkeypatch.setattr(Watchdog, "end", lambda dog: end(dog) or events.append("watchdog"))
    monkeypatch.setattr(TensorParallel, "abort", lambda tp: events.append("communicators"))
    runner = object.__new__(ParallelRunner)
    runner.graphs, runner.tp, runner.workers = Graphs(), TensorParallel(0, 2), Workers(1, 60.0, print)
    runner.workers._processes.append(Worker())
    weakref.finalize(runner.graphs, events.append, "graphs")
    directory = runner.workers.rendezvous.parent
    runner.close()
    assert events == ["graphs", "communicators", "watchdog", "processes", "directory"]
    assert not directory.exists()
