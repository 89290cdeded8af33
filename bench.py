"""Throughput on random token ids, beside the least time that this machine's arithmetic and memory would allow.

    python bench.py                                  # the shape of Qwen3-0.6B, random weights, nothing to download
    python bench.py --model Qwen/Qwen3-0.6B          # real weights: a directory or an id of the hub
    python bench.py --model DIR --load-format dummy  # random weights in the shape that DIR/config.json describes
    python bench.py --engine transformers            # the same workload through another engine (vllm, openvino)
    python bench.py --save-checkpoint DIR            # writes the default model with random weights, for --model DIR
    python bench.py --shared-prefix-len 512          # what the prefix cache saves
    python bench.py --control-plane                  # what scheduling costs; needs no model
    python bench.py --structured                     # what JSON schemas cost, and what is certain in them saves
    python bench.py --parts                          # the share of products, attention, sampling, Python on a CPU
    python bench.py --sampling                       # what each option of the sampling adds to a decode step
    python bench.py --timeline steps.json            # also the phases of each step, for Perfetto; .svg: a picture

Prompts and output lengths are drawn uniformly from a fixed seed and end-of-sequence tokens are ignored, so every
engine does exactly the same work. On CUDA the default is "classic": 256 prompts, inputs and outputs of 100 to 1024
tokens. On a CPU it is "small": 32 prompts, inputs of 32 to 256 and outputs of 32 to 128 tokens.

The floor is the time that the model's arithmetic and memory traffic take at the best rates measured here, of a large
matrix product and of memory (CUDA: a copy, read and written bytes; CPU: a read), with everything else free:

    prefill            max(FLOPs / rate, bytes / bandwidth) of all prompts at once: 2 FLOPs per layer parameter and
                       prompt token, 2 per LM head parameter and prompt, 4 * heads * head_dim per layer and pair of
                       positions of a prompt, halved for causality; bytes are all weights once, of experts those that
                       somebody chooses if all are as likely.
    each decode step   the same maximum for the next token of every unfinished sequence, at most --max-num-seqs of
                       them (as one finishes, the next takes its place): bytes are all weights and all cached keys
                       and values once; FLOPs as above, for one token of each sequence.

"60 % of the floor" means that 60 % of the time which the engine took was unavoidable.
"""

import argparse
import gc
import heapq
import importlib.util
import json
import logging
import pickle
import random
import re
import shutil
import string
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from time import perf_counter, time

import numpy as np
import psutil
import tokenizers
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from nanovllm import LLM, SamplingParams, StructuredOutputs
from nanovllm.config import Config
from nanovllm.engine import scheduler
from nanovllm.engine.batch import BatchBuilder
from nanovllm.engine.batch_codec import BatchCodec
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_runner import make_inputs
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels import cpu as cpu_kernels
from nanovllm.kernels.plain_attention import CPUAttention
from nanovllm.utils.device import default_batched_tokens, default_threads, resolve_device, upload
from nanovllm.utils.timeline import record
from nanovllm.utils.timeline_svg import draw

QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
    "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 40960, "rope_theta": 1000000,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False, "initializer_range": 0.02,
    "bos_token_id": 151643, "eos_token_id": 151645, "dtype": "bfloat16",
}  # fmt: skip
LENGTHS = ("num_seqs", "min_input_len", "max_input_len", "min_output_len", "max_output_len")
CLASSIC = dict(zip(LENGTHS, (256, 100, 1024, 100, 1024), strict=True))
SMALL = dict(zip(LENGTHS, (32, 32, 256, 32, 128), strict=True))
ENGINE_OPTIONS = {  # fields of Config, with their defaults
    "dtype": "auto, float32, bfloat16 or float16",
    "device": "auto, cuda or cpu",
    "attention_backend": "of nanovllm",
    "max_model_len": "most tokens of a sequence",
    "max_num_seqs": "most sequences at a time",
    "max_num_batched_tokens": "most tokens in a step",
    "kvcache_block_size": "tokens in a block of the KV cache",
    "num_kvcache_blocks": "-1 fills the memory budget",
    "quantization": "int8 or int4, of a model in 16 bits (nanovllm)",
}
PARTS = {
    "products": ("linear_bf16", "linear_int8"),
    "attention": ("attend", "store_kv"),
    "sampling": ("sample", "token_logprobs"),
}
SAMPLING = {  # options of all sequences beside the temperature; random weights have flat distributions
    "top_k": {"top_k": 20},
    "top_p, peaked": {"top_p": 0.95, "temperature": 0.1},
    "top_p": {"top_p": 0.95},
    "top_p, flat": {"top_p": 0.95, "temperature": 2.0},
    "min_p": {"min_p": 0.1},
    "recommended": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "repetition": {"repetition_penalty": 1.1},
    "presence": {"presence_penalty": 0.5},
    "frequency": {"frequency_penalty": 0.5},
    "logit_bias": {"logit_bias": {token_id: 1.0 for token_id in range(0, 1000, 10)}},
    "bad_words": {"bad_words": ["hello", "a longer one"]},
    "min_tokens": {"min_tokens": 29, "stop_token_ids": [7, 8]},
    "allowed_token_ids": {"allowed_token_ids": range(1000)},
    "logprobs=1": {"logprobs": 1},
    "logprobs=20": {"logprobs": 20},
    "seed": {"seed": 1},
}
SAMPLING_ROUNDS, SAMPLING_STEPS = 7, 6
CONFIG_DEFAULTS = {field.name: field.default for field in fields(Config)}
MAX_TOKEN_ID = 10_000
SUFFIX_LEN = 32  # of each prompt after the shared prefix
FINISH_INTERVAL = 4  # decode steps between one sequence's end and the next one's
ROUNDS = 4  # of what is measured in turns
MEASURING_SECONDS = 0.4  # for each of the machine's two rates

Figures = dict[str, int | float | str]

# ---- workload and floor


