"""Steps that begin before the last one's tokens are read. A CPU has always done its work; here it says it has not."""

import random

import pytest
import torch

from helpers import random_prompts, reference_tokens, save_model
from nanovllm import LLM, GenerationError, SamplingParams
from nanovllm.engine import cuda_graphs
from nanovllm.engine.cuda_graphs import take_samples
from nanovllm.engine.engine_loop import EngineLoop
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.utils.device import Download

SETTINGS = {"kvcache_block_size": 4, "num_kvcache_blocks": 90, "max_num_seqs": 6, "dtype": "float32", "device": "cpu"}
LENS = [5, 30, 17, 41, 9, 12, 3, 22, 8, 16]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    return str(path), save_model(path)


@pytest.fixture
def ahead(monkeypatch):
    """For each step whether it was left to the next one to read. Without this fixture none is."""
    steps, step = [], EngineLoop.step

    def counting(loop, *args, **kwargs):
        num_tokens = step(loop, *args, **kwargs)
        steps.append(loop._ahead is not None)
        return num_tokens

    monkeypatch.setattr(Download, "is_here", lambda self: False)
    monkeypatch.setattr(EngineLoop, "step", counting)
    return steps


def varied(seed: int) -> list[SamplingParams]:
    """Ends by length, at once too, by end of sequence and by token ids; sampled and greedy; some with options."""
    rng = random.Random(seed)
    params = []
    for i in range(len(LENS)):
        options = [{}, {}, {"stop_token_ids": list(range(0, 300, 7))}, {"n": 2}, {"top_k": 5, "logprobs": 1}]
        temperature = 0.9 if "n" in (option := options[i % 5]) or rng.random() < 0.5 else 0
        params.append(SamplingParams(temperature, max_tokens=rng.choice([1, 2, 7, 30]), seed=i, **option))
    return params


def generate(path: str, params: list[SamplingParams] | SamplingParams, **settings) -> tuple[list, int]:
    """Of each completion the tokens and why it ended; how many sequences were preempted."""
    with LLM(path, **SETTINGS | settings) as llm:
        llm.scheduler.output_ratio = 0.0  # admits too many
        outputs = llm.generate(random_prompts(LENS), params, use_tqdm=False)
        assert llm.is_finished() and llm.block_manager.num_free_blocks == llm.config.num_kvcache_blocks
        num_preempted = llm.stats()["preemptions"]
    ends = "token_ids", "finish_reason", "stop_reason"
    return [[[one[name] for name in ends] for one in output["outputs"]] for output in outputs], num_preempted


def test_greedy_tokens_equal_the_references(checkpoint, ahead):
    path, model = checkpoint
    outputs, _ = generate(path, SamplingParams(temperature=0, max_tokens=20))
    for prompt, [(token_ids, *_)] in zip(random_prompts(LENS), outputs, strict=True):
        assert token_ids == reference_tokens(model, prompt, 20)
    assert sum(ahead) > 20


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_kvcache_blocks": 17, "max_num_seqs": 4}, {"max_num_batched_tokens": 16}, {"speculative_tokens": 3}],
    ids=["plain", "preempted", "chunked", "speculative"],
)
def test_outputs_equal_those_of_steps_one_by_one(checkpoint, request, settings):
    expected = [generate(checkpoint[0], varied(seed), **settings) for seed in range(2)]
    ahead = request.getfixturevalue("ahead")
    outputs = [generate(checkpoint[0], varied(seed), **settings) for seed in range(2)]
    assert [tokens for tokens, _ in outputs] == [tokens for tokens, _ in expected]
    assert (sum(ahead) > 8) != ("speculative_tokens" in settings)
    assert "num_kvcache_blocks" not in settings or all(num_preempted for _, num_preempted in outputs)


def test_through_graphs(checkpoint, ahead, monkeypatch):
    expected, _ = generate(checkpoint[0], varied(0), enforce_eager=True)

    class Graph:
        def __init__(self, work):
            self.work, self.output = work, work().clone()

        def pool(self):
            return None

        def replay(self):
            self.output.copy_(self.work())

    def capture(work, pool):
        graph = Graph(work)
        return graph, graph.output

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(ModelRunner, "_can_capture", lambda *_: True)
    del ahead[:]
    assert generate(checkpoint[0], varied(0)) == (expected, 0) and sum(ahead) > 8


def test_texts_streams_stops_aborts_and_failures(ahead, monkeypatch):
    prompt, greedy = "introduce yourself", SamplingParams(temperature=0, max_tokens=40)
    with LLM("assets/nano-qwen3", num_kvcache_blocks=200, dtype="float32", device="cpu") as llm:
        [whole] = llm.generate([prompt], greedy, use_tqdm=False)
        text = whole["text"]
        stops = [SamplingParams(temperature=0, max_tokens=40, stop=text[i : i + 3]) for i in range(5, 30, 5)]
        for output, params in zip(llm.generate([prompt] * 5, stops, use_tqdm=False), stops, strict=True):
            assert output["text"] == text[: text.index(params.stop[0])] and output["finish_reason"] == "stop"
        pieces = list(llm.generate_stream([prompt] * 3, greedy))
        for i in range(3):
            mine = [piece for piece in pieces if piece["index"] == i]
            assert "".join(piece["text"] for piece in mine) == text
            assert [token for piece in mine for token in piece["token_ids"]] == whole["token_ids"]
        assert sum(ahead) > 30
        stream = llm.generate_stream([prompt] * 3, greedy)  # left in the middle: what runs ahead is dropped
        for _ in range(9):
            next(stream)
        stream.close()
        publish, calls = llm.block_manager.publish, []

        def failing(*args):
            calls.append(1)
            if len(calls) == 3:
                raise MemoryError
            return publish(*args)

        monkeypatch.setattr(llm.block_manager, "publish", failing)
        with pytest.raises(MemoryError):
            llm.generate([prompt] * 3, SamplingParams(temperature=0, max_tokens=300, ignore_eos=True), use_tqdm=False)

        def refuse(token_ids, logits):
            raise ArithmeticError

        asked = [greedy, SamplingParams(logits_processors=[refuse]), greedy]
        with pytest.raises(GenerationError) as failure:
            llm.generate([prompt] * 3, asked, use_tqdm=False)
        assert [output["text"] for output in failure.value.outputs[::2]] == [text] * 2
        request_id = llm.add_request(prompt, greedy)
        outputs = []
        while not llm.is_finished():
            outputs += llm.step()[0]
        assert [(output["request_id"], output["text"]) for output in outputs] == [(request_id, text)]
        assert llm.is_finished() and llm.block_manager.num_free_blocks == 200


def test_rows_take_the_samples_of_their_sequences():
    input_ids, last = torch.arange(5), torch.tensor([70, 71, 72])
    take_samples(input_ids, None, last)
    assert input_ids.tolist() == [0, 1, 2, 3, 4]
    take_samples(input_ids, torch.tensor([2, -1, 0]).numpy(), last)
    assert input_ids.tolist() == [72, 1, 70, 3, 4]
    take_samples(input_ids, torch.tensor([0, 1, 2]).numpy(), last)
    assert input_ids.tolist() == [70, 71, 72, 3, 4]
