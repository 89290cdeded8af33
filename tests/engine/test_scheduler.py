"""The scheduler and the block manager against a plain model of the cache, over random histories."""

import random
import sys
from collections import Counter, deque

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from nanovllm.engine import block_manager as block_manager_module
from nanovllm.engine import scheduler as scheduler_module
from nanovllm.engine.batch import BatchBuilder
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.drafts import Drafter
from nanovllm.engine.model_runner import _score_given
from nanovllm.engine.sampling import split_samples
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.sampling_params import SamplingParams

EOS = 0
MAX_MODEL_LEN = 60


def next_token(tokens: tuple[int, ...]) -> int:
    """The plain model's "language model": a fixed function of everything before. One token in 16 is the EOS."""
    return hash((17, tokens)) % 16


def complete(prompt: list[int], max_tokens: int) -> list[int]:
    """What a request must produce, whatever runs beside it."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens and len(tokens) < MAX_MODEL_LEN:
        tokens.append(next_token(tuple(tokens)))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


class Guesser(Drafter):
    """Guesses the true next tokens, and now and then a wrong one."""

    def __init__(self, seed: int):
        super().__init__(4, 100)
        self.rng = random.Random(seed)
        self.num_right = self.num_wrong = 0

    def draft(self, seqs: list[Sequence], num_tokens: int) -> list[tuple[Sequence, tuple[int, ...]]]:
        drafts = []
        for seq in seqs:
            tokens, guesses = tuple(seq.token_ids), []
            for _ in range(min(self.rng.randrange(1, 6), seq.max_len - len(seq) - 1)):
                guesses.append(next_token((*tokens, *guesses)) if self.rng.random() < 0.9 else self.rng.randrange(16))
            if guesses:
                drafts.append((seq, tuple(guesses)))
        return drafts

    def learn(self, seq: Sequence, num_right: int, num_drafts: int) -> None:
        self.num_right += num_right
        self.num_wrong += num_right < num_drafts


class Engine:
    """The control plane with a plain model in place of the tensors: a slot holds all tokens up to the one stored."""

    def __init__(
        self, num_blocks: int, block_size: int, max_num_seqs: int, budget: int, chunk: int = 2**31,
        drafter: Drafter | None = None, leads: bool = False
    ):  # fmt: skip
        self.leads = leads  # to the next step before its tokens are read, where it may
        self.ahead: tuple[list[Sequence], list[int], list[list[int]]] | None = None
        self.manager = BlockManager(num_blocks, block_size)
        self.scheduler = Scheduler(self.manager, max_num_seqs, budget, chunk, drafter)
        self.builder = BatchBuilder(block_size, -(-MAX_MODEL_LEN // block_size))
        self.slots: dict[int, tuple[int, ...]] = {}
        self.requests: dict[int, tuple[Sequence, list[int]]] = {}
        self.beams: set[int] = set()
        self.num_steps = self.num_ahead = self.next_id = 0

    def add(self, prompt: list[int], max_tokens: int, copies: int = 1, is_beam: bool = False) -> None:
        """Copies may share the blocks of the first; a "beam" is forked into two sequences when it finishes."""
        params = SamplingParams(max_tokens=max_tokens)
        source = None
        for _ in range(copies):
            seq = Sequence(self.next_id, prompt, params, frozenset([EOS]), MAX_MODEL_LEN, source=source)
            if is_beam:
                seq.keeps_blocks = 1
                self.beams.add(seq.seq_id)
            self.next_id += 1
            self.requests[seq.seq_id] = seq, complete(prompt, max_tokens)
            self.scheduler.add(seq)
            source = source or seq

    def score(self, prompt: list[int], completions: list[list[int]]) -> None:
        """Given completions, that may share the blocks of the prompt."""
        source = None
        for completion in completions:
            params = SamplingParams(max_tokens=0, prompt_logprobs=0)
            seq = Sequence(self.next_id, prompt, params, frozenset([EOS]), source=source)
            seq.token_ids.extend(completion)
            self.next_id += 1
            self.requests[seq.seq_id] = seq, completion
            self.scheduler.add(seq)
            source = source or seq

    def fork(self, parent: Sequence) -> None:
        for token_id in (1, 2):
            prompt = [*parent.token_ids[: parent.num_computed_tokens], token_id]
            if parent.block_table and len(prompt) < min(MAX_MODEL_LEN, self.capacity):
                child = Sequence(self.next_id, prompt, SamplingParams(max_tokens=9), frozenset([EOS]), MAX_MODEL_LEN)
                self.next_id += 1
                self.requests[child.seq_id] = child, complete(prompt, 9)
                self.scheduler.fork(parent, child)
        self.scheduler.drop_held([parent])

    @property
    def capacity(self) -> int:
        return len(self.manager.blocks) * self.manager.block_size

    def copy_blocks(self) -> None:
        size = self.manager.block_size
        for source, target, num_filled in self.manager.copies:
            for offset in range(num_filled):
                self.slots[target * size + offset] = self.slots.get(source * size + offset, ())
        self.manager.copies.clear()

    def slot(self, seq: Sequence, position: int) -> int:
        size = self.manager.block_size
        return seq.block_table[position // size] * size + position % size

    def step(self, fail: bool = False) -> None:
        before, self.ahead = self.ahead or ([], [], []), None
        unread = {seq: token_ids for seq, _, token_ids in zip(*before, strict=True)}
        seqs = self.scheduler.schedule(is_ahead=bool(unread))
        self.num_steps += 1
        if not seqs:
            return self.scheduler.postprocess(*before)
        batch = self.builder.build(seqs, list(unread))
        self.check_schedule(seqs, unread)
        if fail:
            self.scheduler.recover()
            self.check_invariants()
            return
        self.copy_blocks()
        written = []
        for seq in seqs:
            tokens = (*seq.token_ids, *unread.get(seq, ()), *seq.draft_ids)
            end = seq.num_computed_tokens + seq.num_scheduled_tokens
            for position in range(seq.num_computed_tokens):  # before this step's tokens are stored
                assert self.slots[self.slot(seq, position)] == tokens[: position + 1]
            written += [(self.slot(seq, p), tokens[: p + 1]) for p in range(seq.num_computed_tokens, end)]
        assert len({slot for slot, _ in written}) == len(written), "two tokens in one slot"
        assert batch.slot_mapping.tolist() == [slot for slot, _ in written]
        if unread:
            last_tokens = [token_id for [token_id] in unread.values()]
            is_unread = batch.sources >= 0
            batch.input_ids[: len(is_unread)][is_unread] = np.array(last_tokens)[batch.sources[is_unread]]
        assert batch.input_ids.tolist() == [tokens[-1] for _, tokens in written]
        assert batch.positions.tolist() == [len(tokens) - 1 for _, tokens in written]
        num_decode = batch.num_decode
        owners = [seq for seq in seqs for _ in range(seq.num_scheduled_tokens)][:num_decode]
        chunks = seqs[len(set(owners)) :]
        ends = [seq.num_computed_tokens + seq.num_scheduled_tokens for seq in chunks]
        assert batch.context_lens.tolist() == [len(tokens) for _, tokens in written[:num_decode]] + ends
        if batch.block_tables is not None:
            for row, seq in zip(batch.block_tables.tolist(), owners + chunks, strict=True):
                assert row[: len(seq.block_table)] == seq.block_table
        self.slots.update(written)
        if batch.prompt_logprob_rows is not None:
            likely = torch.tensor([next_token(written[row][1]) for row in batch.prompt_logprob_rows])
            _score_given(seqs, batch, batch.prompt_logprob_rows, torch.eye(16)[likely])
        rows = range(len(written)) if batch.logit_rows is None else batch.logit_rows
        samples = [next_token(written[row][1]) for row in rows]
        step = seqs, self.scheduler.advance(seqs), split_samples(samples, seqs, batch.num_sampled)
        self.scheduler.postprocess(*before)
        if self.leads:
            self.collect()  # before it is asked: a beam that has ended forks
            self.ahead = step if self.scheduler.may_lead() else None
        if self.ahead:
            self.num_ahead += 1
        else:
            self.scheduler.postprocess(*step)
            self.check_invariants()

    def check_schedule(self, seqs: list[Sequence], unread: dict[Sequence, list[int]]) -> None:
        scheduler, manager = self.scheduler, self.manager
        assert len(scheduler.running) <= scheduler.max_num_seqs
        for seq in seqs:
            assert seq.num_scheduled_tokens >= 1
            assert len(seq.block_table) == manager.num_blocks_for(seq.num_computed_tokens + seq.num_scheduled_tokens)
            first_new_block = seq.num_computed_tokens // manager.block_size
            assert all(manager.blocks[b].ref_count == 1 for b in seq.block_table[first_new_block:]), "shared, written"
        num_decode = scheduler.num_decode_tokens
        num_running = num_decode - sum(len(seq.draft_ids) for seq in seqs)
        assert all(seq.num_scheduled_tokens == 1 + len(seq.draft_ids) for seq in seqs[:num_running])
        assert not any(seq.draft_ids for seq in seqs[num_running:])
        assert sum(seq.num_scheduled_tokens for seq in seqs) <= max(scheduler.max_num_batched_tokens, num_decode)
        assert all(seq in seqs or (seq in unread and len(seq) + 1 == seq.max_len) for seq in scheduler.running)
        assert all(len(seq) + 1 < seq.max_len for seq in seqs if seq in unread)

    def check_invariants(self) -> None:
        manager, scheduler = self.manager, self.scheduler
        waiting = [seq for seq in scheduler.waiting if seq.status is not SequenceStatus.FINISHED]
        assert Counter(seq.seq_id for seq in [*waiting, *scheduler.running]) == Counter(list(scheduler.sequences))
        live = [*waiting, *scheduler.running, *scheduler.held.values()]
        held = Counter(block_id for seq in live for block_id in seq.block_table)
        for block in manager.blocks:
            assert block.ref_count == held[block.block_id]
            assert (block.ref_count == 0) == (block.block_id in manager.free_ids)
        for block_hash, block in manager.cached.items():
            assert block.hash == block_hash
        for seq in live:
            assert len(seq.block_table) == manager.num_blocks_for(seq.num_computed_tokens)
        assert all(not seq.block_table for seq in waiting[1:])
        unread = self.ahead[0] if self.ahead else []
        assert all(seq.num_computed_tokens == len(seq) - (seq not in unread) for seq in scheduler.running)

    def collect(self) -> None:
        """Checks the requests that finished."""
        for seq in self.scheduler.finished:
            if seq.finish_reason == "abort":
                continue
            _, expected = self.requests.pop(seq.seq_id)
            got = seq.completion_token_ids
            assert got == expected[: len(got)]
            if got != expected:  # only a sequence that fills the whole cache may end early
                assert seq.finish_reason == "length"
                assert len(seq) > self.capacity
            elif got[-1] == EOS:
                assert seq.finish_reason == "stop"
            if seq.params.max_tokens == 0:
                prompt = tuple(seq.token_ids[: seq.num_prompt_tokens])
                likely = [next_token((*prompt, *got[:i])) == got[i] for i in range(len(got))]
                assert [entry["rank"] == 1 for entry in seq.prompt_logprobs] == likely
            if seq.seq_id in self.beams:
                self.fork(seq)
        self.scheduler.finished = []

    def drain(self) -> None:
        deadline = self.num_steps + 5000
        while not self.scheduler.is_finished():
            self.step()
            self.collect()
            assert self.num_steps < deadline, "no progress"
        assert self.manager.num_free_blocks == len(self.manager.blocks)
        assert not self.requests


class History(RuleBasedStateMachine):
    mode = "plain"
    total_steps = preemptions = right = wrong = ahead = 0

    @initialize(
        num_blocks=st.integers(2, 24), block_size=st.integers(1, 5), max_num_seqs=st.integers(1, 6),
        budget=st.integers(1, 40), foresight=st.booleans(), chunk=st.integers(0, 9),
        seed=st.integers(0, 99),
    )  # fmt: skip
    def start(self, num_blocks, block_size, max_num_seqs, budget, foresight, chunk, seed):
        drafter = Guesser(seed) if self.mode == "drafts" else None
        self.engine = Engine(num_blocks, block_size, max_num_seqs, budget, chunk, drafter, self.mode == "ahead")
        if not foresight:
            self.engine.scheduler.output_ratio = 0.0

    @rule(data=st.data(), copies=st.integers(1, 3), max_tokens=st.integers(1, 30), is_beam=st.booleans())
    def add(self, data, copies, max_tokens, is_beam):
        """Prompts over two tokens, so that prefixes are shared all the time."""
        longest = min(MAX_MODEL_LEN - 1, self.engine.capacity)
        prompt = data.draw(st.lists(st.integers(1, 2), min_size=1, max_size=longest))
        self.engine.add(prompt, max_tokens, copies, is_beam)

    @rule(data=st.data())
    def score(self, data):
        """Completions that are likely for a few tokens, so that it matters what came before them."""
        most = min(MAX_MODEL_LEN, self.engine.capacity) - 1
        prompt = data.draw(st.lists(st.integers(1, 2), min_size=1, max_size=most))
        lengths = st.lists(st.integers(1, min(9, most + 1 - len(prompt))), min_size=1, max_size=4)
        others = [[next_token((*prompt, length))] for length in range(9)]
        completions = [(complete(prompt, n) + others[n - 1] * n)[:n] for n in data.draw(lengths)]
        self.engine.score(prompt, completions)

    @rule(times=st.integers(1, 12))
    def step(self, times):
        for _ in range(times):
            self.engine.step()
            self.engine.collect()

    @rule()
    def failing_step(self):
        self.engine.step(fail=True)
        self.engine.collect()

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data())
    def abort(self, data):
        seq_id = data.draw(st.sampled_from(sorted(self.engine.requests)))
        seq, _ = self.engine.requests.pop(seq_id)
        self.engine.scheduler.finish(seq, "abort")
        assert seq.status is SequenceStatus.FINISHED and seq in self.engine.scheduler.finished
        self.engine.scheduler.drop_held([seq])
        self.engine.check_invariants()

    def teardown(self):
        if hasattr(self, "engine"):
            self.engine.drain()
            type(self).total_steps += self.engine.num_steps
            type(self).preemptions += self.engine.scheduler.num_preemptions
            type(self).ahead += self.engine.num_ahead
            if drafter := self.engine.scheduler.drafter:
                type(self).right += drafter.num_right
                type(self).wrong += drafter.num_wrong


@pytest.mark.parametrize(("mode", "hash_bits"), [("plain", 64), ("plain", 2), ("drafts", 64), ("ahead", 64)])
def test_random_histories_keep_the_invariants(mode, hash_bits, monkeypatch):
    """With a 2-bit hash nearly every look-up collides."""
    true_hash = block_manager_module.xxh64_intdigest
    monkeypatch.setattr(block_manager_module, "xxh64_intdigest", lambda data: true_hash(data) % 2**hash_bits)
    History.mode = mode
    History.total_steps = History.preemptions = History.right = History.wrong = History.ahead = 0
    run_state_machine_as_test(History, settings=settings(max_examples=50, stateful_step_count=40, deadline=None))
    assert History.total_steps >= 1000 and History.preemptions > 0
    assert mode != "drafts" or (History.right > 30 and History.wrong > 5)
    assert mode != "ahead" or History.ahead > 100


def run(engine: Engine, prompts: list[list[int]], max_tokens: int = 8) -> list[list[tuple[int, int]]]:
    """Adds prompts and drains; returns `(seq_id, tokens computed)` of each prefill step."""
    for prompt in prompts:
        engine.add(prompt, max_tokens)
    prefills = []
    schedule = engine.scheduler.schedule

    def recording(is_ahead):
        seqs = schedule(is_ahead)
        prompts = seqs[engine.scheduler.num_decode_tokens :]
        if prompts:
            prefills.append([(seq.seq_id, seq.num_scheduled_tokens) for seq in prompts])
        return seqs

    engine.scheduler.schedule = recording
    engine.drain()
    return prefills


def test_a_long_prompt_is_computed_in_chunks():
    assert run(Engine(20, 4, 4, budget=10), [[1] * 25]) == [[(0, 10)], [(0, 10)], [(0, 5)]]


def test_identical_prompts_in_one_step_are_computed_once():
    prefills = run(Engine(40, 4, 8, budget=100), [[1] * 9, [1] * 9, [2] * 9, [2] * 9])
    assert prefills == [[(0, 9), (2, 9)], [(1, 1), (3, 1)]]


def test_a_full_hit_of_an_exact_multiple_computes_one_block():
    engine = Engine(40, 4, 8, budget=100)
    run(engine, [[1] * 8])
    assert run(engine, [[1] * 8])[-1] == [(1, 4)]


def test_the_token_budget_counts_only_what_is_not_cached():
    engine = Engine(40, 4, 8, budget=9)
    run(engine, [[1] * 8])
    assert run(engine, [[1] * 8 + [2], [1] * 8 + [1]])[-1] == [(1, 1), (2, 1)]


def test_preemption_takes_the_newest_and_resumes_it():
    engine = Engine(6, 4, 4, budget=100)
    engine.scheduler.output_ratio = 0.0
    prompts = [[1, 2, 1, 1], [2, 2, 1, 1], [1, 1, 2, 2]]
    for prompt in prompts:
        engine.add(prompt, 30)
    oldest = engine.scheduler.waiting[0]
    while not engine.scheduler.is_finished():
        engine.step()
        assert oldest.status is not SequenceStatus.WAITING
        engine.collect()
    assert engine.scheduler.num_preemptions > 0


def test_known_lengths_admit_only_what_fits():
    """Eight requests of 4 blocks in the end, and a cache of 17: foresight needs no preemption, optimism does."""
    preemptions = {}
    for ratio in (1.0, 0.0):
        engine = Engine(17, 4, 8, budget=100)
        engine.scheduler.output_ratio = ratio
        engine.scheduler.finished = deque(maxlen=0)
        for i in range(8):
            seq = Sequence(i, [i + 1] * 4, SamplingParams(max_tokens=12), frozenset(), MAX_MODEL_LEN)
            engine.scheduler.add(seq)
        while not engine.scheduler.is_finished():
            engine.step()
        preemptions[ratio] = engine.scheduler.num_preemptions
    assert preemptions[1.0] == 0 < preemptions[0.0]


def test_a_sequence_that_outgrows_the_cache_ends_alone_with_what_it_has():
    engine = Engine(3, 4, 4, budget=100)
    seq = Sequence(0, [1, 2, 3], SamplingParams(max_tokens=50, ignore_eos=True), frozenset(), MAX_MODEL_LEN)
    other = Sequence(1, [4, 5], SamplingParams(max_tokens=4, ignore_eos=True), frozenset(), MAX_MODEL_LEN)
    engine.scheduler.add(seq)
    engine.scheduler.add(other)
    while not engine.scheduler.is_finished():
        engine.step()
    assert seq.finish_reason == other.finish_reason == "length"
    assert len(seq) == 3 * 4 + 1  # the last token was sampled and needs no slot
    assert len(other) == 2 + 4
    assert engine.manager.num_free_blocks == 3


def raising_at(line_number: int, files: set[str]):
    """A trace function that raises MemoryError at the n-th line executed in `files`."""
    num_lines = 0

    def trace(frame, event, arg):
        nonlocal num_lines
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            num_lines += 1
            if num_lines == line_number:
                raise MemoryError
        return trace

    return trace


def run_failing_once(line_number: int, leads: bool) -> bool:
    """Chunks, hits, forks, completions of one prompt, preemptions, ends; says whether a step came to that line."""
    engine = Engine(9, 3, 4, budget=7, leads=leads)
    engine.scheduler.output_ratio = 0.0
    for prompt in ([1, 2, 1, 1, 2, 2, 1], [1, 2, 1, 1, 2], [2, 2]):
        engine.add(prompt, 14, copies=2)
    engine.add([1, 1, 2, 1], 1, is_beam=True)
    trace = raising_at(line_number, {scheduler_module.__file__, block_manager_module.__file__})
    previous, has_raised = sys.gettrace(), False
    while not engine.scheduler.is_finished():
        sys.settrace(trace)
        try:
            engine.step()
        except MemoryError:
            has_raised = True
            sys.settrace(previous)
            engine.scheduler.recover()
            engine.check_invariants()
        finally:
            sys.settrace(previous)
        engine.collect()
    assert not engine.requests and engine.manager.num_free_blocks == 9
    return has_raised


@pytest.mark.parametrize("leads", [False, True])
def test_an_exception_at_any_line_of_a_step_loses_nothing(leads):
    line_number = 1
    while run_failing_once(line_number, leads):  # of some thousand lines
        line_number += 31
    assert line_number > 2000


def test_many_prompts_each_a_block_longer_than_the_last_take_few_steps():
    prompts = [[1] * length for length in range(2, 59)]
    prefills = run(Engine(3000, 1, 100, budget=100_000), prompts, max_tokens=1)
    assert len(prefills) <= 7
    assert sum(n for step in prefills for _, n in step) < 4 * 58  # and not the sum of the lengths


def test_a_short_prefix_in_common_is_not_waited_for():
    assert len(run(Engine(400, 4, 20, budget=10_000), [[1] * 8 + [i] * 30 for i in range(2, 12)], max_tokens=1)) == 1


def test_ending_a_sequence_does_not_look_at_those_that_wait():
    class Queue(deque):
        def __iter__(self):
            raise AssertionError("looked at all")

        remove = __contains__ = __iter__

    scheduler = Engine(40, 4, 8, budget=100).scheduler
    scheduler.waiting = Queue()
    seqs = [Sequence(i, [i, 1], SamplingParams(max_tokens=1)) for i in range(100)]
    for seq in seqs:
        scheduler.add(seq)
    for seq in seqs[::2]:
        scheduler.finish(seq, "abort")
    assert scheduler.schedule() == seqs[1:16:2]


def test_a_long_prompt_takes_small_parts_of_steps_in_which_others_decode(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "next_token", lambda tokens: 5)  # nothing ends early
    engine = Engine(200, 4, 8, budget=30, chunk=3)
    engine.add([3] * 5, 50)
    engine.step()
    assert run(engine, [[1] * 50], max_tokens=3) == [[(1, 3)]] * 16 + [[(1, 2)]]


def test_it_takes_as_many_tokens_as_there_are_sequences_that_decode(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "next_token", lambda tokens: 5)
    engine = Engine(200, 4, 8, budget=30, chunk=3)
    for i in range(5):
        engine.add([3 + i] * 5, 50)
    engine.step()
    assert run(engine, [[1] * 50], max_tokens=3) == [[(5, 5)]] * 10


def test_long_prompts_fill_whole_steps_until_half_the_batch_decodes(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "next_token", lambda tokens: 5)
    prefills = run(Engine(400, 4, 8, budget=50, chunk=1), [[i] * 20 for i in range(1, 9)], max_tokens=60)
    assert [sum(n for _, n in step) for step in prefills[:2]] == [50, 48]  # beside none, and two
    assert prefills[2] == [(4, 2), (5, 4)]  # as many as ran
    assert all(n <= 7 for step in prefills[3:] for _, n in step)


def test_short_prompts_are_computed_whole_beside_what_decodes(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "next_token", lambda tokens: 5)
    engine = Engine(200, 4, 8, budget=60, chunk=2)
    engine.add([3] * 5, 50)
    engine.step()
    assert run(engine, [[1] * 32, [2] * 33], max_tokens=3) == [[(1, 32), (2, 2)], *[[(2, 2)]] * 15, [(2, 1)]]
