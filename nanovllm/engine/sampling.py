"""Sampling for steps in which some sequence asks for more than a temperature. Others never come here.

Legend: R tokens to sample, V vocabulary.
"""

import warnings
from itertools import groupby, islice

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.grammar import Masks
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.logits_processor import apply_masks, edit_logits, filter_logits, token_logprobs
from nanovllm.layers.sampler import sample
from nanovllm.sampling_params import SamplingParams

FILTER_LOGITS = 2**23  # filtered at a time, at least one row: less than 0.5 GB of intermediate tensors


def split_samples(token_ids: list[int], seqs: list[Sequence], num_sampled: np.ndarray | None) -> list[list[int]]:
    """For each sequence its next tokens among R samples: as many as its drafts foresaw, and the one after them."""
    if num_sampled is None:
        return [[token_id] for token_id in token_ids]
    ends = num_sampled.cumsum().tolist()
    own = [token_ids[end - n : end] for end, n in zip(ends, num_sampled.tolist(), strict=True)]
    return [_foreseen(seq.draft_ids, tokens) for seq, tokens in zip(seqs, own, strict=True)]


def _foreseen(draft_ids: tuple[int, ...], token_ids: list[int]) -> list[int]:
    """Of the tokens sampled after a sequence's last one and after each draft, those before which all drafts are right.

    What they are is what would have been sampled one by one: a token's draw depends on nothing but its position.
    """
    n = 0
    while n < len(draft_ids) and draft_ids[n] == token_ids[n]:
        n += 1
    return token_ids[: n + 1]


def sample_with_options(
    logits: Tensor, temperatures: Tensor | None, uniforms: Tensor | None, seqs: list[Sequence],
    num_sampled: np.ndarray | None = None, masks: Masks | None = None
) -> list[list[int]]:  # fmt: skip
    """Samples as `sample` does, after the penalties, masks and filters of the sequences that have some.

    `num_sampled` of the R rows are each sequence's, None: one. Log-probabilities, of the unchanged logits, are added
    to the sequences that ask for them. Returns what `split_samples` does. Sequences without options are sampled as in a
    step without any, to the last bit.
    """
    counts = [1] * len(seqs) if num_sampled is None else num_sampled.tolist()
    owners = [(seq, i) for seq, count in zip(seqs, counts, strict=True) for i in range(count)]  # [R], after i drafts
    certain, unchanged = masks.certain if masks else {}, logits
    if masks and masks.rows:
        unchanged = logits.clone() if any(seq.params.logprobs is not None for seq in seqs) else None
        apply_masks(logits, masks.allowed, masks.rows)
    tokens = sample(logits, temperatures, uniforms)
    rows = [row for row, (seq, _) in enumerate(owners) if seq.has_options and row not in certain]
    rows = [row for row in rows if owners[row][0].params.edits_logits or owners[row][0].params.filters]
    if rows:
        random = (None, None) if temperatures is None else (temperatures[rows], uniforms[rows])
        tokens[rows] = _sample_edited(logits[rows].to(torch.float32), *random, [owners[row] for row in rows])
    token_ids = tokens.tolist()
    for row, token_id in certain.items():
        token_ids[row] = token_id
    sampled = split_samples(token_ids, seqs, num_sampled)
    _add_logprobs(unchanged, seqs, np.cumsum([0, *counts[:-1]]).tolist(), sampled)
    return sampled


def _sample_edited(
    logits: Tensor, temperatures: Tensor | None, uniforms: Tensor | None, owners: list[tuple[Sequence, int]]
) -> Tensor:
    """Of rows that all have options; changes the [R, V] fp32 logits."""
    for row, (seq, num_drafts) in enumerate(owners):
        if seq.params.edits_logits:
            try:
                logits[row] = _edit(logits[row], seq, num_drafts)
            except Exception as error:  # of a callable: no other sequence is concerned
                seq.error = error
    filtered = [(row, seq.params) for row, (seq, _) in enumerate(owners) if seq.params.filters]
    num_at_once = max(1, FILTER_LOGITS // logits.shape[1])
    for start in range(0, len(filtered), num_at_once):
        rows, params = (list(column) for column in zip(*filtered[start : start + num_at_once], strict=True))
        logits[rows] = _filter(logits[rows], temperatures[rows], params)
    if filtered:
        rows = torch.tensor([row for row, _ in filtered], device=logits.device)
        temperatures = temperatures.index_fill(0, rows, 1.0)  # which the filters have applied
    return sample(logits, temperatures, uniforms)


def _add_logprobs(logits: Tensor, seqs: list[Sequence], first_rows: list[int], sampled: list[list[int]]) -> None:
    wanted = [item for item in zip(seqs, first_rows, sampled, strict=True) if item[0].params.logprobs is not None]
    for num_top, group in groupby(wanted, key=lambda item: item[0].params.logprobs):
        group = list(group)
        rows = [row + i for _, row, token_ids in group for i in range(len(token_ids))]
        entries = iter(token_logprobs(logits[rows], [i for *_, token_ids in group for i in token_ids], num_top))
        for seq, _, token_ids in group:
            del seq.logprobs[seq.num_completion_tokens :]  # of a step that failed
            seq.logprobs += islice(entries, len(token_ids))


def _edit(row: Tensor, seq: Sequence, num_drafts: int) -> Tensor:
    """The row of logits after so many of the sequence's drafts."""
    token_ids = np.array([*seq.token_ids, *seq.draft_ids[:num_drafts]])
    prompt_ids, output_ids = np.split(token_ids, [seq.num_prompt_tokens])
    edited = edit_logits(row.clone(), seq.params, prompt_ids, output_ids, seq.end_token_ids, seq.bad_words_ids)
    if seq.guide is not None and seq.params.logits_processors:  # which may have allowed what the grammar does not
        edited = edited.masked_fill(row == -torch.inf, -torch.inf)
    if edited.max() == -torch.inf:
        warnings.warn("the sampling parameters forbid every token; this token ignores them", stacklevel=2)
        return row
    return edited


def _filter(logits: Tensor, temperatures: Tensor, params: list[SamplingParams]) -> Tensor:
    """Applies temperatures and filters to [R, V] logits, which it changes."""
    return filter_logits(
        logits.sub_(logits.amax(-1, keepdim=True)).div_(temperatures.unsqueeze(1)),
        torch.tensor([p.top_k for p in params]),
        torch.tensor([p.top_p for p in params], dtype=torch.float64),
        torch.tensor([p.min_p for p in params], dtype=torch.float32),
    )
