"""A decoder, in the order of the computation: what the architectures have in common, and `Variant`, how they differ.

Legend: T tokens in the step, R tokens to sample, H/KH query/KV heads of this rank, D head_dim, V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from nanovllm.layers.activation import silu_and_mul
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.experts import Experts, Router
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.utils.hf_types import PretrainedConfig
from nanovllm.utils.parallel import TensorParallel


@dataclass(frozen=True)
class Variant:
    """What a decoder has beside the least: RMSNorm, attention with rotary embedding, a gated MLP."""

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # of each head, before the rotary embedding
    fused: bool = False  # the checkpoint has each of `qkv_proj` and `gate_up_proj` as one tensor
    sparse_layers: frozenset[int] = frozenset()  # which have a mixture of experts


class DecoderAttention(nn.Module):
    def __init__(self, config: PretrainedConfig, variant: Variant, rotary_emb: RotaryEmbedding, tp: TensorParallel):
        super().__init__()
        head_dim, num_heads, num_kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        kv_replicas = max(1, tp.size // num_kv_heads)  # ranks that hold the same head
        sizes = {"q_proj": num_heads * head_dim} | dict.fromkeys(["k_proj", "v_proj"], num_kv_heads * head_dim)
        replicas = dict.fromkeys(["k_proj", "v_proj"], kv_replicas)
        orders = {} if rotary_emb.order is None else dict.fromkeys(["q_proj", "k_proj"], rotary_emb.order)
        self.qkv_proj = ColumnParallelLinear(config.hidden_size, sizes, variant.qkv_bias, tp, replicas, orders)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if variant.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if variant.qk_norm else None
        self.rotary_emb = rotary_emb
        self.attn = Attention(num_heads // tp.size, num_kv_heads * kv_replicas // tp.size, head_dim)
        self.o_proj = RowParallelLinear(num_heads * head_dim, config.hidden_size, variant.o_bias, tp)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(hidden_states)
        q = q.view(-1, self.attn.num_heads, self.attn.head_dim)  # [T, H, D]
        k, v = (x.view(-1, self.attn.num_kv_heads, self.attn.head_dim) for x in (k, v))  # [T, KH, D]
        q, k = self.rotary_emb(positions, q, k, self.q_norm, self.k_norm)
        return self.o_proj(self.attn(q, k, v).flatten(1))


class DecoderMLP(nn.Module):
    def __init__(self, hidden_size: int, size: int, bias: bool, tp: TensorParallel, reduces: bool = True):
        super().__init__()
        self.gate_up_proj = ColumnParallelLinear(hidden_size, dict.fromkeys(["gate_proj", "up_proj"], size), bias, tp)
        self.down_proj = RowParallelLinear(size, hidden_size, bias, tp, reduces)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu_and_mul(*self.gate_up_proj(x)))


class SparseMLP(nn.Module):
    """A mixture of experts, each of which is split over the ranks."""

    def __init__(self, config: PretrainedConfig, tp: TensorParallel):
        super().__init__()
        sizes, self.tp = (config.hidden_size, config.moe_intermediate_size), tp
        self.gate = Router(config.hidden_size, config.num_experts, config.num_experts_per_tok, config.norm_topk_prob)
        self.experts = Experts(DecoderMLP(*sizes, False, tp, reduces=False) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        return self.tp.all_reduce(self.experts(x, *self.gate(x)))


class DecoderLayer(nn.Module):
    def __init__(
        self, config: PretrainedConfig, variant: Variant, index: int, rotary_emb: RotaryEmbedding, tp: TensorParallel
    ):  # fmt: skip
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DecoderAttention(config, variant, rotary_emb, tp)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if index in variant.sparse_layers:
            self.mlp = SparseMLP(config, tp)
        else:
            self.mlp = DecoderMLP(config.hidden_size, config.intermediate_size, variant.mlp_bias, tp)

    def forward(self, positions: Tensor, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Takes and returns this layer's addition to the residual stream, and the stream without it."""
        hidden_states, residual = self.input_layernorm.add_norm(x, residual)
        hidden_states = self.self_attn(positions, hidden_states)
        hidden_states, residual = self.post_attention_layernorm.add_norm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class DecoderModel(nn.Module):
    def __init__(self, config: PretrainedConfig, variant: Variant, max_len: int, tp: TensorParallel):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        rotary_emb = RotaryEmbedding(config, config.head_dim, max_len)
        layers = (DecoderLayer(config, variant, i, rotary_emb, tp) for i in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        hidden_states, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return self.norm.add_norm(hidden_states, residual)[0]


class DecoderForCausalLM(nn.Module):
    """One rank's whole model; `Config` has checked that its sizes divide. ValueError if it uses what this one lacks."""

    def __init__(self, config: PretrainedConfig, variant: Variant, max_len: int, tp: TensorParallel):
        super().__init__()
        if config.hidden_act != "silu":
            raise ValueError(f"hidden_act={config.hidden_act!r} is not supported; these models use 'silu'")
        self.packed_modules: dict[str, str] = {}  # projection in the checkpoint -> module that holds it
        if not variant.fused:
            self.packed_modules |= dict.fromkeys(["q_proj", "k_proj", "v_proj"], "qkv_proj")
            self.packed_modules |= dict.fromkeys(["gate_proj", "up_proj"], "gate_up_proj")
        self.tie_word_embeddings = config.tie_word_embeddings
        self.model = DecoderModel(config, variant, max_len, tp)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, tp)
        if self.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def ignored_weights(self, name: str) -> bool:
        """Tensors of a checkpoint that this model does without: some files hold a tied head a second time."""
        return (self.tie_word_embeddings and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq")

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """[T] token ids and [T] positions -> [T, hidden_size]."""
        return self.model(input_ids, positions)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[T, hidden_size] -> [R, this rank's part of V] for the tokens after which one is sampled."""
        return self.lm_head(hidden_states)
