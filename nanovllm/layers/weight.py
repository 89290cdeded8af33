"""A layer's weight: filled from a checkpoint in whatever format, then what the device computes products with.

Legend: T tokens, N/K outputs/inputs of a layer.
"""

import logging
import mmap
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels import cpu as cpu_kernels
from nanovllm.kernels.fused import triton_problem
from nanovllm.kernels.quantized import QuantizedWeight, pack_4_bits, quantize
from nanovllm.layers.weight_formats import PLAIN, Format
from nanovllm.utils.loader import CheckpointTensor, in_order

GROUP_SIZES = 128, 32  # of quantization="int4"
BITS = {"int4": 4, "int8": 8}
logger = logging.getLogger("nanovllm")


class Kernel(Protocol):
    """An [N, K] weight as some kernels take it."""

    nbytes: int

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, K] -> [T, N]."""

    def rows(self, ids: Tensor) -> Tensor:
        """[T] int64 -> [T, K], those rows of the weight."""


class Weight:
    """The [n, k] weight of a layer on this rank, of the dtype and on the device that are PyTorch's default.

    Args:
        least_bits: What quantisation at load leaves of it: 16, all.
    """

    kernel: Kernel
    format: Format = PLAIN  # in the checkpoint

    def __init__(self, n: int, k: int, least_bits: int = 4):
        self.shape, self.least_bits = (n, k), least_bits
        self.dtype, self.device = torch.get_default_dtype(), torch.get_default_device()
        self.parts: dict[str, Tensor] = {}  # of `QuantizedWeight`, while they are read

    @property
    def nbytes(self) -> int:
        return self.kernel.nbytes

    @property
    def needed(self) -> Iterable[str]:
        """What its tensors are called in a checkpoint."""
        return self.format.parts.keys()

    @property
    def others(self) -> Iterable[str]:
        """What it may have beside these."""
        return self.format.others

    def choose_format(self, found: set[str]) -> None:
        """The plain one if that is what the checkpoint has of this weight, however it has most."""
        if "weight" in found and not found & (self.needed - {"weight"}):
            self.format = PLAIN

    def load(
        self, name: str, loaded: CheckpointTensor, full_shape: tuple[int, int],
        into: slice = slice(None), rows: slice | None = None, columns: slice | None = None, order: Tensor | None = None
    ) -> None:  # fmt: skip
        """Fills the rows `into` from the tensor called `name`, with these rows and columns of a weight of `full_shape`.

        Args:
            order: [m], in which each m of the rows are wanted.

        Raises:
            ShapeError: The tensor is not what the format says.
        """
        if name in self.format.others:
            return self.format.others[name](loaded, full_shape)
        part = self.format.parts[name]
        whole = [slice(0, size) for size in full_shape]
        found = in_order(part.read(loaded, full_shape, rows or whole[0], columns or whole[1]), order)
        if part.target not in self.parts:
            dtype = self.dtype if self.format.is_plain else found.dtype
            self.parts[part.target] = self._empty(found.shape[1], dtype)
        self.parts[part.target][into] = found

    def _empty(self, columns: int, dtype: torch.dtype) -> Tensor:
        """On a CPU in pages of its own, which the system has back once it is converted; malloc would often keep them.

        They are zeros, as are rows that nothing is loaded into.
        """
        if self.device.type != "cpu" or not hasattr(mmap, "MAP_PRIVATE"):
            return torch.zeros(self.shape[0], columns, dtype=dtype, device=self.device)
        pages = mmap.mmap(-1, self.shape[0] * columns * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=dtype).view(self.shape[0], columns)

    def fill(self, noise: Tensor) -> None:
        """Instead of loading, makes a weight of these values, about as large as `noise`, over and over."""
        values, dtype = self._empty(self.shape[1], self.dtype), self.format.dtype
        for part in values.view(-1).split(len(noise)):
            part.copy_(noise[: len(part)])
        if not self.format.is_plain:
            step = {torch.uint8: 0.005, torch.int8: 0.0005}.get(dtype, 0.02)
            codes = values.float() / step
            values = pack_4_bits(codes.round() + 8) if dtype == torch.uint8 else codes.to(dtype)
            groups = self.shape[0], -(-self.shape[1] // (self.format.group_size or self.shape[1]))
            self.parts["scales"] = torch.full(groups, step, dtype=self.dtype, device=self.device)
        self.parts["values"] = values

    def finish(self, quantization: str | None = None, is_invariant: bool = False) -> None:
        """Turns what was loaded into what is computed with, if `is_invariant` so that rows do not depend on others."""
        parts, self.parts = self.parts, {}
        if not self.format.is_plain:
            weight = QuantizedWeight(parts["values"], parts["scales"], parts.get("zeros"), self.format.group_size)
            self.kernel = quantized_kernel(weight, self.dtype)
        else:
            bits = max(BITS.get(quantization, 16), self.least_bits)
            self.kernel = plain_kernel(parts.pop("values"), bits, is_invariant)
        self.linear = self.kernel.linear

    def rows(self, ids: Tensor) -> Tensor:
        """[T] int64 -> [T, K]."""
        return self.kernel.rows(ids).to(self.dtype)


class PlainWeight:
    """As PyTorch takes it."""

    def __init__(self, values: Tensor):
        self.values, self.nbytes = values, values.nbytes

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.values, bias)

    def rows(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.values)


def plain_kernel(values: Tensor, bits: int, is_invariant: bool) -> Kernel:
    """A [N, K] weight to compute with, quantised if `bits` are 4 or 8."""
    k = values.shape[1]
    has_kernels = cpu_kernels.has_kernels(values, inputs=k)
    if bits == 16:
        if is_invariant and values.is_cuda:
            return import_module("nanovllm.kernels.triton_linear").TritonWeight(values)
        return cpu_kernels.PackedWeight(values) if has_kernels else PlainWeight(values)
    group_size = next((size for size in GROUP_SIZES if bits == 4 and k % size == 0), None)
    if has_kernels:
        return cpu_kernels.Int4Weight(values, group_size) if group_size else cpu_kernels.Int8Weight(values)
    return quantized_kernel(quantize(values, 4 if group_size else 8, group_size or k), values.dtype)


def quantized_kernel(weight: QuantizedWeight, dtype: torch.dtype) -> Kernel:
    """A quantised weight to compute with, in activations of `dtype`."""
    if weight.values.is_cuda and triton_problem() is None:
        triton_quantized, group_size = import_module("nanovllm.kernels.triton_quantized"), weight.group_size
        parts = weight.values, weight.scales, weight.zeros
        return triton_quantized.TritonQuantizedWeight(*parts, group_size or weight.shape[1], weight.shape)
    if cpu_kernels.has_kernels(torch.empty(0, dtype=dtype, device=weight.values.device), inputs=weight.shape[1]):
        if weight.values.dtype == torch.int8 and weight.zeros is None and weight.scales.shape[1] == 1:
            return cpu_kernels.Int8Weight(weight.values, weight.scales.flatten())
        if not weight.has_4_bits:
            _say_once(f"weights of {weight.values.dtype} become {dtype}, of twice the memory, which is faster on a CPU")
            return cpu_kernels.PackedWeight(weight.dequantize().to(dtype))
        return cpu_kernels.Int4Weight.of_codes(weight)
    _say_once("quantised weights save memory and no time: each step makes them 16 or 32 bits, a panel at a time")
    return weight


@cache
def _say_once(message: str) -> None:
    logger.info(message)


def check_batch_invariance(dtype: torch.dtype, device: torch.device, head_dim: int, inputs: list[int]) -> None:
    """ValueError if PyTorch would compute something on a CPU, in an order that depends on the number of rows.

    `inputs` are the numbers of inputs of all products.
    """
    nothing = torch.empty(0, dtype=dtype, device=device)
    if device.type == "cpu" and not all(cpu_kernels.has_kernels(nothing, inputs=n, head_dim=head_dim) for n in inputs):
        raise ValueError(
            f"batch_invariant=True needs on a CPU {cpu_kernels.NEEDS}, products of a multiple of 4 inputs; here are "
            f"{dtype}, head_dim={head_dim}, inputs {sorted(set(inputs))}: leave batch_invariant out"
        )
