"""Draws the figures of the pages here, those of the tour from runs of the demo model: `python docs/figures.py`.

What the scheduler decides is the same on every machine and is run each time. What depends on the machine was measured
once and is drawn from `figures/measured.json`, which `--measure` writes anew. Other engines were measured by the
commands of performance.md; their figures are in `figures/comparison.json`.
"""

import argparse
import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from charts import FLOOR_COLOR, INK, bars, exchange, number_line, panels, plot, rect
from nanovllm import LLM, SamplingParams
from nanovllm.utils.timeline_svg import COLORS, picture, text

ROOT = Path(__file__).parent.parent
MODEL = str(ROOT / "assets" / "nano-qwen3")
FIGURES = ROOT / "docs" / "figures"
COMPARED = {  # titles, and the columns of comparison.json below them
    "output tokens per second": ["bfloat16", "int8"],
    "seconds to start": ["start-up"],
    "GB of memory at most": ["memory"],
}
BLOCK_SIZE = 4  # tokens
LEFT, TOP, CELL, GAP = 90, 40, 16, 2  # pixels; a cell is one block, or one request, in one step

Requests = dict[int, list[tuple[str, int]]]  # before which step: prompts, and how many tokens to generate

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
SUM, WHO, SORT = "what is 5 + 4?", "who are you?", "sort 42, 7, 93, 15"
LONG, LONGER = ("reverse " + ", ".join(map(str, range(10, n))) for n in (20, 40))
SCENES: dict[str, tuple] = {  # what `watch` takes
    "blocks": ({0: [(SUM, 13)], 3: [(WHO, 21)], 14: [(SORT, 12)]}, {"num_kvcache_blocks": 15}),
    "prefix": (
        {0: [(f"system: {SUM}", 8)], 4: [(f"system: {SORT}", 8)], 15: [(f"system: {SUM}", 5)], 21: [(LONG, 8)]},
        {"num_kvcache_blocks": 18},
    ),
    "steps": (
        {0: [(SUM, 22), (WHO, 16)], 5: [(LONGER, 10)], 6: [(SORT, 12)]},
        {"num_kvcache_blocks": 64, "max_num_batched_tokens": 32},
    ),
    "preemption": ({0: [(SUM, 16), (WHO, 30), (SORT, 18)]}, {"num_kvcache_blocks": 20}, 0.2),
}


@dataclass
class Step:
    """What the scheduler has decided before the step runs, by request or by block."""

    parts: dict[int, tuple[int, int]]  # tokens that are in the cache, and tokens that are computed
    tables: dict[int, list[int]]  # blocks of the cache
    full: set[int]  # blocks that the prefix cache can find
    evicted: set[int]  # those that it could find before


def watch(requests: Requests, sizes: dict[str, int], output_ratio: float = 1.0) -> list[Step]:
    """Runs the requests to their end, step by step. The model's answers do not matter: only how long they are.

    With an `output_ratio` as after requests that ended early the scheduler admits what may not fit.
    """
    steps: list[Step] = []
    with LLM(MODEL, device="cpu", dtype="float32", kvcache_block_size=BLOCK_SIZE, **sizes) as llm:
        manager, schedule = llm.block_manager, llm.scheduler.schedule

        def watched(is_ahead: bool) -> list:
            before = {block.block_id for block in manager.cached.values()}
            seqs = schedule(is_ahead)
            full = {block.block_id for block in manager.cached.values()}
            parts = {seq.seq_id: (seq.num_computed_tokens, seq.num_scheduled_tokens) for seq in seqs}
            tables = {seq_id: list(seq.block_table) for seq_id, seq in llm.scheduler.sequences.items()}
            steps.append(Step(parts, tables, full, before - full))
            return seqs

        llm.scheduler.schedule = watched
        llm.scheduler.output_ratio = output_ratio
        while max(requests) >= len(steps) or not llm.is_finished():
            for prompt, max_tokens in requests.get(len(steps), ()):
                messages = [SYSTEM] * prompt.startswith("system: ")
                messages.append({"role": "user", "content": prompt.removeprefix("system: ")})
                prompt = llm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))
            llm.step()
    return steps


