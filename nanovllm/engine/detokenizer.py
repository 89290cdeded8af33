"""From tokens to text: whole completions, or piece by piece with stop strings. Knows nothing of scheduling."""

from functools import lru_cache

from nanovllm.engine.sequence import Sequence
from nanovllm.utils.hf_types import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # of bytes that are no character, or not yet
PATIENCE = 64  # see `TextStream`


def decode(tokenizer: PreTrainedTokenizerBase | None, token_ids: list[int], skip_special_tokens: bool = True) -> str:
    """The text of token ids, empty for a model without a tokenizer."""
    if tokenizer is None:
        return ""
    return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def completion_text(tokenizer: PreTrainedTokenizerBase | None, seq: Sequence) -> str:
    """The text of a completion, without the token that ended it unless `include_stop_str_in_output`."""
    return decode(tokenizer, _visible(seq, 0, seq.num_completion_tokens), seq.params.skip_special_tokens)


def token_pieces(
    tokenizer: PreTrainedTokenizerBase | None, token_ids: list[int], skip_special_tokens: bool
) -> list[str]:
    """What each token adds to the text of all; of a character in several tokens the last has it."""
    pieces, start, end, total = [], 0, 0, 0  # the window that is decoded: tokens of known text from `start` to `end`
    for i in range(len(token_ids)):
        known = decode(tokenizer, token_ids[start:end], skip_special_tokens)
        text = decode(tokenizer, token_ids[start : i + 1], skip_special_tokens)
        is_whole = len(text) > len(known) and not text.endswith(REPLACEMENT)
        pieces.append(text[len(known) :] if is_whole else "")
        if is_whole:
            start, end, total = end, i + 1, total + len(pieces[-1])
    if pieces:  # bytes that never became a character
        pieces[-1] += decode(tokenizer, token_ids, skip_special_tokens)[total:]
    return pieces


@lru_cache(maxsize=2**18)
def token_text(tokenizer: PreTrainedTokenizerBase | None, token_id: int) -> str:
    """The text of a token as it stands in the middle of others."""
    if tokenizer is None:
        return ""
    anchor = tokenizer.encode("a", add_special_tokens=False)
    return decode(tokenizer, [*anchor, token_id], False).removeprefix(decode(tokenizer, anchor, False))


