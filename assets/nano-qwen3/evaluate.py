"""Measures nano-qwen3 on held-out prompts: exact-match accuracy of each task family, and the two example prompts.

`python assets/nano-qwen3/evaluate.py` uses the nanovllm engine when it can be imported, else transformers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from tasks import (
    EXAMPLE_PROMPTS,
    FALLBACK,
    FAMILIES,
    INTRODUCTION,
    PRIMES,
    UNSEEN_OFF_TASK,
    UNSEEN_PARAPHRASES,
    Sample,
    draw,
    draw_turns,
)
from transformers import AutoTokenizer

Generate = Callable[[list[list[int]], float], list[str]]
Message = dict[str, str]
MAX_TOKENS = 160
EXAMPLE_ANSWERS = (INTRODUCTION, f"The prime numbers within 100 are: {', '.join(map(str, PRIMES))}.")


PRECISIONS = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
    "int8-cache": {"dtype": "bfloat16", "kv_cache_dtype": "int8"},
}


def nanovllm_backend(folder: Path, precision: str) -> Generate:
    """Generates with the nanovllm engine from the bf16 weights."""
    from nanovllm import LLM, SamplingParams

    llm = LLM(str(folder), seed=0, **PRECISIONS[precision])

    def generate(prompts: list[list[int]], temperature: float) -> list[str]:
        outputs = llm.generate(prompts, SamplingParams(temperature=temperature, max_tokens=MAX_TOKENS))
        return [output["text"] for output in outputs]

    return generate


def transformers_backend(folder: Path) -> Generate:
    """Generates with transformers: the bf16 weights, computed in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)

    def generate(prompts: list[list[int]], temperature: float) -> list[str]:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        texts = [""] * len(prompts)
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(prompts), 50):
            chosen = by_length[start : start + 50]
            batch = tokenizer.pad({"input_ids": [prompts[i] for i in chosen]}, padding_side="left", return_tensors="pt")
            output = model.generate(**batch, max_new_tokens=MAX_TOKENS, **(sampling if temperature else greedy))
            new = output[:, batch["input_ids"].shape[1] :]
            for i, text in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                texts[i] = text
        return texts

    return generate


def backend(folder: Path, name: str, precision: str) -> tuple[str, Generate]:
    """Returns the named way to generate text, or the best one at hand for "auto"."""
    if name != "transformers":
        try:
            return "nanovllm", nanovllm_backend(folder, precision)
        except ImportError:
            if name == "nanovllm":
                raise
    return "transformers", transformers_backend(folder)


class Evaluation:
    """Runs the measurements on one checkpoint and prints a table row for each."""

    def __init__(self, folder: Path, generate: Generate, mistakes: int) -> None:
        """Loads the tokenizer.

        Args:
            folder: Checkpoint folder.
            generate: Maps prompts (token ids) and a temperature to texts.
            mistakes: How many wrong answers to print per row.
        """
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.generate = generate
        self.mistakes = mistakes
        self.rows: dict[str, tuple[int, int]] = {}

    def ask(self, chats: list[list[Message]], temperature: float = 0.0) -> list[str]:
        """Returns the model's next turn in each chat."""
        rendered = [self.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        return self.generate([self.tokenizer(text)["input_ids"] for text in rendered], temperature)

    def record(self, name: str, prompts: list[str], answers: list[str], expected: list[str]) -> None:
        """Counts exact matches and prints them."""
        wrong = [row for row in zip(prompts, answers, expected, strict=True) if row[1] != row[2]]
        right = len(prompts) - len(wrong)
        self.rows[name] = (right, len(prompts))
        print(f"{name:<28} {right:>5} / {len(prompts):<5} {100 * right / len(prompts):6.1f}%", flush=True)
        for prompt, answer, wanted in wrong[: self.mistakes]:
            print(f"    {prompt!r}\n        got  {answer!r}\n        want {wanted!r}")

    def single_turns(self, name: str, samples: list[Sample]) -> None:
        """Measures one-turn chats."""
        answers = self.ask([[{"role": "user", "content": s.prompt}] for s in samples])
        self.record(name, [s.prompt for s in samples], answers, [s.answer for s in samples])

    def conversations(self, count: int, turns: int) -> None:
        """Measures each turn of longer chats of mixed families, with the model's own answers as history."""
        rng = Random(2)
        plans = [draw_turns(rng, turns, held_out=True) for _ in range(count)]
        chats: list[list[Message]] = [[] for _ in plans]
        prompts, answers, expected = [], [], []
        for turn in range(turns):
            for chat, plan in zip(chats, plans, strict=True):
                chat.append({"role": "user", "content": plan[turn].prompt})
            replies = self.ask(chats)
            for chat, plan, reply in zip(chats, plans, replies, strict=True):
                chat.append({"role": "assistant", "content": reply})
                prompts.append(plan[turn].prompt)
                answers.append(reply)
                expected.append(plan[turn].answer)
        self.record(f"chats of {turns} turns", prompts, answers, expected)

    def examples(self, samples: int) -> None:
        """Measures the example prompts, greedily and with plain sampling at temperature 0.6."""
        for prompt, answer in zip(EXAMPLE_PROMPTS, EXAMPLE_ANSWERS, strict=True):
            chat = [{"role": "user", "content": prompt}]
            self.record(f"{prompt[:17]}, greedy", [prompt], self.ask([chat]), [answer])
            replies = self.ask([chat] * samples, temperature=0.6)
            self.record(f"{prompt[:17]}, T=0.6", [prompt] * samples, replies, [answer] * samples)


def distinct(rng: Random, family: str, count: int) -> list[Sample]:
    """Draws held-out samples with distinct prompts."""
    found: dict[str, Sample] = {}
    while len(found) < count:
        sample = draw(rng, family, held_out=True)
        found.setdefault(sample.prompt, sample)
    return list(found.values())


def main() -> None:
    """Runs all measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(__file__).resolve().parent, help="checkpoint folder")
    parser.add_argument("--backend", choices=("auto", "nanovllm", "transformers"), default="auto")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="that nanovllm computes in")
    parser.add_argument("--count", type=int, default=400, help="held-out prompts per family")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), help="families to measure")
    parser.add_argument("--quick", action="store_true", help="families only")
    parser.add_argument("--mistakes", type=int, default=2, help="wrong answers to print per row")
    parser.add_argument("--json", type=Path, help="also write right and total counts to this file")
    args = parser.parse_args()

    started = time.monotonic()
    name, generate = backend(args.model, args.backend, args.precision)
    print(f"engine: {name}")
    evaluation = Evaluation(args.model, generate, args.mistakes)
    for family in args.families:
        evaluation.single_turns(family, distinct(Random(1), family, args.count))
    if not args.quick:
        evaluation.single_turns("unseen paraphrases", [Sample("introduce", p, p, a) for p, a in UNSEEN_PARAPHRASES])
        evaluation.single_turns("unseen off-task", [Sample("other", p, p, FALLBACK) for p in UNSEEN_OFF_TASK])
        evaluation.conversations(args.count // 4, 4)
        evaluation.examples(100)
    print(f"{time.monotonic() - started:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(evaluation.rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
