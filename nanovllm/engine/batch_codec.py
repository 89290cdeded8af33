"""A batch on its way to the other ranks, in as few bytes as they need: what rank 0 alone uses stays there.

Legend: T tokens in the step, S sequences, B block-table columns, C cells of the block tables that changed.
"""

import numpy as np

from nanovllm.engine.batch import Batch, find_slots

Message = tuple[np.ndarray | None, ...]


class BatchCodec:
    """Each end keeps the lengths and block tables of the last decode step, so that only what changed is sent.

    In a decode step that is the last tokens and a few cells of the block tables; in one with other sequences than the
    last, also where each one's row comes from.

    Args:
        block_size: Tokens per block.
        max_blocks: Columns of a full block table.
    """

    def __init__(self, block_size: int, max_blocks: int):
        self.block_size = block_size
        self._seq_ids: list[int] = []
        self._lens = np.zeros(0, dtype=np.int32)  # [S]
        self._tables = np.zeros((0, max_blocks), dtype=np.int32)  # [S, B]

    def encode(self, batch: Batch) -> Message:
        """What `decode` at the other end needs; each batch must go through both, in the same order."""
        if batch.is_prefill:
            tables = batch.block_tables
            if tables is not None:  # [S, B] with only the columns in use
                tables = tables[:, : -(-int(batch.context_lens.max()) // self.block_size)]
            input_ids, slots = batch.input_ids.astype(np.int32), batch.slot_mapping.astype(np.int32)
            return input_ids, slots, batch.context_lens, batch.cu_seqlens_q, tables, batch.prompt_logprob_rows
        sources = lens = None
        if batch.seq_ids is not self._seq_ids:
            row_of = {seq_id: row for row, seq_id in enumerate(self._seq_ids)}
            sources = np.array([row_of.get(seq_id, -1) for seq_id in batch.seq_ids], dtype=np.int32)
            lens, self._seq_ids = batch.context_lens, batch.seq_ids
            self._rearrange(sources)
        cells = np.flatnonzero(batch.block_tables != self._tables).astype(np.int32)
        block_ids = batch.block_tables.take(cells)
        self._tables.put(cells, block_ids)
        return batch.input_ids.astype(np.int32), sources, lens, cells, block_ids

    def decode(self, message: Message) -> Batch:
        """The batch without what concerns sampling."""
        if len(message) == 6:
            return self._decode_prefill(*message)
        input_ids, sources, lens, cells, block_ids = message
        if sources is not None:
            self._rearrange(sources)
            self._lens = lens.copy()
        else:
            self._lens += 1
        self._tables.put(cells, block_ids)
        positions = self._lens.astype(np.int64) - 1
        return Batch(
            is_prefill=False,
            input_ids=input_ids.astype(np.int64),
            positions=positions,
            slot_mapping=find_slots(self._tables, np.arange(len(input_ids)), positions, self.block_size),
            context_lens=self._lens,
            block_tables=self._tables,
        )

    def _decode_prefill(
        self,
        input_ids: np.ndarray,
        slots: np.ndarray,
        context_lens: np.ndarray,
        cu_seqlens_q: np.ndarray,
        block_tables: np.ndarray | None,
        prompt_logprob_rows: np.ndarray | None,
    ) -> Batch:
        return Batch(
            is_prefill=True,
            input_ids=input_ids.astype(np.int64),
            positions=np.arange(len(input_ids)) + np.repeat(context_lens - cu_seqlens_q[1:], np.diff(cu_seqlens_q)),
            slot_mapping=slots.astype(np.int64),
            context_lens=context_lens,
            cu_seqlens_q=cu_seqlens_q,
            block_tables=block_tables,
            prompt_logprob_rows=prompt_logprob_rows,
        )

    def _rearrange(self, sources: np.ndarray) -> None:
        """Row i of the tables becomes what row `sources[i]` was, or zeros where that is -1."""
        tables = np.zeros((len(sources), self._tables.shape[1]), dtype=np.int32)
        known = sources >= 0
        tables[known] = self._tables[sources[known]]
        self._tables = tables
