"""What JSON schemas cost in a decode step, and what is saved where they leave no choice."""

import json
from argparse import Namespace
from pathlib import Path
from time import perf_counter
from unittest.mock import patch

import numpy as np
import tokenizers

from benchmarks.options import engine_options
from benchmarks.workload import Figures
from nanovllm import LLM, SamplingParams, StructuredOutputs
from nanovllm.config import Config
from nanovllm.engine import scheduler

ROUNDS = 4  # of the two kinds of steps, in turns
MOST_CERTAIN = 512  # tokens that may be computed together
REPORT = [
    ("sequences", "{num_seqs}, {dtype}, vocabulary of {vocab_size}"),
    ("plain step", "{plain_ms:11,.1f} ms"),
    ("schema each", "{structured_ms:11,.1f} ms  ({structured_ratio:.3f} of the plain step)"),
    ("long keys", "{single_seconds:11,.2f} s  ({single_tokens} tokens in {single_steps} steps)"),
    ("certain at once", "{together_seconds:11,.2f} s  ({together_tokens} tokens in {together_steps} steps)"),
    ("", "{times_faster:11,.2f} times faster"),
]

Forms = list[StructuredOutputs | None]  # one for each sequence


def measure(args: Namespace, config: Config) -> Figures:
    """Seconds of a decode step, plain and with a schema for each sequence; and of JSON with long keys, with what is
    certain in it computed together and token by token."""
    if not args.model:
        save_tokenizer(config.model_path, config.hf_config.vocab_size)
    llm, n = LLM(str(config.model_path), **engine_options(args)), args.num_seqs
    arrays = [StructuredOutputs(json={"type": "array", "items": person(f"_{i}"), "minItems": 10**6}) for i in range(n)]
    long_keys = [StructuredOutputs(json=person("_of_the_customer_named_above")) for _ in range(n)]

    def step_seconds(forms: Forms) -> float:
        return float(np.median([seconds for seconds, num_tokens in run(llm, args, forms, 40, 0) if num_tokens == n]))

    run(llm, args, arrays, 3, 0), run(llm, args, long_keys, 30, MOST_CERTAIN)  # to warm up
    times = np.array([[step_seconds([None] * n), step_seconds(arrays)] for _ in range(ROUNDS)])
    figures: Figures = {"num_seqs": n, "vocab_size": config.hf_config.vocab_size}
    figures |= {"plain_ms": 1e3 * np.median(times[:, 0]), "structured_ms": 1e3 * np.median(times[:, 1])}
    figures["structured_ratio"] = float(np.median(times[:, 1] / times[:, 0]))
    runs = [[run(llm, args, long_keys, 200, most) for most in (0, MOST_CERTAIN)] for _ in range(2)]
    for name, steps in zip(("single", "together"), runs[-1], strict=True):
        figures |= {f"{name}_steps": len(steps), f"{name}_tokens": sum(num_tokens for _, num_tokens in steps)}
    seconds = np.array([[sum(s for s, _ in steps) for steps in both] for both in runs])
    figures |= {"single_seconds": np.median(seconds[:, 0]), "together_seconds": np.median(seconds[:, 1])}
    return figures | {"times_faster": float(np.median(seconds[:, 0] / seconds[:, 1]))}


def run(llm: LLM, args: Namespace, forms: Forms, most: int, most_certain: int) -> list[tuple[float, int]]:
    """Seconds and tokens of each step without a prompt, of completions of at most so many tokens."""
    steps = []
    for i, form in enumerate(forms):
        options = {"structured_outputs": form, "ignore_eos": form is None, "seed": args.seed}
        llm.add_request([i + 5] * args.min_input_len, SamplingParams(args.temperature, most, **options))
    with patch.object(scheduler, "MOST_CERTAIN", most_certain):
        while not llm.is_finished():
            start = perf_counter()
            _, num_tokens = llm.step()
            steps += [(perf_counter() - start, -num_tokens)] * (num_tokens < 0)
    return steps


def person(suffix: str) -> dict[str, object]:
    """The JSON schema of an object with eight properties."""
    city, day = {"enum": ["Paris", "London", "Berlin"]}, {"type": "string", "format": "date"}
    properties = {
        "first_name": {"type": "string", "maxLength": 12}, "last_name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150}, "city": city, "birthday": day,
        "is_active": {"type": "boolean"}, "orders": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "email": {"type": ["string", "null"], "pattern": "^[a-z]{1,8}@[a-z]{1,8}[.]org$"},
    }  # fmt: skip
    properties = {f"{name}{suffix}": schema for name, schema in properties.items()}
    closed = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": properties, **closed}


def save_tokenizer(path: Path, vocab_size: int) -> None:
    """Writes one of byte pairs with as many tokens as a model has, learned from Python's standard library."""
    sources = sorted(Path(json.__file__).parent.parent.rglob("*.py"))
    texts = (file.read_text(encoding="utf-8", errors="ignore") for file in sources if "site-packages" not in str(file))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": vocab_size - 512, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(**options))
    tokenizer.add_special_tokens([f"<|{i}|>" for i in range(vocab_size - tokenizer.get_vocab_size())])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
