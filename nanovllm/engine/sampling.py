"""Sampling for steps in which some sequence asks for more than a temperature. Others never come here.

Legend: R tokens to sample, O rows with options, N tokens of which log-probabilities are wanted, V vocabulary.
"""

import warnings
from dataclasses import dataclass
from itertools import islice

import numpy as np
from torch import Tensor

from nanovllm.engine.options import BatchOptions
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.logits_processor import logprob_entries, num_top_of, sample_with_options, token_logprobs
from nanovllm.layers.sampler import sample
from nanovllm.utils.device import download, upload


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


@dataclass(slots=True)
class Samples:
    """Of one step, on the device."""

    tokens: Tensor  # [R] int64
    is_ignored: Tensor | None = None  # [O] bool, edits that forbid every token
    num_top: np.ndarray | None = None  # [N] int64, of each of the log-probabilities
    logprobs: tuple[Tensor, ...] = ()  # [N] int64 tokens, and what `token_logprobs` returns for them

    def read(self, seqs: list[Sequence], num_sampled: np.ndarray | None) -> list[list[int]]:
        """See `OptionsSampler`. The only wait for the device."""
        others = [] if self.is_ignored is None else [self.is_ignored]
        tokens, *arrays = download([self.tokens, *self.logprobs, *others])
        sampled = split_samples(tokens.tolist(), seqs, num_sampled)
        if others and arrays.pop().any():
            warnings.warn("the sampling parameters forbid every token; this token ignores them", stacklevel=2)
        if self.logprobs:
            entries = iter(logprob_entries(self.num_top, *arrays))
            counts = [1] * len(seqs) if num_sampled is None else num_sampled.tolist()
            for seq, count, token_ids in zip(seqs, counts, sampled, strict=True):
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
        num_sampled: np.ndarray | None = None
    ) -> list[list[int]]:  # fmt: skip
        """Returns what `split_samples` does. Log-probabilities, of the unchanged logits, are added to the sequences
        that ask for them.
        """
        return self.launch(logits, temperatures, uniforms, seqs, num_sampled).read(seqs, num_sampled)

    def launch(
        self, logits: Tensor, temperatures: Tensor | None, uniforms: Tensor | None, seqs: list[Sequence],
        num_sampled: np.ndarray | None = None
    ) -> Samples:  # fmt: skip
        """Gives the device its work, and waits for nothing; but what a user's `logits_processors` do is theirs."""
        counts = [1] * len(seqs) if num_sampled is None else num_sampled.tolist()
        owners = [(seq, i) for seq, count in zip(seqs, counts, strict=True) for i in range(count)]
        options = self._options.of(owners, logits)
        if options is None:
            samples = Samples(sample(logits, temperatures, uniforms))
        else:
            samples = Samples(*sample_with_options(logits, temperatures, uniforms, options))
        asked = [seq.params.logprobs for seq, _ in owners]
        rows = [row for row, num_top in enumerate(asked) if num_top is not None]
        if rows:
            samples.num_top = num_top_of([asked[row] for row in rows], logits.shape[1])
            [there] = upload([np.array(rows)], logits.device)
            wanted = samples.tokens.index_select(0, there)
            samples.logprobs = wanted, *token_logprobs(logits, there, wanted, samples.num_top)
        return samples
