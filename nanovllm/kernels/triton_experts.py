"""All experts' products by one Triton kernel over tokens sorted by expert. The host does not learn who was chosen.

Legend: T tokens, E experts, K of them chosen for a token, H hidden size, N/D outputs/inputs of a product, M tiles of
rows, of which each belongs to one expert.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from nanovllm.kernels.triton_fused import silu_and_mul
from nanovllm.kernels.triton_linear import plain_sizes, product
from nanovllm.kernels.triton_quantized import TritonQuantizedWeight


def mix(x: Tensor, chosen: Tensor, counts: Tensor, experts: nn.ModuleList) -> Tensor:
    """See `Experts.forward`."""
    num_tokens, num_chosen = chosen.shape
    is_dense = num_tokens * num_chosen > 32 * len(experts)
    tiles = sort_by_expert(chosen, len(experts), 64 if is_dense and x.dtype != torch.float32 else 16)
    alike = experts if experts.addresses is None else experts[:1]
    kernels = [[getattr(expert, name).weight.kernel for expert in alike] for name in ("gate_up_proj", "down_proj")]
    weights = [[k if isinstance(k, TritonQuantizedWeight) else k.values for k in some] for some in kernels]
    if experts.addresses is None:  # made once, for a graph cannot copy from the host
        addresses = [[[_address(part) for part in _parts(weight)] for weight in alike] for alike in weights]
        experts.addresses = torch.tensor(addresses, device=x.device).mT.contiguous()  # [2, 3, E]
    of_up, of_down = experts.addresses
    gate_up = grouped_linear(x, of_up, weights[0][0], num_chosen, *tiles)
    down = grouped_linear(silu_and_mul(*gate_up.chunk(2, -1)), of_down, weights[1][0], 1, *tiles)
    return (down.float().view(num_tokens, num_chosen, -1) * counts.unsqueeze(-1)).sum(1).to(x.dtype)


def _parts(weight: Tensor | TritonQuantizedWeight) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Values, scales and zeros."""
    is_quantized = isinstance(weight, TritonQuantizedWeight)
    return (weight.values, weight.scales, weight.zeros) if is_quantized else (weight, None, None)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def grouped_linear(
    x: Tensor, addresses: Tensor, like: Tensor | TritonQuantizedWeight, num_chosen: int, tiles: Tensor, of_tile: Tensor
) -> Tensor:
    """[T * num_chosen, N]: for each choice the product of its token, a row of [T, D], with its expert's [N, D] weight.

    Those are at the [3, E] `addresses` (values, scales and zeros), and all like `like`.
    """
    num_tiles, config = len(tiles), grouped_config(like, tiles.shape[1], x.dtype)
    out = x.new_empty(x.shape[0] * num_chosen, config["N"])
    _grouped_kernel[num_tiles, triton.cdiv(config["N"], config["COLUMNS"])](
        x, addresses, *_parts(like), tiles, of_tile, out, x.stride(0), NUM_CHOSEN=num_chosen, E=addresses.shape[1],
        **config,
    )  # fmt: skip
    return out


def grouped_config(weight: Tensor | TritonQuantizedWeight, rows: int, dtype: torch.dtype) -> dict[str, int | str]:
    """The weights' sizes, and of tiles with so many rows; see `linear_config`."""
    sizes, depth = plain_sizes(weight), 32 if dtype == torch.float32 else 64
    if isinstance(weight, TritonQuantizedWeight):
        sizes, depth = weight.sizes, weight.depth(depth * 2 if rows == 16 and depth == 64 else depth)
    return {**sizes, "ROWS": rows, "COLUMNS": 64, "DEPTH": depth, "num_warps": 4, "num_stages": 3}


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


@triton.jit
def _grouped_kernel(
    x, addresses, values_like, scales_like, zeros_like, tiles, of_tile, out, x_stride,
    NUM_CHOSEN: tl.constexpr, E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """A program computes COLUMNS outputs of one tile with its expert's weight, whose parts have the dtypes given."""
    tiles += tl.program_id(0) * ROWS
    if tl.load(tiles) >= 0:  # else the tile is empty
        rows = tl.load(tiles + tl.arange(0, ROWS))[:, None]
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        addresses += tl.load(of_tile + tl.program_id(0))
        acc = product(
            x + rows // NUM_CHOSEN * x_stride, rows >= 0, _at(addresses, values_like), _at(addresses + E, scales_like),
            _at(addresses + 2 * E, zeros_like), columns, 0, WIDTH, N, K, WIDTH, GROUP, KIND, ROWS, COLUMNS, DEPTH
        )  # fmt: skip
        mask = (rows >= 0) & (columns < N)[None, :]
        tl.store(out + rows * N + columns[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _at(address, like):
    """The pointer at `address`, None for what is None."""
    pointer = like
    if like is not None:
        pointer = tl.multiple_of(tl.load(address), 16).to(tl.pointer_type(like.dtype.element_ty))
    return pointer
