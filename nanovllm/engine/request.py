"""A prompt of a call and its completions: what its caller hears of them, and the outputs made of them."""

from collections.abc import Sequence as SequenceOf
from queue import SimpleQueue

from transformers import PreTrainedTokenizerBase

from nanovllm.engine.detokenizer import completion_text
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import CompletionOutput, RequestOutput, StreamDelta


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
        piece = {"index": self.index, "completion": i, "text": text, "token_ids": token_ids}
        piece |= {"finish_reason": seq.finish_reason, "stop_reason": seq.stop_reason}
        return piece if seq.error is None else {**piece, "error": error_text(seq.error)}

    # ---- for the caller

    def output(self, tokenizer: PreTrainedTokenizerBase | None) -> RequestOutput:
        """What `generate` returns for this prompt."""
        first, completions = self.seqs[0], [_completion_output(seq, tokenizer) for seq in self.seqs]
        return {
            **completions[0],
            "prompt_logprobs": None if first.params.prompt_logprobs is None else first.prompt_logprobs,
            "num_cached_tokens": first.num_cached_tokens or 0,
            "outputs": completions,
        }


def _completion_output(seq: Sequence, tokenizer: PreTrainedTokenizerBase | None) -> CompletionOutput:
    logprobs = None if seq.params.logprobs is None else seq.logprobs[: seq.num_completion_tokens]
    output = {
        "text": completion_text(tokenizer, seq) if seq.text is None else seq.text.finish(),
        "token_ids": seq.completion_token_ids,
        "finish_reason": seq.finish_reason,
        "stop_reason": seq.stop_reason,
        "logprobs": logprobs,
        "cumulative_logprob": None if logprobs is None else sum(entry["logprob"] for entry in logprobs),
    }
    return output if seq.error is None else {**output, "error": error_text(seq.error)}


def error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
