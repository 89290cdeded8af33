"""What sampling parameters beyond the temperature do to logits. Only rows that ask for it come here.

In plain PyTorch without a wait for the device, and with as many launches for many rows as for few; for bf16 on a CPU
the kernels do the same in one call.
Legend: R rows of logits, O of them with options, V vocabulary, M masks, P processed rows, C cells of the [O, V] logits,
N tokens, K candidates.
"""

import math
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels import cpu as cpu_kernels
from nanovllm.kernels.fused import fused_ops
from nanovllm.layers.sampler import sample
from nanovllm.utils.device import upload


@dataclass(slots=True)
class Options:
    """What the O rows ask for; an absent array asks for nothing.

    Biases and penalties are for some cells, row * V + token, none twice, row by row: row i's from starts[i] on.
    """

    rows: np.ndarray  # [O] int64, which of the R
    top_k: np.ndarray | None = None  # [O] int64, V for no limit
    top_p: np.ndarray | None = None  # [O] float64, 1 for no limit
    log_min_p: np.ndarray | None = None  # [O] float32, -inf for no limit
    mask_rows: np.ndarray | None = None  # [M] int64, which of the O
    masks: np.ndarray | None = None  # [M, ceil(V / 32)] int32: token i is allowed if bit i % 32 of word i // 32 is set
    bias_starts: np.ndarray | None = None  # [O + 1] int64
    bias_cells: np.ndarray | None = None  # [C] int64
    biases: np.ndarray | None = None  # [C] float32 to add; -inf forbids
    penalty_starts: np.ndarray | None = None  # [O + 1] int64
    penalty_cells: np.ndarray | None = None  # [C] int64
    factors: np.ndarray | None = None  # [C] float32, which divide positive logits and multiply others
    subtrahends: np.ndarray | None = None  # [C] float32, to subtract thereafter
    processed_rows: np.ndarray | None = None  # [P] int64, which of the O
    processed: Tensor | None = None  # [P, V] fp32 on the logits' device, which takes the place of theirs

    def on(self, device: torch.device) -> "Options":
        """With tensors in place of arrays, by one upload."""
        names = [field.name for field in fields(self) if field.name != "processed"]
        uploaded = upload([getattr(self, name) for name in names], device)
        return replace(self, **dict(zip(names, uploaded, strict=True)))


