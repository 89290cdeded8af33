"""From texts to records: whatever the model, what it writes is JSON that fits the schema.

The demo model has never seen JSON, so only the form of its records is right; a model such as Qwen/Qwen3-0.6B fills it
with what the text says. Needs llguidance: pip install "nanovllm[structured]".

    python examples/json_extraction.py [MODEL]
"""

import json
import sys
from pathlib import Path

from nanovllm import LLM, SamplingParams, StructuredOutputs

model = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "assets" / "nano-qwen3"
llm = LLM(model)
person = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": ["integer", "null"], "minimum": 0, "maximum": 150},
        "city": {"enum": ["Oslo", "Rome"]},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
schema = {"type": "array", "items": person, "minItems": 1, "maxItems": 3}
params = SamplingParams(temperature=0, max_tokens=512, structured_outputs=StructuredOutputs(json=schema))
texts = ["Ada (36) and her brother Tom live in Rome.", "Nobody was there but Kari, of Oslo."]
chats = [[{"role": "user", "content": f"List the persons in this text as JSON: {text}"}] for text in texts]

outputs = llm.chat(chats, params, use_tqdm=False, chat_template_kwargs={"enable_thinking": False})
for text, output in zip(texts, outputs, strict=True):
    assert output.finish_reason == "stop"  # "length" would be the beginning of such a list
    print(text)
    for record in json.loads(output.text):
        print(f"  {record}")
llm.exit()
