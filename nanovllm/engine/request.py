"""A prompt of a call and its completions: what its caller hears of them, and the outputs made of them."""

from array import array
from collections.abc import Sequence as SequenceOf
from functools import cache
from queue import SimpleQueue

import numpy as np

from nanovllm.engine.detokenizer import completion_text, token_pieces, token_text
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import CompletionOutput, Record, RequestOutput, StreamDelta, TokenLogprob
from nanovllm.utils.hf_types import PreTrainedTokenizerBase


class Request:
    """Watches the `n` sequences of one prompt.

    Puts itself into `news` when all of them have ended; if it is streamed, instead a piece for each new token.
    """

    def __init__(self, index: int, prompt: str | SequenceOf[int], news: SimpleQueue, is_streamed: bool = False):
        self.index, self.prompt = index, prompt  # its place in the call, and what was given
        self.news, self.follows = news, is_streamed
        self.seqs: list[Sequence] = []
        self.num_unfinished = 0
        self._num_told: list[int] = []  # tokens of each completion that went out in pieces

    def watch(self, seq: Sequence) -> None:
        """Adds one of the completions."""
        seq.watcher = self
        self.seqs.append(seq)
        self.num_unfinished += 1
        self._num_told.append(0)

    @property
    def error(self) -> Exception | None:
        """What the first of them that failed has failed of."""
        return next((seq.error for seq in self.seqs if seq.error is not None), None)

    # ---- in the engine's thread

    def on_token(self, seq: Sequence) -> None:
        """Streamed only: a step has computed `seq`."""
        i = self.seqs.index(seq)
        if seq.num_completion_tokens > self._num_told[i]:
            self.news.put(self._piece(seq, i))

    def on_end(self, seq: Sequence) -> None:
        self.num_unfinished -= 1
        if self.follows:
            self.news.put(self._piece(seq, self.seqs.index(seq)))
        elif not self.num_unfinished:
            self.news.put(self)

    def _piece(self, seq: Sequence, i: int) -> StreamDelta:
        token_ids = seq.token_ids[seq.num_prompt_tokens + self._num_told[i] :].tolist()
        self._num_told[i] += len(token_ids)
        text = "" if seq.text is None else seq.text.take_delta()
        piece = StreamDelta(index=self.index, completion=i, text=text, token_ids=token_ids)
        return _with_end(piece, seq)

    # ---- for the caller

    def output(self, tokenizer: PreTrainedTokenizerBase | None) -> RequestOutput:
        """What `generate` returns for this prompt."""
        first, completions = self.seqs[0], [_completion(i, seq, tokenizer) for i, seq in enumerate(self.seqs)]
        prompt_ids = as_integers(first.token_ids[: first.num_prompt_tokens])
        logprobs = None
        if first.params.prompt_logprobs is not None:
            logprobs = [None, *with_texts(first.prompt_logprobs, prompt_ids, 1, tokenizer, False)]
        return RequestOutput(
            completions[0],
            prompt=self.prompt if isinstance(self.prompt, str) else None,
            prompt_token_ids=prompt_ids,
            prompt_logprobs=logprobs,
            num_cached_tokens=first.num_cached_tokens or 0,
            outputs=completions,
        )


def _completion(i: int, seq: Sequence, tokenizer: PreTrainedTokenizerBase | None) -> CompletionOutput:
    text = completion_text(tokenizer, seq) if seq.text is None else seq.text.finish()
    output = CompletionOutput(index=i, text=text, token_ids=as_integers(seq.token_ids[seq.num_prompt_tokens :]))
    output |= {"logprobs": None, "cumulative_logprob": None}
    if seq.params.logprobs is not None:
        entries = seq.logprobs[: seq.num_completion_tokens]
        skips_special = seq.params.skip_special_tokens
        output["logprobs"] = with_texts(entries, output["token_ids"], 0, tokenizer, skips_special)
        output["cumulative_logprob"] = sum(entry["logprob"] for entry in entries)
    return _with_end(output, seq)


def _with_end(record: Record, seq: Sequence) -> Record:
    record |= {"finish_reason": seq.finish_reason, "stop_reason": seq.stop_reason}
    if seq.error is not None:
        record["error"] = error_text(seq.error)
    return record


def with_texts(
    entries: list[dict],
    token_ids: list[int],
    start: int,
    tokenizer: PreTrainedTokenizerBase | None,
    skips_special: bool,
) -> list[TokenLogprob]:
    """The log-probabilities of `token_ids[start:]` with the texts of their tokens."""
    pieces = token_pieces(tokenizer, token_ids, skips_special)[start:]
    return [
        TokenLogprob(entry, token=piece, top=[[i, logprob, token_text(tokenizer, i)] for i, logprob in entry["top"]])
        for entry, piece in zip(entries, pieces, strict=False)
    ]


@cache
def _integers() -> np.ndarray:
    return np.arange(2**18).astype(object)


def as_integers(token_ids: array) -> list[int]:
    """Python's integers, equal ones the same object: a list takes 8 bytes a token and not 36."""
    ids = np.frombuffer(token_ids, dtype=np.int32)
    return _integers()[ids].tolist() if len(ids) and ids.max() < 2**18 else ids.tolist()


def error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
