"""A job: lines are read as the engine has room for them, and answers are written in the order in which they finish."""

import json
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

from nanovllm.batch.inputs import STDIN, Inputs
from nanovllm.batch.lines import Item, LineError, answer_record, error_record, parse_line
from nanovllm.batch.local import LocalBackend
from nanovllm.batch.output import Ids, Output, checkpoint_digest
from nanovllm.batch.report import Report
from nanovllm.config import Config, resolve_model
from nanovllm.outputs import RequestOutput
from nanovllm.utils.reader import read_ahead

READ_AHEAD = 1024  # lines, while the model is loaded
ORDER_WINDOW = 16384  # lines that may wait for an earlier one's answer with `in_order`
ANSWERED, SOME_FAILED, INTERRUPTED = 0, 3, 130  # exit codes
# Settings that answers depend on; others may change when a job goes on.
SETTINGS_OF_ANSWERS = "dtype", "quantization", "max_model_len", "eos", "load_format", "seed"


class Backend(Protocol):
    """What computes a job's answers."""

    def run(self, items: Iterable[Item]) -> Iterator[tuple[Item, RequestOutput]]:
        """Lazily, in the order in which they finish. What fails is an output with `finish_reason` "error"."""

    def stats(self) -> dict[str, object]:
        """As `LLM.stats`."""

    def close(self) -> None: ...


class _Job:
    """What the thread that reads and the one that writes have in common."""

    def __init__(self, inputs: Inputs, output: Output, report: Report, defaults: dict, seed: int, in_order: bool):
        self.inputs, self.output, self.report = inputs, output, report
        self._defaults, self._seed = defaults, seed
        self._ids = Ids()
        self._in_order, self._turn = in_order, threading.Condition()
        self._waiting: dict[int, dict | None] = {}  # records by line, for the lines before; None: it has none
        self._next = 0  # the line whose turn it is

    def items(self) -> Iterator[Item]:
        """The requests that have no answer yet. Writes why others cannot run."""
        for line, (path, number, text) in enumerate(self.inputs.lines()):
            self.output.has_read(text)
            self.report.num_read_bytes += len(text)
            with self._turn:
                self._turn.wait_for(lambda line=line: line < self._next + ORDER_WINDOW or not self._in_order)
            try:
                item = parse_line(text, line, self._defaults, self._seed)
                custom_id, error = item.custom_id, None
            except LineError as line_error:
                custom_id, error = line_error.custom_id, line_error
            if not self._ids.add(custom_id, f"{path}:{number}"):
                message = f"the custom_id {custom_id!r} is that of {self._ids.place(custom_id)}, too"
                custom_id, error = f"line-{line + 1}", LineError(message, custom_id, "duplicate_custom_id")
                while not self._ids.add(custom_id):  # somebody's own
                    custom_id += "+"
            if custom_id not in self.output.done and error is None:
                item.num_bytes = len(text)
                yield item
                continue
            self.report.num_skipped_bytes += len(text)
            if custom_id in self.output.done:
                self._emit(line, None)
            else:
                self.report.num_failed += 1
                self._emit(line, error_record(custom_id, error.code, str(error)))

    def finish(self, item: Item, output: RequestOutput, model: str) -> None:
        """Writes an answer, or why there is none."""
        self.report.add(output, item.num_bytes)
        self._emit(item.line, answer_record(item, output, model))

    def _emit(self, line: int, record: dict | None) -> None:
        with self._turn:
            if not self._in_order:
                return self.output.write([record] if record else [])
            self._waiting[line] = record
            ready = []
            while self._next in self._waiting:
                ready.append(self._waiting.pop(self._next))
                self._next += 1
            self.output.write([record for record in ready if record])
            self._turn.notify_all()


