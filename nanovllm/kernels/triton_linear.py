"""Products with a weight by one Triton kernel, whose result for a row depends, to the last bit, on that row alone.

Libraries choose tiles, and how a sum is cut up, by the number of rows. Here they depend only on the weight.
Legend: T tokens, N/K outputs/inputs of a layer.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


class TritonWeight:
    """A [N, K] weight, which it keeps as it is."""

    def __init__(self, weight: Tensor):
        self.weight = weight.data
        self.shape, self.nbytes = weight.shape, weight.nbytes

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, K] -> [T, N]; rows of `x` may be strided."""
        (num_rows, k), n = x.shape, self.shape[0]
        out = x.new_empty(num_rows, n)
        config = linear_config(n, x.dtype)
        grid = triton.cdiv(num_rows, config["ROWS"]), triton.cdiv(n, config["COLUMNS"])
        _linear_kernel[grid](x, self.weight, bias, out, num_rows, x.stride(0), N=n, K=k, **config)
        return out

    def rows(self, ids: Tensor) -> Tensor:
        """[T] int64 -> [T, K], those rows of the weight."""
        return F.embedding(ids, self.weight)


def linear_config(n: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows and columns of a tile, products a step (DEPTH), warps, stages: narrow tiles where else few would be busy."""
    if dtype == torch.float32:  # no tensor cores
        return {"ROWS": 32, "COLUMNS": 32, "DEPTH": 32, "num_warps": 4, "num_stages": 2}
    columns = 128 if n >= 8192 else 64 if n >= 4096 else 32
    return {"ROWS": 64, "COLUMNS": columns, "DEPTH": 64, "num_warps": 4, "num_stages": 3}


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x, weight, bias, out, num_rows, x_stride, N: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """A program computes one tile, in the order of K. Neighbours have the same columns: they share the weight."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    x += rows.to(tl.int64)[:, None] * x_stride + depth[None, :]
    weight += columns.to(tl.int64)[None, :] * K + depth[:, None]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, K, DEPTH):
        x_tile = tl.load(x + start, mask=(rows < num_rows)[:, None] & (start + depth < K)[None, :], other=0.0)
        weight_tile = tl.load(weight + start, mask=(columns < N)[None, :] & (start + depth < K)[:, None], other=0.0)
        acc = tl.dot(x_tile, weight_tile, acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    places = rows.to(tl.int64)[:, None] * N + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < N)[None, :]
    tl.store(out + places, acc.to(out.dtype.element_ty), mask=mask)
