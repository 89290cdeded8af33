"""RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467), in fp32 whatever the model's dtype."""

import torch
from torch import nn

from nanovllm.kernels.fused import fused_ops


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last dimension."""
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return x32.to(x.dtype) * self.weight

    def add_norm(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the norm of `x + residual`, and that sum: the residual stream (None: there was none) after it."""
        if ops := fused_ops(x):
            return ops.add_rms_norm(x, residual, self.weight, self.eps)
        residual = x if residual is None else x + residual
        return self(residual), residual
