"""How far bf16, int8, int4 and a KV cache in int8 are from fp32: `python -m tests.quantization_error DIR`.

On bench.py's small workload. DIR is a checkpoint, for instance the random one that `python bench.py --save-checkpoint
DIR` writes. Prints for each precision the logits' relative error ||x - exact|| / ||exact|| over the prompts, the
average KL divergence of the next token's distribution, and for how many prompts the most likely token is the same.
"""

import argparse
from random import Random

import torch

from nanovllm import LLM, SamplingParams

PRECISIONS = {
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
    "int8-cache": {"dtype": "bfloat16", "kv_cache_dtype": "int8"},
}


def next_token_logits(model: str, prompts: list[list[int]], **settings: str) -> torch.Tensor:
    """[prompts, vocabulary] fp32."""
    captured = []
    with LLM(model, device="cpu", max_num_seqs=1, **settings) as llm:  # a prompt a step
        forward = llm.model_runner.forward
        llm.model_runner.forward = lambda *args: captured.append(forward(*args)) or captured[-1]
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    return torch.cat([logits.float() for logits in captured])


def compare(model: str, prompts: list[list[int]]) -> dict[str, tuple[float, float, int]]:
    """For each precision: relative error, KL divergence in nats, prompts with the same most likely token."""
    exact = next_token_logits(model, prompts, dtype="float32").double()
    results = {}
    for name, settings in PRECISIONS.items():
        logits = next_token_logits(model, prompts, **settings).double()
        error = ((logits - exact).norm() / exact.norm()).item()
        log_p, log_q = exact.log_softmax(-1), logits.log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
        results[name] = error, divergence, int((logits.argmax(-1) == exact.argmax(-1)).sum())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="DIR")
    parser.add_argument("--num-prompts", type=int, default=32)
    args = parser.parse_args()
    rng = Random(0)
    prompts = [[rng.randrange(10_000) for _ in range(rng.randint(32, 256))] for _ in range(args.num_prompts)]
    for name, (error, divergence, same) in compare(args.model, prompts).items():
        print(f"{name}: logit error {error:.4f}, KL {divergence:.2e}, same first token {same} of {len(prompts)}")


if __name__ == "__main__":
    main()
