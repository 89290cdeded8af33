"""Sampling on all ranks, each of which has the logits of a part of the vocabulary: no rank gets all of them.

They trade columns for rows, so that each samples its share of the rows as one rank would, to the last bit. The busiest
rank receives 1 / P of what gathering would send to one, and has 1 / P of the sampling to do.
Legend: R tokens to sample, V vocabulary, P ranks.
"""

import torch.nn.functional as F
from torch import Tensor

from nanovllm.layers.sampler import sample
from nanovllm.utils.parallel import TensorParallel


def sample_on_ranks(
    tp: TensorParallel, logits: Tensor, vocab_size: int, temperatures: Tensor | None, uniforms: Tensor | None
) -> Tensor | None:
    """What `sample` would make of all columns: [R] tokens on rank 0, None on the others.

    Args:
        tp: The ranks, which all call this with the same `temperatures` and `uniforms`, see `sample`.
        logits: [R, columns] of this rank, as many on each; those past V together are padding.
        vocab_size: V.
        temperatures, uniforms: [R], or None if all are greedy.
    """
    num_rows = len(logits)
    share = -(-num_rows // tp.size)
    start, padding = tp.rank * share, tp.size * share - num_rows
    own = tp.exchange(F.pad(logits, (0, 0, 0, padding)))[:, :vocab_size]
    random = [None if x is None else F.pad(x, (0, padding))[start : start + share] for x in (temperatures, uniforms)]
    tokens = tp.gather_columns(sample(own, *random).unsqueeze(0))
    return None if tokens is None else tokens[0, :num_rows]
