"""The thread that runs the steps: the only one that touches the scheduler, the blocks and the model.

Whoever calls the engine, from whatever thread, hands it jobs, which it does between two steps, and hears of its
sequences through a queue. So calls that overlap run in the same batches; and a Ctrl-C, which Python raises in the main
thread, never meets a step half done. Knows nothing of prompts, and of texts only that they may end a sequence.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from time import perf_counter

from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence

News = SimpleQueue  # from the engine's thread to one caller: what its watchers put there, or the error of a step
NUM_BUCKETS = 17  # of step times: under 1, 2, 4, ... milliseconds, and one for those of half a minute and more
POLL_SECONDS = 0.2  # in which somebody who waits notices that the thread has ended


class EngineLoop:
    """Steps by itself while a call is open, see `open_call`; otherwise only as a job."""

    def __init__(self, model_runner: ModelRunner, scheduler: Scheduler):
        self.model_runner, self.scheduler = model_runner, scheduler
        self.failure: str | None = None  # why no step can run any more
        self.num_tokens, self.seconds = {True: 0, False: 0}, {True: 0.0, False: 0.0}  # so far, by whether in a prefill
        self.step_times = [0] * NUM_BUCKETS  # how many steps took so long
        self._calls: set[News] = set()
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="nanovllm engine", daemon=True)
        self._thread.start()

    # ---- for other threads

    @property
    def is_this_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def do(self, job: Callable[..., object], *args: object) -> object:
        """Has `job` done between two steps, waits, and returns or raises what it does."""
        future: Future[object] = Future()

        def run() -> None:
            try:
                future.set_result(job(*args))
            except BaseException as error:
                future.set_exception(error)

        self._jobs.put(run)
        if self.is_this_thread:  # a finalizer that the garbage collector happens to run here: its time will come
            return None
        while True:
            try:
                return future.result(POLL_SECONDS)
            except FutureTimeoutError:
                if future.done():
                    raise
                self.check_alive()

    def open_call(self, news: News) -> None:
        """The engine steps by itself from now on, until `close_call`, or until a step fails: its error then comes."""
        self._jobs.put(partial(self._calls.add, news))

    def close_call(self, news: News, is_done: bool) -> None:
        """Ends what is left of a call, if it `is_done` nothing; waits for that, at most as long as a step takes."""
        if is_done:
            self._jobs.put(partial(self._calls.discard, news))
        else:
            self.do(self._close_call, news)

    def abort(self, seqs: list[Sequence]) -> bool:
        """Ends those of the sequences that are unfinished; returns whether there were any."""
        return self.do(self._abort, seqs)

    def add(self, seqs: list[Sequence], news: News | None = None) -> None:
        """Queues sequences of a call, unless a step's error has closed it; or of none, which run beside others."""
        self._jobs.put(partial(self._add, seqs, news))

    def next_news(self, news: News, timeout: float | None = None) -> object | None:
        """What comes next to a call, None if nothing has after `timeout` seconds; raises what the step has."""
        wait = POLL_SECONDS if timeout is None else timeout
        while True:
            try:
                item = news.get(timeout=wait)
            except Empty:
                self.check_alive()
                if timeout is not None:
                    return None
            else:
                if isinstance(item, BaseException):
                    raise item
                return item

    def stats(self) -> dict[str, int | float | list[int]]:
        """What `LLM.stats` says, as numbers that may be added up over engines. Takes the same time whatever runs."""
        scheduler, manager = self.scheduler, self.scheduler.block_manager
        num_running, num_free = len(scheduler.running), manager.num_free_blocks
        return {
            "running": num_running,
            "waiting": max(len(scheduler.sequences) - num_running, 0),
            "blocks_used": len(manager.blocks) - num_free,
            "blocks_free": num_free,
            "blocks_cached": len(manager.cached),
            "preemptions": scheduler.num_preemptions,
            "prompt_tokens": scheduler.num_prompt_tokens,
            "cached_prompt_tokens": scheduler.num_cached_tokens,
            "output_tokens": scheduler.num_output_tokens,
            "prefill_tokens": self.num_tokens[True],
            "decode_tokens": self.num_tokens[False],
            "prefill_seconds": self.seconds[True],
            "decode_seconds": self.seconds[False],
            "step_times": list(self.step_times),
        }

    def check_alive(self) -> None:
        """Raises RuntimeError if no step will run any more."""
        if not self._thread.is_alive():
            reason = "exit()" if self.failure is None else f"a failure: {self.failure}"
            raise RuntimeError(f"this LLM was closed by {reason}; make a new one")

    def end(self) -> None:
        """Ends the thread after the step that is running, and gives the model's memory back. Idempotent."""
        self._jobs.put(None)
        if not self.is_this_thread:
            self._thread.join()

    # ---- in the thread

    def _run(self) -> None:
        try:
            self.model_runner.enter_thread()
            while self.failure is None:
                is_idle = not self._calls or self.scheduler.is_finished()
                try:
                    job = self._jobs.get(block=is_idle)
                except Empty:
                    job = self._step_for_calls
                if job is None:
                    break
                job()
                del job  # which would keep what it refers to while this waits
        finally:
            self.model_runner.close()

    def _step_for_calls(self) -> None:
        with suppress(BaseException):  # each call has been told
            self.step()

    def step(self) -> int:
        """One prefill or decode step; returns how many tokens it computed, if a decode step as a negative number."""
        start, scheduler, manager = perf_counter(), self.scheduler, self.scheduler.block_manager
        seqs: list[Sequence] = []
        try:
            seqs, is_prefill = scheduler.schedule()
            num_tokens = sum(seq.num_scheduled_tokens for seq in seqs)
            copies, manager.copies = manager.copies, []
            if copies:
                self.model_runner.copy_blocks(copies)
            if seqs:
                token_ids = self.model_runner.run(seqs, is_prefill)
                scheduler.postprocess(seqs, token_ids)
            self._report(seqs)
        except BaseException as error:
            self._fail(error, seqs)
            raise
        seconds = perf_counter() - start
        self.num_tokens[is_prefill] += num_tokens
        self.seconds[is_prefill] += seconds
        self.step_times[min(int(1000 * seconds).bit_length(), NUM_BUCKETS - 1)] += bool(seqs)
        return num_tokens if is_prefill else -num_tokens

    def _report(self, seqs: list[Sequence]) -> None:
        """Reads the text of those that wait for a stop string, and tells the watchers of a step's sequences."""
        for seq in seqs:
            if seq.text is not None:
                self._read_text(seq)
            if seq.watcher.follows and seq.finish_reason is None:
                seq.watcher.on_token(seq)
        ended, self.scheduler.finished = self.scheduler.finished, []
        for seq in ended:
            watcher = seq.watcher
            if not seq.keeps_blocks:
                seq.watcher = None  # else they keep each other until the garbage collector comes
            watcher.on_end(seq)

    def _read_text(self, seq: Sequence) -> None:
        try:
            stop = seq.text.feed()
        except Exception as error:  # of a tokenizer: no other sequence is concerned
            seq.error, reason, stop = error, "error", None
        else:
            reason = "stop"
        if stop is None and seq.error is None:
            return
        if seq.finish_reason is None:
            self.scheduler.finish(seq, reason)
        seq.finish_reason, seq.stop_reason = reason, stop  # also where a length ended it in the same step

    def _fail(self, error: BaseException, seqs: list[Sequence]) -> None:
        """Ends all calls with the error of a step. Requests without a call stay, unless the model cannot go on."""
        self.failure = self.model_runner.failure
        calls, self._calls = self._calls, set()
        for news in calls:
            news.put(error)
        if self.failure is None:
            self.scheduler.recover()
            self._report(seqs)
            for news in calls:
                self._close_call(news)

    def _add(self, seqs: list[Sequence], news: News | None) -> None:
        if news is None or news in self._calls:
            for seq in seqs:
                self.scheduler.add(seq)

    def _close_call(self, news: News) -> None:
        self._calls.discard(news)
        scheduler = self.scheduler
        self._abort([seq for seq in scheduler.sequences.values() if seq.watcher.news is news])
        scheduler.drop_held([seq for seq in scheduler.held.values() if seq.watcher.news is news])

    def _abort(self, seqs: list[Sequence]) -> bool:
        unfinished = [seq for seq in seqs if seq.seq_id in self.scheduler.sequences]
        for seq in unfinished:
            self.scheduler.finish(seq, "abort")
        self._report([])
        return bool(unfinished)
