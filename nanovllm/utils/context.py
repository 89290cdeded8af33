"""What attention and the LM head need to know of the step: set by the model runner before it, cleared after.

Legend: T tokens in the step, S sequences, B block-table columns.
"""

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Context:
    """Tensors live on the model's device."""

    is_prefill: bool = False  # each sequence brings one or more new tokens; else exactly one
    cu_seqlens_q: torch.Tensor | None = None  # [S + 1] int32, bounds of the new tokens among the T (prefill only)
    cu_seqlens_k: torch.Tensor | None = None  # [S + 1] int32, of all tokens up to the last new one (prefill only)
    max_seqlen_q: int = 0  # most new tokens of a sequence
    max_seqlen_k: int = 0  # most tokens of a sequence
    slot_mapping: torch.Tensor | None = None  # [T] int64, the cache slot of each new token; -1 is not stored
    context_lens: torch.Tensor | None = None  # [S] int32, tokens in the cache after this step's are stored
    block_tables: torch.Tensor | None = None  # [S, B] int32, None for a prefill in which none has a cached prefix


_context = Context()


def get_context() -> Context:
    return _context


def set_context(context: Context) -> None:
    global _context
    _context = context


def reset_context() -> None:
    set_context(Context())
