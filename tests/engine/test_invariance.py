"""Bit for bit: a request's tokens and log-probabilities, whatever runs beside it and however its work is cut up."""

import pytest
import torch

from helpers import random_prompts, save_model
from nanovllm import LLM, SamplingParams
from nanovllm.engine.sampling import OptionsSampler
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels.cpu.compiled import load_kernels
from nanovllm.layers.sampler import sample
from pairs import in_turn

needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="no kernels for this processor, or no compiler")
SIZES = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 1200, "num_attention_heads": 6}
SETTINGS = {"device": "cpu", "dtype": "bfloat16", "kvcache_block_size": 64, "num_kvcache_blocks": 100}
PROMPTS = random_prompts([3, 64, 130, 201, 77, 37], vocab_size=1200)
PARAMS = [
    SamplingParams(0, max_tokens=70, ignore_eos=True, logprobs=3),
    SamplingParams(1.5, max_tokens=40, ignore_eos=True, seed=1, logprobs=0),
    SamplingParams(1.5, max_tokens=30, ignore_eos=True, seed=2),  # which the kernels sample
    SamplingParams(2.0, max_tokens=30, ignore_eos=True, seed=3, top_p=0.8, top_k=500, logprobs=1),
    SamplingParams(0, max_tokens=20, ignore_eos=True, prompt_logprobs=1, repetition_penalty=1.1),
    SamplingParams(0, max_tokens=35, ignore_eos=True),
]
OTHERS = random_prompts([5, 90, 1, 64, 3, 180, 2, 4, 7, 9, 20], seed=9, vocab_size=1200)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    save_model(path, dtype=torch.bfloat16, **SIZES)
    return str(path)


def results(outputs: list) -> list[tuple]:
    return [(output.token_ids, output.logprobs, output.prompt_logprobs) for output in outputs]


KINDS = {
    "bf16": {},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "int8-cache": {"kv_cache_dtype": "int8"},
}


@pytest.fixture(scope="module", params=KINDS)
def alone(model, request) -> tuple[dict, list[tuple]]:
    """The settings, and each request's results by itself, in whole blocks of 64, on one thread."""
    settings = SETTINGS | KINDS[request.param]
    with LLM(model, **settings) as llm:
        outputs = [llm.generate([p], params, use_tqdm=False)[0] for p, params in zip(PROMPTS, PARAMS, strict=True)]
        assert llm.model_runner.graphs is not None
    assert not any(output.num_cached_tokens for output in outputs)
    return settings, results(outputs)


def beside_others(llm: LLM) -> list[tuple]:
    """The same requests between others, some of which end sooner and some later."""
    params = [SamplingParams(i % 2, max_tokens=5 + 9 * i, ignore_eos=True) for i in range(len(OTHERS))]
    outputs = llm.generate(OTHERS[:5] + PROMPTS + OTHERS[5:], params[:5] + PARAMS + params[5:], use_tqdm=False)
    return results(outputs[5 : 5 + len(PROMPTS)])


