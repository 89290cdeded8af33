"""Writes quantised checkpoints, from what the methods' own documents say of their files, and what they mean in fp32."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpers import save_model

Tensors = dict[str, Tensor]  # by the ends of their names
Quantize = Callable[[Tensor], tuple[Tensors, Tensor]]  # an [N, K] weight -> what a file has of it, what that means


def save_quantized(path: Path, method: str, ignored: tuple[str, ...] = (), **overrides) -> PreTrainedModel:
    """Writes a random checkpoint of linear layers quantised by a method of `METHODS`, but those with names that end as
    one `ignored`; returns transformers' model of the same numbers."""
    model = save_model(path, **overrides)
    config, quantize = METHODS[method]
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        source = name.removesuffix(".weight")
        if not source.endswith(ignored or ("nothing",)):
            parts, meant = quantize(tensors.pop(name))
            tensors |= {f"{source}.{end}": part.contiguous() for end, part in parts.items()}
            tensors["meant." + name] = meant
    meant = {name.removeprefix("meant."): tensors.pop(name) for name in list(tensors) if name.startswith("meant.")}
    plain = path / "plain"
    model.save_pretrained(plain)
    save_file(load_file(plain / "model.safetensors") | meant, plain / "model.safetensors", {"format": "pt"})
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    edit_config(path, quantization_config=config)
    return AutoModelForCausalLM.from_pretrained(plain).float().eval()


def edit_config(path: Path, **changes) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def asymmetric(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[N, K] -> codes from 0 on, [N, G] fp16 scales and zeros, and what they mean."""
    w = weight.unflatten(1, (-1, group if group > 0 else weight.shape[1]))
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).half()
    zeros = (-low / scales.float()).round().clamp(1, 2**bits - 1)  # a zero point of 0 has no form in GPTQ's files
    codes = (w / scales.float().unsqueeze(-1) + zeros.unsqueeze(-1)).round().clamp(0, 2**bits - 1)
    meant = (codes - zeros.unsqueeze(-1)) * scales.float().unsqueeze(-1)
    return codes.flatten(1).int(), scales, zeros.int(), meant.flatten(1)


def symmetric(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K] -> signed codes, [N, G] fp32 scales, and what they mean."""
    w = weight.unflatten(1, (-1, group if group > 0 else weight.shape[1]))
    scales = w.abs().amax(-1) / (2 ** (bits - 1) - 1)
    codes = (w / scales.unsqueeze(-1)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes.flatten(1).int(), scales, (codes * scales.unsqueeze(-1)).flatten(1)


def into_int32(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[R, C] -> [R, C * bits / 32]: the code order[i] of each 32 / bits in bits i * bits and following."""
    count = 32 // bits
    groups = torch.nn.functional.pad(codes, (0, -codes.shape[1] % count)).long().unflatten(1, (-1, count))
    words = sum(groups[..., (order or range(count))[i]] << bits * i for i in range(count))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def awq(weight: Tensor) -> tuple[Tensors, Tensor]:
    codes, scales, zeros, meant = asymmetric(weight, 4, 32)
    order = 0, 2, 4, 6, 1, 3, 5, 7
    packed = {"qweight": into_int32(codes.T, 4, order), "qzeros": into_int32(zeros.T, 4, order)}
    return packed | {"scales": scales.T}, meant


def gptq(bits: int, group: int, less: int, **more) -> tuple[dict, Quantize]:
    """`less` is what a stored zero point is less than the real one."""

    def quantize(weight: Tensor) -> tuple[Tensors, Tensor]:
        codes, scales, zeros, meant = asymmetric(weight, bits, group)
        k = weight.shape[1]
        parts = {"qweight": into_int32(codes, bits).T, "qzeros": into_int32((zeros - less).T, bits)}
        order = torch.arange(k, dtype=torch.int32) // (group if group > 0 else k)
        return parts | {"scales": scales.T, "g_idx": order, "bias": torch.zeros(len(weight))}, meant

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": False}
    return config | more, quantize


def compressed(kind: str, **scheme) -> dict:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None} | scheme
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups, "ignore": ["lm_head"]}


def packed(bits: int, group: int, is_symmetric: bool) -> tuple[dict, Quantize]:
    def quantize(weight: Tensor) -> tuple[Tensors, Tensor]:
        if is_symmetric:
            codes, scales, meant = symmetric(weight, bits, group)
            parts = {"weight_packed": into_int32(codes + 2 ** (bits - 1), bits)}
        else:
            codes, scales, zeros, meant = asymmetric(weight, bits, group)
            parts = {"weight_packed": into_int32(codes, bits), "weight_zero_point": into_int32(zeros.T, bits).T}
        return parts | {"weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}, meant

    strategy = {"strategy": "group", "group_size": group} if group > 0 else {"strategy": "channel"}
    return compressed("pack-quantized", num_bits=bits, symmetric=is_symmetric, **strategy), quantize


def int8(weight: Tensor) -> tuple[Tensors, Tensor]:
    codes, scales, meant = symmetric(weight, 8, -1)
    return {"weight": codes.to(torch.int8), "weight_scale": scales}, meant


def fp8(scale_name: str, rows: int, columns: int) -> Quantize:
    """A scale for each block of so many rows and columns; 0: all."""

    def quantize(weight: Tensor) -> tuple[Tensors, Tensor]:
        (n, k), rows_, columns_ = weight.shape, rows or len(weight), columns or weight.shape[1]
        padded = torch.nn.functional.pad(weight, (0, -k % columns_, 0, -n % rows_))
        blocks = padded.unflatten(0, (-1, rows_)).unflatten(2, (-1, columns_)).abs().amax((1, 3))
        scales = blocks / 448
        spread = scales.repeat_interleave(rows_, 0).repeat_interleave(columns_, 1)[:n, :k]
        values = (weight / spread).to(torch.float8_e4m3fn)
        scales = scales[0, 0] if rows == columns == 0 else scales
        return {"weight": values, scale_name: scales}, values.float() * spread

    return quantize


FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic"}
METHODS = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, awq),
    "gptq-4": gptq(4, 32, 1),
    "gptq-4-one-group": gptq(4, -1, 1),
    "gptq-4-v2": gptq(4, 32, 0, checkpoint_format="gptq_v2"),
    "gptq-8": gptq(8, 32, 1),
    "packed-4": packed(4, 32, True),
    "packed-4-asymmetric": packed(4, 16, False),
    "packed-8-channel": packed(8, -1, True),
    "packed-8-asymmetric": packed(8, 32, False),
    "int8": (compressed("int-quantized"), int8),
    "fp8-blocks": (FP8_CONFIG | {"weight_block_size": [24, 48]}, fp8("weight_scale_inv", 24, 48)),
    "fp8-tensor": (FP8_CONFIG, fp8("weight_scale_inv", 0, 0)),
    "float-channel": (compressed("float-quantized", type="float"), fp8("weight_scale", 1, 0)),
    "float-tensor": (compressed("float-quantized", type="float", strategy="tensor"), fp8("weight_scale", 0, 0)),
    "float-block": (
        compressed("float-quantized", type="float", strategy="block", block_structure=[32, 32]),
        fp8("weight_scale", 32, 32),
    ),
}
