"""Each filter's distribution is the exact filtered one, and its support exactly the allowed set.

In plain PyTorch, on a GPU if there is one, and by the CPU's kernels.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
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
from nanovllm.engine.batch import splitmix64
from nanovllm.engine.options import BatchOptions, bit_mask
from nanovllm.engine.sampling import OptionsSampler
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels import cpu as cpu_kernels
from nanovllm.kernels.cpu.compiled import load_kernels
from nanovllm.layers.logits_processor import (
    Options,
    apply_masks,
    edit_logits,
    filter_logits,
    logprob_entries,
    num_top_of,
    token_logprobs,
)
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.device import Download

VOCAB = 200
DRAWS = 20_000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="no kernels for this processor, or no compiler")


@pytest.fixture(params=["plain", pytest.param("compiled", marks=needs_kernels)])
def road(request) -> str:
    return request.param


def on_road(logits: torch.Tensor, road: str) -> torch.Tensor:
    """bf16 values in the dtype, and on the device, that decides who samples."""
    return logits.bfloat16() if road == "compiled" else logits.bfloat16().float().to(DEVICE)


def filtered(logits: torch.Tensor, road: str, top_k=None, top_p=None, min_p=None, device=DEVICE) -> torch.Tensor:
    """What is left of [R, V] fp32 logits: with the largest of each row as 0."""
    num_rows, vocab_size = logits.shape
    options = Options(np.arange(num_rows))
    if top_k is not None:
        options.top_k = np.array([k if 0 < k < vocab_size else vocab_size for k in top_k])
    if top_p is not None:
        options.top_p = np.array(top_p, dtype=np.float64)
    if min_p is not None:
        with np.errstate(divide="ignore"):
            options.log_min_p = np.log(np.array(min_p)).astype(np.float32)
    if road == "compiled":
        out = torch.empty_like(logits)
        options.processed_rows, options.processed = np.arange(num_rows), logits.contiguous()
        ones = torch.ones(num_rows)
        cpu_kernels.sample_with_options(
            torch.zeros_like(logits, dtype=torch.bfloat16), ones, ones.double() / 2, options, out
        )
        return out
    there = logits.to(device)
    return filter_logits(there - there.amax(-1, keepdim=True), options.on(there.device)).cpu()


def exact_distribution(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The definition, one token at a time, in fp64: temperature, min-p, top-k, top-p, each on what is left."""
    probs = (logits.double() / params.temperature).softmax(0)
    probs[probs < params.min_p * probs.max()] = 0
    probs /= probs.sum()
    order = probs.argsort(descending=True, stable=True).tolist()
    if params.top_k > 0:
        probs[order[params.top_k :]] = 0
        probs /= probs.sum()
    total = 0.0
    for token in order:
        if total >= params.top_p:
            probs[token] = 0
        total += probs[token].item()
    return probs / probs.sum()


