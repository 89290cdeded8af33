"""The CPU's kernels for bf16, in C++: GEMM over reordered weights, paged attention, the small operations between them.

Legend: T tokens in the step, S sequences, H/KH query/KV heads, D head_dim, V vocabulary, B block-table columns.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.cpu.compiled import call, empty, load_kernels
from nanovllm.kernels.quantized import QuantizedWeight
from nanovllm.utils.context import Context

GROUP, PANEL = 128, 32  # as in linear.cpp
SCALE_BYTES = 4  # of a token's keys or values of a head, in a cache in int8
NEEDS = (
    "what the compiled kernels need: dtype='bfloat16', a processor with AVX2 or Arm's dot products, a C++ compiler, "
    "head_dim of at most 256"
)


def has_kernels(x: Tensor, inputs: int = 0, head_dim: int = 0) -> bool:
    """Whether the functions below take such tensors, products of so many inputs, and heads of so many values."""
    fits = x.dtype == torch.bfloat16 and x.device.type == "cpu" and inputs % 4 == 0 and head_dim <= 256
    return fits and load_kernels() is not None


def set_num_threads(count: int) -> None:
    """How many threads work for the calling one from now on; by default `default_threads()`. They end with it."""
    load_kernels().set_num_threads(count)


class PackedWeight:
    """A [N, K] bf16 weight whose memory is reordered in place for `linear`; the tensor it was means nothing after.

    K must be a multiple of 4. If N is none of 32, it is a copy that is, with rows of zeros at its end.
    """

    kind = "bf16"
    more: tuple[int, ...] = ()  # that its functions take after N and K

    def __init__(self, weight: Tensor):
        self.shape = weight.shape
        padded = _pad_rows(weight)
        self.parts = [padded]
        call("pack_bf16", padded, *padded.shape)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, K] bf16 -> [T, N] bf16."""
        assert x.stride(1) == 1
        out = empty(x.shape[0], self.shape[0])
        call("linear_" + self.kind, x, x.stride(0), *self.parts, bias, out, x.shape[0], *self.shape, *self.more)
        return out

    def rows(self, ids: Tensor) -> Tensor:
        """[T] int64 -> [T, K] bf16, those rows of the weight."""
        out = empty(ids.shape[0], self.shape[1])
        call("rows_" + self.kind, *self.parts[:2], ids, out, *out.shape)
        return out


