"""Mixtures of experts (Shazeer et al., 2017, arXiv:1701.06538): which experts a token goes to, and their sum.

Legend: T tokens, E experts, K of them chosen for a token, H hidden size.
"""

from importlib import import_module

import numpy as np
import torch
from torch import Tensor, nn

from nanovllm.kernels.fused import triton_problem
from nanovllm.layers.weight import Weight
from nanovllm.utils.loader import CheckpointTensor


class Router(nn.Module):
    """Chooses the likeliest experts. Its weight is never quantised: a small error would choose others."""

    def __init__(self, hidden_size: int, num_experts: int, num_chosen: int, normalizes: bool):
        super().__init__()
        self.num_chosen, self.normalizes = num_chosen, normalizes
        self.weight = Weight(num_experts, hidden_size, least_bits=16)

    def load_weight(self, name: str, loaded: CheckpointTensor, shard: str | None) -> None:
        self.weight.load(name, loaded, self.weight.shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H] -> [T, K] experts (int64), and how much each counts (fp32)."""
        probs, chosen = self.weight.linear(x).softmax(-1, dtype=torch.float32).topk(self.num_chosen)
        return chosen, probs / probs.sum(-1, keepdim=True) if self.normalizes else probs


class Experts(nn.ModuleList):
    """Gated MLPs, each with `gate_up_proj` and `down_proj`, of which only those chosen are read."""

    addresses: Tensor | None = None  # of all weights, for who computes the products of all together

    def forward(self, x: Tensor, chosen: Tensor, counts: Tensor) -> Tensor:
        """[T, H], [T, K] and [T, K] of `Router` -> [T, H], the chosen experts' sum."""
        if has_grouped_products(x):
            return import_module("nanovllm.kernels.triton_experts").mix(x, chosen, counts, self)
        flat = chosen.flatten().cpu().numpy()
        order = np.argsort(flat, kind="stable")  # of the T * K choices, those of one expert together
        experts, starts = np.unique(flat[order], return_index=True)
        places = torch.from_numpy(np.stack([order // chosen.shape[1], np.argsort(order)])).to(x.device)
        parts = x[places[0]].tensor_split(starts[1:].tolist())
        outs = torch.cat([self[i](part) for i, part in zip(experts.tolist(), parts, strict=True)])[places[1]]
        return (outs.view(*chosen.shape, -1).float() * counts.unsqueeze(-1)).sum(1).to(x.dtype)


def has_grouped_products(x: Tensor) -> bool:
    """Whether all experts' products are one launch, of which the host need not know who was chosen."""
    return x.is_cuda and triton_problem() is None
