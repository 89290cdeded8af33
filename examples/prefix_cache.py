"""A conversation of several turns: what was computed for the earlier ones is found in the prefix cache.

Each turn sends the whole conversation again, and only what is new is computed, from the last full block on.

    python examples/prefix_cache.py [MODEL]
"""

import sys
from pathlib import Path

from nanovllm import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "assets" / "nano-qwen3"
llm = LLM(model, kvcache_block_size=16)
params = SamplingParams(temperature=0, max_tokens=200)
questions = ["who are you?", "sort 42, 7, 93, 15 from largest to smallest", "what is 517 + 425?", "primes up to 37"]

messages: list[dict[str, str]] = []
for question in questions:
    messages.append({"role": "user", "content": question})
    [output] = llm.chat(messages, params, use_tqdm=False)
    messages.append({"role": "assistant", "content": output.text})
    num_prompt_tokens = len(output.prompt_token_ids)
    print(f"{question}\n    {output.text}")
    print(f"    prompt: {num_prompt_tokens} tokens, {output.num_cached_tokens} of them from the cache")
stats = llm.stats()
print(f"all: {stats['prompt_tokens']} tokens, {stats['prefix_hit_rate']:.0%} of them from the cache")
llm.exit()
