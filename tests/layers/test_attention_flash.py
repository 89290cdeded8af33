"""flash-attn and PyTorch's varlen attention, through stand-ins that check what their kernels demand, and the choice."""

import inspect
import logging
import sys
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from unittest.mock import patch

import pytest
import torch

from nanovllm.kernels import attention
from nanovllm.kernels.attention import BACKENDS, choose_backend
from nanovllm.kernels.flash_attention import FlashAttention2, FlashAttention3, TorchVarlen, copy_blocks, store_kvcache
from nanovllm.kernels.plain_attention import CPUAttention
from nanovllm.layers.attention import Attention
from nanovllm.utils import device as device_utils
from nanovllm.utils.context import Context

# ---- stand-ins: the packages' signatures and their kernels' demands, computed in fp32


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """[Tq, H, D] over [L, KH, D]; with `causal` aligned at the end; rows without a key are zero."""
    k, v = (x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(scores.shape[2] - scores.shape[1] + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1).nan_to_num(), v).to(q.dtype)


def check_heads(q, k, v):
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.shape[-2] % k.shape[-2] == 0 and k.shape == v.shape
    assert q.shape[-1] == k.shape[-1] <= 256 and q.shape[-1] % 8 == 0


def check_int32(x, *shape):
    assert x.dtype == torch.int32 and x.is_contiguous() and tuple(x.shape) == shape


def check_table(table, num_seqs, block_size, multiple):
    assert table.dtype == torch.int32 and table.stride(-1) == 1 and table.shape[0] == num_seqs
    assert block_size % multiple == 0


def bounds_of(cu_seqlens, max_seqlen, total):
    check_int32(cu_seqlens, len(cu_seqlens))
    lens = cu_seqlens.diff()
    assert cu_seqlens[0] == 0 and (lens >= 0).all() and cu_seqlens[-1] == total
    assert isinstance(max_seqlen, int) and max_seqlen >= lens.max()
    return cu_seqlens.tolist()


def gather(cache, table_row, length):
    return cache[table_row[: -(-length // cache.shape[1])].long()].flatten(0, 1)[:length]


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal, table, lens_k, multiple):
    """What all varlen functions do; `lens_k` are the lengths of the keys behind a table."""
    check_heads(q, k, v)
    starts = bounds_of(cu_q, max_q, len(q))
    num_seqs = len(starts) - 1
    if table is None:
        assert q.dim() == k.dim() == 3
        starts_k = bounds_of(cu_k, max_k, len(k))
        keys = [(k[a:b], v[a:b]) for a, b in pairwise(starts_k)]
    else:
        assert q.dim() == 3 and k.dim() == 4 and k.stride() == v.stride()
        check_table(table, num_seqs, k.shape[1], multiple)
        check_int32(lens_k, num_seqs)
        assert max_k is None or lens_k.max() <= max_k
        keys = [[gather(x, row, n) for x in (k, v)] for row, n in zip(table, lens_k.tolist(), strict=True)]
    parts = [attend(q[a:b], *kv, causal) for a, b, kv in zip(starts, starts[1:], keys, strict=False)]
    return torch.cat(parts)


def with_kvcache(q, k_cache, v_cache, lens, table, causal, multiple):
    num_seqs, one, _, _ = q.shape
    assert one == 1 and causal is True
    check_heads(q, k_cache, v_cache)
    assert k_cache.dim() == 4 and k_cache.is_contiguous() and v_cache.is_contiguous()
    check_int32(lens, num_seqs)
    check_table(table, num_seqs, k_cache.shape[1], multiple)
    rows = zip(q, table, lens.tolist(), strict=True)
    return torch.stack([attend(x, gather(k_cache, r, n), gather(v_cache, r, n), False) for x, r, n in rows])


def fa2() -> ModuleType:
    module = ModuleType("flash_attn")

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert causal is True
        args = q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        check_int32(cu_seqlens_k, len(cu_seqlens_q))
        return varlen(*args, causal, block_table, cu_seqlens_k.diff(), 256)

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
        return_softmax_lse=False,
    ):  # fmt: skip
        return with_kvcache(q, k_cache, v_cache, cache_seqlens, block_table, causal, 256)

    module.__version__, module.__spec__ = "2.8.3", ModuleSpec("flash_attn", None)
    module.flash_attn_varlen_func, module.flash_attn_with_kvcache = flash_attn_varlen_func, flash_attn_with_kvcache
    return module


def fa3(returns_lse: bool = False) -> ModuleType:
    module = ModuleType("flash_attn_interface")

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        assert causal is True
        out = varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, None, None, 1)
        return (out, torch.zeros(q.shape[1], len(q))) if returns_lse else out

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
        max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None,
        softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
        rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
        return_softmax_lse=False,
    ):  # fmt: skip
        if cu_seqlens_q is None:
            return with_kvcache(q, k_cache, v_cache, cache_seqlens, page_table, causal, 1)
        assert causal is True
        args = q, k_cache, v_cache, cu_seqlens_q, None, max_seqlen_q, None
        return varlen(*args, causal, page_table, cache_seqlens, 1)

    module.__spec__ = ModuleSpec("flash_attn_interface", None)
    module.flash_attn_varlen_func, module.flash_attn_with_kvcache = flash_attn_varlen_func, flash_attn_with_kvcache
    return module


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert window_size in [(-1, -1), (-1, 0)] and (window_size == (-1, 0) or max_q == 1)
    heads = key.shape[-2]
    assert enable_gqa or query.shape[1] == heads
    check_int32(cu_seq_k, len(cu_seq_q))  # FA2, which is inside, takes no None
    if block_table is not None:
        assert num_splits == 1  # others leave outputs unwritten
        assert torch.equal(cu_seq_k.diff(), seqused_k)
    args = query, key, value, cu_seq_q, cu_seq_k, max_q, max_k
    return varlen(*args, window_size == (-1, 0), block_table, seqused_k, 256)


