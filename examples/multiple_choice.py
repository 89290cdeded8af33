"""Which of four answers does the model find most likely? 100 sums by `llm.score`, and again without it.

`score` computes a question once for all its answers, and only their tokens are projected over the vocabulary; with
`prompt_logprobs` each question and answer is a prompt of its own, computed whole.

    python examples/multiple_choice.py [MODEL]
"""

import random
import sys
from pathlib import Path
from time import perf_counter

from nanovllm import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "assets" / "nano-qwen3"
llm, rng = LLM(model), random.Random(0)
pairs = [(rng.randrange(1000), rng.randrange(1000)) for _ in range(100)]
template = llm.tokenizer.apply_chat_template
prompts = [
    template([{"role": "user", "content": f"what is {a} + {b}?"}], tokenize=False, add_generation_prompt=True)
    for a, b in pairs
]
choices = [[f"{a} + {b} = {a + b + d}." for d in (0, 1, -10, 100)] for a, b in pairs]  # the first is right
llm.score(prompts[:1], choices[:1], use_tqdm=False)  # warms up

start = perf_counter()
scores = llm.score(prompts, choices, use_tqdm=False)
seconds = perf_counter() - start
best = [max(range(4), key=lambda i: own[i].logprob) for own in scores]
print(f"{best.count(0)} of {len(best)} right in {seconds:.2f} s")

whole = [prompt + answer for prompt, answers in zip(prompts, choices, strict=True) for answer in answers]
start = perf_counter()
llm.generate(whole, SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0), use_tqdm=False)
print(f"{(perf_counter() - start) / seconds:.1f} times as long with prompt_logprobs")
llm.exit()
