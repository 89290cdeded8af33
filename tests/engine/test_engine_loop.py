"""Calls from several threads, interrupts, forks, and requests that fail alone."""

import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from helpers import default_interrupts, random_prompts, reference_tokens, save_model
from nanovllm import LLM, BeamSearchParams, GenerationError, SamplingParams
from nanovllm.engine import block_manager, inputs
from nanovllm.engine.request import Request

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SETTINGS = {"kvcache_block_size": 8, "num_kvcache_blocks": 60, "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def llm(checkpoint):
    with LLM(str(checkpoint[0]), **SETTINGS) as llm:
        yield llm
        assert llm.is_finished() and llm.block_manager.num_free_blocks == 60


def generate(llm, prompts, params=GREEDY, **kwargs):
    return llm.generate(prompts, params, use_tqdm=False, **kwargs)


@pytest.fixture
def batches(llm, monkeypatch):
    """How many sequences each step runs."""
    sizes, run = [], llm.model_runner.run
    monkeypatch.setattr(llm.model_runner, "run", lambda seqs, *args: sizes.append(len(seqs)) or run(seqs, *args))
    return sizes


# ---- threads


def test_calls_from_several_threads_are_batched_and_right(llm, checkpoint, batches):
    prompts = random_prompts([9, 30, 17, 44, 5, 21], seed=1)
    expected = [reference_tokens(checkpoint[1], prompt, 12) for prompt in prompts]
    params = SamplingParams(temperature=0, max_tokens=12)

    def call(i: int) -> bool:
        i %= len(prompts)
        if i % 3 == 0:
            pieces = llm.generate_stream([prompts[i]], params)
            return [token for piece in pieces for token in piece["token_ids"]] == expected[i]
        return generate(llm, [prompts[i]] * 2, params)[1]["token_ids"] == expected[i]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(60)))
    assert max(batches) > 2  # of different calls


def test_two_engines_in_two_threads_are_independent(tmp_path, checkpoint):
    """Of different shapes, so that a context or a buffer of the other would be noticed."""
    models = [(checkpoint[0], checkpoint[1]), (tmp_path, save_model(tmp_path, seed=1, num_hidden_layers=3))]
    prompts = random_prompts([9, 30, 17], seed=2)
    expected = [[reference_tokens(model, prompt, 10) for prompt in prompts] for _, model in models]

    def work(i: int) -> bool:
        with LLM(str(models[i][0]), **SETTINGS | {"kvcache_block_size": 4 + 4 * i}) as llm:
            params = SamplingParams(temperature=0, max_tokens=10)
            got = [[output["token_ids"] for output in generate(llm, prompts, params)] for _ in range(15)]
        return all(tokens == expected[i] for tokens in got)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(2)))


def test_steps_by_hand_go_on_beside_a_call_of_another_thread(llm):
    prompts = random_prompts([9, 30], seed=3)
    expected = [output["token_ids"] for output in generate(llm, prompts)]
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(generate, llm, prompts * 5)
        request_id = llm.add_request(prompts[0], GREEDY)
        outputs = []
        while not llm.is_finished():
            outputs += llm.step()[0]
    assert [output["token_ids"] for output in other.result()] == expected * 5
    assert [(output["request_id"], output["token_ids"]) for output in outputs] == [(request_id, expected[0])]


