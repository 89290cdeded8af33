"""Settings are checked before anything is loaded, and models are found or refused with a remedy."""

import json
import pickle
import subprocess
import sys

import huggingface_hub
import pytest
import torch

from helpers import save_model
from nanovllm import LLM, config
from nanovllm.config import Config
from nanovllm.utils import device


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


def edit_config(path, **changes) -> None:
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | changes))


def test_defaults(path):
    settings = Config(str(path))
    assert (settings.max_num_batched_tokens, settings.max_num_seqs) == (1024, 512)  # the first is 16384 on CUDA
    assert (settings.kvcache_block_size, settings.num_kvcache_blocks) == (None, -1)
    assert settings.max_model_len == 512  # 4096, lowered to the model's
    assert settings.eos_token_ids == {1}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("max_num_batched_tokens", 0, ValueError),
        ("quantization", "int5", ValueError),
        ("max_num_seqs", 0, ValueError),
        ("max_model_len", -5, ValueError),
        ("max_model_len", "long", TypeError),
        ("kvcache_block_size", 1.5, TypeError),
        ("num_kvcache_blocks", 0, ValueError),
        ("num_kvcache_blocks", -2, ValueError),
        ("tensor_parallel_size", 9, ValueError),
        ("gpu_memory_utilization", 0.0, ValueError),
        ("gpu_memory_utilization", 1.1, ValueError),
        ("worker_timeout", 0, ValueError),
        ("worker_timeout", 1801, ValueError),
        ("worker_timeout", "60", TypeError),
        ("dtype", "float8", ValueError),
        ("device", "tpu", ValueError),
        ("device", "cpu:1", ValueError),  # as "cuda:1" would be: kernels run on the current GPU
        ("attention_backend", "magic", ValueError),
        ("load_format", "pickle", ValueError),
        ("seed", None, TypeError),
    ],
)
def test_bad_values_name_the_setting(path, name, value, error):
    with pytest.raises(error, match=name):
        Config(str(path), **{name: value})


def test_unknown_settings_warn_with_the_nearest(path):
    with (
        pytest.warns(UserWarning, match="'max_model_length'.*'max_model_len'") as caught,
        LLM(str(path), max_model_length=100, num_kvcache_blocks=9),
    ):
        pass
    assert caught[0].filename == __file__


def test_a_setting_that_is_near_no_other_gets_no_advice():
    with pytest.warns(UserWarning, match=r"unknown setting 'rope_theta'$"):
        assert config.known_fields({"rope_theta": 1e4, "seed": 3}) == {"seed": 3}


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("block_size", "use kvcache_block_size"),
        ("enable_prefix_caching", "always cached"),
        ("trust_remote_code", "never run"),
        ("tokenizer", "the checkpoint's"),
    ],
)
def test_a_setting_of_vllm_says_what_it_is_here(name, advice):
    with pytest.warns(UserWarning, match=f"'{name}'; .*{advice}"):
        assert config.known_fields({name: True}) == {}


def test_no_setting_of_ours_is_taken_for_one_of_vllms():
    assert not config.VLLM_SETTINGS.keys() & config.Config.__slots__


def test_an_unsupported_architecture_lists_the_supported_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "new", "architectures": ["NewForCausalLM"]}))
    with pytest.raises(ValueError, match=r"NewForCausalLM.*supported are \['Llama.*'Qwen3MoeForCausalLM'\]$"):
        Config(str(tmp_path))


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        Config(str(tmp_path))


def test_a_hub_id_that_is_not_cached_says_how_to_download_it(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise FileNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"hf download Qwen/Qwen3-0\.6B"):
        Config("Qwen/Qwen3-0.6B")


def test_a_hub_id_resolves_to_its_snapshot(monkeypatch, path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **kwargs: str(path))
    assert Config("owner/name").model_path == path


