"""The Triton kernels: their arithmetic in Triton's interpreter (natively where there is a GPU), their binaries for all.

Whatever a kernel may not read is NaN or far out of range, and so is its output before it writes.
"""

import ast
import importlib
import inspect

import pytest
import torch

pytest.importorskip("triton")

import triton

from aot import ALL, ARCHITECTURES, SHARED_LIMIT, compile_kernel
from helpers import random_prompts, reference_tokens, save_model
from nanovllm import LLM, SamplingParams
from nanovllm.kernels import triton_attention
from nanovllm.kernels.attention import _check_outputs
from nanovllm.kernels.triton_attention import TritonAttention, store_kvcache
from nanovllm.layers.attention import Attention
from nanovllm.utils.context import Context
from pairs import case_id, in_turn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
if DEVICE.type == "cuda":  # the interpreter's bf16 is wrong
    TOLERANCE[torch.bfloat16] = 2e-2
SHAPES = [  # KV heads, query heads of each, head_dim, block size
    (2, 1, 32, 16),
    (2, 3, 80, 64),
    (1, 4, 96, 16),
    (1, 1, 64, 48),
    (1, 2, 256, 32),
    (1, 2, 64, 256),
    (1, 8, 128, 128),
    (2, 2, 128, 256),
]
DTYPES = list(TOLERANCE)
GRID = in_turn(SHAPES[:4], DTYPES) + in_turn(SHAPES[4:], DTYPES[1:])
on_grid = pytest.mark.parametrize(("shape", "dtype"), GRID, ids=str)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    def new_nan(self, *shape, **kwargs):
        empty = new_empty(self, *shape, **kwargs)
        return empty.fill_(torch.nan) if empty.is_floating_point() else empty

    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", new_nan)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[Tq, H, D] over [L, KH, D] in fp32, causal and aligned at the end."""
    k, v = (x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * q.shape[-1] ** -0.5
    hidden = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).triu(k.shape[0] - q.shape[0] + 1).to(q.device)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


