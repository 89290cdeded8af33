"""A batch on its way to the other ranks: what rank 0 alone uses stays there, block tables go as what changed in them.

Legend: S rows of a batch, B block-table columns, C cells of the block tables that changed.
"""

from dataclasses import replace

import numpy as np

from nanovllm.engine.batch import Batch, find_slots

# Of a decode, ids, tokens and lengths of its rows; of other steps the batch without its block tables. Then what changed
# in these: C flat indices and what is there, None if the step needs none.
Cells = np.ndarray | None
Message = tuple[list[int], np.ndarray, np.ndarray, Cells, Cells] | tuple[Batch, Cells, Cells]


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
        if batch.cu_seqlens_q is None:
            return batch.seq_ids, batch.input_ids.astype(np.int32), batch.context_lens, cells, block_ids
        own = {"block_tables": None, "temperatures": None, "uniforms": None, "num_sampled": None, "has_options": False}
        return replace(batch, **own), cells, block_ids

    def decode(self, message: Message) -> Batch:
        """The batch without what concerns sampling."""
        *rest, cells, block_ids = message
        seq_ids = rest[0].seq_ids if len(rest) == 1 else rest[0]
        if cells is not None:
            self._rearrange(seq_ids)
            self._tables.put(cells, block_ids)
        if len(rest) == 1:
            return replace(rest[0], block_tables=None if cells is None else self._tables)
        _, input_ids, context_lens = rest
        rows, positions = np.arange(len(seq_ids)), context_lens.astype(np.int64) - 1
        return Batch(
            input_ids=input_ids.astype(np.int64),
            positions=positions,
            slot_mapping=find_slots(self._tables, rows, positions, self.block_size),
            context_lens=context_lens,
            block_tables=self._tables,
            seq_ids=seq_ids,
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
