"""Every backend copies the filled slots of blocks, in the order in which the copies are listed."""

import itertools
import random
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from aot import SHARED_LIMIT, compile_kernel
from nanovllm.kernels import flash_attention
from nanovllm.kernels.plain_attention import CPUAttention

BLOCK_SIZE, NUM_BLOCKS = 16, 9
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def get_backend(name: str):
    if name == "cpu":
        return CPUAttention
    if name == "flash":  # what it does without Triton
        cache_shape = flash_attention._PagedAttention.cache_shape
        return SimpleNamespace(cache_shape=cache_shape, copy_blocks=flash_attention.copy_blocks)
    pytest.importorskip("triton", reason="triton is published for Linux only")
    return import_module("nanovllm.kernels.triton_attention").TritonAttention


def slots(backend, cache: torch.Tensor) -> torch.Tensor:
    """The cache as [blocks, block_size, KH, D]."""
    return cache.transpose(1, 2) if backend is CPUAttention else cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_kv_heads, head_dim", [(1, 16), (2, 64), (3, 80)])
@pytest.mark.parametrize("name", ["cpu", "flash", "triton"])
def test_copies_are_done_in_order_and_of_filled_slots_only(name, num_kv_heads, head_dim, dtype):
    torch.manual_seed(0)
    backend, rng = get_backend(name), random.Random(0)
    chain = [(0, 1, 16), (1, 2, 5), (5, 1, 3), (2, 5, 1)]  # sources that were targets, and targets that were sources
    copies = chain + [(*rng.sample(range(NUM_BLOCKS), 2), rng.randrange(1, BLOCK_SIZE)) for _ in range(20)]
    shape = backend.cache_shape(NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_dim)
    caches = [torch.randn(shape).to(dtype) for _ in range(2)]
    expected = [slots(backend, cache).clone() for cache in caches]
    for (source, target, num_filled), cache in itertools.product(copies, expected):
        cache[target, :num_filled] = cache[source, :num_filled]
    caches = [cache.to(DEVICE) for cache in caches]
    backend.copy_blocks(*caches, torch.tensor(copies).to(DEVICE))
    assert all(torch.equal(slots(backend, cache).cpu(), x) for cache, x in zip(caches, expected, strict=True))


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_the_kernel_compiles_for_each_architecture_and_its_copies_wait_for_each_other(arch):
    get_backend("triton")
    kernel = import_module("nanovllm.kernels.triton_attention")._copy_kernel
    signature = {"k_cache": "*bf16:16", "v_cache": "*bf16:16", "copies": "*i64:16", "num_copies": "i32"}
    binary = compile_kernel(kernel, signature, {"ROW": 1024, "BLOCK": 256 * 1024, "CHUNK": 1024}, arch)
    assert binary.spilled == 0 and binary.shared == 0
    assert binary.ptx.count("bar.sync") == 1
    assert binary.ptx.index("ld.global.v") < binary.ptx.index("st.global.v") < binary.ptx.index("bar.sync")
