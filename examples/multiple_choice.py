"""Multiple-choice questions: which of four answers does the model find most likely?

python examples/multiple_choice.py                        # 200 sums, the demo model
python examples/multiple_choice.py --shots 20 --compare   # after 20 examples; and with prompt_logprobs instead
"""

import argparse
import random
from pathlib import Path
from time import perf_counter

from nanovllm import LLM, SamplingParams

DEMO_MODEL = Path(__file__).parent.parent / "assets" / "nano-qwen3"


def make_questions(num_questions: int, rng: random.Random) -> list[tuple[str, list[str]]]:
    """Sums, each with four answers of which the first is right."""
    pairs = [(rng.randrange(1000), rng.randrange(1000)) for _ in range(num_questions)]
    return [(f"what is {a} + {b}?", [f"{a} + {b} = {a + b + d}." for d in (0, 1, -10, 100)]) for a, b in pairs]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL))
    parser.add_argument("--load-format", default="auto", choices=("auto", "dummy"))
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--shots", type=int, default=0, help="questions with answers before each")
    parser.add_argument("--compare", action="store_true", help="score each answer with prompt_logprobs, too")
    args = parser.parse_args(arguments)
    llm, rng = LLM(args.model, load_format=args.load_format), random.Random(0)
    shots = "".join(f"{question} {answers[0]}\n" for question, answers in make_questions(args.shots, rng))
    questions = make_questions(args.questions, rng)
    template = llm.tokenizer.apply_chat_template
    prompts = [
        template([{"role": "user", "content": shots + question}], tokenize=False, add_generation_prompt=True)
        for question, _ in questions
    ]
    choices = [answers for _, answers in questions]
    llm.score(["2 + 3 ="], [[" 5"]], use_tqdm=False)  # warms up

    start = perf_counter()
    scores = llm.score(prompts, choices, use_tqdm=False)
    seconds = perf_counter() - start
    best = [max(range(4), key=lambda i: own[i].logprob) for own in scores]
    print(f"{best.count(0)} of {len(best)} right in {seconds:.2f} s")
    if args.compare:
        params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0)
        whole = [prompt + answer for prompt, answers in zip(prompts, choices, strict=True) for answer in answers]
        start = perf_counter()
        llm.generate(whole, params, use_tqdm=False)
        slower = perf_counter() - start
        print(f"{slower:.2f} s with prompt_logprobs of each prompt and answer, {slower / seconds:.1f} times as long")
    llm.exit()


if __name__ == "__main__":
    main()
