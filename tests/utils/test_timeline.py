"""A timeline has each step and what it was spent on, as a trace that Perfetto reads and as a picture."""

import json
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
import torch

from helpers import DEMO_MODEL, random_prompts
from nanovllm import LLM, SamplingParams
from nanovllm.utils import timeline
from nanovllm.utils.timeline import Timeline, mark, record
from nanovllm.utils.timeline_svg import COLORS, draw

CPU = torch.device("cpu")
PHASES = {"schedule", "build batch", "upload", "forward", "sample", "read tokens", "postprocess", "report"}


@pytest.fixture(scope="module")
def recorded():
    """Of greedy, sampled and filtered requests, in chunks and decodes."""
    settings = {"device": "cpu", "num_kvcache_blocks": 100, "max_num_batched_tokens": 64}
    with LLM(str(DEMO_MODEL), **settings) as llm, record(CPU) as found:
        for options in ({"temperature": 0}, {}, {"top_k": 3}):
            params = SamplingParams(max_tokens=12, ignore_eos=True, **options)
            llm.generate(random_prompts([100, 5, 30]), params, use_tqdm=False)
    return found


def test_every_step_is_covered_by_phases_that_follow_each_other_in_it(recorded):
    rows = recorded.rows()
    assert len(rows["steps"]) > 3 * 12
    assert {phase for phase, *_ in rows["host"]} == PHASES
    covered = 0.0
    for _, start, end in rows["steps"]:
        inside = [(a, b) for _, a, b in rows["host"] if start <= a and b <= end]
        assert all(b <= c for (_, b), (c, _) in pairwise(inside))
        covered += sum(b - a for a, b in inside)
    assert covered >= 0.9 * sum(end - start for _, start, end in rows["steps"])
    assert all(a[2] <= b[1] for a, b in pairwise(rows["steps"]))
    assert len(rows["host"]) == sum(
        start <= a and b <= end for _, a, b in rows["host"] for _, start, end in rows["steps"]
    )


def test_the_trace_has_every_span_in_microseconds(recorded):
    events = json.loads(json.dumps(recorded.trace()))["traceEvents"]
    named = {(event["tid"], event["args"]["name"]) for event in events if event["ph"] == "M"}
    assert named == {(0, "nanovllm"), (0, "host"), (1, "cpu")}
    spans = [event for event in events if event["ph"] == "X"]
    rows = recorded.rows()
    assert len(spans) == sum(map(len, rows.values()))
    assert min(span["ts"] for span in spans) == 0
    [step] = [span for span in spans if span["cat"] == "steps" and span["ts"] == 0]
    _, start, end = rows["steps"][0]
    assert step["dur"] == pytest.approx(1e6 * (end - start))
    assert {span["cat"] for span in spans if span["tid"] == 1} == {"device"}


def test_the_picture_shows_some_steps_with_their_phases(recorded):
    root = ElementTree.fromstring(draw(recorded.rows(), num_steps=5))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0].startswith("Steps ") and set(texts) >= PHASES | {"host", "device", "steps"}
    tips = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert sum(tip.startswith("step:") for tip in tips) == 5
    assert sum(tip.startswith("forward:") for tip in tips) == 2 * 5  # of host and device
    assert len(COLORS) >= len(PHASES) + 1


def test_a_step_that_fails_is_left_out():
    found = Timeline(CPU)
    for phase in ("between steps", "schedule", "between steps", "schedule", "report", "between steps"):
        found.mark(phase)
    assert len(found.rows()["steps"]) == 1


def test_nothing_is_recorded_unless_someone_asks():
    with record(CPU) as found:
        assert timeline._timeline is found
    mark("schedule")
    assert found.rows() == {"steps": [], "host": [], "device": []} and timeline._timeline is None


def test_on_a_gpu_the_device_has_its_own_clock(monkeypatch):
    """A launch is over long before its work."""
    device_ends = iter([7.0, 7.5, 9.0])  # of what came before a step, of an upload, of a forward

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.seconds = next(device_ends)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: "Event") -> float:
            return 1000 * (other.seconds - self.seconds)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timeline, "perf_counter", iter([100.0, 100.1, 100.2]).__next__)
    found = Timeline(torch.device("cuda"))
    for phase in ("between steps", "upload", "forward"):
        found.mark(phase)
    assert found.rows()["host"] == [("upload", 100.0, 100.1), ("forward", 100.1, 100.2)]
    assert found.rows()["device"] == [("upload", 100.0, 100.5), ("forward", 100.5, 102.0)]
