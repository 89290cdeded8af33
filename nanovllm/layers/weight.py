"""Weights as a device likes them: as the checkpoint has them, or reordered for the CPU's kernels, in bf16 or int8.

Legend: T tokens, N/K outputs/inputs of a layer.
"""

import os
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.kernels import cpu as cpu_kernels
from nanovllm.utils.checks import check_choice
from nanovllm.utils.device import cpu_has

# One that is no tensor has `shape`, `nbytes`, `linear` and `rows`; on CUDA it is a `triton_linear.TritonWeight`.
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
            f"quantization={quantization!r} needs device='cpu', dtype='bfloat16', a processor with AVX2 or Arm's dot "
            f"products, and a C++ compiler; here are {device.type} and {dtype}: leave quantization out"
        )


def check_batch_invariance(
    dtype: torch.dtype, device: torch.device, head_dim: int, inputs: list[int], products: str
) -> None:
    """ValueError if PyTorch would compute something on a CPU, in an order that depends on the number of rows.

    `inputs` are the numbers of inputs of all products, `products` says whose those are.
    """
    if device.type == "cuda":
        return
    nothing = torch.empty(0, dtype=dtype, device=device)
    if not all(cpu_kernels.has_kernels(nothing, inputs=n, head_dim=head_dim) for n in inputs) or products == "onednn":
        raise ValueError(
            "batch_invariant=True needs on a CPU what its compiled kernels need: dtype='bfloat16', a processor with "
            "AVX2 or Arm's dot products, a C++ compiler, head_dim of at most 256, products of a multiple of 4 inputs, "
            f"and no NANOVLLM_CPU_PRODUCTS=onednn; here are {dtype}, head_dim={head_dim}, inputs {sorted(set(inputs))} "
            f"and products {products!r}: leave batch_invariant out"
        )


def choose_products(max_num_seqs: int, device: torch.device, batch_invariant: bool = False) -> str:
    """Whose products of weights to take: "packed", ours, "onednn", PyTorch's, or on CUDA "library" or "triton".

    For bf16 on a CPU with our kernels NANOVLLM_CPU_PRODUCTS decides; without it ours, unless the processor has matrix
    units (AMX), which NANOVLLM_CPU_ISA does not rule out, and steps many rows. Two cores of a Xeon with AMX: 32 prompts
    of 150 tokens prefill in 5.0 s with oneDNN and in 22.8 s with ours, and decode in 15.9 s and 19.8 s; but 128 steps
    of one sequence take 11.3 s and 5.4 s, since ours are recorded and read memory faster. Only ours have results for a
    row that do not depend on how many there are.
    ValueError if the variable says something else.
    """
    if device.type == "cuda":
        return "triton" if batch_invariant else "library"
    chosen = os.environ.get("NANOVLLM_CPU_PRODUCTS")
    if chosen is None:
        has_units = cpu_has("amx_bf16") and "NANOVLLM_CPU_ISA" not in os.environ
        return "onednn" if has_units and max_num_seqs > 32 and not batch_invariant else "packed"
    check_choice("NANOVLLM_CPU_PRODUCTS", chosen, ["packed", "onednn"])
    return chosen


def pack(weight: nn.Parameter, quantization: str | None, products: str) -> Weight:
    """What to compute with instead of a loaded parameter; itself unless it is a matrix and the kernels can take it.

    `quantization` was checked; without any, `products` is what `choose_products` says.
    """
    if weight.dim() == 2 and products == "triton":
        return import_module("nanovllm.kernels.triton_linear").TritonWeight(weight)
    if weight.dim() != 2 or not cpu_kernels.has_kernels(weight, inputs=weight.shape[1]):
        return weight
    if quantization is not None:
        return cpu_kernels.Int8Weight(weight)
    return cpu_kernels.PackedWeight(weight) if products == "packed" else weight
