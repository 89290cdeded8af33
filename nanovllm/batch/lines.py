"""What a line of a batch file asks for, and the line that answers it. Knows nothing of engines and files.

The formats are those of OpenAI's batch API, with the request bodies of its chat completions and completions, and a
plain one: `{"prompt": ...}` or `{"messages": ...}` with any of their fields beside it. vLLM's further fields are taken
where `SamplingParams` or the chat template has a meaning for them.
"""

import json
import re
import reprlib
from dataclasses import dataclass, field, fields
from itertools import accumulate
from time import time

from xxhash import xxh3_128_hexdigest, xxh64_intdigest

from nanovllm.engine.chat import render_chats
from nanovllm.outputs import CompletionOutput, RequestOutput, TokenLogprob
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.checks import check_bool, nearest_name, require

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MOST_COMPLETIONS = 1024  # of one line: each is a sequence of its own from the start
LONGEST_MESSAGE = 1000  # characters of an error, which may quote the line
LOWEST_LOGPROB = -9999.0  # JSON has no infinity
SAMPLING = {f.name for f in fields(SamplingParams)} - {"logits_processors"}
FOR_TEMPLATE = {
    "chat_template_kwargs": dict, "tools": list, "documents": list, "add_generation_prompt": bool,
    "continue_final_message": bool,
}  # fmt: skip
# Fields that change nothing in an answer, whatever they say; and values of others that ask for what is done anyway.
IGNORED = {
    "model", "user", "metadata", "service_tier", "stream_options", "parallel_tool_calls", "safety_identifier",
    "prompt_cache_key", "request_id",
}  # fmt: skip
NO_OPS = {
    "stream": [False], "store": [False], "echo": [False], "suffix": [""], "response_format": [{"type": "text"}],
    "modalities": [["text"]], "tool_choice": ["auto"], "functions": [[]], "function_call": ["none", "auto"],
    "use_beam_search": [False], "spaces_between_special_tokens": [True], "detokenize": [True], "priority": [0],
}  # fmt: skip
NO_PARAMS = SamplingParams()  # until those of a line are known
CUSTOM_ID = re.compile(rb'\s*\{\s*"custom_id"\s*:\s*("(?:[^"\\]|\\.)*")')


class LineError(ValueError):
    """A line that cannot be run. `custom_id` is the line's own if that could still be read, else its number."""

    def __init__(self, message: str, custom_id: str, code: str = "invalid_request"):
        super().__init__(_clean(message)[:LONGEST_MESSAGE])
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
    return_token_ids: bool = False  # the answer has its token ids beside the text
    num_bytes: int = 0  # of the line


# ---- from a line to a request


def parse_line(line: bytes, number: int, defaults: dict[str, object] | None = None, job_seed: int = 0) -> Item:
    """The request of a line.

    A line that samples without a `seed` gets one of its own, which depends on nothing but `job_seed` and its custom_id:
    its answer is the same whatever runs beside it, and after the job was resumed.

    Args:
        line: Whatever bytes there are.
        number: Its place in the job's whole input, from 0. A line without custom_id is called "line-1", "line-2", ...
        defaults: Fields of `SamplingParams` for what the line does not say; beyond them `max_tokens` is None.
        job_seed: See above.

    Raises:
        LineError: It is no request, or asks for what there is not; the message names the field.
    """
    custom_id, code = None, "invalid_json"
    try:
        request = _decode(line)
        require(isinstance(request, dict), "the line must be a JSON object")
        code = "invalid_request"
        if request.get("custom_id") is not None:
            given = request.pop("custom_id")
            require(_is_text(given) and given != "", f"custom_id must be a text of Unicode characters, got {given!r}")
            custom_id = given
        _check_texts(line, request)
        url, body = _unwrap(request)
        defaults = {"max_tokens": None} | (defaults or {})
        return _item(url, body, number, custom_id or f"line-{number + 1}", defaults, job_seed)
    except (RecursionError, TypeError, ValueError, OverflowError) as error:
        message = "the line is nested too deeply" if isinstance(error, RecursionError) else str(error)
        custom_id = custom_id or _first_custom_id(line) or f"line-{number + 1}"
        raise LineError(message, custom_id, code) from error


