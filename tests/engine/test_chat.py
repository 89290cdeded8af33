"""What `chat` accepts, and what it says of the rest."""

import pytest
from transformers import AutoTokenizer

from helpers import DEMO_MODEL
from nanovllm.engine.chat import render_chats

TEMPLATE = """
{%- set shared = namespace(turn=0) -%}
{%- for message in messages -%}
{%- if message.role == "assistant" -%}{%- generation -%}{{ message.content }}{%- endgeneration -%}{%- continue -%}
{%- endif -%}
{%- if not message.content %}{{ raise_exception("an empty turn") }}{% endif -%}
{{ message.content }}
{%- endfor -%}
{%- if enable_thinking is defined and not enable_thinking %}|no thoughts{% endif -%}
{%- if tools %}|{{ tools | length }} tools{% endif -%}
{%- if add_generation_prompt %}|answer{% endif -%}
"""
HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def render(tokenizer, conversations=HELLO, chat_template_kwargs=None, add_generation_prompt=False, **keywords):
    return render_chats(tokenizer, conversations, add_generation_prompt, chat_template_kwargs, keywords)


def test_variables_reach_the_template_as_a_dict_or_by_a_name_that_it_uses(tokenizer):
    assert render(tokenizer) == ["hello"]
    assert render(tokenizer, chat_template_kwargs={"enable_thinking": False}) == ["hello|no thoughts"]
    assert render(tokenizer, enable_thinking=False) == ["hello|no thoughts"]
    assert render(tokenizer, tools=[TOOL], add_generation_prompt=True) == ["hello|1 tools|answer"]
    assert render(tokenizer, documents=[{"title": "a", "text": "b"}]) == ["hello"]  # which any template may ignore
    assert render(tokenizer, chat_template_kwargs={"of_another_model": 1}) == ["hello"]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"temperature": 0}, r"no argument 'temperature'; pass SamplingParams\(temperature="),
        ({"use_tqmd": False}, "'use_tqmd'.*did you mean 'use_tqdm'"),
        ({"enable_thoughts": False, "tools": [TOOL]}, r"'enable_thoughts'"),
        ({"enable_thinkin": False}, "did you mean 'enable_thinking'"),
        ({"lora_request": None}, r"'lora_request'.*the template's are \['enable_thinking', 'tools'\]"),
        ({"messages": HELLO}, "no argument 'messages'"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs must be a dict"),
    ],
)
def test_a_keyword_that_nobody_uses_is_refused_with_the_nearest(tokenizer, keywords, message):
    with pytest.raises(TypeError, match=message):
        render(tokenizer, **keywords)


def test_conversations_are_a_list_of_messages_or_of_such_lists(tokenizer):
    assert render(tokenizer, [HELLO, [*HELLO, {"role": "assistant", "content": "!"}]]) == ["hello", "hello!"]
    for bare in (HELLO[0], "hello"):
        with pytest.raises(TypeError, match=r"conversations must be a list: pass \[\{'role'"):
            render(tokenizer, bare)
    for bad in (["hello"], [[]], [[{"content": "hello"}]]):
        with pytest.raises(TypeError, match=r"conversations\[0\] must be a list of messages"):
            render(tokenizer, bad)
    with pytest.raises(ValueError, match=r"refuses conversations\[1\]: an empty turn"):
        render(tokenizer, [HELLO, [{"role": "user", "content": ""}]])


def test_a_template_that_cannot_be_parsed_is_refused_when_it_is_rendered(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{% if %}")
    with pytest.raises(ValueError, match="the chat template refuses"):
        render(tokenizer)
