"""Fewer cases than all combinations, where each value proves the same beside any other."""

from collections.abc import Sequence
from itertools import product

import torch


def in_turn(*lists: Sequence, is_whole: bool = torch.cuda.is_available()) -> list[tuple]:
    """Tuples of a value of each list: as many as the longest has, each value at least once; or all if `is_whole`.

    Triton's interpreter takes a thousand times as long as a GPU, so without one it gets the few.
    """
    if is_whole:
        return list(product(*lists))
    return [tuple(values[i % len(values)] for values in lists) for i in range(max(map(len, lists)))]


def case_id(value: object) -> str:
    """Of one value of a case; a number alone is an architecture."""
    return f"sm_{value}" if isinstance(value, int) else str(value)
