"""Weights as a device likes them: as the checkpoint has them, or reordered for the CPU's kernels, in bf16 or int8.

Legend: T tokens, N/K outputs/inputs of a layer.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.layers import cpu_kernels
from nanovllm.utils.device import cpu_has

Weight = torch.Tensor | cpu_kernels.PackedWeight | cpu_kernels.Int8Weight


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """[T, K] -> [T, N]."""
    return F.linear(x, weight, bias) if isinstance(weight, torch.Tensor) else weight.linear(x, bias)


def embedding(ids: torch.Tensor, weight: Weight) -> torch.Tensor:
    """[T] -> [T, K], rows of the weight."""
    return F.embedding(ids, weight) if isinstance(weight, torch.Tensor) else weight.rows(ids)


def check_quantization(quantization: str | None, dtype: torch.dtype, device: torch.device) -> None:
    """ValueError if `quantization`, None or "int8", is not for this dtype, device or processor."""
    if quantization is not None and not cpu_kernels.has_kernels(torch.empty(0, dtype=dtype, device=device)):
        raise ValueError(
            f"quantization={quantization!r} needs device='cpu', dtype='bfloat16', a processor with AVX512-BF16 and "
            f"AVX512-VNNI, and a C++ compiler; here are {device.type} and {dtype}: leave quantization out"
        )


def pack_weights(model: nn.Module, quantization: str | None) -> None:
    """Replaces the weights of a loaded model's products and embeddings by what is fastest here, one by one.

    Those whose sizes do not fit the kernels stay as they are. `quantization` was checked.
    """
    if not cpu_kernels.has_kernels(next(model.parameters())):
        return
    if quantization is None and cpu_has("amx_bf16"):
        return  # PyTorch's own products are faster on matrix units
    kind = cpu_kernels.PackedWeight if quantization is None else cpu_kernels.Int8Weight
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and cpu_kernels.has_kernels(weight, inputs=weight.shape[1]):
            owners.setdefault(weight, []).append(module)
    while owners:
        weight, modules = owners.popitem()
        packed = kind(weight)
        for module in modules:
            del module.weight
            module.weight = packed