@dataclass(frozen=True, slots=True)
class Workload:
    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        return sum(self.output_lens)


def make_workload(lengths: dict[str, int], seed: int = 0, vocab_size: int = MAX_TOKEN_ID + 1) -> Workload:
    """Random prompts and output lengths, the same on every machine. `lengths` has a value for each of `LENGTHS`."""
    num_seqs, min_input, max_input, min_output, max_output = (lengths[name] for name in LENGTHS)
    rng = random.Random(seed)
    top = min(MAX_TOKEN_ID, vocab_size - 1)
    prompts = [[rng.randint(0, top) for _ in range(rng.randint(min_input, max_input))] for _ in range(num_seqs)]
    return Workload(prompts, [rng.randint(min_output, max_output) for _ in range(num_seqs)])


def floor_seconds(
    workload: Workload, model: PretrainedConfig, itemsize: int, flop_rate: float, bandwidth: float, max_num_seqs: int,
    weight_bits: tuple[float, float] | None = None
) -> tuple[float, float]:  # fmt: skip
    """The least seconds of prefill and of decode, as defined at the top of this file.

    Args:
        workload: What is computed.
        model: Dimensions of the model.
        itemsize: Bytes of a cached number, and of a weight unless `weight_bits` says otherwise.
        flop_rate: FLOP/s.
        bandwidth: Bytes/s.
        max_num_seqs: Most sequences in a decode step.
        weight_bits: Of a weight of the layers, and of the LM head.
    """
    layer_size, head_size = (bits / 8 for bits in weight_bits) if weight_bits else (itemsize, itemsize)
    layers, hidden, head_dim = model.num_hidden_layers, model.hidden_size, model.head_dim
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    attention = hidden * (2 * heads + 2 * kv_heads) * head_dim + 2 * hidden + 2 * head_dim
    expert_params, num_chosen, num_experts, num_sparse = experts_of(model)
    dense_params = layers * attention + (layers - num_sparse) * 3 * hidden * model.intermediate_size
    layer_params, head_params = dense_params + num_chosen * expert_params, model.vocab_size * hidden

    def weight_bytes(num_tokens: np.ndarray) -> np.ndarray:
        """All of a dense model; of the experts those that so many tokens choose if all are as likely."""
        chosen = num_experts * (1 - (1 - num_chosen / max(num_experts, 1)) ** num_tokens)
        return (dense_params + chosen * expert_params) * layer_size + head_params * head_size

    kv_bytes = layers * 2 * kv_heads * head_dim * itemsize  # of one token
    pair_flops = layers * 4 * heads * head_dim  # of a query and a key

    inputs, outputs = np.array([len(prompt) for prompt in workload.prompts]), np.array(workload.output_lens)
    flops = 2 * layer_params * inputs.sum() + 2 * head_params * len(inputs) + pair_flops * (inputs**2).sum() / 2
    prefill = max(flops / flop_rate, weight_bytes(inputs.sum()) / bandwidth)

    # The prefill gives each sequence its first token. Sequence i is in the decode steps starts[i] <= t < ends[i], in
    # step t with offsets[i] + t keys.
    starts = first_decode_steps(workload.output_lens, max_num_seqs)
    ends = starts + outputs - 1
    offsets = inputs + 1 - starts
    n = ends.max()
    num_seqs = (np.bincount(starts, minlength=n + 1) - np.bincount(ends, minlength=n + 1)).cumsum()[:n]
    num_keys = (np.bincount(starts, offsets, n + 1) - np.bincount(ends, offsets, n + 1)).cumsum()[:n]
    num_keys += num_seqs * np.arange(n)
    flops = 2 * (layer_params + head_params) * num_seqs + pair_flops * num_keys
    decode = np.maximum(flops / flop_rate, (weight_bytes(num_seqs) + kv_bytes * num_keys) / bandwidth).sum()
    return float(prefill), float(decode)


def weight_bits(config: Config) -> tuple[float, float]:
    """Of a weight of the layers, with its share of scales and zero points, and of the LM head."""
    plain, weights = 8 * config.dtype.itemsize, config.weight_format
    if config.quantization is not None:
        return (4 + 24 / 128 if config.quantization == "int4" else 8), 8
    if weights.is_plain:
        return plain, plain
    return (4 if weights.dtype == torch.uint8 else 8) + (24 / weights.group_size if weights.group_size else 0), plain


def experts_of(model: PretrainedConfig) -> tuple[int, int, int, int]:
    """Parameters of an expert in all layers that have some, how many are chosen, how many there are; those layers."""
    num_experts, step = getattr(model, "num_experts", 0), getattr(model, "decoder_sparse_step", 1)
    if not num_experts:
        return 0, 0, 0, 0
    sparse = {*range(step - 1, model.num_hidden_layers, step)} - {*(model.mlp_only_layers or ())}
    params = len(sparse) * 3 * model.hidden_size * model.moe_intermediate_size
    return params, model.num_experts_per_tok, num_experts, len(sparse)


def first_decode_steps(output_lens: list[int], max_num_seqs: int) -> np.ndarray:
    """The step in which each sequence begins when it takes the place of the first to finish."""
    ends: list[int] = []
    starts: list[int] = []
    for length in output_lens:
        starts.append(heapq.heappop(ends) if len(ends) == max_num_seqs else 0)
        heapq.heappush(ends, starts[-1] + length - 1)
    return np.array(starts)


# ---- this machine


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


# ---- engines: each is opened once and then generates workloads, telling at least how many tokens it made

Generate = Callable[[Workload], Figures]


