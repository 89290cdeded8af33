"""Where the time of steps goes, phase by phase, for who wants to see it; else a phase's end costs one comparison.

Knows nothing of engines: they name a phase where it ends, and it began where their thread's last one ended.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter

import torch

LAUNCHES = ("upload", "forward", "sample")  # phases that give work to the device
START, END = "between steps", "report"  # the phases of which the first ends where a step begins, the last with it
Span = tuple[str, float, float]  # what, and seconds on the host's clock, from and to


@dataclass
class Timeline:
    """What has been recorded; of the device, on a CPU, that it works when the host does."""

    device: torch.device
    _marks: dict[int, list[tuple[str, float, torch.cuda.Event | None]]] = field(default_factory=dict)  # of a thread

    def mark(self, phase: str) -> None:
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._marks.setdefault(threading.get_ident(), []).append((phase, perf_counter(), event))

    def rows(self) -> dict[str, list[Span]]:
        """Spans of each thread's steps, of the phases in them, and of the device's work, in the order of time."""
        rows: dict[str, list[Span]] = {"steps": [], "host": [], "device": []}
        for marks in self._marks.values():
            start = None
            for (previous, before, event_before), (phase, now, event) in pairwise(marks):
                if previous == START:
                    start = before
                if phase == START:
                    continue
                rows["host"].append((phase, before, now))
                if phase in LAUNCHES:
                    rows["device"].append((phase, *self._on_device(marks, event_before, event, before, now)))
                if phase == END and start is not None:
                    rows["steps"].append(("step", start, now))
        return {name: sorted(spans, key=lambda span: span[1]) for name, spans in rows.items()}

    def _on_device(self, marks: list, begin: object, end: object, before: float, now: float) -> tuple[float, float]:
        if begin is None:
            return before, now
        end.synchronize()
        _, origin, first = marks[0]  # when that was recorded the device had nothing else to do
        return origin + first.elapsed_time(begin) / 1e3, origin + first.elapsed_time(end) / 1e3

    def trace(self) -> dict[str, object]:
        """Chrome's and Perfetto's JSON object format: complete events, times in microseconds."""
        rows = self.rows()
        origin = min((start for spans in rows.values() for _, start, _ in spans), default=0.0)
        names = [("process_name", 0, "nanovllm"), ("thread_name", 0, "host"), ("thread_name", 1, str(self.device))]
        events: list[dict[str, object]] = [
            {"ph": "M", "name": kind, "pid": 0, "tid": tid, "args": {"name": name}} for kind, tid, name in names
        ]
        for row, spans in rows.items():
            for name, start, end in spans:
                times = {"ts": 1e6 * (start - origin), "dur": 1e6 * (end - start)}
                events.append({"ph": "X", "name": name, "cat": row, "pid": 0, "tid": int(row == "device"), **times})
        return {"traceEvents": events, "displayTimeUnit": "ms"}


_timeline: Timeline | None = None


def mark(phase: str) -> None:
    """Says that `phase` ends here."""
    if _timeline is not None:
        _timeline.mark(phase)


@contextmanager
def record(device: torch.device) -> Iterator[Timeline]:
    """Records the steps of this process's engines while the block runs."""
    global _timeline
    _timeline = timeline = Timeline(device)
    try:
        yield timeline
    finally:
        _timeline = None
