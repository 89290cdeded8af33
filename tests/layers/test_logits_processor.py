"""Each filter's distribution is the exact filtered one, and its support exactly the allowed set."""

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from helpers import chi_squared_p
from nanovllm.engine import sampling
from nanovllm.engine.batch import splitmix64
from nanovllm.engine.sampling import sample_with_options
from nanovllm.engine.sequence import Sequence
from nanovllm.layers import logits_processor
from nanovllm.layers.logits_processor import edit_logits, filter_logits, token_logprobs
from nanovllm.sampling_params import SamplingParams

VOCAB = 200
DRAWS = 20_000


def exact_distribution(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The definition, one token at a time, in fp64: temperature, min-p, top-k, top-p, each on what is left."""
    probs = (logits.double() / params.temperature).softmax(0)
    probs[probs < params.min_p * probs.max()] = 0
    probs /= probs.sum()
    order = probs.argsort(descending=True).tolist()
    if params.top_k > 0:
        probs[order[params.top_k :]] = 0
        probs /= probs.sum()
    total = 0.0
    for token in order:
        if total >= params.top_p:
            probs[token] = 0
        total += probs[token].item()
    return probs / probs.sum()


def draw(logits: torch.Tensor, params: SamplingParams, n: int, key: int = 0) -> torch.Tensor:
    seq = Sequence(0, [5], params)
    seq.num_scheduled_tokens = 1
    uniforms = torch.from_numpy(splitmix64(np.full(n, key, dtype=np.uint64), np.arange(n)))
    tokens = []
    for part in uniforms.split(500):
        temperatures = torch.full((len(part),), params.temperature)
        sampled = sample_with_options(logits.expand(len(part), -1), temperatures, part, [seq] * len(part))
        tokens += [token_id for [token_id] in sampled]
    return torch.tensor(tokens)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"top_k": 1},
        {"top_k": 17},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_p": 1e-6},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 1.7},
        {"top_k": 5, "top_p": 0.99, "temperature": 0.5},
        {"top_k": VOCAB + 50},
        {"top_k": -1, "top_p": 0.5},
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(kwargs):
    params = SamplingParams(**kwargs)
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    probs = exact_distribution(logits, params)
    counts = torch.bincount(draw(logits, params, DRAWS), minlength=VOCAB)
    assert not counts[probs == 0].any()
    support = filter_logits(
        (logits / params.temperature)[None],
        torch.tensor([params.top_k]),
        torch.tensor([params.top_p]).double(),
        torch.tensor([params.min_p]),
    )[0]
    assert torch.equal(support.isfinite(), probs > 0)
    if (probs > 0).sum() > 1:
        assert chi_squared_p(counts, probs.float()) > 1e-4


def test_filters_equal_transformers_warpers():
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0)) * 3
    ours = filter_logits(logits / 1.3, torch.full((6,), 50), torch.full((6,), 0.85).double(), torch.full((6,), 0.01))
    warpers = [TemperatureLogitsWarper(1.3), MinPLogitsWarper(0.01), TopKLogitsWarper(50), TopPLogitsWarper(0.85)]
    theirs = LogitsProcessorList(warpers)(torch.zeros(6, 1, dtype=torch.long), logits.clone())
    torch.testing.assert_close(ours, theirs)


def test_a_row_is_cut_the_same_whatever_its_neighbours_ask_for():
    """Bit for bit, with ties at every boundary, rows that need the whole vocabulary and rows that do not."""
    generator = torch.Generator().manual_seed(1)
    flat = torch.randn(6, 7000, generator=generator) * 0.1
    peaked = torch.randn(6, 7000, generator=generator) * 8
    logits = torch.cat([flat, peaked]).bfloat16().float()
    top_k = torch.tensor([0, 3, 0, 0, 2000, 5000] * 2)
    top_p = torch.tensor([1.0, 1.0, 0.95, 0.01, 0.5, 1.0] * 2).double()
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1e-3, 0.0, 1e-4, 0.0, 0.0, 0.0])
    together = filter_logits(logits, top_k, top_p, min_p)
    for rows in [[i] for i in range(12)] + [[5, 8], [4, 9, 1], [2, 7], [11, 3, 0]]:
        assert torch.equal(filter_logits(logits[rows], top_k[rows], top_p[rows], min_p[rows]), together[rows])
    num_kept = together.isfinite().sum(1)
    assert num_kept[[0, 1, 5, 7, 11]].tolist() == [7000, 3, 5000, 3, 5000]
    assert num_kept[2] > 1024 and num_kept[8] < 1024


def test_of_equal_logits_the_lower_ids_survive():
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0, 2.0, 1.0]])
    for kwargs, kept in [
        ({"top_k": 4}, [0, 1, 2, 5]),
        ({"top_k": 1}, [1]),
        ({"top_p": 0.7}, [0, 1, 2, 5]),
        ({"top_k": 6, "top_p": 0.7}, [0, 1, 2, 5]),
    ]:
        params = SamplingParams(**kwargs)
        limits = torch.tensor([params.top_k]), torch.tensor([params.top_p]).double(), torch.zeros(1)
        assert filter_logits(logits, *limits)[0].isfinite().nonzero().flatten().tolist() == kept


def test_only_rows_that_need_it_have_their_whole_vocabulary_sorted(monkeypatch):
    looks, cut = [], logits_processor._cut

    def watched(logits, top_k, top_p, num_candidates):
        looks.append((len(logits), num_candidates))
        return cut(logits, top_k, top_p, num_candidates)

    monkeypatch.setattr(logits_processor, "_cut", watched)
    logits = torch.randn(8, 3000) * torch.tensor([0.1] * 2 + [8.0] * 6).unsqueeze(1)
    top_p = torch.tensor([0.9] * 7 + [1.0]).double()
    filter_logits(logits, torch.zeros(8, dtype=torch.long), top_p, torch.zeros(8))
    assert looks == [(7, 1024), (2, 3000)]


def test_many_rows_are_filtered_in_parts_of_bounded_memory(monkeypatch):
    sizes, filter_part = [], sampling.filter_logits
    logits, uniforms = torch.randn(7, VOCAB) * 2, torch.rand(7).double()
    temperatures = torch.tensor([0.5, 1.0, 0.0, 2.0, 1.0, 1.0, 0.7])
    seqs = [Sequence(i, [], SamplingParams(temperature=t.item(), top_p=0.6)) for i, t in enumerate(temperatures)]
    expected = sample_with_options(logits, temperatures, uniforms, seqs)
    monkeypatch.setattr(sampling, "FILTER_LOGITS", 2 * VOCAB)
    monkeypatch.setattr(sampling, "filter_logits", lambda x, *rest: sizes.append(len(x)) or filter_part(x, *rest))
    assert sample_with_options(logits, temperatures, uniforms, seqs) == expected
    assert sizes == [2, 2, 2]  # greedy needs no filter


def edit(logits: torch.Tensor, params: SamplingParams, prompt=(), output=(), end=(), bad=()) -> torch.Tensor:
    arrays = np.array(prompt, dtype=np.int32), np.array(output, dtype=np.int32)
    return edit_logits(logits.clone(), params, *arrays, frozenset(end), bad)


def test_repetition_penalty_equals_transformers():
    logits, prompt, output = torch.randn(VOCAB) * 3, [3, 9, 9, 50], [7, 3, 120]
    ids = torch.tensor([prompt + output])
    for penalty in (0.5, 1.3):
        ours = edit(logits, SamplingParams(repetition_penalty=penalty), prompt, output)
        torch.testing.assert_close(ours, RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[None].clone())[0])


def test_frequency_and_presence_penalties_count_the_completion_only():
    logits = torch.zeros(VOCAB)
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25)
    edited = edit(logits, params, prompt=[1, 1, 2], output=[2, 3, 3])
    assert edited[[1, 2, 3, 4]].tolist() == [0.0, -0.75, -1.25, 0.0]


def test_bad_words_equal_transformers():
    logits, output = torch.randn(VOCAB), [4, 8, 15]
    words = [[16], [15, 23], [8, 15, 42], [99, 15, 7], [1, 2, 3, 4, 5]]
    ours = edit(logits, SamplingParams(bad_words=["x"]), output=output, bad=words)
    theirs = NoBadWordsLogitsProcessor(words, eos_token_id=None)(torch.tensor([output]), logits[None].clone())[0]
    torch.testing.assert_close(ours, theirs)
    assert set(torch.flatten(ours.isinf().nonzero()).tolist()) == {16, 23, 42}


def test_allowed_tokens_bias_and_min_tokens():
    logits = torch.zeros(VOCAB)
    allowed = edit(logits, SamplingParams(allowed_token_ids=[3, 5, 7], logit_bias={5: 2.0, 6: 9.0}))
    assert allowed.isfinite().nonzero().flatten().tolist() == [3, 5, 7]
    assert allowed[5] == 2.0
    params = SamplingParams(min_tokens=2)
    assert edit(logits, params, output=[9], end=[1, 2])[[1, 2]].isinf().all()
    assert edit(logits, params, output=[9, 9], end=[1, 2]).isfinite().all()


def test_processors_see_the_completion_and_come_before_the_penalties():
    seen = []

    def process(token_ids, logits):
        seen.append(token_ids)
        return torch.ones_like(logits)

    edited = edit(torch.zeros(VOCAB), SamplingParams(logits_processors=[process], presence_penalty=0.5), [1], [2, 3])
    assert seen == [[2, 3]]
    assert edited[[1, 2, 3]].tolist() == [1.0, 0.5, 0.5]


def test_a_request_that_forbids_everything_ignores_its_rules_with_a_warning():
    seq = Sequence(0, [5], SamplingParams(allowed_token_ids=[1], min_tokens=1), frozenset([1]))
    seq.num_scheduled_tokens = 1
    with pytest.warns(UserWarning, match="forbid every token"):
        [[token]] = sample_with_options(torch.randn(1, VOCAB), None, None, [seq])
    assert 0 <= token < VOCAB


def test_logprobs_ranks_and_tops():
    logits = torch.randn(4, VOCAB)
    truth = logits.log_softmax(-1)
    tokens = [0, 17, 50, int(truth[3].argmax())]
    for row, entry in enumerate(token_logprobs(logits, tokens, 3)):
        assert entry["token_id"] == tokens[row]
        assert entry["logprob"] == pytest.approx(truth[row, tokens[row]].item(), abs=1e-6)
        assert entry["rank"] == int((truth[row] > truth[row, tokens[row]]).sum()) + 1
        assert [token for token, _ in entry["top"]] == truth[row].topk(3).indices.tolist()
    assert token_logprobs(logits, tokens, 0)[3]["rank"] == 1
    assert len(token_logprobs(logits, tokens, -1)[0]["top"]) == VOCAB
