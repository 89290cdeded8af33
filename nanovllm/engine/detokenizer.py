"""From tokens to text: whole completions, or piece by piece with stop strings. Knows nothing of scheduling."""

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from nanovllm.engine.sequence import Sequence


def decode(tokenizer: PreTrainedTokenizerBase | None, token_ids: list[int], skip_special_tokens: bool = True) -> str:
    """The text of token ids, empty for a model without a tokenizer."""
    if tokenizer is None:
        return ""
    return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def completion_text(tokenizer: PreTrainedTokenizerBase | None, seq: Sequence) -> str:
    """The text of a completion, without the token that ended it unless `include_stop_str_in_output`."""
    return decode(tokenizer, _visible(seq, 0), seq.params.skip_special_tokens)


class TextStream:
    """The text of one completion as it grows, up to the first stop string.

    A character whose bytes are spread over tokens appears when it is complete. What could still become a stop string
    is held back from `take_delta`. Needs a fast tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seq: Sequence):
        self.text = ""
        self.stop: str | None = None
        self._seq = seq
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=seq.params.skip_special_tokens)
        self._held_back = max(map(len, seq.params.stop), default=1) - 1
        self._num_fed = 0
        self._num_taken = 0

    def feed(self) -> str | None:
        """Reads the sequence's new tokens; returns the stop string that they completed, if any."""
        new = _visible(self._seq, self._num_fed)
        self._num_fed = self._seq.num_completion_tokens
        for token_id in new:
            self._append(self._stream.step(self._tokenizer.backend_tokenizer, token_id) or "")
        return self.stop

    def finish(self) -> str:
        """The whole text, with what the stream still waited for: bytes that never became a character."""
        if self.stop is None:
            self._append(completion_text(self._tokenizer, self._seq).removeprefix(self.text))
        return self.text

    def take_delta(self) -> str:
        """The text that is certain and was not taken yet; all of it once the sequence has finished."""
        start = self._num_taken
        end = len(self.finish()) if self._seq.finish_reason else len(self.text) - self._held_back
        self._num_taken = max(start, end)
        return self.text[start : self._num_taken]

    def _append(self, piece: str) -> None:
        params = self._seq.params
        start = max(0, len(self.text) - self._held_back)
        self.text += piece
        if not piece or self._num_fed <= params.min_tokens:
            return
        # The match that ends first is the one that stops a reader of single characters.
        found = [(self.text.find(stop, start) + len(stop), stop) for stop in params.stop if stop in self.text[start:]]
        if found:
            end, self.stop = min(found)
            self.text = self.text[: end if params.include_stop_str_in_output else end - len(self.stop)]


def _visible(seq: Sequence, start: int) -> list[int]:
    """The completion's tokens from `start` on, without one that ended it unless `include_stop_str_in_output`."""
    token_ids = seq.token_ids[seq.num_prompt_tokens + start :].tolist()
    ends_with_stop_token = seq.finish_reason == "stop" and not isinstance(seq.stop_reason, str)
    return token_ids[:-1] if ends_with_stop_token and not seq.params.include_stop_str_in_output else token_ids
