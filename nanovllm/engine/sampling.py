"""Sampling for steps in which some sequence asks for more than a temperature. Others never come here.

Legend: S sequences, R rows of them, V vocabulary.
"""

import warnings
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.sequence import Sequence
from nanovllm.layers.logits_processor import edit_logits, filter_logits, token_logprobs
from nanovllm.layers.sampler import sample
from nanovllm.sampling_params import SamplingParams

FILTER_LOGITS = 2**23  # filtered at a time, at least one row: less than 0.5 GB of intermediate tensors


def sample_with_options(
    logits: Tensor, temperatures: Tensor | None, uniforms: Tensor | None, with_options: list[tuple[int, Sequence]]
) -> list[int]:
    """Samples as `sample` does, after the penalties, masks and filters of the sequences that have some.

    Log-probabilities, of the unchanged logits, are added to the sequences that ask for them. `with_options` are the
    rows of S with options, and their sequences. The others are sampled as in a step without any, to the last bit.
    """
    # A chunk of a prompt that is not complete samples nothing, so that no callable sees it.
    complete = [
        (row, seq) for row, seq in with_options if seq.num_computed_tokens + seq.num_scheduled_tokens == len(seq)
    ]
    token_ids = sample(logits, temperatures, uniforms)
    edited = logits.to(torch.float32, copy=True)
    for row, seq in complete:
        if seq.params.edits_logits:
            try:
                edited[row] = _edit(edited[row], seq)
            except Exception as error:  # of a callable: no other sequence is concerned
                seq.error = error
    filtered = [(row, seq.params) for row, seq in complete if seq.params.filters]
    num_at_once = max(1, FILTER_LOGITS // logits.shape[1])
    for start in range(0, len(filtered), num_at_once):
        rows, params = (list(column) for column in zip(*filtered[start : start + num_at_once], strict=True))
        edited[rows] = _filter(edited[rows], temperatures[rows], params)
    if filtered:
        rows = torch.tensor([row for row, _ in filtered], device=logits.device)
        temperatures = temperatures.index_fill(0, rows, 1.0)  # which the filters have applied
    rows = torch.tensor([row for row, _ in with_options], device=logits.device)
    random = [] if temperatures is None else [temperatures[rows], uniforms[rows]]
    token_ids[rows] = sample(edited[rows], *random)
    token_ids = token_ids.tolist()
    wanted = [(row, seq) for row, seq in complete if seq.params.logprobs is not None]
    for num_top, group in groupby(wanted, key=lambda item: item[1].params.logprobs):
        rows, seqs = zip(*group, strict=True)
        entries = token_logprobs(logits[list(rows)], [token_ids[row] for row in rows], num_top)
        for seq, entry in zip(seqs, entries, strict=True):
            del seq.logprobs[seq.num_completion_tokens :]  # of a step that failed
            seq.logprobs.append(entry)
    return token_ids


def _edit(row: Tensor, seq: Sequence) -> Tensor:
    token_ids = np.array(seq.token_ids)
    prompt_ids, output_ids = np.split(token_ids, [seq.num_prompt_tokens])
    edited = edit_logits(row.clone(), seq.params, prompt_ids, output_ids, seq.end_token_ids, seq.bad_words_ids)
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