def draw(logits: torch.Tensor, road: str, params: list[SamplingParams], n: int) -> torch.Tensor:
    """[n, sets of parameters] tokens after the same logits; the sets are beside each other in each batch."""
    sampler = OptionsSampler()
    uniforms = torch.from_numpy(splitmix64(np.arange(n * len(params)).astype(np.uint64), np.zeros(n * len(params))))
    seqs = [Sequence(i, [5, 9, 9], p, frozenset([1])) for i, p in enumerate(params)]
    for seq in seqs:
        seq.token_ids.extend([7, 9, 30])
        seq.bad_words_ids = [[9, 30, 12], [40], [8, 30, 3]] if seq.params.bad_words else []
    tokens = []
    for part in uniforms.split(len(params) * (-(-500 // len(params)))):
        batch = seqs * (len(part) // len(seqs))
        rows = on_road(logits, road).expand(len(part), -1)
        temperatures = torch.tensor([seq.temperature for seq in batch])
        sampled = sampler(rows, temperatures.to(rows.device), part.to(rows.device), batch).read()
        tokens += [token_id for [token_id] in sampled]
    return torch.tensor(tokens).view(n, len(params))


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
def test_draws_follow_the_filtered_distribution(road, kwargs):
    params = SamplingParams(**kwargs)
    logits = (torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2).bfloat16().float()
    probs = exact_distribution(logits, params)
    counts = torch.bincount(draw(logits, road, [params], DRAWS)[:, 0], minlength=VOCAB)
    assert not counts[probs == 0].any()
    support = filtered((logits / params.temperature)[None], road, [params.top_k], [params.top_p], [params.min_p])[0]
    assert torch.equal(support.isfinite(), probs > 0)
    if (probs > 0).sum() > 1:
        assert chi_squared_p(counts, probs.float()) > 1e-4


EIGHT = [
    {"temperature": 0.7},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"top_p": 0.8, "logprobs": 2},
    {"min_p": 0.05, "temperature": 1.5},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.7, "presence_penalty": -1.0},
    {"logit_bias": {3: 4.0, 8: -100.0, 40: 9.0}, "bad_words": ["x"], "top_k": 50},
    {"allowed_token_ids": list(range(0, 200, 3)), "min_tokens": 9, "stop_token_ids": [6, 12], "top_p": 0.9},
    {"logits_processors": [lambda ids, logits: logits.roll(len(ids))], "presence_penalty": 0.5, "temperature": 2.0},
]


def test_eight_sets_of_options_in_one_batch_have_their_own_distributions(road):
    """Each within what chance does in one of 10,000 tests, and nothing outside its support."""
    logits = (torch.randn(VOCAB, generator=torch.Generator().manual_seed(8)) * 2).bfloat16().float()
    params = [SamplingParams(max_tokens=99, **kwargs) for kwargs in EIGHT]
    tokens = draw(logits, road, params, 10_000)
    for column, own in enumerate(params):
        bad = [[9, 30, 12], [40], [8, 30, 3]] if own.bad_words else []
        edited = plain_edit(logits, own, [5, 9, 9], [7, 9, 30], {1} | set(own.stop_token_ids), bad)
        probs = exact_distribution(edited, own)
        counts = torch.bincount(tokens[:, column], minlength=VOCAB)
        assert not counts[probs == 0].any(), own
        assert chi_squared_p(counts, probs.float()) > 1e-4, own


def test_filters_equal_transformers_warpers(road):
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0)) * 3
    ours = filtered(logits / 1.3, road, [50] * 6, [0.85] * 6, [0.01] * 6)
    warpers = [TemperatureLogitsWarper(1.3), MinPLogitsWarper(0.01), TopKLogitsWarper(50), TopPLogitsWarper(0.85)]
    theirs = LogitsProcessorList(warpers)(torch.zeros(6, 1, dtype=torch.long), logits.clone())
    torch.testing.assert_close(ours, theirs - theirs.amax(-1, keepdim=True))


def test_a_row_is_cut_the_same_whatever_its_neighbours_ask_for(road):
    """Bit for bit, with ties at every boundary, rows that need the whole vocabulary and rows that do not."""
    generator = torch.Generator().manual_seed(1)
    flat = torch.randn(6, 7000, generator=generator) * 0.1
    peaked = torch.randn(6, 7000, generator=generator) * 8
    logits = torch.cat([flat, peaked]).bfloat16().float()
    top_k = np.array([0, 3, 0, 0, 2000, 5000] * 2)
    top_p = np.array([1.0, 1.0, 0.95, 0.01, 0.5, 1.0] * 2)
    min_p = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1e-3, 0.0, 1e-4, 0.0, 0.0, 0.0])
    together = filtered(logits, road, top_k, top_p, min_p)
    for rows in [[i] for i in range(12)] + [[5, 8], [4, 9, 1], [2, 7], [11, 3, 0]]:
        assert torch.equal(filtered(logits[rows], road, top_k[rows], top_p[rows], min_p[rows]), together[rows])
    num_kept = together.isfinite().sum(1)
    assert num_kept[[0, 1, 5, 7, 11]].tolist() == [7000, 3, 5000, 3, 5000]
    assert num_kept[2] > 1024 and num_kept[8] < 1024


def test_of_equal_logits_the_lower_ids_survive(road):
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0, 2.0, 1.0]])
    for kwargs, kept in [
        ({"top_k": [4]}, [0, 1, 2, 5]),
        ({"top_k": [1]}, [1]),
        ({"top_p": [0.7]}, [0, 1, 2, 5]),
        ({"top_k": [6], "top_p": [0.7]}, [0, 1, 2, 5]),
    ]:
        assert filtered(logits, road, **kwargs)[0].isfinite().nonzero().flatten().tolist() == kept


