"""The CPU's C++ kernels against plain PyTorch; attention itself is in test_attention.py, in bf16."""

import ctypes
import os
import subprocess
import sys
import tempfile
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F

from helpers import ROOT, chi_squared_p
from nanovllm.kernels import cpu as cpu_kernels
from nanovllm.kernels import quantized
from nanovllm.kernels.cpu import Int4Weight, Int8Weight, PackedWeight, build, compiled, targets
from nanovllm.kernels.cpu.compiled import Memory, Recording, load_kernels
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.utils.context import Context
from pairs import in_turn

needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="no kernels for this processor, or no compiler")
on_each_target = pytest.mark.usefixtures("target")
BF16 = torch.bfloat16
KINDS = [PackedWeight, Int8Weight, Int4Weight]


def pack(kind: type[PackedWeight], weight: torch.Tensor) -> PackedWeight:
    """A weight of this kind; in 4 bits in groups of 64 or 32 inputs if these divide their number, else of all."""
    if kind is not Int4Weight:
        return kind(weight.clone())
    group_size = next(size for size in (64, 32, weight.shape[1]) if weight.shape[1] % size == 0)
    return Int4Weight.of_codes(quantized.quantize(weight, 4, group_size))


def relative_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()


@on_each_target
@pytest.mark.parametrize("n, k", [(32, 4), (96, 132), (1024, 3072), (21, 64), (45, 8)])
@pytest.mark.parametrize("m", [1, 2, 11, 12, 13, 33, 300])
def test_linear_is_as_exact_as_bf16_can_be(m, n, k):
    torch.manual_seed(m)
    weight, bias = torch.randn(n, k, dtype=BF16), torch.randn(n, dtype=BF16)
    x = torch.randn(m, k + 8, dtype=BF16)[:, :k]
    exact = x.double() @ weight.double().T
    packed = PackedWeight(weight.clone())
    # A result rounded to bf16 is off by at most 2^-9 of itself, and by 0.6 of that in the mean of squares.
    assert relative_error(packed.linear(x), exact) < 0.62 * 2**-8
    assert relative_error(packed.linear(x, bias), exact + bias.double()) < 0.62 * 2**-8


@on_each_target
def test_packing_keeps_the_memory_and_its_rows():
    weight = torch.randn(96, 20, dtype=BF16)
    original, pointer = weight.clone(), weight.data_ptr()
    packed = PackedWeight(weight)
    assert packed.parts[0].data_ptr() == pointer
    assert not torch.equal(weight, original)
    ids = torch.tensor([0, 95, 31, 32, 31])
    assert torch.equal(packed.rows(ids), original[ids])


@on_each_target
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 31, 33, 61])
@pytest.mark.parametrize("k", [132, 192])
def test_results_for_rows_that_do_not_fill_a_panel_end_where_they_should(kind, n, k):
    """Those of a weight that does, less the last columns; and the memory after them is left alone."""
    torch.manual_seed(n)
    weight, bias, x = torch.randn(64, k, dtype=BF16), torch.randn(64, dtype=BF16), torch.randn(25, k, dtype=BF16)
    whole, part = pack(kind, weight), pack(kind, weight[:n])
    assert part.shape == (n, k)
    assert torch.equal(part.rows(torch.arange(n)), whole.rows(torch.arange(n)))
    assert torch.equal(part.linear(x), whole.linear(x)[:, :n])
    beyond = torch.full((26, n), 7, dtype=BF16)
    sizes = 25, n, k, *part.more
    compiled.call("linear_" + kind.kind, x, x.stride(0), *part.parts, bias[:n].clone(), beyond[:25], *sizes)
    assert torch.equal(beyond[:25], whole.linear(x, bias)[:, :n]) and (beyond[25] == 7).all()


@on_each_target
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [32, 64, 100, 320, 6176])  # of the last, many rows are multiplied in slices
def test_a_row_has_the_same_result_beside_any_number_of_others(kind, k):
    torch.manual_seed(k)
    weight, bias = pack(kind, torch.randn(96, k, dtype=BF16)), torch.randn(96, dtype=BF16)
    x = torch.randn(301, k, dtype=BF16)
    expected = torch.cat([weight.linear(row, bias) for row in x.split(1)])
    for m in (2, 3, 5, 12, 13, 16, 17, 31, 32, 33, 48, 65, 257, 301):
        assert torch.equal(weight.linear(x[-m:], bias), expected[-m:])


