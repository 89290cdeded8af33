"""Which tokens a grammar allows next: compiled grammars, where sequences are in them, and the masks of a step.

By llguidance, which parses bytes: a grammar need not know how a tokenizer cuts them up. Knows nothing of models.
Legend: R tokens to sample, M of them under a mask, V vocabulary.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nanovllm.engine.sequence import Sequence
from nanovllm.structured_outputs import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

    from nanovllm.config import Config

MOST_GRAMMARS = 512  # compiled ones that are kept, of which a usual one takes less than a megabyte
# No spaces between the parts: models would fill lines with them, and what is certain would not be. No \u: a property of
# the schema could come a second time, spelled differently.
JSON_OPTIONS = {"whitespace_flexible": False, "json_allowed_escapes": '"\\bfnrt'}
# Rust's regular expressions and Python's differ in what a letter or a space is; these are what both take for one, and
# in a negated class what one of them does.
SAME_CLASSES = {
    "\\d": "[0-9]", "\\w": "[0-9A-Za-z_]", "\\s": r"[\t-\r ]", "\\W": r"[^\w\p{N}]", "\\S": r"[^\s\x1c-\x1f]",
}  # fmt: skip
SAME_NEGATED = {
    "\\D": "[^0-9]", "\\W": "[^0-9A-Za-z_]", "\\S": r"[^\t-\r ]", "\\w": r"[\w\p{N}]", "\\s": r"[\s\x1c-\x1f]",
}  # fmt: skip


class Grammars:
    """Compiles grammars for an engine, one of the same content once. Any thread may call it.

    ImportError without llguidance; ValueError if the model has no fast tokenizer, or no end-of-sequence token.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase | None):
        self._config, self._tokenizer = config, tokenizer
        self._compiled: OrderedDict[StructuredOutputs, Grammar] = OrderedDict()  # the latest used last
        self._lock = threading.Lock()

    def check(self, outputs: StructuredOutputs, name: str) -> None:
        """Raises ValueError that begins with `name` if no completion can be what is asked for."""
        try:
            self.compile(outputs)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def compile(self, outputs: StructuredOutputs) -> Grammar:
        """ValueError if it is wrong, or allows nothing."""
        with self._lock:
            grammar = self._compiled.pop(outputs, None)
            self._compiled[outputs] = grammar = grammar or Grammar(self._llguidance, outputs)
            if len(self._compiled) > MOST_GRAMMARS:
                self._compiled.popitem(last=False)
            return grammar

    def guide(self, seq: Sequence) -> Guide | None:
        """None if it asks for no structure."""
        outputs = seq.params.structured_outputs
        return None if outputs is None else Guide(self.compile(outputs), seq)

    @cached_property
    def _llguidance(self) -> LLTokenizer:
        try:
            import llguidance.hf
        except ImportError as error:
            raise ImportError("structured_outputs needs llguidance: pip install 'nanovllm[structured]'") from error
        config, tokenizer = self._config, self._tokenizer
        if tokenizer is None or not tokenizer.is_fast:
            kind = "no tokenizer" if tokenizer is None else "a tokenizer without tokenizer.json, in Python"
            raise ValueError(
                f"structured_outputs needs a model with a fast tokenizer, and {config.model_path} has {kind}"
            )
        ends = sorted(config.eos_token_ids)
        if not ends or max(ends) >= len(tokenizer):
            raise ValueError(f"structured_outputs needs a tokenizer with the end-of-sequence tokens, which are {ends}")
        return llguidance.hf.from_tokenizer(tokenizer, n_vocab=config.hf_config.vocab_size, eos_token=ends)


