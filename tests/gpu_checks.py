"""Everything that only a GPU can show, in one table: each open check of docs/gpu-checks.md.

    python -m tests.gpu_checks                          # all, in under 9 minutes on one H200
    python -m tests.gpu_checks --groups attention memory
    python -m tests.gpu_checks --json gpu.json          # the table's rows also as JSON

From the repository's root. Checks run in groups, each a process of its own with a time limit, so that neither an
exception nor a CUDA error that poisons its process ends the others. Exit code 0: none failed; 1: some did; 2: there is
no GPU. A check is a generator of (what, expected, seen, whether it passed; None for a figure without a target).

Legend: S sequences, H/KH query/KV heads, D head_dim, L tokens of one sequence.
"""

import argparse
import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # before what is found there is imported
# ruff: noqa: E402

import torch

import bench
from benchmarks.machine import measure_bandwidth, measure_flop_rate
from benchmarks.workload import CLASSIC
from helpers import DEMO_MODEL, random_prompts, reference_tokens, save_model
from nanovllm import LLM, SamplingParams
from nanovllm.kernels.attention import BACKENDS, choose_backend
from nanovllm.layers.attention import Attention
from nanovllm.utils.context import Context

Seen = tuple[str, str, str, bool | None]
TOTAL_SECONDS = 535
CUDA = torch.device("cuda")
H, KH, D, LAYERS = 16, 8, 128, 28  # Qwen3-0.6B's


class Skip(Exception):
    """A check that cannot run here, and why."""


# ---- helpers


def working_backends(dtype: torch.dtype, block_size: int = 256, names: tuple[str, ...] = tuple(BACKENDS)) -> dict:
    """Those that can run here, by name."""
    found = {}
    for name in names:
        try:
            found[name] = choose_backend(name, CUDA, dtype, Attention(H, KH, D), block_size)
        except ValueError as error:
            print(f"{name}: {error}", file=sys.stderr)
    return found


def measure(work: Callable[[], object]) -> float:
    """Seconds of one run, the best of several, timed by the device over ten runs each."""
    times = []
    for _ in range(6):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(10):
            work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 10_000)
    return min(times[1:])


