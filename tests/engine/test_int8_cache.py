"""An engine whose KV cache is in int8: what it saves, what it costs, and that all who share the cache do as before.

That no bit depends on what runs beside a request is in test_invariance.py.
"""

import pytest
import torch

from helpers import DEMO_MODEL, random_prompts, save_model
from nanovllm import LLM, BeamSearchParams, SamplingParams, config
from nanovllm.config import Config
from nanovllm.engine.drafts import Drafter
from nanovllm.kernels.cpu.compiled import load_kernels
from nanovllm.utils import device

needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="no kernels for this processor, or no compiler")
SETTINGS = {"kv_cache_dtype": "int8", "dtype": "bfloat16", "device": "cpu", "kvcache_block_size": 16}
PROMPTS = [*random_prompts([3, 40, 17, 70]), *([5, 6, 7, 8] * n for n in (5, 12))]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    save_model(path, dtype=torch.bfloat16, head_dim=64)  # of which matrix units take chunks
    return str(path)


def blocks(path: str, **settings) -> tuple[int, int]:
    """Their number, and the bytes that they take."""
    with LLM(path, **SETTINGS | settings) as llm:
        caches = [cache for layer in llm.model_runner.attentions for cache in (layer.k_cache, layer.v_cache)]
        return llm.config.num_kvcache_blocks, sum(cache.nbytes for cache in caches)


@needs_kernels
def test_the_same_memory_holds_nearly_twice_the_blocks(model, monkeypatch):
    monkeypatch.setattr(device, "CPU_CACHE_BYTES", 10**6)
    for kind, row_bytes in (("auto", 64 * 2), ("int8", 64 + 4)):
        block_bytes = 2 * 2 * 2 * 16 * row_bytes  # K and V, layers, heads, tokens
        num_blocks = 10**6 // block_bytes
        assert blocks(model, kv_cache_dtype=kind) == (num_blocks, num_blocks * block_bytes)


def outputs(llm: LLM) -> list:
    """Of everything in which sequences share blocks, or in which a step has more than one token of a sequence."""
    greedy = SamplingParams(0, max_tokens=30, ignore_eos=True, logprobs=1)
    several = SamplingParams(1.0, n=3, seed=1, max_tokens=20, ignore_eos=True, logprobs=0)
    given = SamplingParams(0, max_tokens=1, prompt_logprobs=1)
    found = llm.generate(PROMPTS * 3, [greedy] * 6 + [several] * 6 + [given] * 6, use_tqdm=False)
    keys = "token_ids", "logprobs", "cumulative_logprob"
    made = [[{key: part[key] for key in keys} for part in output["outputs"]] for output in found]
    beams = llm.beam_search(PROMPTS, BeamSearchParams(beam_width=3, max_tokens=12, ignore_eos=True), use_tqdm=False)
    hypotheses = [[(beam["token_ids"], beam["score"]) for beam in output["outputs"]] for output in beams]
    scores = llm.score(PROMPTS, [random_prompts([4, 9], seed=2)] * len(PROMPTS), use_tqdm=False)
    return made, [output.prompt_logprobs for output in found], hypotheses, scores


@pytest.fixture(scope="module")
def expected(model) -> list:
    """Where no request shares a block with an earlier one, and nothing is cut up."""
    with LLM(model, **SETTINGS | {"num_kvcache_blocks": 600}) as llm:
        return outputs(llm)


@needs_kernels
@pytest.mark.parametrize(
    "pressure",
    [
        {},
        {"max_num_batched_tokens": 11},
        {"num_kvcache_blocks": 28},
        {"max_num_seqs": 3, "enforce_eager": True},
        {"speculative_tokens": 5},
        {"kvcache_block_size": 1, "num_kvcache_blocks": 9600},
    ],
    ids=["prefix hits", "chunks", "preempted", "few at once, eager", "guesses", "blocks of a token"],
)
def test_whatever_shares_the_cache_gives_the_same(model, expected, pressure, monkeypatch):
    monkeypatch.setattr(Drafter, "_best_counts", lambda self, chances, num_tokens: 0 * chances.astype(int) + self.most)
    with LLM(model, **SETTINGS | {"num_kvcache_blocks": 600} | pressure) as llm:
        llm.scheduler.output_ratio = 0.0  # it expects no request to grow
        for _ in range(2):  # the second time with prefixes in the cache
            assert outputs(llm) == expected
        stats = llm.stats()
        assert (stats["preemptions"] > 0) == (pressure == {"num_kvcache_blocks": 28})
        assert stats["cached_prompt_tokens"] > 0 and stats["blocks_used"] == 0
        assert (stats["decode_tokens"] > stats["output_tokens"]) == ("speculative_tokens" in pressure)


@torch.inference_mode()
def first_logits(path, **settings) -> torch.Tensor:
    """[prompts, V] fp32."""
    with LLM(str(path), **SETTINGS | {"num_kvcache_blocks": 100} | settings) as llm:
        forward, logits = llm.model_runner.forward, []
        llm.model_runner.forward = lambda *args: logits.append(forward(*args)) or logits[-1]
        llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        return torch.cat(logits).float()


@needs_kernels
def test_logits_are_close_to_those_of_the_models_dtype(model):
    exact, logits = first_logits(model, kv_cache_dtype="auto"), first_logits(model)
    assert 0.001 < (logits - exact).norm() / exact.norm() < 0.03  # keys and values are rounded to 1/254 of the largest


@needs_kernels
def test_the_demo_model_answers_alike():
    chats = [[{"role": "user", "content": text}] for text in ("introduce yourself", "add 12 and 30", "sort 5 2 9 1")]
    answers = []
    for kind in ("auto", "int8"):
        with LLM(str(DEMO_MODEL), device="cpu", dtype="bfloat16", kv_cache_dtype=kind) as llm:
            found = llm.chat(chats, SamplingParams(temperature=0, max_tokens=60), use_tqdm=False)
            answers.append([output["text"] for output in found])
    assert answers[0] == answers[1]


def test_where_nothing_is_compiled_for_it_an_error_says_so_before_anything_is_loaded(model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"kv_cache_dtype must be one of \['auto', 'int8'\], got 'fp8'"):
        Config(model, kv_cache_dtype="fp8")
    message = r"kv_cache_dtype='int8' needs a CPU .* device='{}', torch.{}, head_dim={}: leave kv_cache_dtype out"
    with pytest.raises(ValueError, match=message.format("cpu", "float32", 64)):
        Config(model, **SETTINGS | {"dtype": "float32"})
    save_model(tmp_path, dtype=torch.bfloat16, head_dim=272)
    with pytest.raises(ValueError, match=message.format("cpu", "bfloat16", 272)):
        Config(str(tmp_path), **SETTINGS)
    monkeypatch.setattr("nanovllm.kernels.cpu.load_kernels", lambda: None)
    with pytest.raises(ValueError, match=message.format("cpu", "bfloat16", 64)):
        Config(model, **SETTINGS)
    monkeypatch.undo()
    monkeypatch.setattr(config, "resolve_device", lambda name: torch.device("cuda"))
    with pytest.raises(ValueError, match=message.format("cuda", "bfloat16", 64)):
        Config(model, **SETTINGS)
