"""What a job says of itself while it runs: a line that stays in place in a terminal, one a minute in a log."""

import shutil
import sys
import threading
from collections.abc import Callable
from time import perf_counter

from tqdm import tqdm

from nanovllm.batch.inputs import Inputs
from nanovllm.outputs import RequestOutput

TERMINAL_SECONDS, LOG_SECONDS = 0.5, 60.0


class Report(threading.Thread):
    """Counts what a job has done, and shows it now and then, also while nothing ends.

    How long it still takes is estimated by tokens: those of unfinished lines are as many for each byte of input as
    those of finished ones, and are computed at the mean rate so far.
    """

    def __init__(self, inputs: Inputs, is_shown: bool = True):
        super().__init__(name="nanovllm report", daemon=True)
        self.num_answered = self.num_failed = 0  # lines, of earlier runs too
        self.num_read_bytes = self.num_skipped_bytes = 0  # of the input's lines; of those that need no engine
        self.num_prompt_tokens = self.num_output_tokens = 0  # of answers of this run
        self._num_bytes = self._num_tokens = 0  # of their lines, and what the engine had to do for them
        self.stats: Callable[[], dict] = dict  # the engine's, once there is one
        self._inputs, self._is_shown = inputs, is_shown
        self._is_terminal = sys.stderr.isatty()
        self._start = perf_counter()
        self._ended = threading.Event()

    def add(self, output: RequestOutput, num_bytes: int) -> None:
        """Counts the answer of a line."""
        num_prompt, num_output = len(output.prompt_token_ids), sum(len(one.token_ids) for one in output.outputs)
        self.num_failed += output.finish_reason == "error"
        self.num_answered += output.finish_reason != "error"
        self.num_prompt_tokens += num_prompt
        self.num_output_tokens += num_output
        self._num_tokens += num_prompt * len(output.outputs) + num_output
        self._num_bytes += num_bytes

    @property
    def seconds(self) -> float:
        return perf_counter() - self._start

    def begin(self, stats: Callable[[], dict]) -> None:
        """The engine is ready: from now on time counts."""
        self.stats, self._start = stats, perf_counter()
        if self._is_shown:
            self.start()

    def run(self) -> None:
        while not self._ended.wait(TERMINAL_SECONDS if self._is_terminal else LOG_SECONDS):
            self._show(self.line())

    def end(self) -> None:
        """Shows the last line, and nothing after it."""
        self._ended.set()
        if self.is_alive():
            self.join()
            self._show(self.line())
            if self._is_terminal:
                print(file=sys.stderr)

    def line(self) -> str:
        seconds, stats = max(self.seconds, 1e-9), self.stats()
        num_in = stats.get("prompt_tokens", self.num_prompt_tokens)
        num_out = stats.get("output_tokens", self.num_output_tokens)
        num_used, num_free = stats.get("blocks_used", 0), stats.get("blocks_free", 0)
        parts = [
            f"{self.num_answered} done" + (f", {self.num_failed} failed" if self.num_failed else ""),
            f"{tqdm.format_interval(seconds)}<{self._time_left(seconds, num_in + num_out)}",
            f"in {num_in / seconds:.0f} out {num_out / seconds:.0f} tok/s",
            f"KV {num_used / max(num_used + num_free, 1):.0%}",
        ]
        if stats.get("preemptions"):
            parts.append(f"{stats['preemptions']} preempted")
        return ", ".join(parts)

    def _time_left(self, seconds: float, num_computed: int) -> str:
        share = self._inputs.share_read
        if not share or not self._num_bytes or not num_computed:
            return "?"
        num_bytes = self.num_read_bytes / share - self.num_skipped_bytes  # of all lines, if the rest is like these
        num_left = num_bytes * self._num_tokens / self._num_bytes - num_computed
        return tqdm.format_interval(max(num_left, 0) * seconds / num_computed)

    def _show(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]}\x1b[K" if self._is_terminal else text, end="" if self._is_terminal else "\n",
              file=sys.stderr, flush=True)  # fmt: skip
