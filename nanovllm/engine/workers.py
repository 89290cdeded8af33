"""Processes beside the caller's, one for each further rank: how they start, hear of calls, fail and end.

Calls go one way, through shared memory. Nothing comes back but, through a pipe for each worker, that it is up, and
what it failed of. Knows nothing of models.
"""

import math
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.shared_memory import SharedMemory
from multiprocessing.synchronize import Semaphore
from pathlib import Path

from tqdm import tqdm

CAPACITY = 2**16  # bytes of a message in shared memory at a time; a longer one goes in parts
HEADER = 8  # bytes before it, in which stands how many are left
NOTICE_SECONDS = 3.0  # by when a worker that broke a collective has ended or said why
ORPHAN_SECONDS = 0.5  # in which a worker whose collective broke finds out that the parent has ended
SETTLE_SECONDS = 0.3  # between the first failure noticed and the look at who was first
REPORT_LENGTH = 2**14  # characters of a traceback's end; a pipe takes them without anyone reading
EXIT_SECONDS = 3.0  # for workers to end: by themselves, then terminated, then killed

MAIN_GUARD = (
    'A script that makes an LLM with tensor_parallel_size > 1 must do so under `if __name__ == "__main__":`, because '
    "each further rank is a new process that imports the script."
)


class WorkerError(RuntimeError):
    """A worker has failed; the message has its rank and its traceback or exit code."""


class Channel:
    """One worker's end of the shared memory. Pickled to it once, when it starts."""

    def __init__(self, name: str, is_written: Semaphore, is_read: Semaphore):
        self._name = name
        self.is_written, self.is_read = is_written, is_read
        self._memory: SharedMemory | None = None

    def receive(self) -> tuple:
        """Waits for the next message."""
        if self._memory is None:
            self._memory = SharedMemory(self._name)
        data = bytearray()
        num_left = 1
        while num_left > 0:
            self.is_written.acquire()
            num_left = int.from_bytes(self._memory.buf[:HEADER], "little")
            data += self._memory.buf[HEADER : HEADER + min(num_left, CAPACITY)]
            num_left -= CAPACITY
            self.is_read.release()
        return pickle.loads(data)


