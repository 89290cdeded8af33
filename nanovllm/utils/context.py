"""What attention and the LM head need to know of the step: set by the model runner before it, cleared after.

Legend: T tokens in the step, S sequences, B block-table columns.
"""

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Context:
    """Tensors live on the model's device.

    Attributes:
        is_prefill: Each sequence brings one or more new tokens; else exactly one.
        cu_seqlens_q: [S + 1] int32, bounds of each sequence's new tokens among the T (prefill only).
        cu_seqlens_k: [S + 1] int32, the same for all tokens up to the last new one (prefill only).
        max_seqlen_q: Most new tokens of a sequence.
        max_seqlen_k: Most tokens of a sequence.
        slot_mapping: [T] int64, the cache slot of each new token; -1 is not stored.
        context_lens: [S] int32, tokens in the cache after this step's are stored.
        block_tables: [S, B] int32, or None for a prefill in which no sequence has a cached prefix.
    """

    is_prefill: bool = False
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    slot_mapping: torch.Tensor | None = None
    context_lens: torch.Tensor | None = None
    block_tables: torch.Tensor | None = None


_context = Context()


def get_context() -> Context:
    return _context


def set_context(context: Context) -> None:
    global _context
    _context = context


def reset_context() -> None:
    set_context(Context())
