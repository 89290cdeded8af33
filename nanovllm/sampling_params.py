"""What a user may ask of one request's sampling. Knows nothing of models or schedules."""

import math
from dataclasses import dataclass
from numbers import Integral, Real


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample one completion.

    Args:
        temperature: Divides the logits before the softmax. 0 takes the most likely token (greedy).
        max_tokens: Most tokens to generate, at least 1. The model's length ends a completion earlier.
        ignore_eos: Go on after an end-of-sequence token, for benchmarks.

    Raises:
        TypeError: A value is not of its type.
        ValueError: A value is out of its range.
    """

    temperature: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, Real):
            raise TypeError(f"temperature must be a number, got {self.temperature!r}")
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature must be finite and at least 0 (0 is greedy), got {self.temperature!r}")
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, Integral):
            raise TypeError(f"max_tokens must be an integer, got {self.max_tokens!r}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens!r}")
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
