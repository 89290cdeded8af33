"""The one place that knows devices apart: which there is, which dtype suits it, what memory and cores it has left."""

import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, cycle
from pathlib import Path

import numpy as np
import psutil
import torch

from nanovllm.utils import cgroup
from nanovllm.utils.checks import require
from nanovllm.utils.topology import allowed_cpus, num_cores

GIB = 2**30
CPU_CACHE_BYTES = 4 * GIB
TORCH_THREADS = torch.get_num_threads()  # PyTorch's own choice: of the machine's cores, whatever a container limits
APPLE_FEATURES = {"hw.optional.arm.FEAT_DotProd": "asimddp", "hw.optional.arm.FEAT_BF16": "bf16"}
ALIGNMENT = 64  # bytes; Triton compiles a kernel anew for a pointer that is not a multiple of 16


def resolve_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU. ValueError for a device that is unknown or absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):  # kernels are launched on the thread's current GPU, whatever its number
        raise ValueError(f"device={name!r} is not supported; use 'auto', 'cuda' (CUDA_VISIBLE_DEVICES picks) or 'cpu'")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}, but PyTorch finds no CUDA device; use device='cpu' or 'auto'")
    return torch.device(name)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether PyTorch's bf16 products run in hardware there, rather than through fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return any(cpu_has(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def cpu_has(feature: str) -> bool:
    """Whether the processor has an instruction set, and the system lets it be used, by Linux's name for it."""
    return feature in _cpu_features()


@cache
def _cpu_features() -> frozenset[str]:
    if sys.platform == "darwin":
        listed = subprocess.run(["sysctl", "-a"], capture_output=True, text=True).stdout.splitlines()
        pairs = [(name, value.strip()) for name, _, value in (line.partition(":") for line in listed)]
        intel = {word.lower() for name, value in pairs if name.endswith("features") for word in value.split()}
        return frozenset(intel | {arm for name, arm in APPLE_FEATURES.items() if (name, "1") in pairs})
    try:
        listed = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        known = getattr(torch.cpu, "get_capabilities", dict)()  # since PyTorch 2.9
        return frozenset(name for name, is_there in known.items() if is_there is True)
    words = (line.partition(":")[2].split() for line in listed if line.startswith(("flags", "Features")))
    return frozenset(next(words, []))


class NotACudaDevice(ValueError):
    """What was asked for is only for GPUs."""


def gpu_capability(device: torch.device) -> tuple[int, int]:
    """The compute capability; ValueError if the device is no GPU, or one that attention kernels do not support."""
    if device.type != "cuda":
        raise NotACudaDevice(f"it needs a CUDA GPU, the device is {device.type!r}")
    capability = torch.cuda.get_device_capability(device)
    require(capability >= (8, 0), f"it needs compute capability 8.0, the GPU has {capability[0]}.{capability[1]}")
    return capability


def suitable_dtype(dtype: torch.dtype, device: torch.device, has_kernels: bool) -> torch.dtype:
    """What to compute a checkpoint of `dtype` in: 16 bits become fp32 or fp16 where bf16 is slow.

    With kernels of its own, which `has_kernels` says, it is fast on any CPU.
    """
    if dtype == torch.float32:
        return dtype
    if device.type == "cpu":
        return torch.bfloat16 if has_kernels or has_fast_bf16(device) else torch.float32
    return dtype if dtype == torch.float16 or has_fast_bf16(device) else torch.float16


def available_memory(device: torch.device, gpu_memory_utilization: float) -> int:
    """Bytes that the engine may still take: on CUDA of its share after all that is there now, on a CPU all there is."""
    if device.type == "cpu":
        return int(min(psutil.virtual_memory().available, cgroup.memory_left()))
    free, total = torch.cuda.mem_get_info(device)
    return int(free - (1 - gpu_memory_utilization) * total)


def is_number_of_threads_chosen() -> bool:
    return "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() != TORCH_THREADS


