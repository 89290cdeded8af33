"""Paged attention in Triton whose result for a query depends, to the last bit, on its sequence alone.

Keys are taken in tiles and tiles in splits, both at fixed positions, and splits are merged one after another from the
first: by the program that computes them or, for a few decodes with long contexts, by a second kernel from programs that
have computed one each. Either way the operations are the same, in the same order, of equally shaped tiles, and nothing
is fused ("Defeating nondeterminism in LLM inference", Thinking Machines Lab, 2025, says what for).
Legend: T tokens in the step, S sequences, H/KH query/KV heads, D head_dim, P splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton_attention import TritonAttention, _attend, _device, _owner
from nanovllm.utils.context import Context

SPLIT = 512  # keys
RAGGED = ["cu_seqlens_q", "context_lens", "block_tables", "num_seqs", "columns", "num_splits"]


class InvariantTritonAttention(TritonAttention):
    """See `nanovllm.kernels.attention.AttentionBackend`; decodes and pieces of prompts are computed alike."""

    @staticmethod
    def prefill(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, context: Context) -> Tensor:
        if context.block_tables is None:
            return _launch(q, k, v, 0, context.cu_seqlens_q, context.cu_seqlens_q, context.cu_seqlens_q)
        return _launch_cached(q, k_cache, v_cache, context.cu_seqlens_q, context)

    @staticmethod
    def decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, context: Context) -> Tensor:
        bounds = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
        # From what a CUDA graph fixes. A long context is one program's work else, while most of the GPU is idle.
        is_small = len(q) * k_cache.shape[2] < 2 * _device(q.device)[1]
        num_splits = triton.cdiv(context.block_tables.shape[1] * k_cache.shape[1], SPLIT) if is_small else 0
        return _launch_cached(q, k_cache, v_cache, bounds, context, num_splits)


def _launch_cached(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, bounds: Tensor, context: Context, num_splits: int = 0
) -> Tensor:
    k, v = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    return _launch(q, k, v, k_cache.shape[1], bounds, context.context_lens, context.block_tables, num_splits)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, bounds: Tensor, lens: Tensor, tables: Tensor, num_splits: int = 0
) -> Tensor:
    """[T, H, D] queries over rows [*, KH, D] of keys and values, which without a `block_size` are the step's own.

    If there are `num_splits`, which must reach over all keys, each is a program's, and each sequence has one query.
    """
    (num_tokens, num_heads, head_dim), num_kv_heads, num_seqs = q.shape, k.shape[1], len(bounds) - 1
    group, block_d = num_heads // num_kv_heads, triton.next_power_of_2(head_dim)
    config = invariant_config(_device(q.device)[0], head_dim, q.dtype, group)
    out = q.new_empty(q.shape)
    partial = q.new_empty(num_tokens * num_heads * num_splits, head_dim, dtype=torch.float32)
    states = q.new_empty(2, len(partial), dtype=torch.float32)
    q, k, v = (x.flatten(1) for x in (q, k, v))  # views: the heads of a token are contiguous
    _attend_kernel[num_kv_heads, num_tokens // (config["ROWS"] // group) + num_seqs, max(num_splits, 1)](
        q, k, v, out, partial, states, bounds, lens, tables, num_seqs, tables.stride(0),
        q.stride(0), k.stride(0), v.stride(0), KH=num_kv_heads, GROUP=group, D=head_dim, BLOCK_D=block_d,
        BLOCK_SIZE=block_size, SPLIT=SPLIT, IS_SPLIT=num_splits > 0, enable_fp_fusion=False, **config
    )  # fmt: skip
    if num_splits:
        _merge_kernel[num_heads, num_seqs](
            partial, states, out, lens, num_splits, H=num_heads, D=head_dim, BLOCK_D=block_d, SPLIT=SPLIT,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def invariant_config(capability: tuple[int, int], head_dim: int, dtype: torch.dtype, group: int) -> dict[str, int]:
    """Rows of queries (ROWS), keys a step (TILE), warps and pipeline stages: what fits and spills no register.

    The same for all steps of a model. A decode fills few of the rows, but still waits for memory and not for products.
    """
    width = max(triton.next_power_of_2(head_dim), 32)
    if dtype == torch.float32:  # no tensor cores
        rows, config = 16, {"TILE": 16, "num_warps": min(width // 8, 16), "num_stages": 2}
    else:
        rows, is_large = 32 if width == 256 else 64, capability[0] in (9, 10)
        tile = 64 if width == 64 or (width == 128 and is_large) else 32
        config = {"TILE": tile, "num_warps": 8, "num_stages": 2 if width == 256 else 3}
    return {"ROWS": max(rows, triton.next_power_of_2(group)), **config}


@triton.jit
def _merge(highest, total, acc, next_highest, next_total, next_acc):
    """Two splits' highest scores, sums of weights, and sums of weighted values, as those of both."""
    previous, highest = highest, tl.maximum(highest, next_highest)
    shrink, weight = tl.exp2(previous - highest), tl.exp2(next_highest - highest)
    return highest, total * shrink + next_total * weight, acc * shrink[:, None] + next_acc * weight[:, None]


