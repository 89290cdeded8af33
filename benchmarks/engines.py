"""Engines to compare nanovllm with: each is opened once, and then generates workloads."""

import importlib.util
from argparse import Namespace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.workload import Figures, Generate, Workload
from nanovllm.config import Config
from nanovllm.utils.device import default_threads


def open_transformers(args: Namespace, config: Config) -> Generate:
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


def open_vllm(args: Namespace, config: Config) -> Generate:
    """Its own block size and cache size unless others are asked for."""
    import vllm

    same = ("enforce_eager", "load_format", "max_num_seqs", "max_num_batched_tokens", "seed")
    options = {name: getattr(args, name) for name in same}
    if args.kvcache_block_size is not None:
        options["block_size"] = args.kvcache_block_size
    if args.num_kvcache_blocks != -1:
        options["num_gpu_blocks_override"] = args.num_kvcache_blocks
    dtype = str(config.dtype).removeprefix("torch.")
    options |= {"dtype": dtype, "max_model_len": config.max_model_len} | args.engine_args
    llm = vllm.LLM(str(config.model_path), skip_tokenizer_init=True, **options)
    common = {"temperature": args.temperature, "ignore_eos": True, "detokenize": False}

    def generate(workload: Workload) -> Figures:
        prompts = [{"prompt_token_ids": prompt} for prompt in workload.prompts]
        params = [vllm.SamplingParams(max_tokens=n, **common) for n in workload.output_lens]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return {"output_tokens": sum(len(output.outputs[0].token_ids) for output in outputs)}

    return generate


def open_openvino(args: Namespace, config: Config) -> Generate:
    """OpenVINO GenAI's continuous batching of a model that `optimum-cli export openvino` made; the cache grows."""
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs, scheduler.max_num_batched_tokens = args.max_num_seqs, args.max_num_batched_tokens
    precision = {torch.bfloat16: "bf16", torch.float16: "f16"}.get(config.dtype, "f32")
    properties = {"INFERENCE_PRECISION_HINT": precision} | args.engine_args
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(config.model_path), scheduler, "CPU", properties)
    common = {"ignore_eos": True, "do_sample": args.temperature > 0, "rng_seed": args.seed}
    if args.temperature > 0:
        common |= {"temperature": args.temperature, "top_p": 1.0}

    def generate(workload: Workload) -> Figures:
        prompts = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in workload.prompts]
        params = [openvino_genai.GenerationConfig(max_new_tokens=n, **common) for n in workload.output_lens]
        return {"output_tokens": sum(len(out.m_generation_ids[0]) for out in pipeline.generate(prompts, params))}

    return generate


def open_llama_cpp(args: Namespace, config: Config) -> Generate:
    """Prompts one after the other, each with all cores: llama-cpp-python's `Llama` holds a single sequence."""
    import llama_cpp

    threads = default_threads()
    options = {"n_ctx": config.max_model_len, "n_threads": threads, "n_threads_batch": threads, "seed": args.seed}
    llm = llama_cpp.Llama(args.model, verbose=False, **options | args.engine_args)
    common = {"temp": args.temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0}

    def generate(workload: Workload) -> Figures:
        requests = zip(workload.prompts, workload.output_lens, strict=True)
        made = [len([*islice(llm.generate(prompt, **common), n)]) for prompt, n in requests]  # no token ends it
        return {"output_tokens": sum(made)}

    return generate


OTHER_ENGINES = {
    "transformers": open_transformers, "vllm": open_vllm, "openvino": open_openvino, "llama_cpp": open_llama_cpp,
}  # fmt: skip
PACKAGES = {"vllm": "vllm", "openvino": "openvino_genai", "llama_cpp": "llama_cpp"}  # nanovllm does not require them


def check_engine(args: Namespace) -> None:
    """Raises ValueError unless --engine is installed, and --model and --engine-args are ones for it."""
    package = PACKAGES.get(args.engine)
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(f"--engine {args.engine} needs the package {package}, which is not installed")
    if args.engine == "openvino" and not (args.model and Path(args.model, "openvino_model.xml").is_file()):
        raise ValueError("--engine openvino needs a --model that `optimum-cli export openvino` made")
    if args.engine == "llama_cpp" and not (args.model and Path(args.model).is_file()):
        raise ValueError("--engine llama_cpp needs a --model FILE.gguf, with the model's config.json beside it")
    if args.engine_args and args.engine not in PACKAGES:
        raise ValueError(f"--engine-args are for {', '.join(PACKAGES)}, not for {args.engine}")
