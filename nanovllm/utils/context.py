"""What attention and the LM head need to know of the step: set by the model runner before it, cleared after.

Legend: T tokens in the step, S rows or sequences of a part of it, B block-table columns.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Context:
    """Whose keys the queries of a part of the step see: rows of a token each, or chunks. On the model's device."""

    cu_seqlens_q: Tensor | None = None  # [S + 1] int32, bounds of the new tokens among the part's (chunks only)
    cu_seqlens_k: Tensor | None = None  # [S + 1] int32, of all tokens up to the last new one (chunks only)
    max_seqlen_q: int = 1  # most new tokens of a sequence
    max_seqlen_k: int = 0  # most tokens of a sequence
    context_lens: Tensor | None = None  # [S] int32, tokens in the cache after this step's are stored
    block_tables: Tensor | None = None  # [S, B] int32, None for chunks of which none has a cached prefix


@dataclass(slots=True)
class Step:
    """What is computed together. First the tokens of `decode`, then those of `prefill`; one may be missing."""

    decode: Context | None = None  # each of its rows is one token
    prefill: Context | None = None
    slot_mapping: Tensor | None = None  # [T] int64, the cache slot of each new token; -1 is not stored
    logit_rows: Tensor | None = None  # [R] int64, the tokens whose logits are wanted; None: all


_local = threading.local()  # engines in several threads do not see each other's


def get_step() -> Step:
    return getattr(_local, "step", None) or Step()


@contextmanager
def use_step(step: Step) -> Iterator[None]:
    """Makes it what `get_step` returns within the block, in this thread."""
    _local.step = step
    try:
        yield
    finally:
        _local.step = None
