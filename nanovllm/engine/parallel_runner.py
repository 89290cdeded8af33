"""The model runner of an engine with several ranks: rank 0's has the others do what it does."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanovllm.config import Config
from nanovllm.engine.batch import Batch
from nanovllm.engine.batch_codec import BatchCodec
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.workers import Channel, Workers
from nanovllm.utils.device import default_threads
from nanovllm.utils.parallel import TensorParallel, connect


class ParallelRunner(ModelRunner):
    """Rank 0 of `tensor_parallel_size` ranks; starts the others.

    A failure while the ranks work together ends them all, for they can no longer agree on where they are. If it is
    another rank's, it is raised as a RuntimeError with that rank's number and its traceback or exit code.
    """

    may_lead = False  # the tokens are rank 0's, and after each step it sees whether the others are well

    def __init__(self, config: Config):
        size = config.tensor_parallel_size
        self._codec: BatchCodec | None = None  # until all ranks are set up
        self.tp = TensorParallel()
        num_threads = default_threads(size if config.device.type == "cpu" else 1)
        self.workers = Workers(size, config.worker_timeout, serve, config.to_send(), num_threads)
        with self._failing_together():
            config.device = rank_device(config.device, 0)
            self.tp = self._connect(size, config.device)
            self.tp.count = self.workers.count
            self.workers.watchdog.abort = self.tp.abort
            super().__init__(config, self.tp)
        self.num_threads = num_threads
        self._codec = BatchCodec(self.block_size, self.batch_builder.max_blocks)

    def forward(self, batch: Batch, score_given: Callable[[np.ndarray, Tensor], None] | None = None) -> Tensor | None:
        """As `ModelRunner.forward`, on all ranks."""
        if self._codec is None:  # every rank is measuring its own memory
            return super().forward(batch, score_given)
        with self._step():
            self.workers.publish("forward", self._codec.encode(batch))
            logits = super().forward(batch, score_given)
            if self.device.type == "cuda":  # here, and not later, the failure of another rank is to be noticed
                torch.cuda.current_stream(self.device).synchronize()
                self.workers.raise_if_failed()
            return logits

    def copy_blocks(self, copies: list[tuple[int, int, int]]) -> None:
        """As `ModelRunner.copy_blocks`, on all ranks."""
        with self._step():
            self.workers.publish("copy_blocks", copies)
            super().copy_blocks(copies)

    def close(self) -> None:
        """Ends the other ranks. Idempotent."""
        self.graphs = None  # first: graphs hold communicators, which must outlive them
        try:
            self.tp.disconnect()
        finally:  # also where the GPU is in a state in which nothing works
            self.workers.close()
        super().close()

    def _connect(self, size: int, device: torch.device) -> TensorParallel:
        """Joins the group, in a thread that is given up if a worker ends meanwhile: it would wait for it too long."""
        joined: Future[TensorParallel] = Future()

        def join() -> None:
            try:
                joined.set_result(connect(0, size, device, self.workers.rendezvous))
            except BaseException as error:
                joined.set_exception(error.with_traceback(None))  # which would keep sockets open

        self.workers.publish("join")  # once all are up: the first would wait too long for the last
        threading.Thread(target=join, daemon=True).start()
        while not joined.done():
            wait_for_futures([joined], timeout=0.1)
            self.workers.raise_if_failed()
        return joined.result()

    @contextmanager
    def _step(self) -> Iterator[None]:
        """What all ranks do together, with the watchdog looking."""
        watchdog = self.workers.watchdog
        with self._failing_together():
            watchdog.is_stepping = True
            try:
                yield
            finally:
                watchdog.is_stepping = False

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Ends all ranks if the block fails, and raises what that comes from."""
        try:
            yield
        except BaseException as error:
            cause = self.workers.cause_of(error)
            self.failure = str(cause) or repr(cause)
            self.close()
            try:
                raise cause from (error.__cause__ if cause is error else error)
            finally:
                del cause  # else the traceback and this frame keep each other, and the model, alive

    def _check_ranks(self) -> None:
        self.workers.raise_if_killed()


def make_runner(config: Config) -> ModelRunner:
    """Of an engine in this process, with as many ranks as it is to have."""
    return ModelRunner(config) if config.tensor_parallel_size == 1 else ParallelRunner(config)


def serve(rank: int, channel: Channel, rendezvous: Path, config: Config, num_threads: int) -> None:
    """What a further rank does all its life, once for each `(method, *args)` that rank 0 publishes."""
    torch.set_num_threads(num_threads)
    config.device = rank_device(config.device, rank)
    channel.receive(rank)  # "join"
    tp = connect(rank, config.tensor_parallel_size, config.device, rendezvous)
    tp.count = channel.counter(rank)
    runner = ModelRunner(config, tp)
    runner.enter_thread()
    codec = BatchCodec(runner.block_size, runner.batch_builder.max_blocks)
    methods = {"forward": lambda message: runner.forward(codec.decode(message)), "copy_blocks": runner.copy_blocks}
    with torch.inference_mode():
        while True:
            method, *args = channel.receive(rank)
            methods[method](*args)


def rank_device(device: torch.device, rank: int) -> torch.device:
    """The GPU of a rank, made the current one of its process; the CPU is everyone's."""
    if device.type != "cuda":
        return device
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)
