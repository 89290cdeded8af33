"""Weights as a device likes them: as the checkpoint has them, or reordered for the CPU's kernels, in bf16 or int8.

Legend: T tokens, N/K outputs/inputs of a layer.
"""

import os

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.layers import cpu_kernels
from nanovllm.utils.checks import check_choice
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


def choose_products(max_num_seqs: int) -> str:
    """Whose products of bf16 weights a CPU with our kernels takes: "packed", ours, or "onednn", PyTorch's.

    NANOVLLM_CPU_PRODUCTS decides; without it ours, unless the processor has matrix units (AMX) and steps many rows.
    Two cores of a Xeon with AMX: 32 prompts of 150 tokens prefill in 5.0 s with oneDNN and in 22.8 s with ours, and
    decode in 15.9 s and 19.8 s; but 128 steps of one sequence take 11.3 s and 5.4 s, since ours are recorded
    and read memory faster.
    ValueError if the variable says something else.
    """
    chosen = os.environ.get("NANOVLLM_CPU_PRODUCTS")
    if chosen is None:
        return "onednn" if cpu_has("amx_bf16") and max_num_seqs > 32 else "packed"
    check_choice("NANOVLLM_CPU_PRODUCTS", chosen, ["packed", "onednn"])
    return chosen


def pack(weight: nn.Parameter, quantization: str | None, products: str) -> Weight:
    """What to compute with instead of a loaded parameter; itself unless it is a matrix and the kernels can take it.

    `quantization` was checked; without any, `products` is what `choose_products` says.
    """
    if weight.dim() != 2 or not cpu_kernels.has_kernels(weight, inputs=weight.shape[1]):
        return weight
    if quantization is not None:
        return cpu_kernels.Int8Weight(weight)
    return cpu_kernels.PackedWeight(weight) if products == "packed" else weight
