"""Completes the prompts of a Parquet file, or of a directory of them, on a Ray cluster, and writes Parquet.

    python examples/ray_parquet.py questions.parquet answers --column question --model Qwen/Qwen3-0.6B --replicas 4

The cluster is the one that RAY_ADDRESS names, else this machine. Beside the columns that were there, the answers have
`generated_text`, `finish_reason` and `error`.
"""

import argparse
from pathlib import Path

import ray

from nanovllm import SamplingParams
from nanovllm.ray import build_processor

DEMO_MODEL = Path(__file__).parent.parent / "assets" / "nano-qwen3"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input")
    parser.add_argument("output", help="a directory")
    parser.add_argument("--column", default="prompt", help="of the prompts")
    parser.add_argument("--model", default=str(DEMO_MODEL))
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--replicas", type=int, default=1)
    args = parser.parse_args(arguments)
    process = build_processor(
        args.model,
        SamplingParams(temperature=0, max_tokens=args.max_tokens),
        prompt_column=args.column,
        concurrency=args.replicas,
    )
    process(ray.data.read_parquet(args.input)).write_parquet(args.output)


if __name__ == "__main__":
    main()
