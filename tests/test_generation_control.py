"""Stop strings, streams, seeds, log-probabilities, n, chat and abort through the whole engine."""

import gc
import json
import random
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from helpers import DEMO_MODEL, random_prompts, reference_tokens, save_model
from nanovllm import LLM, SamplingParams

BLOCK = 8
SETTINGS = {"kvcache_block_size": BLOCK, "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights under the demo model's byte-level tokenizer: completions full of broken multi-byte characters."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = save_model(path, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    for file in DEMO_MODEL.glob("tokenizer*"):
        shutil.copy(file, path)
    return path, model, tokenizer


@pytest.fixture(scope="module")
def llm(checkpoint):
    with LLM(str(checkpoint[0]), num_kvcache_blocks=400, **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def demo():
    with LLM(str(DEMO_MODEL), kvcache_block_size=16, num_kvcache_blocks=200, dtype="float32", device="cpu") as llm:
        yield llm


def generate(llm, prompts, params):
    return llm.generate(prompts, params, use_tqdm=False)


def prompts_for(llm, lengths, seed=0):
    return random_prompts(lengths, seed, llm.config.hf_config.vocab_size)


def joined_tokens(pieces):
    return [token_id for piece in pieces for token_id in piece["token_ids"]]


# ---- stop strings and text


def random_params(rng: random.Random, text: str) -> SamplingParams:
    """A mix of options whose stop strings are pieces of a text that the model does produce."""
    stops = []
    for _ in range(rng.randrange(3)):
        start = rng.randrange(max(1, len(text) - 3))
        stops.append(text[start : start + rng.randrange(1, 4)])
    return SamplingParams(
        temperature=rng.choice([0, 1.0]),
        max_tokens=rng.randrange(1, 40),
        n=1,
        seed=rng.randrange(10),
        ignore_eos=rng.random() < 0.5,
        stop=[stop for stop in stops if stop],
        stop_token_ids=[rng.randrange(300) for _ in range(rng.randrange(8))],
        include_stop_str_in_output=rng.random() < 0.5,
        skip_special_tokens=rng.random() < 0.5,
        min_tokens=0,
    )


def test_streamed_pieces_add_up_to_generate_for_any_mix_of_options(llm):
    rng = random.Random(0)
    prompts = prompts_for(llm, [rng.randrange(1, 30) for _ in range(60)])
    free = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True, seed=1)
    texts = [output["text"] for output in generate(llm, prompts, free)]
    assert sum("\ufffd" in text for text in texts) > 20  # bytes that never become characters are among them
    params = [random_params(rng, text) for text in texts]
    expected = generate(llm, prompts, params)
    assert {output["finish_reason"] for output in expected} == {"stop", "length"}
    assert sum(isinstance(output["stop_reason"], str) for output in expected) > 5
    pieces = list(llm.generate_stream(prompts, params))
    for index, output in enumerate(expected):
        mine = [piece for piece in pieces if piece["index"] == index]
        assert "".join(piece["text"] for piece in mine) == output["text"]
        assert joined_tokens(mine) == output["token_ids"]
        assert [piece["finish_reason"] for piece in mine] == [None] * (len(mine) - 1) + [output["finish_reason"]]
        assert mine[-1]["stop_reason"] == output["stop_reason"]
    assert llm.is_finished()


@pytest.mark.parametrize("include", [False, True])
def test_text_ends_at_the_stop_string_that_comes_first(llm, checkpoint, include):
    """Against the full text: cut where the first match ends, wherever token boundaries fall."""
    tokenizer = checkpoint[2]
    rng = random.Random(1)
    prompts = prompts_for(llm, [7] * 30, seed=2)
    free = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True, seed=2)
    for prompt, whole in zip(prompts, generate(llm, prompts, free), strict=True):
        text = whole["text"].rstrip("\ufffd")  # the end may be an incomplete character
        if len(text) < 8:
            continue
        starts = [rng.randrange(len(text) - 4) for _ in range(3)]
        stops = [text[start : start + rng.randrange(1, 5)] for start in starts]
        params = SamplingParams(
            temperature=1.0, max_tokens=40, ignore_eos=True, seed=2, stop=stops, include_stop_str_in_output=include
        )
        [output] = generate(llm, [prompt], params)
        end, stop = min((text.find(stop) + len(stop), stop) for stop in stops)
        assert output["text"] == text[: end if include else end - len(stop)]
        assert output["finish_reason"] == "stop" and output["stop_reason"] == stop
        # No token was lost, and none sampled beyond the one that completed the stop.
        n = len(output["token_ids"])
        assert output["token_ids"] == whole["token_ids"][:n]
        assert stop in tokenizer.decode(output["token_ids"])
        assert len(tokenizer.decode(whole["token_ids"][: n - 1]).rstrip("\ufffd")) < end


def test_a_stop_string_inside_a_multi_byte_character_waits_for_all_its_bytes(llm, checkpoint):
    tokenizer = checkpoint[2]
    wanted = tokenizer.encode("a\U0001f600b", add_special_tokens=False)
    assert len(wanted) > 4  # the emoji is spread over several tokens

    def force(token_ids, logits):
        row = torch.full_like(logits, -torch.inf)
        row[wanted[len(token_ids)] if len(token_ids) < len(wanted) else 5] = 0
        return row

    params = SamplingParams(max_tokens=20, logits_processors=[force], stop="\U0001f600")
    [output] = generate(llm, [[5]], params)
    assert output["text"] == "a" and output["token_ids"] == wanted[:-1]
    pieces = [piece["text"] for piece in llm.generate_stream([[5]], params)]
    assert "".join(pieces) == "a"


def test_min_tokens_holds_back_every_kind_of_end(llm, checkpoint):
    eos = checkpoint[2].eos_token_id
    [prompt] = prompts_for(llm, [9])
    bias = {eos: 100.0, 7: 100.0}
    [soon] = generate(llm, [prompt], SamplingParams(temperature=0, logit_bias=bias, stop_token_ids=[7]))
    assert len(soon["token_ids"]) == 1
    params = SamplingParams(temperature=0, logit_bias=bias, stop_token_ids=[7], min_tokens=6)
    [late] = generate(llm, [prompt], params)
    assert len(late["token_ids"]) == 7
    free = generate(llm, [prompt], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))[0]
    char = free["text"][0]
    [stopped] = generate(
        llm, [prompt], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop=[char], min_tokens=3)
    )
    assert len(stopped["token_ids"]) >= 3


