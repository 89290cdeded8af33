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
    """Sets to -inf what each row's filters cut, in the order min-p, top-k, top-p.

    Min-p: Nguyen et al., 2024, arXiv:2407.01082. Top-p keeps the token that reaches the sum: Holtzman et al., 2019,
    arXiv:1904.09751.

    Args:
        logits: [R, V] fp32, already divided by the temperature. So is what is returned.
        top_k: [R] int64, 0 or less for no limit.
        top_p: [R] float64, 1 for no limit.
        min_p: [R] float32, 0 for no limit.
    """
    logits = logits.masked_fill(logits < (logits.amax(-1) + min_p.log()).unsqueeze(1), -math.inf)
    vocab_size = logits.shape[1]
    top_k = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size).unsqueeze(1)
    top_p = torch.where(top_p < 1, top_p, math.inf).unsqueeze(1)  # a sum may round to 1 before the last token
    is_cut = (top_k < vocab_size) | top_p.isfinite()
    if not is_cut.any():
        return logits
    num_first = int(top_k.clamp(max=FIRST_TRY).max()) if (top_k == vocab_size).any() else int(top_k.max())
    for num_candidates in (num_first, vocab_size):
        values, ids = logits.topk(num_candidates)
        in_top_k = torch.arange(num_candidates, device=logits.device) < top_k
        in_sum = values.masked_fill(~in_top_k, -math.inf).logsumexp(-1, True)
        total = torch.where(top_k < vocab_size, in_sum, logits.logsumexp(-1, True))
        probs = (values - total).double().exp()
        mass = probs.cumsum(-1)
        if not ((mass[:, -1:] < top_p) & top_p.isfinite() & (top_k > num_candidates)).any():
            break
    kept = values.masked_fill(~in_top_k | (mass - probs >= top_p), -math.inf)
    return torch.where(is_cut, torch.full_like(logits, -math.inf).scatter(1, ids, kept), logits)


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