def make_cache(backend: object, lens: list[int], dtype: torch.dtype, block_size: int = 256) -> tuple:
    """Keys and values in shuffled blocks, and the context of a decode step over them."""
    num_blocks = [-(-n // block_size) for n in lens]
    shape = backend.cache_shape(sum(num_blocks), block_size, KH, D)
    caches = [torch.randn(shape, dtype=dtype, device=CUDA) for _ in range(2)]
    ids = torch.randperm(sum(num_blocks)).int().split(num_blocks)
    tables = torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True).to(CUDA)
    return caches, Context(context_lens=torch.tensor(lens).int().to(CUDA), block_tables=tables, max_seqlen_k=max(lens))


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[Tq, H, D] over [L, KH, D] in fp32, causal and aligned at the end."""
    k, v = (x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(k.shape[0] - q.shape[0] + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def make_llm(**settings) -> LLM:
    """Dummy weights in the shape of Qwen3-0.6B."""
    with bench.model_directory(None) as path:
        return LLM(path, load_format="dummy", device=CUDA, **settings)


def used_share() -> float:
    free, total = torch.cuda.mem_get_info()
    return 1 - free / total


def run_python(*args: str, timeout: float, **env: str) -> str:
    """What a Python process writes to standard output; a failure raises with the end of what it said."""
    settings = {"cwd": ROOT, "env": os.environ | env, "capture_output": True, "text": True, "timeout": timeout}
    done = subprocess.run([sys.executable, *args], **settings)
    print(done.stderr[-3000:], file=sys.stderr)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
    return done.stdout


# ---- checks


def native_tests(*files: str) -> Iterator[Seen]:
    """The kernels' own tests, which compute on a GPU where there is one; what they compile for others needs none."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    for file in files:
        if not (ROOT / file).is_file():
            yield file, "all pass", "there is no such file", False
            continue
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", file]
        command += ["-o", "addopts=--import-mode=importlib"]  # pytest-xdist need not be there
        command += ["-k", "not architecture and not ahead_of_time"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        summary = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]
        print(done.stdout[-4000:], file=sys.stderr)
        yield file, "all pass", summary, done.returncode == 0


@torch.inference_mode()
def attention_accuracy() -> Iterator[Seen]:
    """Prefill and decode of every backend against fp32; few queries over long prefixes, too: FA2 may split those."""
    lens = [1, 7, 255, 256, 257, 700, 1024]
    for dtype, bound in ((torch.bfloat16, 2e-2), (torch.float16, 4e-3), (torch.float32, 1e-4)):
        for name, backend in working_backends(dtype).items():
            torch.manual_seed(0)
            caches, context = make_cache(backend, lens, dtype)
            keys, values, queries = (
                [torch.randn(n, h, D, dtype=dtype, device=CUDA) for n in lens] for h in (KH, KH, H)
            )
            slots = [
                (row[: -(-n // 256), None].long() * 256 + torch.arange(256, device=CUDA)).flatten()[:n]
                for row, n in zip(context.block_tables, lens, strict=True)
            ]
            backend.store(torch.cat(keys), torch.cat(values), *caches, torch.cat(slots))
            worst = 0.0
            for prefix in (0, 256, -3):
                starts = [n + prefix if prefix < 0 else prefix for n in lens]
                new = [slice(start if 0 < start < n else 0, n) for start, n in zip(starts, lens, strict=True)]
                lens_q = [0] + [s.stop - s.start for s in new]
                bounds = [torch.tensor(x).cumsum(0).int().to(CUDA) for x in (lens_q, [0, *lens])]
                tables = context.block_tables if prefix else None
                cut = [torch.cat([x[s] for x, s in zip(part, new, strict=True)]) for part in (queries, keys, values)]
                lens_k = context.context_lens
                prefill = Context(*bounds, max(lens_q), max(lens), lens_k, tables)
                out = backend.prefill(*cut, *caches, prefill)
                truth = torch.cat(
                    [reference(q[s], k, v) for q, k, v, s in zip(queries, keys, values, new, strict=True)]
                )
                worst = max(worst, (out.float() - truth).abs().max().item())
            last = torch.stack([q[-1] for q in queries])
            out = backend.decode(last, *caches, context)
            truth = torch.cat([reference(q[-1:], k, v) for q, k, v in zip(queries, keys, values, strict=True)])
            worst = max(worst, (out.float() - truth).abs().max().item())
            yield f"attention {name} {dtype}: largest error", f"<= {bound}", f"{worst:.1e}", worst <= bound
            for cache in caches:
                cache.fill_(torch.nan)
            backend.store(torch.cat(keys), torch.cat(values), *caches, torch.cat(slots))
            seen = "finite" if backend.decode(last, *caches, context).isfinite().all() else "NaN"
            yield f"attention {name} {dtype}: decode where NaN follows the keys", "a figure", seen, None


def ceilings() -> Iterator[Seen]:
    rate = measure_flop_rate(torch.bfloat16, CUDA)
    yield "bf16 matrix product", "a figure", f"{rate / 1e12:.0f} TFLOP/s", None
    yield "memory copy", "a figure", f"{measure_bandwidth(CUDA) / 1e12:.2f} TB/s", None


@torch.inference_mode()
def decode_bandwidth() -> Iterator[Seen]:
    """256 sequences of 1k tokens: bytes of keys and values a second, of the rate of a copy."""
    copy = measure_bandwidth(CUDA)
    for name, backend in working_backends(torch.bfloat16).items():
        caches, context = make_cache(backend, [1024] * 256, torch.bfloat16)
        q = torch.randn(256, H, D, dtype=torch.bfloat16, device=CUDA)
        rate = 2 * caches[0].nbytes / measure(partial(backend.decode, q, *caches, context))
        passed = rate >= 0.8 * copy if name != "cpu" else None
        yield f"decode attention {name}, 256 x 1k", ">= 80% of a copy", f"{100 * rate / copy:.0f}%", passed


@torch.inference_mode()
def prefill_rate() -> Iterator[Seen]:
    """16 prompts of 1k tokens in one step: the model's arithmetic a second, of the rate of a matrix product."""
    flop_rate = measure_flop_rate(torch.bfloat16, CUDA)
    for name in working_backends(torch.bfloat16):
        if name == "cpu":
            continue
        llm = make_llm(attention_backend=name, enforce_eager=True)
        prompts = random_prompts([1024] * 64, vocab_size=10_000)
        seconds = []
        for i in range(4):  # of which none shares a prefix with another
            start = time.perf_counter()
            llm.generate(prompts[16 * i : 16 * i + 16], SamplingParams(0, max_tokens=1), use_tqdm=False)
            seconds.append(time.perf_counter() - start)
        workload = bench.Workload(prompts[:16], [1] * 16)
        floor, _ = bench.floor_seconds(workload, bench.ModelCost(llm.config.hf_config, 2), flop_rate, 1e15, 512)
        share = floor / min(seconds[1:])
        rate = 16384 / min(seconds[1:])
        yield f"prefill {name}, 16 x 1k", ">= 50% of a product", f"{100 * share:.0f}%, {rate:.0f} tok/s", share >= 0.5
        llm.exit()
        del llm
        gc.collect()


def parity() -> Iterator[Seen]:
    """fp32 greedy tokens against transformers', through graphs, with prefixes cached the second time."""
    from transformers import AutoModelForCausalLM

    torch.backends.cuda.matmul.allow_tf32 = False
    shapes = {"gqa2": {}, "gqa8": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 128}}
    with tempfile.TemporaryDirectory() as directory:
        for shape, overrides in {**shapes, "nano-qwen3": None}.items():
            path = DEMO_MODEL if overrides is None else Path(directory, shape)
            if overrides is None:
                model = AutoModelForCausalLM.from_pretrained(path).float().eval()
            else:
                model = save_model(path, **overrides)
            prompts = random_prompts([1, 5, 31, 32, 33, 70], vocab_size=min(300, model.config.vocab_size))
            expected = [reference_tokens(model, prompt, 24) for prompt in prompts]
            for name in working_backends(torch.float32, 32):
                params = SamplingParams(0, max_tokens=24)
                with LLM(str(path), dtype="float32", device=CUDA, attention_backend=name, kvcache_block_size=32,
                         num_kvcache_blocks=100, max_num_seqs=8) as llm:  # fmt: skip
                    runs = [llm.generate(prompts, params, use_tqdm=False) for _ in range(2)]
                same = sum([o["token_ids"] for o in run] == expected for run in runs)
                yield f"greedy fp32 {shape} {name}", "2 of 2 runs equal", f"{same} of 2", same == 2


def graphs_equal_eager() -> Iterator[Seen]:
    """Greedy bf16 tokens of a batch that shrinks, and of one larger than the largest graph."""
    prompts = random_prompts([3, 40, 300, 17, 90, 256, 255, 1000] * 3)
    params = [SamplingParams(0, max_tokens=8 + 3 * i, ignore_eos=True) for i in range(len(prompts))]
    for name in working_backends(torch.bfloat16):
        if name == "cpu":
            continue
        tokens = []
        for eager in (True, False):
            with LLM(str(DEMO_MODEL), dtype="float16", device=CUDA, attention_backend=name, enforce_eager=eager,
                     num_kvcache_blocks=200, max_num_seqs=24) as llm:  # fmt: skip
                vocab_size = llm.config.hf_config.vocab_size
                cut = [[t % vocab_size for t in prompt[: llm.config.max_model_len - 100]] for prompt in prompts]
                tokens.append([o["token_ids"] for o in llm.generate(cut, params, use_tqdm=False)])
        same = sum(a == b for a, b in zip(*tokens, strict=True))
        # Kernels may split their work by the number of rows, so that near ties fall otherwise.
        yield (
            f"graphs equal eager, {name}",
            ">= 90% of sequences",
            f"{same} of {len(prompts)}",
            same >= 0.9 * len(prompts),
        )


def steps_ahead() -> Iterator[Seen]:
    """256 sequences with steps that begin before the last one's tokens are read, and with steps that wait for them."""
    prompts = random_prompts([50 + i for i in range(256)], vocab_size=100_000)
    params = [SamplingParams(i % 2, max_tokens=100 + i % 7, ignore_eos=True, seed=i) for i in range(256)]
    tokens, seconds = {}, {}
    with make_llm(max_num_seqs=256) as llm:
        for leads in (True, False, True, False):  # the first two warm up
            llm.model_runner.may_lead = leads
            llm.generate([[1, 2]], SamplingParams(max_tokens=1), use_tqdm=False)
            before = llm.stats()["decode_seconds"]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds[leads] = llm.stats()["decode_seconds"] - before
            tokens[leads] = [output["token_ids"] for output in outputs]
    same = sum(a == b for a, b in zip(tokens[True], tokens[False], strict=True))
    yield "steps begun before the last tokens are read", "256 equal", f"{same} equal", same == 256
    ratio = seconds[True] / seconds[False]
    yield "their decode time, of that of steps that wait", "< 1", f"{ratio:.3f} times", ratio < 1


def batch_invariance() -> Iterator[Seen]:
    """Of a few requests alone, beside others, from the prefix cache, in chunks, eager, in small blocks; its cost."""
    prompts = random_prompts([3, 700, 290, 1500], vocab_size=100_000)
    params = [SamplingParams(i % 2, max_tokens=50, ignore_eos=True, seed=i, logprobs=0) for i in range(len(prompts))]
    others = random_prompts([50 + 3 * i for i in range(120)], seed=1, vocab_size=100_000)
    params_of_all = params + [SamplingParams(0, max_tokens=100, ignore_eos=True)] * len(others)

    def run(llm: LLM) -> tuple[list, float]:
        began = time.perf_counter()
        outputs = llm.generate(prompts + others, params_of_all, use_tqdm=False)
        seconds = time.perf_counter() - began
        return [(o.token_ids, o.logprobs) for o in outputs[: len(prompts)]], seconds

    with make_llm(max_num_seqs=128) as llm:
        default_seconds = run(llm)[1]
    with make_llm(max_num_seqs=128, batch_invariant=True) as llm:
        alone = [llm.generate([p], param, use_tqdm=False)[0] for p, param in zip(prompts, params, strict=True)]
        seen = {"beside others, from the cache": run(llm)}
    cut = {"enforce_eager": True, "max_num_batched_tokens": 500, "kvcache_block_size": 16}
    with make_llm(max_num_seqs=128, batch_invariant=True, **cut) as llm:
        seen["eager, in chunks and small blocks"] = run(llm)
    expected = [(o.token_ids, o.logprobs) for o in alone]
    for name, (results, _) in seen.items():
        same = sum(a == b for a, b in zip(results, expected, strict=True))
        yield f"batch_invariant, {name}", "equal to each alone", f"{same} of {len(prompts)}", same == len(prompts)
    ratio = seen["beside others, from the cache"][1] / default_seconds
    yield "batch_invariant, seconds against the default", "", f"{ratio:.2f} times", None


def recompilations() -> Iterator[Seen]:
    """Kernels that Triton builds after start-up: ragged batches, cached prefixes, options; with graphs and without."""
    if importlib.util.find_spec("triton") is None:
        raise Skip("triton is not installed")
    import triton

    if not hasattr(triton, "knobs"):
        raise Skip(f"triton {triton.__version__} has no hook to count with")
    built = []
    triton.knobs.runtime.jit_post_compile_hook = lambda *args, **kwargs: built.append(kwargs.get("repr", "?"))
    for name in working_backends(torch.bfloat16):
        if name == "cpu":
            continue
        for is_eager in (False, True) if name == "triton" else (False,):
            with make_llm(max_num_seqs=64, attention_backend=name, enforce_eager=is_eager) as llm:
                num_warm = len(built)
                for seed, lens in enumerate(([1], [7, 300, 256], [33] * 40, [1000, 1, 511, 16, 15], [64] * 64)):
                    prompts = random_prompts(lens, seed, 10_000)
                    for options in ({"temperature": 0.0}, {"temperature": 0.7}, {"top_p": 0.9, "logprobs": 1}):
                        params = SamplingParams(max_tokens=6, ignore_eos=True, **options)  # then with cached prefixes
                        llm.generate(prompts, params, use_tqdm=False)
            count = len(built) - num_warm
            what = f"kernels built after start-up, {name}{', eager' * is_eager}"
            yield what, "0", f"{count} (before: {num_warm})", count == 0
            for kernel in built[num_warm:]:
                print("built late:", kernel, file=sys.stderr)
            gc.collect()


@torch.inference_mode()
def large_cache() -> Iterator[Seen]:
    """A cache of more than 2**31 elements: tokens at its end are stored, and read by prefill and decode."""
    num_blocks = 2**31 // (256 * KH * D) + 8
    q, k, v = (torch.randn(300, h, D, dtype=torch.bfloat16, device=CUDA) for h in (H, KH, KH))
    truth = reference(q, k, v)
    bounds, lens = (torch.tensor(x, dtype=torch.int32, device=CUDA) for x in ([0, 300], [300]))
    tables = torch.tensor([[num_blocks - 1, num_blocks - 2]], dtype=torch.int32, device=CUDA)
    slots = (tables.long().flatten()[:, None] * 256 + torch.arange(256, device=CUDA)).flatten()[:300]
    for name, backend in working_backends(torch.bfloat16).items():
        shape = backend.cache_shape(num_blocks, 256, KH, D)
        caches = [torch.zeros(shape, dtype=torch.bfloat16, device=CUDA) for _ in range(2)]
        backend.store(k, v, *caches, slots)
        prefill = Context(bounds, bounds, 300, 300, lens, tables)
        decode = Context(context_lens=lens, block_tables=tables, max_seqlen_k=300)
        error = (backend.prefill(q, k, v, *caches, prefill).float() - truth).abs().max()
        error = max(error, (backend.decode(q[-1:], *caches, decode).float() - truth[-1:]).abs().max()).item()
        yield f"attention {name}, over 2**31 elements in the cache", "<= 2e-2", f"{error:.1e}", error <= 2e-2
        del caches


def memory() -> Iterator[Seen]:
    """The share in use, the estimate for graphs, the error, and that engines in a row give it back."""
    torch.zeros(1, device=CUDA)
    base = used_share()
    shares, freed = [], []
    for _ in range(3):
        llm = make_llm()
        llm.generate(random_prompts([1024] * 32, vocab_size=10_000), SamplingParams(max_tokens=2), use_tqdm=False)
        shares.append(used_share())
        llm.exit()
        del llm
        gc.collect()
        freed.append(used_share())
    text = ", ".join(f"{100 * x:.1f}%" for x in shares)
    yield "memory in use with an engine", "86% to 91%", text, all(0.86 <= x <= 0.91 for x in shares)
    left = max(freed) - base
    yield "kept after three engines", "<= 1%", f"{100 * left:.2f}%", left <= 0.01
    try:
        make_llm(gpu_memory_utilization=0.01)
        yield "too little memory", "a ValueError with a remedy", "no error", False
    except ValueError as error:
        is_helpful = re.search(r"GiB more than .*lower num_kvcache_blocks.*raise gpu_memory_utilization", str(error))
        yield "too little memory", "a ValueError with a remedy", str(error)[:90], bool(is_helpful)


def largest_step() -> Iterator[Seen]:
    """The worst steps that are allowed run in what was reserved for them."""
    with make_llm(gpu_memory_utilization=0.98) as llm:
        prompts = random_prompts([120] * 512, vocab_size=10_000)
        for params in (SamplingParams(0.7, max_tokens=3, logprobs=5), SamplingParams(0.7, max_tokens=3, top_p=0.9)):
            llm.generate(prompts, params, use_tqdm=False)
        share = used_share()
    yield "512 sequences with options at 98%", "no error", f"{100 * share:.1f}% in use", True


FALLBACK = """
import json, logging, sys
logging.basicConfig(level=logging.INFO, format="log: %(message)s", stream=sys.stdout)
import torch
if sys.argv[1] == "old":
    torch.cuda.get_device_capability = lambda device=None: (7, 5)
from nanovllm import LLM, SamplingParams
with LLM(sys.argv[2], dtype="float32", device="cuda", num_kvcache_blocks=20) as llm:
    params = SamplingParams(0, max_tokens=16, ignore_eos=True)
    outputs = llm.generate([[1, 2, 3], list(range(300))], params, use_tqdm=False)
print(json.dumps([output["token_ids"] for output in outputs]))
"""


def fallback() -> Iterator[Seen]:
    """Without a C compiler, and on a GPU that says it is old: plain PyTorch in place of all Triton kernels."""
    environments = {"triton": {}, "no C compiler": {"CC": "/nonexistent/cc"}, "old": {}}
    expected = None
    for name, env in environments.items():
        with tempfile.TemporaryDirectory() as cache:  # where no launcher is compiled yet
            out = run_python("-c", FALLBACK, name, str(DEMO_MODEL), timeout=60, TRITON_CACHE_DIR=cache, **env)
        *log, tokens = out.strip().splitlines()
        expected = expected or tokens
        num_reasons = sum(line.startswith("log: no Triton kernels") for line in log)
        is_equal = tokens == expected
        yield f"{name}: fp32 tokens", "those with Triton", "equal" if is_equal else "differ", is_equal
        wanted = int(name != "triton")
        yield f"{name}: lines that say why no Triton", str(wanted), str(num_reasons), num_reasons == wanted


START_UP = """
import time
start = time.perf_counter()
import sys, logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
import bench
from nanovllm import LLM, SamplingParams
imported = time.perf_counter()
with bench.model_directory(None) as path:
    llm = LLM(path, load_format="dummy", device="cuda", enforce_eager=sys.argv[1] == "eager")
llm.generate([[1] * 16], SamplingParams(max_tokens=4), use_tqdm=False)
print(imported - start, time.perf_counter() - imported)
"""


def start_up() -> Iterator[Seen]:
    """Fresh processes. Those with graphs first: the kernels they compile are then on disk for those without."""
    for mode, limit in (("graphs", 20), ("graphs", 20), ("eager", 8)):
        imports, seconds = map(float, run_python("-c", START_UP, mode, timeout=90).split())
        what = f"ready with {mode}" if mode == "graphs" else "ready in eager mode"
        yield what, f"< {limit} s", f"{seconds:.1f} s (and {imports:.1f} s of imports)", seconds < limit


def classic_bench() -> Iterator[Seen]:
    figures = json.loads(run_python("bench.py", "--json", timeout=200))
    seen = f"{figures['percent_of_floor']:.0f}%, {figures['output_tokens_per_s']:.0f} tok/s"
    yield "classic bench", ">= 40% of the floor", seen, figures["percent_of_floor"] >= 40
    for phase in ("prefill", "decode"):
        floor = f"floor {figures[f'{phase}_floor_seconds']:.2f} s"
        yield f"classic bench, {phase}", "a figure", f"{figures[f'{phase}_seconds']:.2f} s, {floor}", None


def continuous_batching() -> Iterator[Seen]:
    """transformers' `generate_batch` on a quarter of the classic prompts, every output 200 tokens, and nanovllm's."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    prompts = bench.make_workload(CLASSIC).prompts[:64]
    num_tokens = 200
    with make_llm() as llm:
        params = SamplingParams(0, max_tokens=num_tokens, ignore_eos=True)
        llm.generate(prompts[:2], SamplingParams(0, max_tokens=4), use_tqdm=False)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        ours = 64 * num_tokens / (time.perf_counter() - start)
    gc.collect()
    yield "nanovllm, 64 prompts x 200 tokens", "a figure", f"{ours:.0f} tok/s", None
    with bench.model_directory(None) as path:
        config = AutoConfig.from_pretrained(path)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").to(CUDA).eval()
    if not hasattr(model, "generate_batch"):
        raise Skip("this version of transformers has no generate_batch")
    settings = GenerationConfig(do_sample=False, max_new_tokens=num_tokens, eos_token_id=-1, pad_token_id=0)
    for timed in (prompts[:2], prompts):
        start = time.perf_counter()
        outputs = model.generate_batch(inputs=timed, generation_config=settings)
        seconds = time.perf_counter() - start
    made = sum(len(output.generated_tokens) for output in outputs.values())
    theirs = made / seconds
    seen = f"{theirs:.0f} tok/s ({made} tokens), nanovllm {ours / theirs:.1f} times"
    yield "transformers' continuous batching, the same", "a ratio", seen, None if made == 64 * num_tokens else False


def tensor_parallel() -> Iterator[Seen]:
    """Two ranks on NCCL, with graphs, give one rank's tokens."""
    if torch.cuda.device_count() < 2:
        raise Skip("this machine has one GPU")
    prompts, params = random_prompts([5, 300, 64]), SamplingParams(0, max_tokens=24, ignore_eos=True)
    with tempfile.TemporaryDirectory() as path:
        save_model(Path(path))
        tokens = []
        for size in (1, 2):
            with LLM(path, dtype="float32", device="cuda", tensor_parallel_size=size, num_kvcache_blocks=50) as llm:
                tokens.append([o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)])
    yield (
        "tensor parallel over two GPUs",
        "equal tokens",
        "equal" if tokens[0] == tokens[1] else "differ",
        (tokens[0] == tokens[1]),
    )


TRITON_TESTS = [f"tests/layers/test_{name}.py" for name in ("attention_triton", "copy_blocks", "invariant_triton")]
FUSED_TESTS = [
    f"tests/layers/test_{name}.py"
    for name in ("fused", "experts", "triton_quantized", "sampler", "logits_processor", "fallback")
]
GROUPS: dict[str, tuple[int, list[Callable[[], Iterator[Seen]]]]] = {  # seconds, checks of one process, in this order
    "attention": (60, [ceilings, attention_accuracy, large_cache, decode_bandwidth]),
    "graphs": (60, [graphs_equal_eager, steps_ahead]),
    "invariance": (90, [batch_invariance]),
    "parity": (60, [parity]),
    "fallback": (75, [fallback]),
    "bench": (120, [classic_bench]),
    "start-up": (90, [start_up]),
    "prefill": (60, [prefill_rate]),
    "memory": (60, [memory]),
    "largest": (45, [largest_step]),
    "recompilation": (75, [recompilations]),
    "transformers": (90, [continuous_batching]),
    "triton-tests": (120, [partial(native_tests, *TRITON_TESTS)]),
    "fused-tests": (120, [partial(native_tests, *FUSED_TESTS)]),
    "tensor-parallel": (90, [tensor_parallel]),
}


# ---- running them


def run_group(name: str, out: Path) -> None:
    """Writes a line of JSON for each thing seen, as soon as it is."""
    with out.open("a") as file:

        def write(*row: object) -> None:
            file.write(json.dumps([name, *row]) + "\n")
            file.flush()

        for check in GROUPS[name][1]:
            label = getattr(check, "__name__", name)
            try:
                for what, expected, seen, passed in check():
                    write(what, expected, seen, {True: "pass", False: "FAIL", None: "-"}[passed])
            except Skip as reason:
                write(label, "", str(reason), "skip")
            except Exception as error:
                traceback.print_exc()
                write(label, "no exception", f"{type(error).__name__}: {error}"[:300], "FAIL")


def run_all(names: list[str], deadline: float) -> list[list[str]]:
    """Rows of group, what, expected, seen and result."""
    rows = []
    for name in names:
        limit = min(GROUPS[name][0], deadline - time.monotonic())
        if limit < 5:
            rows.append([name, name, "", "no time was left", "skip"])
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory, "rows")
            out.touch()
            command = [sys.executable, "-m", "tests.gpu_checks", "--group", name, "--out", str(out)]
            process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=2)
            try:
                code = process.wait(limit)
                problem = f"the process ended with exit code {code}" if code else ""
            except subprocess.TimeoutExpired:
                problem = f"not done after {limit:.0f} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, 9)  # its own session, so with all that it started
                    process.wait()
            rows += [json.loads(line) for line in out.read_text().splitlines()]
        if problem:
            rows.append([name, name, "to end by itself", problem, "FAIL"])
        print(f"[{name}: {time.monotonic() - began:.0f} s]", file=sys.stderr, flush=True)
    return rows


def show(rows: list[list[str]]) -> None:
    rows = [["group", "check", "expected", "seen", "result"], *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for *cells, result in rows:
        print("  ".join(cell.ljust(min(width, 70)) for cell, width in zip(cells, widths, strict=True)) + f"  {result}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--groups", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="G", help=", ".join(GROUPS)
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all of them (%(default)s)")
    parser.add_argument("--group", choices=GROUPS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args: Namespace = parser.parse_args(argv)
    if args.group:
        run_group(args.group, args.out)
        return 0
    if not torch.cuda.is_available():
        print(f"There is no GPU: PyTorch {torch.__version__} finds no CUDA device, so no check can run.")
        return 2
    began = time.monotonic()
    rows = run_all(args.groups, began + args.seconds)
    versions = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "seconds": time.monotonic() - began}
    versions |= {name: getattr(sys.modules.get(name), "__version__", "") for name in ("transformers", "triton")}
    show(rows)
    print(versions)
    if args.json:
        keys = "group", "check", "expected", "seen", "result"
        args.json.write_text(json.dumps({**versions, "rows": [dict(zip(keys, row, strict=True)) for row in rows]}))
    return int(any(row[-1] == "FAIL" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
