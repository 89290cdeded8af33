"""A file of requests, a file of answers: the job can be interrupted at any moment, and the same call goes on with it.

Each line is a prompt or a list of messages with sampling parameters of its own, or a request in OpenAI's batch format.
A line that cannot be answered becomes an error record, and the others go on.

    python examples/batch_file.py [MODEL]
"""

import json
import sys
import tempfile
from pathlib import Path

from nanovllm import batch

model = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "assets" / "nano-qwen3"
requests: list[dict[str, object]] = [
    {"custom_id": f"sum-{a}", "messages": [{"role": "user", "content": f"what is {a} + 425?"}]} for a in range(510, 520)
]
requests.append({"custom_id": "hot", "prompt": "once", "temperature": -1})

with tempfile.TemporaryDirectory() as directory:
    source, target = Path(directory, "requests.jsonl"), Path(directory, "answers.jsonl")
    source.write_text("".join(json.dumps(request) + "\n" for request in requests))
    for run in ("first", "second"):  # the second has nothing left to do
        summary = batch.run(str(source), str(target), str(model), defaults={"temperature": 0}, in_order=True)
        num_tokens = summary["output_tokens"]
        print(f"{run} run: {summary['answered']} answered, {summary['failed']} failed, {num_tokens} tokens computed")
    for record in map(json.loads, target.read_text().splitlines()):
        if record["error"]:
            print(f"{record['custom_id']}: error: {record['error']['message']}")
        else:
            print(f"{record['custom_id']}: {record['response']['body']['choices'][0]['message']['content']}")
