"""One of several engines of a model, in a process of its own: what it is sent, and what it sends back.

The parent has the tokenizer's and the user's side of a request; here are its sequences, and nothing is kept of those
that have ended. Reading, stepping and sending are three threads, so neither end ever waits for the other to read.
"""

import multiprocessing
import os
import pickle
import threading
import traceback
from array import array
from contextlib import suppress
from functools import cached_property, partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import NamedTuple

import torch

from nanovllm.config import Config
from nanovllm.engine import inputs
from nanovllm.engine.call_loop import News
from nanovllm.engine.detokenizer import TextStream
from nanovllm.engine.engine_loop import EngineLoop
from nanovllm.engine.grammar import Grammars
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.parallel_runner import make_runner
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.workers import begin_child
from nanovllm.sampling_params import SamplingParams


class Completion(NamedTuple):
    """One of a prompt's, to be computed."""

    seq_id: int
    rng_key: int
    token_ids: array  # that it has already, from a replica that is gone


class Work(NamedTuple):
    """A prompt and those of its completions that are unfinished."""

    prompt: array
    params: SamplingParams  # of the first
    bad_words_ids: list[list[int]]
    is_streamed: bool
    has_text: bool  # to be read as it grows
    completions: list[Completion]


class Orders(NamedTuple):
    """What a replica is sent."""

    works: list[tuple[bytes, list[int]]]  # each pickled by itself, so that no other fails with it, and its ids
    aborted: list[int]  # ids of sequences that nobody waits for any more


class Growth(NamedTuple):
    """What a step has added to a streamed sequence."""

    seq_id: int
    token_ids: array
    text: str  # that has become certain


class End(NamedTuple):
    """A sequence has ended."""

    seq_id: int
    token_ids: array  # since the last growth
    text: str | None  # all of it, if a stop string has ended it
    finish_reason: str
    stop_reason: int | str | None
    logprobs: list[dict]
    prompt_logprobs: list[dict]
    num_cached_tokens: int | None
    error: "PackedError | None"


class Report(NamedTuple):
    """What a step has come to."""

    growths: list[Growth]
    ends: list[End]
    num_started: int  # of all sequences that were sent, those that do not wait
    stats: dict[str, object]
    error: "PackedError | None"  # of the step: nothing that was sent before runs on
    is_last: bool  # no step will run any more


class Ready(NamedTuple):
    """The first that a replica sends, unless it is an error."""

    num_kvcache_blocks: int
    kvcache_block_size: int
    stats: dict[str, object]


class PackedError(NamedTuple):
    """An exception, which may be of a class that the other process cannot make."""

    pickled: bytes | None
    message: str
    trace: str

    @staticmethod
    def of(error: BaseException) -> "PackedError":
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)
        except Exception:
            pickled = None
        return PackedError(pickled, f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))

    def unpack(self) -> BaseException:
        """The exception, or a RuntimeError that says the same, caused by the other process's traceback."""
        try:
            error = pickle.loads(self.pickled)
        except Exception:
            error = RuntimeError(self.message)
        error.__cause__ = RuntimeError(f"in a replica's process:\n{self.trace}")
        return error


class Outbox:
    """What has become of sequences since the last report; of the one call there is, the `News`, which get errors."""

    def __init__(self):
        self.growths: list[Growth] = []
        self.ends: list[End] = []
        self.error: BaseException | None = None

    def put(self, error: BaseException) -> None:
        self.error = error


class Told:
    """Watches a sequence: knows what of it the parent has."""

    def __init__(self, seq: Sequence, outbox: Outbox, is_streamed: bool):
        self.news, self.follows = outbox, is_streamed
        self._num_tokens = len(seq)
        self._num_chars = len(seq.text.text) if seq.text is not None else 0

    def on_token(self, seq: Sequence) -> None:
        if len(seq) > self._num_tokens:
            text = "" if seq.text is None else seq.text.text[self._num_chars :]
            self.news.growths.append(Growth(seq.seq_id, seq.token_ids[self._num_tokens :], text))
            self._num_tokens, self._num_chars = len(seq), self._num_chars + len(text)

    def on_end(self, seq: Sequence) -> None:
        text = seq.text.text if seq.text is not None and seq.text.stop is not None else None
        reports = seq.logprobs, seq.prompt_logprobs, seq.num_cached_tokens
        error = None if seq.error is None else PackedError.of(seq.error)
        new = seq.token_ids[self._num_tokens :]
        self.news.ends.append(End(seq.seq_id, new, text, seq.finish_reason, seq.stop_reason, *reports, error))


