"""The fused operations against plain PyTorch: in Triton's interpreter without a GPU, else on it.

Legend: T tokens, N features, I intermediate size, H/KH query/KV heads, D head_dim, V vocabulary.
"""

from typing import NamedTuple

import pytest
import torch

from aot import ALL, ARCHITECTURES, Binary, compile_kernel
from helpers import make_config, random_prompts, save_model
from launches import Specialization, record, without_interpreter
from nanovllm import LLM, SamplingParams
from nanovllm.kernels import fused
from nanovllm.layers.activation import silu_and_mul
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import RotaryEmbedding

pytest.importorskip("triton", reason="triton is published for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # the interpreter's bf16 is wrong
GUARD = 8192  # elements on each side of an output, more than any block


@pytest.fixture
def ops():
    from nanovllm.kernels import triton_fused

    return triton_fused


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """The layers compute in plain PyTorch, on a GPU too: they are the reference."""
    monkeypatch.setattr(fused, "_kernels", lambda *_: None)


@pytest.fixture
def poisoned(monkeypatch):
    """What the kernels allocate is NaN (integers: -1) until written, and what lies beside it must stay so."""
    buffers = []

    def new_empty(like, *shape, dtype=None, device=None):
        if 0 in shape:  # the interpreter's own
            return torch.empty(shape, dtype=dtype or like.dtype, device=device)
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        dtype = dtype or like.dtype
        poison = torch.nan if dtype.is_floating_point else -1
        buffer = torch.full((shape.numel() + 2 * GUARD,), poison, dtype=dtype, device=like.device)
        buffers.append((buffer, shape.numel()))
        return buffer[GUARD : GUARD + shape.numel()].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda like: new_empty(like, like.shape))
    yield
    assert buffers
    for buffer, size in buffers:
        guards = torch.cat([buffer[:GUARD], buffer[GUARD + size :]])
        assert (guards.isnan() if buffer.is_floating_point() else guards == -1).all()


def columns(num_tokens: int, widths: list[int], dtype: torch.dtype, scale: float = 1.0) -> list[torch.Tensor]:
    """Random column slices of one tensor, between columns of NaN."""
    whole = torch.randn(num_tokens, sum(widths) + 32, device=DEVICE) * scale
    whole[:, :16] = whole[:, -16:] = torch.nan
    return list(whole.to(dtype)[:, 16:-16].split(widths, dim=-1))


def make_norm(size: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(size, 1e-6).to(DEVICE, dtype)
    norm.weight.data.normal_()
    return norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 1000, 1024, 3072, 5120])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_add_rms_norm_equals_the_layer(ops, poisoned, num_tokens, size, dtype):
    """The sum to the bit. The norm to two roundings: its mean is added up in another order."""
    torch.manual_seed(size)
    x, residual = columns(num_tokens, [size, size], dtype)
    norm = make_norm(size, dtype)
    for stream in (residual, None):
        normed, total = ops.add_rms_norm(x, stream, norm.weight, norm.eps)
        expected, expected_total = norm.add_norm(x, stream)
        assert torch.equal(total, expected_total)
        bound = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
        torch.testing.assert_close(normed, expected, rtol=bound, atol=0)


def test_add_rms_norm_rounds_the_sum_before_it_normalises(ops):
    """2048 + 1 is 2048 in fp16: the norm must be that of the rounded stream."""
    x, residual = (torch.tensor([[a, b]], dtype=torch.float16, device=DEVICE) for a, b in [(2048, 3), (1, 0)])
    weight = torch.ones(2, dtype=torch.float16, device=DEVICE)
    normed, total = ops.add_rms_norm(x, residual, weight, 0.0)
    assert total.tolist() == [[2048, 3]]
    assert normed.tolist() == ops.add_rms_norm(total, None, weight, 0.0)[0].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norms", [True, False])