STAND_INS = {
    "fa2": lambda: FlashAttention2(fa2()),
    "fa3": lambda: FlashAttention3(fa3()),
    "fa3-early": lambda: FlashAttention3(fa3(returns_lse=True)),
    "torch": lambda: TorchVarlen(varlen_attn),
}


def test_the_stand_in_has_the_signature_of_the_installed_pytorch():
    real = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    names = list(inspect.signature(real).parameters)
    if "block_table" not in names:
        pytest.skip("this PyTorch has no block tables there")
    ours = inspect.signature(varlen_attn).parameters
    assert names == list(ours)
    for name, parameter in inspect.signature(real).parameters.items():
        assert (parameter.kind, parameter.default) == (ours[name].kind, ours[name].default)


# ---- the backends


def make(name: str):
    with patch("nanovllm.kernels.flash_attention.triton_problem", return_value="it has no CPU"):
        return STAND_INS[name]()


class Case:
    """Sequences whose keys lie in shuffled blocks of a cache that is NaN elsewhere, and whose q, k, v are strided."""

    def __init__(self, lens, kv_heads=2, group=2, head_dim=64, block_size=256, num_padded=0, dtype=torch.bfloat16):
        torch.manual_seed(0)
        self.lens, self.block_size = lens, block_size
        self.q, self.k, self.v = ([], [], [])
        for n in lens:
            packed = torch.randn(n, kv_heads * (group + 2) * head_dim).to(dtype)
            q, k, v = packed.split([kv_heads * group * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
            self.q.append(q.unflatten(1, (-1, head_dim)))
            self.k.append(k.unflatten(1, (-1, head_dim)))
            self.v.append(v.unflatten(1, (-1, head_dim)))
        num_blocks = [-(-n // block_size) for n in lens]
        ids = torch.randperm(sum(num_blocks) + 2).tolist()
        self.tables = torch.full((len(lens) + num_padded, max(num_blocks) + 1), 10**6, dtype=torch.int32)
        for row, n in enumerate(num_blocks):
            self.tables[row, :n] = torch.tensor([ids.pop() for _ in range(n)])
        shape = make("fa2").cache_shape(sum(num_blocks) + 2, block_size, kv_heads, head_dim)
        self.caches = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]

    def slots(self, row, start, end):
        positions = torch.arange(start, end)
        return self.tables[row, positions // self.block_size].long() * self.block_size + positions % self.block_size

    def packed(self, parts):
        return [torch.cat([x[row][a:b] for row, a, b in parts]) for x in (self.q, self.k, self.v)]


def bounds(lens):
    return torch.tensor([0, *lens]).cumsum(0).int()


@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(2, 1, 64), (2, 2, 128), (1, 8, 32), (1, 3, 256)])
@pytest.mark.parametrize("has_prefix", [False, True])
@pytest.mark.parametrize("name", STAND_INS)
def test_prefill_and_decode_match_the_reference(name, has_prefix, kv_heads, group, head_dim):
    block_size = 16 if name.startswith("fa3") else 256
    backend, lens = make(name), [1, 2 * block_size + 3, block_size, block_size + 1, 7]
    case = Case(lens, kv_heads, group, head_dim, block_size)
    cached = [n // 2 // block_size * block_size if has_prefix else 0 for n in lens]
    assert any(cached) == has_prefix
    before = [(row, 0, start) for row, start in enumerate(cached) if start]
    if before:
        _, k, v = case.packed(before)
        backend.store(k, v, *case.caches, torch.cat([case.slots(*part) for part in before]))
    parts = [(row, start, n - 1) for row, (start, n) in enumerate(zip(cached, lens, strict=True)) if n > 1]
    rows = [row for row, _, _ in parts]
    lens_q, lens_k = [b - a for _, a, b in parts], [b for _, _, b in parts]
    q, k, v = case.packed(parts)
    slots = torch.cat([case.slots(*part) for part in parts])
    backend.store(k, v, *case.caches, slots)
    context = Context(
        bounds(lens_q), bounds(lens_k), max(lens_q), max(lens_k), torch.tensor(lens_k).int(),
        case.tables[rows] if has_prefix else None,
    )  # fmt: skip
    out = backend.prefill(q, k, v, *case.caches, context)
    truth = torch.cat([attend(case.q[r][a:b], case.k[r][:b], case.v[r][:b], True) for r, a, b in parts])
    assert torch.equal(out, truth)

    last = [(row, n - 1, n) for row, n in enumerate(lens)]
    q, k, v = case.packed(last)
    backend.store(k, v, *case.caches, torch.cat([case.slots(*part) for part in last]))
    context = Context(context_lens=torch.tensor(lens).int(), block_tables=case.tables)
    out = backend.decode(q, *case.caches, context)
    assert torch.equal(out, torch.cat([attend(case.q[r][-1:], case.k[r], case.v[r], False) for r in range(len(lens))]))


@pytest.mark.parametrize("name", STAND_INS)
def test_padded_rows_change_nothing(name):
    case, backend = Case([5, 300], num_padded=3), make(name)
    case.tables[2:] = 0
    for row, n in enumerate(case.lens):
        backend.store(case.k[row], case.v[row], *case.caches, case.slots(row, 0, n))
    q = torch.cat([case.q[0][-1:], case.q[1][-1:], torch.randn(3, *case.q[0].shape[1:]).bfloat16()])
    context = Context(context_lens=torch.tensor([5, 300, 0, 0, 0]).int(), block_tables=case.tables)
    out = backend.decode(q, *case.caches, context)
    assert torch.equal(out[0], attend(case.q[0][-1:], case.k[0], case.v[0], False)[0])
    assert torch.equal(out[1], attend(case.q[1][-1:], case.k[1], case.v[1], False)[0])


@pytest.mark.parametrize("slots", [[-1, 5, -1], [40, -1, 0], [2, 1, 0], [-1, -1, 63]])
def test_the_store_without_triton_skips_slot_minus_one(slots):
    caches = [torch.zeros(4, 16, 2, 8) for _ in range(2)]
    packed = torch.randn(3, 2 * 2 * 8)
    k, v = (x.unflatten(1, (2, 8)) for x in packed.split(16, dim=1))
    store_kvcache(k, v, *caches, torch.tensor(slots))
    for cache, new in zip(caches, (k, v), strict=True):
        expected = torch.zeros(64, 2, 8)
        for row, slot in enumerate(slots):
            if slot >= 0:
                expected[slot] = new[row]
        assert torch.equal(cache.flatten(0, 1), expected)


# ---- the choice

LAYER = Attention(4, 2, 64)
CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there is a GPU; `gpu(...)` says which and what is installed, and which backends fail when run."""

    def pretend(capability=(9, 0), installed=(), failing=()):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        known = {"flash_attn": fa2(), "flash_attn_interface": fa3()}
        finds = {name: ModuleSpec(name, None) if name in installed else None for name in known}
        file = sys.modules["nanovllm.kernels.flash_attention"]
        monkeypatch.setattr(file, "find_spec", lambda name: finds.get(name, True))
        problem = None if "triton" in installed else "the package triton is not installed"
        for module in (attention, file):
            monkeypatch.setattr(module, "triton_problem", lambda: problem)
        for name in known.keys() & set(installed):
            monkeypatch.setitem(sys.modules, name, known[name])
        kernels = ModuleType("nanovllm.kernels.triton_attention")
        kernels.TritonAttention = type("TritonAttention", (), {})
        kernels.store_kvcache, kernels.copy_blocks = store_kvcache, copy_blocks
        monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
        module = pytest.importorskip("torch.nn.attention.varlen")
        monkeypatch.setattr(module, "varlen_attn", varlen_attn)

        def check_outputs(backend, *args):
            if type(backend).__name__ in failing or getattr(backend, "__name__", "") in failing:
                raise RuntimeError("no kernel image is available\nfor execution")

        monkeypatch.setattr(attention, "_check_outputs", check_outputs)

    return pretend


def chosen(name="auto", dtype=torch.bfloat16, layer=LAYER, block_size=256, device=CUDA) -> str:
    backend = choose_backend(name, device, dtype, layer, block_size)
    return getattr(backend, "__name__", type(backend).__name__)


EVERYTHING = ("flash_attn", "flash_attn_interface", "triton")


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        (EVERYTHING, "FlashAttention3"),
        (("flash_attn", "triton"), "FlashAttention2"),
        (("triton",), "TritonAttention"),
        ((), "TorchVarlen"),
    ],
)
def test_auto_takes_the_best_that_is_installed(gpu, installed, expected):
    gpu(installed=installed)
    assert chosen() == expected


def test_auto_passes_over_what_does_not_fit(gpu):
    gpu(installed=EVERYTHING)
    assert chosen(dtype=torch.float32) == "TritonAttention"
    assert chosen(layer=Attention(4, 2, 20)) == "TritonAttention"
    assert chosen(layer=Attention(4, 2, 512)) == "CPUAttention"
    assert chosen(block_size=16) == "FlashAttention3"
    gpu(installed=("flash_attn", "triton"))
    assert chosen(block_size=16) == "TritonAttention"
    gpu(installed=EVERYTHING, capability=(8, 6))
    assert chosen() == "FlashAttention2"
    gpu(installed=EVERYTHING, capability=(7, 5))
    assert chosen() == "CPUAttention"
    gpu(installed=EVERYTHING, failing=("FlashAttention3", "TritonAttention"))
    assert chosen() == "TorchVarlen"


def test_auto_says_what_it_took_and_why_nothing_better_in_one_line(gpu, caplog):
    caplog.set_level(logging.INFO, "nanovllm")
    gpu(installed=("flash_attn", "triton"), failing=("FlashAttention2",))
    chosen()
    assert [r.getMessage() for r in caplog.records] == [
        "attention: triton; not flash_attn: no kernel image is available"
    ]
    caplog.clear()
    gpu(installed=("flash_attn",))
    chosen()
    assert [r.getMessage() for r in caplog.records] == ["attention: flash_attn 2.8.3 (FA2)"]
    caplog.clear()
    gpu(capability=(7, 5))
    chosen()
    [record] = caplog.records
    assert record.levelno == logging.WARNING and "the GPU has 7.5" in record.getMessage()


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("flash_attn", {}, "flash-attn is not installed"),
        ("triton", {}, "triton is not installed"),
        ("torch_varlen", {"dtype": torch.float32}, "use dtype='bfloat16' rather than torch.float32"),
        ("torch_varlen", {"block_size": 16}, "multiple of 256, not 16"),
        ("torch_varlen", {"layer": Attention(4, 2, 20)}, "multiple of 8 up to 256, the model has 20"),
        ("triton", {"device": torch.device("cpu")}, "needs a CUDA GPU, the device is 'cpu'"),
    ],
)
def test_a_backend_that_cannot_work_is_refused_with_the_reason(gpu, name, settings, reason):
    gpu()
    with pytest.raises(ValueError, match=f"attention_backend='{name}' does not work here: .*{reason}.*'auto'"):
        chosen(name, **settings)


def test_a_backend_that_fails_when_it_is_tried_is_refused(gpu):
    gpu(installed=("triton",), failing=("TritonAttention",))
    with pytest.raises(ValueError, match=r"'triton' does not work here: no kernel image"):
        chosen("triton")


def test_a_pytorch_without_block_tables_is_no_candidate(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(sys.modules["torch.nn.attention.varlen"], "varlen_attn", lambda query, key, value: None)
    with pytest.raises(ValueError, match="no varlen_attn with block tables"):
        chosen("torch_varlen")


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("layer", "block_size"), [(LAYER, 256), (Attention(16, 8, 128), 512), (Attention(3, 1, 8), 256)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STAND_INS)
def test_the_trial_passes_what_computes_right(name, dtype, layer, block_size):
    attention._check_outputs(make(name), CPU, dtype, layer, block_size)


@pytest.mark.parametrize("block_size", [1, 3, 8, 16, 48])
def test_the_trial_is_for_any_block_size(block_size):
    attention._check_outputs(make("fa3"), CPU, torch.bfloat16, LAYER, block_size)
    attention._check_outputs(CPUAttention, CPU, torch.float32, LAYER, block_size)


def leave_rows_unwritten(module: ModuleType) -> None:
    """As FA2 does that splits the keys behind a block table: all but the first sequence's."""
    right = module.flash_attn_varlen_func

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, *args, block_table=None, **kwargs):
        out = right(q, k, v, cu_seqlens_q, *args, block_table=block_table, **kwargs)
        if block_table is not None:
            out[cu_seqlens_q[1] :] = 0
        return out

    module.flash_attn_varlen_func = flash_attn_varlen_func


def miss_the_second_block(module: ModuleType) -> None:
    right = module.flash_attn_with_kvcache
    module.flash_attn_with_kvcache = lambda *args, block_table, **kwargs: right(
        *args, block_table=block_table[:, :1].repeat(1, 2), **kwargs
    )


def return_nan(module: ModuleType) -> None:
    right = module.flash_attn_varlen_func
    module.flash_attn_varlen_func = lambda *args, **kwargs: right(*args, **kwargs).index_fill(
        0, torch.tensor([3]), torch.nan
    )


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (leave_rows_unwritten, "its prefill over a cached prefix is off by"),
        (miss_the_second_block, "its decode is off by"),
        (return_nan, "its prefill is off by nan"),
    ],
)
def test_what_computes_wrong_is_refused_with_the_reason(spoil, reason, monkeypatch, caplog):
    module = fa2()
    spoil(module)
    with patch("nanovllm.kernels.flash_attention.triton_problem", return_value="it has no CPU"):
        backend = FlashAttention2(module)
    monkeypatch.setitem(BACKENDS, "flash_attn", lambda *settings: (backend, "flash_attn"))
    caplog.set_level(logging.INFO, "nanovllm")
    assert choose_backend("auto", CPU, torch.bfloat16, LAYER, 256) is CPUAttention
    assert f"not flash_attn: {reason}" in caplog.text
    with pytest.raises(ValueError, match=f"'flash_attn' does not work here: {reason}"):
        choose_backend("flash_attn", CPU, torch.bfloat16, LAYER, 256)