def name_of(request: int) -> str:
    return "ABCDEFGH"[request]


def runs(values: list) -> list[tuple[object, int, int]]:
    """Equal neighbours: the value, where it begins, and how often it stands there."""
    found, start = [], 0
    for value, group in groupby(values):
        found.append((value, start, len(list(group))))
        start += found[-1][2]
    return found


def cells(x: float, y: float, n: int, height: float, color: str, opacity: float = 1) -> str:
    """`n` cells side by side, as one dashed line."""
    dashes = f'stroke-dasharray="{CELL - GAP} {GAP}"' + f' stroke-opacity="{opacity}"' * (opacity < 1)
    return f'<path d="M{x} {y + height / 2}h{n * CELL - GAP}" stroke="{color}" stroke-width="{height}" {dashes}/>'


def ruler(num_steps: int, y: float) -> list[str]:
    ticks = [text(LEFT + t * CELL + CELL / 2 - 1, y, str(t), "middle") for t in range(0, num_steps, 5)]
    return [text(LEFT - 10, y, "step", "end"), *ticks]


def legend(num_requests: int, words: list[tuple[str, str]]) -> list[str]:
    """A line of what the colours and signs mean."""
    shapes, x = [], LEFT
    for request in range(num_requests):
        shapes += [rect(x, 4, 12, 12, COLORS[request]), text(x + 16, 15, name_of(request))]
        x += 40
    for sign, meaning in words:
        shapes += [sign.format(x=x + 6, y=10), text(x + 16, 15, meaning)]
        x += 26 + 7 * len(meaning)
    return shapes


def label(x: float, y: float, number: int) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="middle" fill="white" font-size="10">{number}</text>'


DOT = '<circle cx="{x}" cy="{y}" r="3.5" fill="white" stroke="#24292f"/>'
CROSS = '<path d="M{x} {y}m-4 -4l8 8m-8 0l8 -8" stroke="#d1242f" stroke-width="2"/>'
PALE = '<path d="M{x} {y}m-6 0h12" stroke="' + INK + '" stroke-width="12" stroke-opacity="0.3"/>'


def draw_blocks(steps: list[Step]) -> str:
    """A row for each block, a column for each step, the colours of those requests that hold it."""
    num_requests = 1 + max(request for step in steps for request in step.tables)
    num_blocks = 1 + max(block for step in steps for table in step.tables.values() for block in table)
    shapes = legend(num_requests, [(DOT, "found in the prefix cache"), (PALE, "free, but kept"), (CROSS, "evicted")])
    for block in range(num_blocks):
        y, last, states = TOP + block * CELL, (), []
        for t, step in enumerate(steps):
            holders = tuple(request for request, table in step.tables.items() if block in table)
            states.append((holders or last * (block in step.full), bool(holders)))
            last = holders or last
            x = LEFT + t * CELL + (CELL - GAP) / 2
            is_new = any(block not in steps[t - 1].tables.get(request, ()) for request in holders) and t > 0
            if block in step.evicted and is_new:
                shapes.append(CROSS.format(x=x, y=y + CELL / 2 - 1))
            elif is_new and block in step.full:
                shapes.append(DOT.format(x=x, y=y + CELL / 2 - 1))
        for (holders, is_held), start, n in runs(states):
            height = (CELL - GAP) / max(len(holders), 1)
            for i, request in enumerate(holders):
                row = cells(LEFT + start * CELL, y + i * height, n, height, COLORS[request], 1 if is_held else 0.3)
                shapes.insert(0, row)  # below the signs
        shapes.append(text(LEFT - 10, y + 12, f"block {block}", "end"))
    bottom = TOP + num_blocks * CELL + 14
    return picture(max(LEFT + len(steps) * CELL, 620) + 20, bottom + 10, [*shapes, *ruler(len(steps), bottom)], INK)


