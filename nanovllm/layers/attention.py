"""Causal attention over a paged KV cache. The arithmetic is a backend's; this file only calls it.

Legend: T tokens in the step, H/KH query/KV heads, D head_dim.
"""

import torch
from torch import Tensor, nn

from nanovllm.kernels.attention import AttentionBackend
from nanovllm.kernels.plain_attention import CPUAttention
from nanovllm.utils.context import get_step


class Attention(nn.Module):
    """One layer's attention. The model runner sets `backend`, `k_cache` and `v_cache` once it has sized the cache."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.backend: AttentionBackend = CPUAttention
        self.k_cache = self.v_cache = torch.empty(0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[T, H, D], [T, KH, D], [T, KH, D] -> [T, H, D]; the scale is 1 / sqrt(D)."""
        step, caches = get_step(), (self.k_cache, self.v_cache)
        if self.k_cache.numel():  # none yet while the runner measures how much memory the model needs
            self.backend.store(k, v, *caches, step.slot_mapping)
        if step.prefill is None:
            return self.backend.decode(q, *caches, step.decode)
        if step.decode is None:
            return self.backend.prefill(q, k, v, *caches, step.prefill)
        # Two launches: a decode splits its keys over many programs, and packs the heads that share them.
        n = len(step.decode.context_lens)
        decoded = self.backend.decode(q[:n], *caches, step.decode)
        return torch.cat([decoded, self.backend.prefill(q[n:], k[n:], v[n:], *caches, step.prefill)])