def test_exit_ends_the_calls_of_other_threads(checkpoint):
    llm = LLM(str(checkpoint[0]), **SETTINGS)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(generate, llm, [[5]] * 50, SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
        while not llm.scheduler.sequences:
            time.sleep(0.001)
        llm.exit()
        with pytest.raises(RuntimeError, match=r"closed by exit\(\)"):
            call.result(timeout=30)


def test_a_step_from_inside_a_step_is_refused(llm):
    def call_back(token_ids, logits):
        generate(llm, [[5]])

    with pytest.raises(GenerationError, match="from inside a step"):
        generate(llm, [[5]], SamplingParams(max_tokens=2, logits_processors=[call_back]))


# ---- interrupts and failures


def interrupted(delay: float, call) -> KeyboardInterrupt | None:
    """Runs `call` with a Ctrl-C after `delay` seconds; returns what it raised, None if it was quicker."""
    timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
    with default_interrupts():
        try:
            timer.start()
            call()
            timer.join()
            time.sleep(1)  # where it arrives if not before
        except KeyboardInterrupt as interrupt:
            return interrupt
    return None


@pytest.mark.parametrize("what", ["generate", "beam_search", "stream"])
def test_ctrl_c_at_any_time_leaves_nothing_behind(llm, what):
    rng = random.Random(4)
    prompts = random_prompts([rng.randrange(1, 30) for _ in range(700)], seed=4)
    expected = generate(llm, prompts[:2])
    calls = {
        "generate": lambda: generate(llm, prompts),
        "beam_search": lambda: llm.beam_search(prompts, BeamSearchParams(2, 9), use_tqdm=False),
        "stream": lambda: list(llm.generate_stream(prompts, GREEDY)),
    }
    num_interrupted = 0
    for _ in range(12):  # Python drops one that it raises inside a finalizer
        num_interrupted += interrupted(rng.choice([0.002, 0.02, 0.2]) * rng.random(), calls[what]) is not None
        assert not llm.scheduler.sequences and not llm.scheduler.held
        assert llm.is_finished() and llm.block_manager.num_free_blocks == 60
        assert [o["token_ids"] for o in generate(llm, prompts[:2])] == [o["token_ids"] for o in expected]
    assert num_interrupted >= 9


def test_ctrl_c_carries_the_finished_outputs(llm, monkeypatch):
    prompts = random_prompts([9, 30], seed=5)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 400)]
    [expected] = generate(llm, prompts[:1], params[0])
    interrupt = interrupted(0.15, lambda: generate(llm, prompts * 3, params * 3))
    outputs = interrupt.outputs
    assert [output and output["token_ids"] for output in outputs] == [expected["token_ids"], None] * 3


def test_ctrl_c_carries_what_had_finished_before_its_caller_heard(llm, monkeypatch):
    def interrupted_next_news(news, timeout):
        while news.empty():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm._loop, "next_news", interrupted_next_news)
    with pytest.raises(KeyboardInterrupt) as caught:
        generate(llm, [[5, 6]])
    assert len(caught.value.outputs[0]["token_ids"]) == GREEDY.max_tokens


@pytest.mark.parametrize("where", ["schedule", "postprocess"])
def test_an_exception_in_the_schedulers_own_code_loses_no_request(llm, where, monkeypatch):
    prompts = random_prompts([9, 30], seed=6)
    expected = [output["token_ids"] for output in generate(llm, prompts)]
    ids = [llm.add_request(prompt, GREEDY) for prompt in prompts]
    inner = {"schedule": "allocate", "postprocess": "publish"}[where]
    real, calls, outputs, num_errors = getattr(llm.block_manager, inner), [], [], 0

    def failing(*args):
        calls.append(1)
        if len(calls) % 3 == 2:
            raise MemoryError
        return real(*args)

    monkeypatch.setattr(llm.block_manager, inner, failing)
    while not llm.is_finished():
        try:
            outputs += llm.step()[0]
        except MemoryError:
            num_errors += 1
    assert num_errors
    assert {output["request_id"]: output["token_ids"] for output in outputs} == dict(zip(ids, expected, strict=True))


def test_a_step_that_fails_ends_every_call_with_its_error(llm, monkeypatch):
    def failing(*args):
        raise RuntimeError("no memory")

    monkeypatch.setattr(llm.model_runner, "run", failing)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(generate, llm, random_prompts([9, 30])) for _ in range(3)]
        for call in calls:
            with pytest.raises(RuntimeError, match="no memory"):
                call.result(timeout=30)
    assert llm.is_finished()


