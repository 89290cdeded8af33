"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), with every scaling that transformers knows."""

import torch
from torch import nn

from nanovllm.kernels.fused import fused_ops
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.utils.hf_types import PretrainedConfig


def rope_settings(config: PretrainedConfig) -> dict:
    """`rope_type`, `rope_theta` and the scaling's own values, wherever this version of transformers keeps them."""
    settings = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    settings.setdefault("rope_type", settings.get("type", "default"))
    settings.setdefault("rope_theta", getattr(config, "rope_theta", 10000.0))
    settings.setdefault("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    return settings


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by their positions; the two halves of a head are the two coordinates.

    Scalings that depend on the length of the sequence ("dynamic", "longrope") are fixed for the longest one that the
    engine may run, `max_len`: a cached key must not change when its sequence grows. ValueError for an unknown one.

    Of a head that is rotated in part, its first `rotary_dim` features, the projections must bring queries' and keys'
    features in the order `order`, [head_dim], in which those that stay are pairs too, of angle 0; else it is None.
    """

    def __init__(self, config: PretrainedConfig, head_dim: int, max_len: int):
        super().__init__()
        settings = rope_settings(config)
        rope_type = settings["rope_type"]
        rotary_dim = int(head_dim * (settings.get("partial_rotary_factor") or 1.0))
        kept = (head_dim - rotary_dim) // 2  # pairs
        self.order: torch.Tensor | None = None
        with torch.device("cpu"):  # also where parameters have no memory yet
            if rope_type == "default":
                exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
                inv_freq, scale = 1.0 / settings["rope_theta"] ** exponents, 1.0
            else:
                inv_freq, scale = _scaled(rope_type, config, max_len)
            angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq.float())
            cos, sin = angles.cos() * scale, angles.sin() * scale
            if kept:
                cos = torch.cat([cos, torch.ones(max_len, kept)], 1)
                sin = torch.cat([sin, torch.zeros(max_len, kept)], 1)
                rotated, others = torch.arange(head_dim).split([rotary_dim, head_dim - rotary_dim])
                pairs = zip(rotated.split(rotary_dim // 2), others.split(kept), strict=True)
                self.order = torch.cat([part for firsts in pairs for part in firsts])
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor,
        q_norm: RMSNorm | None = None, k_norm: RMSNorm | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Rotates [T, heads, head_dim] queries and keys, after their norms if any, by their [T] positions, in fp32."""
        if ops := fused_ops(query):
            weights, eps = ((q_norm.weight, k_norm.weight), q_norm.eps) if q_norm else ((None, None), 0.0)
            return ops.norm_rope(query, key, *weights, eps, self.cos, self.sin, positions)
        if q_norm:
            query, key = q_norm(query), k_norm(key)
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _scaled(rope_type: str, config: PretrainedConfig, max_len: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies, and the factor of cosines and sines."""
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if rope_type not in ROPE_INIT_FUNCTIONS:
        known = f"this version of transformers, which has {['default', *sorted(ROPE_INIT_FUNCTIONS)]}"
        raise ValueError(f"rope_type {rope_type!r} is unknown to {known}")
    if not isinstance(config, transformers.PretrainedConfig):  # some of them ask it more than a worker's can answer
        attributes, config = vars(config), transformers.PretrainedConfig()
        vars(config).update(attributes)
    return ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=max_len)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)
