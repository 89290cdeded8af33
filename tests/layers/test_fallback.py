"""Where Triton's kernels do not work, all that would use them falls back together, and the log says once why."""

import logging

import pytest
import torch

from nanovllm.kernels import attention, fused
from nanovllm.kernels.attention import choose_backend
from nanovllm.kernels.flash_attention import TorchVarlen, store_kvcache
from nanovllm.kernels.plain_attention import CPUAttention
from nanovllm.layers.attention import Attention

pytest.importorskip("triton", reason="triton is published for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there is a GPU of that capability, on which the kernel that is tried does as `silu_and_mul`."""
    from nanovllm.kernels import triton_fused

    def pretend(capability=(9, 0), silu_and_mul=triton_fused.silu_and_mul) -> list[object]:
        tried, ones = [], torch.ones
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape, device=DEVICE))
        monkeypatch.setattr(triton_fused, "silu_and_mul", lambda *args: tried.append(args) or silu_and_mul(*args))
        return tried

    fused.triton_problem.cache_clear()
    fused._kernels.cache_clear()
    yield pretend
    fused.triton_problem.cache_clear()
    fused._kernels.cache_clear()


def no_compiler(*args):
    raise RuntimeError("Failed to find C compiler.\nPlease specify it")


def test_where_a_kernel_has_worked_all_use_triton(gpu, caplog):
    from nanovllm.kernels import triton_attention, triton_fused

    tried = gpu()
    assert fused._kernels("cuda", torch.float16) is triton_fused
    assert TorchVarlen(None).store is triton_attention.store_kvcache
    assert attention.open_triton(CUDA, torch.float16, 64, 256)[0] is triton_attention.TritonAttention
    assert len(tried) == 1 and not caplog.records


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"silu_and_mul": no_compiler}, "Failed to find C compiler."),
        ({"silu_and_mul": torch.add}, "its kernels compute wrong numbers"),
        ({"capability": (7, 5)}, "it needs compute capability 8.0, the GPU has 7.5"),
    ],
    ids=["no compiler", "wrong numbers", "old GPU"],
)
def test_where_a_kernel_does_not_work_nothing_uses_triton(gpu, caplog, settings, reason):
    gpu(**settings)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert fused._kernels("cuda", dtype) is None
    assert TorchVarlen(None).store is store_kvcache
    with pytest.raises(ValueError, match=f"attention_backend='triton' does not work here: {reason}"):
        choose_backend("triton", CUDA, torch.float16, Attention(4, 2, 64), 256)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"no Triton kernels, but plain PyTorch in their place: {reason}"


def test_an_engine_without_triton_starts_and_says_so_twice(gpu, caplog, monkeypatch):
    """Once of the kernels, and once of the attention that it chose for want of them."""
    gpu(silu_and_mul=no_compiler)
    monkeypatch.setattr(attention, "BACKENDS", {name: attention.BACKENDS[name] for name in ("triton", "cpu")})
    assert choose_backend("auto", CUDA, torch.float16, Attention(4, 2, 64), 256) is CPUAttention
    assert [record.getMessage() for record in caplog.records] == [
        "no Triton kernels, but plain PyTorch in their place: Failed to find C compiler.",
        "attention: cpu (plain PyTorch); not triton: Failed to find C compiler.",
    ]


def test_batch_invariant_takes_its_own_attention_or_none(gpu, monkeypatch):
    from nanovllm.kernels.triton_invariant_attention import InvariantTritonAttention

    gpu()
    monkeypatch.setattr(attention, "_check_outputs", lambda *settings: None)
    for name in ("auto", "triton"):
        backend = choose_backend(name, CUDA, torch.float16, Attention(4, 2, 64), 256, batch_invariant=True)
        assert backend is InvariantTritonAttention
    with pytest.raises(ValueError, match=r"batch_invariant=True does not work here: .*head_dim of 16 to 256"):
        choose_backend("auto", CUDA, torch.float16, Attention(4, 2, 272), 256, batch_invariant=True)
    cpu = torch.device("cpu")
    assert choose_backend("auto", cpu, torch.float32, Attention(4, 2, 64), 64, batch_invariant=True) is CPUAttention
