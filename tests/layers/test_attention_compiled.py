"""What launches of Triton attention have compiled: nothing new after a warm-up, and it fits each architecture."""

from functools import partial

import pytest
import torch

from aot import ALL, ARCHITECTURES, SHARED_LIMIT, compile_kernel
from launches import Specialization, record, without_interpreter
from nanovllm.engine.cuda_graphs import graph_sizes
from nanovllm.utils.context import Context
from pairs import case_id, in_turn

pytest.importorskip("triton", reason="triton is published for Linux only")

RAGGED = [(1, 1), (2, 1), (3, 2), (15, 3), (16, 16), (17, 17), (100, 33), (257, 100), (1000, 257)]  # tokens, sequences
SHAPES = {  # of one rank in bf16: query heads, KV heads, head_dim, block size; other heads are test_attention_triton's
    "Qwen3-0.6B": (16, 8, 128, 256),
    "Qwen3-32B": (64, 8, 128, 256),
}


def integers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """In a buffer's second half, so at a multiple of 16 bytes or not."""
    size = torch.Size(shape).numel()
    return torch.zeros(2 * size, dtype=dtype)[size:].view(shape)


def launch_step(num_tokens: int, num_seqs: int, shape: tuple[int, int, int, int], columns: int = 16) -> None:
    """A prefill without and with cached prefixes, of many and few tokens, and a decode, as the layers call them."""
    from nanovllm.kernels.triton_attention import TritonAttention

    num_heads, num_kv_heads, head_dim, block_size = shape
    qkv = torch.empty(num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=torch.bfloat16)
    q, k, v = (x.flatten(1) for x in qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1))
    q, k, v = (x.view(num_tokens, -1, head_dim) for x in (q.contiguous(), k.contiguous(), v))
    caches = [torch.empty(TritonAttention.cache_shape(2, block_size, num_kv_heads, head_dim), dtype=torch.bfloat16)] * 2
    int32, slots = partial(integers, torch.int32), integers(torch.int64, num_tokens)
    TritonAttention.store(k, v, *caches, slots)
    tables, bounds = int32(num_seqs, columns), int32(num_seqs + 1)
    lens = int32(num_seqs)
    for block_tables, most in ((None, 1), (tables, 65), (tables, 1 + num_tokens % 40)):
        TritonAttention.prefill(q, k, v, *caches, Context(bounds, bounds, most, 1, lens, block_tables))
    context = Context(context_lens=lens, block_tables=tables)
    TritonAttention.decode(qkv.new_empty(num_seqs, num_heads, head_dim), *caches, context)


def record_ragged() -> tuple[set[Specialization], set[Specialization], dict[tuple[str, str], int]]:
    """Of a warm-up, and of ragged batches; and how many the latter need if an argument is specialised for."""
    from triton import JITFunction

    from nanovllm.kernels import triton_attention

    triton_attention._device = lambda device: ((9, 0), 132)

    def launch_ragged():
        for i, (num_tokens, num_seqs) in enumerate(RAGGED):
            launch_step(num_tokens, num_seqs, SHAPES["Qwen3-0.6B"], columns=1 + 5 * i)

    def launch_graphs():
        for size in graph_sizes(512):
            launch_step(size, size, SHAPES["Qwen3-0.6B"])

    def launch_all():
        launch_ragged()
        launch_graphs()

    warm_up, ragged = record(lambda: launch_step(14, 2, SHAPES["Qwen3-0.6B"])), record(launch_all)
    careless = {}
    for name, kernel in vars(triton_attention).copy().items():
        for argument in triton_attention.RAGGED:
            if name.endswith("_kernel") and argument in kernel.arg_names:
                others = [other for other in triton_attention.RAGGED if other != argument]
                setattr(triton_attention, name, JITFunction(kernel.fn, do_not_specialize=others))
                careless[name, argument] = len(record(launch_ragged))
                setattr(triton_attention, name, kernel)
    return warm_up, ragged, careless


def record_shape(name: str, arch: int) -> set[Specialization]:
    from nanovllm.kernels import triton_attention

    triton_attention._device = lambda device: (divmod(arch, 10), 100)
    return record(lambda: launch_step(17, 2, SHAPES[name]), arch)


def test_no_batch_compiles_anything_after_a_warm_up():
    """And the count notices each argument that a kernel is compiled for although it varies."""
    warm_up, ragged, careless = without_interpreter(record_ragged)
    assert len(warm_up) == 1 + 2 + 2 + 2  # with and without block tables, of one query each and of a few
    assert ragged == warm_up
    assert len(careless) == 1 + 5 + 5 + 4
    assert min(careless.values()) > len(warm_up), careless


@pytest.mark.parametrize(("shape", "arch"), in_turn(list(SHAPES)[::-1], ARCHITECTURES, is_whole=ALL), ids=case_id)
def test_what_is_launched_in_bf16_fits_each_architecture(shape, arch):
    from nanovllm.kernels import triton_attention

    every = without_interpreter(record_shape, shape, arch)
    assert len(every) == 2 + 2 + 2 + 1  # prefill, split, merge, store
    for each in sorted(every, key=str):
        kernel, constexprs = getattr(triton_attention, each.kernel), dict(each.constexprs)
        binary = compile_kernel(kernel, dict(each.signature), constexprs, arch, each.num_warps, each.num_stages)
        assert binary.shared <= SHARED_LIMIT[arch], each
        assert binary.spilled == 0, each