def test_stop_reasons(llm, checkpoint):
    eos = checkpoint[2].eos_token_id
    [prompt] = prompts_for(llm, [9])
    for token, params in (
        (eos, SamplingParams(temperature=0, logit_bias={eos: 100.0})),
        (7, SamplingParams(temperature=0, logit_bias={7: 100.0}, stop_token_ids=[7])),
    ):
        [output] = generate(llm, [prompt], params)
        assert output["token_ids"] == [token] and output["finish_reason"] == "stop" and output["text"] == ""
        assert output["stop_reason"] == (None if token == eos else 7)


def test_special_tokens_stay_in_the_ids_and_leave_the_text(llm, checkpoint):
    tokenizer = checkpoint[2]
    special = tokenizer.convert_tokens_to_ids("<|im_start|>")
    base = {"temperature": 0, "max_tokens": 3, "logit_bias": {special: 100.0}}
    [clean] = generate(llm, [[9]], SamplingParams(**base))
    [raw] = generate(llm, [[9]], SamplingParams(skip_special_tokens=False, **base))
    assert clean["token_ids"] == raw["token_ids"] == [special] * 3
    assert clean["text"] == "" and raw["text"] == "<|im_start|>" * 3


# ---- streams


def test_a_stream_repeats_nothing_while_its_text_is_shorter_than_a_stop_string(llm):
    [prompt] = prompts_for(llm, [9], seed=3)
    for length in range(2, 12):
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop="#" * length)
        [expected] = generate(llm, [prompt], params)
        assert len(expected["text"]) > 12
        assert "".join(piece["text"] for piece in llm.generate_stream([prompt], params)) == expected["text"]