@pytest.mark.parametrize(
    "heads",
    [(4, 2, 32), (8, 2, 64), (5, 1, 80), (3, 3, 96), (16, 8, 128), (40, 8, 128), (2, 1, 256)],
    ids=lambda heads: "H{}-KH{}-D{}".format(*heads),
)
def test_norm_rope_equals_the_layers(ops, poisoned, heads, with_norms, dtype):
    """To a few roundings of a pair's length: what rotates into each other shares its error."""
    num_heads, num_kv_heads, head_dim = heads
    torch.manual_seed(head_dim)
    rotary = RotaryEmbedding(make_config(), head_dim, 64).to(DEVICE)
    positions = torch.tensor([0, 63, 5, 5, 17], device=DEVICE)
    q, k = columns(5, [num_heads * head_dim, num_kv_heads * head_dim], dtype, scale=3.0)
    q, k = q.view(5, num_heads, head_dim), k.view(5, num_kv_heads, head_dim)
    norms = (make_norm(head_dim, dtype), make_norm(head_dim, dtype)) if with_norms else (None, None)
    weights = (norm and norm.weight for norm in norms)
    got = ops.norm_rope(q, k, *weights, 1e-6, rotary.cos, rotary.sin, positions)
    for ours, expected in zip(got, rotary(positions, q, k, *norms), strict=True):
        assert ours.is_contiguous() and ours.shape == expected.shape
        lengths = torch.hypot(*expected.double().chunk(2, dim=-1)).repeat(1, 1, 2)
        assert ((ours.double() - expected.double()).abs() <= 3 * torch.finfo(dtype).eps * lengths).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 96, 1000, 3072])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_silu_and_mul_equals_the_layer(ops, poisoned, num_tokens, size, dtype):
    """To a few roundings: two libraries' exponentials are not the same to the bit."""
    torch.manual_seed(size)
    gate, up = columns(num_tokens, [size, size], dtype)
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(ops.silu_and_mul(gate, up), silu_and_mul(gate, up), rtol=bound, atol=0)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # in the interpreter, and meant
def test_silu_and_mul_of_large_gates_is_finite(ops):
    gate = torch.tensor([[-6e4, -200.0, 200.0, 6e4]], dtype=torch.float16, device=DEVICE)
    assert ops.silu_and_mul(gate, torch.ones_like(gate)).tolist() == [[0.0, 0.0, *gate[0, 2:].tolist()]]


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # in the interpreter, and meant
@pytest.mark.parametrize("logit", [-torch.inf, torch.nan])
def test_a_row_without_a_distribution_still_gives_a_token(ops, poisoned, logit):
    """Which one means nothing, but one outside the vocabulary would end the process at the next embedding."""
    logits = torch.full((3, 3000), logit, device=DEVICE)
    temperatures, uniforms = torch.tensor([0.0, 1.0, 1e30], device=DEVICE), torch.full((3,), 1 - 2**-53).double()
    tokens = ops.sample(logits, temperatures, uniforms.to(DEVICE))
    assert ((tokens >= 0) & (tokens < 3000)).all()


def test_the_engine_computes_the_same_through_the_kernels(ops, tmp_path, monkeypatch):
    save_model(tmp_path)
    prompts, params = random_prompts([3, 17, 1]), SamplingParams(temperature=0.5, max_tokens=6, seed=1)
    settings = {"device": DEVICE, "dtype": "float32", "num_kvcache_blocks": 8, "enforce_eager": True}
    with LLM(tmp_path, **settings) as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
    called = set()

    class Ops:
        def __getattr__(self, name):
            called.add(name)
            return getattr(ops, name)

    monkeypatch.setattr(fused, "_kernels", lambda *_: Ops())
    with LLM(tmp_path, **settings) as llm:
        assert llm.generate(prompts, params, use_tqdm=False) == expected
    assert called == {"add_rms_norm", "norm_rope", "silu_and_mul", "sample"}


# What is compiled. The shapes in bf16 of one rank: N, H, KH, D, I, V.

SHAPES = {
    "nano-qwen3": (192, 8, 4, 32, 576, 1536),
    "Qwen3-0.6B": (1024, 16, 8, 128, 3072, 151_936),
    "Qwen3-4B": (2560, 32, 8, 128, 9728, 151_936),
    "Qwen3-8B": (4096, 32, 8, 128, 12_288, 151_936),
    "Qwen3-32B": (5120, 64, 8, 128, 25_600, 151_936),
    "Qwen3-32B on 8 ranks": (5120, 8, 1, 128, 3200, 151_936),
}
RAGGED = [1, 2, 3, 8, 15, 16, 17, 64, 100, 257]