def awkward_rows(vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab_size)
    rows = [torch.randn(vocab_size, generator=generator) * scale for scale in (0.01, 1, 5, 30)]
    rows.append(torch.randint(-3, 3, (vocab_size,), generator=generator).float())  # ties everywhere
    rows.append(torch.zeros(vocab_size))
    is_rare = torch.rand(vocab_size, generator=generator) > 0.1
    is_rare[0] = False
    rows.append(rows[1].masked_fill(is_rare, -torch.inf))
    rows.append(rows[1].masked_fill(torch.arange(vocab_size) != vocab_size // 2, -torch.inf))
    rows += [rows[0].clone(), rows[0].clone()]
    rows[-1][-1], rows[-2][0] = 3e38, -3e38  # one is all there is; one is far away
    return torch.stack(rows)


@needs_kernels
@pytest.mark.parametrize("vocab_size", [1, 15, 65, 1000, 7001, 40_000])
def test_the_kernels_keep_exactly_what_plain_pytorch_keeps(vocab_size):
    rows = awkward_rows(vocab_size)
    n = len(rows)
    for top_k in (None, 1, 7, 300, 5000, vocab_size):
        for top_p in (None, 1e-9, 0.3, 0.95, 1 - 2**-53):
            for min_p in (None, 0.05, 1.0):
                options = [None if x is None else [x] * n for x in (top_k, top_p, min_p)]
                plain, compiled = (filtered(rows, road, *options, CPU) for road in ("plain", "compiled"))
                assert torch.equal(plain, compiled), (top_k, top_p, min_p)
                assert plain.isfinite().any(1).all()


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("vocab_size", [15, 1000])
def test_those_of_each_instruction_set_keep_the_same(vocab_size):
    test_the_kernels_keep_exactly_what_plain_pytorch_keeps(vocab_size)


def test_a_logit_that_is_not_a_number_is_no_crash(road):
    logits = torch.randn(4, 1000)
    logits[0, 5], logits[1] = torch.nan, torch.nan
    logits[2, :] = -torch.inf
    params = SamplingParams(top_k=20, top_p=0.9, min_p=0.01, logprobs=3)
    seqs = [Sequence(i, [5], params) for i in range(4)]
    x = on_road(logits, road)
    random = torch.ones(4, device=x.device), torch.full((4,), 0.5, device=x.device, dtype=torch.float64)
    with pytest.warns(UserWarning, match="forbid every token"):  # of the row without any
        sampled = OptionsSampler()(x, *random, seqs).read()
    assert all(0 <= token < 1000 for [token] in sampled)
    assert sampled[3] == OptionsSampler()(x[3:], random[0][3:], random[1][3:], seqs[3:]).read()[0]


@needs_kernels
def test_neither_threads_nor_neighbours_change_a_bit():
    logits = (torch.randn(len(EIGHT) * 4, 5000) * 3).bfloat16()
    uniforms, params = torch.rand(len(logits)).double(), [SamplingParams(**kwargs) for kwargs in EIGHT * 4]
    temperatures = torch.tensor([p.temperature for p in params])

    def sampled(rows: list[int]) -> list:
        seqs = [Sequence(i, [5, 9], replace(params[i], max_tokens=64, logprobs=4)) for i in rows]
        tokens = OptionsSampler()(logits[rows], temperatures[rows], uniforms[rows], seqs).read()
        return list(zip(tokens, [seq.logprobs for seq in seqs], strict=True))

    together = sampled(list(range(len(logits))))
    try:
        cpu_kernels.set_num_threads(3)
        assert sampled(list(range(len(logits)))) == together
    finally:
        cpu_kernels.set_num_threads(0)
    for row in range(len(logits)):
        assert sampled([row]) == together[row : row + 1]


def plain_edit(logits: torch.Tensor, params: SamplingParams, prompt, output, end=(), bad=()) -> torch.Tensor:
    """The definition, one token at a time, in the order that `SamplingParams` states."""
    logits = logits.clone()
    for token in range(len(logits)):
        if params.allowed_token_ids and token not in params.allowed_token_ids:
            logits[token] = -torch.inf
    for *start, last in bad:
        if len(output) >= len(start) and list(output[len(output) - len(start) :]) == start:
            logits[last] = -torch.inf
    for token in end if len(output) < params.min_tokens else ():
        logits[token] = -torch.inf
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    for process in params.logits_processors:
        logits = process(list(output), logits)
    for token in {*prompt, *output}:
        old, factor = logits[token].item(), params.repetition_penalty
        logits[token] = old / factor if old > 0 else old * factor
    for token in {*output}:
        logits[token] -= params.frequency_penalty * list(output).count(token) + params.presence_penalty
    return logits


def edited(logits: torch.Tensor, seqs: list[Sequence], num_drafts: list[int], batches: BatchOptions) -> torch.Tensor:
    """[R, V] fp32 logits of rows that all have edits, as `sample_with_options` has them before the temperature."""
    options = batches.of(list(zip(seqs, num_drafts, strict=True)), logits)
    return edit_logits(logits.clone(), options.on(CPU))


def edit(logits: torch.Tensor, params: SamplingParams, prompt=(), output=(), end=(), bad=()) -> torch.Tensor:
    seq = Sequence(0, prompt, params, frozenset(end), bad_words_ids=list(bad))
    seq.token_ids.extend(output)
    return edited(logits[None], [seq], [0], BatchOptions())[0]


def test_edits_follow_a_sequence_as_it_grows_with_its_drafts_and_in_other_batches():
    rng = np.random.default_rng(0)
    batches, bad = BatchOptions(), [[3], [1, 2], [2, 2, 5]]
    kwargs = [
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": -0.25},
        {"bad_words": ["x"], "min_tokens": 5, "logit_bias": {2: 1.5, 3: 4.0, 4: -100.0}},
        {"frequency_penalty": -0.5, "allowed_token_ids": [1, 2, 3, 8, 19], "min_tokens": 40},
        {"repetition_penalty": 0.7, "logits_processors": [lambda ids, x: x + len(ids)], "logit_bias": {1: 2.0}},
    ]
    params = [SamplingParams(**own) for own in kwargs]
    seqs = [Sequence(i, rng.integers(8, size=6), p, frozenset([7]), bad_words_ids=bad * bool(p.bad_words))
            for i, p in enumerate(params)]  # fmt: skip
    for step in range(60):
        some = [seq for seq in seqs if step % 7 or rng.random() < 0.6] or seqs
        for seq in some:
            seq.draft_ids = tuple(rng.integers(8, size=rng.integers(4)).tolist() if step % 3 == 0 else ())
        owners = [(seq, i) for seq in some for i in range(len(seq.draft_ids) + 1)]
        logits = torch.randn(len(owners), 20)
        got = edited(logits, *(list(column) for column in zip(*owners, strict=True)), batches)
        for row, (seq, i) in enumerate(owners):
            prompt, output = seq.token_ids[:6].tolist(), [*seq.token_ids[6:], *seq.draft_ids[:i]]
            expected = plain_edit(logits[row], seq.params, prompt, output, seq.end_token_ids, seq.bad_words_ids)
            torch.testing.assert_close(got[row], expected, rtol=1e-6, atol=1e-6)
        for seq in some:
            seq.token_ids.extend(rng.integers(8, size=1 + step % 2).tolist())
            seq.draft_ids = ()


@needs_kernels
def test_the_kernels_edit_as_plain_pytorch_does():
    """Greedily and at random, with and without an allowed token in the last, incomplete word of a mask."""
    torch.manual_seed(0)
    for vocab_size in (33, 200, 1000):
        logits = (torch.randn(4 * len(EIGHT), vocab_size) * 3).bfloat16()
        kwargs = [dict(own, temperature=i % 3 / 2) for i, own in enumerate(EIGHT * 4)]
        for own in kwargs:
            own["allowed_token_ids"] = [
                token for token in own.pop("allowed_token_ids", []) if token < vocab_size
            ] or None
            own["logit_bias"] = {token: x for token, x in own.pop("logit_bias", {}).items() if token < vocab_size}
        kwargs[-2]["allowed_token_ids"] = [vocab_size - 1]
        seqs = [Sequence(i, [5, 9, 9, 30], SamplingParams(**own), frozenset([1])) for i, own in enumerate(kwargs)]
        random = torch.tensor([seq.temperature for seq in seqs]), torch.rand(len(seqs)).double()
        plain, compiled = (OptionsSampler()(x, *random, seqs).read() for x in (logits.float(), logits))
        assert plain == compiled and plain[-2] == [vocab_size - 1]


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
    assert edit(logits, params, end=[VOCAB, 10**6], bad=[[VOCAB + 5]]).isfinite().all()  # of a larger tokenizer
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab_size", [1, 31, 32, 100, 1000])
def test_masks_forbid_what_their_bits_do_not_allow(vocab_size, dtype):
    logits = torch.randn(5, vocab_size + 8).to(DEVICE, dtype)[:, :vocab_size]
    is_allowed = torch.rand(3, vocab_size) < torch.tensor([0.5, 0.01, 0.99]).unsqueeze(1)
    masks = np.stack([bit_mask(row.nonzero().flatten().tolist(), vocab_size) for row in is_allowed])
    rows, expected = torch.tensor([4, 0, 3]), logits.clone()
    expected[rows] = expected[rows].masked_fill(~is_allowed.to(DEVICE), -torch.inf)
    apply_masks(logits, rows.to(DEVICE), torch.from_numpy(masks).to(DEVICE))
    assert torch.equal(logits, expected)


def test_a_request_that_forbids_everything_ignores_its_rules_with_a_warning(road):
    seq = Sequence(0, [5], SamplingParams(allowed_token_ids=[1], min_tokens=1), frozenset([1]))
    logits = torch.randn(1, VOCAB)
    with pytest.warns(UserWarning, match="forbid every token"):
        [[token]] = OptionsSampler()(on_road(logits, road), None, None, [seq]).read()
    assert token == logits.bfloat16().argmax()


def entries_of(logits: torch.Tensor, tokens: list[int], num_top: int) -> list[dict]:
    asked = num_top_of([num_top] * len(tokens), logits.shape[1])
    there = torch.tensor(tokens, device=logits.device)
    found = token_logprobs(logits, torch.arange(len(tokens), device=logits.device), there, asked)
    return logprob_entries(asked, *Download([there, *found]).read())


def test_logprobs_ranks_and_tops(road):
    logits = on_road(torch.randn(4, VOCAB), road)
    truth = logits.cpu().float().log_softmax(-1)
    tokens = [0, 17, 50, int(truth[3].argmax())]
    for row, entry in enumerate(entries_of(logits, tokens, 3)):
        order = truth[row].sort(descending=True, stable=True).indices[:3]  # of equal ones the lower ids first
        assert entry["token_id"] == tokens[row]
        assert entry["logprob"] == pytest.approx(truth[row, tokens[row]].item(), abs=1e-6)
        assert entry["rank"] == int((truth[row] > truth[row, tokens[row]]).sum()) + 1
        assert [token for token, _ in entry["top"]] == order.tolist()
        assert [value for _, value in entry["top"]] == pytest.approx(truth[row, order].tolist(), abs=1e-6)
    assert entries_of(logits, tokens, 0)[3]["rank"] == 1
    everything = entries_of(logits, tokens, -1)[0]["top"]
    assert [token for token, _ in everything] == truth[0].sort(descending=True, stable=True).indices.tolist()


def test_tops_of_equal_logits_are_the_lowest_ids_however_many_others_want(road):
    logits = on_road(torch.randint(-2, 3, (3, 5000)).float(), road)
    seqs = [Sequence(i, [5], SamplingParams(temperature=0, logprobs=n)) for i, n in enumerate((4, 0, 900))]
    OptionsSampler()(logits, None, None, seqs).read()
    for seq in seqs:
        order = logits[seq.seq_id].cpu().float().sort(descending=True, stable=True).indices.tolist()
        assert [token for token, _ in seq.logprobs[0]["top"]] == order[: seq.params.logprobs]


# ---- what a GPU is asked for


class Launches(TorchDispatchMode):
    """Counts what would be launched on a device without memory, where whatever waits for a value is an error."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        outs = out if isinstance(out, (tuple, list)) else [out]
        is_view = any(alias.alias_info and not alias.alias_info.is_write for alias in function._schema.returns)
        self.count += not is_view and any(isinstance(x, torch.Tensor) and x.device.type == "meta" for x in outs)
        return out


def launch(num_rows: int, kwargs: list[dict], device: str = "meta"):
    """The sampling of a step of so many sequences."""
    seqs = [Sequence(i, [5, 9, 9, 30], SamplingParams(**kwargs[i % len(kwargs)]), frozenset([1]))
            for i in range(num_rows)]  # fmt: skip
    for seq in seqs:
        seq.bad_words_ids = [[9, 30, 12], [40]] if seq.params.bad_words else []
    random = torch.ones(num_rows, device=device), torch.ones(num_rows, device=device, dtype=torch.float64) / 2
    return OptionsSampler()(torch.zeros(num_rows, VOCAB, dtype=torch.bfloat16, device=device), *random, seqs)


ALL_BUT_CALLABLES = [own for own in EIGHT if "logits_processors" not in own]


@pytest.mark.parametrize("kwargs", [*([own] for own in ALL_BUT_CALLABLES), ALL_BUT_CALLABLES], ids=str)
def test_no_option_waits_for_the_device_and_many_rows_are_launched_like_few(kwargs):
    counts = []
    for num_rows in (len(kwargs), 4 * len(kwargs), 32 * len(kwargs)):
        with Launches() as launches:
            launch(num_rows, kwargs)
        counts.append(launches.count)
    assert counts[0] == counts[1] == counts[2] > 0


@pytest.mark.parametrize("wait", ["x.tolist()", "x.nonzero()", "x[x > 0]", "x.cpu()", "int(x[0])"])
def test_the_test_notices_what_waits(wait):
    with pytest.raises((NotImplementedError, RuntimeError)), Launches():
        eval(wait, {"x": torch.zeros(3, device="meta")})


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_no_option_waits_for_a_gpu():
    launch(64, ALL_BUT_CALLABLES, DEVICE)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch(64, ALL_BUT_CALLABLES, DEVICE)
    finally:
        torch.cuda.set_sync_debug_mode("default")
