"""The public API: what goes in, what comes out, what is refused, and that the engine survives all of it."""

import gc
import inspect
import json
import math
import os
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch

from helpers import ROOT, random_prompts, reference_tokens
from nanovllm import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6)
SETTINGS = {"kvcache_block_size": 8, "num_kvcache_blocks": 30, "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def llm(checkpoint):
    with LLM(str(checkpoint[0]), max_model_len=300, **SETTINGS) as llm:
        yield llm


def generate(llm, prompts, params=GREEDY):
    return llm.generate(prompts, params, use_tqdm=False)


# ---- outputs


def test_outputs_come_in_order_as_plain_dicts(llm, checkpoint):
    prompts = random_prompts([30, 2, 11])
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (2, 9, 5)]
    outputs = generate(llm, prompts, params)
    expected = [reference_tokens(checkpoint[1], p, s.max_tokens) for p, s in zip(prompts, params, strict=True)]
    assert [output["token_ids"] for output in outputs] == expected
    assert {output["finish_reason"] for output in outputs} <= {"stop", "length"}
    assert json.loads(json.dumps(outputs)) == outputs


def test_no_prompts_give_no_outputs(llm):
    assert generate(llm, []) == []


@pytest.mark.parametrize("form", [tuple, np.array, lambda ids: np.array(ids, dtype=np.uint16)])
def test_token_ids_may_be_any_sequence_of_integers(llm, form):
    prompt = random_prompts([7])[0]
    generate(llm, [prompt])
    assert generate(llm, [form(prompt)]) == generate(llm, [prompt])


def test_completion_ends_at_the_models_length(llm):
    [output] = generate(llm, random_prompts([200]), SamplingParams(temperature=0, max_tokens=500, ignore_eos=True))
    assert len(output["token_ids"]) == 240 + 1 - 200  # the cache of 30 blocks is smaller than max_model_len here
    assert output["finish_reason"] == "length"


def test_max_model_len_ends_a_completion(checkpoint):
    with LLM(str(checkpoint[0]), max_model_len=50, **SETTINGS) as llm:
        [output] = generate(llm, random_prompts([40]), SamplingParams(temperature=0, max_tokens=99, ignore_eos=True))
    assert len(output["token_ids"]) == 10
    assert output["finish_reason"] == "length"


def test_sampling_is_reproducible_and_does_not_depend_on_the_batch(checkpoint):
    """A request's random stream is its own: preemption and neighbours change nothing."""
    prompts = random_prompts([9, 30, 17, 44])
    params = SamplingParams(temperature=1.5, max_tokens=20, ignore_eos=True)
    results = []
    for settings in ({}, {}, {"max_num_seqs": 1}, {"num_kvcache_blocks": 9}, {"seed": 1}):
        with LLM(str(checkpoint[0]), **SETTINGS | settings) as llm:
            llm.scheduler.output_ratio = 0.0
            results.append([output["token_ids"] for output in generate(llm, prompts, params)])
            assert (llm.scheduler.num_preemptions > 0) == ("num_kvcache_blocks" in settings)
    assert results[0] == results[1] == results[2] == results[3] != results[4]


def test_repeating_a_call_draws_anew(llm):
    params = SamplingParams(temperature=1.5, max_tokens=20, ignore_eos=True)
    prompts = random_prompts([9]) * 3
    tokens = [tuple(output["token_ids"]) for _ in range(2) for output in generate(llm, prompts, params)]
    assert len(set(tokens)) == 6


def test_the_progress_bar_counts_prompts_and_shows_both_rates(llm, capsys):
    llm.generate(random_prompts([9, 30]), GREEDY)
    shown = capsys.readouterr().err
    assert "2/2" in shown and "prefill" in shown and "decode" in shown and "tok/s" in shown
    generate(llm, random_prompts([9]))
    assert capsys.readouterr().err == ""


def test_a_short_header_in_common_is_found_by_default(checkpoint):
    """With blocks as small as the backend likes: of 228 tokens 192 and more."""
    settings = SETTINGS | {"kvcache_block_size": None}
    with LLM(str(checkpoint[0]), **settings) as llm:
        [header] = random_prompts([228], seed=12)
        generate(llm, [[*header, 5]])
        [output] = generate(llm, [[*header, 6, 7]])
        assert output["num_cached_tokens"] >= 192
        assert llm.config.kvcache_block_size == llm.block_manager.block_size


# ---- step by step


def test_step_reports_tokens_and_finished_requests(llm):
    prompts = random_prompts([5, 12], seed=3)
    ids = [llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)) for prompt in prompts]
    outputs, counts = [], []
    while not llm.is_finished():
        finished, num_tokens = llm.step()
        outputs += finished
        counts.append(num_tokens)
    assert counts == [17, -2, -2]
    assert sorted(output["request_id"] for output in outputs) == ids
    assert all(len(output["token_ids"]) == 3 and output["finish_reason"] == "length" for output in outputs)
    assert llm.step() == ([], 0)


def test_a_generate_in_between_loses_no_request(llm):
    prompt, other = random_prompts([5, 12], seed=4)
    expected = generate(llm, [prompt])[0]["token_ids"]
    seq_id = llm.add_request(prompt, GREEDY)
    generate(llm, [other])
    results = []
    while not llm.is_finished():
        results += llm.step()[0]
    assert [(output["request_id"], output["token_ids"]) for output in results] == [(seq_id, expected)]


# ---- refusals

