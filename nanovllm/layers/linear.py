"""Linear layers split over tensor-parallel ranks, each of which reads only its own slice of a checkpoint tensor.

Column parallel: outputs are split, no communication. Row parallel: inputs are split, one all-reduce
(Megatron-LM, Shoeybi et al., 2019, arXiv:1909.08053).
"""

import torch
from torch import nn

from nanovllm.layers.weight import Weight
from nanovllm.utils.loader import CheckpointTensor, copy_weight
from nanovllm.utils.parallel import TensorParallel


class ColumnParallelLinear(nn.Module):
    """Several projections of one input, by their names in the checkpoint, as a single GEMM split by output features.

    Args:
        num_replicas: How many neighbouring ranks hold the same slice of a projection, by default one.
        orders: In which order the features of each head of a projection are wanted, [head_dim], by default as stored.
    """

    def __init__(
        self, input_size: int, output_sizes: dict[str, int], bias: bool, tp: TensorParallel,
        num_replicas: dict[str, int] | None = None, orders: dict[str, torch.Tensor] | None = None
    ):  # fmt: skip
        super().__init__()
        self.output_sizes, self.orders = output_sizes, orders or {}
        self.shards: dict[str, tuple[slice, slice]] = {}  # name -> rows of this parameter, rows in the checkpoint
        offset = 0
        for name, total in output_sizes.items():
            replicas = (num_replicas or {}).get(name, 1)
            size = total * replicas // tp.size
            start = tp.rank // replicas * size
            self.shards[name] = slice(offset, offset + size), slice(start, start + size)
            offset += size
        self.split_sizes = [rows.stop - rows.start for rows, _ in self.shards.values()]
        self.weight = Weight(offset, input_size)
        self.bias = nn.Parameter(torch.empty(offset), requires_grad=False) if bias else None

    def load_weight(self, name: str, loaded: CheckpointTensor, shard: str | None) -> None:
        """Fills this rank's weight or bias: the rows of projection `shard`, or of all if they are one tensor."""
        stored = self.output_sizes if shard is None else {shard: self.output_sizes[shard]}
        start, full_shape = 0, (sum(stored.values()), self.weight.shape[1])
        for projection, size in stored.items():
            ours, theirs = self.shards[projection]
            theirs, order = slice(start + theirs.start, start + theirs.stop), self.orders.get(projection)
            if name == "bias" and self.bias is not None:
                copy_weight(self.bias[ours], loaded, full_shape[:1], theirs, order)
            else:
                self.weight.load(name, loaded, full_shape, ours, theirs, order=order)
            start += size

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.weight.linear(x, self.bias).split(self.split_sizes, dim=-1)


class RowParallelLinear(nn.Module):
    """A projection split by input features; the ranks' partial sums are added up, unless that is left to the caller."""

    def __init__(self, input_size: int, output_size: int, bias: bool, tp: TensorParallel, reduces: bool = True):
        super().__init__()
        self.tp, self.reduces = tp, reduces
        self.input_size, size = input_size, input_size // tp.size
        self.columns = slice(tp.rank * size, (tp.rank + 1) * size)
        self.weight = Weight(output_size, size)
        self.bias = nn.Parameter(torch.empty(output_size), requires_grad=False) if bias else None

    def load_weight(self, name: str, loaded: CheckpointTensor, shard: str | None) -> None:
        if name == "bias" and self.bias is not None:
            copy_weight(self.bias, loaded)
        else:
            self.weight.format.check_cut(self.input_size, self.tp.size)
            self.weight.load(name, loaded, (self.weight.shape[0], self.input_size), columns=self.columns)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias if self.tp.rank == 0 else None  # added once, not once per rank
        out = self.weight.linear(x, bias)
        return self.tp.all_reduce(out) if self.reduces else out