def test_leaving_a_stream_frees_its_sequences(llm):
    prompts = prompts_for(llm, [20, 30])
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    stream = llm.generate_stream(prompts, params)
    assert llm.is_finished()  # nothing runs before it is read
    next(stream)
    assert not llm.is_finished()
    del stream
    gc.collect()
    assert llm.is_finished() and llm.block_manager.num_free_blocks == 400


def test_a_stream_checks_its_prompts_at_once(llm):
    with pytest.raises(ValueError, match="empty"):
        llm.generate_stream([[5], []])
    assert llm.is_finished()


def test_two_streams_and_a_generate_in_turns(llm):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    first, second, third = ([prompt] for prompt in prompts_for(llm, [9, 14, 21]))
    expected = [generate(llm, prompt, params)[0] for prompt in (first, second, third)]
    streams = [llm.generate_stream(first, params), llm.generate_stream(second, params)]
    pieces = [[next(stream)] for stream in streams]
    pieces[0].append(next(streams[0]))
    assert generate(llm, third, params)[0]["token_ids"] == expected[2]["token_ids"]
    for stream, got in zip(streams, pieces, strict=True):
        got += stream
    for got, output in zip(pieces, expected, strict=False):
        assert "".join(piece["text"] for piece in got) == output["text"]
        assert joined_tokens(got) == output["token_ids"]


def test_streams_of_a_model_without_tokenizer_carry_tokens(tmp_path):
    save_model(tmp_path)
    with LLM(str(tmp_path), num_kvcache_blocks=40, **SETTINGS) as llm:
        params = SamplingParams(temperature=0, max_tokens=5)
        [expected] = generate(llm, [[5, 6]], params)
        pieces = list(llm.generate_stream([[5, 6]], params))
        assert joined_tokens(pieces) == expected["token_ids"]


# ---- seeds, n, log-probabilities


def test_a_seed_gives_the_same_tokens_whatever_happens(checkpoint):
    """Alone, in a batch of 32, after preemptions, with and without prefix hits."""
    path = checkpoint[0]
    params = SamplingParams(temperature=1.3, top_p=0.95, seed=42, max_tokens=24, ignore_eos=True)
    others = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True)
    results = []
    for blocks, seed in ((400, 0), (14, 5)):
        with LLM(str(path), num_kvcache_blocks=blocks, seed=seed, **SETTINGS) as llm:
            llm.scheduler.output_ratio = 0.0
            [prompt] = prompts_for(llm, [3 * BLOCK])
            for _ in range(2):  # the second time with a prefix hit
                results.append(generate(llm, [prompt], params)[0]["token_ids"])
            crowd = prompts_for(llm, [20] * 31, seed=9)
            results.append(generate(llm, [*crowd, prompt], [others] * 31 + [params])[-1]["token_ids"])
            assert (llm.scheduler.num_preemptions > 0) == (blocks == 14)
    assert all(result == results[0] for result in results)


def test_n_completions_share_the_prompts_blocks_and_differ(llm):
    [prompt] = prompts_for(llm, [3 * BLOCK + 5], seed=50)
    computed, run = [], llm.model_runner.run

    def recording(seqs, *args):
        computed.append([seq.num_scheduled_tokens for seq in seqs])
        return run(seqs, *args)

    llm.model_runner.run = recording
    try:
        params = SamplingParams(n=5, temperature=1.5, max_tokens=10, ignore_eos=True)
        [output] = generate(llm, [prompt], params)
    finally:
        del llm.model_runner.run
    # The prompt once, then its last token for each further completion, beside the first one's second token.
    assert computed[:2] == [[3 * BLOCK + 5], [1] * 5]
    tokens = [tuple(completion["token_ids"]) for completion in output["outputs"]]
    assert len(set(tokens)) == 5
    assert output["token_ids"] == list(tokens[0])
    assert json.loads(json.dumps(output)) == output


