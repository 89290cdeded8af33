"""Products with weights of 4 or 8 bits or FP8 on GPUs, which read only the codes: a tile is dequantised in registers.

Few rows take as long as the weight takes to arrive, if enough programs ask for it: their sums are cut up, too. The two
codes of a byte belong to inputs half the weight's width apart, so that those of all low, and of all high, halves of a
tile's bytes are neighbours: two products with tiles that are read as they lie, without interleaving anything.
Legend: T tokens, N/K outputs/inputs of a layer, G groups of inputs.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton_linear import linear_config, linear_kernel

KINDS = {torch.uint8: "int4", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
FEW = 32  # rows at most in a product that is bound by the weight's bytes
PROGRAMS = 512  # that keep a GPU busy
SPLIT = 512  # bytes of a row of the weight that one program reads at least


class TritonQuantizedWeight:
    """A [N, K] weight: (code - zero) * scale in fp32, rounded to the dtype of what it is multiplied with.

    Args:
        values: [N, K / 2] uint8 of two 4-bit codes each, the low one first; [N, K] int8; or [N, K] float8_e4m3fn.
            What it holds is reordered, in place if K is a multiple of 32 or the codes have 8 bits.
        scales: [N, G] fp32, fp16 or bf16.
        zeros: [N, G] integers, or None: 8 for 4 bits, else 0.
        group_size: Inputs of a group, a multiple of 16 if there are several; the last one may be short.
        shape: N and K.
    """

    def __init__(self, values: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, shape: tuple[int, int]):
        self.shape, self.kind, (n, k) = torch.Size(shape), KINDS[values.dtype], shape
        width = -(-k // 32) * 16 if self.kind == "int4" else k  # bytes of a row
        num_groups = -(-k // group_size)
        assert values.is_contiguous() and values.shape == (n, k // 2 if self.kind == "int4" else k)
        assert scales.shape == (n, num_groups) and (zeros is None or zeros.shape == scales.shape)
        if self.kind == "int4":
            values = _halves_apart(values, width)
        elif self.kind == "int8":
            values = values.view(torch.uint8).bitwise_xor_(128)  # code + 128
            zeros = None if zeros is None else zeros + 128
        self.values, self.scales = values.view(torch.uint8), scales.contiguous()  # [N, WIDTH], [N, G]
        self.zeros = None if zeros is None else zeros.contiguous()
        self.nbytes = sum(part.nbytes for part in (self.values, self.scales, self.zeros) if part is not None)
        self.sizes = {"N": n, "K": k, "WIDTH": width, "GROUP": group_size, "KIND": self.kind}
        # A tile's weights are of one group, also where those of the high halves begin.
        self.alignment = math.gcd(128, group_size if num_groups > 1 else 128, width if self.kind == "int4" else 128)
        assert self.alignment >= 16, f"groups of {group_size}"

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, K] -> [T, N]; rows of `x` may be strided."""
        num_rows, n = x.shape[0], self.shape[0]
        config = self.config(num_rows, x.dtype)
        tiles = triton.cdiv(num_rows, config["ROWS"]), triton.cdiv(n, config["COLUMNS"])
        num_splits, steps = self.split(tiles[0], config["DEPTH"])
        out = x.new_empty(num_rows, n)
        partial = x.new_empty(num_splits if num_splits > 1 else 0, num_rows, n, dtype=torch.float32)
        linear_kernel[(*tiles, num_splits)](
            x, self.values, self.scales, self.zeros, bias, out, partial, num_rows, x.stride(0), steps,
            **self.sizes, **config,
        )  # fmt: skip
        if num_splits > 1:
            _add_shares_kernel[num_rows, triton.cdiv(n, 1024)](partial, bias, out, num_splits, N=n, COLUMNS=1024)
        return out

    def config(self, num_rows: int, dtype: torch.dtype) -> dict[str, int]:
        """See `linear_config`. A product of one row and one of many have compiled all that others need."""
        if num_rows <= FEW and dtype != torch.float32:
            return {"ROWS": 16, "COLUMNS": 32, "DEPTH": self.depth(256), "num_warps": 4, "num_stages": 3}
        config = linear_config(self.shape[0], dtype)
        num_warps = 8 if config["COLUMNS"] == 128 else 4  # whose registers hold what a tile's codes stand for
        return config | {"DEPTH": self.depth(config["DEPTH"]), "num_warps": num_warps}

    def split(self, row_tiles: int, depth: int) -> tuple[int, int]:
        """Into how many shares the sums are cut up, fewer the more rows there are, and the steps of each."""
        n, width = self.shape[0], self.sizes["WIDTH"]
        num_splits = max(min(PROGRAMS // (row_tiles * triton.cdiv(n, 32)), width // SPLIT), 1)
        steps = triton.cdiv(width, num_splits * depth)
        return triton.cdiv(width, steps * depth), steps

    def depth(self, inputs: int) -> int:
        """Bytes of a row in a tile for so many inputs at most."""
        return min(inputs // 2 if self.kind == "int4" else inputs, self.alignment)

    def rows(self, ids: Tensor) -> Tensor:
        """[T] int64 -> [T, K] fp32, those rows of the weight."""
        values, k = self.values[ids], self.shape[1]
        if self.kind == "fp8":
            values, zeros = values.view(torch.float8_e4m3fn), 0
        elif self.kind == "int8":
            zeros = 128
        else:
            values, zeros = torch.cat([values & 15, values >> 4], 1)[:, :k], 8
        scales, zeros = (
            of.float().repeat_interleave(self.sizes["GROUP"], 1)[:, :k] if isinstance(of, Tensor) else of
            for of in (self.scales[ids], zeros if self.zeros is None else self.zeros[ids])
        )
        return (values.float() - zeros) * scales


def _halves_apart(values: Tensor, width: int) -> Tensor:
    """[N, K / 2] -> [N, width]: code k in the low half of byte k, or in the high half of byte k - width."""
    out = values if values.shape[1] == width else values.new_empty(values.shape[0], width)
    for theirs, ours in zip(values.split(256), out.split(256), strict=True):
        codes = torch.stack([theirs & 15, theirs >> 4], 2).flatten(1)
        ours.copy_(codes[:, :width] | F.pad(codes[:, width:] << 4, (0, 2 * width - codes.shape[1])))
    return out


@triton.jit(do_not_specialize=["num_splits"])
def _add_shares_kernel(partial, bias, out, num_splits, N: tl.constexpr, COLUMNS: tl.constexpr):
    """A program adds up partial sums, [num_splits, T, N], of one row, always in the same order."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    partial += row * N + columns
    acc = tl.zeros([COLUMNS], tl.float32)
    for split in range(num_splits):
        acc += tl.load(partial + split * tl.num_programs(0).to(tl.int64) * N, mask=columns < N, other=0.0)
    if bias is not None:
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)
    tl.store(out + row * N + columns, acc.to(out.dtype.element_ty), mask=columns < N)
