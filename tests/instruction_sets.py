"""How fast the products of Qwen3-0.6B's layers are on each instruction set that this processor has, by one thread.

Run as `python -m tests.instruction_sets`. The sets take turns, in bf16 and int8, and of each the best round counts, in
the thread's own seconds: so other programs disturb them less, and all alike.
"""

import os
import time

import torch

from nanovllm.kernels import cpu as cpu_kernels
from nanovllm.kernels.cpu.targets import TARGETS, VARIABLE

SHAPES = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)]  # outputs, inputs
LAYERS, ROUNDS = 14, 6  # of so many layers no cache holds the weights
ROWS = 1, 32, 256


def use(name: str) -> None:
    os.environ[VARIABLE] = name
    cpu_kernels.load_kernels.cache_clear()
    cpu_kernels.set_num_threads(1)


def measure(weights: list, rows: int) -> float:
    """Seconds for all of the products."""
    inputs = {k: torch.randn(rows, k).bfloat16() for _, k in SHAPES}
    start = time.thread_time()
    for weight in weights:
        weight.linear(inputs[weight.shape[1]])
    return time.thread_time() - start


def main() -> None:
    names = [target.name for target in TARGETS if target.is_supported()]
    weights, best = {}, {}
    for name in names:
        use(name)
        for kind in (cpu_kernels.PackedWeight, cpu_kernels.Int8Weight):
            layers = range(LAYERS if kind is cpu_kernels.Int8Weight or name == names[0] else 0)
            made = [kind(torch.randn(shape).bfloat16()) for _ in layers for shape in SHAPES]
            weights[name, kind.kind] = made or weights[names[0], "bf16"]  # packed alike for all
    for rows in ROWS:
        for _ in range(ROUNDS):
            for name in names:
                use(name)
                for kind in ("bf16", "int8"):
                    seconds = measure(weights[name, kind], rows)
                    best[name, kind, rows] = min(seconds, best.get((name, kind, rows), seconds))
    size = LAYERS * sum(n * k for n, k in SHAPES)
    for name in names:
        for kind, width in (("bf16", 2), ("int8", 1)):
            rates = [f"{width * size / best[name, kind, 1] / 1e9:.1f} GB/s at 1 row"]
            rates += [
                f"{2 * rows * size / best[name, kind, rows] / 1e9:.0f} GFLOP/s at {rows} rows" for rows in ROWS[1:]
            ]
            print(f"{name:12} {kind}: {', '.join(rates)}")


if __name__ == "__main__":
    main()