@on_each_target
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_result_however_the_work_is_cut(kind):
    """Into slices of panels and groups of them, which depend on the numbers of rows and of threads."""
    torch.manual_seed(0)
    weight, x = pack(kind, torch.randn(1100, 704, dtype=BF16)), torch.randn(300, 704, dtype=BF16)
    expected = {row: weight.linear(x[row : row + 1])[0] for row in (0, 31, 62, 63, 256, 299)}
    try:
        for num_threads in (1, 3):
            cpu_kernels.set_num_threads(num_threads)
            for m in (63, 64, 257, 300):
                result = weight.linear(x[:m])
                assert all(torch.equal(result[row], expected[row]) for row in expected if row < m)
    finally:
        cpu_kernels.set_num_threads(0)


def quantize(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, groups, group] integers and their [n, groups, 1] scales; the last group is filled up with zeros."""
    x = F.pad(x.float(), (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    scale = x.abs().amax(-1, keepdim=True) / 127
    scale[scale == 0] = 1
    return (x * (1 / scale)).round(), scale


@on_each_target
@pytest.mark.parametrize("n, k", [(32, 4), (96, 132), (1024, 3072), (21, 64), (45, 8)])
@pytest.mark.parametrize("m", [1, 12, 13, 40])
def test_int8_linear_computes_with_quantised_weights_and_activations(m, n, k):
    torch.manual_seed(m)
    weight, bias = torch.randn(n, k, dtype=BF16), torch.randn(n, dtype=BF16)
    x = torch.randn(m, k, dtype=BF16)
    x[0, 0] = 100  # an outlier spoils its own group of 128 and no other
    x[-1] = 0
    values, scales = quantize(weight, k)
    activations, x_scales = quantize(x, 128)
    exact = ((activations * x_scales).flatten(1)[:, :k].double() @ (values * scales).flatten(1).double().T) + bias
    packed = Int8Weight(weight)
    of_codes = Int8Weight(values.flatten(1).to(torch.int8), scales.flatten())
    # Values that lie half-way between two integers may be rounded either way.
    assert relative_error(packed.linear(x, bias), exact) < 2**-8
    assert relative_error(of_codes.linear(x, bias), exact) < 2**-8
    rows = packed.rows(torch.arange(n)).float()
    assert (rows - weight.float()).abs().max() <= scales.max() * 0.5 + 2**-6  # of a value below 8, to bf16
    assert relative_error(rows, (values * scales).flatten(1)) < 2**-8


@on_each_target
@pytest.mark.parametrize("group, head_dim", [(1, 128), (2, 64), (3, 80), (8, 256), (40, 32)])
@pytest.mark.parametrize("size", [1, 30])  # of the latter weights are from 1 to less than fp32 holds
def test_a_token_attends_alike_alone_and_in_any_chunk(group, head_dim, size):
    torch.manual_seed(group)
    n, block_size = 203, 16 * group
    q, k, v = (torch.randn(n, heads, head_dim, dtype=BF16) for heads in (2 * group, 2, 2))
    q *= size
    whole = Context(torch.tensor([0, n]).int(), context_lens=torch.tensor([n]).int())
    expected = cpu_kernels.attend(q, k, v, whole)  # over new keys; below over a cache
    blocks = torch.randperm(-(-n // block_size)).int()
    caches = [torch.full((len(blocks), 2, block_size, head_dim), torch.nan, dtype=BF16) for _ in range(2)]
    slots = blocks[torch.arange(n) // block_size].long() * block_size + torch.arange(n) % block_size
    cpu_kernels.store(k, caches[0], slots), cpu_kernels.store(v, caches[1], slots)
    for chunk in (1, 5, 31, 150, n):
        ends = torch.arange(chunk, n + chunk, chunk).clamp(max=n)  # chunks as if of sequences that share a cache
        bounds = None if chunk == 1 else F.pad(ends, (1, 0)).int()
        context = Context(bounds, context_lens=ends.int(), block_tables=blocks.expand(len(ends), -1).contiguous())
        assert torch.equal(cpu_kernels.attend(q, *caches, context), expected)


@on_each_target
@pytest.mark.parametrize("dtype", [BF16, torch.uint8])
def test_long_contexts_come_out_alike_however_many_threads_share_their_keys(dtype):
    """Alone, beside others, and as a chunk across the end of a span of 2,048 keys."""
    torch.manual_seed(0)
    lens, block_size = torch.tensor([4500, 2049, 70, 2048]), 64
    k, v = (torch.randn(4500, 2, 64).to(BF16) for _ in "kv")
    q = (3 * torch.randn(len(lens), 4, 64)).to(BF16)
    row = 64 + (cpu_kernels.SCALE_BYTES if dtype == torch.uint8 else 0)
    caches = [torch.zeros(71, 2, block_size, row, dtype=dtype) for _ in "kv"]  # all sequences begin alike
    cpu_kernels.store(k, caches[0], torch.arange(4500)), cpu_kernels.store(v, caches[1], torch.arange(4500))
    tables, expected = torch.arange(71).int().expand(len(lens), -1).contiguous(), None
    chunk = (3 * torch.randn(20, 4, 64)).to(BF16)
    ends = torch.arange(2040, 2060).int()
    chunk_tables = tables[:1].expand(20, -1).contiguous()
    together = Context(torch.tensor([0, 20]).int(), context_lens=ends[-1:], block_tables=tables[:1])
    try:
        for num_threads in (1, 3, 64):
            cpu_kernels.set_num_threads(num_threads)
            found = cpu_kernels.attend(q, *caches, Context(context_lens=lens.int(), block_tables=tables))
            for i in range(len(lens)):
                alone = Context(context_lens=lens[i : i + 1].int(), block_tables=tables[:1])
                assert torch.equal(cpu_kernels.attend(q[i : i + 1], *caches, alone), found[i : i + 1])
            singly = cpu_kernels.attend(chunk, *caches, Context(context_lens=ends, block_tables=chunk_tables))
            assert torch.equal(cpu_kernels.attend(chunk, *caches, together), singly)
            expected = found if expected is None else expected
            assert torch.equal(found, expected)
    finally:
        cpu_kernels.set_num_threads(0)
    for i, n in enumerate(lens.tolist()):
        keys, values = (x[:n].repeat_interleave(2, 1).transpose(0, 1).double() for x in (k, v))
        exact = F.scaled_dot_product_attention(q[i, :, None].double(), keys, values)[:, 0]
        assert relative_error(found[i], exact) < (0.01 if dtype == BF16 else 0.03)


@on_each_target
@pytest.mark.parametrize(
    ("size", "codes"),
    in_turn(
        [(64, 256, 128), (45, 96, 32), (33, 340, 48), (70, 272, 16), (40, 352, 176), (21, 132, 132)] * 3,
        [(torch.float16, True), (BF16, False), (torch.float32, True), (torch.float16, False), (BF16, True)],
        is_whole=False,
    ),
    ids=str,
)
@pytest.mark.parametrize("m", [1, 13, 40])
def test_int4_linear_computes_with_quantised_activations(m, size, codes):
    """Scales of all outputs differ by more than fp16 can tell."""
    torch.manual_seed(m)
    (n, k, group_size), (scales, has_zeros) = size, codes
    groups = n, -(-k // group_size)
    codes, zeros = (torch.randint(0, 256, (n, k // 2)).byte(), torch.randint(0, 16, groups).byte())
    sizes = torch.ones(n) if scales == torch.float16 else torch.logspace(-9, 9, n)
    found = ((torch.rand(groups) + 0.1) * sizes.unsqueeze(1)).to(scales)
    codes = quantized.QuantizedWeight(codes, found, zeros if has_zeros else None, group_size)
    meant = codes.dequantize()
    x, bias = torch.randn(m, k, dtype=BF16), torch.randn(n, dtype=BF16)
    x[0, 0] = 100  # an outlier spoils its own group of 128 and no other
    x[1:2] = 0
    activations, x_scales = quantize(x, 128)
    activations = (activations * x_scales).flatten(1)[:, :k].double()
    exact = activations @ meant.double().T + bias
    packed = Int4Weight.of_codes(codes)
    # Results are rounded to bf16, sums to fp32, scales in fp32 to fp16.
    rounding = 2**-11 if scales == torch.float32 else 2**-20
    out = packed.linear(x, bias)
    assert torch.equal(out[:1], packed.linear(x[:1], bias))  # which another function computes
    error = (out.double() - exact).abs()
    assert (error <= 1.01 * 2**-8 * exact.abs() + rounding * (activations.abs() @ meant.abs().double().T)).all()
    rows = packed.rows(torch.arange(n))
    assert torch.equal(rows, meant.to(BF16)) or (scales == torch.float32 and torch.allclose(rows.float(), meant, 2**-7))


@on_each_target
@pytest.mark.parametrize(("n", "k", "group_size"), [(64, 256, 128), (45, 96, 32), (40, 64, 16), (1024, 1024, 128)])
def test_int4_is_quantised_as_by_plain_pytorch(n, k, group_size):
    """Whatever a row's size: but for scales in more bits."""
    torch.manual_seed(0)
    weight = torch.randn(n, k) * torch.logspace(-20, 20, n).unsqueeze(1)
    weight[0], weight[1, :group_size], weight[2], weight[4] = 0, 0, 0.5, weight[4].abs()
    weight = weight.to(BF16)
    expected = quantized.quantize(weight, 4, group_size).dequantize()
    found = Int4Weight(weight, group_size).rows(torch.arange(n)).float()
    assert (found[0] == 0).all() and (found[1, :group_size] == 0).all()
    sizes = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-30)  # whose squares fp32 cannot hold
    error, least = ((((x - weight) / sizes) ** 2).sum(1) for x in (found, expected))
    assert (error <= 1.02 * least + 1e-4).all() and error.sum() < 1.01 * least.sum()
    assert ((found - expected).abs() < 2**-6 * sizes).float().mean() > 0.99


