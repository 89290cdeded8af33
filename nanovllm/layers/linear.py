"""Linear layers split over tensor-parallel ranks, each of which reads only its own slice of a checkpoint tensor.

Column parallel: outputs are split, no communication. Row parallel: inputs are split, one all-reduce
(Megatron-LM, Shoeybi et al., 2019, arXiv:1909.08053).
"""

import torch
from torch import nn

from nanovllm.layers.weight import linear
from nanovllm.utils.loader import CheckpointTensor, copy_weight
from nanovllm.utils.parallel import TensorParallel


class ColumnParallelLinear(nn.Module):
    """Several projections of one input, by their names in the checkpoint, as a single GEMM split by output features.

    `num_replicas` says how many neighbouring ranks hold the same slice of a projection, by default one.
    """

    def __init__(
        self, input_size: int, output_sizes: dict[str, int], bias: bool, tp: TensorParallel,
        num_replicas: dict[str, int] | None = None
    ):  # fmt: skip
        super().__init__()
        self.output_sizes = output_sizes
        self.shards: dict[str, tuple[slice, slice]] = {}  # name -> rows of this parameter, rows in the checkpoint
        offset = 0
        for name, total in output_sizes.items():
            replicas = (num_replicas or {}).get(name, 1)
            size = total * replicas // tp.size
            start = tp.rank // replicas * size
            self.shards[name] = slice(offset, offset + size), slice(start, start + size)
            offset += size
        self.split_sizes = [rows.stop - rows.start for rows, _ in self.shards.values()]
        self.weight = nn.Parameter(torch.empty(offset, input_size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(offset), requires_grad=False) if bias else None

    def load_weight(self, name: str, loaded: CheckpointTensor, shard: str) -> None:
        """Fills the rows of projection `shard` of this rank's `weight` or `bias`."""
        ours, theirs = self.shards[shard]
        param = getattr(self, name)
        copy_weight(param[ours], loaded, (self.output_sizes[shard], *param.shape[1:]), theirs)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return linear(x, self.weight, self.bias).split(self.split_sizes, dim=-1)


class RowParallelLinear(nn.Module):
    """A projection split by input features; the ranks' partial sums are added up."""

    def __init__(self, input_size: int, output_size: int, bias: bool, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.input_size = input_size
        size = input_size // tp.size
        self.columns = slice(tp.rank * size, (tp.rank + 1) * size)
        self.weight = nn.Parameter(torch.empty(output_size, size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(output_size), requires_grad=False) if bias else None

    def load_weight(self, name: str, loaded: CheckpointTensor, shard: str | None) -> None:
        if name == "bias":
            copy_weight(self.bias, loaded)
        else:
            shape = (self.weight.shape[0], self.input_size)
            copy_weight(self.weight, loaded, shape, (slice(None), self.columns))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias if self.tp.rank == 0 else None  # added once, not once per rank
        return self.tp.all_reduce(linear(x, self.weight, bias))
