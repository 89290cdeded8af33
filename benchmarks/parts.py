"""Where the time of prefill and decode goes, by the CPU's kernels."""

from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from unittest.mock import patch

from benchmarks.machine import measure_rates
from benchmarks.model_cost import cache_row_bytes
from benchmarks.options import engine_options
from benchmarks.workload import Figures, lengths_of, make_workload
from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.kernels import cpu as cpu_kernels

PART_OF = {  # of a kernel
    "linear_bf16": "products", "linear_int8": "products", "linear_int4": "products",
    "attend": "attention", "attend_int8": "attention", "store_kv": "attention", "store_kv_int8": "attention",
    "sample": "sampling", "token_logprobs": "sampling",
}  # fmt: skip
PARTS = ("products", "attention", "sampling", "small operations", "Python, rest")
REPORT = [
    ("engine", "{engine}, {dtype}"),
    ("workload", "{num_seqs} prompts, inputs {min_input_len}-{max_input_len}, outputs {min_output_len}-"
                 "{max_output_len}"),
    ("", "prefill   decode"),
    ("seconds", "{prefill_seconds:7.2f}  {decode_seconds:7.2f}"),
    *((part, f"{{prefill {part}:6.1f}}%  {{decode {part}:6.1f}}%") for part in PARTS),
    ("attention reads", "       -  {decode_attention_gbytes_per_s:7.1f} GB/s of {gbytes_per_s:.1f}"),
]  # fmt: skip


@contextmanager
def watched_kernels(row_bytes: int) -> Iterator[Counter]:
    """Sums up, while it is open, the seconds of each part, and as "bytes" the keys and values that attention reads."""
    call, spent = cpu_kernels.call, Counter()

    def timed_call(name: str, *arguments: object) -> None:
        start = perf_counter()
        call(name, *arguments)
        spent[PART_OF.get(name, "small operations")] += perf_counter() - start
        if name in ("attend", "attend_int8"):  # of all tokens that the step sees
            lens, num_kv_heads = arguments[5], arguments[10]
            spent["bytes"] += int(lens.sum()) * 2 * num_kv_heads * row_bytes

    with patch.object(cpu_kernels, "call", timed_call):
        yield spent


def measure(args: Namespace, config: Config) -> Figures:
    """Eager, as one cannot look into a recording."""
    llm = LLM(str(config.model_path), **engine_options(args) | {"enforce_eager": True})
    workload = make_workload(lengths_of(args), args.seed, config.hf_config.vocab_size)
    for prompt, n in zip(workload.prompts, workload.output_lens, strict=True):
        llm.add_request(prompt, SamplingParams(args.temperature, max_tokens=n, ignore_eos=True))
    phases = {"prefill": Counter(), "decode": Counter()}
    with watched_kernels(cache_row_bytes(config)) as spent:
        while not llm.is_finished():
            spent.clear()
            start = perf_counter()
            _, num_tokens = llm.step()
            seconds = perf_counter() - start
            phases["prefill" if num_tokens > 0 else "decode"].update(spent, seconds=seconds)
    figures: Figures = lengths_of(args)._asdict() | {"weights": args.quantization or ""}
    for phase, total in phases.items():
        total["Python, rest"] = total["seconds"] - sum(total[part] for part in PARTS)
        figures |= {f"{phase} {part}": 100 * total[part] / total["seconds"] for part in PARTS}
        figures[f"{phase}_seconds"] = total["seconds"]
        figures[f"{phase}_attention_gbytes_per_s"] = total["bytes"] / max(total["attention"], 1e-9) / 1e9
    return figures | {"gbytes_per_s": measure_rates(config)[1] / 1e9}
