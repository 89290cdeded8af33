"""Turns the sequences of a step into the arrays that the model runner needs, without a Python object per token.

Legend: T tokens in the step, D and C sequences, B block-table columns, R tokens to sample.
"""

from dataclasses import dataclass
from itertools import chain
from operator import attrgetter

import numpy as np

from nanovllm.engine.sequence import Sequence


@dataclass(slots=True)
class Batch:
    """One step's work, as NumPy arrays: first D tokens that are their sequences' last or drafts, then C chunks."""

    input_ids: np.ndarray  # [T] int64
    positions: np.ndarray  # [T] int64
    slot_mapping: np.ndarray  # [T] int64, where each token's key and value go: block_id * block_size + offset
    context_lens: np.ndarray  # [D + C] int32, tokens that a row's last query sees, itself included
    cu_seqlens_q: np.ndarray | None = None  # [C + 1] int32, bounds of the chunks after the D tokens; None if C is 0
    block_tables: np.ndarray | None = None  # [D + C, B] int32, None for chunks alone without any cached prefix
    logit_rows: np.ndarray | None = None  # [R] int64, tokens after which one is sampled; None: all
    num_sampled: np.ndarray | None = None  # [S] of these R for each sequence, None: one
    temperatures: np.ndarray | None = None  # [R] float32, None if all are greedy
    uniforms: np.ndarray | None = None  # [R] float64 in [0, 1), one draw each, None if all are greedy
    has_options: bool = False  # some sequence asks for more than a temperature
    seq_ids: list[int] | None = None  # [D + C]
    prompt_logprob_rows: np.ndarray | None = None  # given tokens of which the next one's log-probability is wanted
    sources: np.ndarray | None = None  # [D] int64: which of the last samples a row's input is, -1 if `input_ids` has it

    @property
    def random(self) -> list[np.ndarray | None]:
        """What `sample` needs beside the logits."""
        return [self.temperatures, self.uniforms]

    @property
    def num_decode(self) -> int:
        """D."""
        return len(self.context_lens) - (0 if self.cu_seqlens_q is None else len(self.cu_seqlens_q) - 1)

    @property
    def all_bounds(self) -> np.ndarray:
        """[D + C + 1] int32, of all rows in a step with chunks."""
        return np.concatenate([np.arange(self.num_decode, dtype=np.int32), self.num_decode + self.cu_seqlens_q])


