"""One request as the scheduler sees it: its tokens, its blocks, how far it has come. Knows nothing of tensors."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.detokenizer import TextStream
    from nanovllm.engine.grammar import Guide


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Watcher(Protocol):
    """Whom the engine's thread tells of a sequence; `news` is where the caller of all this waits."""

    news: object
    follows: bool  # whether each token is of interest, or only the end

    def on_token(self, seq: Sequence) -> None: ...

    def on_end(self, seq: Sequence) -> None: ...


@dataclass(slots=True, eq=False, repr=False)
class Sequence:
    """A prompt and what comes after it: what has been generated, or a given completion that is only to be scored.

    Between steps the first `num_computed_tokens` of `token_ids` have their keys and values in the cache, in the
    blocks of `block_table`, and `len(block_table) == ceil(num_computed_tokens / block_size)`. A token is appended
    when it is sampled; its slot is allocated one step later, when it is scheduled to be computed.
    """

    seq_id: int  # unique within the engine
    token_ids: array  # given as the prompt, any iterable of integers
    params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()  # which end the completion unless `ignore_eos`
    max_len: int = 2**31 - 1  # most tokens, prompt included, that the sequence may grow to
    rng_key: int = 0  # 64 bits that name the request's own random stream
    source: Sequence | None = None  # of the same prompt, whose blocks this one may share once they are computed
    bad_words_ids: list[list[int]] = field(default_factory=list)
    watcher: Watcher | None = None
    keeps_blocks: int = 0  # when it finishes, for so many others to share or fork from

    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: Exception | None = None  # what this sequence alone failed of
    text: TextStream | None = None  # where the text must be known as it grows
    guide: Guide | None = None  # where it must have a structure
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[int] = field(default_factory=list)  # of its full blocks, as far as they were needed
    num_computed_tokens: int = 0
    num_scheduled_tokens: int = 0  # to be computed in the step that is being run, drafts included
    draft_ids: tuple[int, ...] = ()  # guesses of the next tokens, to be checked in that step
    drafts_right: float = 0.0  # of the latest guesses: see `Drafter`
    drafts_checked: float = 0.0
    num_cached_tokens: int | None = None  # those that the cache had when it was first admitted
    logprobs: list[dict] = field(default_factory=list)  # of the completion's tokens, if asked for
    prompt_logprobs: list[dict] = field(default_factory=list)  # of the given tokens that `unscored` says

    num_prompt_tokens: int = field(init=False)
    temperature: float = field(init=False)
    end_token_ids: frozenset[int] = field(init=False)  # that end the completion, of whatever kind
    has_options: bool = field(init=False)  # beside a temperature

    def __post_init__(self) -> None:
        params = self.params
        self.token_ids = array("i", self.token_ids)  # of an array: one copy of its memory
        self.num_prompt_tokens = len(self.token_ids)
        if params.max_tokens is not None:
            self.max_len = min(self.num_prompt_tokens + params.max_tokens, self.max_len)
        self.temperature = float(params.temperature)
        self.end_token_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            self.end_token_ids |= self.eos_token_ids
        is_plain = params.structured_outputs is None and params.logprobs is None
        self.has_options = params.edits_logits or params.filters or not is_plain

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        return f"Sequence({self.seq_id}, {self.status.name}, {self.num_computed_tokens}/{len(self)} tokens)"

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def completion_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :].tolist()

    @property
    def unscored(self) -> range:
        """Positions of the given tokens whose log-probabilities are wanted, while some are missing.

        Those of the completion if there is one and nothing is to be generated, else of the prompt, whose first token
        has none.
        """
        if self.params.prompt_logprobs is None:
            return range(0)
        is_given = self.params.max_tokens == 0 and self.num_completion_tokens > 0
        wanted = range(self.num_prompt_tokens, len(self)) if is_given else range(1, self.num_prompt_tokens)
        return wanted if len(self.prompt_logprobs) < len(wanted) else range(0)

    @property
    def num_reusable_tokens(self) -> int:
        """How many tokens may be in the cache already: what the one after them is computed for are its logits."""
        return (self.unscored.start or len(self)) - 1
