"""Causal attention over a paged KV cache. The arithmetic is a backend's; this file only chooses and calls it.

Legend: T tokens in the step, H/KH query/KV heads, D head_dim.
"""

from typing import Protocol

import torch
from torch import nn

from nanovllm.layers.attention_cpu import CPUAttention
from nanovllm.utils.context import Context, get_context


class AttentionBackend(Protocol):
    """How keys and values are stored and read. Stateless; `k_cache` and `v_cache` are one layer's."""

    @staticmethod
    def cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """The layout of `k_cache` and of `v_cache`."""

    @staticmethod
    def store(
        k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Writes [T, KH, D] keys and values to their slots; slot -1 is not stored."""

    @staticmethod
    def prefill(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        context: Context,
    ) -> torch.Tensor:
        """[T, H, D] new queries over cached prefix and new keys, causal, aligned at the end. Returns [T, H, D]."""

    @staticmethod
    def decode(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, context: Context) -> torch.Tensor:
        """[S, H, D] queries, one a sequence, over everything in the cache. Returns [S, H, D]."""


BACKENDS: dict[str, type[AttentionBackend]] = {"cpu": CPUAttention}


def choose_backend(name: str) -> type[AttentionBackend]:
    """The backend called `name`; "auto" is the fastest that works here."""
    return CPUAttention if name == "auto" else BACKENDS[name]


class Attention(nn.Module):
    """One layer's attention. The model runner sets `backend`, `k_cache` and `v_cache` once it has sized the cache."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.backend: type[AttentionBackend] = CPUAttention
        self.k_cache = self.v_cache = torch.empty(0)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[T, H, D], [T, KH, D], [T, KH, D] -> [T, H, D]; the scale is 1 / sqrt(D)."""
        context = get_context()
        if self.k_cache.numel():  # none yet while the runner measures how much memory the model needs
            self.backend.store(k, v, self.k_cache, self.v_cache, context.slot_mapping)
        if context.is_prefill:
            return self.backend.prefill(q, k, v, self.k_cache, self.v_cache, context)
        return self.backend.decode(q, self.k_cache, self.v_cache, context)
