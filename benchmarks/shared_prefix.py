"""What the prefix cache saves: the prefill of prompts that share nothing, and of as many that share most of theirs."""

from argparse import Namespace

from benchmarks.workload import Figures, Generate, Lengths, Workload, make_workload, timed
from nanovllm.config import Config

SUFFIX_LEN = 32  # of each prompt after the shared prefix
REPORT = [
    ("engine", "{engine}, {dtype}, {device}"),
    ("prompts", "{num_seqs} of {shared_prefix_len} + {suffix_len} tokens, blocks of {kvcache_block_size}"),
    ("nothing shared", "{distinct_seconds:11,.3f} s  ({distinct_tokens_computed} tokens computed)"),
    ("prefix shared", "{shared_seconds:11,.3f} s  ({shared_tokens_computed} tokens computed)"),
    ("", "{times_faster:11,.2f} times faster"),
]


def measure(args: Namespace, config: Config, generate: Generate) -> Figures:
    """Seconds to prefill prompts that share nothing, and as many that share all but their last tokens."""
    n, length = args.num_seqs, args.shared_prefix_len
    total = length + SUFFIX_LEN
    lengths = Lengths(2 * n + 1, total, total, 1, 1)
    warmup, *prompts = make_workload(lengths, args.seed, config.hf_config.vocab_size).prompts
    shared = [prompts[n][:length] + prompt[length:] for prompt in prompts[n:]]
    for _ in range(2):  # the second time with a cached prefix, so that nothing is run for the first time later
        generate(Workload([warmup], [1]))
    figures: Figures = {"num_seqs": n, "shared_prefix_len": length, "suffix_len": SUFFIX_LEN}
    figures["kvcache_block_size"] = args.kvcache_block_size or "the default size"
    for name, group in (("distinct", prompts[:n]), ("shared", shared)):
        run = timed(generate, Workload(group, [1] * n))
        figures |= {f"{name}_seconds": run["seconds"], f"{name}_tokens_computed": run.get("prefill_tokens", "?")}
    return figures | {"times_faster": figures["distinct_seconds"] / figures["shared_seconds"]}
