"""Attention in plain PyTorch, for any machine: a loop over sequences, each read through its block table.

For bf16 on a CPU with the kernels of `cpu_kernels` those are called instead; the plain code says what they compute. A
cache in int8 is theirs alone, see `cpu_kernels.is_int8`.

The cache is `[num_blocks, num_kv_heads, block_size, head_dim]`, so that a head's keys are contiguous.
Legend: T tokens in the step, S sequences, H/KH query/KV heads, D head_dim, L tokens of one sequence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels import cpu as cpu_kernels
from nanovllm.utils.context import Context


class CPUAttention:
    """See `nanovllm.kernels.attention.AttentionBackend`."""

    block_size = 64  # a tile of keys

    @staticmethod
    def cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        return num_blocks, num_kv_heads, block_size, head_dim

    @staticmethod
    def store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
        if has_kernels(k):
            cpu_kernels.store(k, k_cache, slot_mapping)
            cpu_kernels.store(v, v_cache, slot_mapping)
            return
        is_stored, block_size = slot_mapping >= 0, k_cache.shape[2]
        blocks, offsets = slot_mapping[is_stored] // block_size, slot_mapping[is_stored] % block_size
        k_cache[blocks, :, offsets] = k[is_stored]
        v_cache[blocks, :, offsets] = v[is_stored]

    @staticmethod
    def copy_blocks(k_cache: Tensor, v_cache: Tensor, copies: Tensor) -> None:
        if has_kernels(k_cache) or cpu_kernels.is_int8(k_cache):
            return cpu_kernels.copy_blocks(k_cache, v_cache, copies)
        for source, target, num_filled in copies.tolist():
            for cache in (k_cache, v_cache):
                cache[target, :, :num_filled] = cache[source, :, :num_filled]

    @staticmethod
    def prefill(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, context: Context) -> Tensor:
        if has_kernels(q):
            return cpu_kernels.attend(q, *((k, v) if context.block_tables is None else (k_cache, v_cache)), context)
        out, bounds = torch.empty_like(q), context.cu_seqlens_q.tolist()
        for i, len_k in enumerate(context.cu_seqlens_k.diff().tolist()):
            new, len_q = slice(bounds[i], bounds[i + 1]), bounds[i + 1] - bounds[i]
            if len_k == len_q:
                keys, values, mask = k[new].transpose(0, 1), v[new].transpose(0, 1), None
            else:
                keys, values = _gather(k_cache, v_cache, context.block_tables[i], len_k)
                mask = torch.ones(len_q, len_k, dtype=torch.bool, device=q.device).tril(len_k - len_q)
            attended = F.scaled_dot_product_attention(
                q[new].transpose(0, 1)[None], keys[None], values[None], mask, is_causal=mask is None, enable_gqa=True
            )
            out[new] = attended[0].transpose(0, 1)
        return out

    @staticmethod
    def decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, context: Context) -> Tensor:
        if has_kernels(q):
            return cpu_kernels.attend(q, k_cache, v_cache, context)
        # The query heads of a group share their keys: as rows of one query matrix they read them once.
        grouped = q.unflatten(1, (k_cache.shape[1], -1))  # [S, KH, H / KH, D]
        out = torch.empty_like(grouped)
        for i, length in enumerate(context.context_lens.tolist()):
            keys, values = _gather(k_cache, v_cache, context.block_tables[i], length)
            out[i] = F.scaled_dot_product_attention(grouped[i : i + 1], keys[None], values[None])[0]
        return out.flatten(1, 2)


def has_kernels(x: Tensor) -> bool:
    """Whether there are kernels for queries, keys or a cache of this kind; D is the last dimension."""
    return cpu_kernels.has_kernels(x, head_dim=x.shape[-1])


def _gather(k_cache: Tensor, v_cache: Tensor, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The first `length` keys and values of a sequence, each [KH, L, D]."""
    blocks = block_table[: -(-length // k_cache.shape[2])]
    if len(blocks) == 1:  # a view, nothing is copied
        return k_cache[blocks[0], :, :length], v_cache[blocks[0], :, :length]
    k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length] for cache in (k_cache, v_cache))
    return k, v