def test_n_completions_with_a_seed_are_reproducible_and_survive_preemption(checkpoint):
    params = SamplingParams(n=4, temperature=1.2, max_tokens=20, seed=3, ignore_eos=True, logprobs=1)
    results = []
    for blocks in (300, 14):
        with LLM(str(checkpoint[0]), num_kvcache_blocks=blocks, **SETTINGS) as llm:
            llm.scheduler.output_ratio = 0.0
            outputs = generate(llm, prompts_for(llm, [BLOCK + 3, 2 * BLOCK]), params)
            results.append([[c["token_ids"] for c in output["outputs"]] for output in outputs])
            assert (llm.scheduler.num_preemptions > 0) == (blocks == 14)
            assert llm.block_manager.num_free_blocks == blocks
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"num_kvcache_blocks": 9},
        {"max_num_batched_tokens": 7, "num_kvcache_blocks": 9},
    ],
    ids=["plain", "chunked", "preempted", "both"],
)
def test_logprobs_equal_log_softmax(checkpoint, settings):
    """Of completion and prompt, also of prompts that were chunked, preempted, or in the prefix cache."""
    path, model, _ = checkpoint
    params = SamplingParams(temperature=0.8, max_tokens=12, logprobs=4, prompt_logprobs=2, ignore_eos=True)
    with LLM(str(path), **SETTINGS | {"num_kvcache_blocks": 300} | settings) as llm:
        llm.scheduler.output_ratio = 0.0
        prompts = prompts_for(llm, [1, BLOCK, 2 * BLOCK, 25])
        generate(llm, prompts, SamplingParams(temperature=0, max_tokens=2))  # so that the prefixes are cached
        outputs = generate(llm, prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logprobs = model(torch.tensor([prompt + output["token_ids"]])).logits[0].float().log_softmax(-1)
        entries = [*output["prompt_logprobs"][1:], *output["logprobs"]]
        assert output["prompt_logprobs"][0] is None and len(output["prompt_logprobs"]) == len(prompt)
        assert len(output["logprobs"]) == len(output["token_ids"])
        for position, (token, entry) in enumerate(zip((prompt + output["token_ids"])[1:], entries, strict=True)):
            assert entry["token_id"] == token
            assert entry["logprob"] == pytest.approx(logprobs[position, token].item(), abs=1e-4)
            best = logprobs[position].topk(len(entry["top"]))
            assert [value for _, value, _ in entry["top"]] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert {len(entry["top"]) for entry in output["logprobs"]} == {4}
        total = sum(entry["logprob"] for entry in output["logprobs"])
        assert output["cumulative_logprob"] == pytest.approx(total)
        assert json.loads(json.dumps(output)) == output


def test_outputs_say_how_much_of_the_prompt_was_cached(llm):
    [prompt] = prompts_for(llm, [4 * BLOCK + 3], seed=77)
    params = SamplingParams(temperature=0, max_tokens=2)
    assert [generate(llm, [prompt], params)[0]["num_cached_tokens"] for _ in range(2)] == [0, 4 * BLOCK]
    [output] = generate(llm, [prompt], SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0))
    assert output["num_cached_tokens"] == 0  # every position's logits were wanted, so all was computed


def test_options_of_one_request_leave_its_neighbours_alone(llm, checkpoint):
    prompts = prompts_for(llm, [9, 20, 31])
    greedy = SamplingParams(temperature=0, max_tokens=15, ignore_eos=True)
    other = SamplingParams(temperature=0.7, top_k=3, repetition_penalty=1.5, max_tokens=15, logprobs=2)
    outputs = generate(llm, prompts, [greedy, other, greedy])
    model = checkpoint[1]
    for i in (0, 2):
        reference = reference_tokens(model, prompts[i], 15)
        assert outputs[i]["token_ids"][: len(reference)] == reference
        assert outputs[i]["logprobs"] is None and outputs[i]["cumulative_logprob"] is None