class Grammar:
    """A compiled one. ValueError if what it is made of is wrong, or it allows nothing."""

    def __init__(self, tokenizer: LLTokenizer, outputs: StructuredOutputs):
        from llguidance import LLMatcher

        self._tokenizer = tokenizer
        self._start = LLMatcher(tokenizer, _source(outputs), log_level=0)
        if error := self._start.get_error():
            raise ValueError(f"structured_outputs.{outputs.kind} is wrong or not supported: {error.strip()}")
        self._start.compute_bitmask()
        if self._start.is_stopped():
            raise ValueError(f"structured_outputs.{outputs.kind} allows no text")

    def matcher(self) -> LLMatcher:
        """A new one, at the start."""
        return self._start.deep_copy()

    def accepts(self, text: str) -> bool:
        """Whether the grammar allows that it is all."""
        matcher, tokens = self.matcher(), self._tokenizer.tokenize_str(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def _source(outputs: StructuredOutputs) -> str:
    """In llguidance's own form."""
    from llguidance import LLMatcher, grammar_from

    if outputs.kind in ("json", "json_object"):
        schema = outputs.json or '{"type": "object"}'
        _check_counts(json.loads(schema))
        return LLMatcher.grammar_from_json_schema(schema, defaults=JSON_OPTIONS)
    if outputs.kind == "regex":
        return LLMatcher.grammar_from_regex(_common_regex(outputs.regex))
    if outputs.kind == "choice":  # Rust takes all that `re.escape` escapes
        return LLMatcher.grammar_from_regex("|".join(map(re.escape, outputs.choice)))
    return grammar_from("grammar", outputs.grammar)


def _check_counts(schema: object) -> None:
    """A property that a schema does not name may be repeated, which no grammar sees and `minProperties` would count."""
    if isinstance(schema, dict):
        least, is_closed = schema.get("minProperties"), schema.get("additionalProperties") is False
        if type(least) is int and least > 1 and not (is_closed and not schema.get("patternProperties")):
            raise ValueError("structured_outputs.json: minProperties above 1 needs additionalProperties to be false")
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _check_counts(part)


def _common_regex(regex: str) -> str:
    """One in Rust's syntax whose matches are matches of `regex` for Python, too."""
    is_negated = [False]

    def translate(match: re.Match) -> str:
        part = match[0]
        if part.startswith("["):
            is_negated.append(is_negated[-1] != (part == "[^"))
        elif part == "]" and len(is_negated) > 1:
            is_negated.pop()
        return (SAME_NEGATED if is_negated[-1] else SAME_CLASSES).get(part, part)

    return re.sub(r"\\.|\[\^?|\]", translate, regex, flags=re.DOTALL)


class Guide:
    """Where a sequence is in its grammar. What it knows follows from the completion's tokens alone.

    Where the grammar allows only one text the tokens are certain, those into which the tokenizer would cut it up, and
    are not sampled. The end-of-sequence and stop tokens end it where the text is complete, and only there; when nothing
    else is allowed it ends without one.
    """

    def __init__(self, grammar: Grammar, seq: Sequence):
        self.grammar, self._seq = grammar, seq
        self._ends = seq.end_token_ids | seq.eos_token_ids
        self._matcher: LLMatcher | None = None  # has read the completion's first tokens
        self._num_read = 0
        self._certain: list[int] = []  # tokens that come next
        self.plan: list[int | None] = []  # of the next token and those after drafts: which it must be, if any
        self.has_ended = False
        self.ends_with_token = False  # which is no part of the text

    def restart(self) -> None:
        """What it has read may not be what the sequence has."""
        self._matcher = None

    def follow(self) -> None:
        """Reads the sequence's new tokens. One that the grammar refuses is the sequence's error."""
        if self._matcher is None:
            self._matcher, self._num_read, self.has_ended = self.grammar.matcher(), 0, False
            self._certain = self._matcher.compute_ff_tokens()
        seq, matcher = self._seq, self._matcher
        for token_id in seq.token_ids[seq.num_prompt_tokens + self._num_read :]:
            self._num_read += 1
            self.ends_with_token = token_id in self._ends and matcher.is_accepting()
            self.has_ended = self.ends_with_token or not matcher.consume_token(token_id) or matcher.is_stopped()
            if self.has_ended and not matcher.is_accepting():
                seq.error = _dead_end(matcher)
                break
            self._certain = self._certain[1:] if self._certain[:1] == [token_id] else []
            if not self._certain and not self.has_ended:
                self._certain = matcher.compute_ff_tokens()
        self.plan = self._certain[:1] or [None]

    def foresee(self, guesses: tuple[int, ...], most: int) -> tuple[int, ...]:
        """At most so many next tokens, but the last: those that are certain, and guesses that the grammar allows.

        Sets `plan`. After a guess what is certain takes the place of other guesses.
        """
        matcher, certain, guesses, drafts, num_tried = self._matcher, self._certain, list(guesses), [], 0
        self.plan = []
        while len(self.plan) == len(drafts):
            certain = certain or matcher.compute_ff_tokens()
            self.plan.append(certain[0] if certain else None)
            if certain:
                guesses = guesses[1:] if guesses[:1] == certain[:1] else []
                token_id, *certain = certain
            elif guesses and guesses[0] not in self._ends:
                token_id, *guesses = guesses
            else:
                break
            if len(drafts) < most and matcher.try_consume_tokens([token_id]):
                num_tried += 1
                if not matcher.is_stopped():
                    drafts.append(token_id)
        matcher.rollback(num_tried)
        return tuple(drafts)

    @contextmanager
    def ahead(self, draft_ids: tuple[int, ...]) -> Iterator[LLMatcher]:
        """The matcher, meanwhile after drafts."""
        self._matcher.consume_tokens(list(draft_ids))
        yield self._matcher
        self._matcher.rollback(len(draft_ids))

    def settle_ends(self, allowed: np.ndarray) -> None:
        """Of masks [M, ceil(V / 32)] that allow the end-of-sequence tokens where the text is complete, or stuck."""
        seq = self._seq
        if seq.end_token_ids == seq.eos_token_ids:
            return
        eos, ends = _bits(seq.eos_token_ids, allowed), _bits(seq.end_token_ids, allowed)
        can_end = (allowed & eos).any(1)
        allowed &= ~eos
        allowed[can_end] |= ends
        allowed[~allowed.any(1)] |= eos


def _dead_end(matcher: LLMatcher) -> ValueError:
    reason = matcher.get_error().strip().partition("\n")[0]
    return ValueError(f"the grammar of structured_outputs cannot be followed to an end: {reason}")


def _bits(token_ids: frozenset[int], allowed: np.ndarray) -> np.ndarray:
    """A mask of these tokens, like the rows of `allowed`."""
    bits, ids = np.zeros(32 * allowed.shape[1], dtype=np.uint8), list(token_ids)
    bits[ids] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


class Masks(NamedTuple):
    """Of the R tokens to sample."""

    rows: list[int]  # [M], ascending
    allowed: np.ndarray  # [M, ceil(V / 32)] int32, see `Options.masks`
    certain: dict[int, int]  # row -> its token, whatever would be sampled


class MaskMaker:
    """Computes the masks of a step in threads of its own, while the model runs."""

    def __init__(self, vocab_size: int, num_threads: int):
        self._num_words, self._num_threads = -(-vocab_size // 32), num_threads
        self._threads: ThreadPoolExecutor | None = None  # one, which hands them out to those of `_executor`

    def start(self, seqs: list[Sequence], num_sampled: np.ndarray | None) -> Future[Masks] | None:
        """None if no sequence has a grammar. `num_sampled` of the R tokens are each sequence's, None: one.

        Until the result is there nothing else may happen to the sequences' guides.
        """
        if all(seq.guide is None for seq in seqs):
            return None
        if self._threads is None:
            from llguidance import LLExecutor

            self._threads = ThreadPoolExecutor(1, "nanovllm masks")
            self._executor = LLExecutor(self._num_threads)
        counts = [1] * len(seqs) if num_sampled is None else num_sampled.tolist()
        starts = np.cumsum([0, *counts[:-1]]).tolist()
        items = zip(seqs, starts, counts, strict=True)
        return self._threads.submit(self._compute, [item for item in items if item[0].guide is not None])

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()

    def _compute(self, guided: list[tuple[Sequence, int, int]]) -> Masks:
        """Of sequences, with their first row and how many they have."""
        certain: dict[int, int] = {}
        rounds: dict[int, list[tuple[Sequence, int, int]]] = defaultdict(list)  # each with a row of a sequence
        for seq, start, count in guided:
            if not seq.draft_ids:
                seq.guide.follow()
            plan = seq.guide.plan[:count]
            certain |= {start + i: token_id for i, token_id in enumerate(plan) if token_id is not None}
            for n, i in enumerate(i for i, token_id in enumerate(plan) if token_id is None):
                rounds[n].append((seq, i, start + i))
        rows = sorted(row for items in rounds.values() for *_, row in items)
        allowed = np.zeros((len(rows), self._num_words), dtype=np.int32)
        places = {row: place for place, row in enumerate(rows)}
        for items in rounds.values():
            self._fill(allowed, [(seq, num_drafts, places[row]) for seq, num_drafts, row in items])
        return Masks(rows, allowed, certain)

    def _fill(self, allowed: np.ndarray, items: list[tuple[Sequence, int, int]]) -> None:
        """The masks of different sequences, each after so many of its drafts and at its place."""
        from llguidance.numpy import fill_next_token_bitmask_par

        with ExitStack() as stack:
            work = [(stack.enter_context(seq.guide.ahead(seq.draft_ids[:n])), place) for seq, n, place in items]
            fill_next_token_bitmask_par(self._executor, work, allowed)
            for (seq, *_), (matcher, place) in zip(items, work, strict=True):
                seq.guide.settle_ends(allowed[place : place + 1])
                if matcher.is_error():
                    seq.error = _dead_end(matcher)
