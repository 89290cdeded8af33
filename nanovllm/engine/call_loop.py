"""A thread that owns what runs requests, and how the callers in other threads deal with it.

They hand it jobs, which it does one after another, and hear of their sequences through a queue. So a Ctrl-C, which
Python raises in the main thread, never meets a job half done.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from queue import Empty, SimpleQueue

from nanovllm.engine.sequence import Sequence

News = SimpleQueue  # from the thread to one caller: what its watchers put there, or the error of a step
POLL_SECONDS = 0.2  # in which somebody who waits notices that the thread has ended


class CallLoop:
    """Starts the thread, which does what `_run` of a subclass says, with `_add`, `_close_call` and `_abort` as jobs."""

    def __init__(self, name: str):
        self.failure: str | None = None  # why nothing can run any more
        self._calls: set[News] = set()
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def post(self, job: Callable[[], object] | None) -> None:
        """Has a job done; None ends the thread."""
        self._jobs.put(job)

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

        self.post(run)
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
        self.post(partial(self._calls.add, news))

    def close_call(self, news: News, is_done: bool) -> None:
        """Ends what is left of a call, if it `is_done` nothing; waits for that, at most as long as a step takes."""
        if is_done:
            self.post(partial(self._calls.discard, news))
        else:
            self.do(self._close_call, news)

    def abort(self, seqs: list[Sequence]) -> bool:
        """Ends those of the sequences that are unfinished; returns whether there were any."""
        return self.do(self._abort, seqs)

    def add(self, seqs: list[Sequence], news: News | None = None) -> None:
        """Queues sequences of a call, unless a step's error has closed it; or of none, which run beside others."""
        self.post(partial(self._add, seqs, news))

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

    def check_alive(self) -> None:
        """Raises RuntimeError if no step will run any more."""
        if not self._thread.is_alive():
            reason = "exit()" if self.failure is None else f"a failure: {self.failure}"
            raise RuntimeError(f"this LLM was closed by {reason}; make a new one")

    def end(self) -> None:
        """Ends the thread after what it is doing, and what it owns with it. Idempotent."""
        self.post(None)
        if not self.is_this_thread:
            self._thread.join()