@on_each_target
def test_int4_codes_are_reordered_where_they_are():
    codes = quantized.quantize(torch.randn(64, 256), 4, 128)
    packed = Int4Weight.of_codes(codes)
    assert packed.parts[0].data_ptr() == codes.values.data_ptr()
    assert packed.nbytes == 64 * 256 // 2 + 64 * 2 * 3 + 64 * 4


@on_each_target
@pytest.mark.parametrize("n", [1, 20, 1000, 1024])
def test_norm_and_gate_round_as_plain_pytorch_does(n):
    torch.manual_seed(n)
    x, residual = torch.randn(7, n, dtype=BF16), torch.randn(7, n, dtype=BF16)
    norm = RMSNorm(n, 1e-6)
    norm.weight.data = torch.randn(n, dtype=BF16)
    out, total = cpu_kernels.add_rms_norm(x, residual, norm.weight, norm.eps)
    assert torch.equal(total, x + residual)
    # The mean of squares is summed up in another order.
    assert torch.allclose(out.float(), norm(total).float(), rtol=2**-7)
    first, same = cpu_kernels.add_rms_norm(x, None, norm.weight, norm.eps)
    assert same is x and torch.allclose(first.float(), norm(x).float(), rtol=2**-7)
    gate, up = (torch.randn(7, 2 * n, dtype=BF16) * 5).chunk(2, dim=-1)
    expected = F.silu(gate) * up
    assert torch.allclose(cpu_kernels.silu_and_mul(gate, up).float(), expected.float(), rtol=2**-7, atol=1e-30)