def open_nanovllm(args: argparse.Namespace, config: Config) -> Generate:
    llm = LLM(str(config.model_path), **engine_options(args))

    def generate(workload: Workload) -> Figures:
        before = llm.stats()
        params = [SamplingParams(args.temperature, max_tokens=n, ignore_eos=True) for n in workload.output_lens]
        outputs = llm.generate(workload.prompts, params)
        after = llm.stats()
        figures: Figures = {"output_tokens": sum(len(output["token_ids"]) for output in outputs)}
        for phase in ("prefill", "decode"):
            tokens, seconds = (after[f"{phase}_{unit}"] - before[f"{phase}_{unit}"] for unit in ("tokens", "seconds"))
            figures |= {f"{phase}_tokens": tokens, f"{phase}_seconds": seconds}
            figures[f"{phase}_tokens_per_s"] = tokens / max(seconds, 1e-9)
        return figures

    return generate


def open_transformers(args: argparse.Namespace, config: Config) -> Generate:
    """Left-padded batches, each generated up to its longest output; only the tokens asked for count."""
    torch.manual_seed(args.seed)
    config.hf_config.dtype = config.dtype
    if config.load_format == "dummy":
        model = AutoModelForCausalLM.from_config(config.hf_config)
    else:
        model = AutoModelForCausalLM.from_pretrained(config.model_path)
    model = model.to(config.device, config.dtype).eval()
    settings = {"do_sample": False, "pad_token_id": 0}
    if args.temperature > 0:
        settings |= {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}

    def generate_batch(prompts: list[list[int]], output_lens: list[int]) -> int:
        width, longest = max(map(len, prompts)), max(output_lens)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=config.device)
        padding = torch.tensor([width - len(prompt) for prompt in prompts], device=config.device)
        mask = (torch.arange(width, device=config.device) >= padding.unsqueeze(1)).long()
        out = model.generate(ids, attention_mask=mask, min_new_tokens=longest, max_new_tokens=longest, **settings)
        return sum(len(row[width : width + n]) for row, n in zip(out.tolist(), output_lens, strict=True))

    def generate(workload: Workload) -> Figures:
        batches = [slice(i, i + config.max_num_seqs) for i in range(0, len(workload.prompts), config.max_num_seqs)]
        parts = [generate_batch(workload.prompts[batch], workload.output_lens[batch]) for batch in batches]
        return {"output_tokens": sum(parts)}

    return generate


def open_vllm(args: argparse.Namespace, config: Config) -> Generate:
    """Its own block size and cache size unless others are asked for."""
    import vllm

    same = ("enforce_eager", "load_format", "max_num_seqs", "max_num_batched_tokens", "seed")
    options = {name: getattr(args, name) for name in same}
    for ours, theirs in (("kvcache_block_size", "block_size"), ("num_kvcache_blocks", "num_gpu_blocks_override")):
        if getattr(args, ours) != CONFIG_DEFAULTS[ours]:
            options[theirs] = getattr(args, ours)
    options |= {"dtype": dtype_name(config), "max_model_len": config.max_model_len} | args.engine_args
    llm = vllm.LLM(str(config.model_path), skip_tokenizer_init=True, **options)
    common = {"temperature": args.temperature, "ignore_eos": True, "detokenize": False}

    def generate(workload: Workload) -> Figures:
        prompts = [{"prompt_token_ids": prompt} for prompt in workload.prompts]
        params = [vllm.SamplingParams(max_tokens=n, **common) for n in workload.output_lens]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return {"output_tokens": sum(len(output.outputs[0].token_ids) for output in outputs)}

    return generate


def open_openvino(args: argparse.Namespace, config: Config) -> Generate:
    """OpenVINO GenAI's continuous batching of a model that `optimum-cli export openvino` made; the cache grows."""
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs, scheduler.max_num_batched_tokens = args.max_num_seqs, args.max_num_batched_tokens
    properties = {"INFERENCE_PRECISION_HINT": {"bfloat16": "bf16", "float16": "f16"}.get(dtype_name(config), "f32")}
    path = str(config.model_path)
    pipeline = openvino_genai.ContinuousBatchingPipeline(path, scheduler, "CPU", properties | args.engine_args)
    common = {"ignore_eos": True, "do_sample": args.temperature > 0, "rng_seed": args.seed}
    if args.temperature > 0:
        common |= {"temperature": args.temperature, "top_p": 1.0}

    def generate(workload: Workload) -> Figures:
        prompts = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in workload.prompts]
        params = [openvino_genai.GenerationConfig(max_new_tokens=n, **common) for n in workload.output_lens]
        return {"output_tokens": sum(len(out.m_generation_ids[0]) for out in pipeline.generate(prompts, params))}

    return generate


ENGINES = {
    "nanovllm": open_nanovllm, "transformers": open_transformers, "vllm": open_vllm, "openvino": open_openvino,
}  # fmt: skip
PACKAGES = {"vllm": "vllm", "openvino": "openvino_genai"}  # not among nanovllm's requirements


def engine_options(args: argparse.Namespace) -> dict[str, int | str | bool]:
    """Keyword arguments of `Config` and `LLM`."""
    return {name: getattr(args, name) for name in (*ENGINE_OPTIONS, "enforce_eager", "load_format", "seed")}


def dtype_name(config: Config) -> str:
    return str(config.dtype).removeprefix("torch.")


def timed(generate: Generate, workload: Workload) -> Figures:
    """Generates `workload`; adds the seconds that it took.

    Raises:
        RuntimeError: The engine made fewer tokens than the workload asks for.
    """
    start = perf_counter()
    figures = generate(workload)
    figures["seconds"] = perf_counter() - start
    if figures["output_tokens"] != workload.output_tokens:
        raise RuntimeError(
            f"the engine made {figures['output_tokens']} tokens, the workload asks for {workload.output_tokens}. "
            "A sequence that outgrows the KV cache ends early: raise --num-kvcache-blocks"
        )
    return figures


# ---- the measurements


