"""Decoding through graphs gives the tokens of eager decoding. For a graph stands what runs again what it captured."""

import numpy as np
import pytest
import torch

from helpers import random_prompts, save_model
from nanovllm import LLM, SamplingParams
from nanovllm.engine import cuda_graphs
from nanovllm.engine.batch import Batch
from nanovllm.engine.cuda_graphs import DecodeGraphs, graph_sizes
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.utils.context import Step, get_step

CPU = torch.device("cpu")
SETTINGS = {"kvcache_block_size": 8, "num_kvcache_blocks": 120, "dtype": "float32", "device": "cpu"}


class Recorder:
    def __init__(self, work):
        self.work = work
        self.num_replays = 0
        self.output = work().clone()

    def pool(self):
        return "pool"

    def replay(self):
        self.num_replays += 1
        self.output.copy_(self.work())


@pytest.fixture
def captured(monkeypatch):
    """The recorders, in the order of capture."""
    recorders, pools = [], []

    def capture(work, pool):
        recorders.append(Recorder(work))
        pools.append(pool)
        return recorders[-1], recorders[-1].output

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    yield recorders
    assert pools == [None, *["pool"] * (len(pools) - 1)]


def test_sizes_start_with_powers_of_two_and_end_with_the_largest_batch():
    assert graph_sizes(1) == [1]
    assert graph_sizes(3) == [1, 2, 3]
    assert graph_sizes(40) == [1, 2, 4, 8, 16, 32, 40]
    assert graph_sizes(512)[-1] == graph_sizes(5000)[-1] == 512
    assert {1, 2, 4, 8, 16, 32, 64, 128, 256} <= set(graph_sizes(512))


@pytest.mark.parametrize("top", [100, 257, 512])
def test_little_of_a_large_graph_is_padding(top):
    sizes = graph_sizes(top)
    assert sizes == sorted(set(sizes)) and len(sizes) <= 20
    for n in range(1, top + 1):
        size = next(size for size in sizes if size >= n)
        assert size - n < max(16, n / 4)


def batch_of(lens: list[int], max_blocks: int, start: int = 0) -> Batch:
    n = len(lens)
    ids = np.arange(start, start + n)
    tables = 1 + start + np.arange(n * max_blocks, dtype=np.int32).reshape(n, max_blocks)
    return Batch(ids, np.array(lens) - 1, 50 + ids, np.array(lens, np.int32), block_tables=tables)


@pytest.mark.parametrize("most_cells", [2, 512])
@torch.inference_mode()
def test_rows_and_columns_of_an_earlier_batch_are_gone(captured, monkeypatch, most_cells):
    monkeypatch.setattr(cuda_graphs, "MOST_CELLS", most_cells)
    seen = []

    def model(input_ids, positions):
        step = get_step()
        rows = [input_ids, positions, step.slot_mapping, step.decode.context_lens, step.decode.block_tables]
        seen.append([x.clone() for x in rows])
        return torch.stack([input_ids, positions], 1).float()

    graphs = DecodeGraphs(model, [1, 2, 4, 8], 3, CPU, False)
    assert [len(recorder.output) for recorder in captured] == [8, 4, 2, 1]
    for lens, size in ([[9] * 8, 8], [[7, 24, 3], 4], [[5], 1], [[8, 8, 8, 8, 1], 8], [[24, 24], 2]):
        batch = batch_of(lens, 3, start=10 * size)
        out = graphs.replay(batch)
        n = len(lens)
        ids, positions, slots, context_lens, tables = seen[-1]
        assert len(ids) == size and tables.shape == (size, 3)
        assert ids[:n].tolist() == batch.input_ids.tolist() and positions[:n].tolist() == batch.positions.tolist()
        assert slots.tolist() == [*batch.slot_mapping.tolist(), *[-1] * (size - n)]
        assert context_lens.tolist() == [*lens, *[0] * (size - n)]
        assert tables[:n].tolist() == batch.block_tables.tolist()
        assert out.tolist() == torch.stack([ids, positions], 1)[:n].tolist()
        assert [x.dtype for x in seen[-1]] == [torch.int64] * 3 + [torch.int32] * 2
    assert get_step() == Step()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


def generate(path, **settings) -> list[list[int]]:
    """Of sequences that end one after another, some at the longest length that the engine allows."""
    lens = [1, 7, 8, 9, 15, 16, 17, 30, 31, 39, 3, 12]
    prompts = random_prompts(lens)
    params = [SamplingParams(0 if i % 3 else 0.8, max_tokens=40, ignore_eos=True) for i in range(len(lens))]
    params = [p if i % 4 == 0 else SamplingParams(p.temperature, 3 + 2 * i, True) for i, p in enumerate(params)]
    with LLM(str(path), max_model_len=40, **SETTINGS | settings) as llm:
        outputs = [llm.generate(prompts, params, use_tqdm=False) for _ in range(2)]
        num_graphs = len(llm.model_runner.graphs.sizes) if llm.model_runner.graphs else 0
    return [[output["token_ids"] for output in run] for run in outputs], num_graphs


@pytest.mark.parametrize("settings", [{"max_num_seqs": 12}, {"max_num_seqs": 5}, {"max_num_seqs": 1}, {"top": 4}])
def test_tokens_equal_those_of_eager_decoding(path, captured, monkeypatch, settings):
    if settings.get("top"):  # larger batches run eagerly
        monkeypatch.setattr(cuda_graphs, "LARGEST", settings["top"])
        settings = {"max_num_seqs": 12}
    expected, num_graphs = generate(path, **settings)
    assert num_graphs == 0
    monkeypatch.setattr(ModelRunner, "_can_capture", lambda runner, backend: not runner.config.enforce_eager)
    tokens, num_graphs = generate(path, **settings)
    assert tokens == expected and num_graphs == len(captured) > 0
    assert sum(recorder.num_replays for recorder in captured) > 10
    assert captured[0].num_replays > 0  # the largest
    assert generate(path, enforce_eager=True, **settings) == (expected, 0)


def test_a_cpu_captures_nothing(path):
    with LLM(str(path), **SETTINGS) as llm:
        assert llm.model_runner.graphs is None


def test_prompt_logprobs_and_options_go_through_graphs_too(path, captured, monkeypatch):
    prompts = random_prompts([5, 20])
    params = SamplingParams(0.9, max_tokens=8, top_k=5, seed=1, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    results = []
    for can_capture in (False, True):
        monkeypatch.setattr(ModelRunner, "_can_capture", lambda *_: can_capture)  # noqa: B023
        with LLM(str(path), **SETTINGS) as llm:
            results.append(llm.generate(prompts, params, use_tqdm=False))
    for eager, graphed in zip(*results, strict=True):
        assert eager["token_ids"] == graphed["token_ids"]
        assert eager["cumulative_logprob"] == pytest.approx(graphed["cumulative_logprob"], rel=1e-4)
    assert captured