@on_each_target
def test_gate_of_extreme_values():
    gate = torch.tensor([[-3e38, -200.0, -88.0, 0.0, 200.0, 3e38]], dtype=BF16)
    ones = torch.ones_like(gate)
    assert torch.allclose(cpu_kernels.silu_and_mul(gate, ones).float(), F.silu(gate.float()), rtol=2**-7, atol=1e-30)


@on_each_target
@pytest.mark.parametrize("head_dim", [32, 80, 128])
@pytest.mark.parametrize("with_norm", [True, False])
def test_norm_and_rotation(head_dim, with_norm):
    torch.manual_seed(0)
    qkv = torch.randn(9, 6 * head_dim, dtype=BF16)
    q, k = qkv[:, : 4 * head_dim].view(9, 4, head_dim), qkv[:, 4 * head_dim :].view(9, 2, head_dim)
    angles = torch.outer(torch.arange(50).float(), torch.rand(head_dim // 2))
    cos, sin, positions = angles.cos(), angles.sin(), torch.randint(0, 50, (9,))
    norms = [RMSNorm(head_dim, 1e-6) for _ in range(2)]
    for norm in norms:
        norm.weight.data = torch.randn(head_dim, dtype=BF16)
    weights = [norm.weight if with_norm else None for norm in norms]
    results = cpu_kernels.norm_rope(q, k, *weights, 1e-6, cos, sin, positions)
    for x, norm, out in zip((q, k), norms, results, strict=True):
        x1, x2 = (norm(x) if with_norm else x).float().chunk(2, -1)
        c, s = cos[positions][:, None], sin[positions][:, None]
        expected = torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1)
        assert out.is_contiguous() and torch.allclose(out.float(), expected, rtol=2**-6, atol=2**-6)


@on_each_target
@pytest.mark.parametrize("vocab_size", [7, 512, 1300])
def test_sampled_tokens_follow_the_distribution(vocab_size):
    torch.manual_seed(vocab_size)
    logits = (torch.randn(vocab_size) * 2).to(BF16)
    logits[3] = -torch.inf
    n, temperature = 20_000, 0.7
    tokens = cpu_kernels.sample(logits.expand(n, -1), torch.full((n,), temperature), torch.rand(n, dtype=torch.float64))
    counts = torch.bincount(tokens, minlength=vocab_size)
    assert counts[3] == 0
    assert chi_squared_p(counts, (logits.float() / temperature).softmax(-1)) > 1e-4


@on_each_target
def test_sampling_at_the_edges():
    logits = torch.tensor([[1, 5, 5, -torch.inf], [5, 1, 0, -torch.inf]], dtype=BF16).repeat(3, 1)
    temperatures = torch.tensor([0, 1e-6, 1e6, 1, 1, 1e-30])
    uniforms = torch.tensor([0.9, 0.2, 0.99, 1 - 2**-53, 0, 0.5], dtype=torch.float64)
    assert cpu_kernels.sample(logits, temperatures, uniforms).tolist() == [1, 0, 2, 2, 0, 0]
    assert cpu_kernels.sample(logits, None, None).tolist() == [1, 0] * 3


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_a_recording_repeats_its_calls_on_new_inputs(kind):
    torch.manual_seed(0)
    weights = [pack(kind, torch.randn(64, 64, dtype=BF16) / 8) for _ in range(3)]
    scale = torch.ones(64, dtype=BF16)
    x = torch.randn(5, 64, dtype=BF16)

    def work():
        y, residual = cpu_kernels.add_rms_norm(x, None, scale, 1e-6)
        for weight in weights:
            y, residual = cpu_kernels.add_rms_norm(weight.linear(y), residual, scale, 1e-6)
        return y

    first = work()
    recording = Recording(work, Memory(5))
    assert torch.equal(recording.output, first)
    x.normal_()
    expected = work()
    assert not torch.equal(expected, first)
    assert torch.equal(recording.replay(), expected)


@needs_kernels
def test_recordings_of_all_sizes_share_their_memory_but_never_a_buffer_in_use():
    x, scale = torch.randn(40, 64, dtype=BF16), torch.ones(64, dtype=BF16)

    def work(num_rows):
        mine = x[:num_rows]
        results = [cpu_kernels.silu_and_mul(mine, mine) for _ in range(4)]
        assert len({result.data_ptr() for result in results}) == 4
        view = results[0][1:]
        del results  # the view keeps one of them
        others = [cpu_kernels.silu_and_mul(mine, mine) for _ in range(4)]
        assert view.data_ptr() - 128 not in {other.data_ptr() for other in others}
        return cpu_kernels.add_rms_norm(mine, None, scale, 1e-6)[0]

    memory = Memory(40)
    recordings = {num_rows: Recording(lambda: work(num_rows), memory) for num_rows in (2, 40, 7, 39, 1)}  # noqa: B023
    assert memory.nbytes == 6 * 40 * 64 * 2  # five in use at a time and one more, each for the most rows
    for num_rows, recording in recordings.items():
        assert torch.equal(recording.replay(), work(num_rows))


@needs_kernels
def test_memory_ends_with_its_last_recording():
    x = torch.randn(3, 64, dtype=BF16)
    memory = Memory(3)
    recording, buffers = Recording(lambda: cpu_kernels.silu_and_mul(x, x), memory), memory._free
    [buffer] = [weakref.ref(buffer) for free in buffers.values() for buffer in free]
    del memory, buffers
    assert torch.equal(recording.replay(), cpu_kernels.silu_and_mul(x, x)) and buffer() is not None
    del recording
    assert buffer() is None


@needs_kernels
def test_a_recording_holds_nothing_of_other_threads():
    x, started, done = torch.randn(3, 64, dtype=BF16), threading.Event(), threading.Event()

    def elsewhere():
        started.wait()
        cpu_kernels.silu_and_mul(-x, x)
        done.set()

    def work():
        started.set()
        done.wait()
        return cpu_kernels.silu_and_mul(x, x)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    recording = Recording(work, Memory(3))
    thread.join()
    assert len(recording._table) == 1 and recording.memory.nbytes == x.nbytes


def write_compiler(path, text: str = "cat", version: str = "1"):
    """A script in a compiler's place: says its version, or runs `text` with its output going to the library."""
    find_output = 'while [ "$1" != -o ]; do shift; done; exec > "$2"'
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec echo {version}\n{find_output}\n{text} < "$0"\n')
    path.chmod(0o700)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The directory of libraries, and a compiler that takes no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(write_compiler(tmp_path / "c++")))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "nanovllm"