class Int8Weight(PackedWeight):
    """A [N, K] weight in int8, symmetric, with a scale for each of the N outputs.

    Activations are quantised on the fly, each 128 of a token with a scale of their own, so that an outlier costs only
    its neighbours their precision.

    Args:
        weight: In bf16; or the int8 codes of one that is quantised.
        scales: [N], with codes.
    """

    kind = "int8"

    def __init__(self, weight: Tensor, scales: Tensor | None = None):
        self.shape = weight.shape
        padded = _pad_rows(weight)
        n, k = padded.shape
        compensation = torch.empty(n * -(-k // GROUP), dtype=torch.int32)  # of activations stored as unsigned
        values = torch.empty(n, k, dtype=torch.int8)
        if scales is None:
            scales = torch.empty(n, dtype=torch.float32)
            call("pack_int8", padded, n, k, values, scales, compensation)
        else:
            scales = F.pad(scales.float(), (0, n - len(scales)))
            call("pack_codes", padded, n, k, values, compensation)
        self.parts = [values, scales, compensation]


class Int4Weight(PackedWeight):
    """A [N, K] weight in 4 bits, asymmetric: each `group_size` inputs of an output have a scale and a zero point.

    K is so many, which are 16, 32, 64 or 128. Activations are quantised as for int8.
    """

    kind = "int4"

    def __init__(self, weight: Tensor, group_size: int = 128):
        padded = _pad_rows(weight)
        (n, k), blocks = padded.shape, -(-weight.shape[1] // GROUP)
        groups = n // PANEL, blocks * GROUP // group_size, PANEL
        self.shape, self.more = weight.shape, (group_size,)
        self.parts = [
            torch.zeros(n, blocks * GROUP // 2, dtype=torch.uint8),
            torch.zeros(groups, dtype=torch.float16),
            torch.zeros(groups, dtype=torch.uint8),
            torch.empty(n),
        ]  # codes, scales, zero points, factors of the scales
        call("quantize_int4", padded, n, k, *self.parts, group_size)

    @classmethod
    def of_codes(cls, codes: QuantizedWeight) -> "Int4Weight":
        """The same of groups of any multiple of 16 inputs, or one. The codes are reordered in place, if they fit."""
        weight, values, (n, k) = cls.__new__(cls), codes.values, codes.shape
        inputs, missing = -(-k // GROUP) * GROUP, -n % PANEL
        group_size = codes.group_size if codes.scales.shape[1] > 1 else inputs
        assert group_size % 16 == 0 and values.is_contiguous()
        if inputs != k or missing:
            values = F.pad(values, (0, (inputs - k) // 2, 0, missing))
        call("pack_int4", values, n + missing, inputs // GROUP)
        scales = codes.scales.float()
        exponents = scales.abs().amax(1).clamp(min=2.0**-100).frexp().exponent
        factors = torch.ldexp(torch.ones(n), exponents - 15)  # 2^-14 to 2^-15 of the largest scale
        zeros = torch.full(scales.shape, 8, dtype=torch.uint8) if codes.zeros is None else codes.zeros
        groups = [(scales / factors.unsqueeze(1)).half(), zeros]
        padding = 0, -(-inputs // group_size) - scales.shape[1], 0, missing
        scales, zeros = (F.pad(x, padding).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous() for x in groups)
        weight.shape, weight.more = codes.shape, (group_size,)
        weight.parts = [values, scales, zeros, F.pad(factors, (0, missing))]
        return weight

    def rows(self, ids: Tensor) -> Tensor:
        """See `PackedWeight.rows`."""
        out = empty(ids.shape[0], self.shape[1])
        call("rows_int4", *self.parts, ids, out, *out.shape, *self.more)
        return out


def _pad_rows(weight: Tensor) -> Tensor:
    """[N, K] with zeros to the next multiple of 32 rows; the weight itself if it has that many."""
    missing = -weight.shape[0] % PANEL
    return F.pad(weight.data, (0, 0, 0, missing)) if missing else weight.data


def is_int8(cache: Tensor) -> bool:
    """Whether a cache is [blocks, KH, block_size, D + 4] uint8, else [blocks, KH, block_size, D] bf16.

    The bytes of a block's head are its [block_size, D] codes, whose zero is a number that suits the instruction set,
    and after them their [block_size] scales in fp32.
    """
    return cache.dtype == torch.uint8


def store(x: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes [T, KH, D] keys or values to their slots of a cache; slot -1 is not stored."""
    assert x.stride()[1:] == (x.shape[2], 1) and slot_mapping.dtype == torch.int64
    kind, sizes = "store_kv_int8" if is_int8(cache) else "store_kv", (*cache.shape[1:3], x.shape[2])
    call(kind, x, x.stride(0), cache, slot_mapping, x.shape[0], *sizes)


def copy_blocks(k_cache: Tensor, v_cache: Tensor, copies: Tensor) -> None:
    """See `nanovllm.kernels.attention.AttentionBackend`."""
    assert copies.is_contiguous() and copies.dtype == torch.int64
    num_kv_heads, block_size, columns = k_cache.shape[1:]
    scale_bytes = SCALE_BYTES if is_int8(k_cache) else 0
    row_bytes = columns * k_cache.itemsize - scale_bytes
    call("copy_blocks", k_cache, v_cache, copies, len(copies), num_kv_heads, block_size, row_bytes, scale_bytes)


def attend(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """[T, H, D] queries over the paged caches `k` and `v`, or over [T, KH, D] new ones if there are no block tables.

    In int8 there are always block tables.
    """
    assert q.is_contiguous() and k.stride()[1:] == v.stride()[1:] and k.stride(-1) == 1
    (num_heads, head_dim), tables, num_seqs = q.shape[1:], context.block_tables, len(context.context_lens)
    columns, block_size = (0, 0) if tables is None else (tables.stride(0), k.shape[2])
    layout = columns, num_seqs, num_heads, k.shape[1], head_dim, block_size, k.stride(0), v.stride(0)
    out = empty(*q.shape)
    kind, layout = ("attend_int8", layout[:-2]) if is_int8(k) else ("attend", layout)
    call(kind, q, k, v, out, context.cu_seqlens_q, context.context_lens, tables, *layout)
    return out


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `nanovllm.layers.layernorm.RMSNorm.add_norm`."""
    assert x.is_contiguous() and (residual is None or residual.is_contiguous())
    out = empty(*x.shape)
    total = x if residual is None else empty(*x.shape)
    call("add_rms_norm", x, residual, weight, eps, total, out, *x.shape)
    return out, total


def norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
    cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `nanovllm.layers.rotary_embedding.RotaryEmbedding.forward`."""
    assert q.stride()[1:] == k.stride()[1:] == (q.shape[2], 1)
    q_out, k_out, (num_tokens, num_heads, head_dim) = empty(*q.shape), empty(*k.shape), q.shape
    tables, layout = (cos, sin, positions), (num_tokens, num_heads, k.shape[1], head_dim)
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
    assert logits.stride(1) == 1
    tokens = empty(logits.shape[0], dtype=torch.int64)
    call("sample", logits, logits.stride(0), temperatures, uniforms, None, tokens, *logits.shape)
    return tokens


def sample_with_options(
    logits: Tensor, temperatures: Tensor | None, uniforms: Tensor | None, options: object,
    filtered: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `nanovllm.layers.logits_processor.sample_with_options`.

    For tests, rows at random leave in `filtered` [O, V] fp32 what they were drawn from.
    """
    assert logits.stride(1) == 1
    tokens, is_ignored = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(options.rows), dtype=torch.bool)
    indices = [
        _inverse(rows, size)
        for rows, size in (
            (options.rows, len(logits)),
            (options.mask_rows, len(options.rows)),
            (options.processed_rows, len(options.rows)),
        )
    ]
    of_row, of_mask, of_processed = indices
    arrays = [  # in the order of `Options` in sampling.cpp
        of_row, options.top_k, options.top_p, options.log_min_p, of_mask, options.masks,
        options.bias_starts, options.bias_cells, options.biases,
        options.penalty_starts, options.penalty_cells, options.factors, options.subtrahends,
        of_processed, options.processed, is_ignored, filtered,
    ]  # fmt: skip
    addresses = torch.tensor([_address(array) for array in arrays])
    call("sample", logits, logits.stride(0), temperatures, uniforms, addresses, tokens, *logits.shape)
    return tokens, is_ignored


def mask_logits(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """See `nanovllm.layers.logits_processor.apply_masks`."""
    assert logits.stride(1) == 1 and masks.is_contiguous() and (rows.dtype, masks.dtype) == (torch.int64, torch.int32)
    call("mask_logits", logits, logits.stride(0), rows, masks, len(rows), logits.shape[1])


def token_logprobs(logits: Tensor, rows: Tensor, tokens: Tensor, num_top: np.ndarray) -> tuple[Tensor, ...]:
    """See `nanovllm.layers.logits_processor.token_logprobs`."""
    assert logits.stride(1) == 1
    (n,), most = rows.shape, int(num_top.max(initial=0))
    logprobs, ranks = torch.empty(n), torch.empty(n, dtype=torch.int64)
    top_ids, top_logprobs = torch.zeros(n, most, dtype=torch.int64), torch.full((n, most), torch.nan)
    found = logprobs, ranks, top_ids, top_logprobs
    sizes = most, n, logits.shape[1]
    call("token_logprobs", logits, logits.stride(0), rows, tokens, torch.from_numpy(num_top), *found, *sizes)
    return found


def _inverse(rows: np.ndarray | None, size: int) -> np.ndarray | None:
    """[size] int64: the place in `rows` of each, or -1."""
    if rows is None:
        return None
    inverse = np.full(size, -1)
    inverse[rows] = np.arange(len(rows))
    return inverse


def _address(array: np.ndarray | Tensor | None) -> int:
    return 0 if array is None else array.data_ptr() if isinstance(array, Tensor) else array.ctypes.data