@pytest.mark.parametrize("model", ["/no/such/model", "./nosuch", "../nosuch", "~/nosuch", "a/b/c", "https://a.b/c/d"])
def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_id(model, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(ValueError, match="neither a directory nor"):
        Config(model)


def test_a_missing_directory_beside_others_is_not_advised_to_be_downloaded(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise FileNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ValueError, match="does not exist in the directory 'models'") as caught:
        Config("models/nosuch")
    assert "hf download" not in str(caught.value)


def test_a_file_is_refused_with_what_to_pass(path, tmp_path):
    with pytest.raises(ValueError, match=r"is a file; pass the directory that it is in, .*model"):
        Config(str(path / "model.safetensors"))
    file = tmp_path / "qwen.Q8_0.gguf"
    file.touch()
    for model in (file, tmp_path):
        with pytest.raises(ValueError, match=r"GGUF is llama\.cpp's format: pass the Hugging Face checkpoint"):
            Config(str(model))


@pytest.mark.parametrize(
    ("generation", "expected"), [({"eos_token_id": [3, 4]}, {3, 4}), ({"eos_token_id": 5}, {5}), ({}, {1}), (None, {1})]
)
def test_all_eos_ids_of_the_checkpoint_end_a_sequence(tmp_path, generation, expected):
    save_model(tmp_path)
    file = tmp_path / "generation_config.json"
    file.unlink(missing_ok=True) if generation is None else file.write_text(json.dumps(generation))
    assert Config(str(tmp_path)).eos_token_ids == expected


def test_a_model_without_eos_never_stops_early(tmp_path):
    save_model(tmp_path, eos_token_id=None)
    assert Config(str(tmp_path)).eos_token_ids == frozenset()


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_auto_dtype_is_bf16_only_where_it_is_fast_or_we_make_it_so(tmp_path, stored, monkeypatch):
    save_model(tmp_path)
    edit_config(tmp_path, dtype=stored, torch_dtype=stored)
    for fast, kernels in ((True, None), (False, object()), (False, None)):
        monkeypatch.setattr(device, "has_fast_bf16", lambda _: fast)  # noqa: B023
        monkeypatch.setattr(config, "load_kernels", lambda: kernels)  # noqa: B023
        expected = torch.bfloat16 if (fast or kernels) and stored != "float32" else torch.float32
        assert Config(str(tmp_path), device="cpu").dtype == expected


def test_scaled_rope_raises_the_longest_sequence(tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4}
    save_model(tmp_path, rope_scaling=scaling)
    assert Config(str(tmp_path), max_model_len=9999).max_model_len == 2048


def test_the_cpu_cache_never_exceeds_the_memory_available(path, monkeypatch):
    class Memory:
        available = 200_000

    monkeypatch.setattr(device.psutil, "virtual_memory", lambda: Memory)
    with LLM(str(path), kvcache_block_size=8, dtype="float32", device="cpu") as llm:
        block_bytes = 2 * 2 * 2 * 8 * 32 * 4  # K and V, layers, heads, tokens, head_dim, fp32
        assert llm.config.num_kvcache_blocks == 100_000 // block_bytes
    with pytest.raises(ValueError, match="lower num_kvcache_blocks"):
        LLM(str(path), kvcache_block_size=8, num_kvcache_blocks=99, dtype="float32", device="cpu")


def test_batch_invariant_on_a_gpu_needs_our_attention(path, monkeypatch):
    monkeypatch.setattr(config, "resolve_device", lambda name: torch.device("cuda"))
    for name in ("auto", "triton"):
        Config(str(path), batch_invariant=True, attention_backend=name, dtype="float16")
    with pytest.raises(ValueError, match=r"batch_invariant=True and attention_backend='flash_attn'.*'triton'"):
        Config(str(path), batch_invariant=True, attention_backend="flash_attn", dtype="float16")
    with pytest.raises(TypeError, match="batch_invariant"):
        Config(str(path), batch_invariant="yes")


def test_another_process_makes_the_model_without_transformers(path):
    """Whose import takes as long as PyTorch's."""
    code = """
import pickle, sys, torch
from nanovllm.utils.parallel import TensorParallel
from nanovllm.engine import parallel_runner, replica
config = pickle.load(sys.stdin.buffer)
with torch.device("meta"):
    config.model_class(config.hf_config, config.max_model_len, TensorParallel())
print("transformers" in sys.modules)
"""
    sent = pickle.dumps(Config(str(path)).to_send())
    result = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
    assert result.stdout == b"False\n"
