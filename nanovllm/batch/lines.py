"""What a line of a batch file asks for, and the line that answers it. Knows nothing of engines and files.

The formats are those of OpenAI's batch API, with the request bodies of its chat completions and completions, and a
plain one.
"""

from dataclasses import dataclass, field

from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams


class LineError(ValueError):
    """A line that cannot be run. `custom_id` is the line's own if that could still be read, else its number."""

    def __init__(self, message: str, custom_id: str, code: str = "invalid_request"):
        super().__init__(message)
        self.custom_id, self.code = custom_id, code


@dataclass(slots=True)
class Item:
    """One request of a job."""

    line: int  # its place in the job's whole input, from 0
    custom_id: str
    params: SamplingParams
    prompt: str | list[int] | None = None  # of a completion; None: it has messages
    messages: list[dict] | None = None  # of a chat
    template_kwargs: dict[str, object] = field(default_factory=dict)  # of a chat, with `tools`
    echo: bool = False  # the text of the answer begins with the prompt's


def parse_line(line: bytes, number: int, defaults: dict[str, object] | None = None) -> Item:
    """The request of a line; `defaults` are fields of `SamplingParams` for what it does not say. LineError if bad."""
    raise NotImplementedError


def prompt_of(item: Item, tokenizer: object) -> str | list[int]:
    """The prompt for `LLM.generate`: a chat's messages through the chat template. LineError if that refuses them."""
    raise NotImplementedError


def answer_record(item: Item, output: RequestOutput, model: str) -> dict[str, object]:
    """The line that answers a request: an error record if its `finish_reason` is "error"."""
    raise NotImplementedError


def error_record(custom_id: str, code: str, message: str) -> dict[str, object]:
    """The line that says why a request has no answer."""
    raise NotImplementedError
