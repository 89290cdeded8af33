"""Products with a weight by one Triton kernel, whose result for a row depends, to the last bit, on that row alone.

Libraries choose tiles, and how a sum is cut up, by the number of rows. Here they depend only on the weight, unless who
launches the kernel says otherwise. Quantised weights (`triton_quantized.py`) are dequantised a tile at a time, in
registers: what is multiplied is the dequantised weight in the dtype of the input, as if it were stored so.
Legend: T tokens, N/K outputs/inputs of a layer.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

E4M3_SCALE = tl.constexpr(2.0**120)  # what fp32 makes of the bits of e4m3, whose exponents have another bias


class TritonWeight:
    """A [N, K] weight, which it keeps as it is."""

    def __init__(self, weight: Tensor):
        self.values = weight.data
        self.shape, self.nbytes = weight.shape, weight.nbytes

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, K] -> [T, N]; rows of `x` may be strided."""
        num_rows, n = x.shape[0], self.shape[0]
        out = x.new_empty(num_rows, n)
        sizes, config = plain_sizes(self.values), linear_config(n, x.dtype)
        grid = triton.cdiv(num_rows, config["ROWS"]), triton.cdiv(n, config["COLUMNS"])
        steps = triton.cdiv(sizes["K"], config["DEPTH"])
        linear_kernel[grid](
            x, self.values, None, None, bias, out, None, num_rows, x.stride(0), steps, **sizes, **config
        )
        return out

    def rows(self, ids: Tensor) -> Tensor:
        """[T] int64 -> [T, K], those rows of the weight."""
        return F.embedding(ids, self.values)


def plain_sizes(weight: Tensor) -> dict[str, int | str]:
    """What `product` asks of a [N, K] weight that is not quantised."""
    n, k = weight.shape
    return {"N": n, "K": k, "WIDTH": k, "GROUP": k, "KIND": "plain"}


def linear_config(n: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows and columns of a tile, products a step (DEPTH), warps, stages: narrow tiles where else few would be busy."""
    if dtype == torch.float32:  # no tensor cores
        return {"ROWS": 32, "COLUMNS": 32, "DEPTH": 32, "num_warps": 4, "num_stages": 2}
    columns = 128 if n >= 8192 else 64 if n >= 4096 else 32
    return {"ROWS": 64, "COLUMNS": columns, "DEPTH": 64, "num_warps": 4, "num_stages": 3}


@triton.jit(do_not_specialize=["num_rows", "steps"])
def linear_kernel(
    x, values, scales, zeros, bias, out, partial, num_rows, x_stride, steps,
    N: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """A program computes one tile, or its share of `steps` steps, in the order of K.

    Neighbours have the same columns: they share the weight. Several shares go to `partial`, [shares, T, N].
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rows, is_row = rows.to(tl.int64)[:, None], (rows < num_rows)[:, None]
    begin = tl.program_id(2) * steps * DEPTH
    acc = product(
        x + rows * x_stride, is_row, values, scales, zeros, columns, begin, tl.minimum(begin + steps * DEPTH, WIDTH),
        N, K, WIDTH, GROUP, KIND, ROWS, COLUMNS, DEPTH
    )  # fmt: skip
    places, mask = rows * N + columns[None, :], is_row & (columns < N)[None, :]
    if partial is not None:  # one binary for sums that are cut up and others
        partial += tl.program_id(2).to(tl.int64) * num_rows * N
        tl.store(partial + places, acc, mask=mask & (tl.num_programs(2) > 1))
    if bias is not None:
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + places, acc.to(out.dtype.element_ty), mask=mask & (tl.num_programs(2) == 1))


@triton.jit
def product(
    x, is_row, values, scales, zeros, columns, begin, end,
    N: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """[ROWS, COLUMNS] in fp32: the rows at `x`, [ROWS, 1], times what `begin` to `end` of the weight's WIDTH holds.

    KIND is "plain", or as in `TritonQuantizedWeight`, where DEPTH divides GROUP unless all of K is one group.
    """
    depth = tl.arange(0, DEPTH)
    values += columns.to(tl.int64)[None, :] * WIDTH + depth[:, None]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(begin, end, DEPTH):
        tile = tl.load(values + start, mask=(columns < N)[None, :] & (start + depth < WIDTH)[:, None], other=0)
        if KIND == "int4":
            acc = _add(acc, x, is_row, tile & 15, scales, zeros, columns, start, N, K, GROUP, KIND, DEPTH)
            acc = _add(acc, x, is_row, tile >> 4, scales, zeros, columns, WIDTH + start, N, K, GROUP, KIND, DEPTH)
        else:
            acc = _add(acc, x, is_row, tile, scales, zeros, columns, start, N, K, GROUP, KIND, DEPTH)
    return acc


@triton.jit
def _add(
    acc, x, is_row, codes, scales, zeros, columns, start,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """`acc` and the product of inputs from `start` on with the [DEPTH, COLUMNS] weights for them, all of one group."""
    k = start + tl.arange(0, DEPTH)[None, :]
    x_tile = tl.load(x + k, mask=is_row & (k < K), other=0.0)
    if KIND == "plain":
        weight = codes
    else:
        places, mask = columns * ((K + GROUP - 1) // GROUP) + start // GROUP, (columns < N) & (start < K)
        scale = tl.load(scales + places, mask=mask, other=0.0).to(tl.float32)
        if KIND == "fp8":
            bits = (codes.to(tl.int32) & 0x80) << 24 | (codes.to(tl.int32) & 0x7F) << 20
            number = bits.to(tl.float32, bitcast=True) * E4M3_SCALE
        else:
            # 2**23 + code by its bits, less 2**23 + zero: conversions of integers are slower than additions.
            number = (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
            if zeros is None:
                number -= 8388608.0 + (8 if KIND == "int4" else 128)
            else:
                number -= (8388608.0 + tl.load(zeros + places, mask=mask, other=0).to(tl.float32))[None, :]
        weight = (number * scale[None, :]).to(x_tile.dtype)
    return tl.dot(x_tile, weight, acc, input_precision="ieee")
