"""Any number of prompts, in the order in which they finish; and what the engine says of itself."""

import math
import threading
import weakref

import pytest

from helpers import DEMO_MODEL, random_prompts, save_model
from nanovllm import LLM, SamplingParams
from nanovllm.engine.inputs import SLICE

SETTINGS = {"kvcache_block_size": 16, "num_kvcache_blocks": 60, "dtype": "float32", "device": "cpu", "max_num_seqs": 4}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    with LLM(str(path), **SETTINGS) as llm:
        yield llm


def in_order(outputs) -> list:
    return sorted(outputs, key=lambda output: output.index)


def test_each_prompt_gets_what_generate_gives_it(llm):
    prompts = random_prompts([3, 40, 17, 5, 90, 33, 16, 15] * 80)  # more than a slice
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=1 + i % 7, ignore_eos=True) for i in range(640)]
    expected = llm.generate(prompts, params, use_tqdm=False)
    outputs = list(llm.generate_unordered(zip(prompts, params, strict=True)))
    assert [output.index for output in outputs] != list(range(640))  # those with fewer tokens are done earlier
    for i, output in enumerate(in_order(outputs)):
        assert output.index == i and {**output, "num_cached_tokens": 0, "index": 0} == {
            **expected[i],
            "num_cached_tokens": 0,
        }


def test_unseeded_requests_draw_as_in_generate(tmp_path):
    save_model(tmp_path)
    prompts, drawn = random_prompts([5, 9, 13]), []
    for method in ("generate", "generate_unordered"):
        with LLM(str(tmp_path), **SETTINGS) as llm:
            outputs = getattr(llm, method)(prompts, SamplingParams(max_tokens=8, ignore_eos=True))
            drawn.append([output.token_ids for output in (outputs if method == "generate" else in_order(outputs))])
    assert drawn[0] == drawn[1]


def test_prompts_are_read_only_as_far_ahead_as_there_is_room(llm):
    num_read = 0

    def prompts():
        nonlocal num_read
        while True:
            num_read += 1
            yield [7, 8, 9]

    outputs = llm.generate_unordered(prompts(), SamplingParams(max_tokens=1))
    lead = SETTINGS["max_num_seqs"] + 2 * SLICE
    for num_yielded in range(2000):
        assert num_read <= num_yielded + lead + 1
        next(outputs)
    outputs.close()
    assert llm.stats()["running"] == llm.stats()["waiting"] == llm.stats()["blocks_used"] == 0


def test_an_iterable_that_waits_for_an_answer_gets_it(llm):
    answered = threading.Event()

    def prompts():
        yield [5, 6]
        assert answered.wait(30)
        yield [6, 7]

    outputs = llm.generate_unordered(prompts(), SamplingParams(max_tokens=2))
    assert next(outputs).index == 0
    answered.set()
    assert [output.index for output in outputs] == [1]


def test_a_prompt_that_cannot_run_is_an_output_that_says_so(llm):
    items = [[5], [], [10**6], 5, {"a": 1}, [1.5], [5] * 600, "text", ([5], SamplingParams(stop="x")), None, [6]]
    outputs = in_order(llm.generate_unordered(items, SamplingParams(max_tokens=2)))
    assert [output.index for output in outputs] == list(range(len(items)))
    assert [i for i, output in enumerate(outputs) if output.finish_reason != "error"] == [0, 10]
    reasons = "empty", "outside the vocabulary", "TypeError", "prompt_token_ids", "token ids", "max_model_len"
    for output, reason in zip(outputs[1:], [*reasons, "no tokenizer", "tokenizer", "string"], strict=False):
        assert reason in output.error and output.outputs[0].error == output.error and output.text == ""


def test_texts_with_and_without_a_template_are_mixed():
    with LLM(str(DEMO_MODEL), dtype="float32", device="cpu", num_kvcache_blocks=64) as llm:
        rendered = llm._render([{"role": "user", "content": "hi"}], True, None, {})[0]
        greedy = SamplingParams(temperature=0, max_tokens=4)
        outputs = in_order(llm.generate_unordered([rendered, "hi", rendered, [5]], greedy))
        assert outputs[0] == outputs[2] | {"index": 0, "num_cached_tokens": outputs[0].num_cached_tokens}
        assert outputs[1].prompt_token_ids == llm.tokenizer("hi")["input_ids"]


def test_what_the_iterable_raises_ends_the_call(llm):
    def prompts():
        yield from [[5, 6]] * 10
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(llm.generate_unordered(prompts(), SamplingParams(max_tokens=400, ignore_eos=True)))
    assert llm.stats()["running"] == llm.stats()["waiting"] == 0
    for wrong in (5, "text", None):
        with pytest.raises(TypeError, match="iterable of prompts"):
            llm.generate_unordered(wrong)


def test_no_prompt_stays_in_memory(llm):
    class Prompt(list):
        __hash__ = object.__hash__
        __eq__ = object.__eq__

    alive, most = weakref.WeakSet(), 0

    def prompts():
        for _ in range(3000):
            prompt = Prompt([5, 6, 7])
            alive.add(prompt)
            yield prompt

    for _ in llm.generate_unordered(prompts(), SamplingParams(max_tokens=1)):
        most = max(most, len(alive))
    assert 0 < most <= SETTINGS["max_num_seqs"] + 2 * SLICE + 2


def test_stats_count_what_was_done(tmp_path):
    save_model(tmp_path)
    with LLM(str(tmp_path), **SETTINGS) as llm:
        assert not any(value for key, value in llm.stats().items() if key not in ("blocks_free", "step_times"))
        [prompt] = random_prompts([70])
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        for _ in range(2):
            llm.generate([prompt], params, use_tqdm=False)
        assert llm.is_finished()  # which is asked between two steps: the last one is counted
        stats = llm.stats()
        expected = {
            "running": 0, "waiting": 0, "blocks_used": 0, "blocks_free": 60, "blocks_cached": 4, "preemptions": 0,
            "prompt_tokens": 140, "cached_prompt_tokens": 64, "output_tokens": 10,
            "prefill_tokens": 70 + 6, "decode_tokens": 8, "prefix_hit_rate": 64 / 140,
        }  # fmt: skip
        assert {key: stats[key] for key in expected} == expected
        assert stats["prefill_seconds"] > 0 < stats["decode_seconds"]
        assert sum(stats["step_times"].values()) == 10 and list(stats["step_times"])[-1] == math.inf
        for _ in range(2):
            llm.add_request(prompt, params)
        assert not llm.is_finished()  # they have arrived
        assert (llm.stats()["running"], llm.stats()["waiting"]) == (0, 2)
        llm.step()
        assert llm.stats()["running"] >= 1 and llm.stats()["blocks_used"] >= 5
