"""Turns the sequences of a step into the arrays that the model runner needs, without a Python object per token.

Legend: T tokens in the step, S sequences, B block-table columns.
"""

from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from nanovllm.engine.sequence import Sequence


@dataclass(slots=True)
class Batch:
    """One step's work, as NumPy arrays."""

    is_prefill: bool
    input_ids: np.ndarray  # [T] int64
    positions: np.ndarray  # [T] int64
    slot_mapping: np.ndarray  # [T] int64, where each token's key and value go: block_id * block_size + offset
    context_lens: np.ndarray  # [S] int32, tokens that a sequence's last query sees, itself included
    cu_seqlens_q: np.ndarray | None = None  # [S + 1] int32, prefill only
    block_tables: np.ndarray | None = None  # [S, B] int32, None for a prefill without any cached prefix
    temperatures: np.ndarray | None = None  # [S] float32, None if all are greedy
    uniforms: np.ndarray | None = None  # [S] float64 in [0, 1), one draw per sequence, None if all are greedy
    rows_with_options: list[int] = field(default_factory=list)  # sequences that ask for more than a temperature
    seq_ids: list[int] | None = None  # decode only
    prompt_logprob_rows: np.ndarray | None = None  # tokens of which the next one's log-probability is wanted


class BatchBuilder:
    """Builds a `Batch` from sequences that the scheduler chose.

    As long as the same sequences decode step after step, their arrays are advanced in place: a length grows by one,
    and a row of the block table, which has `max_blocks` columns, changes once in `block_size` steps.
    """

    def __init__(self, block_size: int, max_blocks: int):
        self.block_size = block_size
        self.max_blocks = max_blocks
        self._decoding: list[Sequence] = []  # whose arrays the fields below are

    def prefill(self, seqs: list[Sequence]) -> Batch:
        """The scheduled chunk of each sequence, flattened."""
        self._decoding = []  # a preempted sequence comes back with other blocks, and only through a prefill
        starts = np.array([seq.num_computed_tokens for seq in seqs])
        lens = np.array([seq.num_scheduled_tokens for seq in seqs])
        cu_seqlens_q = np.concatenate([[0], lens.cumsum()]).astype(np.int32)
        positions = np.arange(cu_seqlens_q[-1]) + np.repeat(starts - cu_seqlens_q[:-1], lens)
        rows = np.repeat(np.arange(len(seqs)), lens)
        tokens = [
            np.frombuffer(seq.token_ids, dtype=np.int32)[start : start + n]
            for seq, start, n in zip(seqs, starts, lens, strict=True)
        ]
        block_tables = self._block_tables(seqs)
        return Batch(
            is_prefill=True,
            input_ids=np.concatenate(tokens, dtype=np.int64),
            positions=positions,
            slot_mapping=find_slots(block_tables, rows, positions, self.block_size),
            context_lens=(starts + lens).astype(np.int32),
            cu_seqlens_q=cu_seqlens_q,
            block_tables=block_tables if starts.any() else None,
            **_draw(*_random_state(seqs), starts + lens),
            rows_with_options=[row for row, seq in enumerate(seqs) if seq.has_options],
            prompt_logprob_rows=_prompt_logprob_rows(seqs, rows, positions),
        )

    def decode(self, seqs: list[Sequence]) -> Batch:
        """The last token of each sequence."""
        if seqs != self._decoding:
            self._decoding = list(seqs)
            self._seq_ids = [seq.seq_id for seq in seqs]
            self._rows = np.arange(len(seqs))
            self._lens = np.array([len(seq) for seq in seqs])
            self._tables = self._block_tables(seqs)
            self._random = _random_state(seqs)
            self._rows_with_options = [row for row, seq in enumerate(seqs) if seq.has_options]
        else:
            self._lens += 1
            for row in np.flatnonzero(self._lens % self.block_size == 1 % self.block_size).tolist():
                block_table = seqs[row].block_table
                self._tables[row, len(block_table) - 1] = block_table[-1]
        positions = self._lens - 1
        return Batch(
            is_prefill=False,
            input_ids=np.array([seq.token_ids[-1] for seq in seqs]),
            positions=positions,
            slot_mapping=find_slots(self._tables, self._rows, positions, self.block_size),
            context_lens=self._lens.astype(np.int32),
            block_tables=self._tables,
            **_draw(*self._random, self._lens),
            rows_with_options=self._rows_with_options,
            seq_ids=self._seq_ids,
        )

    def _block_tables(self, seqs: list[Sequence]) -> np.ndarray:
        """[S, B] int32; columns past a sequence's last block are 0 and never read."""
        num_blocks = np.array([len(seq.block_table) for seq in seqs])
        tables = np.zeros((len(seqs), self.max_blocks), dtype=np.int32)
        filled = np.arange(self.max_blocks) < num_blocks[:, None]
        tables[filled] = list(chain.from_iterable(seq.block_table for seq in seqs))
        return tables


def find_slots(tables: np.ndarray, rows: np.ndarray, positions: np.ndarray, block_size: int) -> np.ndarray:
    """[T] int64: where each of T tokens is in the cache, from its row in the [S, B] block tables and its position."""
    blocks, offsets = np.divmod(positions, block_size)
    return tables[rows, blocks].astype(np.int64) * block_size + offsets


def _prompt_logprob_rows(seqs: list[Sequence], rows: np.ndarray, positions: np.ndarray) -> np.ndarray | None:
    """Those of the T tokens that the next token of a prompt follows, where its log-probability is wanted."""
    prompt_lens = np.array([seq.num_prompt_tokens if seq.lacks_prompt_logprobs else 0 for seq in seqs])
    return np.flatnonzero(positions + 1 < prompt_lens[rows]) if prompt_lens.any() else None


def _random_state(seqs: list[Sequence]) -> tuple[np.ndarray | None, np.ndarray]:
    """[S] temperatures, or None if all are greedy, and [S] keys of the random streams."""
    temperatures = np.array([seq.temperature for seq in seqs], dtype=np.float32)
    return temperatures if temperatures.any() else None, np.array([seq.rng_key for seq in seqs], dtype=np.uint64)


def _draw(temperatures: np.ndarray | None, keys: np.ndarray, counters: np.ndarray) -> dict[str, np.ndarray]:
    return {} if temperatures is None else {"temperatures": temperatures, "uniforms": splitmix64(keys, counters)}


def splitmix64(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Element `counters[i]` of stream `keys[i]` ([S] uint64), as [S] float64 in [0, 1) with 53 random bits.

    A counter instead of a state: a token's draw depends on its request and its position, whatever runs beside it
    and however often it was preempted. SplitMix64 (Steele, Lea and Flood, 2014, doi:10.1145/2714064.2660195).
    """
    z = keys + counters.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
