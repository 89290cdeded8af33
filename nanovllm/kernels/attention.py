"""Backends of causal attention over a paged KV cache: what each has to offer, and the choice between them.

Legend: T tokens in the step, S sequences, H/KH query/KV heads, D head_dim.
"""

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from nanovllm.kernels.cpu import load_kernels
from nanovllm.kernels.flash_attention import Opened, open_flash_attn, open_torch_varlen
from nanovllm.kernels.fused import triton_problem
from nanovllm.kernels.plain_attention import CPUAttention, has_kernels
from nanovllm.utils.checks import first_line, require
from nanovllm.utils.context import Context
from nanovllm.utils.device import NotACudaDevice, gpu_capability

TOLERANCE = 0.05  # of a backend that is tried: above the rounding of any dtype, below what a wrong key or row makes
logger = logging.getLogger("nanovllm")


class Heads(Protocol):
    """Of a layer's attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


class AttentionBackend(Protocol):
    """How keys and values are stored and read. Stateless; `k_cache` and `v_cache` are one layer's."""

    block_size: int  # the smallest with which it is as fast as with any

    @staticmethod
    def cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """The layout of `k_cache` and of `v_cache`."""

    @staticmethod
    def store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
        """Writes [T, KH, D] keys and values to their slots; slot -1 is not stored."""

    @staticmethod
    def copy_blocks(k_cache: Tensor, v_cache: Tensor, copies: Tensor) -> None:
        """For each of [n, 3] int64 `copies`, a source block, a target block and a number of slots, in this order:
        copies so many of the first slots. A block may be a target that was a source before, or the other way round.
        """

    @staticmethod
    def prefill(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, context: Context) -> Tensor:
        """[T, H, D] new queries over cached prefix and new keys, causal, aligned at the end. Returns [T, H, D]."""

    @staticmethod
    def decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, context: Context) -> Tensor:
        """[S, H, D] queries, one a sequence, over everything in the cache. Returns [S, H, D].

        On CUDA it must not wait for the device, so that a graph can hold it; a row of length 0 may return anything.
        """


def open_triton(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> Opened:
    gpu_capability(device)
    require(triton_problem() is None, triton_problem())
    require(16 <= head_dim <= 256, f"it needs a head_dim of 16 to 256, the model has {head_dim}")
    return import_module("nanovllm.kernels.triton_attention").TritonAttention, "triton"


def open_invariant(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> Opened:
    open_triton(device, dtype, head_dim, block_size)
    return import_module("nanovllm.kernels.triton_invariant_attention").InvariantTritonAttention, "triton, invariant"


def open_cpu(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> Opened:
    is_compiled = device.type == "cpu" and has_kernels(torch.empty(0, head_dim, dtype=dtype))
    return CPUAttention, f"cpu (C++), {load_kernels().target}" if is_compiled else "cpu (plain PyTorch)"


# In the order in which "auto" tries them. Each returns a backend and what to call it, or raises why there is none here.
BACKENDS: dict[str, Callable[[torch.device, torch.dtype, int, int], Opened]] = {
    "flash_attn": open_flash_attn,
    "triton": open_triton,
    "torch_varlen": open_torch_varlen,
    "cpu": open_cpu,
}


def choose_backend(
    name: str, device: torch.device, dtype: torch.dtype, layer: Heads, block_size: int | None,
    batch_invariant: bool = False
) -> AttentionBackend:  # fmt: skip
    """The backend called `name`; "auto" is the first of `BACKENDS` that works here, and logs why no earlier one does.

    A `block_size` of None is each backend's own. `batch_invariant` leaves of those for CUDA one, "triton" in another
    form. ValueError if what was asked for cannot run here, and why.
    """
    reasons = []
    openers = {"triton": open_invariant} if batch_invariant and device.type == "cuda" else BACKENDS
    for candidate in openers if name == "auto" else [name]:
        try:
            backend, label = openers[candidate](device, dtype, layer.head_dim, block_size or 256)  # which all take
            if backend is not CPUAttention:
                _check_outputs(backend, device, dtype, layer, block_size or backend.block_size)
        except Exception as error:  # whatever a compiler or a library raises
            if name != "auto":
                raise ValueError(f"attention_backend={name!r} does not work here: {error}; 'auto' finds one") from error
            if device.type == "cuda" or not isinstance(error, NotACudaDevice):  # of which a CPU's log need not speak
                reasons.append(f"not {candidate}: {first_line(error)}")
        else:
            level = logging.WARNING if device.type == "cuda" and backend is CPUAttention else logging.INFO
            logger.log(level, "; ".join([f"attention: {label}", *reasons]))
            return backend
    raise ValueError(f"batch_invariant=True does not work here: {'; '.join(reasons)}; leave it out")


def _check_outputs(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, layer: Heads, block_size: int
) -> None:
    """Kernels may be built for other GPUs, their compiler may be missing, and some releases compute wrong numbers."""
    generator, num_heads, num_kv_heads = torch.Generator().manual_seed(0), layer.num_heads, layer.num_kv_heads
    shapes = (79, num_heads), (block_size + 86, num_kv_heads), (block_size + 86, num_kv_heads)
    q, k, v = (
        torch.randn(*shape, layer.head_dim, dtype=torch.float32, generator=generator, device="cpu").to(device, dtype)
        for shape in shapes
    )
    q = 3 * q  # of many keys a query sees a few
    ours = _probe(backend, q, k, v, block_size)
    truth = _probe(CPUAttention, q.float(), k.float(), v.float(), block_size)  # later: its memory was never `ours`
    for name, out in ours.items():
        error = (out - truth[name]).abs().max().item()
        require(error <= TOLERANCE, f"its {name} is off by {error:.2g}")  # and so is NaN


def _probe(backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, block_size: int) -> dict[str, Tensor]:
    """The last 70 of a block and 77 tokens, of which the others are in the cache, and 9 that are a sequence's first:
    enough and few enough for whatever kernels tell apart.

    [79, H, D] queries, [block_size + 86, KH, D] keys and values.
    """
    device, lens = q.device, [block_size + 77, 9]
    columns = -(-(max(lens) + 1024) // block_size)  # for which kernels split the keys, as they do later
    tables = torch.arange(2 * columns, dtype=torch.int32, device=device).flip(0).view(2, columns)
    positions = [torch.arange(n, device=device) for n in lens]
    slots = [row[p // block_size] * block_size + p % block_size for row, p in zip(tables, positions, strict=True)]
    shape = backend.cache_shape(2 * columns, block_size, *k.shape[1:])
    caches = [torch.zeros(shape, dtype=q.dtype, device=device) for _ in "kv"]
    backend.store(k, v, *caches, torch.cat(slots))
    backend.copy_blocks(*caches, torch.zeros(1, 3, dtype=torch.int64, device=device))  # of no slots
    bounds_q, bounds_k, lens_k = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 70, 79], [0, lens[0], sum(lens)], lens)
    )
    alone = Context(bounds_q, bounds_q, 70, 70)
    cached = Context(bounds_q, bounds_k, 70, max(lens), lens_k, tables)
    decode = Context(max_seqlen_k=max(lens), context_lens=lens_k, block_tables=tables)
    return {
        "prefill": backend.prefill(q, k[-79:], v[-79:], *caches, alone),
        "prefill over a cached prefix": backend.prefill(q, k[-79:], v[-79:], *caches, cached),
        "decode": backend.decode(q[[69, 78]], *caches, decode),
    }
