"""What a user may ask of one request. Knows nothing of models or schedules; names and ranges are vLLM's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING

from nanovllm.structured_outputs import StructuredOutputs
from nanovllm.utils.checks import check_bool, check_float, check_int

if TYPE_CHECKING:
    import torch

# Takes the completion's token ids so far and [V] fp32 logits; returns the logits to use.
LogitsProcessor = Callable[[list[int], "torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample the completions of one prompt.

    The logits are changed in this order: `structured_outputs`, `allowed_token_ids`, `bad_words`, `min_tokens`,
    `logit_bias`, `logits_processors`, the three penalties, `temperature`, `min_p`, `top_k`, `top_p`. Every filter sees
    the distribution that the one before has left, renormalised. Where the others forbid all that a structure allows,
    the structure alone counts.

    TypeError or ValueError if a value is not of its type, is out of its range, or contradicts another.
    """

    temperature: float = 1.0  # divides the logits before the softmax; 0 takes the most likely token (greedy)
    # Most tokens to generate; None: up to the model's length, which always ends them; 0: only `prompt_logprobs`.
    max_tokens: int | None = 64
    ignore_eos: bool = False  # go on after an end-of-sequence token, for benchmarks
    n: int = 1  # completions of the prompt, each with random draws of its own
    top_k: int = 0  # sample among this many most likely tokens; 0 or -1 among all
    top_p: float = 1.0  # sample among the fewest most likely tokens whose probabilities reach this sum, in (0, 1]
    min_p: float = 0.0  # sample among the tokens at least this fraction as likely as the most likely one, in [0, 1]
    presence_penalty: float = 0.0  # subtracted from the logit of each token of the completion so far, in [-2, 2]
    frequency_penalty: float = 0.0  # subtracted each time that the token occurs in the completion so far, in [-2, 2]
    # Divides the positive and multiplies the negative logits of tokens of the prompt and of the completion so far.
    repetition_penalty: float = 1.0
    # Of the request's own random stream: the same tokens whatever else runs. None: from the engine's.
    seed: int | None = None
    stop: str | Sequence[str] | None = None  # texts that end the completion
    stop_token_ids: Sequence[int] | None = None  # tokens that end it, beside the end-of-sequence ones
    include_stop_str_in_output: bool = False  # keep the text of what stopped the completion at its end
    min_tokens: int = 0  # no end of sequence and no stop before this many tokens
    # Report the log-probability of each token and of this many most likely ones (-1 is all), of the model's own
    # distribution, before any of these parameters changes it.
    logprobs: int | None = None
    # As `logprobs`, of the prompt's tokens. The prompt is computed whole then, without the prefix cache.
    prompt_logprobs: int | None = None
    # Keep only so many tokens of the prompt, its last; -1: what the model takes.
    truncate_prompt_tokens: int | None = None
    logit_bias: dict[int, float] | None = None  # token id -> what to add to its logit, in [-100, 100]
    bad_words: Sequence[str] | None = None  # texts that the completion must not contain, as sequences of tokens
    allowed_token_ids: Sequence[int] | None = None  # sample only these tokens
    skip_special_tokens: bool = True  # leave special tokens out of `text`; `token_ids` keep everything
    # Callables from the completion's token ids so far and the [V] fp32 logits to the logits to use: the slow path.
    logits_processors: Sequence[LogitsProcessor] | None = None
    # The form of the completion, also as a dict of the fields of `StructuredOutputs`; see there.
    structured_outputs: StructuredOutputs | dict | None = None

    def __post_init__(self) -> None:
        check_float("temperature", self.temperature, 0, 1e6)
        check_float("top_p", self.top_p, 0, 1, open_low=True)
        check_float("min_p", self.min_p, 0, 1)
        check_float("presence_penalty", self.presence_penalty, -2, 2)
        check_float("frequency_penalty", self.frequency_penalty, -2, 2)
        check_float("repetition_penalty", self.repetition_penalty, 1e-6, 1e6)  # beyond, logits overflow
        for name, low in (("n", 1), ("top_k", -1), ("min_tokens", 0)):
            check_int(name, getattr(self, name), low)
        for name, low in (("max_tokens", 0), ("seed", None), ("logprobs", -1), ("prompt_logprobs", -1)):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), low)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            check_bool(name, getattr(self, name))
        if self.truncate_prompt_tokens is not None:
            check_int("truncate_prompt_tokens", self.truncate_prompt_tokens, -1)
        self._freeze_collections()
        if isinstance(self.structured_outputs, dict):
            object.__setattr__(self, "structured_outputs", StructuredOutputs(**self.structured_outputs))
        if not isinstance(self.structured_outputs, StructuredOutputs | None):
            raise TypeError(f"structured_outputs must be a StructuredOutputs, got {self.structured_outputs!r}")
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise ValueError("max_tokens must be at least 1, or 0 with prompt_logprobs to score a prompt, got 0")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens must be at least 1, or -1 for what the model takes, got 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must not exceed max_tokens={self.max_tokens}")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n={self.n} with temperature=0 would repeat one completion; use n=1 or a temperature")

    def _freeze_collections(self) -> None:
        """Turns them into tuples and dicts of their own, so that a later change of the caller's does nothing."""
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        for name in ("stop", "bad_words"):
            self._freeze(name, "texts", lambda text: isinstance(text, str))
            if "" in getattr(self, name):
                raise ValueError(f"{name} must not contain an empty text")
        for name in ("stop_token_ids", "allowed_token_ids"):
            self._freeze(name, "token ids", _is_token_id)
        self._freeze("logits_processors", "callables", callable)
        bias = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, dict) or not all(map(_is_token_id, bias)):
            raise TypeError(f"logit_bias must be a dict of token id -> number, got {bias!r}")
        for token_id, value in bias.items():
            check_float(f"logit_bias[{token_id}]", value, -100, 100)
        object.__setattr__(self, "logit_bias", dict(bias))

    def _freeze(self, name: str, what: str, is_valid: Callable[[object], bool]) -> None:
        value = getattr(self, name)
        if value is None:  # stays None where an empty list would mean something else, so `dataclasses.replace` works
            return object.__setattr__(self, name, None if name == "allowed_token_ids" else ())
        if isinstance(value, str) or not hasattr(value, "__iter__") or not all(map(is_valid, value)):
            raise TypeError(f"{name} must be a list of {what}, got {value!r}")
        if name == "allowed_token_ids" and not len(value):
            raise ValueError("allowed_token_ids must not be empty; leave it None to allow all")
        object.__setattr__(self, name, tuple(value))

    @property
    def edits_logits(self) -> bool:
        """Whether anything but temperature and filters stands between the model's logits and the sample."""
        rules = self.allowed_token_ids or self.bad_words or self.min_tokens or self.logit_bias or self.logits_processors
        return bool(rules or self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    @property
    def filters(self) -> bool:
        """Whether the distribution is cut by `top_k`, `top_p` or `min_p`. Greedy needs no cut."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


def _is_token_id(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and -(2**63) <= value < 2**63
