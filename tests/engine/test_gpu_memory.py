"""How a GPU's memory is shared out, with a pretended device."""

import logging
from types import SimpleNamespace

import psutil
import pytest
import torch

from helpers import save_model
from nanovllm import LLM
from nanovllm.config import Config
from nanovllm.engine import model_runner
from nanovllm.engine.model_runner import GRAPH_BYTES, ModelRunner
from nanovllm.layers import logits_processor

GIB = 2**30
BLOCK_BYTES = 2 * 2 * 2 * 8 * 32 * 4  # K and V, layers, heads, tokens, head_dim, fp32


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


@pytest.fixture
def runner(path, monkeypatch):
    """A function: a runner that has loaded its model, on a device that says it is CUDA but computes on the CPU."""

    def make(free: int, total: int, peak: int = 0, **settings) -> ModelRunner:
        config = Config(str(path), kvcache_block_size=8, dtype="float32", device="cpu", **settings)
        with monkeypatch.context() as patched:
            patched.setattr(ModelRunner, "_allocate_kv_cache", lambda *args: 0)
            made = ModelRunner(config)
        made.device = SimpleNamespace(type="cuda")
        memory = iter([100, 100 + peak])
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: next(memory))
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: next(memory))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        return made

    return make


def allocate(runner: ModelRunner, graph_bytes: int = 0) -> int:
    """Blocks of the cache, which is not made: a GPU's must be zero, since kernels may read past a sequence's end."""
    backend = runner.attentions[0].backend
    zeros, real_zeros, real_upload = object(), torch.zeros, model_runner.upload
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "zeros", lambda *shape, **kw: zeros if len(shape) == 1 else real_zeros(*shape, **kw))
        patched.setattr(model_runner, "upload", lambda arrays, device: real_upload(arrays, torch.device("cpu")))
        patched.setattr(torch, "ones", lambda n, device=None: torch.empty(n).fill_(1))
        assert runner._allocate_kv_cache(backend, 64, graph_bytes) == runner.config.num_kvcache_blocks * BLOCK_BYTES
    assert all(layer.k_cache is zeros and layer.v_cache is zeros for layer in runner.attentions)
    return runner.config.num_kvcache_blocks


def test_the_cache_gets_what_is_left_of_its_share(runner):
    free, total, peak = 10 * GIB, 12 * GIB, 3 * GIB
    made = runner(free, total, peak, gpu_memory_utilization=0.75, max_num_batched_tokens=64, max_num_seqs=16384)
    assert allocate(made, GIB) == (free - total // 4 - peak - GIB) // BLOCK_BYTES


def test_what_other_processes_use_is_not_shared_out(runner):
    made = runner(GIB, 12 * GIB, 0, max_num_batched_tokens=64, gpu_memory_utilization=0.9)
    with pytest.raises(
        ValueError, match=r"0\.20 GiB more than the cuda has left .*lower num_kvcache_blocks.*free memory"
    ):
        allocate(made)


def test_the_largest_step_is_as_many_tokens_of_as_many_sequences_as_there_may_be(runner, monkeypatch):
    made = runner(10 * GIB, 12 * GIB, max_num_batched_tokens=50, max_num_seqs=7)
    forward, batches = made.forward, []
    monkeypatch.setattr(made, "forward", lambda batch: batches.append(batch) or forward(batch))
    allocate(made)
    one, batch = batches
    assert len(one.input_ids) == 1  # for the kernels of few rows
    assert len(batch.input_ids) == 50 and batch.cu_seqlens_q[-1] == 50
    assert sorted(batch.context_lens.tolist()) == [7] * 6 + [8]
    made = runner(10 * GIB, 12 * GIB, max_num_batched_tokens=5000, max_num_seqs=2, max_model_len=30)
    forward = made.forward
    monkeypatch.setattr(made, "forward", lambda batch: batches.append(batch) or forward(batch))
    allocate(made)
    assert batches[-1].context_lens.tolist() == [30, 30]


def test_the_largest_step_cuts_whole_vocabularies_for_top_p(runner, monkeypatch):
    looks, cut = [], logits_processor._cut

    def watched(logits, weights, limits):
        looks.append(tuple(logits.shape))
        return cut(logits, weights, limits)

    monkeypatch.setattr(logits_processor, "_cut", watched)
    allocate(runner(10 * GIB, 12 * GIB, max_num_batched_tokens=50, max_num_seqs=7))
    assert looks == [(7, 307)]


def test_a_step_that_does_not_fit_beside_the_weights_names_the_settings(runner, monkeypatch):
    made = runner(10 * GIB, 12 * GIB, max_num_batched_tokens=50)

    def forward(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(made, "forward", forward)
    with pytest.raises(ValueError, match=r"lower max_num_batched_tokens or max_num_seqs. PyTorch said: CUDA out of"):
        allocate(made)


def test_a_cache_on_the_cpu_takes_memory_only_as_it_is_filled(path):
    process = psutil.Process()
    before = process.memory_info().rss
    config = Config(str(path), kvcache_block_size=8, dtype="float32", device="cpu", num_kvcache_blocks=40_000)
    runner = ModelRunner(config)
    assert sum(layer.k_cache.nbytes + layer.v_cache.nbytes for layer in runner.attentions) == 40_000 * BLOCK_BYTES
    assert process.memory_info().rss - before < 40_000 * BLOCK_BYTES / 2


def test_start_up_is_reported_in_one_line(path, caplog):
    caplog.set_level(logging.INFO, "nanovllm")
    with LLM(str(path), num_kvcache_blocks=9, device="cpu"):
        pass
    [line] = [r.getMessage() for r in caplog.records if r.getMessage().startswith("start-up")]
    assert "weights 0.00 GiB in" in line and "9 cache blocks" in line and "CUDA" not in line


def test_exit_gives_the_memory_back(path, monkeypatch):
    emptied = []
    llm = LLM(str(path), num_kvcache_blocks=9, device="cpu")
    runner = llm.model_runner
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(runner.model))
    llm.exit()
    assert emptied == [None] and not runner.attentions
    assert GRAPH_BYTES * 20 < GIB / 2
