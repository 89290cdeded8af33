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
        params: Only `temperature` is read later, by the sampler.
        stop_token_ids: Tokens that end the completion (empty with `ignore_eos`).
        max_len: Most tokens, prompt included, that the sequence may grow to.
        rng_key: 64-bit key of the request's own random stream.
    """

    __slots__ = (
        "seq_id", "token_ids", "num_prompt_tokens", "temperature", "stop_token_ids", "max_len", "rng_key",
        "status", "finish_reason", "block_table", "block_hashes",
        "num_computed_tokens", "num_scheduled_tokens", "num_cached_tokens",
    )  # fmt: skip

    def __init__(
        self,
        seq_id: int,
        token_ids: Iterable[int],
        params: SamplingParams,
        stop_token_ids: frozenset[int] = frozenset(),
        max_len: int = 2**31 - 1,
        rng_key: int = 0,
    ):
        self.seq_id = seq_id
        self.token_ids = array("i", token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.temperature = float(params.temperature)
        self.stop_token_ids = frozenset() if params.ignore_eos else stop_token_ids
        self.max_len = min(self.num_prompt_tokens + params.max_tokens, max_len)
        self.rng_key = rng_key
        self.status = SequenceStatus.WAITING
        self.finish_reason: str | None = None
        self.block_table: list[int] = []
        self.block_hashes: list[int] = []  # of the full blocks so far, extended when the block manager needs them
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0  # to be computed in the step that is being run
        self.num_cached_tokens = 0  # of the last admission, those that the prefix cache had

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        return f"Sequence({self.seq_id}, {self.status.name}, {self.num_computed_tokens}/{len(self)} tokens)"

    @property
    def completion_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :].tolist()
