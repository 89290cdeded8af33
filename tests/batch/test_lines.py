"""Lines of batch files: what they ask for, what of them is refused, and the lines that answer."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from helpers import DEMO_MODEL
from nanovllm import LLM, SamplingParams, StructuredOutputs
from nanovllm.batch.lines import CHAT, COMPLETION, Item, LineError, answer_record, error_record, parse_line, prompt_of

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def llm():
    with LLM(str(DEMO_MODEL), dtype="float32", enforce_eager=True, num_kvcache_blocks=64) as llm:
        yield llm


def chat(**fields) -> bytes:
    body = {"model": "m", "messages": HELLO} | fields
    return json.dumps({"custom_id": "a", "method": "POST", "url": CHAT, "body": body}).encode()


def completion(**fields) -> bytes:
    return json.dumps(
        {"custom_id": "a", "method": "POST", "url": COMPLETION, "body": {"prompt": "hi"} | fields}
    ).encode()


def plain(**fields) -> bytes:
    return json.dumps({"prompt": "hi"} | fields).encode()


def refused(line: bytes, match: str = "", custom_id: str = "line-1", code: str = "invalid_request") -> None:
    with pytest.raises(LineError, match=match) as caught:
        parse_line(line, 0)
    assert (caught.value.custom_id, caught.value.code) == (custom_id, code)


def test_the_three_forms_of_a_line_ask_for_the_same():
    params = SamplingParams(max_tokens=None, temperature=0)
    assert parse_line(chat(temperature=0), 7) == Item(7, "a", params, messages=HELLO)
    assert parse_line(completion(temperature=0), 7) == Item(7, "a", params, prompt="hi")
    assert parse_line(plain(custom_id="a", temperature=0), 7) == Item(7, "a", params, prompt="hi")
    assert parse_line(json.dumps({"messages": HELLO, "temperature": 0}).encode(), 7).messages == HELLO
    assert parse_line(plain(), 7).custom_id == "line-8"
    assert parse_line(b"\xef\xbb\xbf" + plain(prompt=[3, 4]), 0).prompt == [3, 4]
    assert parse_line(completion(prompt=["hi"]), 0).prompt == "hi"


def test_every_field_of_sampling_params_is_taken():
    asked = {
        "temperature": 0.5, "max_tokens": 9, "n": 2, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "presence_penalty": 1,
        "frequency_penalty": -1, "repetition_penalty": 1.1, "seed": 5, "stop": ["x"], "stop_token_ids": [4],
        "include_stop_str_in_output": True, "min_tokens": 2, "ignore_eos": True, "logprobs": 2, "prompt_logprobs": 1,
        "truncate_prompt_tokens": 8, "bad_words": ["y"], "allowed_token_ids": [5, 6], "skip_special_tokens": False,
        "structured_outputs": {"regex": "a+"},
    }  # fmt: skip
    expected = SamplingParams(**asked, logit_bias={7: -100})
    assert not [
        name for name in SamplingParams.__slots__ if name not in asked | {"logit_bias": 0, "logits_processors": 0}
    ]
    for line in (chat, completion, plain):
        assert parse_line(line(**asked, logit_bias={"7": -100}), 0).params == expected
    assert parse_line(chat(max_tokens=9, max_completion_tokens=3), 0).params.max_tokens == 3


def test_a_response_format_is_a_structure():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for asked, form in (
        ({"type": "json_object"}, {"json_object": True}),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}, {"json": schema}),
    ):
        params = parse_line(chat(response_format=asked), 0).params
        assert params.structured_outputs == parse_line(chat(structured_outputs=form), 0).params.structured_outputs
        assert params.structured_outputs == StructuredOutputs(**form)


def test_a_chat_asks_for_logprobs_by_two_fields():
    assert parse_line(chat(logprobs=True), 0).params.logprobs == 0
    assert parse_line(chat(logprobs=True, top_logprobs=3), 0).params.logprobs == 3
    assert parse_line(chat(logprobs=False, top_logprobs=0), 0, {"logprobs": 2}).params.logprobs is None
    refused(chat(top_logprobs=3), "top_logprobs needs logprobs", "a")


def test_the_line_overrides_the_defaults_and_null_says_nothing():
    defaults = {"temperature": 0, "max_tokens": 5, "stop": ["x"]}
    params = parse_line(plain(max_tokens=7, stop=None), 0, defaults).params
    assert params == SamplingParams(temperature=0, max_tokens=7, stop=["x"])
    assert parse_line(plain(), 0).params.max_tokens is None


def test_a_line_that_samples_has_a_seed_that_only_its_id_and_the_jobs_seed_decide():
    seed = parse_line(plain(custom_id="a"), 0, job_seed=1).params.seed
    assert seed == parse_line(plain(custom_id="a", prompt="other", top_p=0.5), 9, job_seed=1).params.seed
    others = [parse_line(plain(custom_id="b"), 0, job_seed=1), parse_line(plain(custom_id="a"), 0, job_seed=2)]
    assert len({seed, *(other.params.seed for other in others)}) == 3
    assert parse_line(plain(temperature=0), 0).params.seed is None
    assert parse_line(plain(seed=4), 0, {"seed": 3}).params.seed == 4
    assert parse_line(plain(), 0, {"seed": 3}).params.seed == 3


def test_what_changes_nothing_is_passed_over():
    idle = {
        "model": "other", "user": "me", "metadata": {"a": [1]}, "service_tier": "flex", "store": False, "stream": False,
        "suffix": None, "best_of": 1, "response_format": {"type": "text"}, "parallel_tool_calls": True,
        "function_call": None, "modalities": ["text"],
    }  # fmt: skip
    assert parse_line(completion(**idle, temperature=0), 0) == parse_line(completion(temperature=0), 0)
    assert (
        parse_line(chat(**idle, tools=[], tool_choice="none").replace(b'"tools": [], ', b""), 0).template_kwargs == {}
    )
    assert parse_line(completion(best_of=3, n=3), 0).params.n == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stream": True}, "'stream' is not supported with the value True"),
        ({"temprature": 1}, "'temprature'.*nearest field is 'temperature'"),
        ({"response_format": {"type": "json"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema must be an object"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "exclude each other"),
        ({"structured_outputs": {"regx": "a"}}, "regx"),
        ({"tools": [{}], "tool_choice": "none"}, "tool_choice"),
        ({"best_of": 2}, "best_of must be n, which is 1, got 2"),
        ({"logits_processors": ["x"]}, "logits_processors"),
        ({"prompt": "hi"}, "prompt"),
        ({"echo": True}, "echo"),
        ({"n": 2000}, "n must be at most 1024"),
        ({"n": 10**30}, "n must fit into 64 bits"),
        ({"top_k": 2**63}, "top_k"),
        ({"temperature": 10**400}, "temperature must be"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": 3}, "stop must be a list of texts"),
        ({"stop_token_ids": [2**70]}, "stop_token_ids"),
        ({"logit_bias": {"a": 1}}, "'a'"),
        ({"logit_bias": {str(2**64): 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias must be an object"),
        ({"tools": "search"}, "tools must be a list"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template cannot be set"),
        ({"messages": []}, "messages must be a list of at least one"),
        ({"messages": None}, "messages is missing"),
        ({"messages": ["hello"]}, r"messages\[0\] must be an object"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content must be a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"content\[0\] is of type 'image_url'"),
    ],
)
def test_what_a_line_cannot_have_is_named(fields, message):
    refused(chat(**fields), message, "a")


def test_a_line_that_is_no_request_keeps_what_can_be_read_of_its_id():
    refused(b"", "not JSON", code="invalid_json")
    refused(b"[1]", "must be a JSON object", code="invalid_json")
    refused(b'{"custom_id": "a\\"b", "prompt": ', "not JSON", 'a"b', "invalid_json")
    refused(b'{"custom_id": "a", "prompt": "\xff"}', "not UTF-8: .* at byte 30", "a", "invalid_json")
    refused(b'{"custom_id": "a", "prompt": "\x00"}', "control character", "a", "invalid_json")
    refused(b'{"custom_id": "a", "temperature": NaN}', "no NaN", "a", "invalid_json")
    refused(b'{"custom_id": "a", "top_k": ' + b"1" * 5000 + b"}", "digits", "a", "invalid_json")
    refused(b'{"custom_id": "a", "prompt": ' + b"[" * 10**5, "nested too deeply", "a", "invalid_json")
    refused(b'{"prompt": "hi", "custom_id": 5}', "custom_id must be a text")
    refused(b'{"prompt": "hi", "custom_id": "\\ud800"}', "custom_id must be a text")
    refused(b'{"custom_id": "a", "prompt": "\\ud800"}', "half of a surrogate pair", "a")
    assert parse_line(b'{"prompt": "\\ud83d\\ude00"}', 0).prompt == "\U0001f600"
    refused(plain(url="/v1/embeddings", prompt="hi"), "url must be")
    refused(completion().replace(b"POST", b"GET"), "method must be 'POST'", "a")
    refused(completion().replace(b'{"prompt": "hi"}', b"[]"), "body must be an object", "a")
    refused(completion().replace(b'"method"', b'"extra": 1, "method"'), "there is 'extra'", "a")
    refused(b'{"custom_id": "a"}', "prompt is missing, or messages", "a")
    for prompt in (["a", "b"], [1, "a"], [-1], [True], {}, [2**40]):
        refused(plain(prompt=prompt), "prompt must be one text or one list of token ids")
    refused(plain(prompt=[1], echo=True), "echo needs a prompt that is a text")


def test_parts_of_a_content_are_joined_and_templates_get_their_variables(tokenizer):
    parts = [{"type": "text", "text": "count from 1"}, {"type": "text", "text": "to 3"}]
    item = parse_line(chat(messages=[{"role": "user", "content": parts}]), 0)
    assert item.messages[0]["content"] == "count from 1\nto 3"
    rendered = tokenizer.apply_chat_template(item.messages, tokenize=False, add_generation_prompt=True)
    assert prompt_of(item, tokenizer) == rendered
    tool_call = {"role": "assistant", "content": None, "tool_calls": []}
    item = parse_line(chat(messages=[*HELLO, tool_call], add_generation_prompt=False, chat_template_kwargs={"x": 1}), 0)
    assert item.messages[1]["content"] == "" and item.template_kwargs == {"x": 1, "add_generation_prompt": False}
    assert prompt_of(item, tokenizer) == tokenizer.apply_chat_template(item.messages, tokenize=False)
    assert prompt_of(parse_line(plain(), 0), tokenizer) == "hi"


def test_a_template_that_refuses_a_chat_fails_its_line(tokenizer, monkeypatch):
    item = parse_line(chat(chat_template_kwargs={"tokenize": True}), 0)
    with pytest.raises(LineError, match="the chat template refuses the messages") as caught:
        prompt_of(item, tokenizer)
    assert caught.value.custom_id == "a"
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(LineError, match="no chat template"):
        prompt_of(item, tokenizer)


# ---- answers


def answers(llm, *lines: bytes) -> list[dict]:
    items = [parse_line(line, i) for i, line in enumerate(lines)]
    outputs = llm.generate(
        [prompt_of(item, llm.tokenizer) for item in items], [item.params for item in items], use_tqdm=False
    )
    records = [answer_record(item, output, "m") for item, output in zip(items, outputs, strict=True)]
    for record in records:
        assert record["error"] is None and record["custom_id"] == "a" and record["response"]["status_code"] == 200
        json.dumps(record, allow_nan=False, ensure_ascii=False).encode()
    return [record["response"]["body"] for record in records]


def test_answers_have_openais_shape(llm):
    question = [{"role": "user", "content": "what is 2 + 3?"}]
    said, written = answers(
        llm,
        chat(messages=question, temperature=0, logprobs=True, top_logprobs=2, return_token_ids=True),
        completion(prompt="one two", temperature=1, n=2, max_tokens=3, ignore_eos=True),
    )
    assert (said["object"], said["model"]) == ("chat.completion", "m")
    [choice] = said["choices"]
    assert choice["message"] == {"role": "assistant", "content": "2 + 3 = 5.", "refusal": None}
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    tokens = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == "2 + 3 = 5."
    assert len(tokens) == len(choice["token_ids"]) and all(len(token["top_logprobs"]) == 2 for token in tokens)
    assert bytes(tokens[0]["bytes"]).decode() == tokens[0]["token"] == tokens[0]["top_logprobs"][0]["token"]
    usage = said["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + len(tokens) and usage["prompt_tokens_details"]
    assert written["object"] == "text_completion" and written["usage"]["completion_tokens"] == 6
    assert [(choice["index"], choice["finish_reason"]) for choice in written["choices"]] == [
        (0, "length"),
        (1, "length"),
    ]


def test_a_completion_reports_its_tokens_by_columns_and_repeats_its_prompt(llm):
    line = {"prompt": "The prime numbers within 100 are: 2,", "temperature": 0, "max_tokens": 4, "logprobs": 1}
    own, echoed, scored = answers(
        llm, completion(**line), completion(**line, echo=True), completion(**line | {"max_tokens": 0}, echo=True)
    )
    [own], [echoed], [scored] = (body["choices"] for body in (own, echoed, scored))
    assert echoed["text"] == line["prompt"] + own["text"] and scored["text"] == line["prompt"]
    for choice in (own, echoed, scored):
        columns = choice["logprobs"]
        for token, offset in zip(columns["tokens"], columns["text_offset"], strict=True):
            assert choice["text"][offset:].startswith(token)
        assert "".join(columns["tokens"]) == choice["text"]
    assert echoed["logprobs"]["token_logprobs"][0] is scored["logprobs"]["top_logprobs"][0] is None
    assert len(own["logprobs"]["tokens"]) == 4
    for name in ("token_logprobs", "tokens"):
        assert echoed["logprobs"][name][-4:] == own["logprobs"][name]
    for token, logprob, top in list(zip(*list(echoed["logprobs"].values())[:3], strict=True))[1:]:
        assert top[token] == logprob == pytest.approx(min(top.values()))  # the likeliest and, if another, itself


def test_a_token_without_probability_is_still_json(llm):
    item = parse_line(chat(logprobs=True), 0)
    [output] = llm.generate([[5, 6]], replace(item.params, max_tokens=1), use_tqdm=False)
    output.outputs[0].logprobs[0] |= {"logprob": -float("inf"), "token": "x"}
    record = json.dumps(answer_record(item, output, "m"), allow_nan=False)
    assert '"logprob": -9999.0' in record


def test_ids_of_records_depend_on_the_custom_id_alone(llm):
    item = parse_line(plain(custom_id="a", max_tokens=1), 0)
    first, second = (answer_record(item, output, "m") for output in llm.generate(["hi", "ho"], item.params, False))
    assert first["id"] == second["id"] == error_record("a", "code", "message")["id"] != error_record("b", "", "")["id"]


def test_a_failed_request_is_an_error_record(llm):
    def fail(token_ids, logits):
        raise ArithmeticError("no \ud800 luck")

    item = parse_line(plain(custom_id="a"), 0)
    params = SamplingParams(logits_processors=[fail])
    [output] = llm.generate(["hi"], params, use_tqdm=False, raise_on_error=False)
    record = answer_record(item, output, "m")
    assert record["response"] is None
    assert record["error"] == {"code": "generation_failed", "message": r"ArithmeticError: no \ud800 luck"}


# ---- anything else

names = st.sampled_from(
    [
        "custom_id", "method", "url", "body", "prompt", "messages", "role", "content", "type", "text", "model", "stop",
        "logit_bias", "n", "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "seed", "logprobs", "bad_words",
        "top_logprobs", "prompt_logprobs", "echo", "best_of", "response_format", "tools", "tool_choice", "documents",
        "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "allowed_token_ids",
        "truncate_prompt_tokens", "repetition_penalty", "stream", "return_token_ids", "7",
    ]
)  # fmt: skip
texts = (
    st.sampled_from(["user", "assistant", "text", CHAT, COMPLETION, "POST", "none", "\ud800", "\0", "7", ""])
    | st.text()
)
scalars = st.none() | st.booleans() | st.integers(-2, 4) | st.integers() | st.floats() | st.just(10**400) | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | texts, inner, max_size=3), max_leaves=8
)
messages = st.lists(st.fixed_dictionaries({"role": texts, "content": values}), max_size=3)
bodies = st.dictionaries(names, values, max_size=4)
requests = st.one_of(
    values,
    st.builds(lambda body, some: body | {"prompt": some}, bodies, values),
    st.builds(lambda body, some: body | {"messages": some}, bodies, messages | values),
    st.builds(lambda body, url: {"url": url, "body": body}, bodies, texts),
    st.builds(lambda body, some: {"url": CHAT, "body": body | {"messages": some}}, bodies, messages),
)


def check(line: bytes, tokenizer) -> None:
    try:
        item = parse_line(line, 3, {"temperature": 0.5}, 1)
        custom_id = item.custom_id
        prompt = prompt_of(item, tokenizer)
        assert isinstance(prompt, str | list) and isinstance(item.params, SamplingParams)
        if isinstance(prompt, str):
            tokenizer(prompt)
    except LineError as error:
        custom_id = error.custom_id
        record = json.dumps(error_record(custom_id, error.code, str(error)), ensure_ascii=False, allow_nan=False)
        assert b"\n" not in record.encode()
    assert custom_id and (custom_id == "line-4" or b'"custom_id"' in line)


@settings(deadline=None, max_examples=300)
@given(request=requests)
def test_no_json_raises_anything_but_a_line_error(tokenizer, request):
    check(json.dumps(request).encode(), tokenizer)


@settings(deadline=None, max_examples=200)
@given(line=st.binary(), request=requests, start=st.integers(0, 99), length=st.integers(0, 9))
def test_no_bytes_raise_anything_but_a_line_error(tokenizer, line, request, start, length):
    check(line, tokenizer)
    whole = json.dumps(request).encode()
    check(whole[:start] + line + whole[start + length :], tokenizer)


@pytest.mark.parametrize("depth", [50, 300, 600, 800, 900, 950, 980, 990])
@pytest.mark.parametrize("field", ["stop", "tools", "messages", "metadata", "custom_id", "chat_template_kwargs", "x"])
def test_no_depth_raises_anything_but_a_line_error(tokenizer, depth, field):
    deep = b"[" * depth + b"]" * depth
    check(
        b'{"messages": [{"role": "user", "content": "\\u00e4"}], "%s": {"x": %s}}' % (field.encode(), deep), tokenizer
    )
    check(b'{"messages": [{"role": "user", "content": "a"}], "%s": %s}' % (field.encode(), deep), tokenizer)


def test_only_documented_fields_are_quoted_in_full():
    with pytest.raises(LineError) as caught:
        parse_line(plain(unknown="x" * 10**6, stop=["y" * 10**6]), 0)
    assert len(str(caught.value)) < 300 and re.search("unknown", str(caught.value))
