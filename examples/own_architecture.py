"""An architecture that nanovllm does not have: Qwen3 with soft-capped logits, as Gemma 2 has (arXiv:2408.00118).

A class says how its decoder differs, and `MODELS` names it as `architectures` in a checkpoint's config.json does. The
checkpoint here is the demo model's, under the new name. A cap keeps the logits' order, so greedy answers are the same,
and makes the model less sure of them.

    python examples/own_architecture.py [MODEL]      # of Qwen3's architecture
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.models import MODELS
from nanovllm.models.qwen import Qwen3ForCausalLM


class CappedForCausalLM(Qwen3ForCausalLM):
    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        cap = 15.0
        return cap * torch.tanh(super().compute_logits(hidden_states) / cap)


MODELS["CappedForCausalLM"] = CappedForCausalLM
model = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "assets" / "nano-qwen3").resolve()
question = [{"role": "user", "content": "what is 517 + 425?"}]
with tempfile.TemporaryDirectory() as directory:
    for file in model.iterdir():
        Path(directory, file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text()) | {"architectures": ["CappedForCausalLM"]}
    Path(directory, "config.json").unlink()
    Path(directory, "config.json").write_text(json.dumps(config))
    for path in (model, directory):
        with LLM(path) as llm:
            [output] = llm.chat(question, SamplingParams(temperature=0, logprobs=0), use_tqdm=False)
            print(f"{type(llm.model_runner.model).__name__}: {output.text} ({output.cumulative_logprob:.4f})")
