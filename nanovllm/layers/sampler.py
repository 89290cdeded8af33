"""From logits to tokens. Knows nothing of requests: each row brings its temperature and its random number.

Legend: S sequences, V vocabulary, C tokens in a chunk of it.
"""

import torch

CHUNK = 512


def sample(
    logits: torch.Tensor, temperatures: torch.Tensor | None = None, uniforms: torch.Tensor | None = None
) -> torch.Tensor:
    """One token a row, distributed as softmax(logits / temperature).

    Inverse CDF with one random number a row, instead of V exponential draws: first the chunk of the vocabulary in
    which the number falls, then the token in it. The sums are in fp64, so the distribution is exact to the precision
    of the fp32 probabilities, and a token of probability 0 is never drawn.

    Args:
        logits: [S, V], any floating dtype.
        temperatures: [S] float32; a row with 0 takes its most likely token. None: all rows do.
        uniforms: [S] float64 in [0, 1), needed with `temperatures`.

    Returns:
        [S] int64.
    """
    greedy = logits.argmax(-1)
    if temperatures is None:
        return greedy
    # Shifted before divided: a tiny temperature turns differences into -inf, whose exponential is 0, never into NaN.
    probs = logits.float()
    probs = (probs - probs.amax(-1, keepdim=True)).div_(torch.where(temperatures > 0, temperatures, 1).unsqueeze(1))
    probs = torch.nn.functional.pad(probs.exp_(), (0, -logits.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK))
    chunk_cdf = probs.sum(-1, dtype=torch.float64).cumsum(-1)
    chunk, rest = _invert(chunk_cdf, uniforms.unsqueeze(1) * chunk_cdf[:, -1:])
    in_chunk = probs[torch.arange(len(chunk), device=chunk.device), chunk]
    token, _ = _invert(in_chunk.double().cumsum(-1), rest.unsqueeze(1))
    return torch.where(temperatures > 0, chunk * CHUNK + token, greedy)


def _invert(cdf: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row the first index where the [S, n] unnormalised `cdf` exceeds `target`, and how far into it that is.

    A target that rounding has pushed to the end is moved just below it: the index always has a positive weight.
    """
    target = torch.minimum(target, torch.nextafter(cdf[:, -1:], torch.zeros_like(cdf[:, -1:])))
    index = torch.searchsorted(cdf, target, right=True)
    before = torch.where(index > 0, cdf.gather(1, (index - 1).clamp(min=0)), 0.0)
    return index.squeeze(1), (target - before).squeeze(1)
