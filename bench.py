"""Throughput on random token ids, beside the least time that this machine's arithmetic and memory would allow.

    python bench.py                                  # the shape of Qwen3-0.6B, random weights, nothing to download
    python bench.py --model Qwen/Qwen3-0.6B          # real weights: a directory or an id of the hub
    python bench.py --model DIR --load-format dummy  # random weights in the shape that DIR/config.json describes
    python bench.py --engine transformers            # the same workload through another: vllm, openvino, llama_cpp
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

import gc
import heapq
import json
import logging
import string
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter, time

import numpy as np
import psutil
import torch

from benchmarks import control_plane, parts, sampling, shared_prefix, structured
from benchmarks.checkpoint import model_directory, save_checkpoint
from benchmarks.engines import OTHER_ENGINES
from benchmarks.machine import measure_rates, peak_memory
from benchmarks.model_cost import ModelCost, cache_row_bytes, weight_bits
from benchmarks.options import complete, engine_options, make_config, make_parser
from benchmarks.workload import Figures, Generate, Report, Workload, lengths_of, make_workload, timed
from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.utils.device import default_threads
from nanovllm.utils.timeline import record
from nanovllm.utils.timeline_svg import draw


def open_engine(args: Namespace, config: Config) -> Generate:
    return OTHER_ENGINES.get(args.engine, open_nanovllm)(args, config)


def open_nanovllm(args: Namespace, config: Config) -> Generate:
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


def floor_seconds(
    workload: Workload, cost: ModelCost, flop_rate: float, bandwidth: float, max_num_seqs: int
) -> tuple[float, float]:
    """The least seconds of prefill and of decode, as defined at the top of this file.

    Args:
        workload: What is computed.
        cost: FLOPs and bytes of the model.
        flop_rate: FLOP/s.
        bandwidth: Bytes/s.
        max_num_seqs: Most sequences in a decode step.
    """
    inputs, outputs = np.array([len(prompt) for prompt in workload.prompts]), np.array(workload.output_lens)
    flops = cost.flops(inputs.sum(), len(inputs), (inputs**2).sum() / 2)
    prefill = max(flops / flop_rate, cost.num_bytes(inputs.sum(), 0) / bandwidth)

    # The prefill gives each sequence its first token. Sequence i is in the decode steps starts[i] <= t < ends[i], in
    # step t with offsets[i] + t keys.
    starts = first_decode_steps(workload.output_lens, max_num_seqs)
    ends = starts + outputs - 1
    offsets = inputs + 1 - starts
    n = ends.max()
    num_seqs = (np.bincount(starts, minlength=n + 1) - np.bincount(ends, minlength=n + 1)).cumsum()[:n]
    num_keys = (np.bincount(starts, offsets, n + 1) - np.bincount(ends, offsets, n + 1)).cumsum()[:n]
    num_keys += num_seqs * np.arange(n)
    flops = cost.flops(num_seqs, num_seqs, num_keys)
    decode = np.maximum(flops / flop_rate, cost.num_bytes(num_seqs, num_keys) / bandwidth).sum()
    return float(prefill), float(decode)


def first_decode_steps(output_lens: list[int], max_num_seqs: int) -> np.ndarray:
    """The step in which each sequence begins when it takes the place of the first to finish."""
    ends: list[int] = []
    starts: list[int] = []
    for length in output_lens:
        starts.append(heapq.heappop(ends) if len(ends) == max_num_seqs else 0)
        heapq.heappush(ends, starts[-1] + length - 1)
    return np.array(starts)


def throughput(args: Namespace, config: Config) -> Figures:
    """An engine's rates on the workload, and the floor."""
    lengths = lengths_of(args)
    workload = make_workload(lengths, args.seed, config.hf_config.vocab_size)
    rates_before = measure_rates(config)  # and once more afterwards: other machines on the same host come and go
    figures = lengths._asdict() | {"prompt_tokens": workload.prompt_tokens} | generate_once(args, config, workload)
    gc.collect()  # the engine's memory goes before the machine is measured
    flop_rate, bandwidth = map(max, rates_before, measure_rates(config))
    cost = ModelCost(config.hf_config, config.dtype.itemsize, weight_bits(config), cache_row_bytes(config))
    prefill, decode = floor_seconds(workload, cost, flop_rate, bandwidth, config.max_num_seqs)
    seconds, num_tokens = figures["seconds"], workload.prompt_tokens + workload.output_tokens
    figures |= {"output_tokens_per_s": workload.output_tokens / seconds, "total_tokens_per_s": num_tokens / seconds}
    figures |= {"gflops": flop_rate / 1e9, "gbytes_per_s": bandwidth / 1e9, "floor_seconds": prefill + decode}
    figures |= {"prefill_floor_seconds": prefill, "decode_floor_seconds": decode}
    return figures | {"percent_of_floor": 100 * (prefill + decode) / seconds}


