"""The Triton kernels of `batch_invariant`: a row's result does not depend, in any bit, on what is computed with it.

In Triton's interpreter without a GPU, else on it.
"""

from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")

import triton

from aot import ALL, ARCHITECTURES, SHARED_LIMIT, compile_kernel
from nanovllm.kernels import triton_invariant_attention, triton_linear
from nanovllm.kernels.attention import _check_outputs
from nanovllm.kernels.triton_attention import store_kvcache
from nanovllm.kernels.triton_invariant_attention import InvariantTritonAttention, invariant_config
from nanovllm.kernels.triton_linear import TritonWeight, linear_config, plain_sizes
from nanovllm.layers.attention import Attention
from nanovllm.utils.context import Context
from pairs import in_turn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")  # the interpreter's bf16 is wrong
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
LENS = [100, 35, 1, 65]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Sequences:
    """Random queries, keys and values of sequences, and any stretch of the attention of one beside others."""

    def __init__(self, kv_heads: int, group: int, head_dim: int, dtype: torch.dtype):
        torch.manual_seed(0)
        heads = [kv_heads * group, kv_heads, kv_heads]
        self.qkv = [torch.randn(n, sum(heads) + 1, head_dim).to(DEVICE, dtype)[:, 1:].split(heads, 1) for n in LENS]

    def whole(self, rows: list[int]) -> list[torch.Tensor]:
        """Of new prompts, without a cache."""
        q, k, v = (torch.cat([self.qkv[row][i] for row in rows]) for i in range(3))
        lens = [LENS[row] for row in rows]
        bounds = ints([0, *lens]).cumsum(0, dtype=torch.int32)
        return list(
            InvariantTritonAttention.prefill(q, k, v, k, v, Context(cu_seqlens_q=bounds, cu_seqlens_k=bounds)).split(
                lens
            )
        )

    def cached(self, stretches: list[tuple[int, int, int]], block_size: int) -> list[torch.Tensor]:
        """Of queries `start` to `end` of sequences, `(row, start, end)`, of which all keys are in a cache."""
        num_blocks = [-(-end // block_size) for _, _, end in stretches]
        ids, tables = torch.randperm(sum(num_blocks)).int(), torch.zeros(len(stretches), 200 // block_size + 1).int()
        for i, n in enumerate(num_blocks):
            tables[i, :n], ids = ids[:n], ids[n:]
        shape = sum(num_blocks), block_size, *self.qkv[0][1].shape[1:]
        caches = [self.qkv[0][0].new_full(shape, torch.nan) for _ in "kv"]
        for table, (row, _, end) in zip(tables, stretches, strict=True):
            positions = torch.arange(end)
            slots = (table[positions // block_size] * block_size + positions % block_size).long().to(DEVICE)
            store_kvcache(*(x[:end] for x in self.qkv[row][1:]), *caches, slots)
        q = torch.cat([self.qkv[row][0][start:end] for row, start, end in stretches])
        lens, new = ints([end for _, _, end in stretches]), [end - start for _, start, end in stretches]
        if new == [1] * len(new):
            context = Context(context_lens=lens, block_tables=tables.to(DEVICE))
            return list(InvariantTritonAttention.decode(q, *caches, context).split(1))
        bounds = ints([0, *new]).cumsum(0, dtype=torch.int32)
        context = Context(cu_seqlens_q=bounds, context_lens=lens, block_tables=tables.to(DEVICE))
        none = torch.full_like(q, torch.nan)
        return list(InvariantTritonAttention.prefill(q, none, none, *caches, context).split(new))


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.fixture(autouse=True)
def short_splits(monkeypatch):
    monkeypatch.setattr(triton_invariant_attention, "SPLIT", 64)


@pytest.mark.parametrize(
    ("shape", "block_size", "dtype"), in_turn([(1, 2, 32), (1, 3, 80)], [128, 24], DTYPES), ids=str
)
def test_attention_of_a_token_is_the_same_in_every_step(shape, block_size, dtype, monkeypatch):
    sequences = Sequences(*shape, dtype)
    expected = sequences.whole([0])[0]
    assert torch.equal(sequences.whole([3, 0, 2])[1], expected)
    others = [(1, 5, 35), (2, 0, 1)]
    for before, cuts in (([], [0, 100]), (others, [0, 37, 99, 100])):  # the second time in chunks
        steps = [[*before, (0, *cut)] for cut in pairwise(cuts)]
        assert torch.equal(torch.cat([sequences.cached(step, block_size)[-1] for step in steps]), expected)
    for num_sms in (0, 1000):  # each sequence's keys are one program's, and many programs'
        monkeypatch.setattr(triton_invariant_attention, "_device", lambda device: ((9, 0), num_sms))  # noqa: B023
        for position in (0, 64, 99):
            step = [(1, 30, 31), (3, 64, 65), (0, position, position + 1)]
            for others in (step, step[2:]):
                assert torch.equal(sequences.cached(others, block_size)[-1], expected[position : position + 1])


@by_dtype
def test_attention_agrees_with_a_reference(dtype):
    sequences = Sequences(1, 3, 80, dtype)
    for (q, k, v), out in zip(sequences.qkv, sequences.whole([0, 1, 2, 3]), strict=True):
        q, k, v = (x.float().transpose(0, 1)[None] for x in (q, k, v))
        truth = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(out.float(), truth[0].transpose(0, 1), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("block_size", "dtype"), in_turn([16, 256], DTYPES), ids=str)
def test_the_trial_at_start_up_passes(block_size, dtype):
    _check_outputs(InvariantTritonAttention, DEVICE, dtype, Attention(4, 2, 64), block_size)


def test_rows_that_pad_a_graph_read_nothing(monkeypatch):
    nothing = torch.full((4, 16, 1, 32), torch.nan, device=DEVICE)
    context = Context(context_lens=ints([0, 0]), block_tables=torch.full((2, 9), 10**6).int().to(DEVICE))
    for num_sms in (0, 1000):
        monkeypatch.setattr(triton_invariant_attention, "_device", lambda device: ((9, 0), num_sms))  # noqa: B023
        q = torch.full((2, 2, 32), torch.nan, device=DEVICE)
        assert (InvariantTritonAttention.decode(q, nothing, nothing, context) == 0).all()


@by_dtype
@pytest.mark.parametrize("n, k", [(100, 72), (32, 64)])
def test_products_of_a_row_are_the_same_among_any_number_of_rows(n, k, dtype):
    torch.manual_seed(0)
    weight, bias = TritonWeight(torch.randn(n, k).to(DEVICE, dtype)), torch.randn(n).to(DEVICE, dtype)
    x = torch.randn(80, k + 16).to(DEVICE, dtype)[:, :k]
    for shift in (None, bias):
        whole = weight.linear(x, shift)
        exact = x.double() @ weight.values.double().T + (0 if shift is None else shift.double())
        torch.testing.assert_close(whole.double(), exact, rtol=TOLERANCE[dtype], atol=20 * TOLERANCE[dtype])
        for start, end in ((0, 1), (63, 65), (7, 79)):
            assert torch.equal(weight.linear(x[start:end], shift), whole[start:end])
    ids = torch.tensor([n - 1, 0, 5], device=DEVICE)
    assert torch.equal(weight.rows(ids), weight.values[ids]) and weight.shape == (n, k)


# ---- binaries

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
VARIANTS = [(torch.bfloat16, 128, 2), (torch.float32, 128, 2)]
if ALL:
    VARIANTS += [(torch.bfloat16, 64, 2), (torch.bfloat16, 256, 2), (torch.float16, 128, 4)]
    VARIANTS += [(torch.bfloat16, head_dim, 5) for head_dim in (16, 32, 80, 96, 160)]


def check_binary(kernel, pointers: str, others: str, arch: int, dtype: torch.dtype, constexprs: dict) -> None:
    launch = {name: constexprs.pop(name, 4 if name == "num_warps" else 3) for name in ("num_warps", "num_stages")}
    signature = {name: f"*{NAMES[dtype]}:16" for name in pointers.split()}
    signature |= dict(other.split("=") for other in others.split())
    binary = compile_kernel(kernel, signature, constexprs, arch, **launch)
    assert binary.shared <= SHARED_LIMIT[arch] and binary.spilled == 0


@pytest.mark.parametrize("arch", ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize(("dtype", "head_dim", "group"), VARIANTS, ids=str)
def test_attention_kernels_fit_each_architecture(arch, dtype, head_dim, group):
    shape = {"D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "SPLIT": 512}
    config = invariant_config(divmod(arch, 10), head_dim, dtype, group)
    for block_size, is_split in ((0, False), (64, False), (64, True)):
        check_binary(
            triton_invariant_attention._attend_kernel, "q k v out",
            "partial=*fp32:16 states=*fp32:16 cu_seqlens_q=*i32 context_lens=*i32 block_tables=*i32 num_seqs=i32 "
            "columns=i32 q_stride=i32:16 k_stride=i32:16 v_stride=i32:16",
            arch, dtype, {"KH": 8, "GROUP": group, "BLOCK_SIZE": block_size, "IS_SPLIT": is_split, **shape, **config},
        )  # fmt: skip
    others = "partial=*fp32:16 states=*fp32:16 context_lens=*i32 num_splits=i32"
    check_binary(triton_invariant_attention._merge_kernel, "out", others, arch, dtype, {"H": 8 * group, **shape})


@pytest.mark.parametrize("arch", ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("n", [1024, 151936] if ALL else [151936])
def test_product_kernel_compiles_ahead_of_time(arch, dtype, n):
    sizes = plain_sizes(torch.empty(n, 1024, device="meta"))
    check_binary(
        triton_linear.linear_kernel, "x values bias out", "num_rows=i32 x_stride=i32:16 steps=i32", arch, dtype,
        {"scales": None, "zeros": None, "partial": None, **sizes, **linear_config(n, dtype)},
    )  # fmt: skip