def _first_custom_id(line: bytes) -> str | None:
    """Of a line that begins with it, as they mostly do, whatever is wrong further on."""
    match = CUSTOM_ID.match(line)
    try:
        custom_id = json.loads(match[1].decode()) if match else None
    except ValueError:
        return None
    return custom_id if custom_id and _is_text(custom_id) else None


def _no_constant(name: str) -> None:
    raise ValueError(f"the line is not JSON, which has no {name}")


_decoder = json.JSONDecoder(parse_constant=_no_constant)


def _decode(line: bytes) -> object:
    try:
        return _decoder.decode(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"the line is not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"the line is not JSON: {error.msg} at character {error.pos}") from None


def _is_text(value: object) -> bool:
    """Whether it is one that can be encoded, without halves of surrogate pairs."""
    return isinstance(value, str) and (value.isascii() or value == _clean(value))


def _clean(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _check_texts(line: bytes, request: dict[str, object]) -> None:
    if b"\\u" in line:  # only escapes can write half a pair
        try:
            json.dumps(request, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text has one half of a surrogate pair, which is no character") from None


def _unwrap(request: dict[str, object]) -> tuple[str, dict[str, object]]:
    """The URL, which says what kind of request it is, and the body of both forms, without what is null."""
    if not request.keys() & {"method", "url", "body"}:
        url, body = CHAT if request.get("messages") is not None else COMPLETION, request
    else:
        url, body = request.pop("url", None), request.pop("body", None)
        method = request.pop("method", None) or "POST"
        require(method == "POST", f"method must be 'POST', got {method!r}")
        require(url in (CHAT, COMPLETION), f"url must be {CHAT!r} or {COMPLETION!r}, got {url!r}")
        require(isinstance(body, dict), "body must be an object with the request's fields")
        require(not request, f"beside custom_id, method, url and body there is {next(iter(request), None)!r}")
    return url, {name: value for name, value in body.items() if value is not None}


def _item(
    url: str, body: dict[str, object], number: int, custom_id: str, defaults: dict[str, object], job_seed: int
) -> Item:
    what = "messages" if url == CHAT else "prompt"
    require(what in body, f"{what} is missing" if url == CHAT else "prompt is missing, or messages for a chat")
    given = body.pop(what)
    item = Item(number, custom_id, NO_PARAMS)
    if url == CHAT:
        item.messages, item.template_kwargs = _messages(given), _template_kwargs(body)
    else:
        item.prompt, item.echo = _prompt(given), body.pop("echo", False)
        check_bool("echo", item.echo)
    item.return_token_ids = body.pop("return_token_ids", False)
    check_bool("return_token_ids", item.return_token_ids)
    params = defaults | _sampling(body)
    if item.echo:
        require(isinstance(item.prompt, str), "echo needs a prompt that is a text")
        require(params.get("truncate_prompt_tokens") is None, "echo cannot be combined with truncate_prompt_tokens")
        if params.get("prompt_logprobs") is None:
            params["prompt_logprobs"] = params.get("logprobs")
    if params.get("seed") is None and params.get("temperature") != 0:
        params["seed"] = xxh64_intdigest(f"{job_seed} {custom_id}".encode()) >> 1
    item.params = SamplingParams(**params)
    require(item.params.n <= MOST_COMPLETIONS, f"n must be at most {MOST_COMPLETIONS}, got {item.params.n}")
    return item


def _sampling(body: dict[str, object]) -> dict[str, object]:
    """Fields of `SamplingParams`, and an error for a field that asks for something else."""
    params = {name: body.pop(name) for name in SAMPLING & body.keys()}
    if "max_completion_tokens" in body:  # the newer name counts
        params["max_tokens"] = body.pop("max_completion_tokens")
    num_top = body.pop("top_logprobs", None)
    if isinstance(params.get("logprobs"), bool):  # a chat's; a completion's is a number
        params["logprobs"] = (num_top or 0) if params["logprobs"] else None
    require(not num_top or params.get("logprobs") == num_top, "top_logprobs needs logprobs to be true")
    if "logit_bias" in params:
        require(isinstance(params["logit_bias"], dict), "logit_bias must be an object of token id: number")
        params["logit_bias"] = {int(token_id): value for token_id, value in params["logit_bias"].items()}
    if (form := _form(body.get("response_format"))) is not None:
        require("structured_outputs" not in params, "response_format and structured_outputs exclude each other")
        params["structured_outputs"] = form
        del body["response_format"]
    best_of, n = body.pop("best_of", None), params.get("n", 1)
    require(best_of in (None, n), f"best_of must be n, which is {n}, got {best_of!r}")
    for name, value in body.items():
        if name not in IGNORED and value not in NO_OPS.get(name, ()):
            nearest = None if name in NO_OPS else nearest_name(name, [*SAMPLING, *FOR_TEMPLATE])
            advice = f"; the nearest field is {nearest!r}" if nearest else ""
            raise ValueError(f"the field {name!r} is not supported with the value {reprlib.repr(value)}{advice}")
    return params


def _form(response_format: object) -> dict[str, object] | None:
    """What a `response_format` is among `structured_outputs`, if anything."""
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema":
        return None
    given = response_format.get("json_schema")
    is_schema = isinstance(given, dict) and isinstance(given.get("schema"), dict)
    require(is_schema, "response_format.json_schema must be an object with a schema")
    return {"json": given["schema"]}


def _prompt(prompt: object) -> str | list[int]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        [prompt] = prompt
    is_ids = isinstance(prompt, list) and all(type(i) is int and 0 <= i < 2**31 for i in prompt)
    require(is_ids or isinstance(prompt, str), "prompt must be one text or one list of token ids; one line for each")
    return prompt


def _messages(messages: object) -> list[dict]:
    require(isinstance(messages, list) and messages, "messages must be a list of at least one message")
    for i, message in enumerate(messages):
        is_message = isinstance(message, dict) and isinstance(message.get("role"), str)
        require(is_message, f"messages[{i}] must be an object with a role and a content")
        content = message.get("content")
        if content is None and message["role"] == "assistant":  # beside its tool calls
            content = ""
        message["content"] = _content(content, f"messages[{i}].content")
    return messages


def _content(content: object, name: str) -> str:
    """A text, or the texts of a content's parts as paragraphs."""
    if isinstance(content, str):
        return content
    require(isinstance(content, list), f"{name} must be a text or a list of parts")
    for i, part in enumerate(content):
        require(isinstance(part, dict), f"{name}[{i}] must be an object with a type")
        kind = reprlib.repr(part.get("type"))
        require(kind == "'text'", f"{name}[{i}] is of type {kind}: only parts of type 'text' are supported")
        require(isinstance(part.get("text"), str), f"{name}[{i}].text must be a text")
    return "\n".join(part["text"] for part in content)


def _template_kwargs(body: dict[str, object]) -> dict[str, object]:
    """The variables of the chat template, with `add_generation_prompt`."""
    if not body.get("tools") and body.get("tool_choice") == "none":
        del body["tool_choice"]
    given = {name: body.pop(name) for name in FOR_TEMPLATE if name in body}
    for name, value in given.items():
        kind = FOR_TEMPLATE[name]
        require(isinstance(value, kind), f"{name} must be a {kind.__name__}, got {reprlib.repr(value)}")
    variables = given.pop("chat_template_kwargs", {}) | given
    require("chat_template" not in variables, "chat_template cannot be set: the checkpoint's is used")
    return variables


def prompt_of(item: Item, tokenizer: object) -> str | list[int]:
    """The prompt for `LLM.generate`: a chat's messages through the chat template. LineError if that refuses them."""
    if item.messages is None:
        return item.prompt
    variables = dict(item.template_kwargs)
    is_to_answer = variables.pop("add_generation_prompt", True)
    if getattr(tokenizer, "chat_template", None) is None:
        raise LineError("the model has no chat template: give a prompt instead of messages", item.custom_id)
    try:
        [prompt] = render_chats(tokenizer, [item.messages], is_to_answer, variables, {})
    except (TypeError, ValueError) as error:
        message = str(error).replace("conversations[0]", "the messages")
        raise LineError(message, item.custom_id) from error
    return prompt


# ---- from an output to the line that answers


def answer_record(item: Item, output: RequestOutput, model: str) -> dict[str, object]:
    """The line that answers a request: an error record if one of its completions has `finish_reason` "error"."""
    failed = next((completion for completion in output.outputs if completion.finish_reason == "error"), None)
    if failed is not None:
        return error_record(item.custom_id, "generation_failed", failed.error)
    is_chat, digest = item.messages is not None, xxh3_128_hexdigest(item.custom_id.encode())
    num_prompt, num_completion = len(output.prompt_token_ids), sum(len(each.token_ids) for each in output.outputs)
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{digest}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time()),
        "model": _clean(model),
        "choices": [_choice(item, output, completion) for completion in output.outputs],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "prompt_tokens_details": {"cached_tokens": output.num_cached_tokens},
        },
    }
    if output.prompt_logprobs is not None:
        body["prompt_logprobs"] = [entry and _token(entry) for entry in output.prompt_logprobs]
    response = {"status_code": 200, "request_id": f"req_{digest}", "body": body}
    return {"id": f"batch_req_{digest}", "custom_id": item.custom_id, "response": response, "error": None}