def fail_in_child(llm, answer):
    try:
        llm.generate([[5]], use_tqdm=False)
    except RuntimeError as error:
        answer.send(str(error))


def test_a_forked_child_is_told_to_make_its_own_engine(llm):
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=fail_in_child, args=(llm, sender))
    child.start()
    assert receiver.poll(30)
    assert "make an LLM in each process" in receiver.recv()
    child.join(30)
    assert child.exitcode == 0
    assert len(generate(llm, [[5]])) == 1


def test_an_engine_cannot_be_pickled(llm):
    with pytest.raises(TypeError, match="make an LLM in each process"):
        pickle.dumps(llm)


# ---- requests that fail alone


def failing_after(num_tokens: int):
    def process(token_ids, logits):
        if len(token_ids) == num_tokens:
            raise ZeroDivisionError("mine")
        return logits

    return SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logits_processors=[process])


def test_a_processor_that_raises_fails_its_request_alone(llm):
    prompts = random_prompts([9, 30, 17], seed=7)
    expected = [output["token_ids"] for output in generate(llm, prompts)]
    params = [GREEDY, failing_after(4), GREEDY]
    outputs = generate(llm, prompts, params, raise_on_error=False)
    assert [output["finish_reason"] for output in outputs] == ["length", "error", "length"]
    assert outputs[1]["error"] == "ZeroDivisionError: mine" and "error" not in outputs[0]
    assert [output["token_ids"] for output in outputs] == [expected[0], expected[1][:4], expected[2]]
    with pytest.raises(GenerationError, match=r"prompts\[1\] failed: ZeroDivisionError: mine") as caught:
        generate(llm, prompts, params)
    assert caught.value.outputs == outputs
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_processor_of_the_wrong_shape_fails_its_request_alone(llm):
    wrong = SamplingParams(max_tokens=3, logits_processors=[lambda token_ids, logits: logits[:5]])
    outputs = generate(llm, [[5], [6]], [wrong, GREEDY], raise_on_error=False)
    assert [output["finish_reason"] for output in outputs] == ["error", "length"]


def test_streams_and_steps_report_a_request_that_fails_alone(llm):
    prompts = random_prompts([9, 30], seed=8)
    params = [failing_after(2), GREEDY]
    pieces = list(llm.generate_stream(prompts, params, raise_on_error=False))
    last = {piece["index"]: piece for piece in pieces if piece["finish_reason"]}
    assert last[0]["error"] == "ZeroDivisionError: mine" and last[1]["finish_reason"] == "length"
    with pytest.raises(GenerationError, match=r"prompts\[0\]"):
        list(llm.generate_stream(prompts, params))
    llm.add_request(prompts[0], params[0])
    outputs = []
    while not llm.is_finished():
        outputs += llm.step()[0]
    assert [output["finish_reason"] for output in outputs] == ["error"]


def test_a_text_that_cannot_be_read_fails_its_request_alone(llm, monkeypatch):
    class Unreadable:
        def feed(self):
            raise ValueError("bytes")

        def finish(self):
            return ""

    real = Request.watch

    def watch(self, seq):
        real(self, seq)
        seq.text = Unreadable() if self.index == 1 else None

    monkeypatch.setattr(Request, "watch", watch)
    outputs = generate(llm, [[5], [6]], raise_on_error=False)
    assert [output["finish_reason"] for output in outputs] == ["length", "error"]


def test_abort_ends_all_completions_of_a_request(llm):
    params = SamplingParams(n=3, max_tokens=100, ignore_eos=True)
    ids = [llm.add_request([5, 6, 7], params) for _ in range(2)]
    assert ids[1] == ids[0] + 3
    for _ in range(4):
        llm.step()
    assert llm.abort(ids[1]) and not llm.abort(ids[1]) and not llm.abort(ids[0] + 1)
    [output], _ = llm.step()
    assert output["request_id"] == ids[1]
    assert [completion["finish_reason"] for completion in output["outputs"]] == ["abort"] * 3
    assert llm.abort(ids[0]) and len(llm.step()[0]) == 1


