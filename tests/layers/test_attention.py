"""The backends against a plain fp32 reference on ragged batches."""

import itertools
import random

import pytest
import torch

from nanovllm.kernels.plain_attention import CPUAttention
from nanovllm.utils.context import Context

BACKENDS = {"cpu": CPUAttention}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
GRID = [
    (kv_heads, group, head_dim, block_size)
    for (kv_heads, group), head_dim, block_size in itertools.product(
        [(2, 1), (2, 2), (1, 4), (2, 8)], [32, 64, 128, 256], [16, 64, 256]
    )
]


GRID += [(2, 1, 16, 16), (1, 4, 40, 16), (2, 2, 80, 64), (2, 8, 112, 16)]  # head_dims that fill no register


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[Tq, H, D] over [L, KH, D] in fp32, causal and aligned at the end."""
    k, v = (x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * q.shape[-1] ** -0.5
    hidden = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).triu(k.shape[0] - q.shape[0] + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


class Case:
    """Sequences of random lengths whose keys lie in a cache of shuffled blocks that is NaN everywhere else."""

    def __init__(self, backend, kv_heads, group, head_dim, block_size, dtype, seed=0):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        self.backend, self.block_size = backend, block_size
        self.lens = [1, block_size, block_size + 1, *(rng.randrange(1, 3 * block_size) for _ in range(3))]
        self.q, self.k, self.v = (
            [torch.randn(n, heads, head_dim).to(dtype) for n in self.lens]
            for heads in (kv_heads * group, kv_heads, kv_heads)
        )
        num_blocks = [-(-n // block_size) for n in self.lens]
        ids = rng.sample(range(sum(num_blocks) + 3), sum(num_blocks))
        self.tables = torch.full((len(self.lens), max(num_blocks) + 1), 10**6, dtype=torch.int32)
        for row, n in enumerate(num_blocks):
            self.tables[row, :n] = torch.tensor([ids.pop() for _ in range(n)])
        shape = backend.cache_shape(sum(num_blocks) + 3, block_size, kv_heads, head_dim)
        self.caches = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)

    def slots(self, row: int, start: int, end: int) -> torch.Tensor:
        positions = torch.arange(start, end)
        return self.tables[row, positions // self.block_size] * self.block_size + positions % self.block_size

    def store(self, parts: list[tuple[int, int, int]]) -> torch.Tensor:
        """Stores tokens `start` to `end` of each `(row, start, end)`; returns their slots."""
        slots = torch.cat([self.slots(*part) for part in parts]).long()
        k, v = (torch.cat([x[row][start:end] for row, start, end in parts]) for x in (self.k, self.v))
        self.backend.store(k, v, *self.caches, slots)
        return slots


def close(ours: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(ours.float(), truth, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim", "block_size"), GRID)
def test_prefill_and_decode_match_the_reference(name, kv_heads, group, head_dim, block_size, dtype):
    case = Case(BACKENDS[name], kv_heads, group, head_dim, block_size, dtype)
    rows = range(len(case.lens))
    # Some sequences have a prefix in the cache already, others none; then all but the last token is prefilled.
    cached = [n // 2 // block_size * block_size if row % 2 else 0 for row, n in enumerate(case.lens)]
    new = [row for row in rows if case.lens[row] > 1]
    case.store([(row, 0, cached[row]) for row in new])
    parts = [(row, cached[row], case.lens[row] - 1) for row in new]
    case.store(parts)
    lens_q = torch.tensor([0] + [end - start for _, start, end in parts])
    lens_k = torch.tensor([0] + [end for _, _, end in parts])
    context = Context(
        block_tables=case.tables[new], context_lens=lens_k[1:].int(),
        cu_seqlens_q=lens_q.cumsum(0).int(), cu_seqlens_k=lens_k.cumsum(0).int(),
        max_seqlen_q=int(lens_q.max()), max_seqlen_k=int(lens_k.max()),
    )  # fmt: skip
    q, k, v = (torch.cat([x[row][start:end] for row, start, end in parts]) for x in (case.q, case.k, case.v))
    truth = [reference(case.q[row][start:end], case.k[row][:end], case.v[row][:end]) for row, start, end in parts]
    close(case.backend.prefill(q, k, v, *case.caches, context), torch.cat(truth), dtype)

    case.store([(row, case.lens[row] - 1, case.lens[row]) for row in rows])
    context = Context(
        block_tables=case.tables, context_lens=torch.tensor(case.lens, dtype=torch.int32),
        max_seqlen_q=1, max_seqlen_k=max(case.lens),
    )  # fmt: skip
    truth = [reference(case.q[row][-1:], case.k[row], case.v[row]) for row in rows]
    close(case.backend.decode(torch.stack([x[-1] for x in case.q]), *case.caches, context), torch.cat(truth), dtype)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("shape", [GRID[0], GRID[10], *GRID[33::12], *GRID[-4:]], ids=str)
def test_the_kernels_of_each_instruction_set_match_the_reference(shape):
    test_prefill_and_decode_match_the_reference("cpu", *shape, torch.bfloat16)


@pytest.mark.parametrize("name", BACKENDS)
def test_slot_minus_one_is_not_stored(name):
    case = Case(BACKENDS[name], 2, 2, 32, 16, torch.float32)
    before = [cache.clone() for cache in case.caches]
    k = torch.randn(3, 2, 32)
    case.backend.store(k, k, *case.caches, torch.tensor([-1, 5, -1]))
    changed = [~torch.isclose(new, old, equal_nan=True) for new, old in zip(case.caches, before, strict=True)]
    assert [int(c.sum()) for c in changed] == [2 * 32, 2 * 32]