def sample_with_options(
    logits: Tensor, temperatures: Tensor | None, uniforms: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """As `sample`, after the edits and filters of the rows that have some; also for which of these, as [O] bool, the
    edits are ignored because they forbid every token. The other rows are sampled as `sample` would, to the last bit.
    """
    if fused_ops(logits) is cpu_kernels:
        return cpu_kernels.sample_with_options(logits, temperatures, uniforms, options)
    tokens = sample(logits, temperatures, uniforms)
    options = options.on(logits.device)
    original = logits.index_select(0, options.rows).to(torch.float32, copy=True)
    edited = edit_logits(original.clone(), options)
    is_ignored = edited.amax(-1) == -math.inf
    edited = torch.where(is_ignored.unsqueeze(1), original, edited)
    if temperatures is not None:
        temperatures, uniforms = temperatures.index_select(0, options.rows), uniforms.index_select(0, options.rows)
        divisors = torch.where(temperatures > 0, temperatures, 1).unsqueeze(1)
        edited = filter_logits(edited.sub_(edited.amax(-1, keepdim=True)).div_(divisors), options)
        temperatures = (temperatures > 0).float()
    return tokens.index_copy_(0, options.rows, sample(edited, temperatures, uniforms)), is_ignored


def apply_masks(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Sets to -inf, in place, what masks do not allow in rows of [R, V] logits.

    Args:
        logits: Of any dtype.
        rows: [M] int64.
        masks: [M, ceil(V / 32)] int32, see `Options.masks`.
    """
    if fused_ops(logits) is cpu_kernels:
        return cpu_kernels.mask_logits(logits, rows, masks)
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    is_forbidden = ((masks.unsqueeze(-1) >> bits) & 1 == 0).flatten(1)[:, : logits.shape[1]]
    logits.index_copy_(0, rows, logits.index_select(0, rows).masked_fill_(is_forbidden, -math.inf))


def edit_logits(logits: Tensor, options: Options) -> Tensor:
    """Everything that comes before the temperature, in the order that `SamplingParams` states, from options `on` the
    device of the [O, V] fp32 logits, which it changes.

    Repetition penalty: Keskar et al., 2019, arXiv:1909.05858. Frequency and presence: the OpenAI API's.
    """
    if options.masks is not None:
        apply_masks(logits, options.mask_rows, options.masks)
    if options.processed is not None:
        logits.index_copy_(0, options.processed_rows, options.processed)
    flat = logits.view(-1)
    if options.biases is not None:
        flat.index_add_(0, options.bias_cells, options.biases)
    if options.factors is not None:
        old, factors = flat.index_select(0, options.penalty_cells), options.factors
        new = torch.where(old > 0, old / factors, old * factors) - options.subtrahends
        flat.index_copy_(0, options.penalty_cells, new)
    return logits


def filter_logits(logits: Tensor, options: Options) -> Tensor:
    """Sets to -inf what each row's filters cut, in the order min-p, top-k, top-p. No row depends on another's filters.

    Min-p: Nguyen et al., 2024, arXiv:2407.01082. Top-p keeps the token that reaches the sum: Holtzman et al., 2019,
    arXiv:1904.09751. Of equally likely tokens those of lower ids are kept first. Takes about 30 bytes a logit.

    Args:
        logits: [O, V] fp32 over the temperature, 0 the largest. It is changed.
        options: `on` its device.
    """
    if options.log_min_p is not None:
        logits.masked_fill_(logits < options.log_min_p.unsqueeze(1), -math.inf)
    if options.top_k is not None:
        ones = torch.ones((), dtype=torch.int64, device=logits.device).expand_as(logits)
        logits = _cut(logits, ones, options.top_k.unsqueeze(1))
    if options.top_p is not None:
        weights = integer_weights(logits)
        top_p = options.top_p.unsqueeze(1)
        limits = (weights.sum(-1, keepdim=True) * top_p.clamp(max=1)).ceil_().long()
        logits = torch.where(top_p < 1, _cut(logits, weights, limits), logits)
    return logits


def integer_weights(logits: Tensor) -> Tensor:
    """Unnormalised probabilities as int64, whose sums depend neither on their order nor on what else is summed up."""
    scale = 2.0 ** (62 - logits.shape[1].bit_length())  # so that the sum of a row stays below 2^63
    return logits.exp().mul_(scale).long()


def _cut(logits: Tensor, weights: Tensor, limits: Tensor) -> Tensor:
    """Keeps of each row's logits, the likeliest first and of equal ones those of lower ids, the fewest of which the
    weights reach the [O, 1] limit.

    A logit's bits, which are ordered as it is, say to which of 2048 sums its weight adds; then, of those logits in the
    one in which the limit lies, the next bits to which of 1024, and the last bits.
    """
    keys = logits.abs().view(torch.int32)
    key = before = torch.zeros_like(limits)
    for shift in (20, 10, 0):
        bins = keys >> shift
        is_in = bins >> 10 == key if shift < 20 else None
        bins = bins.bitwise_and_(1023 if shift < 20 else 2047).long()
        if is_in is not None:
            bins.masked_fill_(~is_in, 1024)
        sums = torch.zeros(len(logits), 2048, dtype=torch.int64, device=logits.device).scatter_add_(1, bins, weights)
        if is_in is not None:
            sums[:, 1024] = 0
        ends = sums.cumsum(-1) + before
        index = (ends < limits).sum(-1, keepdim=True).clamp_(max=2047)
        before = ends.gather(1, index) - sums.gather(1, index)
        key = key << 10 | index
    is_equal = keys == key
    weight = torch.where(is_equal, weights, 1).amax(-1, keepdim=True).clamp_(min=1)  # of each of them
    num_equal = (limits - before + weight - 1).div(weight, rounding_mode="floor")
    is_kept = (keys < key) | (is_equal & (is_equal.cumsum(-1, dtype=torch.int32) <= num_equal))
    return logits.masked_fill(~is_kept, -math.inf)


def token_logprobs(logits: Tensor, rows: Tensor, tokens: Tensor, num_top: np.ndarray) -> tuple[Tensor, ...]:
    """The log-probability of N tokens after rows of [R, V] logits of any dtype, [N]; their ranks, [N]; and the K
    likeliest tokens, those of lower ids first among equals, with theirs, [N, K] each.

    Args:
        logits, rows, tokens: [N] int64 the last two, on one device.
        num_top: [N] int64, how many likeliest ones of each are needed: K is the most of them.
    """
    if fused_ops(logits) is cpu_kernels:
        return cpu_kernels.token_logprobs(logits, rows, tokens, num_top)
    logprobs = logits.index_select(0, rows).float().log_softmax(-1)
    chosen = logprobs.gather(1, tokens.unsqueeze(1))
    ranks = (logprobs > chosen).sum(-1) + 1
    keys = logprobs.abs().view(torch.int32).long() << 32
    keys += torch.arange(keys.shape[1], device=keys.device)
    top = keys.topk(int(num_top.max(initial=0)), largest=False).indices
    return chosen.squeeze(1), ranks, top, logprobs.gather(1, top)


def num_top_of(asked: list[int], vocab_size: int) -> np.ndarray:
    """[N] int64 from what `SamplingParams` ask for, where -1 is all."""
    asked = np.array(asked)
    return np.where(asked < 0, vocab_size, np.minimum(asked, vocab_size))


def logprob_entries(num_top: np.ndarray, *columns: np.ndarray) -> list[dict]:
    """N `outputs.TokenLogprob` without texts, from tokens and what `token_logprobs` returns for them."""
    return [
        {
            "token_id": token_id,
            "logprob": logprob,
            "rank": rank,
            "top": [list(pair) for pair in zip(ids[:n], values[:n], strict=True)],
        }
        for n, token_id, logprob, rank, ids, values in zip(*(x.tolist() for x in (num_top, *columns)), strict=True)
    ]