# ---- what grows with the number of prompts


def test_the_engine_runs_while_further_prompts_are_tokenized(llm, monkeypatch):
    """The third slice of prompts is not tokenized before a step has run."""
    has_run, run, encode = threading.Event(), llm.model_runner.run, inputs.encode

    def running(*args):
        has_run.set()
        return run(*args)

    def encoding(prompts, params, config, tokenizer, start=0):
        assert start < 4 or has_run.wait(timeout=30)
        return encode(prompts, params, config, tokenizer, start)

    monkeypatch.setattr(llm.model_runner, "run", running)
    monkeypatch.setattr(inputs, "encode", encoding)
    monkeypatch.setattr(inputs, "SLICE", 2)
    prompts = random_prompts([9, 30, 17, 5, 8], seed=9)
    outputs = generate(llm, prompts)
    monkeypatch.undo()
    assert [o["token_ids"] for o in outputs] == [o["token_ids"] for o in generate(llm, prompts)]


def test_a_bad_prompt_in_a_later_slice_leaves_nothing_running(llm, monkeypatch):
    monkeypatch.setattr(inputs, "SLICE", 2)
    with pytest.raises(ValueError, match=r"prompts\[5\] is empty"):
        generate(llm, [[5], [6], [7], [8], [9], []])
    assert llm.is_finished() and not llm.scheduler.sequences


def test_parameters_for_all_prompts_are_checked_once(llm, monkeypatch):
    checked, check = [], inputs._check_params
    monkeypatch.setattr(inputs, "_check_params", lambda p, *args: checked.append(p) or check(p, *args))
    generate(llm, [[5]] * 9, SamplingParams(max_tokens=1))
    assert len(checked) == 1
    generate(llm, [[5]] * 3, [GREEDY, failing_after(99), GREEDY])
    assert len(checked) == 3


def test_completions_of_one_prompt_hash_it_once(llm, monkeypatch):
    hashed, digest = [], block_manager.xxh64_intdigest
    monkeypatch.setattr(block_manager, "xxh64_intdigest", lambda data: hashed.append(data) or digest(data))
    generate(llm, random_prompts([40], seed=10), SamplingParams(n=9, max_tokens=2, ignore_eos=True))
    assert len(hashed) == 5


def test_a_stream_looks_only_at_what_a_step_computed(llm, monkeypatch, batches):
    """And not at every request that waits."""
    looks, on_token = Counter(), Request.on_token
    monkeypatch.setattr(Request, "on_token", lambda self, seq: looks.update([seq.seq_id]) or on_token(self, seq))
    pieces = list(llm.generate_stream([[5, i + 2] for i in range(200)], SamplingParams(max_tokens=3, ignore_eos=True)))
    assert len(pieces) == 600
    assert sum(looks.values()) <= sum(batches)


def test_outputs_of_a_thread_pool_equal_those_of_one_call(llm):
    """What a web handler does: one prompt a call, many at a time."""
    prompts = random_prompts([7 + i for i in range(24)], seed=11)
    expected = [output["token_ids"] for output in generate(llm, prompts)]
    with ThreadPoolExecutor(12) as pool:
        got = list(pool.map(lambda prompt: generate(llm, [prompt])[0]["token_ids"], prompts))
    assert got == expected


def test_settings_of_the_callers_thread_hold_in_the_engines(checkpoint, monkeypatch):
    seen = []
    with LLM(str(checkpoint[0]), **SETTINGS) as llm:
        run = llm.model_runner.run
        monkeypatch.setattr(llm.model_runner, "run", lambda *args: seen.append(torch.get_num_threads()) or run(*args))
        generate(llm, [[5]])
    assert set(seen) == {llm._loop.model_runner.num_threads}
