"""What sampling parameters beyond the temperature do to logits. Only rows that ask for it come here.

Legend: R rows, V vocabulary, K candidates.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nanovllm.sampling_params import SamplingParams

FIRST_TRY = 1024  # most likely tokens to look at before the whole vocabulary is sorted for top-p


def apply_masks(logits: Tensor, allowed: np.ndarray, rows: Sequence[int]) -> None:
    """Sets to -inf, in place, what masks do not allow in so many rows of [R, V] logits.

    `allowed` is [len(rows), ceil(V / 32)] int32: bit i % 32 of word i // 32 says whether token i is.
    """
    octets = torch.from_numpy(allowed.view(np.uint8)).to(logits.device).unsqueeze(-1)
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=logits.device)
    is_forbidden = (octets.bitwise_and(powers) == 0).flatten(1)[:, : logits.shape[1]]
    if len(rows) == len(logits):
        logits.masked_fill_(is_forbidden, -math.inf)
    else:
        logits[rows] = logits[rows].masked_fill(is_forbidden, -math.inf)


def edit_logits(
    logits: Tensor, params: SamplingParams, prompt_ids: np.ndarray, output_ids: np.ndarray,
    end_ids: frozenset[int], bad_words_ids: Sequence[Sequence[int]]
) -> Tensor:  # fmt: skip
    """Everything that comes before the temperature, in the order that `SamplingParams` states.

    Changes the [V] fp32 logits in place. `min_tokens` forbids the `end_ids`; `output_ids` are the completion so far.
    """
    if params.allowed_token_ids:
        allowed = torch.full_like(logits, -math.inf)
        allowed[list(params.allowed_token_ids)] = 0.0
        logits += allowed
    for word in bad_words_ids:
        *start, last = word
        if len(output_ids) >= len(start) and output_ids[len(output_ids) - len(start) :].tolist() == start:
            logits[last] = -math.inf
    if len(output_ids) < params.min_tokens:
        logits[list(end_ids)] = -math.inf
    for token_id, bias in params.logit_bias.items():
        logits[token_id] += bias
    for process in params.logits_processors:
        logits = process(output_ids.tolist(), logits)
    return _apply_penalties(logits, params, prompt_ids, output_ids)


def _apply_penalties(logits: Tensor, params: SamplingParams, prompt_ids: np.ndarray, output_ids: np.ndarray) -> Tensor:
    """Repetition: Keskar et al., 2019, arXiv:1909.05858. Frequency and presence: the OpenAI API's."""
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(np.concatenate([prompt_ids, output_ids]))).long().to(logits.device)
        factor = params.repetition_penalty
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / factor, logits[seen] * factor)
    if params.frequency_penalty or params.presence_penalty:
        ids, counts = (torch.from_numpy(x).long().to(logits.device) for x in np.unique(output_ids, return_counts=True))
        logits[ids] -= params.frequency_penalty * counts + params.presence_penalty
    return logits


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Sets to -inf what each row's filters cut, in the order min-p, top-k, top-p. No row depends on another's filters.

    Min-p: Nguyen et al., 2024, arXiv:2407.01082. Top-p keeps the token that reaches the sum: Holtzman et al., 2019,
    arXiv:1904.09751. Of equally likely tokens those of lower ids are kept first. Takes about 45 bytes a logit.

    Args:
        logits: [R, V] fp32, already divided by the temperature. So is what is returned.
        top_k: [R] int64, 0 or less for no limit. This and the next two are on the CPU, where the work is planned.
        top_p: [R] float64, 1 for no limit.
        min_p: [R] float32, 0 for no limit.
    """
    vocab_size, device = logits.shape[1], logits.device
    logits = logits.masked_fill(logits < logits.amax(-1, True) + min_p.log().unsqueeze(1).to(device), -math.inf)
    top_k = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size)
    top_p = torch.where(top_p < 1, top_p, math.inf)  # the last tokens may weigh nothing, and are kept
    undecided = ((top_k < vocab_size) | (top_p < 1)).nonzero().squeeze(1)
    for most in (FIRST_TRY, vocab_size):
        if len(undecided):
            k, p = top_k[undecided], top_p[undecided]
            cut, is_decided = _cut(logits[undecided], k.to(device), p.to(device), min(most, int(k.max())))
            is_decided = is_decided.cpu()
            logits[undecided[is_decided]] = cut[is_decided]
            undecided = undecided[~is_decided]
    return logits


def _cut(logits: Tensor, top_k: Tensor, top_p: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """`filter_logits` for R rows by their likeliest tokens; the rows for which those were enough, as [R] bool.

    Probabilities are integers, whose sums depend neither on their order nor on how many candidates there are.
    """
    vocab_size = logits.shape[1]
    top_k, top_p = top_k.unsqueeze(1), top_p.unsqueeze(1)
    candidates = logits.topk(num_candidates).values
    scale = 2.0 ** (62 - vocab_size.bit_length())  # so that the sum of a row stays below 2^63
    in_top_k = torch.arange(num_candidates, device=logits.device) < top_k
    weights = (candidates - candidates[:, :1]).exp_().mul_(scale).long() * in_top_k
    total = (logits - candidates[:, :1]).exp_().mul_(scale).long().sum(-1, True)
    total = torch.where(top_k < vocab_size, weights.sum(-1, True), total)
    is_kept = (weights.cumsum(-1) - weights < top_p * total) & in_top_k
    num_kept = is_kept.sum(-1, True).clamp(min=1)  # NaN keeps nothing
    is_decided = (top_k <= num_candidates) | (num_kept < num_candidates)
    last = candidates.gather(1, num_kept - 1)
    above, equal = logits > last, logits == last
    kept = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= num_kept - above.sum(-1, True)))
    return logits.masked_fill(~kept, -math.inf), is_decided.squeeze(1)


def token_logprobs(logits: Tensor, token_ids: list[int], num_top: int) -> list[dict]:
    """R `outputs.TokenLogprob` from [R, V] logits of any dtype: of R tokens and the `num_top` (-1: all) likeliest."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device).unsqueeze(1))
    ranks = (logprobs > chosen).sum(-1) + 1
    values, ids = logprobs.topk(logprobs.shape[1] if num_top < 0 else min(num_top, logprobs.shape[1]))
    return [
        {"token_id": token_id, "logprob": logprob, "rank": rank, "top": [list(pair) for pair in zip(*top, strict=True)]}
        for token_id, logprob, rank, *top in zip(
            token_ids, chosen.squeeze(1).tolist(), ranks.tolist(), ids.tolist(), values.tolist(), strict=True
        )
    ]