def throughput(args: argparse.Namespace, config: Config) -> Figures:
    """An engine's rates on the workload, and the floor."""
    lengths = {name: getattr(args, name) for name in LENGTHS}
    workload = make_workload(lengths, args.seed, config.hf_config.vocab_size)
    rates_before = measure_rates(config)  # and once more afterwards: other machines on the same host come and go
    start = perf_counter()
    generate = ENGINES[args.engine](args, config)
    generate(Workload([[1] * 16], [4]))
    startup_seconds, python_seconds = perf_counter() - start, time() - psutil.Process().create_time()
    figures: Figures = {"engine": args.engine, "model": args.model or "the shape of Qwen3-0.6B"}
    figures |= engine_options(args) | lengths | {"temperature": args.temperature, "dtype": dtype_name(config)}
    figures["device"] = torch.cuda.get_device_name(config.device) if config.device.type == "cuda" else "cpu"
    figures |= {"threads": default_threads(), "prompt_tokens": workload.prompt_tokens}
    with record(config.device) if args.timeline else nullcontext() as timeline:
        figures |= {"startup_seconds": startup_seconds, "python_seconds": python_seconds} | timed(generate, workload)
    if timeline:
        is_picture = args.timeline.suffix == ".svg"
        args.timeline.write_text(draw(timeline.rows()) if is_picture else json.dumps(timeline.trace()))
    if args.engine != "vllm" or config.device.type == "cpu":  # its own process has allocated what is on CUDA
        figures["peak_gbytes"] = peak_memory(config.device) / 1e9
    del generate
    gc.collect()  # the engine's memory goes before the machine is measured
    flop_rate, bandwidth = map(max, rates_before, measure_rates(config))
    seconds = figures["seconds"]
    figures["output_tokens_per_s"] = workload.output_tokens / seconds
    figures["total_tokens_per_s"] = (workload.prompt_tokens + workload.output_tokens) / seconds
    figures |= {"gflops": flop_rate / 1e9, "gbytes_per_s": bandwidth / 1e9}
    limits = config.dtype.itemsize, flop_rate, bandwidth, config.max_num_seqs, weight_bits(config)
    floors = floor_seconds(workload, config.hf_config, *limits)
    figures |= {"prefill_floor_seconds": floors[0], "decode_floor_seconds": floors[1], "floor_seconds": sum(floors)}
    return figures | {"percent_of_floor": 100 * sum(floors) / seconds}


def parts(args: argparse.Namespace, config: Config) -> Figures:
    """Where the time of prefill and decode goes, by the CPU's kernels; eager, as one cannot look into a recording."""
    llm = LLM(str(config.model_path), **engine_options(args) | {"enforce_eager": True})
    call, seconds, read = cpu_kernels.call, Counter(), Counter()

    def timed_call(name: str, *arguments: object) -> None:
        start = perf_counter()
        call(name, *arguments)
        seconds[next((part for part, names in PARTS.items() if name in names), "small operations")] += (
            perf_counter() - start
        )
        if name == "attend":  # the keys and values of all tokens that the step sees
            lens, num_kv_heads, head_dim = arguments[5], *arguments[10:12]
            read["bytes"] += int(lens.sum()) * 2 * num_kv_heads * head_dim * config.dtype.itemsize

    cpu_kernels.call = timed_call
    lengths = {name: getattr(args, name) for name in LENGTHS}
    workload = make_workload(lengths, args.seed, config.hf_config.vocab_size)
    for prompt, n in zip(workload.prompts, workload.output_lens, strict=True):
        llm.add_request(prompt, SamplingParams(args.temperature, max_tokens=n, ignore_eos=True))
    phases = {"prefill": (Counter(), Counter()), "decode": (Counter(), Counter())}
    while not llm.is_finished():
        seconds.clear()
        read.clear()
        start = perf_counter()
        _, num_tokens = llm.step()
        seconds["all"] = perf_counter() - start
        seconds["Python, rest"] = 2 * seconds["all"] - seconds.total()
        for total, counted in zip(phases["prefill" if num_tokens > 0 else "decode"], (seconds, read), strict=True):
            total.update(counted)
    cpu_kernels.call = call
    figures: Figures = lengths | {
        "engine": args.engine,
        "dtype": dtype_name(config),
        "weights": args.quantization or "",
    }
    for phase, (total, counted) in phases.items():
        for part in (*PARTS, "small operations", "Python, rest"):
            figures[f"{phase} {part}"] = 100 * total[part] / total["all"]
        figures[f"{phase}_seconds"] = total["all"]
        figures[f"{phase}_attention_gbytes_per_s"] = counted["bytes"] / max(total["attention"], 1e-9) / 1e9
    return figures | {"gbytes_per_s": measure_rates(config)[1] / 1e9}


