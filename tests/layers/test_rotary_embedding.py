"""Every rope type that transformers knows, against transformers' own rotary embedding."""

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partly
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

from helpers import make_config
from nanovllm.layers.rotary_embedding import RotaryEmbedding

SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0 + 0.01 * i for i in range(16)], "long_factor": [1.0 + 0.1 * i for i in range(16)],
    },
}  # fmt: skip


@pytest.mark.parametrize("rope_type", SCALINGS)
def test_rotation_equals_transformers(rope_type):
    scaling = SCALINGS[rope_type]
    if rope_type != "default":
        assert rope_type in ROPE_INIT_FUNCTIONS
        scaling = scaling | {"rope_theta": 10000.0}
    config = make_config(max_position_embeddings=256, rope_scaling=scaling)
    positions = torch.arange(256)
    q, k = torch.randn(256, 4, 32), torch.randn(256, 2, 32)
    # transformers sees the longest sequence at once here, for which our frequencies are made.
    cos, sin = Qwen3RotaryEmbedding(config)(q, positions.unsqueeze(0))
    expected = apply_rotary_pos_emb(q.transpose(0, 1).unsqueeze(0), k.transpose(0, 1).unsqueeze(0), cos, sin)
    for ours, theirs in zip(RotaryEmbedding(config, 32, 256)(positions, q, k), expected, strict=True):
        torch.testing.assert_close(ours, theirs[0].transpose(0, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factor", [0.75, 0.5, 0.125])
def test_a_part_of_a_head_is_rotated(factor):
    """Phi's own function, of features in their own order, against ours, of those in the order it asks for."""
    config = make_config("Phi3", partial_rotary_factor=factor, rope_scaling=None)
    positions = torch.arange(64)
    q, k = torch.randn(64, 4, 32), torch.randn(64, 2, 32)
    cos, sin = Phi3RotaryEmbedding(config)(q, positions.unsqueeze(0))
    expected = apply_partly(q.transpose(0, 1).unsqueeze(0), k.transpose(0, 1).unsqueeze(0), cos, sin)
    rotary_emb = RotaryEmbedding(config, 32, 64)
    ours = rotary_emb(positions, q[..., rotary_emb.order], k[..., rotary_emb.order])
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs[0].transpose(0, 1)[..., rotary_emb.order], rtol=1e-4, atol=1e-4)


def test_an_unknown_rope_type_names_the_known_ones():
    config = make_config()
    for name in ("rope_parameters", "rope_scaling"):
        setattr(config, name, {"rope_type": "spiral", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match=r"'spiral'.*yarn"):
        RotaryEmbedding(config, 32, 64)
