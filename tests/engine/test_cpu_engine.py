"""The engine on the CPU's bf16 kernels: recorded decode steps, weights in 8 and 4 bits, several ranks."""

import weakref

import pytest
import torch

from helpers import DEMO_MODEL, random_prompts, save_model
from nanovllm import LLM, SamplingParams
from nanovllm.engine import cuda_graphs, model_runner
from nanovllm.engine.cuda_graphs import RecordedSteps
from nanovllm.engine.model_runner import make_inputs
from nanovllm.kernels import cpu as cpu_kernels
from nanovllm.kernels.cpu import Int4Weight, Int8Weight, PackedWeight
from nanovllm.kernels.cpu.compiled import load_kernels
from nanovllm.kernels.quantized import QuantizedWeight
from nanovllm.layers import weight
from quantized_checkpoints import save_quantized

needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="no kernels for this processor, or no compiler")
SETTINGS = {"kvcache_block_size": 16, "num_kvcache_blocks": 60, "dtype": "bfloat16", "device": "cpu"}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 320}


def greedy(path, **settings) -> tuple[list[list[int]], RecordedSteps | None]:
    """Completions of different lengths, so that the number of sequences keeps changing, twice."""
    with LLM(str(path), **SETTINGS | settings) as llm:
        prompts = random_prompts([3, 40, 17, 5, 90, 33, 16, 15])
        params = [SamplingParams(temperature=0, max_tokens=4 + 3 * i, ignore_eos=True) for i in range(8)]
        outputs = [llm.generate(prompts, params, use_tqdm=False) for _ in range(2)]
        assert type(llm.model_runner.model.lm_head.weight.kernel) is PackedWeight or settings
        return [output["token_ids"] for output in outputs[0] + outputs[1]], llm.model_runner.graphs