@needs_kernels
@pytest.mark.parametrize(
    ("block_size", "chunk", "eager"),
    in_turn([1, 16, 24, 37, 64, 100, 256], [1024, 37, 1024, 37], [False, False, True, True], is_whole=False),
)
def test_batches_chunks_block_sizes_and_prefix_hits_change_no_bit(model, alone, block_size, chunk, eager):
    settings, expected = alone
    blocks = {"kvcache_block_size": block_size, "num_kvcache_blocks": 6400 // block_size}
    with LLM(model, **settings | blocks, max_num_batched_tokens=chunk, enforce_eager=eager) as llm:
        assert beside_others(llm) == expected
        hits = llm.stats()["cached_prompt_tokens"]
        assert beside_others(llm) == expected
        assert llm.stats()["cached_prompt_tokens"] > hits or block_size > max(map(len, PROMPTS))
        assert llm.stats()["preemptions"] == 0


@pytest.mark.parametrize("kind", ["bf16", "int8", "int8-cache"])
def test_each_instruction_set_changes_no_bit(model, target, kind):
    settings = SETTINGS | KINDS[kind]
    with LLM(model, **settings) as llm:
        expected = results([llm.generate([p], s, use_tqdm=False)[0] for p, s in zip(PROMPTS, PARAMS, strict=True)])
    blocks = {"kvcache_block_size": 37, "num_kvcache_blocks": 170}
    with LLM(model, **settings | blocks, max_num_batched_tokens=53) as llm:
        assert beside_others(llm) == expected


@needs_kernels
@pytest.mark.parametrize("block_size", [16, 37])
def test_preemption_changes_no_bit(model, alone, block_size):
    settings, expected = alone
    blocks = {"kvcache_block_size": block_size, "num_kvcache_blocks": 420 // block_size}
    with LLM(model, **settings | blocks) as llm:
        llm.scheduler.output_ratio = 0.0  # it expects no request to grow
        assert beside_others(llm) == expected
        assert llm.stats()["preemptions"] > 0


@needs_kernels
@pytest.mark.parametrize("eager", [False, True])
def test_threads_change_no_bit(model, alone, eager):
    settings, expected = alone
    torch.set_num_threads(2)
    try:
        with LLM(model, **settings, enforce_eager=eager) as llm:
            assert llm.model_runner.num_threads == 2
            assert beside_others(llm) == expected
    finally:
        torch.set_num_threads(1)


@needs_kernels
def test_a_request_is_sampled_alike_beside_one_with_options():
    torch.manual_seed(0)
    logits = torch.randn(1, 1200, dtype=torch.bfloat16).expand(1200, -1).contiguous()
    bounds = logits[0].double().softmax(-1).cumsum(-1)  # where rounding decides between two tokens
    drawn = torch.ones(1200), bounds.clamp(max=1 - 2**-53)
    seqs = [Sequence(row, [5], SamplingParams(logprobs=0 if row == 7 else None)) for row in range(1200)]
    expected = sample(logits, *drawn).tolist()
    assert sample(logits.float(), *drawn).tolist() != expected  # as the one with options is sampled
    sampled = [token_id for [token_id] in OptionsSampler()(logits, *drawn, seqs).read()]
    assert sampled[:7] == expected[:7] and sampled[8:] == expected[8:]


# ---- batch_invariant


def test_batch_invariant_where_pytorch_computes_is_an_error(model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"batch_invariant=True needs .*torch.float32.*leave batch_invariant out"):
        LLM(model, batch_invariant=True, **SETTINGS | {"dtype": "float32"})
    save_model(tmp_path, dtype=torch.bfloat16, **SIZES | {"intermediate_size": 74})
    with pytest.raises(ValueError, match=r"batch_invariant=True needs .*inputs \[74, "):
        LLM(str(tmp_path), batch_invariant=True, **SETTINGS)
    save_model(tmp_path, dtype=torch.bfloat16, **SIZES | {"head_dim": 272})
    with pytest.raises(ValueError, match=r"batch_invariant=True needs .*head_dim=272"):
        LLM(str(tmp_path), batch_invariant=True, **SETTINGS)


@needs_kernels
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_batch_invariant_takes_quantised_weights_on_a_cpu(model, quantization):
    with LLM(model, batch_invariant=True, quantization=quantization, **SETTINGS) as llm:
        assert llm.model_runner.graphs is not None


def test_batch_invariant_refuses_sums_whose_order_depends_on_their_number(tmp_path):
    save_model(tmp_path)
    with pytest.raises(ValueError, match=r"batch_invariant=True and tensor_parallel_size=4.*at most 2"):
        LLM(str(tmp_path), batch_invariant=True, tensor_parallel_size=4, **SETTINGS)


def test_an_engine_on_the_triton_kernels_changes_no_bit(tmp_path, monkeypatch):
    """In Triton's interpreter; what lies between these kernels is plain PyTorch's there, row by row."""
    pytest.importorskip("triton")
    from nanovllm.kernels import triton_invariant_attention
    from nanovllm.kernels.triton_linear import TritonWeight

    backend = triton_invariant_attention.InvariantTritonAttention
    monkeypatch.setattr(triton_invariant_attention, "SPLIT", 32)
    monkeypatch.setattr("nanovllm.engine.model_runner.choose_backend", lambda *settings: backend)
    monkeypatch.setattr("nanovllm.layers.weight.plain_kernel", lambda values, *_: TritonWeight(values))
    save_model(tmp_path, num_hidden_layers=1, vocab_size=64)
    prompts = random_prompts([40, 17, 3], vocab_size=64)
    params = [SamplingParams(i, max_tokens=4, ignore_eos=True, seed=i, logprobs=0) for i in range(3)]
    settings = {"device": "cpu", "dtype": "float32", "kvcache_block_size": 64, "num_kvcache_blocks": 30}
    with LLM(str(tmp_path), **settings) as llm:
        alone = [llm.generate([p], param, use_tqdm=False)[0] for p, param in zip(prompts, params, strict=True)]
    with LLM(str(tmp_path), max_num_batched_tokens=13, **settings | {"kvcache_block_size": 16}) as llm:
        for _ in range(2):  # the second time with cached prefixes
            assert results(llm.generate(prompts, params, use_tqdm=False)) == results(alone)
