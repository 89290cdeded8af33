"""The CPU's kernels for bf16, in C++: GEMM over reordered weights, paged attention, the small operations between them.

Legend: T tokens in the step, S sequences, H/KH query/KV heads, D head_dim, V vocabulary, B block-table columns.
"""

import torch
from torch import Tensor

from nanovllm.layers.cpu_kernels.library import call, empty, load_kernels
from nanovllm.utils.context import Context

GROUP = 128  # as in linear.cpp


def has_kernels(x: Tensor) -> bool:
    """Whether the functions below can take such tensors."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and load_kernels() is not None


def can_pack(weight: Tensor) -> bool:
    """Whether an [N, K] weight has a size that the two kinds of weights below can have."""
    return weight.is_contiguous() and weight.shape[0] % 32 == 0 and weight.shape[1] % 4 == 0


class PackedWeight:
    """A [N, K] bf16 weight whose memory is reordered in place for `linear`; the tensor it was means nothing after."""

    def __init__(self, weight: Tensor):
        self.shape, self.values, self.nbytes = weight.shape, weight.data, weight.nbytes
        call("pack_bf16", self.values, *self.shape)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, K] -> [T, N]."""
        out = empty(x.shape[0], self.shape[0])
        call("linear_bf16", x, _row_stride(x), self.values, bias, out, x.shape[0], *self.shape)
        return out

    def rows(self, ids: Tensor) -> Tensor:
        """[T] int64 -> [T, K], those rows of the weight."""
        out = empty(ids.shape[0], self.shape[1])
        call("rows_bf16", self.values, ids, out, *out.shape)
        return out


class Int8Weight:
    """A [N, K] weight in int8, symmetric, with a scale for each of the N outputs.

    Activations are quantised on the fly, each 128 of a token with a scale of their own, so that an outlier costs only
    its neighbours their precision.
    """

    def __init__(self, weight: Tensor):
        n, k = self.shape = weight.shape
        self.values = torch.empty(n, k, dtype=torch.int8)
        self.scales = torch.empty(n)
        self.compensation = torch.empty(n * -(-k // GROUP), dtype=torch.int32)  # of activations stored as unsigned
        self.nbytes = self.values.nbytes + self.scales.nbytes + self.compensation.nbytes
        call("pack_int8", weight.data, n, k, self.values, self.scales, self.compensation)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, K] bf16 -> [T, N] bf16."""
        out = empty(x.shape[0], self.shape[0])
        weight = self.values, self.scales, self.compensation
        call("linear_int8", x, _row_stride(x), *weight, bias, out, x.shape[0], *self.shape)
        return out

    def rows(self, ids: Tensor) -> Tensor:
        """[T] int64 -> [T, K] bf16, those rows of the weight."""
        out = empty(ids.shape[0], self.shape[1])
        call("rows_int8", self.values, self.scales, ids, out, *out.shape)
        return out


def store(x: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes [T, KH, D] keys or values to their slots of a [blocks, KH, block_size, D] cache; slot -1 is not stored."""
    assert x.stride()[1:] == (x.shape[2], 1) and slot_mapping.dtype == torch.int64
    call("store_kv", x, x.stride(0), cache, slot_mapping, x.shape[0], *cache.shape[1:])


def attend(q: Tensor, k: Tensor, v: Tensor, context: Context, block_tables: Tensor | None) -> Tensor:
    """[T, H, D] queries over the paged caches `k` and `v`, or over [T, KH, D] new ones if there are no block tables."""
    assert q.is_contiguous() and k.stride()[1:] == v.stride()[1:] and k.stride(-1) == 1
    num_tokens, num_heads, head_dim = q.shape
    columns, block_size = (0, 0) if block_tables is None else (block_tables.stride(0), k.shape[2])
    layout = (
        columns,
        context.context_lens.shape[0],
        num_heads,
        k.shape[1],
        head_dim,
        block_size,
        k.stride(0),
        v.stride(0),
    )
    out = empty(num_tokens, num_heads, head_dim)
    call("attend", q, k, v, out, context.cu_seqlens_q, context.context_lens, block_tables, *layout)
    return out


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `nanovllm.layers.layernorm.RMSNorm.add_norm`."""
    assert x.is_contiguous() and (residual is None or residual.is_contiguous())
    out = empty(*x.shape)
    total = x if residual is None else empty(*x.shape)
    call("add_rms_norm", x, residual, weight, eps, total, out, *x.shape)
    return out, total


def norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `nanovllm.layers.rotary_embedding.RotaryEmbedding.forward`."""
    assert q.stride()[1:] == k.stride()[1:] == (q.shape[2], 1)
    num_tokens, num_heads, head_dim = q.shape
    q_out, k_out = empty(*q.shape), empty(*k.shape)
    layout = num_tokens, num_heads, k.shape[1], head_dim
    tables = cos, sin, positions
    call("norm_rope", q, q.stride(0), k, k.stride(0), q_weight, k_weight, eps, *tables, q_out, k_out, *layout)
    return q_out, k_out


def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    """See `nanovllm.layers.activation.silu_and_mul`; gate and up are columns of one tensor."""
    assert gate.stride() == up.stride() and gate.stride(1) == 1
    out = empty(*gate.shape)
    call("silu_and_mul", gate, up, gate.stride(0), out, *gate.shape)
    return out


def sample(logits: Tensor, temperatures: Tensor | None, uniforms: Tensor | None) -> Tensor:
    """See `nanovllm.layers.sampler.sample`."""
    tokens = empty(logits.shape[0], dtype=torch.int64)
    call("sample", logits, _row_stride(logits), temperatures, uniforms, tokens, *logits.shape)
    return tokens


def _row_stride(x: Tensor) -> int:
    assert x.stride(1) == 1
    return x.stride(0)