@needs_kernels
def test_library_is_compiled_once_and_found_where_the_compiler_is_gone(cache, monkeypatch):
    monkeypatch.delenv("CXX")
    flags = targets.usable_targets()[0].flags
    library = build.build(flags)
    assert ctypes.CDLL(str(library)).attend and list(cache.iterdir()) == [library]
    os.utime(library, (1, 1))
    assert build.build(flags) == library
    monkeypatch.setenv("CXX", "/does/not/exist")
    assert build.build(flags) == library and library.stat().st_mtime == 1


def test_sources_flags_and_compiler_each_make_another_library(cache, monkeypatch, tmp_path):
    first = build.build([])
    write_compiler(tmp_path / "c++", version="2")
    second = build.build([])
    third = build.build(["-g"])
    monkeypatch.setattr(build, "HEADERS", [write_compiler(tmp_path / "changed.h")])
    assert len({first, second, third, build.build(["-g"])}) == len(list(cache.iterdir())) == 4
    write_compiler(tmp_path / "c++", version="1")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    assert build.build([]) == first


def load_warned() -> str:
    """What is said where there are no kernels."""
    with pytest.warns(UserWarning, match="several times slower. The reason: ") as record:
        assert load_kernels.__wrapped__() is None
    [warning] = record
    return str(warning.message)


