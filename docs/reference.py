"""Writes docs/reference.md from the source, whose comments say what each field means: python docs/reference.py"""

import ast
import inspect
from pathlib import Path

from nanovllm import BeamSearchParams, SamplingParams, StructuredOutputs, outputs
from nanovllm.config import Config
from nanovllm.utils.comments import field_comments

FILE = Path(__file__).with_suffix(".md")
INTRODUCTION = """\
# Reference

Every setting, every parameter, and every field of an output. On the command line settings and sampling parameters are
options of the same names, but for `hf_config` and `logits_processors`; a request's `seed` is `--request-seed`. Written
by `python docs/reference.py` from the comments of the source.
"""
PARTS = {
    "Settings: `LLM(model, ...)`": Config,
    "`SamplingParams`": SamplingParams,
    "`StructuredOutputs`": StructuredOutputs,
    "`BeamSearchParams`": BeamSearchParams,
    "`RequestOutput`, of `generate` and `chat`: a `CompletionOutput`, and": outputs.RequestOutput,
    "`CompletionOutput`": outputs.CompletionOutput,
    "`TokenLogprob`, in `logprobs`": outputs.TokenLogprob,
    "`StreamDelta`, of `generate_stream` and `chat_stream`": outputs.StreamDelta,
    "`Score`, of `score`": outputs.Score,
    "`BeamOutput`, of `beam_search`: a `BeamHypothesis`, and": outputs.BeamOutput,
    "`BeamHypothesis`": outputs.BeamHypothesis,
}


def reference() -> str:
    return "\n".join([INTRODUCTION, *(line for title, source in PARTS.items() for line in _part(title, source))])


def _part(title: str, source: type) -> list[str]:
    rows, columns = fields(source), ["field", "type", "default", "meaning"]
    if not any(default for _, _, default, _ in rows):
        rows, columns = [[name, kind, meaning] for name, kind, _, meaning in rows], ["field", "type", "meaning"]
    return [f"## {title}\n", f"{inspect.getdoc(source)}\n", _line(columns), "|---" * len(columns) + "|",
            *map(_line, rows), ""]  # fmt: skip


def fields(source: type) -> list[list[str]]:
    """Of each field that a user may give or read: name, type, default and meaning, as Markdown."""
    [definition] = ast.parse(inspect.getsource(source)).body
    comments, rows = field_comments(source), []
    for field in definition.body:
        default = ast.unparse(field.value) if isinstance(field, ast.AnnAssign) and field.value else ""
        if isinstance(field, ast.AnnAssign) and default != "field(init=False)":
            name, kind = field.target.id, ast.unparse(field.annotation)
            rows.append([f"`{name}`", f"`{kind}`", default and f"`{default}`", comments[name]])
    return rows


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")
