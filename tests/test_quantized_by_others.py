"""Checkpoints that other libraries quantised: in fp32 the tokens of what these libraries say that they mean."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import random_prompts, reference_tokens, save_model
from nanovllm import LLM, SamplingParams
from quantized_checkpoints import edit_config

SETTINGS = {"device": "cpu", "dtype": "float32", "num_kvcache_blocks": 99, "kvcache_block_size": 8}


def check_tokens(path, model) -> None:
    prompts = random_prompts([1, 9, 40])
    expected = [reference_tokens(model, prompt, 12) for prompt in prompts]
    with LLM(str(path), **SETTINGS) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == expected


@pytest.mark.parametrize(
    ("scheme", "format"),
    [
        ({"num_bits": 4, "strategy": "group", "group_size": 32}, "pack-quantized"),
        ({"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, "pack-quantized"),
        ({"num_bits": 8, "strategy": "channel"}, "pack-quantized"),
        ({"num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False}, "pack-quantized"),
        ({"num_bits": 8, "strategy": "channel", "activations": True}, "int-quantized"),
        ({"num_bits": 8, "type": "float", "strategy": "channel", "activations": True}, "float-quantized"),
        ({"num_bits": 8, "type": "float", "strategy": "tensor", "activations": True}, "float-quantized"),
        ({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]}, "naive-quantized"),
    ],
)
def test_compressed_tensors(tmp_path, scheme, format):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model, kind = save_model(tmp_path / "plain"), scheme.get("type", "int")
    activations = QuantizationArgs(num_bits=8, type=kind, symmetric=True, strategy="token", dynamic=True)
    weights = QuantizationArgs(**{name: value for name, value in scheme.items() if name != "activations"})
    group = QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=activations if "activations" in scheme else None
    )
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            _calibrate(module, weights)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format"] == format
    compressor.decompress_model(model)
    meant = save_model(tmp_path / "plain")
    meant.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in meant.state_dict()})
    check_tokens(tmp_path, meant)


def _calibrate(module, weights) -> None:
    """Scales and zero points by the library's own rule from the extremes of each group."""
    from compressed_tensors.quantization.utils import calculate_qparams

    w = module.weight.data
    if weights.strategy == "block":
        rows, columns = weights.block_structure
        w = w.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).transpose(1, 2).flatten(2)
    w = w.unflatten(1, (-1, weights.group_size)) if weights.strategy == "group" else w
    low, high = (w.min()[None], w.max()[None]) if weights.strategy == "tensor" else (w.amin(-1), w.amax(-1))
    scales, zeros = calculate_qparams(low, high, weights)
    module.weight_scale.data = scales.view(module.weight_scale.shape)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data = zeros.view(module.weight_zero_point.shape)


@pytest.mark.parametrize("scale_format", [None, "ue8m0"])
def test_fp8_of_transformers(tmp_path, scale_format):
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(finegrained, "Fp8Quantize"):
        pytest.skip("this version of transformers only reads it")
    settings = SimpleNamespace(weight_block_size=(32, 32), scale_fmt=scale_format)
    quantize = finegrained.Fp8Quantize(SimpleNamespace(quantization_config=settings))
    model = save_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors |= quantize.convert({name: tensors[name]})
        spread = tensors[name + "_scale_inv"].float().repeat_interleave(32, 0).repeat_interleave(32, 1)
        model.get_parameter(name).data = tensors[name].float() * spread
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    save_file(tensors, tmp_path / "model.safetensors")
    edit_config(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]})
    check_tokens(tmp_path, model)
