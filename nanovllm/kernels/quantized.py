"""Weights in 4 or 8 bits, in one form whatever a checkpoint's own, and their product in plain PyTorch.

Legend: T tokens, N/K outputs/inputs of a layer, G groups of inputs that share a scale.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL_VALUES = 2**21  # that are dequantised at a time: in fp32 8 MiB
SHRINKS = 1.0, 0.95, 0.9, 0.85, 0.8, 0.7  # of a group's range, which are tried


class QuantizedWeight:
    """weight[n, k] = (code[n, k] - zero[n, g]) * scale[n, g] where g = k // group_size, computed in fp32.

    Args:
        values: The codes: [N, K / 2] uint8 with two of 4 bits a byte, the low ones first; or [N, K] int8, or fp8.
        scales: [N, G], of any floating dtype.
        zeros: [N, G] uint8 for 4 bits, int16 for 8; None: all are 8 for 4 bits, else 0.
        group_size: G is ceil(K / group_size).
    """

    def __init__(self, values: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int):
        self.values, self.scales, self.zeros, self.group_size = values, scales, zeros, group_size
        self.has_4_bits = values.dtype == torch.uint8
        self.shape = values.shape[0], values.shape[1] * (2 if self.has_4_bits else 1)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.values, self.scales, self.zeros) if part is not None)

    def dequantize(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """[n, K] fp32 of n rows."""
        values = self.values[rows]
        codes = unpack_4_bits(values).float() if self.has_4_bits else values.float()
        if self.zeros is not None:
            codes -= self._per_value(self.zeros[rows].float())
        elif self.has_4_bits:
            codes -= 8
        return codes.mul_(self._per_value(self.scales[rows].float()))

    def _per_value(self, of_groups: Tensor) -> Tensor:
        """[n, G] -> [n, K], or [n, 1] if all are in one group."""
        if of_groups.shape[1] == 1:
            return of_groups
        return of_groups.repeat_interleave(self.group_size, 1)[:, : self.shape[1]]

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, K] -> [T, N], with a panel of the weight at a time."""
        size = max(1, PANEL_VALUES // self.shape[1])
        panels = (self.dequantize(slice(i, i + size)) for i in range(0, self.shape[0], size))
        out = torch.cat([F.linear(x, panel.to(x.dtype)) for panel in panels], 1)
        return out if bias is None else out + bias

    def rows(self, ids: Tensor) -> Tensor:
        """[T] int64 -> [T, K] fp32, those rows of the weight."""
        return self.dequantize(ids)


def unpack_4_bits(values: Tensor) -> Tensor:
    """[N, K / 2] -> [N, K] uint8."""
    return torch.stack([values & 15, values >> 4], -1).flatten(-2)


def pack_4_bits(codes: Tensor) -> Tensor:
    """[N, K] -> [N, K / 2] uint8; K is even."""
    codes = codes.to(torch.uint8)
    return codes[:, 1::2] << 4 | codes[:, ::2]


def quantize(weight: Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """A [N, K] weight in 8 bits, symmetric, or in 4; each `group_size` inputs of an output have a scale, K is so many.

    In 4 bits they have also a zero point, and of several scales the one with the least sum of squared errors.
    """
    size = max(1, PANEL_VALUES // weight.shape[1])
    quantize_panel = _quantize_4 if bits == 4 else _quantize_8
    panels = (weight[i : i + size].float().unflatten(1, (-1, group_size)) for i in range(0, len(weight), size))
    values, scales, *zeros = map(torch.cat, zip(*(quantize_panel(x, weight.dtype) for x in panels), strict=True))
    return QuantizedWeight(values, scales, *(zeros or [None]), group_size)


def _quantize_8(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[n, G, group_size] fp32 -> [n, K] int8, [n, G] scales."""
    scales = w.abs().amax(-1, keepdim=True).clamp_(min=1e-30) / 127
    return (w / scales).round_().to(torch.int8).flatten(1), scales.squeeze(-1)


def _quantize_4(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """[n, G, group_size] fp32 -> [n, K / 2], [n, G] scales of `dtype`, [n, G] zeros."""
    low, high = w.amin(-1, keepdim=True).clamp_(max=0), w.amax(-1, keepdim=True).clamp_(min=0)
    full = (high - low).clamp_(min=1e-30) / 15
    zeros = (-low / full).round_()
    scales, least = full, torch.full_like(full, torch.inf)
    for shrink in SHRINKS:
        codes = _codes(w, full * shrink, zeros).sub_(zeros)
        # The best scale for these codes, and twice what it saves of the error: |w - s d|^2 = |w|^2 - 2 s wd + s^2 dd.
        wd, dd = (w * codes).sum(-1, keepdim=True), codes.square_().sum(-1, keepdim=True)
        fitted = (wd / dd.clamp_(min=1)).to(dtype).float()
        error = fitted * (fitted * dd - 2 * wd)
        is_better = (error < least) & (fitted > 0)
        scales, least = torch.where(is_better, fitted, scales), torch.where(is_better, error, least)
    scales = scales.to(dtype)
    codes = _codes(w, scales.float(), zeros)
    return pack_4_bits(codes.flatten(1)), scales.squeeze(-1), zeros.squeeze(-1).to(torch.uint8)


def _codes(w: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return (w / scales).round_().add_(zeros).clamp_(0, 15)