def error_record(custom_id: str, code: str, message: str) -> dict[str, object]:
    """The line that says why a request has no answer."""
    digest = xxh3_128_hexdigest(custom_id.encode())
    error = {"code": code, "message": _clean(message)[:LONGEST_MESSAGE]}
    return {"id": f"batch_req_{digest}", "custom_id": custom_id, "response": None, "error": error}


def _choice(item: Item, output: RequestOutput, completion: CompletionOutput) -> dict[str, object]:
    text, entries, logprobs = completion.text, completion.logprobs, None
    choice: dict[str, object] = {"index": completion.index}
    if item.messages is not None:
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        if entries is not None:
            logprobs = {"content": [_token(entry) for entry in entries], "refusal": None}
    else:
        choice["text"] = item.prompt + text if item.echo else text
        if entries is not None:
            logprobs = _columns(output.prompt_logprobs + entries if item.echo else entries, choice["text"])
    choice |= {"logprobs": logprobs, "finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}
    return choice | {"token_ids": completion.token_ids} if item.return_token_ids else choice


def _finite(logprob: float) -> float:
    return max(LOWEST_LOGPROB, logprob)  # in this order also of a NaN


def _logprob(text: str, logprob: float) -> dict[str, object]:
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def _token(entry: TokenLogprob) -> dict[str, object]:
    """A token as chats report it, and prompts."""
    top = [_logprob(text, logprob) for _, logprob, text in entry.top]
    return _logprob(entry.token, entry.logprob) | {"top_logprobs": top}


def _columns(entries: list[TokenLogprob | None], text: str) -> dict[str, list]:
    """Tokens as completions report them. The first of a prompt has no logprob, and what text is left."""
    num_rest = sum(len(entry.token) for entry in entries if entry)
    tokens = [entry.token if entry else text[: max(0, len(text) - num_rest)] for entry in entries]
    return {
        "tokens": tokens,
        "token_logprobs": [entry and _finite(entry.logprob) for entry in entries],
        "top_logprobs": [entry and _top_logprobs(entry) for entry in entries],
        "text_offset": [0, *accumulate(map(len, tokens))][: len(tokens)],
    }


def _top_logprobs(entry: TokenLogprob) -> dict[str, float]:
    """By the tokens' texts, of equal ones the likeliest, and with the token itself."""
    tokens = [*entry.top, (entry.token_id, entry.logprob, entry.token)]
    return {text: _finite(logprob) for _, logprob, text in reversed(tokens)}
