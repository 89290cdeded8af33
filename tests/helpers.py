"""Random models and the references that the engine is compared with."""

import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

ROOT = Path(__file__).parent.parent
DEMO_MODEL = ROOT / "assets" / "nano-qwen3"


def make_config(architecture: str = "Qwen3", **overrides) -> PretrainedConfig:
    """A model of about 100,000 parameters, with logits spread widely enough that fp32 has no ties."""
    settings = {
        "vocab_size": 307,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    given = {name: value for name, value in (settings | overrides).items() if (name, value) != ("head_dim", None)}
    return getattr(transformers, f"{architecture}Config")(**given)


def save_model(
    path: Path, seed: int = 0, dtype: torch.dtype = torch.float32, architecture: str = "Qwen3",
    max_shard_size: str = "5GB", **overrides
) -> PreTrainedModel:  # fmt: skip
    """Writes a random checkpoint into `path` and returns transformers' model of it."""
    torch.manual_seed(seed)
    model = getattr(transformers, f"{architecture}ForCausalLM")(make_config(architecture, **overrides)).eval()
    for name, param in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # else they start as ones and zeros, which would hide mistakes
            param.data += 0.2 * torch.randn_like(param)
    model = model.to(dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model


@contextmanager
def default_interrupts() -> Iterator[None]:
    """A Ctrl-C raises KeyboardInterrupt: what a shell runs in the background ignores it from the start."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def random_prompts(lengths: list[int], seed: int = 0, vocab_size: int = 307) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, vocab_size) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def reference_tokens(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """transformers' greedy completion, the EOS included."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    """[V] logits of the token after `prompt`."""
    return model(torch.tensor([prompt])).logits[0, -1]


def chi_squared_p(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """P(a chi-squared this large or larger), over the cells with an expectation of at least 5, the rest as one."""
    expected = probs.double() * counts.sum()
    large = expected >= 5
    observed = torch.cat([counts[large].double(), counts[~large].sum()[None].double()])
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2).item()
