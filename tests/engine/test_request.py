"""What outputs hold, and the forms of prompts that scripts for vLLM use."""

import json
import pickle

import pytest

from helpers import DEMO_MODEL
from nanovllm import LLM, SamplingParams

CHAT = [{"role": "user", "content": "introduce yourself"}]


@pytest.fixture(scope="module")
def llm():
    with LLM(str(DEMO_MODEL), num_kvcache_blocks=200, dtype="float32", device="cpu") as llm:
        yield llm


def test_a_script_for_vllm_reads_outputs_by_attributes(llm):
    [output] = llm.generate(
        {"prompt": "Hello"}, SamplingParams(temperature=0, max_tokens=5, logprobs=1), use_tqdm=False
    )
    assert output.outputs[0].text == output["outputs"][0]["text"] == output.text
    assert output.outputs[0].index == 0 and output.outputs[0].finish_reason in ("stop", "length")
    assert output.prompt == "Hello" and output.prompt_token_ids == llm.get_tokenizer()("Hello")["input_ids"]
    assert output.logprobs[0].token_id == output.token_ids[0]
    assert json.loads(json.dumps(output)) == output == pickle.loads(pickle.dumps(output))
    with pytest.raises(AttributeError, match="no 'txt' here"):
        output.txt  # noqa: B018


def test_dict_prompts_are_texts_or_token_ids(llm):
    ids = llm.tokenizer("Hello you")["input_ids"]
    prompts = [{"prompt": "Hello you"}, {"prompt_token_ids": ids}, {"prompt": "not this", "prompt_token_ids": ids}]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
    assert outputs[0].token_ids == outputs[1].token_ids == outputs[2].token_ids
    assert [output.prompt for output in outputs] == ["Hello you", None, None]
    assert all(output.prompt_token_ids == ids for output in outputs)
    with pytest.raises(TypeError, match=r"prompts\[1\] must have a 'prompt' or 'prompt_token_ids', got the keys"):
        llm.generate([{"prompt": "a"}, {"text": "b"}])


@pytest.mark.parametrize(
    "text", ["list all prime numbers within 30", "caf\u00e9 \U0001f600 \u4f60\u597d", "a \u00ff\U0001f600"]
)
def test_texts_of_log_probabilities_add_up(llm, text):
    params = SamplingParams(temperature=1.5, seed=1, max_tokens=30, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    [output] = llm.generate([text], params, use_tqdm=False)
    assert "".join(entry.token for entry in output.logprobs) == output.text
    first = llm.tokenizer.decode(output.prompt_token_ids[:1])
    assert first + "".join(entry.token for entry in output.prompt_logprobs[1:]) == text
    for entry in output.logprobs:
        assert all(isinstance(piece, str) for _, _, piece in entry.top) and len(entry.top) == 2


def test_a_space_stays_in_the_text_of_a_likely_token(llm):
    [output] = llm.chat(CHAT, SamplingParams(temperature=0, max_tokens=8, logprobs=1), use_tqdm=False)
    assert [entry.top[0][2] for entry in output.logprobs] == [entry.token for entry in output.logprobs]
    assert any(entry.token.startswith(" ") for entry in output.logprobs)


def test_a_prompt_may_be_scored_without_generating(llm):
    scored = SamplingParams(max_tokens=0, prompt_logprobs=0)
    [output] = llm.generate(["Hello you there"], scored, use_tqdm=False)
    [longer] = llm.generate(["Hello you there"], SamplingParams(max_tokens=3, prompt_logprobs=0), use_tqdm=False)
    assert output.token_ids == [] and output.text == "" and output.finish_reason == "length"
    assert output.prompt_logprobs == longer.prompt_logprobs
    assert [piece.token_ids for piece in llm.generate_stream(["Hello you there"], scored)] == [[]]
    with pytest.raises(ValueError, match="max_tokens must be at least 1, or 0 with prompt_logprobs"):
        SamplingParams(max_tokens=0)


def test_the_start_of_a_long_prompt_may_be_cut(llm):
    ids = llm.tokenizer("Hello you there")["input_ids"]
    short = SamplingParams(temperature=0, max_tokens=2, truncate_prompt_tokens=2)
    assert llm.generate([ids], short, use_tqdm=False)[0].prompt_token_ids == ids[-2:]
    fitting = SamplingParams(temperature=0, max_tokens=2, truncate_prompt_tokens=-1)
    [output] = llm.generate([ids * 2000], fitting, use_tqdm=False)
    assert len(output.prompt_token_ids) == llm.config.max_model_len - 1
    for bad in (0, -2):
        with pytest.raises(ValueError, match="truncate_prompt_tokens"):
            SamplingParams(truncate_prompt_tokens=bad)


def test_a_chat_streams(llm):
    params = SamplingParams(temperature=0, max_tokens=40)
    [expected] = llm.chat(CHAT, params, use_tqdm=False)
    assert "".join(piece.text for piece in llm.chat_stream(CHAT, params)) == expected.text
