"""SwiGLU's gate (Shazeer, 2020, arXiv:2002.05202)."""

import torch
import torch.nn.functional as F

from nanovllm.kernels.fused import fused_ops


def silu_and_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    ops = fused_ops(gate)
    return ops.silu_and_mul(gate, up) if ops else F.silu(gate) * up
