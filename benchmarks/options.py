"""bench.py's command line: what can be asked for, what is done by default, and what cannot be done."""

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch

from benchmarks.engines import OTHER_ENGINES, check_engine
from benchmarks.shared_prefix import SUFFIX_LEN
from benchmarks.workload import CLASSIC, SMALL, Lengths
from nanovllm import SamplingParams
from nanovllm.config import Config
from nanovllm.kernels import cpu as cpu_kernels
from nanovllm.utils.device import default_batched_tokens, resolve_device

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
    "kv_cache_dtype": "auto or int8 (nanovllm, on a CPU)",
}
CHOSEN = {"max_num_batched_tokens": "16384, on a CPU 1024", "kvcache_block_size": "64, for FlashAttention 2 256"}


def make_parser(description: str) -> ArgumentParser:
    formatter = partial(RawDescriptionHelpFormatter, max_help_position=32, width=120)
    parser = ArgumentParser(description=description, formatter_class=formatter)
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
    for name, classic, small in zip(Lengths._fields, CLASSIC, SMALL, strict=True):
        group.add_argument(flag(name), type=positive, metavar="N", help=f"classic {classic}, small {small}")
    group.add_argument("--num-steps", type=positive, metavar="N", default=400, help="of --control-plane (%(default)s)")
    group.add_argument("--seed", type=int, metavar="N", default=0, help="of all that is random (%(default)s)")
    group.add_argument("--temperature", type=float, metavar="T", default=0.6, help="0 is greedy (%(default)s)")
    add_engine_options(parser)
    return parser


def add_engine_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    text = "llama_cpp takes prompts one after the other (%(default)s)"
    group.add_argument("--engine", choices=("nanovllm", *OTHER_ENGINES), default="nanovllm", help=text)
    text = "a directory or an id of the hub, for llama_cpp a GGUF file (the shape of Qwen3-0.6B)"
    group.add_argument("--model", metavar="M", help=text)
    group.add_argument("--load-format", choices=("auto", "dummy"), help="dummy: random weights (auto with --model)")
    group.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    text = "a JSON object of the engine's own settings, such as arguments of vllm.LLM or properties of OpenVINO"
    group.add_argument("--engine-args", type=json.loads, metavar="JSON", default={}, help=text)
    defaults = {field.name: field.default for field in fields(Config)}
    for name, text in ENGINE_OPTIONS.items():
        default = defaults[name]
        kind = int if name in CHOSEN else str if default is None else type(default)
        shown = CHOSEN.get(name, default)
        group.add_argument(flag(name), type=kind, metavar="X", default=default, help=f"{text} ({shown})")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def complete(args: Namespace) -> None:
    """Fills in the defaults that depend on other arguments.

    Raises:
        ValueError: The arguments contradict each other or ask for what is not there.
    """
    check_engine(args)
    if args.timeline and args.timeline.suffix not in (".json", ".svg"):
        raise ValueError(f"--timeline {args.timeline} must end in .json or .svg")
    others = args.structured or args.parts or args.sampling or args.control_plane or args.shared_prefix_len
    if args.timeline and (args.engine != "nanovllm" or others):
        raise ValueError("--timeline is for the throughput of nanovllm")
    if args.sampling and args.engine != "nanovllm":
        raise ValueError("--sampling is for nanovllm")
    if args.load_format == "auto" and not args.model:
        raise ValueError("--load-format auto needs --model")
    args.load_format = args.load_format or ("auto" if args.model else "dummy")
    SamplingParams(args.temperature)
    device = resolve_device(args.device)
    args.max_num_batched_tokens = args.max_num_batched_tokens or default_batched_tokens(device)
    defaults = CLASSIC if args.control_plane or device.type == "cuda" else SMALL
    if args.shared_prefix_len:
        defaults = defaults._replace(num_seqs=32)
    for name, default in defaults._asdict().items():
        setattr(args, name, getattr(args, name) or default)
    for what in ("input", "output"):
        low, high = getattr(args, f"min_{what}_len"), getattr(args, f"max_{what}_len")
        if low > high:
            raise ValueError(f"--min-{what}-len {low} exceeds --max-{what}-len {high}")


def engine_options(args: Namespace) -> dict[str, int | str | bool]:
    """Keyword arguments of `Config` and `LLM`."""
    return {name: getattr(args, name) for name in (*ENGINE_OPTIONS, "enforce_eager", "load_format", "seed")}


def make_config(args: Namespace, model: str) -> Config:
    """The engine's settings, checked.

    Raises:
        TypeError, ValueError: See `Config`; also when the workload's sequences are too long for them.
    """
    directory = Path(model).parent if args.engine == "llama_cpp" else model
    config = Config(directory, **engine_options(args))
    longest = args.max_input_len + args.max_output_len
    if args.shared_prefix_len:
        longest = args.shared_prefix_len + SUFFIX_LEN + 1
    if longest > config.max_model_len:
        raise ValueError(f"sequences of {longest} tokens exceed --max-model-len {config.max_model_len}")
    has_kernels = config.device.type == "cpu" and config.dtype == torch.bfloat16 and cpu_kernels.load_kernels()
    if args.parts and not (args.engine == "nanovllm" and has_kernels):
        raise ValueError("--parts is for nanovllm in bfloat16 on a CPU that the kernels are compiled for")
    return config
