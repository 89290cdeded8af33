"""What form a completion must have. Knows nothing of models and tokens; the names are vLLM's."""

import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

from nanovllm.utils.checks import check_bool


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """Exactly one of these. TypeError or ValueError if none or several are given, or one is not of its type.

    Whether a model can follow it is checked when a prompt is given: see `LLM.generate`.
    """

    # A JSON schema, as a dict, its text or a pydantic model class: the completion is JSON that fits it, with no spaces
    # between its parts but where the schema has `"x-guidance": {"whitespace_flexible": true}`.
    json: str | dict | bool | type | None = None
    regex: str | None = None  # matches the whole completion; look-around and back references are not supported
    choice: Sequence[str] | None = None  # texts, one of which the completion is
    grammar: str | None = None  # in Lark's syntax as llguidance has it, or GBNF
    json_object: bool = False  # any JSON object

    def __post_init__(self) -> None:
        check_bool("structured_outputs.json_object", self.json_object)
        if len(self._given) != 1:
            names = ", ".join(f.name for f in fields(self))
            raise ValueError(f"structured_outputs must have exactly one of {names}, got {self._given}")
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                raise TypeError(f"structured_outputs.{name} must be a text, got {getattr(self, name)!r}")
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _texts(self.choice))

    @property
    def _given(self) -> list[str]:
        return [f.name for f in fields(self) if getattr(self, f.name) is not f.default]

    @property
    def kind(self) -> str:
        """Which one it is."""
        return self._given[0]


def _schema_text(schema: object) -> str:
    """JSON, in which the order of properties stays: it is theirs in the completion."""
    try:
        if hasattr(schema, "model_json_schema"):
            schema = schema.model_json_schema()
        schema = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(schema)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"structured_outputs.json is not JSON: {error}") from error
    if not isinstance(schema, dict | bool):
        given = reprlib.repr(schema)
        raise TypeError(f"structured_outputs.json must be a JSON schema or a pydantic model class, got {given}")
    return text


def _texts(choice: object) -> tuple[str, ...]:
    if isinstance(choice, str) or not hasattr(choice, "__iter__") or not all(isinstance(c, str) for c in choice):
        raise TypeError(f"structured_outputs.choice must be a list of texts, got {reprlib.repr(choice)}")
    if not len(choice) or "" in choice:
        raise ValueError(f"structured_outputs.choice must have texts, none of them empty, got {reprlib.repr(choice)}")
    return tuple(choice)
