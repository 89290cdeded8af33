"""One request as the scheduler sees it: its tokens, its blocks, how far it has come. Knows nothing of tensors."""

from array import array
from collections.abc import Iterable
from enum import Enum, auto

from nanovllm.sampling_params import SamplingParams


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """A prompt and what has been generated after it.

    Between steps the first `num_computed_tokens` of `token_ids` have their keys and values in the cache, in the
    blocks of `block_table`, and `len(block_table) == ceil(num_computed_tokens / block_size)`. A token is appended
    when it is sampled; its slot is allocated one step later, when it is scheduled to be computed.

    Args:
        seq_id: Unique within the engine.
        token_ids: The prompt.
        params: What the user asked for.
        eos_token_ids: Tokens that end the completion unless `ignore_eos`.
        max_len: Most tokens, prompt included, that the sequence may grow to.
        rng_key: 64-bit key of the request's own random stream.
        source: A sequence of the same prompt whose blocks this one may share once they are computed.
    """

    __slots__ = (
        "seq_id", "token_ids", "num_prompt_tokens", "params", "temperature", "stop_token_ids", "max_len", "rng_key",
        "source", "bad_words_ids", "has_options", "status", "finish_reason", "stop_reason",
        "block_table", "block_hashes", "keeps_blocks",
        "num_computed_tokens", "num_scheduled_tokens", "num_cached_tokens", "logprobs", "prompt_logprobs", "is_owned",
    )  # fmt: skip

    def __init__(
        self,
        seq_id: int,
        token_ids: Iterable[int],
        params: SamplingParams,
        eos_token_ids: frozenset[int] = frozenset(),
        max_len: int = 2**31 - 1,
        rng_key: int = 0,
        source: "Sequence | None" = None,
    ):
        self.seq_id = seq_id
        self.token_ids = array("i", token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.params = params
        self.temperature = float(params.temperature)
        self.stop_token_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
        self.max_len = (
            max_len if params.max_tokens is None else min(self.num_prompt_tokens + params.max_tokens, max_len)
        )
        self.rng_key = rng_key
        self.source = source
        self.bad_words_ids: list[list[int]] = []
        self.has_options = params.edits_logits or params.filters or params.logprobs is not None
        self.status = SequenceStatus.WAITING
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.block_table: list[int] = []
        self.block_hashes: list[int] = []  # of the full blocks so far, extended when the block manager needs them
        self.keeps_blocks = False  # when it finishes, for others to fork from
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0  # to be computed in the step that is being run
        self.num_cached_tokens: int | None = None  # those that the cache had when it was first admitted
        self.logprobs: list[dict] = []  # of the completion's tokens, if asked for
        self.prompt_logprobs: list[dict | None] = [None]  # of the prompt's, if asked for; the first has none
        self.is_owned = False  # by a call that watches it; else `step` reports its end

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
    def lacks_prompt_logprobs(self) -> bool:
        """Whether the prompt must be computed whole, because the log-probabilities of its tokens are wanted."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens
