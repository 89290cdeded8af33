"""Processes beside the caller's, one for each further rank: how they start, hear of calls, fail and end.

Calls go one way, through shared memory. Nothing comes back but how far each worker is, and what the first to fail
failed of. Knows nothing of models.
"""

import ctypes
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path

from tqdm import tqdm

from nanovllm.engine.watchdog import Watchdog

CAPACITY = 2**16  # bytes of a message in shared memory at a time; a longer one goes in parts
REPORT_LENGTH = 2**14  # characters of a traceback's end
NOTICE_SECONDS = 3.0  # by when a worker that broke a collective has ended
ORPHAN_SECONDS = 0.5  # in which a worker whose collective broke finds out that the parent has ended
SETTLE_SECONDS = 0.3  # between the first failure noticed and the look at who was first
EXIT_SECONDS = 3.0  # for a worker that is killed to be gone; one that a driver holds may not go

MAIN_GUARD = (
    "A script that makes an LLM with tensor_parallel_size or data_parallel_size > 1 must do so under "
    '`if __name__ == "__main__":`, because each rank and each replica is a new process that imports the script.'
)


def check_main_guard() -> None:
    """Raises RuntimeError if this process is itself one that is being started."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(MAIN_GUARD)


class WorkerError(RuntimeError):
    """A worker has failed; the message has its rank and its traceback or exit code."""


class Channel:
    """What all ranks share: one message at a time, how far each is, and the report of the first that failed."""

    def __init__(self, context: SpawnContext, num_workers: int):
        self.message = context.RawArray(ctypes.c_char, CAPACITY)
        self.num_left = context.RawValue(ctypes.c_int64)  # bytes of the message that are not read yet
        self.is_written = [context.Semaphore(0) for _ in range(num_workers)]
        self.is_read = context.Semaphore(0)  # once by each worker, also when it is up and ready for a first message
        self.report = context.RawArray(ctypes.c_char, 5 * REPORT_LENGTH)  # a character has up to 4 bytes
        self.has_report = context.Lock()
        self.progress = context.RawArray(ctypes.c_int64, num_workers + 1)  # of each rank, the collectives it has begun

    def receive(self, rank: int) -> tuple:
        """Waits for the next message to worker `rank`."""
        data, num_left = b"", 1
        while num_left > 0:
            self.is_written[rank - 1].acquire()
            data += self.message[: self.num_left.value]
            num_left = self.num_left.value - CAPACITY
            self.is_read.release()
        return pickle.loads(data)

    def counter(self, rank: int) -> Callable[[], None]:
        """What a rank calls whenever it begins a collective."""
        progress = self.progress

        def count() -> None:
            progress[rank] += 1

        return count


class Workers:
    """Ranks 1 to `size` - 1, started with the `spawn` method. They end with this object.

    Each calls `work(rank, channel, rendezvous, *args)`, with picklable `args`, which serves until the worker is ended.
    `timeout` is the watchdog's. RuntimeError if this process is itself one that is being started.
    """

    def __init__(self, size: int, timeout: float, work: Callable[..., None], *args: object):
        context = multiprocessing.get_context("spawn")
        self._channel = Channel(context, size - 1)
        self._processes: list[SpawnProcess] = []
        directory = Path(tempfile.mkdtemp(prefix="nanovllm-"))
        self.rendezvous = directory / "rendezvous"
        self.count = self._channel.counter(0)
        self.watchdog = Watchdog(self._processes, self._channel.progress, timeout)
        owned = self.watchdog, self._processes, self._channel, directory
        self._finalizer = weakref.finalize(self, _shut_down, os.getpid(), *owned)
        for rank in range(1, size):
            main_args = (rank, self._channel, self.rendezvous, work, args)
            process = context.Process(target=_main, args=main_args, name=f"nanovllm rank {rank}", daemon=True)
            process.start()
            self._processes.append(process)

    def publish(self, *message: object) -> None:
        """Sends all workers a picklable message; returns before they have read all of it. WorkerError if one failed."""
        channel, data = self._channel, pickle.dumps(message, protocol=5)
        for start in range(0, len(data), CAPACITY):
            for _ in self._processes:
                while not channel.is_read.acquire(timeout=0.1):
                    self.raise_if_failed()
            self.raise_if_failed()
            part = data[start : start + CAPACITY]
            memoryview(channel.message).cast("B")[: len(part)] = part
            channel.num_left.value = len(data) - start
            for is_written in channel.is_written:
                is_written.release()

    def raise_if_failed(self) -> None:
        """Raises WorkerError if a worker has ended, or hung."""
        if self._has_failed(timeout=0):
            raise self._failure()

    def raise_if_killed(self) -> None:
        """Raises WorkerError if a worker was ended by a signal, and not by what rank 0 will find out too."""
        if any((process.exitcode or 0) < 0 for process in self._processes):
            raise self._failure()

    def cause_of(self, error: BaseException) -> BaseException:
        """What rank 0 failed of while all worked together: a worker's failure, if there is one, else `error` itself."""
        is_broken_collective = isinstance(error, RuntimeError) and not isinstance(error, WorkerError)
        return self._failure() if is_broken_collective and self._has_failed(NOTICE_SECONDS) else error

    def close(self) -> None:
        """Ends the workers and removes everything they used. Idempotent."""
        self._finalizer()

    def _has_failed(self, timeout: float) -> bool:
        """Whether a worker has ended, or does within so many seconds, or hangs."""
        return bool(self.watchdog.verdict or wait([process.sentinel for process in self._processes], timeout))

    def _failure(self) -> WorkerError:
        """The failure that came first, once there is one."""
        if self.watchdog.verdict:
            return WorkerError(self.watchdog.verdict)
        time.sleep(SETTLE_SECONDS)  # one that is killed breaks the collectives of the others, who may report first
        report = self._channel.report.value.decode(errors="replace")
        for rank, code in enumerate([process.exitcode for process in self._processes], 1):
            if code is not None and not (code == 1 and report):
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                hint = f" before it was up; it printed why. {MAIN_GUARD}" if code == 1 else ""
                return WorkerError(f"tensor-parallel rank {rank} {how}{hint}")
        return WorkerError(report)


