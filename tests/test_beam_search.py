"""Beam search equals transformers', token ids and scores, and computes nothing twice."""

import pytest
import torch

from helpers import random_prompts, save_model
from nanovllm import LLM, BeamSearchParams, SamplingParams

BLOCK = 4


def reference(model, prompt: list[int], params: BeamSearchParams) -> tuple[list[list[int]], list[float]]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=params.beam_width,
        num_return_sequences=params.beam_width,
        max_new_tokens=params.max_tokens,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    eos = model.generation_config.eos_token_id
    eos = {eos} if isinstance(eos, int) else set(eos)
    tokens = []
    for row in out.sequences[:, len(prompt) :].tolist():
        ends = [i + 1 for i, token in enumerate(row) if token in eos]
        tokens.append(row[: min(ends, default=params.max_tokens)])  # what follows is padding
    return tokens, out.sequences_scores.tolist()


@pytest.fixture(scope="module", params=[1, [1, 7, 30]], ids=["one-eos", "three-eos"])
def checkpoint(request, tmp_path_factory):
    """With logits flat enough that beams end at different lengths."""
    path = tmp_path_factory.mktemp("model")
    model = save_model(path, vocab_size=41, initializer_range=0.08, eos_token_id=request.param)
    return path, model


@pytest.mark.parametrize(
    "pressure", [{}, {"num_kvcache_blocks": 16}, {"max_num_batched_tokens": 5}, {"max_num_seqs": 6}]
)
@pytest.mark.parametrize(
    "params",
    [
        BeamSearchParams(beam_width=3, max_tokens=12),
        BeamSearchParams(beam_width=5, max_tokens=9, length_penalty=0.0),
        BeamSearchParams(beam_width=4, max_tokens=14, length_penalty=2.0),
        BeamSearchParams(beam_width=3, max_tokens=12, early_stopping=True),
    ],
    ids=["w3", "w5-no-penalty", "w4-long", "early"],
)
def test_hypotheses_and_scores_equal_transformers(checkpoint, params, pressure):
    path, model = checkpoint
    prompts = random_prompts([1, 5, 8, 17], vocab_size=41)
    settings = {"num_kvcache_blocks": 300} | pressure
    with LLM(str(path), kvcache_block_size=BLOCK, dtype="float32", device="cpu", **settings) as llm:
        outputs = llm.beam_search(prompts, params, use_tqdm=False)
        assert llm.block_manager.num_free_blocks == llm.config.num_kvcache_blocks
        assert llm.is_finished()
    for output, prompt in zip(outputs, prompts, strict=True):
        tokens, scores = reference(model, prompt, params)
        assert [beam["token_ids"] for beam in output["outputs"]] == tokens
        assert [beam["score"] for beam in output["outputs"]] == pytest.approx(scores, abs=1e-4)
        assert output["token_ids"] == tokens[0]


def test_beams_share_their_common_blocks_and_compute_one_token_a_step(checkpoint):
    path, _ = checkpoint
    [prompt] = random_prompts([21], vocab_size=41)
    computed = []
    with LLM(str(path), kvcache_block_size=BLOCK, num_kvcache_blocks=60, dtype="float32") as llm:
        step, run, most_blocks = llm.model_runner.run, [], []

        def recording(seqs, *args):
            computed.append(sum(seq.num_scheduled_tokens for seq in seqs))
            most_blocks.append(60 - llm.block_manager.num_free_blocks)
            run.append(len(seqs))
            return step(seqs, *args)

        llm.model_runner.run = recording
        llm.beam_search([prompt], BeamSearchParams(beam_width=4, max_tokens=10, ignore_eos=True), use_tqdm=False)
    assert computed == [21] + [4] * 9
    assert max(most_blocks) <= 5 + 4 * 4  # the prompt's full blocks once, and each beam's own


def test_greedy_is_beam_search_of_width_one(checkpoint):
    path, _ = checkpoint
    prompts = random_prompts([3, 9], vocab_size=41)
    with LLM(str(path), kvcache_block_size=BLOCK, num_kvcache_blocks=60, dtype="float32") as llm:
        beams = llm.beam_search(prompts, BeamSearchParams(beam_width=1, max_tokens=12, ignore_eos=True), use_tqdm=False)
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
        for beam, output in zip(beams, llm.generate(prompts, params, use_tqdm=False), strict=True):
            assert beam["token_ids"] == output["token_ids"]
            assert beam["score"] == pytest.approx(output["cumulative_logprob"] / 12, abs=1e-4)


def test_the_cache_may_be_too_small_for_any_beam(checkpoint):
    path, _ = checkpoint
    with LLM(str(path), kvcache_block_size=BLOCK, num_kvcache_blocks=3, dtype="float32") as llm:
        [output] = llm.beam_search([[5] * 8], BeamSearchParams(beam_width=3, max_tokens=40, ignore_eos=True), False)
        assert output["finish_reason"] == "length"
        assert 1 <= len(output["token_ids"]) <= 5
        assert llm.block_manager.num_free_blocks == 3


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"beam_width": 0}, "beam_width"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"length_penalty": float("nan")}, "length"),
    ],
)
def test_bad_params_are_refused(kwargs, name):
    with pytest.raises(ValueError, match=name):
        BeamSearchParams(**kwargs)


def test_a_width_above_the_engines_is_refused_and_errors_leave_it_usable(checkpoint, monkeypatch):
    path, _ = checkpoint
    with LLM(str(path), kvcache_block_size=BLOCK, num_kvcache_blocks=60, max_num_seqs=4, dtype="float32") as llm:
        with pytest.raises(ValueError, match="beam_width=5 must not exceed max_num_seqs=4"):
            llm.beam_search([[5]], BeamSearchParams(beam_width=5))
        run, calls = llm.model_runner.run, []

        def failing(*args):
            calls.append(1)
            if len(calls) > 3:
                raise RuntimeError("boom")
            return run(*args)

        monkeypatch.setattr(llm.model_runner, "run", failing)
        with pytest.raises(RuntimeError, match="boom"):
            llm.beam_search([[5, 6, 7]] * 2, BeamSearchParams(beam_width=2), use_tqdm=False)
        monkeypatch.undo()
        assert llm.is_finished() and llm.block_manager.num_free_blocks == 60
        assert len(llm.beam_search([[5, 6, 7]], BeamSearchParams(beam_width=2), use_tqdm=False)) == 1