class Workers:
    """Ranks 1 and up, started with the `spawn` method.

    Args:
        size: Number of ranks, the caller's rank 0 included.
        work: Called in each worker as `work(rank, receive, rendezvous, *args)`; ends when the worker is to end.
        args: Must be picklable.

    Raises:
        RuntimeError: A worker failed while it started, or this process is itself one that is being started.
    """

    def __init__(self, size: int, work: Callable[..., None], *args: object):
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise RuntimeError(MAIN_GUARD)
        context = multiprocessing.get_context("spawn")
        self._directory = Path(tempfile.mkdtemp(prefix="nanovllm-"))
        self.rendezvous = self._directory / "rendezvous"
        self._processes: list[SpawnProcess] = []
        self._pipes: list[Connection] = []
        self._channels: list[Channel] = []
        self._memory = SharedMemory(create=True, size=HEADER + CAPACITY)
        self._finalizer = weakref.finalize(
            self, _shut_down, os.getpid(), self._processes, self._pipes, self._channels, self._memory, self._directory
        )
        try:
            for rank in range(1, size):
                pipe, theirs = context.Pipe(duplex=False)
                channel = Channel(self._memory.name, context.Semaphore(0), context.Semaphore(1))
                process = context.Process(
                    target=_main,
                    args=(rank, theirs, channel, self.rendezvous, work, args),
                    name=f"nanovllm rank {rank}",
                    daemon=True,
                )
                self._pipes.append(pipe)
                self._channels.append(channel)
                process.start()
                self._processes.append(process)
                theirs.close()
            starting = set(self._pipes)
            while starting:  # reading "it is up", or finding the pipe closed
                for pipe in wait(list(starting)):
                    starting.remove(pipe)
                    if _read(pipe) != "up":
                        raise self._failure()
        except BaseException:
            self.close(gently=False)
            raise

    def publish(self, *message: object, patience: float = math.inf) -> None:
        """Sends a message to every worker, and returns before they have read all of it.

        Args:
            message: Must be picklable.
            patience: Seconds to wait for workers that are still busy with the message before.

        Raises:
            WorkerError: A worker has failed, or was busy for too long.
        """
        data = pickle.dumps(message, protocol=5)
        deadline = time.monotonic() + patience
        for start in range(0, len(data), CAPACITY):
            part = data[start : start + CAPACITY]
            for channel in self._channels:
                while not channel.is_read.acquire(timeout=0.1):
                    self.raise_if_failed()
                    if time.monotonic() > deadline:
                        raise WorkerError(f"a tensor-parallel rank did not listen for {patience} s")
            self.raise_if_failed()
            self._memory.buf[:HEADER] = (len(data) - start).to_bytes(HEADER, "little")
            self._memory.buf[HEADER : HEADER + len(part)] = part
            for channel in self._channels:
                channel.is_written.release()

    @property
    def sentinels(self) -> list[int]:
        """What `multiprocessing.connection.wait` can wait on: each is ready once its worker has ended."""
        return [process.sentinel for process in self._processes]

    def raise_if_failed(self) -> None:
        """Raises WorkerError if a worker has ended."""
        if wait(self.sentinels, timeout=0):
            raise self._failure()

    def raise_if_killed(self) -> None:
        """Raises WorkerError if a worker was ended by a signal, and not by what rank 0 will find out too."""
        if any((process.exitcode or 0) < 0 for process in self._processes):
            raise self._failure()

    def cause_of(self, error: BaseException) -> BaseException:
        """What rank 0 failed of while all worked together: a worker's failure, if there is one, else `error` itself."""
        is_broken_collective = isinstance(error, RuntimeError) and not isinstance(error, WorkerError)
        return self._failure() if is_broken_collective and wait(self.sentinels, NOTICE_SECONDS) else error

    def close(self, gently: bool = True) -> None:
        """Ends the workers and removes everything they used. Idempotent.

        Args:
            gently: Let them end by themselves; they must be waiting for a message.
        """
        if gently and self._finalizer.alive:
            with suppress(WorkerError):
                self.publish("exit", patience=EXIT_SECONDS)
                _join(self._processes)
        self._finalizer()

    def _failure(self) -> WorkerError:
        """The failure that came first, once a worker has ended or is about to."""
        wait(self.sentinels, NOTICE_SECONDS)
        time.sleep(SETTLE_SECONDS)  # one that is killed breaks the collectives of the others, who may report first
        reports = []
        for rank, (process, pipe) in enumerate(zip(self._processes, self._pipes, strict=False), 1):
            while (report := _read(pipe)) == "up":
                pass
            if report is not None:
                reports.append((*report, rank))
            elif process.exitcode is not None:
                code = process.exitcode
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                hint = f" before it was up; it printed why. {MAIN_GUARD}" if code == 1 else ""
                return WorkerError(f"tensor-parallel rank {rank} {how}{hint}")
        if not reports:
            return WorkerError("a tensor-parallel rank ended without saying why")
        _, text, rank = min(reports)
        return WorkerError(f"tensor-parallel rank {rank} failed:\n{text}")


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Lets a Ctrl-C take effect at the end of the block, so that it does not break off what all ranks do together."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is None:  # None: the handler is not Python's, leave it alone
        yield
        return
    held: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held:
            signal.raise_signal(signal.SIGINT)


def _main(
    rank: int, pipe: Connection, channel: Channel, rendezvous: Path, work: Callable[..., None], args: tuple
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to every process; rank 0 decides
    threading.Thread(target=_end_with_parent, args=(rendezvous.parent,), daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is a named semaphore, which a process that is killed leaves behind
    pipe.send("up")
    try:
        work(rank, channel.receive, rendezvous, *args)
        os._exit(0)  # nothing is left to do, and Python would take a second to see that
    except BaseException:
        with suppress(OSError):
            pipe.send((time.time(), traceback.format_exc()[-REPORT_LENGTH:]))
        if wait([multiprocessing.parent_process().sentinel], ORPHAN_SECONDS):
            shutil.rmtree(rendezvous.parent, ignore_errors=True)  # what failed was the parent
        os._exit(1)  # soon: the others wait for this rank


def _end_with_parent(directory: Path) -> None:
    wait([multiprocessing.parent_process().sentinel])
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(1)


def _read(pipe: Connection) -> object:
    """The next message, None if there is none."""
    with suppress(EOFError, OSError):
        return pipe.recv() if pipe.poll() else None
    return None


def _shut_down(
    owner: int,
    processes: list[SpawnProcess],
    pipes: list[Connection],
    channels: list[Channel],
    memory: SharedMemory,
    directory: Path,
) -> None:
    """Ends the workers that are left, and frees what they shared. Not in a forked child of the owner."""
    if os.getpid() != owner:
        return
    for end in (SpawnProcess.terminate, SpawnProcess.kill):
        for process in processes:
            if process.is_alive():
                end(process)
        _join(processes)
    for closable in (*processes, *pipes, memory):
        closable.close()
    memory.unlink()
    channels.clear()  # the last references to the semaphores, which go with them
    shutil.rmtree(directory, ignore_errors=True)


def _join(processes: list[SpawnProcess]) -> None:
    deadline = time.monotonic() + EXIT_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
