"""From the options of a batch's sequences to the arrays that the sampler takes, step after step.

What a sequence asks for is turned into arrays once; how often its tokens have occurred is counted on by what is new.
Legend: O rows with options, V vocabulary, C cells of their logits.
"""

import math
from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.sequence import Sequence
from nanovllm.layers.logits_processor import Options, edit_logits
from nanovllm.sampling_params import SamplingParams

BIASES = "bias_starts", "bias_cells", "biases"  # fields of `Options`
PENALTIES = "penalty_starts", "penalty_cells", "factors", "subtrahends"
Cells = tuple[np.ndarray, ...]  # token ids, int64, and what belongs to each, float32
Owner = tuple[Sequence, int]  # of a row: a sequence, and how many of its drafts the row comes after


class TokenCounts:
    """What the penalties are of: the tokens that a sequence has had so far."""

    def __init__(self, params: SamplingParams, prompt_ids: array):
        self._params = params
        ids = np.unique(prompt_ids) if params.repetition_penalty != 1 else np.zeros(0, dtype=np.int64)
        self._places = dict(zip(ids.tolist(), range(len(ids)), strict=True))
        self._ids, self._counts = ids.astype(np.int64), np.zeros(len(ids))
        self._num_counted = len(prompt_ids)

    def after(self, token_ids: array) -> Cells:
        """Of a prompt and completion that goes on the one before: ids, and what to subtract from their logits."""
        for token_id in token_ids[self._num_counted :]:
            place = self._places.setdefault(token_id, len(self._places))
            if place == len(self._ids):  # half as much room again
                room = 16 + place // 2
                self._ids = np.append(self._ids, np.zeros(room, dtype=np.int64))
                self._counts = np.append(self._counts, np.zeros(room))
            self._ids[place] = token_id
            self._counts[place] += 1
        self._num_counted = len(token_ids)
        n, params = len(self._places), self._params
        counts = self._counts[:n]
        subtrahends = params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        return self._ids[:n], subtrahends.astype(np.float32)


class SequenceOptions:
    """One sequence's, for a vocabulary of V tokens."""

    def __init__(self, seq: Sequence, vocab_size: int):
        self.seq, self.params, self.vocab_size = seq, seq.params, vocab_size
        params, allowed = seq.params, seq.params.allowed_token_ids
        self.top_k = min(params.top_k, vocab_size) if params.top_k > 0 else vocab_size
        self.log_min_p = math.log(params.min_p) if params.min_p else -math.inf
        self.mask = None if allowed is None else bit_mask(allowed, vocab_size)
        self.processors = params.logits_processors
        self.has_biases = bool(params.logit_bias or seq.bad_words_ids or params.min_tokens)
        penalties = params.presence_penalty, params.frequency_penalty, params.repetition_penalty - 1
        self.has_penalties = any(penalties)
        self._counts = TokenCounts(params, seq.token_ids[: seq.num_prompt_tokens])
        self._forbidden: set[int] | None = None  # for which the biases are at hand
        self._biases: Cells = ()

    def biases(self, num_drafts: int) -> Cells:
        """After so many of the sequence's drafts: ids, and what to add to their logits."""
        seq, params = self.seq, self.params
        forbidden = set(seq.end_token_ids) if seq.num_completion_tokens + num_drafts < params.min_tokens else set()
        if seq.bad_words_ids:
            latest = seq.token_ids[max(seq.num_prompt_tokens, len(seq) - max(map(len, seq.bad_words_ids))) :].tolist()
            latest += seq.draft_ids[:num_drafts]
            for *start, last in seq.bad_words_ids:
                if latest[max(len(latest) - len(start), 0) :] == start:
                    forbidden.add(last)
        if forbidden != self._forbidden:
            known = {token_id for token_id in forbidden if token_id < self.vocab_size}  # a tokenizer may have more
            biases = params.logit_bias | dict.fromkeys(known, -math.inf)
            self._forbidden = forbidden
            self._biases = np.array([*biases], dtype=np.int64), np.array([*biases.values()], dtype=np.float32)
        return self._biases

    def penalties(self, num_drafts: int) -> Cells:
        """After so many of the sequence's drafts: ids, what to divide their logits by, and to subtract thereafter."""
        token_ids, counts = self.seq.token_ids, self._counts
        if num_drafts:  # which are not counted for good
            counts = TokenCounts(self.params, token_ids[: self.seq.num_prompt_tokens])
            token_ids = token_ids + array("i", self.seq.draft_ids[:num_drafts])
        ids, subtrahends = counts.after(token_ids)
        return ids, np.full(len(ids), self.params.repetition_penalty, dtype=np.float32), subtrahends

    def process(self, logits: Tensor, num_drafts: int) -> Tensor:
        """The [1, V] fp32 logits, which it may change, after mask and biases and what the user's callables do."""
        first, biases = np.zeros(1, dtype=np.int64), _in_cells([self.biases(num_drafts)], logits.shape[1])
        options = Options(first, **dict(zip(BIASES, biases, strict=True)))
        if self.mask is not None:
            options.mask_rows, options.masks = first, self.mask[None]
        output_ids = [*self.seq.completion_token_ids, *self.seq.draft_ids[:num_drafts]]
        row = edit_logits(logits, options.on(logits.device))[0]
        for process in self.processors:
            row = process(list(output_ids), row)
        return row


