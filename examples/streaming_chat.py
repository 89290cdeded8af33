"""Answers that appear while they are made: two conversations at once, each piece of text as soon as it is known.

python examples/streaming_chat.py [MODEL]
"""

import sys
from pathlib import Path
from time import perf_counter

from nanovllm import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "assets" / "nano-qwen3"
llm = LLM(model)
questions = ["list all prime numbers within 100", "count from 20 down to 10"]
conversations = [[{"role": "user", "content": question}] for question in questions]

start = perf_counter()
answers = ["" for _ in questions]
first: dict[int, float] = {}  # seconds until something of an answer was there
for delta in llm.chat_stream(conversations, SamplingParams(temperature=0, max_tokens=256)):
    first.setdefault(delta.index, perf_counter() - start)
    answers[delta.index] += delta.text
    if delta.index == 0:
        print(delta.text, end="", flush=True)  # on a terminal the first answer grows; the second is collected meanwhile
print(f"\n{answers[1]}")
seconds = perf_counter() - start
print(f"first texts after {first[0] * 1000:.0f} and {first[1] * 1000:.0f} ms, both whole after {seconds * 1000:.0f} ms")
llm.exit()