class Case:
    """Sequences in a cache of shuffled blocks; q, k and v are column slices of one tensor, as a model's are."""

    def __init__(
        self, shape: tuple[int, int, int, int], lens: list[int], dtype: torch.dtype, new: list[int] | None = None
    ):
        kv_heads, group, head_dim, self.block_size = shape
        torch.manual_seed(0)
        heads = [kv_heads * group, kv_heads, kv_heads]
        self.lens, self.new = lens, new or lens
        self.qkv = [torch.randn(n, sum(heads) + 1, head_dim).to(DEVICE, dtype) for n in lens]
        self.heads = heads
        num_blocks = [-(-n // self.block_size) for n in lens]
        ids = torch.randperm(sum(num_blocks) + 2).tolist()
        self.tables = torch.full((len(lens), max(num_blocks) + 1), 10**6, dtype=torch.int32)
        for row, n in enumerate(num_blocks):
            self.tables[row, :n] = torch.tensor([ids.pop() for _ in range(n)])
        cache_shape = TritonAttention.cache_shape(sum(num_blocks) + 2, self.block_size, kv_heads, head_dim)
        self.caches = [torch.full(cache_shape, torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return rows[:, :-1].split(self.heads, dim=1)

    def store(self) -> None:
        _, k, v = self.split(torch.cat(self.qkv))
        positions = [torch.arange(n) for n in self.lens]
        blocks = torch.cat([self.tables[row, p // self.block_size] for row, p in enumerate(positions)])
        slots = blocks.long() * self.block_size + torch.cat(positions) % self.block_size
        TritonAttention.store(k, v, *self.caches, slots.to(DEVICE))

    def prefill_context(self, paged: bool) -> Context:
        lens_q, lens_k = (torch.tensor([0, *lens]).cumsum(0).int().to(DEVICE) for lens in (self.new, self.lens))
        return Context(
            cu_seqlens_q=lens_q, cu_seqlens_k=lens_k, max_seqlen_q=max(self.new), max_seqlen_k=max(self.lens),
            context_lens=torch.tensor(self.lens, dtype=torch.int32).to(DEVICE),
            block_tables=self.tables.to(DEVICE) if paged else None,
        )  # fmt: skip

    def prefill_reference(self) -> torch.Tensor:
        sequences = zip(map(self.split, self.qkv), self.new, strict=True)
        return torch.cat([reference(q[len(q) - n :], k, v) for (q, k, v), n in sequences])


def close(ours: torch.Tensor, truth: torch.Tensor) -> None:
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours.float(), truth, rtol=tolerance, atol=tolerance)


@on_grid
def test_prefill_of_whole_prompts_reads_only_the_step(shape, dtype):
    case = Case(shape, [1, 17, 128, 5, 150], dtype)
    no_cache = torch.empty(0, dtype=dtype, device=DEVICE)
    q, k, v = case.split(torch.cat(case.qkv))
    out = TritonAttention.prefill(q, k, v, no_cache, no_cache, case.prefill_context(paged=False))
    assert out.is_contiguous()
    close(out, case.prefill_reference())


def fill_gpu(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    """Has kernels split the keys so that they have `num_rows` rows; with one there is nothing to merge."""
    monkeypatch.setattr(triton_attention, "_device", lambda device: ((9, 0), 1))
    monkeypatch.setattr(triton_attention, "ROWS_PER_SM", num_rows)
    if num_rows == 1:
        monkeypatch.setattr(triton_attention, "_merge_splits_kernel", None)


def prefill_cached(case: Case) -> torch.Tensor:
    case.store()
    q, k, v = case.split(torch.cat([x[len(x) - n :] for x, n in zip(case.qkv, case.new, strict=True)]))
    k, v = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    return TritonAttention.prefill(q, k, v, *case.caches, case.prefill_context(paged=True))


@on_grid
def test_prefill_over_cached_prefixes_reads_only_the_cache(shape, dtype):
    block = shape[-1]
    case = Case(shape, [block + 1, 1, 150, 64, 2 * block, 133], dtype, new=[1, 1, 22, 64, block, 130])
    close(prefill_cached(case), case.prefill_reference())


@pytest.mark.parametrize(("case", "num_rows"), in_turn(GRID[:4], [4000, 4000, 1, 1]), ids=str)
def test_few_queries_over_long_prefixes_split_the_keys(case, num_rows, monkeypatch):
    monkeypatch.setattr(triton_attention, "_prefill_kernel", None)
    fill_gpu(monkeypatch, num_rows)
    case = Case(case[0], [150, 1, 70, 90], case[1], new=[5, 1, 64, 17])
    close(prefill_cached(case), case.prefill_reference())


def test_few_queries_that_see_no_key_of_the_last_split(monkeypatch):
    fill_gpu(monkeypatch, 16000)
    case = Case((1, 2, 32, 16), [90, 61], torch.float32, new=[60, 61])  # a split is of 16 keys
    close(prefill_cached(case), case.prefill_reference())


def test_prefill_finds_its_place_among_many_sequences():
    lens = [1 + i % 3 for i in range(520)]  # more than a kernel looks at together
    case = Case((1, 1, 16, 16), lens, torch.float32)
    q, k, v = case.split(torch.cat(case.qkv))
    close(TritonAttention.prefill(q, k, v, k, v, case.prefill_context(paged=False)), case.prefill_reference())


def decode(case: Case, padding: int = 0) -> torch.Tensor:
    """Stores all and decodes each sequence's last token, and `padding` rows as a CUDA graph would."""
    case.store()
    q = torch.cat([x[-1:] for x in case.qkv] + [torch.full_like(case.qkv[0][:1], torch.nan)] * padding)
    tables = torch.cat([case.tables, torch.full_like(case.tables[:1], 10**6).expand(padding, -1)])
    lens = torch.tensor(case.lens + [0] * padding, dtype=torch.int32)
    context = Context(context_lens=lens.to(DEVICE), block_tables=tables.to(DEVICE))
    return TritonAttention.decode(case.split(q)[0], *case.caches, context)


def decode_reference(case: Case) -> torch.Tensor:
    return torch.cat([reference(q[-1:], k, v) for q, k, v in map(case.split, case.qkv)])


@pytest.mark.parametrize(("case", "num_rows"), in_turn(GRID, [256 * 132, 256, 1]), ids=str)
def test_decode_with_one_few_and_many_splits(case, num_rows, monkeypatch):
    fill_gpu(monkeypatch, num_rows)
    shape, dtype = case
    block = shape[-1]
    case = Case(shape, [1, block, block + 1, 2 * block - 1, 300], dtype)
    out = decode(case, padding=2)
    close(out[:-2], decode_reference(case))
    assert (out[-2:] == 0).all()
    if shape == SHAPES[0]:
        assert torch.equal(decode(case, padding=2), out)  # to the last bit


def test_more_query_heads_than_a_tile_of_tensor_cores_has_rows():
    case = Case((1, 20, 32, 16), [3, 70], torch.float32)
    close(decode(case), decode_reference(case))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 32), (3, 80), (8, 128)])
def test_store_writes_each_token_to_its_slot_and_minus_one_nowhere(kv_heads, head_dim, dtype):
    guarded = torch.full((2, 5, 16, kv_heads, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    k_cache, v_cache = guarded[:, 1:]  # slot -1 is in the block before
    _, k, v = torch.randn(7, 4 * kv_heads, head_dim).to(DEVICE, dtype).split([2 * kv_heads, kv_heads, kv_heads], dim=1)
    slots = torch.tensor([17, -1, 0, 63, -1, 40, 16], device=DEVICE)
    store_kvcache(k, v, k_cache, v_cache, slots)
    assert guarded[:, 0].isnan().all()
    for new, cache in ((k, k_cache), (v, v_cache)):
        expected = torch.full_like(cache.flatten(0, 1), torch.nan)
        expected[slots[slots >= 0]] = new[slots >= 0]
        assert torch.equal(cache.flatten(0, 1).nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize(("block_size", "dtype"), in_turn([16, 256], DTYPES), ids=str)
def test_the_trial_at_start_up_passes(block_size, dtype):
    _check_outputs(TritonAttention, DEVICE, dtype, Attention(4, 2, 64), block_size)


def test_engine_matches_transformers(tmp_path, monkeypatch):
    model = save_model(tmp_path, num_hidden_layers=1)
    prompts = random_prompts([1, 9, 16, 21])
    prompts.append(prompts[-1][:16] + prompts[0])  # two blocks are cached
    expected = [reference_tokens(model, prompt, 6) for prompt in prompts]
    monkeypatch.setattr("nanovllm.engine.model_runner.choose_backend", lambda *settings: TritonAttention)
    settings = {"kvcache_block_size": 8, "num_kvcache_blocks": 50, "max_num_batched_tokens": 24, "dtype": "float32"}
    with LLM(str(tmp_path), device=DEVICE.type, **settings) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == expected


# The dtypes, head_dims and block sizes that tests/layers/test_attention_compiled.py leaves out.
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
VARIANTS = [(torch.bfloat16, head_dim, 2, 256) for head_dim in (32, 80, 256)]  # dtype, head_dim, group, block size
VARIANTS += [(torch.bfloat16, 128, 2, 16), (torch.float32, 128, 2, 256)]
if ALL:
    VARIANTS += [(torch.bfloat16, head_dim, 20, 16) for head_dim in (16, 48, 64, 96, 160, 256)]
    VARIANTS += [(torch.float32, head_dim, group, 256) for head_dim, group in ((64, 2), (128, 20), (256, 16))]
FITTING = in_turn(VARIANTS, ARCHITECTURES, is_whole=ALL)
FITTING += [(VARIANTS[2], arch) for arch in ARCHITECTURES if (VARIANTS[2], arch) not in FITTING]  # the largest tiles


def check_binary(kernel, tensors: str, others: str, arch: int, dtype: torch.dtype, constexprs: dict) -> None:
    """Compiles it as for `tensors` of `dtype` and `others`, a type for each run-time parameter."""
    constexprs = dict(constexprs)
    launch = {name: constexprs.pop(name, 4) for name in ("num_warps", "num_stages")}
    signature = {name: f"*{NAMES[dtype]}:16" for name in tensors.split()}
    signature |= dict(other.split("=") for other in others.split())
    binary = compile_kernel(kernel, signature, constexprs, arch, **launch)
    assert binary.shared <= SHARED_LIMIT[arch]
    assert binary.spilled == 0


@pytest.mark.parametrize(("variant", "arch"), FITTING, ids=case_id)
def test_kernels_fit_each_architecture(variant, arch):
    dtype, head_dim, group, block_size = variant
    capability, block_d = divmod(arch, 10), triton.next_power_of_2(head_dim)
    for block, few in ((0, 0), (block_size, 64)):  # without and with a cached prefix
        config = triton_attention.prefill_config(capability, head_dim, dtype)
        constexprs = {"H": 16, "GROUP": group, "D": head_dim, "BLOCK_D": block_d, "BLOCK_SIZE": block, "FEW": few}
        check_binary(
            triton_attention._prefill_kernel, "q k v out",
            "cu_seqlens_q=*i32 cu_seqlens_k=*i32 block_tables=*i32 num_seqs=i32 columns=i32 "
            "q_stride=i32:16 k_stride=i32:16 v_stride=i32:16",
            arch, dtype, constexprs | config,
        )  # fmt: skip
    few = {"D": head_dim, "BLOCK_D": block_d, "FEW": 64}
    for is_decode in (True, False):
        config = triton_attention.split_config(capability, head_dim, dtype, group, is_decode)
        constexprs, bounds = ({"cu_seqlens_q": None}, "") if is_decode else ({}, "cu_seqlens_q=*i32 ")
        check_binary(
            triton_attention._split_kernel, "q k_cache v_cache out",
            "partial=*fp32:16 log_sums=*fp32:16 " + bounds + "context_lens=*i32 block_tables=*i32 columns=i32 most=i32 "
            "q_stride=i32:16",
            arch, dtype, {"KH": 8, "GROUP": group, "BLOCK_SIZE": block_size} | few | config | constexprs,
        )  # fmt: skip
        check_binary(
            triton_attention._merge_splits_kernel, "out",
            "partial=*fp32:16 log_sums=*fp32:16 " + bounds + "context_lens=*i32 most=i32 num_splits=i32",
            arch, dtype, {"H": 16, "TILE": config["TILE"], "CHUNK": triton_attention.MERGED} | few | constexprs,
        )  # fmt: skip
    check_binary(
        triton_attention._store_kernel, "k v k_cache v_cache", "slots=*i64 k_stride=i32:16 v_stride=i32:16",
        arch, dtype, {"SIZE": 8 * head_dim, "BLOCK": 8 * block_d},
    )  # fmt: skip


@pytest.mark.parametrize("module", ["triton_attention", "triton_fused"])
def test_kernels_call_nothing_but_the_language_and_each_other(module):
    """Python's own `min` and `max` and Triton's helpers for the host compile in some versions of Triton only."""
    module = importlib.import_module(f"nanovllm.kernels.{module}")
    kernels = {name: x for name, x in vars(module).items() if hasattr(x, "arg_names")}
    for name, kernel in kernels.items():
        [function] = ast.parse(inspect.getsource(kernel.fn)).body
        for node in (node for statement in function.body for node in ast.walk(statement)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                is_method = isinstance(node.func, ast.Attribute) and not called.startswith("triton.")
                assert is_method or called in ("range", "float", *kernels), f"{name} calls {called}"