@needs_kernels
def test_without_a_compiler_one_warning_says_so(cache, monkeypatch):
    monkeypatch.setenv("CXX", "/does/not/exist")
    assert "there is no C++ compiler" in load_warned()


@needs_kernels
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing_behind(cache, tmp_path):
    compiler = write_compiler(tmp_path / "c++", "echo 'In file x.h\nerror: no AVX\nthe end' >&2; exit 1")
    assert load_warned().endswith(f"{compiler} failed: error: no AVX")
    assert not list(cache.iterdir())


def test_without_a_home_to_write_to_the_directory_for_temporary_files_is_used(cache, monkeypatch, tmp_path):
    for variable, home in (("XDG_CACHE_HOME", "/proc/nowhere"), ("XDG_CACHE_HOME", ""), ("HOME", "/dev/null")):
        monkeypatch.setenv("HOME", "~")  # as where nobody knows a user's home
        monkeypatch.setenv(variable, home)
        library = build.build([])
    assert library.parent == tmp_path / "temporary" / f"nanovllm_kernels_{os.getuid()}"
    assert list(library.parent.iterdir()) == [library] and library.parent.stat().st_mode & 0o077 == 0


def test_a_directory_of_another_user_is_not_trusted(cache, monkeypatch):
    monkeypatch.setattr(build, "UID", build.UID + 1)
    with pytest.raises(RuntimeError, match=rf"{cache}: it belongs to another user; .*XDG_CACHE_HOME"):
        build.build([])
    assert not list(cache.iterdir())


