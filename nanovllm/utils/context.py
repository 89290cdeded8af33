"""What attention and the LM head need to know of the step: set by the model runner before it, cleared after.

Legend: T tokens in the step, S sequences, B block-table columns.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Context:
    """Tensors live on the model's device."""

    is_prefill: bool = False  # each sequence brings one or more new tokens; else exactly one
    cu_seqlens_q: Tensor | None = None  # [S + 1] int32, bounds of the new tokens among the T (prefill only)
    cu_seqlens_k: Tensor | None = None  # [S + 1] int32, of all tokens up to the last new one (prefill only)
    max_seqlen_q: int = 0  # most new tokens of a sequence
    max_seqlen_k: int = 0  # most tokens of a sequence
    slot_mapping: Tensor | None = None  # [T] int64, the cache slot of each new token; -1 is not stored
    context_lens: Tensor | None = None  # [S] int32, tokens in the cache after this step's are stored
    block_tables: Tensor | None = None  # [S, B] int32, None for a prefill in which none has a cached prefix


_local = threading.local()  # engines in several threads do not see each other's


def get_context() -> Context:
    return getattr(_local, "context", None) or Context()


@contextmanager
def use_context(context: Context) -> Iterator[None]:
    """Makes it what `get_context` returns within the block, in this thread."""
    _local.context = context
    try:
        yield
    finally:
        _local.context = None