class TextStream:
    """The text of one completion as it grows, up to the first stop string.

    Text is certain once no later token can change it: not while it ends in bytes that may still become a character,
    nor in a run of byte-fallback tokens (`<0xF0>`), which one wrong byte turns into replacement characters as a whole.
    Stop strings are found in all the text that there is; `take_delta` gives what is certain, without what could still
    become a stop string.

    Only tokens since the last certain text are decoded, after one or a few that give them their context: a token costs
    the decoding of about six. While n tokens stay uncertain they are decoded again after n / `PATIENCE` more, which
    bounds the cost by about 2 `PATIENCE` tokens, however long the completion. Works with slow tokenizers too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seq: Sequence):
        self.text = ""  # that is certain; or up to the stop string, once there is one
        self.stop: str | None = None
        self._seq = seq
        self._tokenizer = tokenizer
        self._invalid_byte = _invalid_byte(tokenizer)
        self._held_back = max(map(len, seq.params.stop), default=1) - 1
        self.num_read = 0  # tokens that were looked at, or are with the next; none after a stop string's
        self._num_certain = 0  # tokens, whose text is in `text`
        self._start = 0  # of the tokens to decode
        self._context = ""  # text of those from there that are certain
        self._next_look = 1  # when there are so many tokens
        self._num_taken = 0

    def feed(self) -> str | None:
        """Reads the sequence's new tokens; returns the stop string that they completed, if any."""
        num_tokens = self._seq.num_completion_tokens
        while self.stop is None and self.num_read < num_tokens:
            self.num_read = self.num_read + 1 if self._seq.params.stop else num_tokens
            is_last = self.num_read == num_tokens and self._seq.finish_reason
            if self.num_read >= self._next_look or is_last:
                self._look()
        return self.stop

    def finish(self) -> str:
        """The whole text, also of bytes that never became a character."""
        return completion_text(self._tokenizer, self._seq) if self.stop is None else self.text

    def take_delta(self) -> str:
        """The text that is certain and was not taken yet; all of it once the sequence has finished."""
        start, text = self._num_taken, self.finish() if self._seq.finish_reason else self.text
        end = len(text) if self._seq.finish_reason else len(text) - self._held_back
        self._num_taken = max(start, end)
        return text[start : self._num_taken]

    def _look(self) -> None:
        token_ids = _visible(self._seq, self._start, self.num_read)
        text = self._decode(token_ids)
        num_tokens = self._start + len(token_ids)
        new = text.removeprefix(self._context) if text.startswith(self._context) else ""
        self._seek_stop(new.rstrip(REPLACEMENT))
        if self.stop is None and new and self._is_certain(token_ids, text):
            self.text += new
            self._num_certain = num_tokens
            self._keep_context()
        self._next_look = num_tokens + 1 + (num_tokens - self._num_certain) // PATIENCE

    def _seek_stop(self, new: str) -> None:
        """Cuts the text, with what is new in it, at the match that stops a reader of single characters: the first."""
        params = self._seq.params
        if self.num_read <= params.min_tokens:
            return
        text = self.text[max(0, len(self.text) - self._held_back) :] + new
        num_old = len(text) - len(new)
        # The end of a match is new: what came before was searched, or is exempt by `min_tokens`.
        starts = [(text.find(stop, max(0, num_old - len(stop) + 1)), stop) for stop in params.stop]
        found = [(start + len(stop), stop) for start, stop in starts if start >= 0]
        for end, stop in sorted(found):
            num_cut = 0 if params.include_stop_str_in_output else len(stop)
            whole = (self.text + new)[: len(self.text) - num_old + end - num_cut]
            if self._seq.guide is None or self._seq.guide.grammar.accepts(whole):
                self.text, self.stop = whole, stop
                break

    def _is_certain(self, token_ids: list[int], text: str) -> bool:
        if text.endswith(REPLACEMENT):
            return False
        return self._invalid_byte is None or self._decode([*token_ids, self._invalid_byte]).startswith(text)

    def _keep_context(self) -> None:
        """The fewest last tokens with any text: decoders that strip the start of a text have then done so."""
        token_ids, n = _visible(self._seq, self._start, self.num_read), 1
        while not (context := self._decode(token_ids[-n:])) and n < len(token_ids):
            n *= 2
        self._start += max(0, len(token_ids) - n)
        self._context = context

    def _decode(self, token_ids: list[int]) -> str:
        return decode(self._tokenizer, token_ids, self._seq.params.skip_special_tokens)


def _invalid_byte(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token of a byte that is in no UTF-8 text, if the tokenizer falls back to bytes."""
    token_id = tokenizer.convert_tokens_to_ids("<0xFF>")
    return token_id if token_id is not None and tokenizer.convert_ids_to_tokens(token_id) == "<0xFF>" else None


def _visible(seq: Sequence, start: int, end: int) -> list[int]:
    """The completion's tokens `start` to `end`, without one that ended it unless `include_stop_str_in_output`."""
    token_ids = seq.token_ids[seq.num_prompt_tokens + start : seq.num_prompt_tokens + end].tolist()
    is_stopped = seq.finish_reason == "stop" and end == seq.num_completion_tokens
    is_eos = seq.stop_reason is None and seq.token_ids[-1] in seq.eos_token_ids  # else a structure is complete
    ends_with_stop_token = is_stopped and (is_eos or isinstance(seq.stop_reason, int))
    return token_ids[:-1] if ends_with_stop_token and not seq.params.include_stop_str_in_output else token_ids
