"""What every engine is given to do, the same on every machine, and how it is timed."""

import random
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

MAX_TOKEN_ID = 10_000

Figures = dict[str, int | float | str]
Report = list[tuple[str, str]]  # a label and a template for each line


class Lengths(NamedTuple):
    """How many prompts, and between which numbers of tokens their inputs and outputs are."""

    num_seqs: int
    min_input_len: int
    max_input_len: int
    min_output_len: int
    max_output_len: int


CLASSIC = Lengths(256, 100, 1024, 100, 1024)
SMALL = Lengths(32, 32, 256, 32, 128)


@dataclass(frozen=True, slots=True)
class Workload:
    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        return sum(self.output_lens)


Generate = Callable[[Workload], Figures]  # an engine that is open; it tells at least how many tokens it made


def make_workload(lengths: Lengths, seed: int = 0, vocab_size: int = MAX_TOKEN_ID + 1) -> Workload:
    """Random prompts and output lengths."""
    num_seqs, min_input, max_input, min_output, max_output = lengths
    rng = random.Random(seed)
    top = min(MAX_TOKEN_ID, vocab_size - 1)
    prompts = [[rng.randint(0, top) for _ in range(rng.randint(min_input, max_input))] for _ in range(num_seqs)]
    return Workload(prompts, [rng.randint(min_output, max_output) for _ in range(num_seqs)])


def lengths_of(args: Namespace) -> Lengths:
    return Lengths(*(getattr(args, name) for name in Lengths._fields))


def timed(generate: Generate, workload: Workload) -> Figures:
    """Generates `workload`; adds the seconds that it took.

    Raises:
        RuntimeError: The engine made fewer tokens than the workload asks for.
    """
    start = perf_counter()
    figures = generate(workload)
    figures["seconds"] = perf_counter() - start
    if figures["output_tokens"] != workload.output_tokens:
        raise RuntimeError(
            f"the engine made {figures['output_tokens']} tokens, the workload asks for {workload.output_tokens}. "
            "A sequence that outgrows the KV cache ends early: raise --num-kvcache-blocks"
        )
    return figures