def draw_steps(steps: list[Step], loads: list[dict[int, int]], limit: int, what: str) -> str:
    """A row for each request with what each step computes of it; below the sum of `loads` beside its limit."""
    num_requests, row = 1 + max(request for step in steps for request in step.tables), 26
    shapes = legend(num_requests, [(PALE, "waiting")])
    for request in range(num_requests):
        y = TOP + request * row
        shapes.append(text(LEFT - 10, y + 13, f"request {name_of(request)}", "end"))
        states = [step.parts.get(request, (0, 0))[1] if request in step.tables else None for step in steps]
        for n, start, length in runs(states):
            x = LEFT + start * CELL
            if n == 0:
                shapes.append(cells(x, y, length, 18, INK, 0.3))
            elif n == 1:
                shapes.append(cells(x, y + 5, length, 8, COLORS[request]))
            elif n:
                shapes.append(cells(x, y, length, 18, COLORS[request]))
                shapes += [label(x + i * CELL + 7, y + 13, n) for i in range(length)]
    top, height = TOP + num_requests * row + 16, 90
    for t, load in enumerate(loads):
        y = top + height
        for request, n in load.items():
            y -= n / limit * height
            shapes.append(rect(LEFT + t * CELL, y, CELL - GAP, n / limit * height, COLORS[request]))
    shapes.append(f'<path d="M{LEFT} {top}h{len(steps) * CELL}" stroke="{FLOOR_COLOR}" stroke-dasharray="4 3"/>')
    shapes += [text(LEFT - 10, top + 5, str(limit), "end"), text(LEFT - 10, top + height, what, "end")]
    bottom = top + height + 18
    return picture(max(LEFT + len(steps) * CELL, 620) + 20, bottom + 10, [*shapes, *ruler(len(steps), bottom)], INK)


def scheduled_figures() -> dict[str, str]:
    """Those that are the same on every machine."""
    steps = {name: watch(*scene) for name, scene in SCENES.items()}
    computed = [{request: n for request, (_, n) in step.parts.items()} for step in steps["steps"]]
    held = [{request: len(table) for request, table in step.tables.items()} for step in steps["preemption"]]
    budget, num_blocks = SCENES["steps"][1]["max_num_batched_tokens"], SCENES["preemption"][1]["num_kvcache_blocks"]
    return {
        "blocks": draw_blocks(steps["blocks"]),
        "prefix": draw_blocks(steps["prefix"]),
        "steps": draw_steps(steps["steps"], computed, budget, "tokens"),
        "preemption": draw_steps(steps["preemption"], held, num_blocks, "blocks"),
    }


def measured_figures(measured: dict) -> dict[str, str]:
    """Those that are drawn from numbers."""
    return {
        "kv-cache": plot(measured["kv-cache"], "tokens before the next one", "ms for it"),
        "attention": plot(measured["attention"], "tokens in the cache", "ms for 8 queries of one layer"),
        "recording": bars(measured["recording"], "ms of a decode step of one request"),
        "sampling": number_line(**measured["sampling"]),
        "ranks": exchange(measured["ranks"]),
        "roofline": plot(measured["roofline"], "requests in the batch", "tokens per second"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="measure this machine and write measured.json first")
    parser.add_argument("--out", type=Path, default=FIGURES, metavar="DIR", help="where to write (%(default)s)")
    args = parser.parse_args()
    file = FIGURES / "measured.json"
    if args.measure:
        from measure import measure

        file.write_text(json.dumps(measure(MODEL), indent=1) + "\n", encoding="utf-8")
    figures = scheduled_figures() | measured_figures(json.loads(file.read_text(encoding="utf-8")))
    figures["comparison"] = panels(json.loads((FIGURES / "comparison.json").read_text(encoding="utf-8")), COMPARED)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, svg in figures.items():
        (args.out / f"{name}.svg").write_text(svg, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
