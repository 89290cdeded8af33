"""From conversations to prompts, through a tokenizer's chat template. Knows nothing of the engine."""

import re
import reprlib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import jinja2
from jinja2 import meta

from nanovllm.engine.inputs import Rendered
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.checks import nearest_name
from nanovllm.utils.hf_types import PreTrainedTokenizerBase

Message = dict[str, Any]  # of object, a user's dict[str, str] would be none
Conversations = Sequence[Message] | Sequence[Sequence[Message]]

ARGUMENTS = ("conversations", "sampling_params", "add_generation_prompt", "use_tqdm", "chat_template_kwargs")
FOR_ANY_TEMPLATE = ("tools", "documents")
SET_FOR_THE_TEMPLATE = {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}


def render_chats(
    tokenizer: PreTrainedTokenizerBase, conversations: Conversations, add_generation_prompt: bool,
    chat_template_kwargs: dict[str, Any] | None, keywords: dict[str, object]
) -> list[str]:  # fmt: skip
    """The prompts of conversations; of one if it is given as a bare list of messages.

    `keywords` are what `LLM.chat` was given beside its own arguments; the template must have a use for each.
    TypeError or ValueError as for `LLM.chat`.
    """
    if not isinstance(chat_template_kwargs, dict | None):
        raise TypeError(
            f"chat_template_kwargs must be a dict of the template's variables, got {chat_template_kwargs!r}"
        )
    if keywords:
        _check_keywords(keywords, tokenizer.get_chat_template(tools=keywords.get("tools")))
    if isinstance(conversations, str | dict):
        given = reprlib.repr(conversations)
        raise TypeError(f"conversations must be a list: pass [{{'role': 'user', 'content': ...}}], got {given}")
    if conversations and isinstance(conversations[0], dict):
        conversations = [conversations]
    variables = keywords | (chat_template_kwargs or {})
    prompts = []
    for i, messages in enumerate(conversations):
        if not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise TypeError(f"conversations[{i}] must be a list of messages with a role and a content")
        try:
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **variables
            )
        except Exception as error:  # whatever the template raises
            raise ValueError(f"the chat template refuses conversations[{i}]: {error}") from error
        prompts.append(Rendered(text))
    return prompts


def _check_keywords(keywords: dict[str, object], template: str) -> None:
    variables = template_variables(template)
    for name in [name for name in keywords if name not in variables and name not in FOR_ANY_TEMPLATE]:
        if name in {field.name for field in fields(SamplingParams)}:
            raise TypeError(f"chat has no argument {name!r}; pass SamplingParams({name}=...)")
        nearest = nearest_name(name, [*ARGUMENTS, *FOR_ANY_TEMPLATE, *sorted(variables)])
        advice = f"did you mean {nearest!r}?" if nearest else f"the template's are {sorted(variables)}"
        raise TypeError(f"chat has no argument {name!r}, and the chat template no variable of that name; {advice}")


def template_variables(template: str) -> set[str]:
    """The names that a chat template expects to be given, beside those that transformers always gives it."""
    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)  # transformers' own tags
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        names = meta.find_undeclared_variables(environment.parse(plain))
    except jinja2.TemplateSyntaxError:  # rendering it will say so
        return set()
    return names - SET_FOR_THE_TEMPLATE - set(environment.globals)