def sampling(args: argparse.Namespace, config: Config) -> Figures:
    """Milliseconds of a decode step in which each of `SAMPLING` is asked for by all sequences, each sequence asks for
    another one, or one asks for all; and how much longer that is than a step with a temperature alone.

    Two engines take turns with their steps, one of them with options: medians of the pairs of all rounds.
    """
    num_seqs = args.num_seqs
    llms = [LLM(str(config.model_path), **engine_options(args) | {"num_kvcache_blocks": 3 * num_seqs}) for _ in "ab"]
    length = llms[0].config.kvcache_block_size + 1  # all but the last token are cached
    lengths = dict(zip(LENGTHS, (num_seqs, length, length, 1, 1), strict=True))
    prompts = make_workload(lengths, args.seed, config.hf_config.vocab_size).prompts
    common = {"temperature": args.temperature, "max_tokens": 30, "ignore_eos": True}
    asked = {kind: options for kind, options in SAMPLING.items() if "bad_words" not in options or llms[0].tokenizer}
    plain, *kinds = [SamplingParams(**common | options) for options in ({}, *asked.values())]
    every = SamplingParams(**{name: value for options in asked.values() for name, value in options.items()} | common)
    cases = {kind: [params] * num_seqs for kind, params in zip(asked, kinds, strict=True)}
    cases["all, mixed"] = [kinds[i % len(kinds)] for i in range(num_seqs)]
    cases["one has all"] = [every] + [plain] * (num_seqs - 1)

    def step_seconds(llm: LLM) -> float:
        start = perf_counter()
        llm.step()
        return perf_counter() - start

    def pairs(params: list[SamplingParams]) -> list[list[float]]:
        """Seconds of a plain step, and of the one before or after it with options."""
        ids = []
        for llm, own in zip(llms, ([plain] * num_seqs, params), strict=True):
            ids.append([llm.add_request(prompt, one) for prompt, one in zip(prompts, own, strict=True)])
            while llm.step()[1] > 0:
                pass
        orders = [slice(None, None, 1 - i % 2 * 2) for i in range(SAMPLING_STEPS)]
        seconds = [[step_seconds(llm) for llm in llms[order]][order] for order in orders]
        for llm, own in zip(llms, ids, strict=True):
            for request_id in own:
                llm.abort(request_id)
        return seconds

    rounds = [[pairs(params) for params in cases.values()] for _ in range(1 + SAMPLING_ROUNDS)]
    seconds = np.array(rounds[1:]).swapaxes(0, 1).reshape(len(cases), -1, 2)
    figures: Figures = {"num_seqs": num_seqs, "dtype": dtype_name(config), "device": str(config.device)}
    figures |= {"vocab_size": config.hf_config.vocab_size, "plain ms": 1e3 * float(np.median(seconds[..., 0]))}
    for case, own in zip(cases, seconds, strict=True):
        figures[f"{case} ms"] = 1e3 * float(np.median(own[:, 1]))
        figures[f"{case} ratio"] = float(np.median(own[:, 1] / own[:, 0]))
    return figures


