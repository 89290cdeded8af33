"""A batch on its way to the other ranks: what rank 0 alone uses stays there, block tables go as what changed in them.

Legend: S rows of a batch, B block-table columns, C cells of the block tables that changed.
"""

from dataclasses import replace

import numpy as np

from nanovllm.engine.batch import Batch, find_slots

# A batch without its block tables, then what changed in these: C flat indices and what is there; None if the step needs
# none. A decode comes without what follows from its lengths.
Message = tuple[Batch, np.ndarray | None, np.ndarray | None]


class BatchCodec:
    """Each end keeps the block tables of the last step, with the `max_blocks` columns of a full one."""

    def __init__(self, block_size: int, max_blocks: int):
        self.block_size = block_size
        self._seq_ids: list[int] = []
        self._tables = np.zeros((0, max_blocks), dtype=np.int32)  # [S, B]

    def encode(self, batch: Batch) -> Message:
        """What `decode` at the other end needs; each batch must go through both, in the same order."""
        cells = block_ids = None
        if batch.block_tables is not None:
            self._rearrange(batch.seq_ids)
            cells = np.flatnonzero(batch.block_tables != self._tables).astype(np.int32)
            block_ids = batch.block_tables.take(cells)
            self._tables.put(cells, block_ids)
        sent = replace(batch, block_tables=None, num_sampled=None)
        if batch.cu_seqlens_q is None:
            sent.positions = sent.slot_mapping = None
            sent.input_ids = batch.input_ids.astype(np.int32)
        return sent, cells, block_ids

    def decode(self, message: Message) -> Batch:
        """The batch without what only rank 0 needs."""
        batch, cells, block_ids = message
        if cells is not None:
            self._rearrange(batch.seq_ids)
            self._tables.put(cells, block_ids)
            batch.block_tables = self._tables
        if batch.cu_seqlens_q is None:
            rows, batch.positions = np.arange(len(batch.seq_ids)), batch.context_lens.astype(np.int64) - 1
            batch.slot_mapping = find_slots(self._tables, rows, batch.positions, self.block_size)
            batch.input_ids = batch.input_ids.astype(np.int64)
        return batch

    def _rearrange(self, seq_ids: list[int]) -> None:
        """Each row goes where its sequence is now; those of new sequences are zeros."""
        if seq_ids == self._seq_ids:
            return
        row_of = {seq_id: row for row, seq_id in enumerate(self._seq_ids)}
        sources = np.array([row_of.get(seq_id, -1) for seq_id in seq_ids])
        tables = self._tables[sources] if len(row_of) else np.zeros((len(seq_ids), self._tables.shape[1]), np.int32)
        tables[sources < 0] = 0
        self._seq_ids, self._tables = seq_ids, tables
