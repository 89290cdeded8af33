"""The FLOPs and bytes that a step of a model cannot do without; the floor is made of them."""

import numpy as np
import torch
from transformers import PretrainedConfig

from nanovllm.config import Config
from nanovllm.kernels.cpu import SCALE_BYTES

Counts = int | float | np.ndarray  # of one step, or of each of many


class ModelCost:
    """Of a decoder, mixtures of experts included; norms of the layers count, the final one does not.

    Args:
        model: Its dimensions.
        itemsize: Bytes of a number, cached or a weight, unless what follows says otherwise.
        weight_bits: Of a weight of the layers, and of the LM head.
        row_bytes: Of a key, and of a value, of a head in the cache.
    """

    def __init__(
        self, model: PretrainedConfig, itemsize: int, weight_bits: tuple[float, float] | None = None,
        row_bytes: int | None = None
    ):  # fmt: skip
        self.layer_size, self.head_size = (bits / 8 for bits in weight_bits) if weight_bits else (itemsize, itemsize)
        layers, hidden, head_dim = model.num_hidden_layers, model.hidden_size, model.head_dim
        heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
        attention = hidden * (2 * heads + 2 * kv_heads) * head_dim + 2 * hidden + 2 * head_dim
        self.expert_params, self.num_chosen, self.num_experts, num_sparse = experts_of(model)
        self.dense_params = layers * attention + (layers - num_sparse) * 3 * hidden * model.intermediate_size
        self.head_params = model.vocab_size * hidden
        self.token_bytes = layers * 2 * kv_heads * (row_bytes or head_dim * itemsize)  # keys and values of one token
        self.pair_flops = layers * 4 * heads * head_dim  # of a query and a key

    def flops(self, num_tokens: Counts, num_logits: Counts, num_pairs: Counts) -> Counts:
        """Of tokens through the layers, tokens through the LM head, and pairs of a query and a key."""
        layer_params = self.dense_params + self.num_chosen * self.expert_params
        return 2 * layer_params * num_tokens + 2 * self.head_params * num_logits + self.pair_flops * num_pairs

    def num_bytes(self, num_tokens: Counts, num_cached: Counts) -> Counts:
        """All weights once, of the experts those that so many tokens choose if all are as likely; what is cached."""
        chosen = self.num_experts * (1 - (1 - self.num_chosen / max(self.num_experts, 1)) ** num_tokens)
        layers = (self.dense_params + chosen * self.expert_params) * self.layer_size
        return layers + self.head_params * self.head_size + self.token_bytes * num_cached


def experts_of(model: PretrainedConfig) -> tuple[int, int, int, int]:
    """Parameters of an expert in all layers that have some, how many are chosen, how many there are; those layers."""
    num_experts, step = getattr(model, "num_experts", 0), getattr(model, "decoder_sparse_step", 1)
    if not num_experts:
        return 0, 0, 0, 0
    sparse = {*range(step - 1, model.num_hidden_layers, step)} - {*(model.mlp_only_layers or ())}
    params = len(sparse) * 3 * model.hidden_size * model.moe_intermediate_size
    return params, model.num_experts_per_tok, num_experts, len(sparse)


def weight_bits(config: Config) -> tuple[float, float]:
    """Of a weight of the layers, with its share of scales and zero points, and of the LM head."""
    plain, weights = 8 * config.dtype.itemsize, config.weight_format
    if config.quantization is not None:
        return (4 + 24 / 128 if config.quantization == "int4" else 8), 8
    if weights.is_plain:
        return plain, plain
    return (4 if weights.dtype == torch.uint8 else 8) + (24 / weights.group_size if weights.group_size else 0), plain


def cache_row_bytes(config: Config) -> int:
    """Of a key, or a value, of a head."""
    head_dim = config.hf_config.head_dim
    return head_dim + SCALE_BYTES if config.kv_cache_dtype == "int8" else head_dim * config.dtype.itemsize
