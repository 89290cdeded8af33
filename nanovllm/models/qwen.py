"""Qwen2 and 2.5 (Qwen Team, 2024, arXiv:2407.10671), and dense Qwen3 (2025, arXiv:2505.09388)."""

from transformers import PretrainedConfig

from nanovllm.models.decoder import DecoderForCausalLM, Variant
from nanovllm.utils.parallel import TensorParallel


class Qwen2ForCausalLM(DecoderForCausalLM):
    def __init__(self, config: PretrainedConfig, max_len: int, tp: TensorParallel):
        super().__init__(config, Variant(qkv_bias=True), max_len, tp)


class Qwen3ForCausalLM(DecoderForCausalLM):
    def __init__(self, config: PretrainedConfig, max_len: int, tp: TensorParallel):
        bias = config.attention_bias
        super().__init__(config, Variant(qkv_bias=bias, o_bias=bias, qk_norm=True), max_len, tp)
