"""Notices when a rank ends or hangs, so that the others do not wait for it for ever. Knows nothing of their work."""

import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess

import psutil

INTERVAL = 0.1  # seconds from one look to the next
END_SECONDS = 3.0  # for the thread to end; a driver that hangs may keep it in `abort`
STOPPED = psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_DISK_SLEEP


class Watchdog:
    """A thread that watches `processes`, ranks 1 and up, until one of them ends or hangs, or `end` is called.

    One hangs if a step is under way and for `timeout` seconds no rank's count in `progress` has moved: then all are
    killed, and `verdict` names the one that the others waited for. After either, `abort` ends what rank 0 waits for.
    """

    def __init__(self, processes: list[SpawnProcess], progress: Sequence[int], timeout: float):
        self.is_stepping = False
        self.verdict: str | None = None
        self.abort: Callable[[], None] | None = None  # until there is something to wait for
        self._processes, self._progress, self._timeout = processes, progress, timeout
        self._is_told_to_end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="nanovllm watchdog", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Returns once the thread has ended."""
        self._is_told_to_end.set()
        if threading.current_thread() is not self._thread:  # which may be where garbage is collected
            self._thread.join(END_SECONDS)

    def _watch(self) -> None:
        still, seen = 0.0, []
        while not self._is_told_to_end.wait(INTERVAL):
            now = list(self._progress)
            # Looks are counted, and not the clock: while a user has stopped all of the ranks, nobody looks either.
            still = still + INTERVAL if self.is_stepping and now == seen else 0.0
            seen = now
            if still >= self._timeout:
                self.verdict = self._find_verdict()
                for process in self._processes:
                    process.kill()
            if self.abort and (self.verdict or wait([process.sentinel for process in self._processes], 0)):
                self.abort()
                return

    def _find_verdict(self) -> str:
        """A process that is stopped hangs; if none is, whoever is behind the others does."""
        counts = list(self._progress)
        hanging = [rank for rank, process in enumerate(self._processes, 1) if _is_stopped(process.pid)]
        hanging = hanging or [rank for rank, count in enumerate(counts) if count == min(counts)]
        which = f"rank {hanging[0]}" if len(hanging) == 1 else f"one of ranks {', '.join(map(str, hanging))}"
        return (
            f"tensor-parallel {which} hangs: a step made no progress for {self._timeout:g} s. "
            "Raise worker_timeout if a part of a layer may take that long"
        )


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() in STOPPED
    except psutil.Error:  # it has ended
        return False
