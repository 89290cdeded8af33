"""What `figures.py --measure` measures of this machine; no figure is older than the engine that it came from.

Legend: S sequences, H/KH query/KV heads, D head_dim.
"""

import math
import pickle
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from time import perf_counter
from unittest.mock import patch

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine.batch import splitmix64
from nanovllm.engine.workers import Workers
from nanovllm.kernels.attention import choose_backend
from nanovllm.layers.attention import Attention
from nanovllm.utils.context import Context
from nanovllm.utils.parallel import TensorParallel
from nanovllm.utils.timeline import record

sys.path.insert(0, str(Path(__file__).parent.parent))
import bench
from benchmarks.machine import measure_bandwidth, measure_flop_rate

CPU, DTYPE = torch.device("cpu"), torch.bfloat16
REPEATS = 5  # of what takes milliseconds: the quickest counts, since others use the machine


def rounded(x: float) -> float:
    return float(f"{x:.3g}")


def quickest(work: Callable[[], object], repeats: int = REPEATS) -> float:
    seconds = []
    for _ in range(repeats + 1):
        start = perf_counter()
        work()
        seconds.append(perf_counter() - start)
    return min(seconds[1:])


def measure(model: str) -> dict:
    with LLM(model, device="cpu") as llm:
        return {
            "kv-cache": kv_cache(llm),
            "sampling": sampling(llm),
            "recording": {"eager": phases(model, True), "recorded": phases(model, False)},
            "attention": attention(),
            "ranks": ranks(model),
            "roofline": roofline(),
        }


def random_ids(n: int) -> list[int]:
    return [random.randrange(10, 1500) for _ in range(n)]


def kv_cache(llm: LLM) -> dict[str, list]:
    """Milliseconds for a token after n others: alone, and with all of them computed again."""
    with_cache, without = [], []
    for n in (16, 64, 256, 1024, 1984):

        def again(n: int = n) -> None:
            llm.generate([random_ids(n)], SamplingParams(max_tokens=1), use_tqdm=False)

        llm.add_request(random_ids(n), SamplingParams(max_tokens=REPEATS + 3, ignore_eos=True))
        llm.step()
        while llm.step()[1] >= 0 and not llm.is_finished():
            pass
        with_cache.append([n, rounded(1e3 * quickest(llm.step))])
        while not llm.is_finished():
            llm.step()
        without.append([n, rounded(1e3 * quickest(again))])
    return {"all tokens again": without, "KV cache": with_cache}


def sampling(llm: LLM) -> dict[str, list]:
    """The most likely first tokens of an answer in the order of their ids, and the draws that a request would make."""
    params = SamplingParams(max_tokens=1, logprobs=8, temperature=0)
    top = llm.generate(["The"], params, use_tqdm=False)[0]["logprobs"][0]["top"]
    tokens = [[text.strip() or "␣", rounded(math.exp(logprob))] for _, logprob, text in sorted(top)]
    keys, positions = torch.full((3,), 2026).numpy().astype("uint64"), torch.arange(1, 4).numpy()
    return {"tokens": tokens, "uniforms": splitmix64(keys, positions).tolist(), "temperatures": [0.5, 1.0, 2.0]}


