"""`LLM.score`: given completions against transformers' log-softmax, however they are computed."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from helpers import DEMO_MODEL, random_prompts
from nanovllm import LLM, SamplingParams
from nanovllm.engine import scoring

BLOCK = 16
SETTINGS = {"device": "cpu", "dtype": "float32", "kvcache_block_size": BLOCK, "num_kvcache_blocks": 200}
SETTINGS |= {"attention_backend": "cpu", "max_model_len": 128}


@pytest.fixture(scope="module")
def llm(checkpoint):
    with LLM(str(checkpoint[0]), **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def demo():
    with LLM(str(DEMO_MODEL), **SETTINGS) as llm:
        yield llm


def choices(seed: int = 0) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts of all lengths around a block, one of them twice, each with four completions."""
    prompts = random_prompts([1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 45], seed)
    prompts.append(prompts[3])
    lengths = [1, 2, 5, BLOCK]
    return prompts, [random_prompts(lengths, seed + 1 + i) for i in range(len(prompts))]


@torch.inference_mode()
def expected(model, prompt: list[int], completion: list[int]) -> tuple[list[float], bool]:
    logprobs = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    token_logprobs = logprobs.gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
    return token_logprobs.tolist(), logprobs.argmax(-1).tolist() == completion


def check(model, prompts: list, completions: list, scores: list) -> None:
    for prompt, own, results in zip(prompts, completions, scores, strict=True):
        for completion, score in zip(own, results, strict=True):
            token_logprobs, is_greedy = expected(model, prompt, completion)
            assert score.token_logprobs == pytest.approx(token_logprobs, abs=1e-4)
            assert score.logprob == pytest.approx(sum(token_logprobs), abs=1e-3)
            assert score.is_greedy == is_greedy
            assert score.token_ids == completion and score.num_tokens == len(completion)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"num_kvcache_blocks": 6},
        {"max_num_batched_tokens": 7, "num_kvcache_blocks": 6, "max_num_seqs": 2},
        {"kvcache_block_size": 1, "num_kvcache_blocks": 90},
    ],
    ids=["plain", "chunked", "small", "both", "blocks of a token"],
)
def test_scores_equal_log_softmax(checkpoint, settings):
    path, model = checkpoint
    prompts, completions = choices()
    with LLM(str(path), **SETTINGS | settings) as llm:
        for _ in range(2):  # then with prefixes in the cache
            check(model, prompts, completions, llm.score(prompts, completions, use_tqdm=False))
            assert llm.block_manager.num_free_blocks == llm.config.num_kvcache_blocks and not llm.scheduler.held


def test_the_greedy_completion_is_greedy(llm):
    prompts = random_prompts([5, 20], seed=5)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), use_tqdm=False)
    greedy = [output.token_ids for output in outputs]
    other = [[*ids[:-1], (ids[-1] + 1) % 300] for ids in greedy]
    scores = llm.score(prompts, list(map(list, zip(greedy, other, strict=True))), use_tqdm=False)
    assert [[score.is_greedy for score in own] for own in scores] == [[True, False]] * 2
    assert json.loads(json.dumps(scores)) == scores


def test_a_prompt_is_computed_once_for_all_its_completions(checkpoint):
    """Whole blocks or not: beyond the first, a completion costs its own tokens and the prompt's last."""
    prompts, completions = choices()
    with LLM(str(checkpoint[0]), **SETTINGS) as llm:
        llm.score(prompts, completions, use_tqdm=False)
        stats = llm.stats()
        num_given = sum(len(completion) for own in completions for completion in own)
        different = prompts[:-1]  # the last is among them
        num_shared = 4 * len(prompts) - len(different)
        assert stats["prefill_tokens"] == sum(map(len, different)) + num_given + num_shared
        assert stats["prompt_tokens"] == 4 * sum(map(len, prompts))
        assert stats["cached_prompt_tokens"] == stats["prompt_tokens"] - sum(map(len, different)) - num_shared
        assert stats["output_tokens"] == 0
        llm.score([prompts[4]], [completions[0]], use_tqdm=False)
        cached = llm.stats()["cached_prompt_tokens"] - stats["cached_prompt_tokens"]
        assert cached == 2 * BLOCK + 3 * (3 * BLOCK - 1)  # of an earlier call, whole blocks


def test_only_the_completions_are_projected_over_the_vocabulary(checkpoint, monkeypatch):
    prompts, completions = choices()
    with LLM(str(checkpoint[0]), **SETTINGS) as llm:
        head, rows = llm.model_runner.model.lm_head, []
        project = head.project
        monkeypatch.setattr(head, "project", lambda hidden: rows.append(len(hidden)) or project(hidden))
        llm.score(prompts, completions, use_tqdm=False)
    num_given = sum(len(completion) for own in completions for completion in own)
    assert sum(rows) <= num_given + 4 * len(prompts)  # and a row for the token that would come after each


