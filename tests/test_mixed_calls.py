"""Random calls of every kind, one after another and through each other, on engines with tiny caches."""

import random
import shutil

import pytest
from transformers import AutoTokenizer

from helpers import DEMO_MODEL, reference_tokens, save_model
from nanovllm import LLM, BeamSearchParams, SamplingParams

NUM_ENGINES, NUM_CALLS = 15, 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = save_model(path, vocab_size=len(tokenizer), eos_token_id=2)
    for file in DEMO_MODEL.glob("tokenizer*"):
        shutil.copy(file, path)
    return path, model


class Calls:
    """What a busy script may do to one engine."""

    def __init__(self, llm: LLM, model, rng: random.Random, pool: list[list[int]]):
        self.llm, self.model, self.rng, self.pool = llm, model, rng, pool
        self.capacity = llm.config.num_kvcache_blocks * llm.config.kvcache_block_size
        self.streams = []

    def prompts(self) -> list[list[int]]:
        """Some that share prefixes, and that leave room for 20 tokens."""
        rng, chosen = self.rng, []
        for _ in range(rng.randrange(1, 7)):
            prompt = rng.choice(self.pool)
            if rng.random() < 0.5:
                prompt = prompt[: rng.randrange(1, len(prompt) + 1)] + [rng.randrange(3, 900) for _ in range(5)]
            chosen.append(prompt[: self.capacity - 20])
        return chosen

    def params(self) -> SamplingParams:
        pick = self.rng.choice
        return SamplingParams(
            temperature=pick([0.5, 1, 2]),
            max_tokens=self.rng.randrange(1, 20),
            n=pick([1, 1, 2, 4]),
            top_k=pick([0, 5]),
            top_p=pick([1, 0.8]),
            stop=pick([None, ["e"], ["a", "the"]]),
            logprobs=pick([None, 0, 2]),
            prompt_logprobs=pick([None, None, 1]),
            repetition_penalty=pick([1.0, 1.2]),
            seed=pick([None, 3]),
        )

    def generate(self) -> None:
        prompts = self.prompts()
        self.llm.generate(prompts, [self.params() for _ in prompts], use_tqdm=False)

    def generate_greedily(self) -> None:
        prompts = self.prompts()
        outputs = self.llm.generate(prompts, SamplingParams(temperature=0, max_tokens=15), use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            assert output["token_ids"] == reference_tokens(self.model, prompt, 15)

    def open_stream(self) -> None:
        prompts = self.prompts()
        stream = self.llm.generate_stream(prompts, [self.params() for _ in prompts])
        for _ in range(self.rng.randrange(6)):
            next(stream, None)
        self.streams.append(stream)

    def close_stream(self) -> None:
        if self.streams:
            self.streams.pop(self.rng.randrange(len(self.streams))).close()

    def beam_search(self) -> None:
        for output in self.llm.beam_search(self.prompts(), BeamSearchParams(beam_width=3, max_tokens=8), False):
            assert len(output["outputs"]) == 3

    def add_and_abort(self) -> None:
        ids = [self.llm.add_request(prompt, self.params()) for prompt in self.prompts()]
        for _ in range(self.rng.randrange(5)):
            self.llm.step()
        self.llm.abort(self.rng.choice(ids))

    def finish(self) -> None:
        for stream in self.streams:
            list(stream)
        while not self.llm.is_finished():
            self.llm.step()
        assert self.llm.block_manager.num_free_blocks == self.llm.config.num_kvcache_blocks
        assert not self.llm.scheduler.held and not self.llm._added


def test_any_mix_of_calls_gives_right_answers_and_leaves_nothing_behind(checkpoint):
    path, model = checkpoint
    rng = random.Random(0)
    pool = [[rng.randrange(3, 900) for _ in range(rng.randrange(1, 40))] for _ in range(6)]
    num_preemptions = 0
    for _ in range(NUM_ENGINES):
        settings = {
            "kvcache_block_size": rng.choice([4, 8]),
            "num_kvcache_blocks": rng.randrange(14, 40),
            "max_num_batched_tokens": rng.choice([9, 64, 1000]),
            "max_num_seqs": rng.choice([6, 16]),
        }
        with LLM(str(path), dtype="float32", device="cpu", **settings) as llm:
            calls = Calls(llm, model, rng, pool)
            kinds = (
                calls.generate,
                calls.generate_greedily,
                calls.open_stream,
                calls.close_stream,
                calls.beam_search,
                calls.add_and_abort,
            )
            for _ in range(NUM_CALLS):
                llm.scheduler.output_ratio = rng.choice([0.0, 1.0])
                rng.choice(kinds)()
            calls.finish()
            num_preemptions += llm.scheduler.num_preemptions
    assert num_preemptions > 0
