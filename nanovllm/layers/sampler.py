"""From logits to tokens. Knows nothing of requests: each row brings its temperature and its random number.

Legend: S sequences, V vocabulary, C tokens in a chunk of it.
"""

import torch
from torch import Tensor

from nanovllm.kernels.fused import fused_ops

CHUNK = 512


def sample(logits: Tensor, temperatures: Tensor | None = None, uniforms: Tensor | None = None) -> Tensor:
    """One token a row, distributed as softmax(logits / temperature).

    Inverse CDF with one random number a row, instead of V exponential draws: first the chunk of the vocabulary in
    which the number falls, then the token in it. The distribution is exact to the precision of the fp32
    probabilities, and a token of probability 0 is never drawn. A row of temperature 0 takes its most likely token.

    Args:
        logits: [S, V], any floating dtype.
        temperatures, uniforms: [S] float32, and [S] float64 in [0, 1); None if all temperatures are 0.
    """
    if ops := fused_ops(logits):
        return ops.sample(logits, temperatures, uniforms)
    maxima, greedy = logits.max(-1)
    if temperatures is None:
        return greedy
    is_random = temperatures > 0
    weights = torch.nn.functional.pad(logits.float(), (0, -logits.shape[1] % CHUNK), value=-torch.inf)
    # Shifted before divided: a tiny temperature turns differences into -inf, whose exponential is 0, never into NaN.
    weights.sub_(maxima.float().unsqueeze(1)).div_(torch.where(is_random, temperatures, 1).unsqueeze(1)).exp_()
    weights = weights.unflatten(1, (-1, CHUNK))
    chunk_cdf = weights.sum(-1).double().cumsum(-1)
    chunk, rest = _invert(chunk_cdf, uniforms.unsqueeze(1) * chunk_cdf[:, -1:])
    in_chunk = weights[torch.arange(len(chunk), device=chunk.device), chunk]
    token, _ = _invert(in_chunk.double().cumsum(-1), rest.unsqueeze(1))
    return torch.where(is_random, chunk * CHUNK + token, greedy)


def _invert(cdf: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the first index where the [S, n] unnormalised `cdf` exceeds `target`, and how far into it that is.

    A target that rounding has pushed to the end is moved just below it: the index always has a positive weight.
    """
    target = torch.minimum(target, torch.nextafter(cdf[:, -1:], torch.zeros_like(cdf[:, -1:])))
    index = torch.searchsorted(cdf, target, right=True) * (cdf[:, -1:] > 0)  # 0 if they are NaN
    before = torch.where(index > 0, cdf.gather(1, (index - 1).clamp(min=0)), 0.0)
    return index.squeeze(1), (target - before).squeeze(1)