@needs_kernels
@pytest.mark.parametrize("pressure", [{}, {"num_kvcache_blocks": 14}, {"max_num_batched_tokens": 20}])
@pytest.mark.parametrize("most_recordings", [1024, 4])
def test_recorded_steps_give_the_tokens_of_eager_ones(tmp_path, pressure, most_recordings, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST_RECORDINGS", most_recordings)
    save_model(tmp_path, dtype=torch.bfloat16, **SIZES)
    recorded, steps = greedy(tmp_path, **pressure)
    eager, no_steps = greedy(tmp_path, enforce_eager=True, **pressure)
    assert recorded == eager and no_steps is None
    assert isinstance(steps, RecordedSteps) and 4 <= len(steps._recordings) <= most_recordings
    if most_recordings > 4:
        assert any(num_tokens > num_rows for num_tokens, num_rows in steps._recordings)  # at least over cached prefixes


@needs_kernels
def test_a_step_with_a_chunk_of_a_long_prompt_is_recorded_once(tmp_path, monkeypatch):
    save_model(tmp_path, dtype=torch.bfloat16, **SIZES)
    num_eager = []
    monkeypatch.setattr(model_runner, "make_inputs", lambda *args: num_eager.append(1) or make_inputs(*args))
    with LLM(str(tmp_path), **SETTINGS | {"num_kvcache_blocks": 200}) as llm:
        short, long = random_prompts([5, 450])
        llm.add_request(short, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
        llm.step()
        llm.add_request(long, SamplingParams(temperature=0, max_tokens=2))
        for _ in range(27):
            llm.step()
        recordings = llm.model_runner.graphs._recordings
        assert len(num_eager) == 1 and list(recordings) == [(17, 2)]


@needs_kernels
def test_a_chunk_of_one_token_shares_its_recording_with_decodes(tmp_path):
    save_model(tmp_path, dtype=torch.bfloat16, **SIZES)
    short, long = random_prompts([5, 40])
    params = [SamplingParams(temperature=0, max_tokens=most, ignore_eos=True) for most in (70, 20)]
    tokens = {}
    for eager in (False, True):
        with LLM(str(tmp_path), max_num_batched_tokens=6, enforce_eager=eager, **SETTINGS) as llm:
            llm.add_request(short, params[0])
            llm.step()
            llm.scheduler.max_num_batched_tokens = 2
            llm.add_request(long, params[1])
            outputs = [output for _ in range(100) for output in llm.step()[0]]
            tokens[eager] = [output["token_ids"] for output in outputs]
            if not eager:
                assert set(llm.model_runner.graphs._recordings) == {(1, 1), (2, 2)}
    assert tokens[False] == tokens[True] and len(tokens[True]) == 2


@needs_kernels
@pytest.mark.parametrize(
    "sizes", [{"vocab_size": 309}, {"intermediate_size": 72}, {"head_dim": 80}, {"hidden_size": 68}], ids=str
)
def test_sizes_that_are_no_multiple_of_32_are_packed_and_recorded_too(tmp_path, sizes, caplog):
    caplog.set_level("INFO")
    save_model(tmp_path, dtype=torch.bfloat16, tie_word_embeddings=True, **SIZES | sizes)
    for quantization in (None, "int8", "int4"):
        recorded, steps = greedy(tmp_path, quantization=quantization)
        eager, no_steps = greedy(tmp_path, quantization=quantization, enforce_eager=True)
        assert recorded == eager and no_steps is None and len(steps._recordings) >= 4
    assert "not recorded" not in caplog.text and "cpu (C++)" in caplog.text


@needs_kernels
@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"intermediate_size": 74}, "2 products, the first with model.layers.0.mlp.down_proj.weight, of 74 inputs"),
        ({"head_dim": 272}, "attention with head_dim=272, above 256"),
    ],
    ids=str,
)
def test_what_is_not_recorded_is_one_line_in_the_log(tmp_path, sizes, reason, caplog):
    caplog.set_level("INFO")
    save_model(tmp_path, dtype=torch.bfloat16, **SIZES | sizes)
    tokens, steps = greedy(tmp_path)
    assert steps is None and tokens == greedy(tmp_path, enforce_eager=True)[0]
    [message] = [message for message in caplog.messages if "not recorded" in message]
    assert reason in message


@needs_kernels
def test_recordings_take_the_memory_of_the_largest_and_give_it_back_with_the_engine(tmp_path):
    save_model(tmp_path, dtype=torch.bfloat16, **SIZES)
    sizes = {}
    for max_num_seqs in (1, 8):
        with LLM(str(tmp_path), max_num_seqs=max_num_seqs, **SETTINGS) as llm:
            params = [SamplingParams(0, max_tokens=2 + i, ignore_eos=True) for i in range(max_num_seqs)]
            llm.generate(random_prompts([5] * max_num_seqs), params, use_tqdm=False)
            steps = llm.model_runner.graphs
            assert len(steps._recordings) == max_num_seqs
            sizes[max_num_seqs], memory = steps._memory.nbytes / steps._memory.max_rows, weakref.ref(steps._memory)
            del steps
        assert memory() is None
    assert sizes[8] == sizes[1]


@needs_kernels
def test_tied_embeddings_share_one_packed_weight(tmp_path):
    save_model(tmp_path, dtype=torch.bfloat16, tie_word_embeddings=True, **SIZES)
    for quantization, kind in ((None, PackedWeight), ("int8", Int8Weight), ("int4", Int8Weight)):
        with LLM(str(tmp_path), quantization=quantization, **SETTINGS) as llm:
            model = llm.model_runner.model
            assert type(model.lm_head.weight.kernel) is kind and model.lm_head.weight is model.model.embed_tokens.weight
            assert not any(param.dim() == 2 for param in model.parameters())


