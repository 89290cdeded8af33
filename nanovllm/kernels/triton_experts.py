"""All experts' products by one Triton kernel over tokens sorted by expert. The host does not learn who was chosen.

Legend: T tokens, E experts, K of them chosen for a token, H hidden size, N/D outputs/inputs of a product, M tiles of
rows, of which each belongs to one expert.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from nanovllm.kernels.triton_fused import silu_and_mul


def mix(x: Tensor, chosen: Tensor, counts: Tensor, experts: nn.ModuleList) -> Tensor:
    """See `Experts.forward`."""
    num_tokens, num_chosen = chosen.shape
    is_dense = num_tokens * num_chosen > 32 * len(experts)
    tiles = sort_by_expert(chosen, len(experts), 64 if is_dense and x.dtype != torch.float32 else 16)
    if experts.addresses is None:  # made once, for a graph cannot copy from the host
        weights = [(expert.gate_up_proj.weight, expert.down_proj.weight) for expert in experts]
        addresses = [[weight.kernel.values.data_ptr() for weight in pair] for pair in weights]
        experts.addresses = torch.tensor(addresses, device=x.device).T.contiguous()  # [2, E]
    of_up, of_down = experts.addresses
    gate_up = grouped_linear(x, of_up, experts[0].gate_up_proj.weight.kernel.values, num_chosen, *tiles)
    down = grouped_linear(
        silu_and_mul(*gate_up.chunk(2, -1)), of_down, experts[0].down_proj.weight.kernel.values, 1, *tiles
    )
    return (down.float().view(num_tokens, num_chosen, -1) * counts.unsqueeze(-1)).sum(1).to(x.dtype)


def grouped_linear(
    x: Tensor, addresses: Tensor, weight: Tensor, num_chosen: int, tiles: Tensor, of_tile: Tensor
) -> Tensor:
    """[T * num_chosen, N]: for each choice the product of its token, a row of [T, D], with its expert's [N, D] weight.

    Those are at the [E] `addresses`, and all like `weight`.
    """
    (n, depth), (num_tiles, rows) = weight.shape, tiles.shape
    out = x.new_empty(x.shape[0] * num_chosen, n)
    config = {"ROWS": rows, "COLUMNS": 64, "DEPTH": 32 if x.dtype == torch.float32 else 64}
    grid = num_tiles, triton.cdiv(n, config["COLUMNS"])
    _grouped_kernel[grid](
        x, addresses, weight, tiles, of_tile, out, x.stride(0), NUM_CHOSEN=num_chosen, N=n, K=depth, **config,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


def sort_by_expert(chosen: Tensor, num_experts: int, rows_per_tile: int) -> tuple[Tensor, Tensor]:
    """[M, rows] which of the T * K choices are in a tile (-1: none), those of one expert together; [M] whose it is.

    There are as many tiles as could be needed at most; those at the end are empty.
    """
    flat = chosen.flatten()
    experts = torch.arange(num_experts, device=flat.device)
    num_rows = (flat.unsqueeze(1) == experts).sum(0)  # [E]
    ends = (-(-num_rows // rows_per_tile)).cumsum(0)  # in tiles
    firsts = ends * rows_per_tile - -(-num_rows // rows_per_tile) * rows_per_tile  # places of each expert's first row
    order = flat.argsort(stable=True)
    owners = flat[order]
    places = firsts[owners] + torch.arange(len(flat), device=flat.device) - (num_rows.cumsum(0) - num_rows)[owners]
    num_tiles = min(len(flat), num_experts) + len(flat) // rows_per_tile
    tiles = torch.full((num_tiles * rows_per_tile,), -1, dtype=torch.int64, device=flat.device)
    tiles.scatter_(0, places, order)
    of_tile = torch.searchsorted(ends, torch.arange(num_tiles, device=flat.device), right=True)
    return tiles.view(num_tiles, rows_per_tile), of_tile.clamp(max=num_experts - 1)


@triton.jit(do_not_specialize=["x_stride"])
def _grouped_kernel(
    x, addresses, like, tiles, of_tile, out, x_stride, NUM_CHOSEN: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """A program computes COLUMNS outputs of one tile with its expert's weight, which has the dtype of `like`."""
    tiles += tl.program_id(0) * ROWS
    if tl.load(tiles) >= 0:  # else the tile is empty
        rows = tl.load(tiles + tl.arange(0, ROWS))
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        depth = tl.arange(0, DEPTH)
        address = tl.load(addresses + tl.load(of_tile + tl.program_id(0)))
        weight = tl.multiple_of(address, 16).to(tl.pointer_type(like.dtype.element_ty))
        x_rows = x + (rows // NUM_CHOSEN)[:, None] * x_stride + depth[None, :]
        weight += columns.to(tl.int64)[None, :] * K + depth[:, None]
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, K, DEPTH):
            is_in = start + depth < K
            x_tile = tl.load(x_rows + start, mask=(rows >= 0)[:, None] & is_in[None, :], other=0.0)
            weight_tile = tl.load(weight + start, mask=(columns < N)[None, :] & is_in[:, None], other=0.0)
            acc = tl.dot(x_tile, weight_tile, acc, input_precision="ieee")
        mask = (rows >= 0)[:, None] & (columns < N)[None, :]
        tl.store(out + rows[:, None] * N + columns[None, :], acc.to(out.dtype.element_ty), mask=mask)
