"""What each option of the sampling adds to a decode step."""

from argparse import Namespace
from time import perf_counter

import numpy as np

from benchmarks.options import engine_options
from benchmarks.workload import Figures, Lengths, make_workload
from nanovllm import LLM, SamplingParams
from nanovllm.config import Config

OPTIONS = {  # of all sequences beside the temperature; random weights have flat distributions
    "top_k": {"top_k": 20},
    "top_p, peaked": {"top_p": 0.95, "temperature": 0.1},
    "top_p": {"top_p": 0.95},
    "top_p, flat": {"top_p": 0.95, "temperature": 2.0},
    "min_p": {"min_p": 0.1},
    "recommended": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "repetition": {"repetition_penalty": 1.1},
    "presence": {"presence_penalty": 0.5},
    "frequency": {"frequency_penalty": 0.5},
    "logit_bias": {"logit_bias": {token_id: 1.0 for token_id in range(0, 1000, 10)}},
    "bad_words": {"bad_words": ["hello", "a longer one"]},
    "min_tokens": {"min_tokens": 29, "stop_token_ids": [7, 8]},
    "allowed_token_ids": {"allowed_token_ids": range(1000)},
    "logprobs=1": {"logprobs": 1},
    "logprobs=20": {"logprobs": 20},
    "seed": {"seed": 1},
}
ROUNDS, STEPS = 7, 6  # steps of each case in a round
REPORT = [
    ("step", "{num_seqs} sequences, {vocab_size} tokens, {dtype}, {device}"),
    ("temperature", "{plain ms:7.1f} ms"),
    *((case, f"{{{case} ms:7.1f}} ms  {{{case} ratio:5.2f}}x") for case in (*OPTIONS, "all, mixed", "one has all")),
]


def measure(args: Namespace, config: Config) -> Figures:
    """Milliseconds of a decode step in which each of `OPTIONS` is asked for by all sequences, each sequence asks for
    another one, or one asks for all; and how much longer that is than a step with a temperature alone.

    Two engines take turns with their steps, one of them with options: medians of the pairs of all rounds.
    """
    num_seqs = args.num_seqs
    llms = [LLM(str(config.model_path), **engine_options(args) | {"num_kvcache_blocks": 3 * num_seqs}) for _ in "ab"]
    length = llms[0].config.kvcache_block_size + 1  # all but the last token are cached
    lengths = Lengths(num_seqs, length, length, 1, 1)
    prompts = make_workload(lengths, args.seed, config.hf_config.vocab_size).prompts
    cases = make_cases(num_seqs, args.temperature, has_tokenizer=bool(llms[0].tokenizer))
    plain = cases.pop("plain")
    rounds = [[paired_seconds(llms, prompts, plain, own) for own in cases.values()] for _ in range(1 + ROUNDS)]
    seconds = np.array(rounds[1:]).swapaxes(0, 1).reshape(len(cases), -1, 2)
    figures: Figures = {"num_seqs": num_seqs, "vocab_size": config.hf_config.vocab_size}
    figures["plain ms"] = 1e3 * float(np.median(seconds[..., 0]))
    for case, own in zip(cases, seconds, strict=True):
        figures[f"{case} ms"] = 1e3 * float(np.median(own[:, 1]))
        figures[f"{case} ratio"] = float(np.median(own[:, 1] / own[:, 0]))
    return figures


def make_cases(num_seqs: int, temperature: float, has_tokenizer: bool) -> dict[str, list[SamplingParams]]:
    """What each sequence asks for; bad words are found with a tokenizer."""
    common = {"temperature": temperature, "max_tokens": 30, "ignore_eos": True}
    asked = {case: options for case, options in OPTIONS.items() if "bad_words" not in options or has_tokenizer}
    plain, *kinds = [SamplingParams(**common | options) for options in ({}, *asked.values())]
    every = SamplingParams(**{name: value for options in asked.values() for name, value in options.items()} | common)
    cases = {case: [params] * num_seqs for case, params in zip(("plain", *asked), (plain, *kinds), strict=True)}
    cases["all, mixed"] = [kinds[i % len(kinds)] for i in range(num_seqs)]
    cases["one has all"] = [every] + [plain] * (num_seqs - 1)
    return cases


def paired_seconds(llms: list[LLM], prompts: list[list[int]], *params: list[SamplingParams]) -> list[list[float]]:
    """Of decode steps of both engines, each with its own params, in turns: now the one first, now the other."""
    ids = []
    for llm, own in zip(llms, params, strict=True):
        ids.append([llm.add_request(prompt, one) for prompt, one in zip(prompts, own, strict=True)])
        while llm.step()[1] > 0:
            pass
    orders = [slice(None, None, 1 - i % 2 * 2) for i in range(STEPS)]
    seconds = [[step_seconds(llm) for llm in llms[order]][order] for order in orders]
    for llm, own in zip(llms, ids, strict=True):
        for request_id in own:
            llm.abort(request_id)
    return seconds


def step_seconds(llm: LLM) -> float:
    start = perf_counter()
    llm.step()
    return perf_counter() - start