def run(
    inputs: str | list[str], output: str, model: str, *, defaults: dict[str, object] | None = None,
    in_order: bool = False, force: bool = False, summary: str | None = None, ray: str | None = None,
    min_replicas: int = 1, max_replicas: int | None = None, use_tqdm: bool = True, **settings: object
) -> dict[str, object]:  # fmt: skip
    """Answers every request of a batch file.

    The same call goes on where an earlier one ended, however it ended: what the output has is not computed again.
    Answers of requests without a `seed` are drawn from `settings["seed"]` and their custom_id, so that they are the
    same in any order and after any interruption.

    Args:
        inputs: Files of a request a line (`nanovllm.batch.lines`), patterns of such, or "-"; `.gz` and `.zst` too.
        output: The file to append answers to, or "-".
        model, **settings: As for `LLM`.
        defaults: Fields of `SamplingParams` for requests that do not say.
        in_order: Write the answers in the order of the requests, not in the order in which they finish.
        force: Go on although model, settings or input are not those that the output was begun with.
        summary: A file for what is returned, as JSON.
        ray: The address of a Ray cluster to run on, "auto" for the one of this machine.
        min_replicas, max_replicas: Of the model, on that cluster.
        use_tqdm: Show what is done on standard error.

    Returns:
        Counts and rates; "exit_code" is 0 if every line has an answer, 3 if some have error records, and 130 if the job
        was interrupted, by Ctrl-C or SIGTERM.

    Raises:
        TypeError, ValueError: Of the arguments, before anything is computed; see `LLM`.
        BatchError: The output cannot be written, or is not of this job.
    """
    files = Inputs([inputs] if isinstance(inputs, str) else list(inputs))
    if output in files.paths and output != STDIN:
        raise ValueError(f"the output {output!r} is one of the inputs, too")
    seed, defaults = settings.get("seed", 0), defaults or {}
    parse_line(b'{"prompt": "x"}', 0, defaults, seed)  # which checks them
    report, backend, exit_code = Report(files, use_tqdm), None, ANSWERED
    written = Output(output, _identity(model, defaults, settings), files, force)
    report.num_answered, report.num_failed = num_before = written.num_answered, written.num_failed
    job = _Job(files, written, report, defaults, seed, in_order)
    try:
        with _termination_as_interrupt():
            items = read_ahead(job.items(), READ_AHEAD)
            first = list(islice(items, 1)) if sum(num_before) else []
            if first or not sum(num_before):  # else all is done, and no model needed
                backend = _open(model, settings, ray, min_replicas, max_replicas)
                report.begin(backend.stats)
                for item, answer in backend.run(chain(first, items)):
                    job.finish(item, answer, model)
    except KeyboardInterrupt as interrupt:
        exit_code = INTERRUPTED
        for item, answer in getattr(interrupt, "outputs", ()):
            job.finish(item, answer, model)
    finally:
        report.end()
        written.close()
        stats = report.stats()
        if backend is not None:
            backend.close()
    if exit_code == ANSWERED and (report.num_failed or files.unreadable):
        exit_code = SOME_FAILED
    figures = _figures(report, stats, files, exit_code)
    if summary is not None:
        Path(summary).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def _open(model: str, settings: dict, ray: str | None, min_replicas: int, max_replicas: int | None) -> Backend:
    if ray is None:
        return LocalBackend(model, settings)
    from nanovllm.batch.ray_backend import RayBackend  # Ray is an extra

    return RayBackend(model, settings, ray, min_replicas, max_replicas)


def _identity(model: str, defaults: dict[str, object], settings: dict[str, object]) -> dict[str, object]:
    """What the answers depend on, as JSON has it."""
    identity = {name: settings.get(name, Config.__dataclass_fields__[name].default) for name in SETTINGS_OF_ANSWERS}
    identity |= {f"default {name}": value for name, value in defaults.items()}
    return json.loads(json.dumps(identity | {"model": checkpoint_digest(resolve_model(model))}, default=str))


def _figures(report: Report, stats: dict[str, object], inputs: Inputs, exit_code: int) -> dict[str, object]:
    seconds = report.seconds
    in_steps = stats.get("prefill_seconds", 0.0) + stats.get("decode_seconds", 0.0)
    return {
        "exit_code": exit_code,
        "answered": report.num_answered,  # by earlier runs too, as also the next
        "failed": report.num_failed,
        "unreadable": inputs.unreadable,
        "prompt_tokens": report.num_prompt_tokens,
        "output_tokens": report.num_output_tokens,
        "seconds": seconds,  # since the model was loaded
        "prompt_tokens_per_second": report.num_prompt_tokens / seconds,
        "output_tokens_per_second": report.num_output_tokens / seconds,
        "share_in_steps": in_steps / seconds,  # of the time; the rest was between two steps
        "prefix_hit_rate": stats.get("prefix_hit_rate", 0.0),
        "preemptions": stats.get("preemptions", 0),
    }


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a job as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
