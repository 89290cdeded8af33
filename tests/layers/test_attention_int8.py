"""A KV cache in int8 against plain PyTorch, on each of the processor's instruction sets."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels import cpu as cpu_kernels
from nanovllm.kernels.cpu import SCALE_BYTES
from nanovllm.kernels.plain_attention import CPUAttention
from nanovllm.utils.context import Context

pytestmark = pytest.mark.usefixtures("target")
BF16 = torch.bfloat16
# Head counts and head_dims that fill registers and matrix units and that do not, blocks that divide tiles and do not.
SHAPES = [
    (2, 1, 16, 16), (2, 2, 128, 64), (1, 3, 80, 16), (2, 8, 256, 37), (1, 4, 64, 64), (2, 1, 40, 24), (1, 16, 128, 16),
    (2, 2, 32, 256), (1, 6, 96, 64), (3, 2, 128, 1), (1, 40, 64, 100), (1, 5, 6, 7),
]  # fmt: skip


def empty_cache(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> Tensor:
    """Whose scales are NaN."""
    shape = CPUAttention.cache_shape(num_blocks, block_size, num_kv_heads, head_dim + SCALE_BYTES)
    return torch.full(shape, 255, dtype=torch.uint8)


def contents(cache: Tensor) -> tuple[Tensor, Tensor]:
    """[blocks, KH, block_size, D] codes, as they are stored, and [blocks, KH, block_size] scales."""
    block_size, head_dim = cache.shape[2], cache.shape[3] - SCALE_BYTES
    codes, scales = cache.flatten(2).split([block_size * head_dim, block_size * SCALE_BYTES], -1)
    return codes.unflatten(-1, (block_size, head_dim)), scales.contiguous().view(torch.float32)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] bf16 -> whole numbers [..., D] and scales [..., 1], in fp32."""
    largest = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return (x.float() * (torch.tensor(127.0) / largest)).round(), largest / 127  # 127 / is * 127 after a reciprocal


