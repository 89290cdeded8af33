"""Causal attention over a paged KV cache. The arithmetic is a backend's; this file only chooses and calls it.

Legend: T tokens in the step, S sequences, H/KH query/KV heads, D head_dim.
"""

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor, nn

from nanovllm.layers.attention_cpu import CPUAttention, has_kernels
from nanovllm.layers.attention_flash import Opened, open_flash_attn, open_torch_varlen
from nanovllm.utils.checks import require
from nanovllm.utils.context import Context, get_context
from nanovllm.utils.device import gpu_capability

logger = logging.getLogger("nanovllm")


class AttentionBackend(Protocol):
    """How keys and values are stored and read. Stateless; `k_cache` and `v_cache` are one layer's."""

    @staticmethod
    def cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """The layout of `k_cache` and of `v_cache`."""

    @staticmethod
    def store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
        """Writes [T, KH, D] keys and values to their slots; slot -1 is not stored."""

    @staticmethod
    def copy_blocks(k_cache: Tensor, v_cache: Tensor, copies: Tensor) -> None:
        """For each of [n, 3] int64 `copies`, a source block, a target block and a number of slots, in this order:
        copies so many of the first slots. A block may be a target that was a source before, or the other way round.
        """

    @staticmethod
    def prefill(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, context: Context) -> Tensor:
        """[T, H, D] new queries over cached prefix and new keys, causal, aligned at the end. Returns [T, H, D]."""

    @staticmethod
    def decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, context: Context) -> Tensor:
        """[S, H, D] queries, one a sequence, over everything in the cache. Returns [S, H, D].

        On CUDA it must not wait for the device, so that a graph can hold it; a row of length 0 may return anything.
        """


class Attention(nn.Module):
    """One layer's attention. The model runner sets `backend`, `k_cache` and `v_cache` once it has sized the cache."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.backend: AttentionBackend = CPUAttention
        self.k_cache = self.v_cache = torch.empty(0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[T, H, D], [T, KH, D], [T, KH, D] -> [T, H, D]; the scale is 1 / sqrt(D)."""
        context = get_context()
        if self.k_cache.numel():  # none yet while the runner measures how much memory the model needs
            self.backend.store(k, v, self.k_cache, self.v_cache, context.slot_mapping)
        if context.is_prefill:
            return self.backend.prefill(q, k, v, self.k_cache, self.v_cache, context)
        return self.backend.decode(q, self.k_cache, self.v_cache, context)


def open_triton(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> Opened:
    gpu_capability(device)
    require(find_spec("triton") is not None, "the package triton is not installed")
    require(16 <= head_dim <= 256, f"it needs a head_dim of 16 to 256, the model has {head_dim}")
    return import_module("nanovllm.layers.attention_triton").TritonAttention, "triton"


def open_cpu(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> Opened:
    is_compiled = device.type == "cpu" and has_kernels(torch.empty(0, head_dim, dtype=dtype))
    return CPUAttention, "cpu (C++)" if is_compiled else "cpu (plain PyTorch)"


# In the order in which "auto" tries them. Each returns a backend and what to call it, or raises why there is none here.
BACKENDS: dict[str, Callable[[torch.device, torch.dtype, int, int], Opened]] = {
    "flash_attn": open_flash_attn,
    "triton": open_triton,
    "torch_varlen": open_torch_varlen,
    "cpu": open_cpu,
}


def choose_backend(
    name: str, device: torch.device, dtype: torch.dtype, layer: Attention, block_size: int
) -> AttentionBackend:
    """The backend called `name`; "auto" is the first of `BACKENDS` that works here, and logs why no earlier one does.

    ValueError if the one that was asked for cannot run here; the message says why.
    """
    reasons = []
    for candidate in BACKENDS if name == "auto" else [name]:
        try:
            backend, label = BACKENDS[candidate](device, dtype, layer.head_dim, block_size)
            if backend is not CPUAttention:
                _run_once(backend, device, dtype, layer, block_size)
        except Exception as error:  # whatever a compiler or a library raises
            if name != "auto":
                raise ValueError(f"attention_backend={name!r} does not work here: {error}; 'auto' finds one") from error
            reasons.append(f"not {candidate}: {(str(error).strip() or repr(error)).splitlines()[0]}")
        else:
            level = logging.WARNING if device.type == "cuda" and backend is CPUAttention else logging.INFO
            logger.log(level, "; ".join([f"attention: {label}", *reasons]))
            return backend


def _run_once(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, layer: Attention, block_size: int
) -> None:
    """Kernels may have been built for other GPUs, or their compiler may be missing."""
    cache = torch.zeros(backend.cache_shape(1, block_size, layer.num_kv_heads, layer.head_dim), dtype=dtype).to(device)
    q, k = (torch.zeros(1, n, layer.head_dim).to(device, dtype) for n in (layer.num_heads, layer.num_kv_heads))
    slots, bounds = torch.zeros(1, dtype=torch.int64, device=device), torch.arange(2, dtype=torch.int32, device=device)
    backend.store(k, k, cache, cache, slots)
    backend.copy_blocks(cache, cache, torch.zeros(1, 3, dtype=torch.int64, device=device))
    tables = {"slot_mapping": slots, "context_lens": bounds[1:], "block_tables": bounds[:1].view(1, 1)}
    backend.decode(q, cache, cache, Context(**tables))
    backend.prefill(q, k, k, cache, cache, Context(True, bounds, bounds, 1, 1, **tables))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