class BatchOptions:
    """Of the batches that a model runner computes, one after another."""

    def __init__(self) -> None:
        self._owners: list[Owner] = []  # of the last batch's rows, whose the fields below are
        self._of: dict[Sequence, SequenceOptions] = {}
        self._fixed = Options(np.zeros(0, dtype=np.int64))  # what stays from step to step, of O rows
        self._asking: list[tuple[SequenceOptions, int]] = []  # O, each after so many drafts

    def of(self, owners: list[Owner], logits: Tensor) -> Options | None:
        """Of the owners' rows of [R, V] logits; None if none asks for an edit or a filter."""
        vocab_size = logits.shape[1]
        if owners != self._owners:
            self._change(owners, vocab_size)
        if not self._asking:
            return None
        biases = [of.biases(n) if of.has_biases and not of.processors else None for of, n in self._asking]
        penalties = [of.penalties(n) if of.has_penalties else None for of, n in self._asking]
        changing = dict(zip(BIASES, _in_cells(biases, vocab_size), strict=False))
        changing |= zip(PENALTIES, _in_cells(penalties, vocab_size), strict=False)
        if self._fixed.processed_rows is not None:
            rows = self._fixed.processed_rows.tolist()
            changing["processed"] = torch.stack([self._process(row, logits) for row in rows])
        return replace(self._fixed, **changing) if changing else self._fixed

    def _change(self, owners: list[Owner], vocab_size: int) -> None:
        self._owners = owners
        rows = [row for row, (seq, _) in enumerate(owners) if seq.params.edits_logits or seq.params.filters]
        seqs = dict.fromkeys(owners[row][0] for row in rows)
        self._of = {seq: self._of.get(seq) or SequenceOptions(seq, vocab_size) for seq in seqs}
        self._asking = [(self._of[owners[row][0]], owners[row][1]) for row in rows]
        asking = [of for of, _ in self._asking]
        masked = [(o, of.mask) for o, of in enumerate(asking) if of.mask is not None and not of.processors]
        processed = [o for o, of in enumerate(asking) if of.processors]
        self._fixed = Options(
            rows=np.array(rows, dtype=np.int64),
            top_k=_unless(vocab_size, [of.top_k for of in asking], np.int64),
            top_p=_unless(1, [of.params.top_p for of in asking], np.float64),
            log_min_p=_unless(-math.inf, [of.log_min_p for of in asking], np.float32),
            mask_rows=np.array([o for o, _ in masked]) if masked else None,
            masks=np.stack([mask for _, mask in masked]) if masked else None,
            processed_rows=np.array(processed) if processed else None,
        )

    def _process(self, o: int, logits: Tensor) -> Tensor:
        """[V] fp32; the model's own if the user's callables fail, of which no other sequence is concerned."""
        (of, num_drafts), row = self._asking[o], int(self._fixed.rows[o])
        original = logits[row].float()
        try:
            processed = torch.empty_like(original).copy_(of.process(original.clone()[None], num_drafts))
            return processed if of.seq.guide is None else processed.masked_fill_(original == -math.inf, -math.inf)
        except Exception as error:
            of.seq.error = error
            return original


def _unless(nothing: float, values: list[float], dtype: type) -> np.ndarray | None:
    """As an array, unless all of them ask for nothing."""
    return np.array(values, dtype=dtype) if any(value != nothing for value in values) else None


def _in_cells(parts: list[Cells | None], width: int) -> list[np.ndarray]:
    """Rows' cells as `Options` has them: starts, cells, and what belongs to each. Nothing if there are no parts."""
    given = [part for part in parts if part is not None]
    if not given:
        return []
    lens = [0 if part is None else len(part[0]) for part in parts]
    ids, *values = (np.concatenate(column) for column in zip(*given, strict=True))
    return [np.cumsum([0, *lens]), ids + np.repeat(np.arange(len(parts)) * width, lens), *values]


def bit_mask(token_ids: SequenceOf[int], vocab_size: int) -> np.ndarray:
    """[ceil(V / 32)] int32, see `Options.masks`."""
    is_allowed = np.zeros(-(-vocab_size // 32) * 32, dtype=bool)
    is_allowed[list(token_ids)] = True
    return np.packbits(is_allowed, bitorder="little").view(np.int32)
