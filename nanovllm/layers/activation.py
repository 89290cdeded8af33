"""SwiGLU's gate (Shazeer, 2020, arXiv:2002.05202)."""

import torch
import torch.nn.functional as F


def silu_and_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up
