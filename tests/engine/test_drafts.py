"""Guesses of the next tokens: what is guessed, how much, and that outputs are those without guesses."""

import random
from array import array

import numpy as np
import pytest

from helpers import DEMO_MODEL, random_prompts, reference_tokens, save_model
from nanovllm import LLM, SamplingParams
from nanovllm.engine.drafts import NGRAMS, Drafter, look_up
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels.cpu.compiled import load_kernels

KEYS = "token_ids", "text", "finish_reason", "stop_reason", "logprobs", "cumulative_logprob"


def look_up_plainly(token_ids: list[int], most: int) -> tuple[int, ...]:
    for n in NGRAMS:
        for start in reversed(range(len(token_ids) - n)):
            if token_ids[start : start + n] == token_ids[-n:]:
                longer = list(token_ids)
                for i in range(most):
                    longer.append(longer[start + n + i])
                return tuple(longer[len(token_ids) :])
    return ()


@pytest.mark.parametrize("scale", [1, 2**8, 2**16, 2**24])
def test_a_look_up_finds_the_latest_occurrence(scale):
    """Of tokens whose bytes occur between those of others, too."""
    rng, num_found = random.Random(scale), 0
    for _ in range(500):
        token_ids = [rng.randrange(3) * scale for _ in range(rng.randrange(1, 30))]
        found = look_up(array("i", token_ids), 5)
        assert found == look_up_plainly(token_ids, 5)
        num_found += bool(found)
    assert 200 < num_found < 500


def taught(seconds: dict[int, float], chance: float, num_seqs: int) -> tuple[Drafter, np.ndarray]:
    drafter = Drafter(4, 64)
    for num_tokens, time in seconds.items():
        for _ in range(3):
            drafter.observe(num_tokens, time)
    return drafter, np.full(num_seqs, chance)


@pytest.mark.parametrize(
    ("seconds", "chance", "num_seqs", "expected"),
    [
        ({}, 0.9, 1, 0),  # nothing is known
        ({1: 1.0}, 0.5, 1, 4),  # that it takes longer is not known
        ({1: 1.0, 5: 1.1}, 0.5, 1, 4),
        ({1: 1.0, 5: 3.0}, 0.2, 1, 0),
        ({1: 1.0, 5: 3.0}, 0.99, 1, 4),
        ({8: 1.0, 40: 5.0}, 0.9, 8, 0),  # busy: each token takes as long as another
        ({8: 1.0, 40: 2.0}, 0.9, 8, 4),
        ({64: 1.0}, 0.9, 64, 0),  # no room
    ],
)
def test_so_many_tokens_are_guessed_as_pay(seconds, chance, num_seqs, expected):
    drafter, chances = taught(seconds, chance, num_seqs)
    assert drafter._best_counts(chances, num_seqs).tolist() == [expected] * num_seqs


def test_the_sequences_whose_guesses_come_true_get_more_of_them():
    drafter, _ = taught({2: 1.0, 10: 1.9}, 0, 2)
    counts = drafter._best_counts(np.array([0.95, 0.1]), 2)
    assert counts[0] == 4 and counts[1] == 0


def test_a_size_that_was_slow_once_is_tried_again():
    drafter, chances = taught({1: 1.0, 5: 9.0}, 0.6, 1)
    assert drafter._best_counts(chances, 1) == 0
    for _ in range(3000):
        drafter.observe(1, 1.0)
    assert drafter._best_counts(chances, 1) > 0


def test_chances_are_learned_and_forgotten():
    drafter, seq = Drafter(4, 64), Sequence(0, [1, 2, 3], SamplingParams())
    for _ in range(20):
        drafter.learn(seq, 4, 4)
    assert (seq.drafts_right + 1) / (seq.drafts_checked + 2) > 0.95
    for _ in range(20):
        drafter.learn(seq, 0, 4)
    assert (seq.drafts_right + 1) / (seq.drafts_checked + 2) < 0.4
    for _ in range(60):
        drafter.learn(seq, 0, 0)
    assert abs((seq.drafts_right + 1) / (seq.drafts_checked + 2) - 0.5) < 0.03


