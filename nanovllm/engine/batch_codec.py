"""A batch on its way to the other ranks: what rank 0 alone uses stays there, block tables go as what changed in them.

Legend: S sequences, B block-table columns, C cells of the block tables that changed.
"""

from dataclasses import replace

import numpy as np

from nanovllm.engine.batch import Batch, find_slots

# A batch with chunks; or the ids, last tokens and lengths of S sequences, C flat indices and what is there, and how to
# sample: temperatures, random numbers, and whether some sequence has options.
Sampling = tuple[np.ndarray | None, np.ndarray | None, bool]
Message = tuple[Batch] | tuple[list[int], np.ndarray, np.ndarray, np.ndarray, np.ndarray, Sampling]


class BatchCodec:
    """Each end keeps the block tables of the last decode step, with the `max_blocks` columns of a full one."""

    def __init__(self, block_size: int, max_blocks: int):
        self.block_size = block_size
        self._seq_ids: list[int] = []
        self._tables = np.zeros((0, max_blocks), dtype=np.int32)  # [S, B]

    def encode(self, batch: Batch) -> Message:
        """What `decode` at the other end needs; each batch must go through both, in the same order."""
        if batch.cu_seqlens_q is not None:
            return (replace(batch, num_sampled=None),)
        self._rearrange(batch.seq_ids)
        cells = np.flatnonzero(batch.block_tables != self._tables).astype(np.int32)
        block_ids = batch.block_tables.take(cells)
        self._tables.put(cells, block_ids)
        sampling = (*batch.random, batch.has_options)
        return batch.seq_ids, batch.input_ids.astype(np.int32), batch.context_lens, cells, block_ids, sampling

    def decode(self, message: Message) -> Batch:
        """The batch without what only rank 0 needs."""
        if len(message) == 1:
            return message[0]
        seq_ids, input_ids, context_lens, cells, block_ids, sampling = message
        self._rearrange(seq_ids)
        self._tables.put(cells, block_ids)
        temperatures, uniforms, has_options = sampling
        rows, positions = np.arange(len(seq_ids)), context_lens.astype(np.int64) - 1
        return Batch(
            input_ids=input_ids.astype(np.int64),
            positions=positions,
            slot_mapping=find_slots(self._tables, rows, positions, self.block_size),
            context_lens=context_lens,
            block_tables=self._tables,
            temperatures=temperatures,
            uniforms=uniforms,
            has_options=has_options,
        )

    def _rearrange(self, seq_ids: list[int]) -> None:
        """Each row goes where its sequence is now; those of new sequences are zeros."""
        if seq_ids == self._seq_ids:
            return
        row_of = {seq_id: row for row, seq_id in enumerate(self._seq_ids)}
        sources = np.array([row_of.get(seq_id, -1) for seq_id in seq_ids])
        tables = self._tables[sources] if len(row_of) else np.zeros((len(seq_ids), self._tables.shape[1]), np.int32)
        tables[sources < 0] = 0
        self._seq_ids, self._tables = seq_ids, tables