BAD_PROMPTS = {
    "empty": ([[]], ValueError, "prompts\\[0\\] is empty"),
    "empty beside a good one": ([[5], []], ValueError, "prompts\\[1\\] is empty"),
    "id too large": ([[5, 307]], ValueError, "307, outside the vocabulary of 307"),
    "id negative": ([[5, -1]], ValueError, "-1, outside the vocabulary"),
    "id huge": ([[5, 2**40]], ValueError, "outside the vocabulary"),
    "as long as the model": ([[5] * 300], ValueError, "300 tokens.*max_model_len=300"),
    "longer than the cache": ([[5] * 241], ValueError, "KV cache holds 240.*num_kvcache_blocks"),
    "floats": ([[1.5, 2.0]], TypeError, "list of token ids"),
    "booleans": ([[True, False]], TypeError, "list of token ids"),
    "None": ([None], TypeError, "list of token ids"),
    "nested": ([[[1], [2]]], TypeError, "list of token ids"),
    "ragged": ([[[1], [2, 3]]], TypeError, "list of token ids"),
    "strings inside": ([["a", "b"]], TypeError, "list of token ids"),
    "flat ids": ([1, 2, 3], TypeError, "\\[token_ids\\]"),
    "a number": (7, TypeError, "prompts must be a list"),
    "text without tokenizer": (["hello"], ValueError, "has no tokenizer"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_bad_prompts_are_refused_before_anything_runs(llm, case):
    prompts, error, message = BAD_PROMPTS[case]
    with pytest.raises(error, match=message):
        generate(llm, prompts)
    assert llm.is_finished()
    assert len(generate(llm, [[5, 6]])) == 1


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([GREEDY], ValueError, "1 entries for 2 prompts"),
        ([GREEDY] * 3, ValueError, "3 entries for 2 prompts"),
        ({"temperature": 0}, TypeError, "must be a SamplingParams"),
        ([GREEDY, None], TypeError, "must be a SamplingParams"),
    ],
)
def test_bad_sampling_params_are_refused_before_anything_runs(llm, params, error, message):
    with pytest.raises(error, match=message):
        generate(llm, [[5], [6]], params)
    assert llm.is_finished()


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"temperature": -0.1}, ValueError),
        ({"temperature": math.nan}, ValueError),
        ({"temperature": math.inf}, ValueError),
        ({"temperature": "0.5"}, TypeError),
        ({"temperature": True}, TypeError),
        ({"max_tokens": 0}, ValueError),
        ({"max_tokens": -3}, ValueError),
        ({"max_tokens": 2.5}, TypeError),
        ({"ignore_eos": 1}, TypeError),
    ],
)
def test_sampling_params_are_checked_at_construction(kwargs, error):
    with pytest.raises(error, match=f"{next(iter(kwargs))} must be"):
        SamplingParams(**kwargs)


# ---- errors and ends


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_error_in_a_step_leaves_the_engine_usable(llm, error, after, monkeypatch):
    """Beside the failing call another request is under way; it comes through whole."""
    prompts = random_prompts([9, 30], seed=5)
    expected = generate(llm, prompts)
    seq_id = llm.add_request(prompts[0], GREEDY)
    run, calls = llm.model_runner.run, []

    def failing(*args):
        calls.append(1)
        if len(calls) > after:
            raise error
        return run(*args)

    monkeypatch.setattr(llm.model_runner, "run", failing)
    with pytest.raises(type(error)):
        generate(llm, prompts[1:] * 3)
    monkeypatch.undo()
    results = []
    while not llm.is_finished():
        results += llm.step()[0]
    assert [(o["request_id"], o["token_ids"]) for o in results] == [(seq_id, expected[0]["token_ids"])]
    assert llm.block_manager.num_free_blocks == 30
    assert [o["token_ids"] for o in generate(llm, prompts)] == [o["token_ids"] for o in expected]


def test_exit_is_idempotent_and_final(checkpoint):
    llm = LLM(str(checkpoint[0]), **SETTINGS)
    llm.exit()
    llm.exit()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate([[5]])
    with pytest.raises(RuntimeError, match="closed"):
        llm.add_request([5])


@pytest.mark.parametrize("how", ["del", "exit", "with"])
def test_the_models_memory_is_given_back(checkpoint, how):
    gc.collect()
    gc.disable()  # reference counting alone must do it
    try:
        llm = LLM(str(checkpoint[0]), **SETTINGS)
        generate(llm, [[5, 6]])
        runner, cache = weakref.ref(llm.model_runner), weakref.ref(llm.model_runner.attentions[0].k_cache)
        if how == "exit":
            llm.exit()
        elif how == "with":
            with llm:
                pass
        del llm
        assert runner() is None and cache() is None
    finally:
        gc.enable()


def test_a_failed_construction_names_the_problem_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        LLM(str(tmp_path))


def test_a_script_that_never_calls_exit_ends_cleanly(checkpoint):
    code = f"""
from nanovllm import LLM, SamplingParams
llm = LLM({str(checkpoint[0])!r}, num_kvcache_blocks=9)
print(llm.generate([[5, 6]], SamplingParams(temperature=0), use_tqdm=False)[0]["finish_reason"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert done.returncode == 0 and done.stdout.strip() in ("stop", "length")
    assert "Traceback" not in done.stderr


def test_defaults_of_the_process_are_left_alone(llm):
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_default_device() == torch.device("cpu")


def test_the_log_of_a_cpu_speaks_of_cpus(checkpoint, caplog):
    caplog.set_level("INFO", "nanovllm")
    LLM(str(checkpoint[0]), **SETTINGS).exit()
    assert "attention: cpu" in caplog.text and "start-up: weights" in caplog.text
    assert "CUDA" not in caplog.text and "GPU" not in caplog.text


def test_public_docstrings():
    for function in (LLM, LLM.generate, LLM.add_request, LLM.step, LLM.is_finished, LLM.exit, SamplingParams):
        assert inspect.getdoc(function)