class BatchBuilder:
    """Builds a `Batch` from sequences that the scheduler chose.

    As long as the same sequences are computed step after step, their arrays stay: a row of the block table, which has
    `max_blocks` columns, changes once in `block_size` steps. If it `always_reads_cache`, there is always a block table.
    """

    def __init__(self, block_size: int, max_blocks: int, always_reads_cache: bool = False):
        self.block_size = block_size
        self.max_blocks = max_blocks
        self.always_reads_cache = always_reads_cache
        self._seqs: list[Sequence] = []  # whose arrays the fields below are

    def build(self, seqs: list[Sequence], unread: list[Sequence] = ()) -> Batch:
        """The scheduled tokens of each sequence; those with chunks come last.

        The last tokens of `unread` are not known here, but on the device: the samples of the step before.
        """
        starts = np.fromiter(map(attrgetter("num_computed_tokens"), seqs), np.int64, len(seqs))
        lens = np.fromiter(map(attrgetter("num_scheduled_tokens"), seqs), np.int64, len(seqs))
        ends = starts + lens
        self._update(seqs, starts, ends)
        # What brings a prompt's last token alone is a decode, too: it is computed in the same way. Only the last
        # sequence may be a prompt that is not complete.
        is_plain = lens.max() == 1 and ends[-1] >= len(seqs[-1])
        batch = self._decode(seqs, ends) if is_plain else self._mixed(seqs, starts, lens, ends)
        if self._temperatures.any():
            temperatures, keys, positions = self._temperatures, self._keys, batch.positions
            if not is_plain:
                rows = np.repeat(self._rows, lens)
                if batch.logit_rows is not None:
                    rows, positions = rows[batch.logit_rows], positions[batch.logit_rows]
                temperatures, keys = temperatures[rows], keys[rows]
            # A token's draw depends on its request and its position alone.
            batch.temperatures, batch.uniforms = temperatures, splitmix64(keys, positions + 1)
        if unread:
            row_of = {seq.seq_id: row for row, seq in enumerate(unread)}
            rows = [row_of.get(seq_id, -1) for seq_id in self._seq_ids[: batch.num_decode]]
            batch.sources = np.array(rows, dtype=np.int64)
        return batch

    def _decode(self, seqs: list[Sequence], ends: np.ndarray) -> Batch:
        """The last token of each sequence."""
        positions = ends - 1
        return Batch(
            input_ids=np.array([seq.token_ids[-1] for seq in seqs]),
            positions=positions,
            slot_mapping=find_slots(self._tables, self._rows, positions, self.block_size),
            context_lens=ends.astype(np.int32),
            block_tables=self._tables,
            seq_ids=self._seq_ids,
            has_options=self._has_options,
        )

    def _mixed(self, seqs: list[Sequence], starts: np.ndarray, lens: np.ndarray, ends: np.ndarray) -> Batch:
        """Last tokens with their drafts, and chunks."""
        known = np.array([len(seq) for seq in seqs])
        is_chunk = (known - starts > 1) | (ends < known)
        num_decode = int(is_chunk.argmax()) if is_chunk.any() else len(seqs)
        num_tokens, tables = int(lens[:num_decode].sum()), self._tables
        rows = np.repeat(self._rows, lens)
        positions = np.arange(len(rows)) + np.repeat(ends - lens.cumsum(), lens)
        context_lens, seq_ids = np.concatenate([positions[:num_tokens] + 1, ends[num_decode:]]), self._seq_ids
        if num_tokens > num_decode:  # a row for each draft
            table_rows = np.concatenate([rows[:num_tokens], self._rows[num_decode:]])
            tables, seq_ids = tables[table_rows], [seq_ids[row] for row in table_rows.tolist()]
        batch = Batch(
            input_ids=_input_ids(seqs, starts, ends, num_decode),
            positions=positions,
            slot_mapping=find_slots(self._tables, rows, positions, self.block_size),
            context_lens=context_lens.astype(np.int32),
            block_tables=tables if num_tokens or starts.any() or self.always_reads_cache else None,
            seq_ids=seq_ids,
            has_options=self._has_options,
        )
        if num_tokens < len(positions):
            batch.cu_seqlens_q = np.concatenate([[0], lens[num_decode:].cumsum()]).astype(np.int32)
            lasts = lens.cumsum()[num_decode:][(ends == known)[num_decode:]] - 1  # of the chunks that end a prompt
            batch.logit_rows = np.concatenate([np.arange(num_tokens), lasts])
            batch.prompt_logprob_rows = _unscored_rows(seqs, rows, positions)
        batch.num_sampled = np.where(is_chunk, ends == known, lens)
        return batch

    def _update(self, seqs: list[Sequence], starts: np.ndarray, ends: np.ndarray) -> None:
        """Makes the arrays those of `seqs`, which have blocks up to `ends`."""
        num_blocks = -(-ends // self.block_size)
        if seqs == self._seqs:  # blocks may be others if one does not go on where its last step was to end
            for row in np.flatnonzero((num_blocks != self._num_blocks) | (starts != self._ends)).tolist():
                self._tables[row, : num_blocks[row]] = seqs[row].block_table
        else:
            self._seqs = list(seqs)
            self._rows = np.arange(len(seqs))
            self._tables = np.zeros((len(seqs), self.max_blocks), dtype=np.int32)  # past the last block never read
            filled = np.arange(self.max_blocks) < num_blocks[:, None]
            self._tables[filled] = list(chain.from_iterable(seq.block_table for seq in seqs))
            self._seq_ids = [seq.seq_id for seq in seqs]
            self._temperatures = np.array([seq.temperature for seq in seqs], dtype=np.float32)
            self._keys = np.array([seq.rng_key for seq in seqs], dtype=np.uint64)
            self._has_options = any(seq.has_options for seq in seqs)
        self._num_blocks, self._ends = num_blocks, ends


def _input_ids(seqs: list[Sequence], starts: np.ndarray, ends: np.ndarray, num_decode: int) -> np.ndarray:
    last = list(chain.from_iterable((seq.token_ids[-1], *seq.draft_ids) for seq in seqs[:num_decode]))
    parts = zip(seqs[num_decode:], starts[num_decode:], ends[num_decode:], strict=True)
    chunks = [np.frombuffer(seq.token_ids, dtype=np.int32)[start:end] for seq, start, end in parts]
    return np.concatenate([np.array(last, dtype=np.int64), *chunks])


def find_slots(tables: np.ndarray, rows: np.ndarray, positions: np.ndarray, block_size: int) -> np.ndarray:
    """[T] int64: where each of T tokens is in the cache, from its row in the [S, B] block tables and its position."""
    blocks, offsets = np.divmod(positions, block_size)
    return tables[rows, blocks].astype(np.int64) * block_size + offsets


def _unscored_rows(seqs: list[Sequence], rows: np.ndarray, positions: np.ndarray) -> np.ndarray | None:
    """Those of the T tokens that a given token follows whose log-probability is wanted."""
    wanted = [seq.unscored for seq in seqs]
    if not any(wanted):
        return None
    starts, ends = np.array([(span.start, span.stop) for span in wanted]).T[:, rows]
    found = np.flatnonzero((starts <= positions + 1) & (positions + 1 < ends))
    return found if len(found) else None


def splitmix64(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Element `counters[i]` of stream `keys[i]` ([S] uint64), as [S] float64 in [0, 1) with 53 random bits.

    A counter instead of a state: a token's draw depends on its request and its position, whatever runs beside it
    and however often it was preempted. SplitMix64 (Steele, Lea and Flood, 2014, doi:10.1145/2714064.2660195).
    """
    z = keys + counters.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
