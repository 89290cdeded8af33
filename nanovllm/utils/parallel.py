"""A rank's place in its tensor-parallel group, and the collectives that layers use. One rank needs no group."""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class TensorParallel:
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def divide(self, total: int, what: str) -> int:
        """A rank's share of `total`.

        Raises:
            ValueError: `total` does not divide by the group's size.
        """
        if total % self.size:
            sizes = [size for size in range(1, 9) if total % size == 0]
            raise ValueError(f"tensor_parallel_size={self.size} does not divide {what}={total}; use one of {sizes}")
        return total // self.size

    def replicas(self, total: int, what: str) -> int:
        """How many ranks must share each of `total` things so that every rank has one.

        Raises:
            ValueError: The ranks cannot share them evenly.
        """
        if self.size % total and total % self.size:
            sizes = [size for size in range(1, 9) if total % size == 0 or size % total == 0]
            raise ValueError(f"tensor_parallel_size={self.size} does not fit {what}={total}; use one of {sizes}")
        return max(1, self.size // total)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def gather_columns(self, x: torch.Tensor) -> torch.Tensor | None:
        """Concatenates every rank's [S, n] along the columns on rank 0; None on the others."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x, parts, group=self.group, group_dst=0)
        return torch.cat(parts, dim=-1) if parts else None
