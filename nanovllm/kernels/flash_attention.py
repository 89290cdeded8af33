"""Attention by kernels that others have built: the package flash-attn (FA2, FA3), and PyTorch's own varlen attention.

All read a cache of [num_blocks, block_size, KH, D] through int32 block tables. FA2, which is also what PyTorch has
inside, takes blocks of a multiple of 256 tokens only.
Legend: T tokens in the step, S sequences, H/KH query/KV heads, D head_dim.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.fused import triton_problem
from nanovllm.utils.checks import require
from nanovllm.utils.context import Context
from nanovllm.utils.device import gpu_capability

Opened = tuple[object, str]  # a backend and what to call it


class _PagedAttention:
    """See `nanovllm.kernels.attention.AttentionBackend`."""

    def __init__(self) -> None:
        kernels = import_module("nanovllm.kernels.triton_attention") if triton_problem() is None else None
        self.store = kernels.store_kvcache if kernels else store_kvcache
        self.copy_blocks = kernels.copy_blocks if kernels else copy_blocks

    @staticmethod
    def cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        return num_blocks, block_size, num_kv_heads, head_dim


class FlashAttention2(_PagedAttention):
    """Dao, 2023, arXiv:2307.08691."""

    block_size = 256  # it takes no smaller
    block_table = "block_table"  # the argument's name

    def __init__(self, module: ModuleType):
        super().__init__()
        self.varlen, self.with_kvcache = module.flash_attn_varlen_func, module.flash_attn_with_kvcache
        # Releases that split the keys behind a block table leave outputs unwritten; those that can be told not to, are.
        can_split = "num_splits" in inspect.signature(self.varlen).parameters
        self.unsplit = {"num_splits": 1} if can_split else {}

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, context: Context) -> Tensor:
        paged = {}
        if context.block_tables is not None:
            k, v, paged = k_cache, v_cache, {self.block_table: context.block_tables, **self.unsplit}
        lens = context.cu_seqlens_q, context.cu_seqlens_k, context.max_seqlen_q, context.max_seqlen_k
        out = self.varlen(q, k, v, *lens, causal=True, **paged)
        return out[0] if isinstance(out, tuple) else out  # early releases of FA3 add the logarithms of the sums

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, context: Context) -> Tensor:
        paged = {"cache_seqlens": context.context_lens, self.block_table: context.block_tables}
        return self.with_kvcache(q.unsqueeze(1), k_cache, v_cache, causal=True, **paged).squeeze(1)


class FlashAttention3(FlashAttention2):
    """Shah et al., 2024, arXiv:2407.08608. Takes blocks of any size."""

    block_size = 64
    block_table = "page_table"

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, context: Context) -> Tensor:
        if context.block_tables is None:
            return super().prefill(q, k, v, k_cache, v_cache, context)
        paged = {"cache_seqlens": context.context_lens, self.block_table: context.block_tables}
        varlen = {"cu_seqlens_q": context.cu_seqlens_q, "max_seqlen_q": context.max_seqlen_q}
        return self.with_kvcache(q, k_cache, v_cache, causal=True, **paged, **varlen)


class TorchVarlen(_PagedAttention):
    """PyTorch's. It may not split the keys behind a block table, else it leaves outputs unwritten (pytorch#194167)."""

    block_size = 256  # FA2 is inside

    def __init__(self, varlen_attn: Callable[..., Tensor]):
        super().__init__()
        self.varlen_attn = varlen_attn

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, context: Context) -> Tensor:
        lens = context.cu_seqlens_q, context.cu_seqlens_k, context.max_seqlen_q, context.max_seqlen_k
        if context.block_tables is None:
            return self.varlen_attn(q, k, v, *lens, window_size=(-1, 0), enable_gqa=True)
        return self._paged(q, k_cache, v_cache, context, lens, window_size=(-1, 0))  # causal

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, context: Context) -> Tensor:
        if context.cu_seqlens_k is None:  # the first layer computes them for all
            context.cu_seqlens_q = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
            context.cu_seqlens_k = F.pad(context.context_lens.cumsum(0, dtype=torch.int32), (1, 0))
        lens = context.cu_seqlens_q, context.cu_seqlens_k, 1, context.block_tables.shape[1] * k_cache.shape[1]
        return self._paged(q, k_cache, v_cache, context, lens)  # one query needs no mask, and packs its group without

    def _paged(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, context: Context, lens: tuple, **mask) -> Tensor:
        paged = {"seqused_k": context.context_lens, "block_table": context.block_tables, "num_splits": 1}
        return self.varlen_attn(q, k_cache, v_cache, *lens, enable_gqa=True, **paged, **mask)


def open_flash_attn(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> Opened:
    capability = _check(device, dtype, head_dim)
    if capability[0] == 9 and find_spec("flash_attn_interface"):
        return FlashAttention3(import_module("flash_attn_interface")), "flash_attn (FA3)"
    require(find_spec("flash_attn") is not None, "the package flash-attn is not installed")
    _check(device, dtype, head_dim, block_size)
    module = import_module("flash_attn")
    return FlashAttention2(module), f"flash_attn {module.__version__} (FA2)"


def open_torch_varlen(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> Opened:
    _check(device, dtype, head_dim, block_size)
    has_it = find_spec("torch.nn.attention.varlen") is not None
    function = import_module("torch.nn.attention.varlen").varlen_attn if has_it else lambda: None
    is_paged = {"block_table", "seqused_k", "num_splits"} <= inspect.signature(function).parameters.keys()
    require(is_paged, f"PyTorch {torch.__version__} has no varlen_attn with block tables; 2.13 has")
    return TorchVarlen(function), f"torch_varlen (PyTorch {torch.__version__})"


def _check(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int = 256) -> tuple[int, int]:
    capability = gpu_capability(device)
    require(dtype.itemsize == 2, f"it computes in 16 bits; use dtype='bfloat16' rather than {dtype}")
    fits = head_dim <= 256 and head_dim % 8 == 0
    require(fits, f"it needs a head_dim that is a multiple of 8 up to 256, the model has {head_dim}")
    require(block_size % 256 == 0, f"it needs a kvcache_block_size that is a multiple of 256, not {block_size}")
    return capability


def store_kvcache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """What `triton_attention.store_kvcache` does, for where Triton does not work; every step stores a token."""
    is_stored = slot_mapping >= 0
    rows = torch.arange(len(k), device=k.device).where(is_stored, is_stored.int().argmax())  # others repeat the first
    for new, cache in ((k, k_cache), (v, v_cache)):
        cache.flatten(0, 1).index_copy_(0, slot_mapping[rows], new[rows])


def copy_blocks(k_cache: Tensor, v_cache: Tensor, copies: Tensor) -> None:
    """What `triton_attention.copy_blocks` does, likewise."""
    for source, target, num_filled in copies.tolist():
        for cache in (k_cache, v_cache):
            cache[target, :num_filled] = cache[source, :num_filled]