def phases(model: str, enforce_eager: bool) -> dict[str, float]:
    """Milliseconds of each phase of a decode step of one request."""
    with LLM(model, device="cpu", enforce_eager=enforce_eager) as llm:
        llm.add_request(random_ids(32), SamplingParams(max_tokens=400, ignore_eos=True))
        for _ in range(20):
            llm.step()
        with record(CPU) as timeline:
            while not llm.is_finished():
                llm.step()
    seconds = defaultdict(list)
    for phase, start, end in timeline.rows()["host"]:
        seconds[phase].append(end - start)
    return {phase: rounded(1e3 * sorted(times)[len(times) // 2]) for phase, times in seconds.items()}


def attention() -> dict[str, list]:
    """Milliseconds for 8 sequences of n tokens, with the heads of Qwen3-0.6B, beside the reading of keys and values."""
    num_seqs, layer, block_size = 8, Attention(16, 8, 128), 64
    backend = choose_backend("cpu", CPU, DTYPE, layer, block_size)
    lengths, measured, floor, bandwidth = (256, 1024, 4096, 16384), [], [], 0.0
    for n in lengths:
        num_blocks = num_seqs * n // block_size
        caches = [torch.randn(backend.cache_shape(num_blocks, block_size, 8, 128), dtype=DTYPE) for _ in "kv"]
        tables = torch.randperm(num_blocks, dtype=torch.int32).view(num_seqs, -1)
        context = Context(None, None, 1, n, torch.full((num_seqs,), n, dtype=torch.int32), tables)
        q = torch.randn(num_seqs, 16, 128, dtype=DTYPE)
        seconds = quickest(partial(backend.decode, q, *caches, context), 20)
        measured.append([n, rounded(1e3 * seconds)])
        floor.append([n, 2 * caches[0].nbytes])
        bandwidth = max(bandwidth, measure_bandwidth(CPU))  # others use the machine, now more, now less
    floor = [[n, rounded(1e3 * num_bytes / bandwidth)] for n, num_bytes in floor]
    return {"C++ kernel": measured, "floor: reading K and V": floor}


def ranks(model: str) -> list[tuple[str, int, int]]:
    """What two ranks say to each other in a decode step of 4 requests, as rank 0 does it: what, bytes, times."""
    calls, is_on = [], False

    @contextmanager
    def watching(owner: type, name: str, size_of: Callable[..., int]) -> Iterator[None]:
        original = getattr(owner, name)

        def watched(self: object, *args: object) -> object:
            if is_on:
                calls.append((name.removesuffix("_columns").replace("exchange", "all_to_all"), size_of(*args)))
            return original(self, *args)

        with patch.object(owner, name, watched):
            yield

    with (
        watching(TensorParallel, "all_reduce", lambda x: x.nbytes),
        watching(TensorParallel, "exchange", lambda x: x.nbytes),
        watching(TensorParallel, "gather_columns", lambda x: x.nbytes),
        watching(Workers, "publish", lambda *message: len(pickle.dumps(message, protocol=5))),
        LLM(model, device="cpu", tensor_parallel_size=2) as llm,
    ):
        for _ in range(4):
            llm.add_request(random_ids(20), SamplingParams(max_tokens=9, ignore_eos=True))
        for step in range(6):
            is_on = step == 5
            llm.step()
        is_on = False
    return [(*call, len(list(group))) for call, group in groupby(calls)]


def roofline() -> dict[str, list]:
    """Decode steps of a model in the shape of Qwen3-0.6B, whose requests have about 128 tokens each."""
    measured, floor, rates, sizes = [], [], [0.0, 0.0], (1, 4, 16, 64, 128)
    with bench.model_directory(None) as path, LLM(path, load_format="dummy", max_num_seqs=128) as llm:
        cost = bench.ModelCost(llm.config.hf_config, DTYPE.itemsize)
        for n in sizes:
            found = measure_flop_rate(DTYPE, CPU), measure_bandwidth(CPU)
            rates = list(map(max, rates, found))  # others use the machine, now more, now less
            for _ in range(n):
                llm.add_request(random_ids(120), SamplingParams(max_tokens=12, ignore_eos=True))
            while llm.step()[1] >= 0:
                pass
            measured.append([n, rounded(n / quickest(llm.step, 6))])
            while not llm.is_finished():
                llm.step()
        for n in sizes:
            workload = bench.Workload([random_ids(127)] * n, [2] * n)  # of which one is a decode step
            floor.append([n, rounded(n / bench.floor_seconds(workload, cost, *rates, n)[1])])
    return {"nanovllm": measured, "floor": floor}