def measure_rates(config: Config) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s of memory.

    Of one in fp32 on a CPU, if that is faster: where bf16 has no instructions, it is what our kernels compute with; and
    of one in int8, if activations are.
    """
    dtypes = {config.dtype}
    if config.device.type == "cpu":
        dtypes |= {torch.float32} | ({torch.int8} if weight_bits(config)[0] < 16 else set())
    return max(measure_flop_rate(dtype, config.device) for dtype in dtypes), measure_bandwidth(config.device)


def shared_prefix(args: argparse.Namespace, config: Config) -> Figures:
    """Seconds to prefill prompts that share nothing, and as many that share all but their last tokens."""
    n, length = args.num_seqs, args.shared_prefix_len
    total = length + SUFFIX_LEN
    lengths = dict(zip(LENGTHS, (2 * n + 1, total, total, 1, 1), strict=True))
    warmup, *prompts = make_workload(lengths, args.seed, config.hf_config.vocab_size).prompts
    shared = [prompts[n][:length] + prompt[length:] for prompt in prompts[n:]]
    generate = ENGINES[args.engine](args, config)
    for _ in range(2):  # the second time with a cached prefix, so that nothing is run for the first time later
        generate(Workload([warmup], [1]))
    figures: Figures = {"engine": args.engine, "dtype": dtype_name(config), "device": str(config.device)}
    figures |= {"num_seqs": n, "shared_prefix_len": length, "suffix_len": SUFFIX_LEN}
    figures["kvcache_block_size"] = args.kvcache_block_size or "the default size"
    for name, group in (("distinct", prompts[:n]), ("shared", shared)):
        run = timed(generate, Workload(group, [1] * n))
        figures |= {f"{name}_seconds": run["seconds"], f"{name}_tokens_computed": run.get("prefill_tokens", "?")}
    return figures | {"times_faster": figures["distinct_seconds"] / figures["shared_seconds"]}


def structured(args: argparse.Namespace, config: Config) -> Figures:
    """Seconds of a decode step, plain and with a schema for each sequence; and of JSON with long keys, with what is
    certain in it computed together and token by token."""
    llm, n = LLM(str(config.model_path), **engine_options(args)), args.num_seqs
    prompts = [[i + 5] * args.min_input_len for i in range(n)]
    forms = [StructuredOutputs(json={"type": "array", "items": person(f"_{i}"), "minItems": 10**6}) for i in range(n)]
    long_keys = [StructuredOutputs(json=person("_of_the_customer_named_above")) for _ in range(n)]

    def run(forms: list[StructuredOutputs | None], most: int, most_certain: int) -> list[tuple[float, int]]:
        """Seconds and tokens of each step without a prompt."""
        steps, scheduler.MOST_CERTAIN = [], most_certain
        for prompt, form in zip(prompts, forms, strict=True):
            options = {"structured_outputs": form, "ignore_eos": form is None, "seed": args.seed}
            llm.add_request(prompt, SamplingParams(args.temperature, most, **options))
        while not llm.is_finished():
            start = perf_counter()
            _, num_tokens = llm.step()
            steps += [(perf_counter() - start, -num_tokens)] * (num_tokens < 0)
        return steps

    def step_seconds(forms: list[StructuredOutputs | None]) -> float:
        return float(np.median([seconds for seconds, num_tokens in run(forms, 40, 0) if num_tokens == n]))

    run(forms, 3, 0), run(long_keys, 30, 512)
    times = np.array([[step_seconds([None] * n), step_seconds(forms)] for _ in range(ROUNDS)])
    figures: Figures = {"num_seqs": n, "vocab_size": config.hf_config.vocab_size, "dtype": dtype_name(config)}
    figures |= {"plain_ms": 1e3 * np.median(times[:, 0]), "structured_ms": 1e3 * np.median(times[:, 1])}
    figures["structured_ratio"] = float(np.median(times[:, 1] / times[:, 0]))
    runs = [[run(long_keys, 200, most) for most in (0, 512)] for _ in range(2)]
    for name, steps in zip(("single", "together"), runs[-1], strict=True):
        figures |= {f"{name}_steps": len(steps), f"{name}_tokens": sum(num_tokens for _, num_tokens in steps)}
    seconds = np.array([[sum(s for s, _ in steps) for steps in both] for both in runs])
    figures |= {"single_seconds": np.median(seconds[:, 0]), "together_seconds": np.median(seconds[:, 1])}
    return figures | {"times_faster": float(np.median(seconds[:, 0] / seconds[:, 1]))}


def person(suffix: str) -> dict[str, object]:
    """The JSON schema of an object with eight properties."""
    city, day = {"enum": ["Paris", "London", "Berlin"]}, {"type": "string", "format": "date"}
    properties = {
        "first_name": {"type": "string", "maxLength": 12}, "last_name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150}, "city": city, "birthday": day,
        "is_active": {"type": "boolean"}, "orders": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "email": {"type": ["string", "null"], "pattern": "^[a-z]{1,8}@[a-z]{1,8}[.]org$"},
    }  # fmt: skip
    properties = {f"{name}{suffix}": schema for name, schema in properties.items()}
    closed = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": properties, **closed}


def control_plane(args: argparse.Namespace) -> Figures:
    """Of a decode step, while no sequence finishes and while one often does: microseconds of its bookkeeping, and
    bytes that each further tensor-parallel rank is sent."""
    figures: Figures = {"num_seqs": args.num_seqs, "num_steps": args.num_steps}
    args.kvcache_block_size = args.kvcache_block_size or CPUAttention.block_size
    figures |= {"kvcache_block_size": args.kvcache_block_size, "finish_interval": FINISH_INTERVAL}
    for load, is_steady in (("steady", True), ("finishing", False)):
        *seconds, num_bytes = bookkeeping(args, is_steady).T
        schedule, build, postprocess = 1e6 * np.array(seconds)
        figures |= {f"{load}_bytes": float(np.median(num_bytes)), f"{load}_bytes_max": float(num_bytes.max())}
        parts = {"schedule": schedule, "postprocess": postprocess, "these_two": schedule + postprocess}
        for part, micros in (parts | {"build_tensors": build, "all": schedule + postprocess + build}).items():
            figures[f"{load}_{part}_us"] = float(np.median(micros))
            figures[f"{load}_{part}_us_mean"] = float(np.mean(micros))
    return figures


def bookkeeping(args: argparse.Namespace, is_steady: bool) -> np.ndarray:
    """[steps, 4] seconds of `schedule`, of building the tensors and of `postprocess`, with made-up tokens; bytes."""
    num_seqs, block_size, rng = args.num_seqs, args.kvcache_block_size, random.Random(args.seed)
    prompts = make_workload({name: getattr(args, name) for name in LENGTHS}, args.seed).prompts
    longest = args.num_steps + 2 if is_steady else num_seqs * FINISH_INTERVAL
    max_blocks = -(-max(args.max_model_len, args.max_input_len + longest) // block_size)
    scheduler = Scheduler(BlockManager(num_seqs * (max_blocks + 1), block_size), num_seqs, args.max_num_batched_tokens)
    builder, codec = BatchBuilder(block_size, max_blocks), BatchCodec(block_size, max_blocks)
    device = resolve_device(args.device)

    def add(seq_id: int, max_tokens: int) -> None:
        params = SamplingParams(args.temperature, max_tokens, ignore_eos=True)
        scheduler.add(Sequence(seq_id, prompts[seq_id % num_seqs], params, rng_key=rng.getrandbits(64)))

    for i in range(num_seqs):
        add(i, longest if is_steady else (i + 1) * FINISH_INTERVAL)
    steps: list[tuple[float, float, float, int]] = []
    while len(steps) < args.num_steps:
        start = perf_counter()
        seqs = scheduler.schedule()
        scheduled = perf_counter()
        batch = builder.build(seqs)
        make_inputs(batch, device)
        upload([batch.temperatures, batch.uniforms], device)
        built = perf_counter()
        counts = [1] * len(seqs) if batch.num_sampled is None else batch.num_sampled.tolist()
        token_ids = [[rng.randint(0, MAX_TOKEN_ID)] * count for count in counts]
        sampled = perf_counter()
        scheduler.postprocess(seqs, scheduler.advance(seqs), token_ids)
        if scheduler.num_decode_tokens == num_seqs or (not is_steady and scheduler.num_decode_tokens):
            seconds = scheduled - start, built - scheduled, perf_counter() - sampled
            steps.append((*seconds, len(pickle.dumps(codec.encode(batch), 5))))
        for seq in scheduler.finished:  # another one takes its place
            add(seq.seq_id + num_seqs, longest)
        scheduler.finished = []
    return np.array(steps)


# ---- reports: a label and a template for each line; a line of which a figure is unknown is left out

THROUGHPUT_REPORT = [
    ("engine", "{engine}, {dtype}, {device}, {threads} threads"),
    ("model", "{model}, load format {load_format}"),
    ("workload", "{num_seqs} prompts, inputs {min_input_len}-{max_input_len}, outputs {min_output_len}-"
                 "{max_output_len}, seed {seed}, temperature {temperature}"),
    ("prompt tokens", "{prompt_tokens:11,d}"),
    ("output tokens", "{output_tokens:11,d}"),
    ("start-up", "{startup_seconds:11,.2f} s  ({python_seconds:.2f} s since Python started)"),
    ("time", "{seconds:11,.2f} s"),
    ("output", "{output_tokens_per_s:11,.1f} tok/s"),
    ("total", "{total_tokens_per_s:11,.1f} tok/s"),
    ("prefill", "{prefill_tokens_per_s:11,.1f} tok/s  ({prefill_seconds:.2f} s, floor {prefill_floor_seconds:.2f} s)"),
    ("decode", "{decode_tokens_per_s:11,.1f} tok/s  ({decode_seconds:.2f} s, floor {decode_floor_seconds:.2f} s)"),
    ("peak memory", "{peak_gbytes:11,.2f} GB"),
    ("matrix product", "{gflops:11,.1f} GFLOP/s"),
    ("memory", "{gbytes_per_s:11,.1f} GB/s"),
    ("floor", "{floor_seconds:11,.2f} s"),
    ("of the floor", "{percent_of_floor:11,.1f} %"),
]  # fmt: skip
PARTS_REPORT = [
    ("engine", "{engine}, {dtype}"),
    ("workload", "{num_seqs} prompts, inputs {min_input_len}-{max_input_len}, outputs {min_output_len}-"
                 "{max_output_len}"),
    ("", "prefill   decode"),
    ("seconds", "{prefill_seconds:7.2f}  {decode_seconds:7.2f}"),
    *((part, f"{{prefill {part}:6.1f}}%  {{decode {part}:6.1f}}%")
      for part in (*PARTS, "small operations", "Python, rest")),
    ("attention reads", "       -  {decode_attention_gbytes_per_s:7.1f} GB/s of {gbytes_per_s:.1f}"),
]  # fmt: skip
SAMPLING_REPORT = [
    ("step", "{num_seqs} sequences, {vocab_size} tokens, {dtype}, {device}"),
    ("temperature", "{plain ms:7.1f} ms"),
    *((case, f"{{{case} ms:7.1f}} ms  {{{case} ratio:5.2f}}x") for case in (*SAMPLING, "all, mixed", "one has all")),
]
SHARED_PREFIX_REPORT = [
    ("engine", "{engine}, {dtype}, {device}"),
    ("prompts", "{num_seqs} of {shared_prefix_len} + {suffix_len} tokens, blocks of {kvcache_block_size}"),
    ("nothing shared", "{distinct_seconds:11,.3f} s  ({distinct_tokens_computed} tokens computed)"),
    ("prefix shared", "{shared_seconds:11,.3f} s  ({shared_tokens_computed} tokens computed)"),
    ("", "{times_faster:11,.2f} times faster"),
]
STRUCTURED_REPORT = [
    ("sequences", "{num_seqs}, {dtype}, vocabulary of {vocab_size}"),
    ("plain step", "{plain_ms:11,.1f} ms"),
    ("schema each", "{structured_ms:11,.1f} ms  ({structured_ratio:.3f} of the plain step)"),
    ("long keys", "{single_seconds:11,.2f} s  ({single_tokens} tokens in {single_steps} steps)"),
    ("certain at once", "{together_seconds:11,.2f} s  ({together_tokens} tokens in {together_steps} steps)"),
    ("", "{times_faster:11,.2f} times faster"),
]
CONTROL_PLANE_REPORT = [
    ("load", "{num_seqs} sequences, {num_steps} decode steps, blocks of {kvcache_block_size}"),
    ("us per step", "    none finishes    one in {finish_interval} steps"),
    ("", " median     mean   median     mean"),
]
for part in ("schedule", "postprocess", "these_two", "build_tensors", "all"):
    names = [f"{load}_{part}_us{kind}" for load in ("steady", "finishing") for kind in ("", "_mean")]
    CONTROL_PLANE_REPORT.append((part.replace("_", " "), "  ".join(f"{{{name}:7.0f}}" for name in names)))


CONTROL_PLANE_REPORT += [
    ("bytes per step", " median     most   median     most"),
    (
        "to other ranks",
        "{steady_bytes:7.0f}  {steady_bytes_max:7.0f}  {finishing_bytes:7.0f}  {finishing_bytes_max:7.0f}",
    ),
]


def show(figures: Figures, report: list[tuple[str, str]]) -> None:
    width = max(16, *(len(label) + 2 for label, _ in report))
    for label, template in report:
        if all(name in figures for _, name, _, _ in string.Formatter().parse(template) if name):
            print(f"{label:<{width}}{template.format(**figures)}")


# ---- command line


def make_parser() -> argparse.ArgumentParser:
    def formatter(prog: str) -> argparse.HelpFormatter:
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=120)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--json", action="store_true", help="print all figures as one line of JSON instead of a table")
    text = "also write where each step's time went: .json for Perfetto or Chrome, .svg a picture"
    parser.add_argument("--timeline", type=Path, metavar="FILE", help=text)
    group = parser.add_argument_group("what to measure instead of throughput").add_mutually_exclusive_group()
    group.add_argument("--shared-prefix-len", type=positive, metavar="N", help="prefill with N common tokens")
    group.add_argument("--structured", action="store_true", help="JSON schemas, with a tokenizer that it learns")
    group.add_argument("--parts", action="store_true", help="the share of time by part, on a CPU")
    group.add_argument("--sampling", action="store_true", help="what options add to a decode step")
    group.add_argument("--control-plane", action="store_true", help="scheduling alone, of classic's prompts")
    group.add_argument("--save-checkpoint", metavar="DIR", help="nothing: write the default model, random weights")
    group = parser.add_argument_group("workload (classic on CUDA, small on a CPU)")
    for name in LENGTHS:
        text = f"classic {CLASSIC[name]}, small {SMALL[name]}"
        group.add_argument(flag(name), type=positive, metavar="N", help=text)
    group.add_argument("--num-steps", type=positive, metavar="N", default=400, help="of --control-plane (%(default)s)")
    group.add_argument("--seed", type=int, metavar="N", default=0, help="of all that is random (%(default)s)")
    group.add_argument("--temperature", type=float, metavar="T", default=0.6, help="0 is greedy (%(default)s)")
    group = parser.add_argument_group("engine")
    group.add_argument("--engine", choices=ENGINES, default="nanovllm", help="(%(default)s)")
    group.add_argument("--model", metavar="M", help="a directory or an id of the hub (the shape of Qwen3-0.6B)")
    group.add_argument("--load-format", choices=("auto", "dummy"), help="dummy: random weights (auto with --model)")
    group.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    text = "a JSON object of the engine's own settings: arguments of vllm.LLM, properties of OpenVINO"
    group.add_argument("--engine-args", type=json.loads, metavar="JSON", default={}, help=text)
    chosen = {"max_num_batched_tokens": "16384, on a CPU 1024", "kvcache_block_size": "64, for FlashAttention 2 256"}
    for name, text in ENGINE_OPTIONS.items():
        default = CONFIG_DEFAULTS[name]
        kind = int if name in chosen else str if default is None else type(default)
        shown = chosen.get(name, default)
        group.add_argument(flag(name), type=kind, metavar="X", default=default, help=f"{text} ({shown})")
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def complete(args: argparse.Namespace) -> None:
    """Fills in the defaults that depend on other arguments.

    Raises:
        ValueError: The arguments contradict each other or ask for what is not there.
    """
    package = PACKAGES.get(args.engine)
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(f"--engine {args.engine} needs the package {package}, which is not installed")
    if args.engine == "openvino" and not (args.model and Path(args.model, "openvino_model.xml").is_file()):
        raise ValueError("--engine openvino needs a --model that `optimum-cli export openvino` made")
    if args.engine_args and args.engine not in PACKAGES:
        raise ValueError(f"--engine-args are for {' and '.join(PACKAGES)}, not for {args.engine}")
    if args.timeline and args.timeline.suffix not in (".json", ".svg"):
        raise ValueError(f"--timeline {args.timeline} must end in .json or .svg")
    others = args.structured or args.parts or args.sampling or args.control_plane or args.shared_prefix_len
    if args.sampling and args.engine != "nanovllm":
        raise ValueError("--sampling is for nanovllm")
    if args.timeline and (args.engine != "nanovllm" or others):
        raise ValueError("--timeline is for the throughput of nanovllm")
    if args.load_format == "auto" and not args.model:
        raise ValueError("--load-format auto needs --model")
    args.load_format = args.load_format or ("auto" if args.model else "dummy")
    SamplingParams(args.temperature)
    args.max_num_batched_tokens = args.max_num_batched_tokens or default_batched_tokens(resolve_device(args.device))
    defaults = CLASSIC if args.control_plane or resolve_device(args.device).type == "cuda" else SMALL
    if args.shared_prefix_len:
        defaults = defaults | {"num_seqs": 32}
    for name, default in defaults.items():
        setattr(args, name, getattr(args, name) or default)
    for what in ("input", "output"):
        low, high = getattr(args, f"min_{what}_len"), getattr(args, f"max_{what}_len")
        if low > high:
            raise ValueError(f"--min-{what}-len {low} exceeds --max-{what}-len {high}")


def make_config(args: argparse.Namespace, model: str) -> Config:
    """The engine's settings, checked.

    Raises:
        TypeError, ValueError: See `Config`; also when the workload's sequences are too long for them.
    """
    config = Config(model, **engine_options(args))
    longest = args.max_input_len + args.max_output_len
    if args.shared_prefix_len:
        longest = args.shared_prefix_len + SUFFIX_LEN + 1
    if longest > config.max_model_len:
        raise ValueError(f"sequences of {longest} tokens exceed --max-model-len {config.max_model_len}")
    has_kernels = config.device.type == "cpu" and config.dtype == torch.bfloat16 and cpu_kernels.load_kernels()
    if args.parts and not (args.engine == "nanovllm" and has_kernels):
        raise ValueError("--parts is for nanovllm in bfloat16 on a CPU that the kernels are compiled for")
    return config


@contextmanager
def model_directory(model: str | None) -> Iterator[str]:
    """`model`, or a directory with nothing but the configuration of Qwen3-0.6B."""
    if model:
        yield model
        return
    with tempfile.TemporaryDirectory() as path:
        Path(path, "config.json").write_text(json.dumps(QWEN3_0_6B))
        yield path


def save_tokenizer(path: Path, vocab_size: int) -> None:
    """Writes one of byte pairs with as many tokens as a model has, learned from Python's standard library."""
    sources = sorted(Path(json.__file__).parent.parent.rglob("*.py"))
    texts = (file.read_text(encoding="utf-8", errors="ignore") for file in sources if "site-packages" not in str(file))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": vocab_size - 512, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(**options))
    tokenizer.add_special_tokens([f"<|{i}|>" for i in range(vocab_size - tokenizer.get_vocab_size())])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def save_checkpoint(path: Path, seed: int) -> None:
    """Writes random weights in the shape of Qwen3-0.6B, and the demo model's tokenizer (whose vocabulary is smaller)
    for engines that insist on one."""
    torch.manual_seed(seed)
    with model_directory(None) as config_path:
        hf_config = AutoConfig.from_pretrained(config_path)
    AutoModelForCausalLM.from_config(hf_config).to(torch.bfloat16).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(__file__).parent / "assets" / "nano-qwen3" / name, path)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.save_checkpoint:
        return save_checkpoint(Path(args.save_checkpoint), args.seed)
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # to stderr: which attention, and what start-up takes
    with model_directory(args.model) as model:
        try:
            complete(args)
            if args.structured and not args.model:
                save_tokenizer(Path(model), QWEN3_0_6B["vocab_size"])
            config = None if args.control_plane else make_config(args, model)
        except (TypeError, ValueError) as error:
            parser.error(str(error))
        if args.control_plane:
            figures, report = control_plane(args), CONTROL_PLANE_REPORT
        elif args.shared_prefix_len:
            figures, report = shared_prefix(args, config), SHARED_PREFIX_REPORT
        elif args.structured:
            figures, report = structured(args, config), STRUCTURED_REPORT
        elif args.sampling:
            figures, report = sampling(args, config), SAMPLING_REPORT
        elif args.parts:
            figures, report = parts(args, config), PARTS_REPORT
        else:
            figures, report = throughput(args, config), THROUGHPUT_REPORT
    if args.json:
        print(json.dumps(figures))
    else:
        show(figures, report)


if __name__ == "__main__":
    main()