def launch_step(num_tokens: int, num_seqs: int, shape: tuple[int, ...]) -> None:
    """The kernels of a step, as the layers and the runner call them; small inputs lie anywhere in one buffer."""
    from nanovllm.kernels import triton_fused as ops

    hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size = shape
    bf16 = {"dtype": torch.bfloat16}
    x, residual = torch.empty(num_tokens, hidden_size, **bf16), torch.empty(num_tokens, hidden_size, **bf16)
    weight, head_weight = torch.empty(hidden_size, **bf16), torch.empty(head_dim, **bf16)
    ops.add_rms_norm(x, None, weight, 1e-6)
    ops.add_rms_norm(x, residual, weight, 1e-6)
    widths = [heads * head_dim for heads in (num_heads, num_kv_heads, num_kv_heads)]
    q, k, _ = torch.empty(num_tokens, sum(widths), **bf16).split(widths, dim=-1)
    q, k = q.view(-1, num_heads, head_dim), k.view(-1, num_kv_heads, head_dim)
    angles = torch.empty(4096, head_dim // 2)
    positions = torch.empty(2 * num_tokens, dtype=torch.int64)[num_tokens:]
    ops.norm_rope(q, k, head_weight, head_weight, 1e-6, angles, angles, positions)
    ops.silu_and_mul(*torch.empty(num_tokens, 2 * intermediate_size, **bf16).chunk(2, dim=-1))
    temperatures = torch.empty(2 * num_seqs)[num_seqs:]
    uniforms = torch.empty(2 * num_seqs, dtype=torch.float64)[num_seqs:]
    for logits in (torch.empty(num_seqs, vocab_size, **bf16), torch.empty(num_seqs, vocab_size)):
        ops.sample(logits, temperatures, uniforms)
        ops.sample(logits, None, None)


class Recorded(NamedTuple):
    """What must be compiled"""

    warm_up: set[Specialization]  # for a batch of Qwen3-0.6B
    ragged: set[Specialization]  # for ragged ones
    careless: set[Specialization]  # for the same, had the kernels not been told what not to specialise for
    shapes: dict[str, set[Specialization]]  # for a batch of each shape


def record_all() -> tuple:
    from triton import JITFunction

    from nanovllm.kernels import triton_fused as ops

    def launch_ragged():
        for num_tokens, num_seqs in zip(RAGGED, reversed(RAGGED), strict=True):
            launch_step(num_tokens, num_seqs, SHAPES["Qwen3-0.6B"])

    shapes = {name: record(lambda: launch_step(17, 17, shape)) for name, shape in SHAPES.items()}  # noqa: B023
    warm_up, ragged = record(lambda: launch_step(64, 64, SHAPES["Qwen3-0.6B"])), record(launch_ragged)
    for name in ("_norm_rope_kernel", "_sum_kernel", "_pick_kernel"):
        setattr(ops, name, JITFunction(getattr(ops, name).fn))
    return warm_up, ragged, record(launch_ragged), shapes


@pytest.fixture(scope="module")
def recorded():
    return Recorded(*without_interpreter(record_all))


def test_no_batch_compiles_anything_after_a_warm_up(recorded):
    """And the count notices kernels that are compiled for the alignment of what lies anywhere."""
    assert len(recorded.warm_up) == 2 + 1 + 1 + 2 * 2  # with and without residual; bf16 and fp32 logits
    assert recorded.ragged == recorded.warm_up
    grown = {each.kernel for each in recorded.careless - recorded.warm_up}
    assert grown == {"_norm_rope_kernel", "_sum_kernel", "_pick_kernel"}


@pytest.mark.parametrize("arch", ARCHITECTURES, ids="sm_{}".format)
def test_every_kernel_compiles_ahead_of_time_without_spills(ops, recorded, arch):
    every = set.union(*recorded.shapes.values()) if ALL or arch == 90 else recorded.shapes["Qwen3-0.6B"]
    assert {each.kernel for each in every} == {name for name in vars(ops) if name.endswith("_kernel")}
    for each in sorted(every, key=str):
        binary = compile_ahead(ops, each, arch)
        assert binary.shared <= 48 * 1024, each  # what every GPU grants without being asked
        assert binary.spilled == 0, each


def test_rows_are_read_and_written_16_bytes_at_a_time(ops, recorded):
    """Never as single numbers of 2 bytes, as they would be were a stride's divisibility unknown."""
    for each in recorded.shapes["Qwen3-0.6B"]:
        ptx = compile_ahead(ops, each, 90).ptx
        assert ".global.v4.b32" in ptx and ".global.b16" not in ptx, each


def compile_ahead(ops, each: Specialization, arch: int) -> Binary:
    signature, constexprs = dict(each.signature), dict(each.constexprs)
    return compile_kernel(getattr(ops, each.kernel), signature, constexprs, arch, each.num_warps, each.num_stages)
