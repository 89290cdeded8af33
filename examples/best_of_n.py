"""Several answers to one question, and the one that the model itself finds most likely.

The prompt is computed once for all of them; `logprobs=0` reports the probability of each sampled token, under the
model's own distribution, whatever the temperature.

    python examples/best_of_n.py [MODEL]
"""

import sys
from math import exp
from pathlib import Path

from nanovllm import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "assets" / "nano-qwen3"
llm = LLM(model)
question = [{"role": "user", "content": "reverse 42, 7, 93, 15, 8, 61, 13, 77"}]
params = SamplingParams(n=8, temperature=2.0, max_tokens=50, seed=0, logprobs=0)  # so hot that it errs

[output] = llm.chat(question, params, use_tqdm=False)
ranked = sorted(output.outputs, key=lambda answer: answer.cumulative_logprob, reverse=True)
for answer in ranked:
    least = min(answer.logprobs, key=lambda token: token.logprob)
    doubt = f"least sure of {least.token!r} ({exp(least.logprob):.1%})"
    print(f"{answer.cumulative_logprob:8.2f}  {answer.text!r}, {doubt}")
print(f"best of {params.n}: {ranked[0].text}")
llm.exit()