# ---- chat, defaults, abort, refusals


def test_chat_computes_only_what_is_new_in_each_turn(demo):
    messages = []
    params = SamplingParams(temperature=0, max_tokens=60)
    prompt_tokens = num_answered = 0
    for turn, question in enumerate(["introduce yourself", "What is 12 + 30?", "count from 3 to 9"]):
        messages.append({"role": "user", "content": question})
        [output] = demo.chat(messages, params, use_tqdm=False)
        previous = prompt_tokens
        rendered = demo.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt_tokens = len(demo.tokenizer(rendered)["input_ids"])
        if turn:  # everything up to the last full block of the turn before was computed there
            in_cache = previous + num_answered - 1  # the token that ended it was sampled, not computed
            assert output["num_cached_tokens"] == in_cache // 16 * 16
        num_answered = len(output["token_ids"])
        messages.append({"role": "assistant", "content": output["text"]})
    assert output["num_cached_tokens"] > 60


def test_chat_takes_one_conversation_or_many_and_template_arguments(demo):
    one = [{"role": "user", "content": "introduce yourself"}]
    params = SamplingParams(temperature=0, max_tokens=40)
    single = demo.chat(one, params, use_tqdm=False, chat_template_kwargs={"enable_thinking": False})
    many = demo.chat([one, one], params, use_tqdm=False)
    assert len(single) == 1 and [output["text"] for output in many] == [single[0]["text"]] * 2
    with pytest.raises(TypeError, match="conversations"):
        demo.chat([["hello"]], params)
    with pytest.raises(TypeError, match="conversations"):
        demo.chat(["hello"], params)
    with pytest.raises(TypeError, match=r"pass \[{'role'"):
        demo.chat(one[0], params)
    with pytest.raises(TypeError, match=r"pass SamplingParams\(temperature="):
        demo.chat(one, temperature=0, max_tokens=3)


def test_a_model_without_template_says_so(tmp_path):
    save_model(tmp_path)
    with (
        LLM(str(tmp_path), num_kvcache_blocks=9, **SETTINGS) as llm,
        pytest.raises(ValueError, match="no chat template"),
    ):
        llm.chat([{"role": "user", "content": "hello"}])