def quantised(x: Tensor) -> Tensor:
    codes, scales = quantise(x)
    return codes.double() * scales.double()


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[Tq, H, D] over what the cache has of [L, KH, D], in fp64, causal and aligned at the end."""
    k, v = (quantised(x).repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * q.shape[-1] ** -0.5
    hidden = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).triu(k.shape[0] - q.shape[0] + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def test_what_is_stored_is_rounded_to_the_nearest():
    """Every sum of 127 x / max in fp32, and so the same numbers on each instruction set."""
    torch.manual_seed(0)
    x = torch.randn(40, 3, 80, dtype=BF16)[:, :2] * torch.logspace(-33, 33, 40)[:, None, None].to(BF16)
    x[3], x[4, 0, 7], x[5] = 0, -3e38, 0.5  # zeros, an outlier, equal numbers
    x[6, 1, :6] = torch.tensor([127, 0.5, 1.5, -2.5, -0.5, 63.5])  # half-way: to the even one
    x[6, 1, 6:] = 0
    cache, slots = empty_cache(9, 5, 2, 80), torch.randperm(45)[:40]
    before = cache.clone()
    slots[9] = -1
    cpu_kernels.store(x, cache, slots)
    codes, scales = contents(cache)
    found, found_scales = (y.transpose(1, 2).flatten(0, 1)[slots] for y in (codes, scales))
    zero = found[3, 0, 0].int()  # how it is stored
    expected, expected_scales = quantise(x)
    is_stored = slots >= 0
    signed = (found.int() - zero + 128) % 256 - 128
    assert torch.equal(signed[is_stored].float(), expected[is_stored])
    assert torch.equal(found_scales[is_stored], expected_scales[is_stored].squeeze(-1))
    assert expected[6, 1, :6].tolist() == [127, 0, 2, -2, 0, 64]
    unused = torch.ones(45, dtype=torch.bool).index_fill(0, slots[is_stored], False)
    for old, new in zip(contents(before), (codes, scales), strict=True):
        old, new = (y.transpose(1, 2).flatten(0, 1)[unused].view(torch.uint8) for y in (old, new))
        assert torch.equal(old, new)


@pytest.mark.parametrize(("num_kv_heads", "group", "head_dim", "block_size"), SHAPES)
@pytest.mark.parametrize("spread", [0, 2])
def test_attention_is_that_of_the_numbers_in_the_cache_in_any_chunk(num_kv_heads, group, head_dim, block_size, spread):
    """Exact but for the rounding of its results to bf16; the same bits alone, beside others, and whatever the chunk."""
    torch.manual_seed(head_dim)
    n = 203
    q, k, v = (torch.randn(n, heads, head_dim) for heads in (num_kv_heads * group, num_kv_heads, num_kv_heads))
    k, v = (x * torch.pow(10, spread * torch.rand(n, num_kv_heads, 1) - spread / 2) for x in (k, v))  # scales differ
    q, k, v = (x.to(BF16) for x in (q, k, v))
    num_blocks = -(-n // block_size)
    blocks = torch.randperm(num_blocks + 3)[:num_blocks].int()
    slots = blocks[torch.arange(n) // block_size].long() * block_size + torch.arange(n) % block_size
    caches = [empty_cache(num_blocks + 3, block_size, num_kv_heads, head_dim) for _ in "kv"]
    CPUAttention.store(k, v, *caches, slots)
    exact, expected = reference(q, k, v), None
    for chunk in (n, 1, 2, 5, 31, 150):
        ends = torch.arange(chunk, n + chunk, chunk).clamp(max=n)  # chunks as if of sequences that share a cache
        bounds = None if chunk == 1 else F.pad(ends, (1, 0)).int()
        tables = F.pad(blocks.expand(len(ends), -1), (0, 1), value=10**6)
        context = Context(bounds, context_lens=ends.int(), block_tables=tables)
        attend = CPUAttention.decode if chunk == 1 else lambda *args: CPUAttention.prefill(*args[:1], k, v, *args[1:])
        out = attend(q, *caches, context)
        expected = out if expected is None else expected
        assert torch.equal(out, expected)
    error = (expected.double() - exact).abs()
    largest = v.double().abs().amax()
    assert (error <= 2**-8 * exact.abs() + 2**-13 * largest).all()
    assert error.norm() < 0.62 * 2**-8 * exact.norm()  # of bf16's 2^-9 of a number, 0.6 in the mean of squares


def test_attention_of_peaked_scores_and_of_zeros():
    torch.manual_seed(0)
    q, k, v = (torch.randn(130, heads, 64, dtype=BF16) for heads in (4, 2, 2))
    q, k[7], v[9] = 30 * q, 0, 0
    v[:, 1] = 0
    caches, slots = [empty_cache(3, 64, 2, 64) for _ in "kv"], torch.arange(130)
    CPUAttention.store(k, v, *caches, slots)
    whole = Context(torch.tensor([0, 130]).int(), context_lens=torch.tensor([130]).int())
    whole.block_tables = torch.arange(3).int()[None]
    out, exact = CPUAttention.prefill(q, k, v, *caches, whole), reference(q, k, v)
    assert (out[:, 2:] == 0).all() and (out - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(1, 16), (3, 6)])
def test_copies_are_of_filled_slots_with_their_scales(num_kv_heads, head_dim):
    torch.manual_seed(0)
    copies = torch.tensor([(0, 1, 16), (1, 2, 5), (5, 1, 3), (2, 5, 1)])  # sources that were targets before
    caches = [torch.randint(0, 256, empty_cache(6, 16, num_kv_heads, head_dim).shape).byte() for _ in "kv"]
    expected = [[part.clone().view(torch.uint8).view(6, num_kv_heads, 16, -1) for part in contents(c)] for c in caches]
    CPUAttention.copy_blocks(*caches, copies)
    for source, target, num_filled in copies.tolist():
        for part in itertools.chain(*expected):
            part[target, :, :num_filled] = part[source, :, :num_filled]
    for cache, parts in zip(caches, expected, strict=True):
        found = [part.view(torch.uint8).view(6, num_kv_heads, 16, -1) for part in contents(cache)]
        assert all(torch.equal(x, y) for x, y in zip(found, parts, strict=True))
