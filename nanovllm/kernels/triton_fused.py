"""The small operations between the GEMMs as Triton kernels: plain PyTorch's arithmetic in fewer passes over memory.

The number of rows is a grid's size; all that a kernel is compiled for (widths, divisibility of strides and addresses
by 16) is the model's, so that once it has run no batch compiles it anew. Rows may be strided but not what is in them.

Legend: T tokens, N features, I intermediate size, H/KH query/KV heads, D head_dim, S sequences, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048  # tokens of the vocabulary that one program of the sampler sees


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[T, N] `x` and residual stream, None at its start -> the norm of their sum, and the sum."""
    size, block = x.shape[1], triton.next_power_of_2(x.shape[1])
    normed = x.new_empty(x.shape)
    total = x if residual is None else torch.empty_like(normed)
    strides = x.stride(0), (x if residual is None else residual).stride(0)
    _add_rms_norm_kernel[(len(x),)](
        x, residual, weight, normed, total, *strides, eps, size, block, num_warps=min(max(block // 256, 1), 16)
    )
    return normed, total


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, normed_ptr, total_ptr, x_stride, residual_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < SIZE
    x = tl.load(x_ptr + row * x_stride + cols, mask, 0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + cols, mask, 0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * SIZE + cols, x, mask)
    x32 = x.to(tl.float32)
    normed = (x32 * tl.rsqrt(tl.sum(x32 * x32) / SIZE + eps)).to(x.dtype)
    tl.store(normed_ptr + row * SIZE + cols, normed * tl.load(weight_ptr + cols, mask), mask)


def norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
    cos: Tensor, sin: Tensor, positions: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rotates [T, H, D] and [T, KH, D], normalised if weights are given; `cos`, `sin` are [max_len, D / 2] float32."""
    num_heads, num_kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    blocks = [triton.next_power_of_2(n) for n in (num_heads, num_kv_heads, head_dim // 2)]
    _norm_rope_kernel[(len(q),)](
        q, k, q_weight, k_weight, q_out, k_out, cos, sin, positions, q.stride(0), k.stride(0), eps,
        num_heads, num_kv_heads, head_dim, *blocks, num_warps=min(max(blocks[0] * blocks[2] // 256, 1), 8),
    )  # fmt: skip
    return q_out, k_out


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def _norm_rope_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, positions_ptr, q_stride, k_stride,
    eps, H: tl.constexpr, KH: tl.constexpr, D: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_KH: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    angles = tl.load(positions_ptr + row) * (D // 2) + cols
    cos, sin = tl.load(cos_ptr + angles, cols < D // 2), tl.load(sin_ptr + angles, cols < D // 2)
    _rotate(q_ptr + row * q_stride, q_weight_ptr, q_out_ptr + row * H * D, cos, sin, eps, H, D, BLOCK_H, cols)
    _rotate(k_ptr + row * k_stride, k_weight_ptr, k_out_ptr + row * KH * D, cos, sin, eps, KH, D, BLOCK_KH, cols)


@triton.jit
def _rotate(x_ptr, weight_ptr, out_ptr, cos, sin, eps, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, cols):
    """One token's heads. The halves of a head, which rotate into each other, are two tiles."""
    heads = tl.arange(0, BLOCK)[:, None]
    in_half = cols < D // 2
    mask = (heads < H) & in_half
    first, second = heads * D + cols, heads * D + D // 2 + cols
    x1, x2 = tl.load(x_ptr + first, mask, 0.0), tl.load(x_ptr + second, mask, 0.0)
    if weight_ptr is not None:
        a, b = x1.to(tl.float32), x2.to(tl.float32)
        scale = tl.rsqrt(tl.sum(a * a + b * b, 1, keep_dims=True) / D + eps)
        x1 = (a * scale).to(x1.dtype) * tl.load(weight_ptr + cols, in_half)
        x2 = (b * scale).to(x2.dtype) * tl.load(weight_ptr + D // 2 + cols, in_half)
    x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
    tl.store(out_ptr + first, x1 * cos - x2 * sin, mask)
    tl.store(out_ptr + second, x2 * cos + x1 * sin, mask)


def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    """[T, I] and [T, I] -> [T, I]."""
    num_tokens, size = gate.shape
    out = gate.new_empty(num_tokens, size)
    block = min(triton.next_power_of_2(size), 1024)
    _silu_and_mul_kernel[num_tokens, triton.cdiv(size, block)](gate, up, out, gate.stride(0), up.stride(0), size, block)
    return out


@triton.jit
def _silu_and_mul_kernel(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + cols, cols < SIZE)
    up = tl.load(up_ptr + row * up_stride + cols, cols < SIZE)
    gate32 = gate.to(tl.float32)
    tl.store(out_ptr + row * SIZE + cols, (gate32 / (1 + tl.exp(-gate32))).to(gate.dtype) * up, cols < SIZE)


def sample(logits: Tensor, temperatures: Tensor | None, uniforms: Tensor | None) -> Tensor:
    """`nanovllm.layers.sampler.sample`, reading the logits once, and again the chunk in which the token is."""
    num_seqs, vocab_size = logits.shape
    if temperatures is None:
        temperatures = logits.new_zeros(num_seqs, dtype=torch.float32)
        uniforms = logits.new_zeros(num_seqs, dtype=torch.float64)
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    maxima = logits.new_empty(num_seqs, num_chunks, dtype=torch.float32)
    sums = torch.empty_like(maxima)
    tokens = logits.new_empty(num_seqs, dtype=torch.int64)
    sizes = logits.stride(0), vocab_size, CHUNK
    _sum_kernel[num_seqs, num_chunks](logits, temperatures, maxima, sums, *sizes)
    _pick_kernel[(num_seqs,)](
        logits, temperatures, uniforms, maxima, sums, tokens, *sizes, triton.next_power_of_2(num_chunks), num_warps=8
    )
    return tokens


@triton.jit(do_not_specialize_on_alignment=["temperatures_ptr"])
def _sum_kernel(logits_ptr, temperatures_ptr, maxima_ptr, sums_ptr, stride, V: tl.constexpr, CHUNK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x = _load_chunk(logits_ptr + row * stride, chunk, V, CHUNK)
    index = row * tl.num_programs(1) + chunk
    tl.store(maxima_ptr + index, tl.max(x, 0))
    tl.store(sums_ptr + index, tl.sum(_softmax_weights(x, tl.load(temperatures_ptr + row)), 0))


@triton.jit(do_not_specialize_on_alignment=["temperatures_ptr", "uniforms_ptr"])
def _pick_kernel(
    logits_ptr, temperatures_ptr, uniforms_ptr, maxima_ptr, sums_ptr, tokens_ptr, stride,
    V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures_ptr + row)
    uniform = tl.where(temperature > 0, tl.load(uniforms_ptr + row), 0.0)
    chunks = tl.arange(0, BLOCK)
    num_chunks: tl.constexpr = (V + CHUNK - 1) // CHUNK
    maxima = tl.load(maxima_ptr + row * num_chunks + chunks, chunks < num_chunks, -float("inf"))
    sums = tl.load(sums_ptr + row * num_chunks + chunks, chunks < num_chunks, 0.0)
    chunk, uniform = _invert(_softmax_weights(maxima, temperature).to(tl.float64) * sums, uniform, BLOCK)
    x = _load_chunk(logits_ptr + row * stride, chunk, V, CHUNK)
    token, _ = _invert(_softmax_weights(x, temperature).to(tl.float64), uniform, CHUNK)
    tl.store(tokens_ptr + row, chunk * CHUNK + token)


@triton.jit
def _load_chunk(row_ptr, chunk, V: tl.constexpr, CHUNK: tl.constexpr):
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    return tl.load(row_ptr + tokens, tokens < V, -float("inf")).to(tl.float32)


@triton.jit
def _softmax_weights(x, temperature):
    """exp((x - max(x)) / temperature), of which temperature 0 leaves a 1 at each maximum."""
    maximum = tl.max(x, 0)
    weights = tl.where(x == maximum, 1.0, tl.exp((x - maximum) * (1 / temperature)))
    return tl.where(x > -float("inf"), weights, 0.0)  # else NaN where all of `x` is -inf


@triton.jit
def _invert(weights, uniform, SIZE: tl.constexpr):
    """The index at `uniform` of the float64 weights' sum, and how far into its weight that is, as a share of it.

    The index has a positive weight (where any has) even if rounding puts the target past the end or between two.
    """
    indices = tl.arange(0, SIZE)
    cdf = tl.cumsum(weights, 0)
    target = uniform * tl.max(cdf, 0)
    index = tl.min(tl.where((cdf > target) & (weights > 0), indices, SIZE), 0)
    index = tl.minimum(index, tl.max(tl.where(weights > 0, indices, 0), 0))
    weight = tl.sum(tl.where(indices == index, weights, 0.0), 0)
    before = tl.sum(tl.where(indices == index, cdf, 0.0), 0) - weight
    return index, (target - before) / weight