@torch.inference_mode()
def first_logits(path, **settings) -> tuple[torch.Tensor, LLM]:
    """[3, V] fp32 of three prompts."""
    with LLM(str(path), **SETTINGS | settings) as llm:
        forward, logits = llm.model_runner.forward, []
        llm.model_runner.forward = lambda *args: logits.append(forward(*args)) or logits[-1]
        llm.generate(random_prompts([5, 40, 80]), SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        return torch.cat(logits).float(), llm.model_runner.model


@needs_kernels
def test_quantised_weights_are_close_to_bf16_and_take_less_memory(tmp_path):
    save_model(tmp_path, dtype=torch.bfloat16, **SIZES | {"hidden_size": 256, "intermediate_size": 512})
    exact, model = first_logits(tmp_path)
    size = model.model.layers[0].mlp.down_proj.weight.nbytes
    # Each product adds an error of about 1 % (weights and activations rounded to 1/254 of their largest value) or 10 %.
    for quantization, bounds, bits in (("int8", (0.001, 0.06), 8.5), ("int4", (0.01, 0.5), 4.5)):
        logits, model = first_logits(tmp_path, quantization=quantization)
        assert bounds[0] < (logits - exact).norm() / exact.norm() < bounds[1]
        assert model.model.layers[0].mlp.down_proj.weight.nbytes < bits / 16 * size


@needs_kernels
@pytest.mark.parametrize("method", ["awq", "gptq-4", "packed-4", "packed-4-asymmetric"])
def test_checkpoints_in_4_bits_are_computed_with_as_they_are(tmp_path, method, caplog):
    caplog.set_level("INFO")
    save_quantized(tmp_path, method)
    exact, _ = first_logits(tmp_path, dtype="float32")
    logits, model = first_logits(tmp_path)
    assert isinstance(model.model.layers[1].mlp.gate_up_proj.weight.kernel, Int4Weight)
    assert (logits - exact).norm() / exact.norm() < 0.06 and "not recorded" not in caplog.text


def test_int8_without_kernels_saves_the_memory_and_says_that_it_is_slow(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    save_model(tmp_path, **SIZES)
    monkeypatch.setattr(weight.cpu_kernels, "load_kernels", lambda: None)
    weight._say_once.cache_clear()
    tokens = []
    for quantization in (None, "int8"):
        with LLM(str(tmp_path), quantization=quantization, **SETTINGS | {"dtype": "float32"}) as llm:
            outputs = llm.generate(random_prompts([5, 40]), SamplingParams(0, max_tokens=1), use_tqdm=False)
            tokens.append([output["token_ids"] for output in outputs])
            kernel = llm.model_runner.model.lm_head.weight.kernel
    assert isinstance(kernel, QuantizedWeight) and kernel.values.dtype == torch.int8
    assert tokens[0] == tokens[1] and "save memory and no time" in caplog.text


@needs_kernels
def test_two_ranks_run_on_packed_shards_and_record_nothing(caplog):
    caplog.set_level("INFO")
    prompts = [[{"role": "user", "content": text}] for text in ("introduce yourself", "add 12 and 30", "sort 5 2 9 1")]
    params = SamplingParams(temperature=0, max_tokens=40)
    answers = []
    two_ranks = {"tensor_parallel_size": 2}
    for settings in ({}, two_ranks, two_ranks | {"kv_cache_dtype": "int8"}, {"quantization": "int8"}):
        with LLM(str(DEMO_MODEL), dtype="bfloat16", device="cpu", **settings) as llm:
            answers.append([output["text"] for output in llm.chat(prompts, params, use_tqdm=False)])
            assert (llm.model_runner.graphs is None) == ("tensor_parallel_size" in settings)
        assert ("not recorded, since PyTorch does sums over ranks" in caplog.text) == (settings != {})
    assert answers[1:] == answers[:1] * 3


def test_kernels_are_for_bf16_on_the_cpu_only():
    assert not cpu_kernels.has_kernels(torch.empty(1))
    assert not cpu_kernels.has_kernels(torch.empty(1, dtype=torch.bfloat16, device="meta"))