class ReportingLoop(EngineLoop):
    """Puts a report of each step into `reports`."""

    def __init__(self, model_runner: ModelRunner, scheduler: Scheduler):
        self.outbox, self.reports = Outbox(), SimpleQueue()
        self._num_added = 0
        super().__init__(model_runner, scheduler)
        self.open_call(self.outbox)

    def step(self, may_lead: bool = False) -> int:
        try:
            return super().step(may_lead)
        finally:
            self._calls.add(self.outbox)  # which an error has closed
            self._send_report()

    def abort_ids(self, seq_ids: list[int]) -> None:
        """In the thread: ends those that are unfinished."""
        sequences = self.scheduler.sequences
        self._abort([sequences[seq_id] for seq_id in seq_ids if seq_id in sequences])
        self._send_report()

    def refuse(self, seq_ids: list[int], error: Exception) -> None:
        """In the thread: says that they have failed."""
        self._num_added += len(seq_ids)
        failed = array("i"), None, "error", None, [], [], None, PackedError.of(error)
        self.outbox.ends += [End(seq_id, *failed) for seq_id in seq_ids]
        self._send_report()

    def _add(self, seqs: list[Sequence], news: News | None) -> None:
        self._num_added += len(seqs)
        super()._add(seqs, news)

    def _send_report(self) -> None:
        box, num_started = self.outbox, self._num_added - len(self.scheduler.waiting)
        error, is_last = box.error and PackedError.of(box.error), self.failure is not None
        self.reports.put(Report(box.growths, box.ends, num_started, self.stats(), error, is_last))
        box.growths, box.ends, box.error = [], [], None


class Replica:
    """Makes an engine and serves the parent until that closes the connection."""

    def __init__(self, connection: Connection, config: Config):
        self._connection, self._config = connection, config
        runner = make_runner(config)  # which says how large the cache is
        self._loop = ReportingLoop(runner, Scheduler.of(config))

    def serve(self) -> None:
        cache = self._config.num_kvcache_blocks, self._config.kvcache_block_size
        with suppress(EOFError, OSError):  # there is no parent any more, or it has closed the connection
            self._connection.send(Ready(*cache, self._loop.stats()))
            threading.Thread(target=self._send, daemon=True).start()
            while True:
                orders, seqs = self._connection.recv(), []
                for pickled, seq_ids in orders.works:
                    try:
                        seqs += self._sequences(pickle.loads(pickled))
                    except Exception as error:  # such as that its logits processor is not to be found in this process
                        self._loop.post(partial(self._loop.refuse, seq_ids, error))
                self._loop.add(seqs)
                if orders.aborted:
                    self._loop.post(partial(self._loop.abort_ids, orders.aborted))
        self._loop.end()

    def _send(self) -> None:
        with suppress(OSError):
            while True:
                self._connection.send(self._loop.reports.get())

    @cached_property
    def _tokenizer(self) -> object:
        return inputs.load_tokenizer(self._config)

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self._config, self._tokenizer)

    def _sequences(self, work: Work) -> list[Sequence]:
        seqs: list[Sequence] = []
        for seq_id, rng_key, token_ids in work.completions:
            limits, source = (self._config.eos_token_ids, self._config.max_model_len), seqs[0] if seqs else None
            params = inputs.sibling_params(work.params) if seqs else work.params
            seq = Sequence(seq_id, work.prompt, params, *limits, rng_key, source, work.bad_words_ids)
            if params.structured_outputs is not None:  # the tokenizer takes seconds, and not all need it
                seq.guide = self._grammars.guide(seq)
            seq.text = TextStream(self._tokenizer, seq) if work.has_text else None
            for token_id in token_ids:  # read one by one, as they were when they came
                seq.token_ids.append(token_id)
                if seq.text is not None:
                    seq.text.feed()
            seq.watcher = Told(seq, self._loop.outbox, work.is_streamed)
            seqs.append(seq)
        return seqs


def main(connection: Connection, config: Config, num_threads: int) -> None:
    """What the process of a replica does."""
    begin_child()
    multiprocessing.current_process().daemon = False  # which could not have processes of its own, other ranks
    torch.set_num_threads(num_threads)
    try:
        replica = Replica(connection, config)
    except BaseException as error:
        with suppress(OSError):
            connection.send(PackedError.of(error))
    else:
        replica.serve()
    os._exit(0)
