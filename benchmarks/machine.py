"""What this machine can do: the rates that the floor is made of; and how much of its memory was needed."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import psutil
import torch
import torch.nn.functional as F

from benchmarks.model_cost import weight_bits
from nanovllm.config import Config

MEASURING_SECONDS = 0.4  # for each of the two rates


def measure_rates(config: Config) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s of memory.

    Of one in fp32 on a CPU, if that is faster: where bf16 has no instructions, it is what our kernels compute with; and
    of one in int8, if activations are.
    """
    dtypes = {config.dtype}
    if config.device.type == "cpu":
        dtypes |= {torch.float32} | ({torch.int8} if weight_bits(config)[0] < 16 else set())
    return max(measure_flop_rate(dtype, config.device) for dtype in dtypes), measure_bandwidth(config.device)


@torch.inference_mode()
def measure_flop_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s (in int8 OP/s) of a large matrix product."""
    rows, outputs, inputs = (8192, 8192, 8192) if device.type == "cuda" else (2048, 3072, 1024)
    x, weight = (torch.randn(n, inputs, device=device).to(dtype) for n in (rows, outputs))
    product = F.linear if dtype.is_floating_point else lambda x, weight: torch._int_mm(x, weight.T)
    return 2 * rows * outputs * inputs / best_seconds(lambda: product(x, weight), device)


@torch.inference_mode()
def measure_bandwidth(device: torch.device) -> float:
    """Bytes/s of memory: CUDA's read and written by a copy, a CPU's read by a sum over more than its caches hold."""
    x = torch.ones(2**27, device=device)  # 512 MiB
    if device.type == "cuda":
        copy = torch.empty_like(x)
        return 2 * x.nbytes / best_seconds(lambda: copy.copy_(x), device)
    return x.nbytes / best_seconds(x.sum, device)


def best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The quickest of at least three runs of `work`, after one to warm up."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds: list[float] = []
    deadline = perf_counter() + MEASURING_SECONDS
    while len(seconds) < 4 or perf_counter() < deadline:
        start = perf_counter()
        work()
        synchronize()
        seconds.append(perf_counter() - start)
    return min(seconds[1:])


def peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA the most that PyTorch had allocated, on a CPU the most that a process had resident, of this one
    and (on Linux) those that it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    process = psutil.Process()
    if sys.platform == "win32":
        return process.memory_info().peak_wset
    if sys.platform == "linux":
        pids = [process.pid, *(child.pid for child in process.children(recursive=True))]
        statuses = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
        return 1024 * max(int(peak) for status in statuses for peak in re.findall(r"VmHWM:\s*(\d+) kB", status))
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
