"""The most likely completions. Greedy decoding misses them where an unlikely token leads to a likely text.

python examples/beam_search.py [MODEL]
"""

import sys
from pathlib import Path

from nanovllm import LLM, BeamSearchParams, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "assets" / "nano-qwen3"
llm = LLM(model)
prompt = llm.tokenizer.apply_chat_template(
    [{"role": "user", "content": "hello! what are primes?"}], tokenize=False, add_generation_prompt=True
)

# The score is the sum of the log-probabilities, as it stands: with a length_penalty of 1 it would be their mean.
[best] = llm.beam_search([prompt], BeamSearchParams(beam_width=4, max_tokens=60, length_penalty=0), use_tqdm=False)
for hypothesis in best.outputs:
    print(f"{hypothesis.score:8.3f}  {hypothesis.text}")

[greedy] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=60, logprobs=0), use_tqdm=False)
print(f"{greedy.cumulative_logprob:8.3f}  {greedy.text} (greedy)")
llm.exit()
