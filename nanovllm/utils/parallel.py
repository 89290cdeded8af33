"""A rank's place in its tensor-parallel group, and the collectives that layers use. One rank needs no group.

A group is a c10d backend of its own, never `torch.distributed`'s default group: that one is the user's, and there is
only one in a process.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

JOIN_TIMEOUT = timedelta(seconds=2)  # of each of several tries; all ranks are up when they begin to join
WAIT_TIMEOUT = timedelta(minutes=30)  # while others load their weights; in a step the watchdog does not wait as long


@dataclass(slots=True)
class TensorParallel:
    """Shared by all layers of a rank's model. `count` is called before each collective."""

    rank: int = 0
    size: int = 1
    group: "dist.ProcessGroupGloo | dist.ProcessGroupNCCL | None" = field(default=None, repr=False)
    count: Callable[[], None] = field(default=lambda: None, repr=False)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Adds up every rank's `x`, in place."""
        if self.size > 1:
            self.count()
            self.group.allreduce([x]).wait()
        return x

    def gather_columns(self, x: torch.Tensor) -> torch.Tensor | None:
        """Concatenates every rank's [S, n] along the columns on rank 0; None on the others."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []
        options = dist.GatherOptions()
        options.rootRank = 0
        self.count()
        self.group.gather([parts] if parts else [], [x], options).wait()
        return torch.cat(parts, dim=-1) if parts else None

    def exchange(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's [n, columns], n a multiple of the ranks, concatenated along the columns; of it this rank's share
        of the rows.
        """
        parts = torch.empty_like(x)
        self.count()
        self.group.alltoall_base(parts, x, [], [], dist.AllToAllOptions()).wait()
        return parts.unflatten(0, (self.size, -1)).transpose(0, 1).flatten(1)

    def minimum(self, value: int, device: torch.device) -> int:
        """The smallest of every rank's `value`."""
        if self.size == 1:
            return value
        x = torch.tensor([value], device=device)
        self.count()
        self.group.allreduce([x], dist.ReduceOp.MIN).wait()
        return int(x)

    def abort(self) -> None:
        """Breaks off what NCCL waits for, for ever if another rank has ended; gloo notices that by itself."""
        group = self.group
        if isinstance(group, getattr(dist, "ProcessGroupNCCL", ())):
            group.abort()

    def disconnect(self) -> None:
        """Closes the group's sockets, threads and communicators; no collective is possible any more. Idempotent."""
        self.abort()
        self.group = None


def connect(rank: int, size: int, device: torch.device, rendezvous: Path) -> TensorParallel:
    """Joins a group: NCCL on CUDA, else gloo over the loopback interface. Returns once all `size` ranks have.

    `rendezvous` is a file that does not exist yet, the same for all ranks and for no other group. RuntimeError if a
    rank does not join in time.
    """
    store = dist.FileStore(str(rendezvous), size)
    if device.type == "cuda":
        group = dist.ProcessGroupNCCL(store, rank, size)
        group.eager_connect_single_device(device)
        group._set_default_timeout(WAIT_TIMEOUT)
        return TensorParallel(rank, size, group)
    store.set_timeout(JOIN_TIMEOUT)  # else a join that is given up waits minutes for a file that has been removed
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = JOIN_TIMEOUT
    group = dist.ProcessGroupGloo(store, rank, size, options)
    group._set_default_timeout(WAIT_TIMEOUT)
    return TensorParallel(rank, size, group)