def generate_once(args: Namespace, config: Config, workload: Workload) -> Figures:
    """Opens the engine and gives it the workload: seconds, and memory."""
    start = perf_counter()
    generate = open_engine(args, config)
    generate(Workload([[1] * 16], [4]))
    startup_seconds, python_seconds = perf_counter() - start, time() - psutil.Process().create_time()
    with record(config.device) if args.timeline else nullcontext() as timeline:
        figures = timed(generate, workload)
    if timeline:
        is_picture = args.timeline.suffix == ".svg"
        args.timeline.write_text(draw(timeline.rows()) if is_picture else json.dumps(timeline.trace()))
    if args.engine != "vllm" or config.device.type == "cpu":  # its own process has allocated what is on CUDA
        figures["peak_gbytes"] = peak_memory(config.device) / 1e9
    return figures | {"startup_seconds": startup_seconds, "python_seconds": python_seconds}


def describe(args: Namespace, config: Config) -> Figures:
    device = torch.cuda.get_device_name(config.device) if config.device.type == "cuda" else "cpu"
    figures = {"engine": args.engine, "model": args.model or "the shape of Qwen3-0.6B"} | engine_options(args)
    dtype = str(config.dtype).removeprefix("torch.")
    return figures | {"dtype": dtype, "device": device, "threads": default_threads(), "temperature": args.temperature}


REPORT = [  # a line of which a figure is unknown is left out
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


def show(figures: Figures, report: Report) -> None:
    width = max(16, *(len(label) + 2 for label, _ in report))
    for label, template in report:
        if all(name in figures for _, name, _, _ in string.Formatter().parse(template) if name):
            print(f"{label:<{width}}{template.format(**figures)}")


def measure(args: Namespace, config: Config | None) -> tuple[Figures, Report]:
    """What the options ask for. `config` is None for what needs no model."""
    if args.control_plane:
        return control_plane.measure(args), control_plane.REPORT
    if args.shared_prefix_len:
        return shared_prefix.measure(args, config, open_engine(args, config)), shared_prefix.REPORT
    if args.structured:
        return structured.measure(args, config), structured.REPORT
    if args.sampling:
        return sampling.measure(args, config), sampling.REPORT
    if args.parts:
        return parts.measure(args, config), parts.REPORT
    return throughput(args, config), REPORT


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    args = parser.parse_args(argv)
    if args.save_checkpoint:
        return save_checkpoint(Path(args.save_checkpoint), args.seed)
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # to stderr: which attention, and what start-up takes
    with model_directory(args.model) as model:
        try:
            complete(args)
            config = None if args.control_plane else make_config(args, model)
        except (TypeError, ValueError) as error:
            parser.error(str(error))
        figures, report = measure(args, config)
    figures = (describe(args, config) if config else {}) | figures
    if args.json:
        print(json.dumps(figures))
    else:
        show(figures, report)


if __name__ == "__main__":
    main()
