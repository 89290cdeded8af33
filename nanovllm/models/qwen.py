"""Qwen2 and 2.5 (Qwen Team, 2024, arXiv:2407.10671), and Qwen3 (2025, arXiv:2505.09388), dense and of experts."""

from nanovllm.models.decoder import DecoderForCausalLM, Variant
from nanovllm.utils.hf_types import PretrainedConfig
from nanovllm.utils.parallel import TensorParallel


class Qwen2ForCausalLM(DecoderForCausalLM):
    def __init__(self, config: PretrainedConfig, max_len: int, tp: TensorParallel):
        super().__init__(config, Variant(qkv_bias=True), max_len, tp)


class Qwen3ForCausalLM(DecoderForCausalLM):
    def __init__(self, config: PretrainedConfig, max_len: int, tp: TensorParallel):
        bias = config.attention_bias
        super().__init__(config, Variant(qkv_bias=bias, o_bias=bias, qk_norm=True), max_len, tp)


class Qwen3MoeForCausalLM(DecoderForCausalLM):
    def __init__(self, config: PretrainedConfig, max_len: int, tp: TensorParallel):
        steps = range(config.decoder_sparse_step - 1, config.num_hidden_layers, config.decoder_sparse_step)
        sparse_layers = frozenset(steps if config.num_experts else ()) - {*(config.mlp_only_layers or ())}
        bias = config.attention_bias
        variant = Variant(qkv_bias=bias, o_bias=bias, qk_norm=True, sparse_layers=sparse_layers)
        super().__init__(config, variant, max_len, tp)
