"""Each architecture and its variations: fp32 greedy tokens equal transformers', token for token, under pressure too."""

import json

import pytest
import torch

from helpers import random_prompts, reference_logits, reference_tokens, save_model
from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.models import MODELS, Qwen3ForCausalLM

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 10000.0,
}  # fmt: skip
LONGROPE = {  # as Microsoft's checkpoints have it
    "type": "longrope",
    "short_factor": [1.0 + 0.05 * i for i in range(12)], "long_factor": [1.0 + 0.5 * i for i in range(12)],
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 36}
MODELS_TO_TRY = {
    "llama": ("Llama", {}),
    "llama3-tied": ("Llama", {"rope_scaling": LLAMA3, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama-odd-sizes": ("Llama", {"head_dim": None, "hidden_size": 72, "intermediate_size": 90, "vocab_size": 311}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 48}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "num_attention_heads": 8, "num_key_value_heads": 2}),
    "phi3": ("Phi3", {"max_position_embeddings": 128}),
    "phi4-partial": ("Phi3", {"head_dim": None, "partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    "phi3-longrope": (
        "Phi3",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "partial_rotary_factor": 0.75, "rope_scaling": LONGROPE,
         "original_max_position_embeddings": 128},
    ),
}  # fmt: skip
ON_TWO_RANKS = "llama-bias", "phi4-partial", "qwen3-moe"  # biases, projections in one tensor with a tied head, experts
MODELS_TO_TRY |= {
    "qwen3-moe": ("Qwen3Moe", EXPERTS | {"norm_topk_prob": True}),
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        EXPERTS | {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": False},
    ),
}  # fmt: skip
PRESSURES = {
    "plain": {},
    "chunked, preempted": {"max_num_batched_tokens": 11, "num_kvcache_blocks": 13},
}


@pytest.fixture(scope="module", params=MODELS_TO_TRY)
def checkpoint(request, tmp_path_factory):
    """A checkpoint in several shards, prompts of which some share prefixes, and transformers' completions of them."""
    architecture, overrides = MODELS_TO_TRY[request.param]
    path = tmp_path_factory.mktemp(request.param)
    model = save_model(path, architecture=architecture, max_shard_size="100KB", **overrides)
    assert len(list(path.glob("*.safetensors"))) > 1
    prompts = random_prompts([1, 9, 24, 70])
    prompts += [prompts[3][:32] + prompts[1], list(prompts[2])]
    return str(path), prompts, [reference_tokens(model, prompt, 20) for prompt in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ON_TWO_RANKS, indirect=True)
def test_two_ranks_give_the_same_greedy_tokens(checkpoint):
    check_greedy_tokens(checkpoint, tensor_parallel_size=2)


@pytest.mark.parametrize("pressure", PRESSURES)
def test_greedy_tokens_equal_transformers(checkpoint, pressure):
    check_greedy_tokens(checkpoint, **PRESSURES[pressure])


def check_greedy_tokens(checkpoint, **settings):
    path, prompts, expected = checkpoint
    is_preempted = "num_kvcache_blocks" in settings
    settings = {"num_kvcache_blocks": 99, "kvcache_block_size": 8, "max_model_len": 128} | settings
    with LLM(path, dtype="float32", device="cpu", **settings) as llm:
        llm.scheduler.output_ratio = 0.0  # admits without foresight
        for _ in range(2):  # the second time everything is in the prefix cache
            outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
            assert [output["token_ids"] for output in outputs] == expected
        assert (llm.scheduler.num_preemptions > 0) == is_preempted


@pytest.mark.parametrize("name", ["llama-bias", "qwen2-tied", "phi4-partial"])
def test_bf16_logprobs_are_as_close_to_fp32_as_those_of_transformers(tmp_path, name):
    """Prefill and recorded decode, where there are kernels for a CPU; of the same (bf16-representable) weights."""
    architecture, overrides = MODELS_TO_TRY[name]
    settings = {"architecture": architecture, "initializer_range": 0.08, "dtype": torch.bfloat16} | overrides
    exact, rounded = save_model(tmp_path, **settings).float(), save_model(tmp_path, **settings)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=-1)
    ours, truth, theirs = [], [], []
    with LLM(str(tmp_path), dtype="bfloat16", device="cpu", num_kvcache_blocks=200, max_num_seqs=8) as llm:
        for output in llm.generate(random_prompts([3, 17, 40, 64, 90]), params, use_tqdm=False):
            for entry in output["logprobs"]:
                ours.append(torch.tensor([logprob for _, logprob, *_ in sorted(entry["top"])]))
            for i in range(6):
                sequence = output["prompt_token_ids"] + output["token_ids"][:i]
                truth.append(reference_logits(exact, sequence).log_softmax(-1))
                theirs.append(reference_logits(rounded, sequence).float().log_softmax(-1))
    ours, truth, theirs = (torch.stack(rows) for rows in (ours, truth, theirs))
    assert (ours - truth).norm() < 1.5 * (theirs - truth).norm()


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_experts_run_in_bf16_and_int8_and_the_router_stays_as_it_is(tmp_path, quantization):
    """Most first tokens are those of fp32: a changed choice of experts changes a logit by much."""
    model = save_model(tmp_path, dtype=torch.bfloat16, architecture="Qwen3Moe", initializer_range=0.3, **EXPERTS)
    prompts, params = random_prompts(range(5, 45)), SamplingParams(temperature=0, max_tokens=1)
    try:
        llm = LLM(str(tmp_path), device="cpu", num_kvcache_blocks=200, quantization=quantization)
    except ValueError as error:  # a CPU without the kernels
        pytest.skip(str(error))
    with llm:
        tokens = [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]
        sparse = llm.model_runner.model.model.layers[0].mlp
        kinds = type(sparse.gate.weight.kernel).__name__, type(sparse.experts[0].down_proj.weight.kernel).__name__
        assert "Int8Weight" not in kinds[:1] and (kinds[1] == "Int8Weight") == (quantization == "int8")
    expected = [reference_tokens(model.float(), prompt, 1) for prompt in prompts]
    assert sum(a == b for a, b in zip(tokens, expected, strict=True)) >= 30


def test_a_sliding_window_lowers_the_longest_length_with_a_warning(tmp_path):
    model = save_model(tmp_path, architecture="Mistral", sliding_window=40)
    with (
        pytest.warns(UserWarning, match="max_model_len=512 is lowered to 40"),
        LLM(str(tmp_path), dtype="float32", device="cpu", num_kvcache_blocks=9) as llm,
    ):
        [prompt] = random_prompts([15])
        [output] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=99), use_tqdm=False)
        expected = reference_tokens(model, prompt, 25)
        assert output["token_ids"] == expected and len(prompt + expected) == 40
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text()) | {"sliding_window": None}
    file.write_text(json.dumps(settings))
    assert Config(str(tmp_path), device="cpu").max_model_len == 512


def test_a_window_that_is_not_used_is_none(tmp_path, recwarn):
    save_model(tmp_path, architecture="Qwen2", sliding_window=40, use_sliding_window=False)
    assert Config(str(tmp_path), device="cpu").max_model_len == 512 and not recwarn.list


def test_an_architecture_from_outside_the_package_runs(tmp_path, monkeypatch):
    class MyForCausalLM(Qwen3ForCausalLM):
        def compute_logits(self, hidden_states):
            return -super().compute_logits(hidden_states)

    model = save_model(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["MyForCausalLM"]}))
    monkeypatch.setitem(MODELS, "MyForCausalLM", MyForCausalLM)
    model.lm_head.weight.data.neg_()
    [prompt] = random_prompts([15])
    with LLM(str(tmp_path), dtype="float32", device="cpu", num_kvcache_blocks=9) as llm:
        [output] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=9), use_tqdm=False)
    assert output["token_ids"] == reference_tokens(model, prompt, 9)


def test_an_unsupported_architecture_says_which_one_it_may_be(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["YiForCausalLM"], "model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type 'llama' is that of LlamaForCausalLM"):
        Config(str(tmp_path), device="cpu")
