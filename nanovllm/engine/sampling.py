"""Sampling for steps in which some sequence asks for more than a temperature. Others never come here.

Legend: R tokens to sample, O rows with options, N tokens of which log-probabilities are wanted, V vocabulary.
"""

import warnings
from itertools import islice

import numpy as np
from torch import Tensor

from nanovllm.engine.grammar import Masks
from nanovllm.engine.options import BatchOptions
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.logits_processor import (
    apply_masks,
    logprob_entries,
    num_top_of,
    sample_with_options,
    token_logprobs,
)
from nanovllm.layers.sampler import sample
from nanovllm.utils.device import Download, upload
from nanovllm.utils.timeline import mark


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


class Samples:
    """What `seqs` have sampled in a step: on the device, and on its way to the host.

    Args:
        seqs: Of the step.
        num_sampled: How many of the R tokens are each one's, None: one.
        tokens: [R] int64; None if nobody samples.
        is_plain: Whether no sequence has options, which are applied by the host's knowledge of its tokens.
        is_ignored: [O] bool, whether edits forbid every token.
        num_top: [N] int64, of each of the log-probabilities.
        logprobs: [N] int64 tokens, and what `token_logprobs` returns for them.
    """

    ends: list[int]  # how many tokens of each sequence were computed then, for who postprocesses the step

    def __init__(
        self, seqs: list[Sequence], num_sampled: np.ndarray | None, tokens: Tensor | None, is_plain: bool = True,
        is_ignored: Tensor | None = None, num_top: np.ndarray | None = None, logprobs: tuple[Tensor, ...] = ()
    ):  # fmt: skip
        self.seqs, self.tokens, self._num_sampled, self._num_top = seqs, tokens, num_sampled, num_top
        self._is_plain, self._has_ignored = is_plain, is_ignored is not None
        others = [] if is_ignored is None else [is_ignored]
        self._coming = None if tokens is None else Download([tokens, *logprobs, *others])

    def may_stay(self) -> bool:
        """Whether the next step can do without the host's knowing them, and they are not here yet."""
        return self._is_plain and self._coming is not None and not self._coming.is_here()

    def read(self) -> list[list[int]]:
        """What `split_samples` says; adds log-probabilities to the sequences. The only wait for the device."""
        if self._coming is None:
            return [[] for _ in self.seqs]
        tokens, *arrays = self._coming.read()
        mark("read tokens")
        sampled = split_samples(tokens.tolist(), self.seqs, self._num_sampled)
        if self._has_ignored and arrays.pop().any():
            warnings.warn("the sampling parameters forbid every token; this token ignores them", stacklevel=2)
        if arrays:
            entries = iter(logprob_entries(self._num_top, *arrays))
            counts = [1] * len(self.seqs) if self._num_sampled is None else self._num_sampled.tolist()
            for seq, count, token_ids in zip(self.seqs, counts, sampled, strict=True):
                if seq.params.logprobs is not None:
                    del seq.logprobs[seq.num_completion_tokens :]  # of a step that failed
                    seq.logprobs += list(islice(entries, count))[: len(token_ids)]
        return sampled


class OptionsSampler:
    """Samples the steps of a model runner, one after another.

    As `sample` does, after the penalties, masks and filters of the sequences that have some; the others are sampled as
    in a step without any, to the last bit. `num_sampled` of the R rows are each sequence's, None: one.
    """

    def __init__(self) -> None:
        self._options = BatchOptions()

    def __call__(
        self, logits: Tensor, temperatures: Tensor | None, uniforms: Tensor | None, seqs: list[Sequence],
        num_sampled: np.ndarray | None = None, masks: Masks | None = None
    ) -> Samples:  # fmt: skip
        """Gives the device its work, and waits for nothing; but what a user's `logits_processors` do is theirs.

        Grammars' masks are applied to the logits; the log-probabilities are of what they were.
        """
        counts = [1] * len(seqs) if num_sampled is None else num_sampled.tolist()
        owners = [(seq, i) for seq, count in zip(seqs, counts, strict=True) for i in range(count)]
        asked = [seq.params.logprobs for seq, _ in owners]
        rows = [row for row, num_top in enumerate(asked) if num_top is not None]
        unchanged = logits.clone() if rows and masks else logits
        if masks and masks.rows:
            apply_masks(logits, *upload([np.array(masks.rows), masks.allowed], logits.device))
        options, is_ignored = self._options.of(owners, logits), None
        if options is None:
            tokens = sample(logits, temperatures, uniforms)
        else:
            tokens, is_ignored = sample_with_options(logits, temperatures, uniforms, options)
        if masks and masks.certain:
            certain = [np.array([*column]) for column in (masks.certain, masks.certain.values())]
            tokens.index_copy_(0, *upload(certain, logits.device))
        num_top, logprobs = None, ()
        if rows:
            num_top = num_top_of([asked[row] for row in rows], logits.shape[1])
            [there] = upload([np.array(rows)], logits.device)
            wanted = tokens.index_select(0, there)
            logprobs = wanted, *token_logprobs(unchanged, there, wanted, num_top)
        return Samples(seqs, num_sampled, tokens, False, is_ignored, num_top, logprobs)
