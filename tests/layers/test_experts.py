"""Mixtures of experts: the products of all by one kernel, against each expert's own, and the kernel's binaries."""

import pytest
import torch

from aot import ALL, ARCHITECTURES, SHARED_LIMIT, compile_kernel
from nanovllm.kernels import triton_experts
from nanovllm.layers import experts
from nanovllm.layers.experts import Experts, Router
from nanovllm.layers.weight import PlainWeight
from nanovllm.models.decoder import DecoderMLP
from nanovllm.utils.parallel import TensorParallel
from pairs import case_id, in_turn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3}


def make_experts(num_experts: int, hidden_size: int, size: int, dtype: torch.dtype) -> Experts:
    made = Experts(DecoderMLP(hidden_size, size, False, TensorParallel(), reduces=False) for _ in range(num_experts))
    for expert in made:
        for layer in (expert.gate_up_proj, expert.down_proj):
            layer.weight.kernel = PlainWeight(0.1 * torch.randn(layer.weight.shape).to(DEVICE, dtype))
            layer.weight.linear = layer.weight.kernel.linear
    return made


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_tokens", [1, 7, 90])
@torch.inference_mode()
def test_products_of_sorted_tokens_equal_each_experts_own(num_tokens, dtype, monkeypatch):
    """With experts that nobody chooses, and one that all do; sizes that no tile divides."""
    torch.manual_seed(num_tokens)
    made, x = make_experts(6, 72, 40, dtype), torch.randn(num_tokens, 80).to(DEVICE, dtype)[:, :72]
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(num_tokens)]).to(DEVICE)
    chosen = torch.cat([chosen, torch.full((num_tokens, 1), 5, device=DEVICE)], 1)
    counts = torch.rand(num_tokens, 3, device=DEVICE)
    monkeypatch.setattr(experts, "has_grouped_products", lambda x: False)
    expected = made(x, chosen, counts)
    monkeypatch.setattr(experts, "has_grouped_products", lambda x: True)
    torch.testing.assert_close(made(x, chosen, counts), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("rows", [16, 64])
def test_a_tile_has_the_choices_of_one_expert_and_each_choice_one_place(rows):
    torch.manual_seed(rows)
    for num_tokens, num_experts in ((1, 8), (5, 300), (200, 8), (64, 1), (33, 128)):
        chosen = torch.randint(num_experts, (num_tokens, 4))
        tiles, of_tile = triton_experts.sort_by_expert(chosen, num_experts, rows)
        used = tiles[tiles >= 0]
        assert used.sort().values.tolist() == list(range(num_tokens * 4))
        for tile, expert in zip(tiles, of_tile, strict=True):
            mine = tile[tile >= 0]
            assert (chosen.flatten()[mine] == expert).all()
            assert len(mine) == 0 or tile[0] >= 0  # what the kernel asks


def test_the_router_takes_the_likeliest():
    torch.manual_seed(0)
    x, router = torch.randn(5, 24), Router(24, 10, 3, normalizes=True)
    router.weight.fill(torch.randn(240))
    router.weight.finish()
    chosen, counts = router(x)
    probs = (x @ router.weight.kernel.values.T).softmax(-1)
    for row in range(5):
        best = sorted(range(10), key=lambda expert: -probs[row, expert].item())[:3]
        assert chosen[row].tolist() == best
        torch.testing.assert_close(counts[row], probs[row, best] / probs[row, best].sum())


TILES = [("bf16", 16), ("bf16", 64), ("fp32", 16)]


@pytest.mark.parametrize(("tile", "arch"), in_turn(TILES, ARCHITECTURES, is_whole=ALL), ids=case_id)
def test_grouped_kernel_compiles_ahead_of_time(tile, arch):
    dtype, rows = tile
    signature = {name: f"*{dtype}:16" for name in ("x", "values_like", "out")}
    signature |= dict.fromkeys(["addresses", "tiles", "of_tile"], "*i64:16") | {"x_stride": "i32:16"}
    weight = torch.empty(1536, 2048, device="meta")
    config = triton_experts.grouped_config(weight, rows, torch.float32 if dtype == "fp32" else torch.bfloat16)
    launch = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    sizes = {"NUM_CHOSEN": 8, "E": 128, "scales_like": None, "zeros_like": None, **config}
    binary = compile_kernel(triton_experts._grouped_kernel, signature, sizes, arch, **launch)
    assert binary.shared <= SHARED_LIMIT[arch] and binary.spilled == 0
