"""Quantised checkpoints: in fp32 the tokens of the model that they mean; what is corrupt is named."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import random_prompts, reference_tokens
from nanovllm import LLM, SamplingParams
from quantized_checkpoints import METHODS, edit_config, save_quantized

SETTINGS = {"device": "cpu", "num_kvcache_blocks": 99, "kvcache_block_size": 8, "max_model_len": 128}
EXPERTS = {"architecture": "Qwen3Moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def check_tokens(path, model, **settings) -> None:
    prompts = random_prompts([1, 9, 40])
    expected = [reference_tokens(model, prompt, 12) for prompt in prompts]
    with LLM(str(path), dtype="float32", **SETTINGS | settings) as llm:
        assert [output["token_ids"] for output in llm.generate(prompts, GREEDY, use_tqdm=False)] == expected


@pytest.mark.parametrize("method", METHODS)
def test_fp32_tokens_are_those_of_the_model_that_is_meant(tmp_path, method):
    check_tokens(tmp_path, save_quantized(tmp_path, method))


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("fp8-blocks", {"hidden_size": 72, "intermediate_size": 100}),
        ("packed-4", {"tie_word_embeddings": True, "architecture": "Llama"}),
        ("awq", {"architecture": "Qwen2"}),
        ("gptq-4", {"architecture": "Phi3", "max_position_embeddings": 128}),
        ("packed-4-asymmetric", {"architecture": "Phi3", "head_dim": None, "partial_rotary_factor": 0.5}),
        ("packed-4", EXPERTS),
        ("fp8-blocks", EXPERTS),
    ],
)
def test_in_every_architecture(tmp_path, method, overrides):
    """With odd sizes, fused projections, rows in another order, experts; biases stay as they are."""
    check_tokens(tmp_path, save_quantized(tmp_path, method, **overrides))


@pytest.mark.parametrize("method", ["awq", "int8", "fp8-tensor"])
def test_layers_that_are_not_quantised_stay_so(tmp_path, method):
    check_tokens(tmp_path, save_quantized(tmp_path, method, ignored=("0.mlp.down_proj", "1.self_attn.o_proj")))


@pytest.mark.parametrize("method", ["awq", "packed-4", "fp8-blocks"])
def test_two_ranks_have_their_parts(tmp_path, method):
    model = save_quantized(tmp_path, method, intermediate_size=128)
    if method == "fp8-blocks":
        with pytest.raises(ValueError, match=r"tensor_parallel_size=2 divides groups of 48 of 128 .* use one of \[1\]"):
            LLM(str(tmp_path), tensor_parallel_size=2, dtype="float32", **SETTINGS)
    else:
        check_tokens(tmp_path, model, tensor_parallel_size=2)


LAYER, ALONE = "model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.o_proj"


def without(end):
    return lambda tensors: tensors.pop(f"{LAYER}.{end}")


def replace(end, change):
    def edit(tensors):
        tensors[f"{LAYER}.{end}"] = change(tensors[f"{LAYER}.{end}"]).contiguous()

    return edit


@pytest.mark.parametrize(
    ("method", "edit", "message"),
    [
        ("awq", without("scales"), f"missing: {LAYER}.scales"),
        ("gptq-4", without("qzeros"), f"missing: {LAYER}.qzeros"),
        ("int8", without("weight_scale"), f"missing: {LAYER}.weight_scale"),
        ("fp8-blocks", lambda tensors: tensors.pop(f"{ALONE}.weight_scale_inv"), f"{ALONE}.weight in .* has no scales"),
        ("awq", replace("qweight", lambda x: x[:, 1:]), rf"{LAYER}.qweight in model.safetensors has shape \[64, 7\]"),
        (
            "packed-4",
            replace("weight_packed", lambda x: x[:, 1:]),
            f"{LAYER}.weight_packed in model.safetensors has sh",
        ),
        ("packed-4", replace("weight_shape", lambda x: x + 1), rf"{LAYER}.weight_shape in model.* says \[65, 65\]"),
        ("packed-4", replace("weight_scale", lambda x: x[:, :1]), f"{LAYER}.weight_scale in model.safetensors has sh"),
        (
            "awq",
            replace("qweight", lambda x: x.float()),
            f"{LAYER}.qweight in model.safetensors is F32, and should be I",
        ),
        ("gptq-4", replace("g_idx", lambda x: x.flip(0)), f"{LAYER}.g_idx in model.safetensors has .*desc_act"),
        ("gptq-4", replace("bias", lambda x: x + 1), f"{LAYER}.bias in model.safetensors is not 0"),
        (
            "fp8-blocks",
            replace("weight_scale_inv", lambda x: x[1:]),
            f"{LAYER}.weight_scale_inv in model.safetensors h",
        ),
    ],
)
def test_corrupt_tensors_are_named_with_their_file(tmp_path, method, edit, message):
    save_quantized(tmp_path, method)
    tensors = load_file(tmp_path / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        LLM(str(tmp_path), dtype="float32", **SETTINGS)


COMPRESSED = METHODS["packed-4"][0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, r"quant_method='bitsandbytes' is not supported, but fp8, awq, gptq, comp"),
        ({"bits": 4}, "quant_method=None is not supported"),
        ({"quant_method": "awq", "bits": 3, "group_size": 32}, "bits must be .*4.*got 3"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "version must be .*gemm.*'gemv'"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "bits must be one of .*4, 8.*got 3"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size=0 is not supported"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "a"}, "group_size must be an int"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size must be two sizes.*\[128\]"),
        (
            COMPRESSED | {"format": "nvfp4-pack-quantized"},
            "format must be one of .*pack-quantized.*'nvfp4-pack-quantize",
        ),
        (COMPRESSED | {"config_groups": {}}, "config.json is damaged|config_groups"),
        ("awq", "config.json is damaged"),
    ],
)
def test_configurations_that_are_not_supported_are_refused_before_anything_is_loaded(tmp_path, config, message):
    save_quantized(tmp_path, "awq")
    edit_config(tmp_path, quantization_config=config)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        LLM(str(tmp_path), **SETTINGS)


def test_what_is_quantised_is_not_quantised_again(tmp_path):
    save_quantized(tmp_path, "awq")
    with pytest.raises(ValueError, match="quantization='int4' of a checkpoint that is quantised"):
        LLM(str(tmp_path), quantization="int4", **SETTINGS)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_logprobs_are_close_to_those_in_fp32(tmp_path, method):
    """Of the same checkpoint, on average, in nats. Activations of int8 and 4-bit products are in 8 bits on a CPU."""
    save_quantized(tmp_path, method)
    prompts, params = random_prompts([60, 40, 90]), SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    logprobs = []
    for dtype in ("float32", "bfloat16"):
        with LLM(str(tmp_path), dtype=dtype, **SETTINGS) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        entries = [entry for output in outputs for entry in output["prompt_logprobs"][1:]]
        logprobs.append(torch.tensor([entry["logprob"] for entry in entries]))
    error = (logprobs[0] - logprobs[1]).abs().mean().item()
    assert 0.001 < error < 0.05