def test_fa2_that_can_split_the_keys_behind_a_table_is_told_not_to():
    module, asked = fa2(), []
    right = module.flash_attn_varlen_func

    def flash_attn_varlen_func(*args, block_table=None, num_splits=0, **kwargs):
        asked.append((block_table is not None, num_splits))
        return right(*args, block_table=block_table, **kwargs)

    module.flash_attn_varlen_func = flash_attn_varlen_func
    with patch("nanovllm.kernels.flash_attention.triton_problem", return_value="it has no CPU"):
        attention._check_outputs(FlashAttention2(module), CPU, torch.bfloat16, LAYER, 256)
    assert asked == [(False, 0), (True, 1)]


def test_each_backend_has_blocks_of_its_own_size(monkeypatch):
    """FlashAttention 2 takes multiples of 256; the others are as fast with small ones, and find more in the cache."""
    with patch("nanovllm.kernels.flash_attention.triton_problem", return_value="it has no CPU"):
        backend = FlashAttention2(fa2())
    opened = []
    monkeypatch.setitem(BACKENDS, "flash_attn", lambda *settings: opened.append(settings[3]) or (backend, "flash_attn"))
    assert choose_backend("auto", CPU, torch.bfloat16, LAYER, None).block_size == 256
    assert opened == [256]
    assert FlashAttention3.block_size == CPUAttention.block_size == 64


def test_a_cpu_takes_the_plain_one():
    assert choose_backend("auto", torch.device("cpu"), torch.float32, LAYER, 16) is CPUAttention
    assert list(BACKENDS)[-1] == "cpu"


def test_importing_the_package_imports_no_kernels():
    import subprocess

    code = (  # transformers may import triton by itself
        "import sys; from transformers import AutoTokenizer; before = set(sys.modules); import nanovllm; "
        "assert not {'triton', 'flash_attn', 'flash_attn_interface'} & (sys.modules.keys() - before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_uploads_are_aligned_copies_of_all_arrays():
    import numpy as np

    arrays = [np.arange(3), None, np.arange(5, dtype=np.int32), np.ones((2, 7), np.int32), np.array([0.5])]
    buffer = torch.full((1024,), 77, dtype=torch.uint8)
    views = device_utils.upload(arrays, torch.device("cpu"), buffer)
    for array, view in zip(arrays, views, strict=True):
        if array is None:
            assert view is None
            continue
        assert torch.equal(view, torch.from_numpy(array))
        assert (view.data_ptr() - buffer.data_ptr()) % 16 == 0
        assert buffer.data_ptr() <= view.data_ptr() < buffer.data_ptr() + 1024
