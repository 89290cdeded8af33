"""Every parameter is filled exactly once, or the error lists what is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import random_prompts, reference_tokens, save_model
from nanovllm import LLM, SamplingParams
from nanovllm.engine.model_runner import stored_weights
from nanovllm.models.qwen import Qwen3ForCausalLM
from nanovllm.utils import loader
from nanovllm.utils.parallel import TensorParallel

SETTINGS = {"num_kvcache_blocks": 20, "kvcache_block_size": 16, "dtype": "float32"}


def load(path) -> LLM:
    return LLM(str(path), **SETTINGS)


def edit(path, change) -> None:
    """Rewrites the checkpoint's tensors with `change` applied to their dict."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_sharded_checkpoints_load_with_a_progress_bar(tmp_path, capsys):
    model = save_model(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    capsys.readouterr()
    prompt = random_prompts([9])[0]
    with load(tmp_path / "shards") as llm:
        assert "Loading weights" in capsys.readouterr().err
        [output] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
    assert output["token_ids"] == reference_tokens(model, prompt, 5)
    with load(tmp_path / "whole"):
        assert "Loading weights" not in capsys.readouterr().err


def test_a_tied_head_that_is_stored_again_is_ignored(tmp_path):
    model = save_model(tmp_path, tie_word_embeddings=True)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": torch.randn_like(t["model.embed_tokens.weight"])}))
    prompt = random_prompts([9])[0]
    with load(tmp_path) as llm:
        [output] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
    assert output["token_ids"] == reference_tokens(model, prompt, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"), "missing: model.layers.1.self_attn.k_proj.weight"),
        (lambda t: t.pop("lm_head.weight"), "missing: lm_head.weight"),
        (lambda t: t.update({"model.extra": torch.ones(1)}), "unexpected: model.extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"misshapen: model.norm.weight .*\[3\].*\[64\]"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(97, 64)}),
            r"misshapen: model.layers.0.mlp.up_proj.weight .*\[97, 64\].*\[96, 64\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_listed(tmp_path, change, message):
    save_model(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    save_model(tmp_path / "whole").save_pretrained(tmp_path, max_shard_size="100KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=lost.name):
        load(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    save_model(tmp_path / "whole").save_pretrained(tmp_path, max_shard_size="100KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    tensors = load_file(second) | dict([next(iter(load_file(first).items()))])
    save_file(tensors, second)
    with pytest.raises(ValueError, match="more than once"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 1000])
def test_a_truncated_file_is_named(tmp_path, keep):
    save_model(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        load(tmp_path)


def test_a_damaged_index_is_named(tmp_path):
    save_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}}))
    with pytest.raises(ValueError, match=r"index.json is damaged"):
        load(tmp_path)


def test_pickles_are_never_loaded(tmp_path):
    save_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="Only safetensors are loaded"):
        load(tmp_path)


def test_dummy_weights_need_only_a_config_and_are_reproducible(tmp_path):
    save_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    prompts = random_prompts([9, 20])
    outputs = []
    for seed in (0, 0, 1):
        with LLM(str(tmp_path), load_format="dummy", seed=seed, **SETTINGS) as llm:
            outputs.append(llm.generate(prompts, SamplingParams(temperature=0, max_tokens=9), use_tqdm=False))
            weight = llm.model_runner.model.model.layers[0].mlp.down_proj.weight.kernel.values
            assert 0.015 < weight.std() < 0.025
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_weight_has_memory_from_its_first_tensor_to_its_last(tmp_path, load_format):
    """So there is never more than the finished ones and those of a layer that is being read."""
    hf_model = save_model(tmp_path, tie_word_embeddings=True)
    model, finished = Qwen3ForCausalLM(hf_model.config, 64, TensorParallel()), []
    weights = stored_weights(model).values()

    def finish(weight):
        others = [other for other in weights if other.parts]
        assert weight in others and len(others) <= 3  # the projections of a layer come in the order of their names
        weight.finish()
        finished.append(weight)

    if load_format == "auto":
        loader.load_model(model, tmp_path, finish)
    else:
        loader.load_dummy(model, 0, finish)
    assert len(finished) == len(weights) and not any(weight.parts for weight in weights)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    if load_format == "auto":
        tensors = load_file(tmp_path / "model.safetensors")
        assert torch.equal(model.lm_head.weight.kernel.values, tensors["model.embed_tokens.weight"])
        parts = [tensors[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        assert torch.equal(model.model.layers[1].mlp.gate_up_proj.weight.kernel.values, torch.cat(parts))
