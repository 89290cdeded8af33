"""Checks of users' values, with errors that name the argument and what it may be."""

import difflib
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path


def check_int(name: str, value: object, low: int | None = None, high: int | None = None) -> None:
    """Raises unless `value` is an integer between `low` and `high`."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):  # the latter is slow
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if (low is not None and value < low) or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {allowed}, got {value}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit into 64 bits, got one of {int(value).bit_length()}")


def check_float(name: str, value: object, low: float, high: float = math.inf, open_low: bool = False) -> None:
    """Raises unless `value` is a finite number between `low` (excluded if `open_low`) and `high`."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not low <= value <= min(high, sys.float_info.max) or (open_low and value == low):
        above = f"above {low}" if open_low else f"at least {low}"
        below = f" and at most {high}" if high < math.inf else ""
        raise ValueError(f"{name} must be finite, {above}{below}, got {value!r}")


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: object, choices: list[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def nearest_name(name: str, names: Sequence[str]) -> str | None:
    """The one of `names` that `name` is probably a misspelling of."""
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.7)), None)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Whatever errors there are in making sense of what a file says are ValueErrors that name it."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error


def first_line(error: Exception) -> str:
    """What an error says first, for a log; its representation if it says nothing."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)
