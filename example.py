"""Two prompts through the chat template, on any machine.

python example.py                   the demo model that comes with the repository
python example.py Qwen/Qwen3-0.6B   a model of the Hugging Face hub, or the path of a checkpoint directory
"""

import argparse
from pathlib import Path

from nanovllm import LLM, SamplingParams

DEMO_MODEL = Path(__file__).parent / "assets" / "nano-qwen3"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO_MODEL))
    llm = LLM(parser.parse_args().model)
    sampling_params = SamplingParams(temperature=0.6, max_tokens=256)
    prompts = ["introduce yourself", "list all prime numbers within 100"]
    chats = [
        llm.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    outputs = llm.generate(chats, sampling_params)
    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"\nPrompt: {prompt}\nCompletion: {output['text']}")


if __name__ == "__main__":
    main()
