"""The parent's end of a replica: starts its process with the devices it is to have, and knows how that has ended."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from nanovllm.config import Config
from nanovllm.engine import replica
from nanovllm.engine.replica import Orders, Ready
from nanovllm.engine.workers import EXIT_SECONDS, MAIN_GUARD
from nanovllm.utils.topology import on_cpus, share_of_cpus

STARTING = threading.Lock()  # environment variables are one for all threads


class ReplicaProcess:
    """One process after another: `start` is for the first, and for a next one after `kill`."""

    def __init__(self, index: int, config: Config, num_threads: int):
        self.index, self.num_starts = index, 0
        self.ready: Ready | None = None  # what it said when it was up
        self.connection: Connection | None = None
        self.num_sent = self.num_started = 0  # sequences that it was sent, and those of them that do not wait there
        self.stats: dict[str, object] = {}
        self._config, self._num_threads, self._num_replicas = config.to_send(), num_threads, config.data_parallel_size
        self._process: SpawnProcess | None = None

    def start(self) -> None:
        """Returns before it is up."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        args = theirs, self._config, self._num_threads
        name = f"nanovllm replica {self.index}"
        with theirs, STARTING, _inheriting_devices(self.index, self._num_replicas, self._config):
            self._process = context.Process(target=replica.main, args=args, name=name, daemon=True)
            self._process.start()
        self.num_starts += 1

    def set_ready(self, ready: Ready) -> None:
        """It is up. On a CPU the next in its place gets as large a cache, while other replicas have theirs already."""
        self.ready, self.stats = ready, ready.stats
        if self._config.device.type == "cpu":
            self._config.num_kvcache_blocks, self._config.data_parallel_size = ready.num_kvcache_blocks, 1

    def send(self, orders: Orders) -> None:
        """Does nothing if it has just died, which whoever reads from it finds out."""
        if self.connection is not None:
            with suppress(OSError):
                self.connection.send(orders)

    def end(self) -> None:
        """Asks it to end, without waiting."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def shoot(self) -> None:
        """For a thread that cannot wait for the one which all else is for."""
        if (process := self._process) is not None:
            process.kill()

    def kill(self, patience: float = 0.0) -> str:
        """Ends it, after `patience` seconds in which it may do so by itself; returns how it ended if it did."""
        was_up, process = self.ready is not None, self._process
        self.end()
        self.ready, self._process, self.num_sent, self.num_started = None, None, 0, 0
        if process is None or process.pid is None:
            return "was not started"
        process.join(patience)
        code = process.exitcode
        process.kill()
        process.join(EXIT_SECONDS)
        if code is None or code < 0:
            return "did not end" if code is None else f"was killed by {signal.Signals(-code).name}"
        hint = "" if was_up or code != 1 else f" before it was up; it printed why. {MAIN_GUARD}"
        return f"ended with exit code {code}{hint}"


@contextmanager
def _inheriting_devices(index: int, num_replicas: int, config: Config) -> Iterator[None]:
    """What is started meanwhile sees only a replica's own GPUs, or runs on its own cores.

    Inherited, since a process could not choose any more when it reads this: its libraries have looked by then.
    """
    if config.device.type == "cuda":
        name, size = "CUDA_VISIBLE_DEVICES", config.tensor_parallel_size
        before = os.environ.get(name)
        gpus = before.split(",") if before else list(map(str, range(size * num_replicas)))
        os.environ[name] = ",".join(gpus[index * size : (index + 1) * size])
        try:
            yield
        finally:
            del os.environ[name]
            os.environ |= {} if before is None else {name: before}
    else:
        with on_cpus(share_of_cpus(index, num_replicas)):
            yield
