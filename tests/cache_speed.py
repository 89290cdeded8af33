"""Decode steps over a KV cache in bf16 and one in int8, which take turns: `python -m tests.cache_speed DIR`.

DIR is a checkpoint, of which only config.json is read: weights and caches are random. Prints of both the median of the
seconds and of the processor's, for all threads, and what part attention is; and the medians of the pairs' ratios.
"""

import argparse
import time
from statistics import median

import numpy as np
import torch

from nanovllm import LLM
from nanovllm.engine.batch import Batch, find_slots
from nanovllm.kernels import cpu as cpu_kernels

KINDS = {"bf16": "auto", "int8": "int8"}


def make_engine(model: str, kind: str, num_seqs: int, length: int) -> LLM:
    blocks = num_seqs * -(-length // 64)
    sizes = {"max_num_seqs": num_seqs, "max_model_len": length, "num_kvcache_blocks": blocks, "kvcache_block_size": 64}
    llm = LLM(model, dtype="bfloat16", device="cpu", load_format="dummy", kv_cache_dtype=KINDS[kind], **sizes)
    for layer in llm.model_runner.attentions:
        x = torch.randn(64, layer.num_kv_heads, layer.head_dim).bfloat16()
        for block in range(blocks):
            layer.backend.store(x, x, layer.k_cache, layer.v_cache, 64 * block + torch.arange(64))
    return llm


def step_seconds(llm: LLM, batch: Batch) -> tuple[float, float]:
    start, cpu_start = time.perf_counter(), time.process_time()
    llm.model_runner.forward(batch)
    return time.perf_counter() - start, time.process_time() - cpu_start


def attention_share(llm: LLM, batch: Batch) -> float:
    """Of an eager step's seconds, as one cannot look into a recording."""
    call, spent = cpu_kernels.call, []

    def timed_call(name: str, *arguments: object) -> None:
        start = time.perf_counter()
        call(name, *arguments)
        spent.append((time.perf_counter() - start) * name.startswith("attend"))

    llm.model_runner.graphs, cpu_kernels.call = None, timed_call
    seconds, _ = step_seconds(llm, batch)
    cpu_kernels.call = call
    return sum(spent) / seconds


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="DIR")
    parser.add_argument("--num-seqs", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    num_seqs, length = args.num_seqs, args.length
    engines = {kind: make_engine(args.model, kind, num_seqs, length) for kind in KINDS}
    engines["bf16"].model_runner.enter_thread()
    tables = np.random.default_rng(0).permutation(num_seqs * -(-length // 64)).astype(np.int32).reshape(num_seqs, -1)
    positions, ids = np.full(num_seqs, length - 1), np.full(num_seqs, 5)
    slots = find_slots(tables, np.arange(num_seqs), positions, 64)
    batch = Batch(ids, positions, slots, np.full(num_seqs, length, np.int32), block_tables=tables)
    seconds = {kind: [] for kind in KINDS}
    for i in range(1 + args.rounds):  # the first is recorded
        for kind in list(KINDS)[:: 1 if i % 2 else -1]:
            seconds[kind].append(step_seconds(engines[kind], batch))
    for kind, times in seconds.items():
        wall, cpu = (1000 * median(column) for column in zip(*times[1:], strict=True))
        share = median(attention_share(engines[kind], batch) for _ in range(3))
        print(f"{kind}: {wall:.0f} ms, of the processor {cpu:.0f} ms; attention is {100 * share:.0f}%")
    pairs = list(zip(seconds["bf16"][1:], seconds["int8"][1:], strict=True))
    wall, cpu = (median(a[i] / b[i] for a, b in pairs) for i in (0, 1))
    print(f"bf16 takes {wall:.2f} times as long as int8, {cpu:.2f} of the processor's time")


if __name__ == "__main__":
    main()