def test_they_run_beside_others(llm, checkpoint):
    """Also with prompts that are scored and completed in the same steps."""
    prompts, completions = choices(seed=3)
    whole = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=2, ignore_eos=True)
    alone = llm.generate(prompts, whole, use_tqdm=False)
    requests = [llm.add_request(prompt, whole) for prompt in prompts]
    check(checkpoint[1], prompts, completions, llm.score(prompts, completions, use_tqdm=False))
    outputs = {}
    while not llm.is_finished():
        outputs |= {output.request_id: output for output in llm.step()[0]}
    assert [outputs[i].token_ids for i in requests] == [output.token_ids for output in alone]
    for i, output in zip(requests, alone, strict=True):
        got, entries = outputs[i].prompt_logprobs[1:], output.prompt_logprobs[1:]
        assert [entry.logprob for entry in got] == pytest.approx([entry.logprob for entry in entries], abs=1e-4)


def test_one_completion_or_a_list_for_each_prompt(llm):
    prompts = random_prompts([4, 5, 6])
    one, several, none = llm.score(prompts, [[7, 8], [[7, 8], np.array([9])], []], use_tqdm=False)
    assert one.token_ids == [7, 8] and [score.token_ids for score in several] == [[7, 8], [9]] and none == []
    assert llm.score([], [], use_tqdm=False) == []


def test_texts_are_tokenized_together_and_spaces_go_to_the_completion(demo):
    [own, [lone], [after_ids]] = demo.score(
        ["What is 2 + 3? ", "What is 2 + 3?", demo.tokenizer("What is 2 + 3?")["input_ids"]],
        [["The sum", "2"], [" The sum"], [" The sum"]], use_tqdm=False,
    )  # fmt: skip
    whole = demo.tokenizer("What is 2 + 3? The sum")["input_ids"]
    prompt = demo.tokenizer("What is 2 + 3?")["input_ids"]
    assert own[0].token_ids == lone.token_ids == whole[len(prompt) :]
    assert demo.tokenizer.decode(own[0].token_ids) == " The sum"
    assert own[0].token_logprobs == pytest.approx(lone.token_logprobs, abs=1e-4)
    assert after_ids.token_ids == demo.tokenizer(" The sum", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("prompts", "completions", "error", "message"),
    [
        ([[5]], [[]] * 2, ValueError, "completions has 2 entries for 1 prompts"),
        ([[5], [6]], [[7], [[8], []]], ValueError, r"completions\[1\]\[1\] is empty"),
        ([[5]], ["text"], ValueError, "has no tokenizer"),
        ([[]], [[7]], ValueError, r"prompts\[0\] is empty"),
        ([[5]], [[[307]]], ValueError, r"completions\[0\]\[0\] has the token id 307, outside the vocabulary of 307"),
        ([[5]], [[["a"]]], TypeError, r"completions\[0\]\[0\] must be a string or a list of token ids"),
        ([[5]], [None], TypeError, r"completions\[0\] must be a string or a list of token ids, got None"),
        ([[5]], "text", TypeError, "completions must be a list with an entry for each prompt, got 'text'"),
        ([[5] * 120], [[7] * 9], ValueError, r"prompts\[0\] with completions\[0\] has 129 tokens and exceeds"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_runs(llm, prompts, completions, error, message):
    before = llm.stats()["prefill_tokens"]
    with pytest.raises(error, match=message):
        llm.score(prompts, completions, use_tqdm=False)
    assert llm.stats()["prefill_tokens"] == before and llm.is_finished()


def test_a_mistake_among_later_prompts_ends_what_runs_of_the_call(llm, checkpoint, monkeypatch):
    monkeypatch.setattr(scoring, "SLICE", 2)
    prompts, completions = choices()
    check(checkpoint[1], prompts, completions, llm.score(prompts, completions, use_tqdm=False))
    with pytest.raises(ValueError, match=r"completions\[6\]\[1\] is empty"):
        llm.score(prompts, [*completions[:6], [[5], []]], use_tqdm=False)
    assert llm.is_finished() and llm.stats()["blocks_used"] == 0 and not llm.scheduler.held


def test_threads_score_together(llm, checkpoint):
    calls = [choices(seed) for seed in range(10, 14)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda call: llm.score(*call, use_tqdm=False), calls))
    for (prompts, completions), scores in zip(calls, results, strict=True):
        check(checkpoint[1], prompts, completions, scores)


def test_a_prompt_and_its_completion_may_fill_the_models_length(llm, checkpoint):
    [prompt], [completion] = random_prompts([120]), random_prompts([8], seed=1)
    check(checkpoint[1], [prompt], [[completion]], llm.score([prompt], [[completion]], use_tqdm=False))


def test_a_text_that_adds_no_token_is_refused(demo):
    with pytest.raises(ValueError, match=r"completions\[0\]\[1\] is empty"):
        demo.score(["Hello"], [[" you", ""]], use_tqdm=False)
