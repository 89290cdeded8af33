"""A function of your own between the model's logits and the sample: here, no three tokens twice in the same order.

It gets the completion's token ids so far and the [V] fp32 logits of the next one, and returns the logits to use. It
runs in Python, for each token: where a setting such as `bad_words` does the same, it is faster.

    python examples/logits_processor.py [MODEL]
"""

import sys
from math import inf
from pathlib import Path

from torch import Tensor

from nanovllm import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "assets" / "nano-qwen3"
SIZE = 3


def never_repeat(token_ids: list[int], logits: Tensor) -> Tensor:
    """Forbids each token that has followed the last two before."""
    start = token_ids[len(token_ids) - SIZE + 1 :]
    for i in range(len(token_ids) - SIZE + 1):
        if token_ids[i : i + SIZE - 1] == start:
            logits[token_ids[i + SIZE - 1]] = -inf
    return logits


llm = LLM(model)
free = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
bound = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logits_processors=[never_repeat])
outputs = llm.generate(["Here, here, here,"] * 2, [free, bound], use_tqdm=False)
for name, output in zip(("without", "with the processor"), outputs, strict=True):
    ids = output.token_ids
    num_different = len({tuple(ids[i : i + SIZE]) for i in range(len(ids) - SIZE + 1)})
    print(f"{name}: {num_different} of {len(ids) - SIZE + 1} triples are different\n    {output.text!r}")
llm.exit()
