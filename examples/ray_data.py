"""A stage of a Ray Data pipeline: replicas of the model, spread over a cluster, answer a dataset's rows.

The cluster is the one that RAY_ADDRESS names, else this machine. Real data would come from `ray.data.read_parquet` and
go to `write_parquet`. Needs Ray: pip install "nanovllm[ray]".

    python examples/ray_data.py [MODEL]
"""

import sys
from pathlib import Path

from nanovllm import SamplingParams

try:
    import ray.data
except ImportError:
    sys.exit('this example needs Ray: pip install "nanovllm[ray]"')

from nanovllm.ray import build_processor

model = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "assets" / "nano-qwen3"
process = build_processor(
    str(model),
    SamplingParams(temperature=0, max_tokens=64),
    messages_column="messages",
    concurrency=1,  # replicas
)
rows = [{"row": a, "messages": [{"role": "user", "content": f"what is {a} + 425?"}]} for a in range(510, 520)]
rows.append({"row": 0, "messages": [{"role": "user", "content": "1, " * 3000}]})  # too long: an error of this row alone
for row in sorted(process(ray.data.from_items(rows)).take_all(), key=lambda row: row["row"]):
    print(f"{row['row']}: {row['generated_text'] or row['error']}")
