"""The one test of which fast kernels are at hand for the small operations between the GEMMs, and of Triton's at all."""

import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from nanovllm.kernels import cpu as cpu_kernels
from nanovllm.utils.checks import first_line, require
from nanovllm.utils.device import gpu_capability

logger = logging.getLogger("nanovllm")


def fused_ops(x: torch.Tensor) -> ModuleType | None:
    """The module of `add_rms_norm`, `norm_rope`, `silu_and_mul`, `sample` for such tensors; None: plain PyTorch."""
    return _kernels(x.device.type, x.dtype)


@cache
def triton_problem() -> str | None:
    """Why Triton's kernels do not work on the current GPU, which a trial of one shows; None if they do.

    The trial is once per process, and so is the warning if it fails. Triton compiles a launcher for each kernel with
    the machine's C compiler, so that nothing less than a launch tells.
    """
    try:
        gpu_capability(torch.device("cuda"))
        require(find_spec("triton") is not None, "the package triton is not installed")
        x = torch.ones(1, 16, device="cuda")
        out = import_module("nanovllm.kernels.triton_fused").silu_and_mul(x, x).tolist()  # which waits for the device
        require(abs(out[0][15] - 0.7311) < 1e-3, "its kernels compute wrong numbers")
    except Exception as error:  # whatever a compiler or a library raises
        problem = first_line(error)
        logger.warning(f"no Triton kernels, but plain PyTorch in their place: {problem}")
        return problem
    return None


@cache
def _kernels(device_type: str, dtype: torch.dtype) -> ModuleType | None:
    if device_type == "cuda" and triton_problem() is None:
        return import_module("nanovllm.kernels.triton_fused")
    if device_type == "cpu" and cpu_kernels.has_kernels(torch.empty(0, dtype=dtype)):
        return cpu_kernels
    return None
