"""Users' prompts and sampling parameters, checked and brought into one form. Knows nothing of scheduling."""

import reprlib
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any

import numpy as np

from nanovllm.config import Config
from nanovllm.engine.grammar import Grammars
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.hf_types import PreTrainedTokenizerBase

Prompt = str | SequenceOf[int] | dict[str, Any]  # a dict has one of the others as "prompt" or "prompt_token_ids"
Prompts = Prompt | SequenceOf[Prompt]
Params = SamplingParams | SequenceOf[SamplingParams] | None  # one for all, one for each prompt, or the default
SLICE = 256  # prompts to be tokenized at a time: enough for all cores, few enough for the engine to start soon


class Rendered(str):
    """The text of a chat template, which has put in every special token that there should be."""


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer, or None if it has none (such a model takes and gives token ids)."""
    path = config.model_path
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return None
    from transformers import AutoTokenizer  # which imports every model's code in some versions

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise ValueError(f"the tokenizer files in {path} could not be read: {error}") from error


def as_list(prompts: Prompts) -> list[Prompt]:
    """A list of texts and token ids; a bare string is one prompt, and so is a dict."""
    if isinstance(prompts, str | dict):
        prompts = [prompts]
    if not isinstance(prompts, (SequenceOf, np.ndarray)):
        raise TypeError(f"prompts must be a list of strings or of token-id lists, got {reprlib.repr(prompts)}")
    if len(prompts) and isinstance(prompts[0], (int, np.integer)):
        raise TypeError("prompts must be a list of prompts; for one prompt of token ids pass [token_ids]")
    return [
        _content(prompt, f"prompts[{i}]") if isinstance(prompt, dict) else prompt for i, prompt in enumerate(prompts)
    ]


def _content(prompt: dict[str, object], name: str) -> str | SequenceOf[int]:
    """Of a prompt as vLLM takes it: the token ids if there are any, else the text."""
    for key in ("prompt_token_ids", "prompt"):
        if prompt.get(key) is not None:
            return prompt[key]
    raise TypeError(f"{name} must have a 'prompt' or 'prompt_token_ids', got the keys {list(prompt)}")


def as_params(
    params: Params, num_prompts: int, config: Config, tokenizer: PreTrainedTokenizerBase | None, grammars: Grammars,
    start: int = 0
) -> list[SamplingParams]:  # fmt: skip
    """Checked parameters for each prompt, or the errors of `LLM.generate`, which call the first `prompts[start]`.

    What is there many times is checked once.
    """
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * num_prompts
    if not isinstance(params, SequenceOf) or not all(isinstance(p, SamplingParams) for p in params):
        raise TypeError(f"sampling_params must be a SamplingParams or a list of them, got {reprlib.repr(params)}")
    if len(params) != num_prompts:
        given = f"{len(params)} entries for {num_prompts} prompts"
        raise ValueError(f"sampling_params has {given}; give one for all or one for each")
    checked = set()
    for i, p in enumerate(params, start):
        if id(p) not in checked:
            checked.add(id(p))
            _check_params(p, f"sampling_params[{i}]", config, tokenizer)
            if p.structured_outputs is not None:
                grammars.check(p.structured_outputs, f"prompts[{i}]")
    return list(params)


def encode(
    prompts: list[Prompt], params: list[SamplingParams], config: Config, tokenizer: PreTrainedTokenizerBase | None,
    start: int = 0
) -> list[np.ndarray]:  # fmt: skip
    """Token ids of each prompt, checked, as int32; the first is called `prompts[start]` in errors."""
    tokenized = tokenize(prompts, config, tokenizer)
    return [
        check_ids(ids, f"prompts[{i}]", p, config)
        for i, (ids, p) in enumerate(zip(tokenized, params, strict=True), start)
    ]


def tokenize(prompts: list[Prompt], config: Config, tokenizer: PreTrainedTokenizerBase | None) -> list[SequenceOf[int]]:
    """The token ids of texts, together; what is no text stays as it is."""
    texts: dict[bool, list[str]] = {False: [], True: []}  # by whether a template has rendered them
    for prompt in prompts:
        if isinstance(prompt, str):
            texts[isinstance(prompt, Rendered)].append(prompt)
    if any(texts.values()) and tokenizer is None:
        raise ValueError(f"{config.model_path} has no tokenizer; pass token ids instead of text")
    tokenized = {
        kind: iter(tokenizer(some, add_special_tokens=not kind, return_attention_mask=False)["input_ids"])
        for kind, some in texts.items()
        if some
    }
    return [next(tokenized[isinstance(prompt, Rendered)]) if isinstance(prompt, str) else prompt for prompt in prompts]


def check_ids(ids: SequenceOf[int], name: str, params: SamplingParams, config: Config) -> np.ndarray:
    """One prompt's, as int32."""
    try:
        array = np.asarray(ids)
    except ValueError:  # ragged
        array = np.empty((0, 0))
    if array.size == 0 and array.ndim == 1:
        raise ValueError(f"{name} is empty: give it at least one token")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be a string or a list of token ids, got {reprlib.repr(ids)}")
    _check_vocabulary(name, array, config)
    most = config.max_model_len - (params.max_tokens != 0)
    if params.truncate_prompt_tokens is not None:
        array = array[-min(most, params.truncate_prompt_tokens if params.truncate_prompt_tokens > 0 else most) :]
    if array.size > most:
        limit = "exceeds" if params.max_tokens == 0 else "leaves no room to generate within"
        raise ValueError(
            f"{name} has {array.size} tokens and {limit} max_model_len={config.max_model_len}: shorten it, let "
            "truncate_prompt_tokens do so, or raise max_model_len if the model supports more"
        )
    capacity = config.num_kvcache_blocks * config.kvcache_block_size
    if array.size > capacity:
        raise ValueError(
            f"{name} has {array.size} tokens, the KV cache holds {capacity}: shorten it or raise num_kvcache_blocks"
        )
    return array.astype(np.int32)


def _check_params(p: SamplingParams, name: str, config: Config, tokenizer: PreTrainedTokenizerBase | None) -> None:
    for field in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        if ids := getattr(p, field):
            _check_vocabulary(f"{name}.{field}", np.array(list(ids), dtype=np.int64), config)
    if p.stop and tokenizer is None:
        raise ValueError(f"{name}.stop needs a model with a tokenizer; use stop_token_ids")
    if p.bad_words and tokenizer is None:
        raise ValueError(f"{name}.bad_words needs a model with a tokenizer; use logit_bias")


def encode_bad_words(params: SamplingParams, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each bad word, at the start of a text and after a space, which tokenizers tell apart."""
    encoded = []
    for word in params.bad_words:
        for text in (word, " " + word.lstrip()):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids and ids not in encoded:
                encoded.append(ids)
    return encoded


def sibling_params(params: SamplingParams) -> SamplingParams:
    """Of the second and further completions of a prompt, whose own log-probabilities are reported once.

    Where nothing is to be generated, they are what each is there for.
    """
    is_same = params.prompt_logprobs is None or params.max_tokens == 0
    return params if is_same else replace(params, prompt_logprobs=None)


def _check_vocabulary(name: str, ids: np.ndarray, config: Config) -> None:
    vocab_size = config.hf_config.vocab_size
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise ValueError(f"{name} has the token id {outside[0]}, outside the vocabulary of {vocab_size}")