@pytest.fixture
def always(monkeypatch):
    """As many guesses as there may be, whatever they cost."""
    monkeypatch.setattr(Drafter, "_best_counts", lambda self, chances, num_tokens: np.full(len(chances), self.most))


PRESSURES = {
    "plain": {},
    "chunked": {"max_num_batched_tokens": 11},
    "preempted": {"num_kvcache_blocks": 13},
    "few-at-once": {"max_num_seqs": 2},
    "eager": {"enforce_eager": True, "speculative_tokens": 1},
}


@pytest.mark.parametrize("pressure", PRESSURES)
def test_greedy_tokens_equal_transformers(tmp_path, always, pressure):
    model = save_model(tmp_path)
    prompts = [[*prompt, *prompt, *prompt][:60] for prompt in random_prompts([1, 5, 8, 23, 24, 25, 60])]
    expected = [reference_tokens(model, prompt, 40) for prompt in prompts]
    settings = {"num_kvcache_blocks": 200, "speculative_tokens": 6} | PRESSURES[pressure]
    with LLM(str(tmp_path), kvcache_block_size=8, dtype="float32", device="cpu", **settings) as llm:
        llm.scheduler.output_ratio = 0.0
        for _ in range(2):  # the second time everything is in the prefix cache
            outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
            assert [output["token_ids"] for output in outputs] == expected
        stats = llm.stats()
        assert (stats["preemptions"] > 0) == (pressure == "preempted")
        assert stats["blocks_used"] == 0
        assert stats["decode_tokens"] > stats["output_tokens"]


OPTIONS = {
    "greedy": {"temperature": 0, "max_tokens": 60, "ignore_eos": True},
    "sampled": {"temperature": 0.8, "seed": 5, "max_tokens": 40, "ignore_eos": True},
    "filters": {"temperature": 1.0, "seed": 5, "top_k": 5, "top_p": 0.9, "max_tokens": 40, "ignore_eos": True},
    "logprobs": {"temperature": 0, "logprobs": 2, "prompt_logprobs": 1, "max_tokens": 40},
    "penalties": {"temperature": 0, "repetition_penalty": 1.05, "frequency_penalty": 0.1, "min_tokens": 20},
    "bad words": {"temperature": 0, "bad_words": ["a", "1"], "max_tokens": 40, "ignore_eos": True},
    "stop strings": {"temperature": 0.5, "seed": 1, "stop": ["a small", "II", "1 "], "max_tokens": 60},
    "stop tokens": {"temperature": 0, "stop_token_ids": list(range(40, 80)), "min_tokens": 4, "ignore_eos": True},
    "several": {"temperature": 0.9, "seed": 2, "n": 3, "max_tokens": 30},
    "callable": {"temperature": 0, "max_tokens": 20, "logits_processors": [lambda ids, logits: logits.roll(len(ids))]},
}
PROMPTS = ["def area(a, b):\n    return a * b\n" * 4, "Sort: 5 3 1 9 8 2", "Who are you?", "1 2 3 1 2 3 1 2"]


@pytest.mark.skipif(load_kernels() is None, reason="no kernels for this processor, or no compiler")
@pytest.mark.parametrize("option", OPTIONS)
def test_outputs_equal_those_without_guesses(always, option):
    """Bit for bit, since the kernels for CPUs make the same logits whatever is computed beside them."""
    outputs = []
    for settings in ({}, {"speculative_tokens": 5}, {"speculative_tokens": 5, "num_kvcache_blocks": 12}):
        with LLM(str(DEMO_MODEL), device="cpu", kvcache_block_size=64, max_model_len=512, **settings) as llm:
            made = llm.generate(PROMPTS, SamplingParams(**OPTIONS[option]), use_tqdm=False)
            stats = llm.stats()
        num_guessed = stats["decode_tokens"] - stats["output_tokens"]
        assert num_guessed < 30 or settings
        outputs.append([[{key: c[key] for key in KEYS} for c in output["outputs"]] for output in made])
        if settings and option in ("greedy", "sampled", "filters"):
            assert num_guessed > 20
    assert outputs[0] == outputs[1] == outputs[2]