def test_default_sampling_params_are_the_checkpoints(tmp_path, demo):
    assert demo.default_sampling_params().temperature == 0.6
    save_model(tmp_path)
    stored = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "max_new_tokens": 99}
    (tmp_path / "generation_config.json").write_text(json.dumps(stored))
    with LLM(str(tmp_path), num_kvcache_blocks=9, **SETTINGS) as llm:
        assert llm.default_sampling_params() == SamplingParams(temperature=0.7, top_k=20, top_p=0.8, max_tokens=99)
        (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": False}))
        assert llm.default_sampling_params() == SamplingParams(temperature=0)


def test_abort_ends_a_request_with_what_it_has(llm):
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    prompts = prompts_for(llm, [9, 12])
    expected = generate(llm, prompts[1:], params)[0]["token_ids"]
    ids = [llm.add_request(prompt, params) for prompt in prompts]
    for _ in range(4):
        llm.step()
    assert llm.abort(ids[0]) and not llm.abort(ids[0]) and not llm.abort(10**9)
    results = {}
    while not llm.is_finished():
        results |= {output["request_id"]: output["token_ids"] for output in llm.step()[0]}
    assert len(results[ids[0]]) == 4 and results[ids[1]] == expected
    assert llm.block_manager.num_free_blocks == 400


def test_max_tokens_none_goes_to_the_models_length(llm):
    [output] = generate(llm, [[5] * 500], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    assert len(output["token_ids"]) == 12 and output["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"top_p": 1.1}, ValueError, "top_p"),
        ({"top_k": -2}, ValueError, "top_k"),
        ({"top_k": 1.5}, TypeError, "top_k"),
        ({"min_p": -0.1}, ValueError, "min_p"),
        ({"presence_penalty": 3.0}, ValueError, "presence_penalty"),
        ({"frequency_penalty": -2.1}, ValueError, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty"),
        ({"repetition_penalty": 1e-300}, ValueError, "repetition_penalty"),  # with which logits would overflow
        ({"temperature": 10**400}, ValueError, "temperature"),
        ({"top_k": 2**63}, ValueError, "top_k must fit into 64 bits"),
        ({"logit_bias": {2**63: 1.0}}, TypeError, "logit_bias"),
        ({"stop_token_ids": [2**63]}, TypeError, "stop_token_ids"),
        ({"n": 0}, ValueError, "n must be"),
        ({"n": 2, "temperature": 0}, ValueError, "n=2"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"stop": ""}, ValueError, "stop"),
        ({"stop": [3]}, TypeError, "stop"),
        ({"stop_token_ids": ["x"]}, TypeError, "stop_token_ids"),
        ({"allowed_token_ids": []}, ValueError, "allowed_token_ids"),
        ({"logit_bias": {1: 200.0}}, ValueError, "logit_bias"),
        ({"logit_bias": [1]}, TypeError, "logit_bias"),
        ({"bad_words": "word"}, TypeError, "bad_words"),
        ({"min_tokens": 9, "max_tokens": 5}, ValueError, "min_tokens=9"),
        ({"logprobs": -2}, ValueError, "logprobs"),
        ({"prompt_logprobs": "all"}, TypeError, "prompt_logprobs"),
        ({"logits_processors": [3]}, TypeError, "logits_processors"),
    ],
)
def test_bad_options_are_refused_at_construction_by_name(kwargs, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(**kwargs)


def test_params_can_be_replaced_and_compared():
    params = SamplingParams(n=2, stop="x", logit_bias={1: 2.0}, prompt_logprobs=1)
    assert replace(params, prompt_logprobs=None) == SamplingParams(n=2, stop=["x"], logit_bias={1: 2.0})
    assert replace(params, allowed_token_ids=[3]).allowed_token_ids == (3,)


def test_prompt_logprobs_with_n_are_reported_once_for_all(llm):
    [prompt] = prompts_for(llm, [11])
    [output] = generate(llm, [prompt], SamplingParams(n=3, max_tokens=2, prompt_logprobs=1))
    assert len(output["prompt_logprobs"]) == 11 and len(output["outputs"]) == 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"stop_token_ids": [10**6]}, r"sampling_params\[1\].stop_token_ids has the token id 1000000"),
        ({"allowed_token_ids": [-1]}, r"sampling_params\[1\].allowed_token_ids"),
        ({"logit_bias": {10**6: 1.0}}, r"sampling_params\[1\].logit_bias"),
    ],
)
def test_one_bad_request_is_refused_by_name_before_anything_runs(llm, kwargs, message):
    with pytest.raises(ValueError, match=message):
        generate(llm, [[5], [6]], [SamplingParams(), SamplingParams(**kwargs)])
    assert llm.is_finished()


def test_texts_need_a_tokenizer(tmp_path):
    save_model(tmp_path)
    with LLM(str(tmp_path), num_kvcache_blocks=9, **SETTINGS) as llm:
        for kwargs in ({"stop": "x"}, {"bad_words": ["x"]}):
            with pytest.raises(ValueError, match="tokenizer"):
                generate(llm, [[5]], SamplingParams(**kwargs))


def test_bad_words_do_not_appear(demo):
    question = [{"role": "user", "content": "list all prime numbers within 100"}]
    params = SamplingParams(temperature=0, max_tokens=60)
    [free] = demo.chat(question, params, use_tqdm=False)
    [output] = demo.chat(question, SamplingParams(temperature=0, max_tokens=60, bad_words=["prime"]), use_tqdm=False)
    assert " prime " in free["text"] and " prime " not in output["text"]
