"""The architectures, under the names that a checkpoint's config.json gives them."""

from nanovllm.models.qwen3 import Qwen3ForCausalLM

MODELS = {"Qwen3ForCausalLM": Qwen3ForCausalLM}
