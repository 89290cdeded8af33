"""The one test of which fast kernels are at hand for the small operations between the GEMMs."""

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch

from nanovllm.layers import cpu_kernels


def fused_ops(x: torch.Tensor) -> ModuleType | None:
    """The module of `add_rms_norm`, `norm_rope`, `silu_and_mul`, `sample` for such tensors; None: plain PyTorch."""
    return _kernels(x.device.type, x.dtype)


@cache
def _kernels(device_type: str, dtype: torch.dtype) -> ModuleType | None:
    if device_type == "cuda" and find_spec("triton"):
        from nanovllm.layers import fused_triton

        return fused_triton
    return cpu_kernels if cpu_kernels.has_kernels(torch.empty(0, dtype=dtype, device=device_type)) else None