@needs_kernels
def test_where_a_target_does_not_compile_the_next_lower_one_is_taken_with_one_warning(cache, monkeypatch, tmp_path):
    best, lower, *_ = [*targets.usable_targets(), None]
    if lower is None:
        pytest.skip("only one instruction set here")
    [flag] = set(best.flags) - set(lower.flags)
    fails = f'case "$*" in *{flag}*) echo "error: unknown option" >&2; exit 1;; esac'
    copies = f'while [ "$1" != -o ]; do shift; done; exec cp {load_kernels()._name} "$2"'
    (tmp_path / "c++").write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec echo 3\n{fails}\n{copies}\n')
    with pytest.warns(UserWarning, match=f"those for {lower.name}.*{best.name}: .*error: unknown option") as record:
        assert load_kernels.__wrapped__().target == lower.name
    assert len(record) == 1
    monkeypatch.setenv(targets.VARIABLE, lower.name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_kernels.__wrapped__().target == lower.name


def test_processors_get_the_best_target_that_they_have_all_instructions_for(monkeypatch, recwarn):
    def has(*features: str) -> list[str]:
        monkeypatch.setattr(targets, "cpu_has", lambda feature: feature in features)
        return [target.name for target in targets.usable_targets()]

    monkeypatch.delenv(targets.VARIABLE, raising=False)
    assert has("avx2", "fma") == ["avx2"]
    assert has("avx2", "fma", "avx_vnni") == ["avx_vnni", "avx2"]
    assert has(*targets.AVX512, "avx512_vnni") == ["avx512_vnni", "avx512", "avx2"]
    assert has(*targets.AVX512, "avx512_vnni", "avx512_bf16")[0] == "avx512_bf16"
    assert has("asimddp") == ["neon"] and has("asimddp", "bf16") == ["neon_bf16", "neon"]
    assert has("avx2") == has("bf16") == []
    assert load_kernels.__wrapped__() is None
    assert not recwarn.list


@pytest.mark.parametrize("value", ["avx1", "", "neon avx2"])
def test_an_unknown_instruction_set_is_an_error_that_says_which_there_are(monkeypatch, value):
    monkeypatch.setattr(targets, "cpu_has", lambda feature: feature in ("avx2", "fma", "avx_vnni"))
    for name in (value, "avx512", "neon"):
        monkeypatch.setenv(targets.VARIABLE, name)
        with pytest.raises(ValueError, match=rf"NANOVLLM_CPU_ISA must be one of \['avx_vnni', 'avx2'\], got '{name}'"):
            load_kernels.__wrapped__()


THREADS = """
import os, sys, torch
from concurrent.futures import ThreadPoolExecutor
from nanovllm.kernels import cpu as cpu_kernels
torch.manual_seed(0)
x = torch.randn(37, 512).bfloat16()
weight = cpu_kernels.PackedWeight(torch.randn(1056, 512).bfloat16())

def work(count):
    cpu_kernels.set_num_threads(count)
    return [weight.linear(x).view(torch.int16).numpy().tobytes() for _ in range(200)]  # without PyTorch's threads

expected = work(1)[0]
with ThreadPoolExecutor(3) as pool:  # each caller has threads of its own
    for results in pool.map(work, [2, 5, 3]):
        assert set(results) == {expected}
work(4)
child = os.fork()  # which has no threads but this one
if child == 0:
    assert set(work(4)) == {expected}
    sys.exit(0)  # where threads end, of which there are others than were forked
assert os.waitpid(child, 0)[1] == 0
print("done")
"""


@needs_kernels
def test_results_do_not_depend_on_threads_of_which_each_caller_has_its_own_also_after_a_fork():
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}  # of forks beside threads
    command = [sys.executable, "-c", THREADS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert done.stdout == "done\n", done.stderr