def _main(rank: int, channel: Channel, rendezvous: Path, work: Callable[..., None], args: tuple) -> None:
    begin_child(rendezvous.parent)
    channel.is_read.release()
    try:
        work(rank, channel, rendezvous, *args)
    except BaseException:
        if channel.has_report.acquire(block=False):
            report = f"tensor-parallel rank {rank} failed:\n{traceback.format_exc()[-REPORT_LENGTH:]}"
            channel.report.value = report.encode(errors="replace")
        time.sleep(ORPHAN_SECONDS)  # in which `_end_with_parent` ends this process, if what failed was the parent
        os._exit(1)  # soon: the others wait for this rank


def begin_child(directory: Path | None = None) -> None:
    """What a process that was spawned does first: it will end with its parent, and then remove `directory`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to every process; the parent decides
    threading.Thread(target=_end_with_parent, args=(directory,), daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is a named semaphore, which a process that is killed leaves behind


def _end_with_parent(directory: Path | None) -> None:
    wait([multiprocessing.parent_process().sentinel])
    if directory is not None:
        shutil.rmtree(directory, ignore_errors=True)
    os._exit(1)


def _shut_down(
    owner: int, watchdog: Watchdog, processes: list[SpawnProcess], channel: Channel, directory: Path
) -> None:
    """Ends the workers that are left, which have nothing to save. Not in a forked child of the owner."""
    if os.getpid() != owner:
        return
    watchdog.end()
    for process in processes:
        process.kill()
    for process in processes:
        process.join(EXIT_SECONDS)
    for process in processes:
        if not process.is_alive():
            process.close()
    vars(channel).clear()  # the last references to the semaphores, which go with them
    shutil.rmtree(directory, ignore_errors=True)
