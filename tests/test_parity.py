"""fp32 greedy tokens equal transformers', token for token, whatever the scheduler and the cache do to a request."""

import pytest
import torch

from helpers import random_prompts, reference_logits, reference_tokens, save_model
from nanovllm import LLM, SamplingParams

BLOCK = 8
SHAPES = {
    "gqa1": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64},
    "gqa2-tied": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gqa4-bias": {"num_attention_heads": 4, "num_key_value_heads": 1, "attention_bias": True},
    "gqa8-wide": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 128, "tie_word_embeddings": True},
    "yarn": {
        "max_position_embeddings": 64,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0
        },
    },
}  # fmt: skip
LENGTHS = [1, 5, BLOCK, 3 * BLOCK - 1, 3 * BLOCK, 3 * BLOCK + 1, 70]
MAX_TOKENS = 24
PRESSURES = {
    "plain": {},
    "chunked": {"max_num_batched_tokens": 11},
    "preempted": {"num_kvcache_blocks": 13},
    "few-at-once": {"max_num_seqs": 2},
    "all-at-once": {"max_num_batched_tokens": 11, "num_kvcache_blocks": 13},
}


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request, tmp_path_factory):
    """A checkpoint's path, prompts of which some share prefixes or repeat, and transformers' completions of them."""
    path = tmp_path_factory.mktemp(request.param)
    model = save_model(path, **SHAPES[request.param])
    prompts = random_prompts(LENGTHS)
    prompts.append(prompts[-1][: 4 * BLOCK] + prompts[0])  # shares four blocks
    prompts.append(list(prompts[4]))  # the same again, an exact multiple of the block size
    prompts.append(prompts[-2][: 2 * BLOCK])  # nothing but a cached prefix
    return path, prompts, [reference_tokens(model, prompt, MAX_TOKENS) for prompt in prompts]


@pytest.mark.parametrize("pressure", PRESSURES)
def test_greedy_tokens_equal_transformers(checkpoint, pressure):
    path, prompts, expected = checkpoint
    settings = {"num_kvcache_blocks": 200} | PRESSURES[pressure]
    with LLM(str(path), kvcache_block_size=BLOCK, dtype="float32", device="cpu", **settings) as llm:
        if "num_kvcache_blocks" in PRESSURES[pressure]:
            llm.scheduler.output_ratio = 0.0  # admit without foresight, so that preemption must happen
        for _ in range(2):  # the second time everything is in the prefix cache
            outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=MAX_TOKENS), use_tqdm=False)
            assert [output["token_ids"] for output in outputs] == expected
        if "num_kvcache_blocks" in PRESSURES[pressure]:
            assert llm.scheduler.num_preemptions > 0
        assert llm.block_manager.num_free_blocks == llm.config.num_kvcache_blocks


def test_eos_ends_a_completion_and_is_kept(checkpoint):
    path, prompts, expected = checkpoint
    eos = expected[0][2]
    with LLM(str(path), kvcache_block_size=BLOCK, num_kvcache_blocks=99, eos=eos, dtype="float32") as llm:
        [output] = llm.generate([prompts[0]], SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    end = expected[0].index(eos) + 1
    assert output["token_ids"] == expected[0][:end]
    assert output["finish_reason"] == "stop"


@torch.inference_mode()
def test_bf16_logits_are_as_close_to_fp32_as_those_of_transformers(tmp_path):
    """The error against an fp32 model with the same (bf16-representable) weights, averaged over prompts."""
    exact = save_model(tmp_path, dtype=torch.bfloat16, initializer_range=0.08, num_hidden_layers=4).float()
    rounded = save_model(tmp_path, dtype=torch.bfloat16, initializer_range=0.08, num_hidden_layers=4)
    prompts = random_prompts([3, 17, 40, 64, 90, 120] * 4, seed=1)
    ours = torch.stack(engine_logits(tmp_path, prompts, "bfloat16"))
    truth = torch.stack([reference_logits(exact, prompt) for prompt in prompts])
    theirs = torch.stack([reference_logits(rounded, prompt).float() for prompt in prompts])
    assert (ours - truth).norm() < 1.5 * (theirs - truth).norm()


@torch.inference_mode()
def test_fp32_logits_equal_transformers(tmp_path):
    model = save_model(tmp_path)
    prompts = random_prompts([1, 9, 33])
    for ours, prompt in zip(engine_logits(tmp_path, prompts, "float32"), prompts, strict=True):
        torch.testing.assert_close(ours, reference_logits(model, prompt), rtol=1e-4, atol=1e-4)


def engine_logits(path, prompts: list[list[int]], dtype: str) -> list[torch.Tensor]:
    """fp32 copies of the logits after each prompt, as the engine's own scheduler and batches produce them."""
    captured = []
    with LLM(str(path), kvcache_block_size=BLOCK, num_kvcache_blocks=400, dtype=dtype, device="cpu") as llm:
        forward = llm.model_runner.forward
        llm.model_runner.forward = lambda *args: captured.append(forward(*args)) or captured[-1]
        for prompt in prompts:
            llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    return [logits[0].float() for logits in captured]
