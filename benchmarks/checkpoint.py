"""The default model, for which nothing is downloaded: Qwen3-0.6B's shape, with random weights."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
    "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 40960, "rope_theta": 1000000,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False, "initializer_range": 0.02,
    "bos_token_id": 151643, "eos_token_id": 151645, "dtype": "bfloat16",
}  # fmt: skip


@contextmanager
def model_directory(model: str | None) -> Iterator[str]:
    """`model`, or a directory with nothing but the configuration of Qwen3-0.6B."""
    if model:
        yield model
        return
    with tempfile.TemporaryDirectory() as path:
        Path(path, "config.json").write_text(json.dumps(QWEN3_0_6B))
        yield path


def save_checkpoint(path: Path, seed: int) -> None:
    """Writes random weights in the shape of Qwen3-0.6B, and the demo model's tokenizer (whose vocabulary is smaller)
    for engines that insist on one."""
    torch.manual_seed(seed)
    with model_directory(None) as config_path:
        hf_config = AutoConfig.from_pretrained(config_path)
    AutoModelForCausalLM.from_config(hf_config).to(torch.bfloat16).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(__file__).parent.parent / "assets" / "nano-qwen3" / name, path)