@triton.jit(do_not_specialize=RAGGED)
def _attend_kernel(
    q, k, v, out, partial, states, cu_seqlens_q, context_lens, block_tables, num_seqs, columns,
    q_stride, k_stride, v_stride, KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SPLIT: tl.constexpr, IS_SPLIT: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """A program takes ROWS // GROUP queries of a sequence with the heads of a group, over all keys or a split of them.

    The longest stretches of keys start first. The queries make at most T // (ROWS // GROUP) + S pieces.
    """
    kv_head, piece, split = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(2)
    num_queries: tl.constexpr = ROWS // GROUP
    seq = _owner(cu_seqlens_q, num_seqs, piece, num_queries)
    q_start = tl.load(cu_seqlens_q + seq)
    len_q = tl.load(cu_seqlens_q + seq + 1) - q_start
    first = (piece - q_start // num_queries - seq) * num_queries
    if first >= len_q:
        return
    first_key, len_k = q_start, len_q
    if BLOCK_SIZE > 0:
        first_key, len_k = q_start * 0, tl.load(context_lens + seq)

    rows, cols = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    query, head = first + rows // GROUP, kv_head * GROUP + rows % GROUP
    is_row = (rows < num_queries * GROUP) & (query < len_q)
    mask = is_row[:, None] & (cols < D)[None, :]
    tokens = (q_start + query).to(tl.int64)
    queries = tl.load(q + (tokens * q_stride + head * D)[:, None] + cols[None, :], mask=mask, other=0.0)
    k, v, block_table = k + kv_head * D, v + kv_head * D, block_tables + seq.to(tl.int64) * columns
    last, end = len_k - len_q + query, tl.minimum(len_k, len_k - len_q + first + num_queries)
    # A row may see no key of a split: its highest score is then finite, and weighs nothing beside that of another.
    nothing, no_total = tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)
    no_acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if IS_SPLIT:
        if split * SPLIT >= end:
            return
        highest, total, acc = _attend(
            queries, k, v, k_stride, v_stride, first_key.to(tl.int64), block_table, split * SPLIT,
            tl.minimum(end, (split + 1) * SPLIT), last, nothing, no_total, no_acc, D, BLOCK_SIZE, TILE, True
        )  # fmt: skip
        num_parts = num_seqs.to(tl.int64) * KH * GROUP * tl.num_programs(2)
        parts = (tokens * KH * GROUP + head) * tl.num_programs(2) + split
        tl.store(states + parts, highest, mask=is_row)
        tl.store(states + num_parts + parts, total, mask=is_row)
        tl.store(partial + parts[:, None] * D + cols[None, :], acc, mask=mask)
    else:
        highest, total, acc = nothing, no_total, no_acc
        for start in range(0, end, SPLIT):
            next_highest, next_total, next_acc = _attend(
                queries, k, v, k_stride, v_stride, first_key.to(tl.int64), block_table, start,
                tl.minimum(end, start + SPLIT), last, nothing, no_total, no_acc, D, BLOCK_SIZE, TILE, True
            )  # fmt: skip
            highest, total, acc = _merge(highest, total, acc, next_highest, next_total, next_acc)
        acc = (acc / tl.maximum(total, 1e-30)[:, None]).to(out.dtype.element_ty)
        tl.store(out + (tokens * KH * GROUP + head)[:, None] * D + cols[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=RAGGED)
def _merge_kernel(
    partial, states, out, context_lens, num_splits,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """A program merges the splits of one head of one sequence's only query; the output over no keys is zero."""
    head, cols, one = tl.program_id(1).to(tl.int64) * H + tl.program_id(0), tl.arange(0, BLOCK_D), tl.arange(0, 1)
    num_parts = tl.num_programs(1).to(tl.int64) * H * num_splits
    highest, total = tl.full([1], -1e30, tl.float32), tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_D], tl.float32)
    for split in range(0, tl.cdiv(tl.load(context_lens + tl.program_id(1)), SPLIT)):
        part = head * num_splits + split + one
        next_highest, next_total = tl.load(states + part), tl.load(states + num_parts + part)
        next_acc = tl.load(partial + part[:, None] * D + cols[None, :], mask=(cols < D)[None, :], other=0.0)
        highest, total, acc = _merge(highest, total, acc, next_highest, next_total, next_acc)
    acc = (acc / tl.maximum(total, 1e-30)[:, None]).to(out.dtype.element_ty)
    tl.store(out + (head + one)[:, None] * D + cols[None, :], acc, mask=(cols < D)[None, :])