def default_threads(num_processes: int = 1) -> int:
    """What each of `num_processes` that work at the same time gets of PyTorch's threads, if their number was chosen.

    Else of as many as can run at once, each on a core of its own: threads spin while they wait for each other, so one
    that a container's limit holds back slows down all. OMP_NUM_THREADS is a choice for each process.
    """
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ:
        return threads
    if not is_number_of_threads_chosen():
        cores = num_cores(allowed_cpus()) or psutil.cpu_count(logical=False) or threads
        threads = math.ceil(min(threads, cores, cgroup.cpu_limit()))
    return max(1, threads // num_processes)


def default_batched_tokens(device: torch.device) -> int:
    """16,384; on a CPU 1,024, beyond which products get no faster and activations only take more memory."""
    return 1024 if device.type == "cpu" else 16384


def default_chunk_tokens(device: torch.device) -> int:
    """How many tokens of a long prompt take less time to compute than a decode step to read the weights.

    A constant, and no measurement, so that a call computes the same each time.
    """
    return 16 if device.type == "cpu" else 1024


def default_cache_bytes(device: torch.device, available: int) -> int:
    """The KV cache's share of the available memory: all of it on CUDA; on the CPU half of it, at most 4 GiB."""
    return available if device.type == "cuda" else min(CPU_CACHE_BYTES, available // 2)


def upload(
    arrays: Sequence[np.ndarray | None], device: torch.device, buffer: torch.Tensor | None = None
) -> list[torch.Tensor | None]:
    """The arrays as tensors on `device`: views of one [bytes] uint8 tensor, by default a new one, filled by one copy.

    The copy is from pinned memory, so nobody waits for it.
    """
    if device.type == "cpu" and buffer is None:
        return [None if array is None else torch.from_numpy(array) for array in arrays]
    given = [array for array in arrays if array is not None]
    starts = [0, *accumulate(-(-x.nbytes // ALIGNMENT) * ALIGNMENT for x in given)]
    num_bytes = max((start + x.nbytes for start, x in zip(starts, given, strict=False)), default=0)
    with _staging.next(num_bytes, device.type == "cuda") as host:
        for start, x in zip(starts, given, strict=False):
            np.ndarray(x.shape, x.dtype, host.numpy(), start)[...] = x
        there = torch.empty_like(host, device=device) if buffer is None else buffer[: len(host)]
        there.copy_(host, non_blocking=True)
    views = (
        there[start : start + x.nbytes].view(torch.from_numpy(x).dtype).view(x.shape)
        for start, x in zip(starts, given, strict=False)
    )
    return [None if array is None else next(views) for array in arrays]


class _Staging(threading.local):
    """A thread's memory for uploads: some buffers in turn, each used again once what was copied from it has arrived.

    Four, since a step has two uploads or three, and may begin before the last one is done.
    """

    def __init__(self):
        self._turns = {is_pinned: cycle([_Buffer() for _ in range(4)]) for is_pinned in (False, True)}

    @contextmanager
    def next(self, num_bytes: int, is_pinned: bool) -> Iterator[torch.Tensor]:
        """[num_bytes] uint8 to write, from which a copy is started in the block."""
        buffer = next(self._turns[is_pinned])
        if buffer.copied is not None:
            buffer.copied.synchronize()
        if buffer.memory is None or len(buffer.memory) < num_bytes:
            buffer.memory = torch.empty(2 * num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        yield buffer.memory[:num_bytes]
        if is_pinned:
            buffer.copied = buffer.copied or torch.cuda.Event()
            buffer.copied.record()


@dataclass
class _Buffer:
    memory: torch.Tensor | None = None
    copied: torch.cuda.Event | None = None


_staging = _Staging()


class Download:
    """Tensors of one device on their way to the host, at which whoever started it need not wait: one copy."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self._tensors, self._event = tensors, None
        if tensors[0].is_cuda:
            there = torch.cat([x.flatten().view(torch.uint8) for x in tensors])
            self._host = torch.empty(there.shape, dtype=torch.uint8, pin_memory=True).copy_(there, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def is_here(self) -> bool:
        return self._event is None or self._event.query()

    def read(self) -> list[np.ndarray]:
        """As arrays, once they are here."""
        if self._event is None:
            return [x.numpy() for x in self._tensors]
        self._event.synchronize()
        parts = self._host.split([x.nbytes for x in self._tensors])
        return [part.clone().view(x.dtype).view(x.shape).numpy() for part, x in zip(parts, self._tensors, strict=True)]
