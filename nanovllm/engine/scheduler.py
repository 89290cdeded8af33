"""Who runs in this step: all that run, and prompts as far as there is room. Knows nothing of tensors."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from nanovllm.engine.block_manager import Block, BlockManager
from nanovllm.engine.drafts import Drafter
from nanovllm.engine.forecast import Forecast, learn_output_ratio
from nanovllm.engine.sequence import Sequence, SequenceStatus

if TYPE_CHECKING:
    from nanovllm.config import Config

MOST_CERTAIN = 512  # tokens of a step that are not to be sampled, with those that are
LONG_PROMPT = 16  # times `chunk_tokens`; shorter ones are computed whole beside what decodes


class Scheduler:
    """Owns every unfinished sequence.

    `waiting` holds, oldest first, those with something to prefill; only its head may hold blocks (a prompt of
    which some chunks are computed). `running` holds, at most `max_num_seqs` long, those of which all tokens but the
    last are in the cache. `max_num_batched_tokens` is what a step may compute, if not more are running.
    """

    def __init__(
        self, block_manager: BlockManager, max_num_seqs: int, max_num_batched_tokens: int, chunk_tokens: int = 2**31,
        drafter: Drafter | None = None
    ):  # fmt: skip
        self.block_manager = block_manager
        self.chunk_tokens = chunk_tokens  # of a long prompt, in a step in which few sequences decode
        self.drafter = drafter
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.sequences: dict[int, Sequence] = {}  # all that are not finished, by seq_id, in the order of arrival
        self.waiting: deque[Sequence] = deque()  # also some that have finished meanwhile: see `_head`
        self.running: list[Sequence] = []
        self.held: dict[int, Sequence] = {}  # finished, but keeping their blocks for others: see `keeps_blocks`
        self.finished: list[Sequence] = []  # since the owner last took them away
        self.num_preemptions = 0
        self.num_prompt_tokens = self.num_cached_tokens = 0  # of the sequences that were admitted
        self.num_output_tokens = 0
        # The share of `max_tokens` that finished requests used: how long the running ones are expected to go on.
        self.output_ratio = 1.0
        self.num_decode_tokens = self.num_prefill_tokens = 0  # of the step: of running sequences, and of prompts
        self._has_preempted, self._num_running = False, 0  # in this step, and when it began
        self._admission_failed = False  # nothing was released since the head of `waiting` did not fit
        self._forked: list[Sequence] = []  # running ones that may share the block which they write to next
        self._forecast: Forecast | None = None  # of the step, once it is asked

    @classmethod
    def of(cls, config: Config) -> Scheduler:
        """With the blocks of an engine's cache, once the model runner has sized it."""
        most = config.speculative_tokens
        drafter = Drafter(most, config.max_decode_tokens) if most else None
        sizes = config.max_num_seqs, config.max_num_batched_tokens, config.chunk_tokens
        return cls(BlockManager(config.num_kvcache_blocks, config.kvcache_block_size), *sizes, drafter)

    def is_finished(self) -> bool:
        return not self.sequences

    def add(self, seq: Sequence) -> None:
        self.sequences[seq.seq_id] = seq
        self.waiting.append(seq)
        if seq.source is not None:
            seq.source.keeps_blocks += 1

    def schedule(self, is_ahead: bool = False) -> list[Sequence]:
        """Chooses the sequences of the next step, sets their `num_scheduled_tokens` and allocates the slots to write.

        First all that are running, with a token each and perhaps drafts of the next, then prompts. None at all: nothing
        is left to run, which also happens when the last one has outgrown the cache (see `finished`). With `is_ahead`
        the step before is advanced, but not postprocessed, see `may_lead`: which of its sequences have ended is not
        known, unless it is by their length.
        """
        self._has_preempted, self.num_prefill_tokens, self._num_running = False, 0, len(self.running)
        seqs = self._schedule_running(is_ahead)
        if not self._has_preempted:  # else there is no room for more
            seqs += self._schedule_waiting(self.max_num_batched_tokens - self.num_decode_tokens)
        while self.held and not seqs and self._head():  # those that keep blocks are in the way
            self.drop_held([next(reversed(self.held.values()))])
            seqs = self._schedule_waiting(self.max_num_batched_tokens)
        return seqs

    def advance(self, seqs: list[Sequence]) -> list[int]:
        """Counts the scheduled tokens of `seqs` as computed; how many are for each is what `postprocess` wants."""
        for seq in seqs:
            seq.num_computed_tokens += seq.num_scheduled_tokens
        return [seq.num_computed_tokens for seq in seqs]

    def may_lead(self) -> bool:
        """Whether the next step may be scheduled before the tokens of this one, which is advanced, are known.

        Not if guesses or the prefix cache need them, nor if room would have to be made.
        """
        has_room = self.block_manager.num_free_blocks >= len(self.running)
        return self.drafter is None and not self.num_prefill_tokens and has_room and bool(self.running)

    def postprocess(self, seqs: list[Sequence], ends: list[int], sampled: list[list[int]]) -> None:
        """Records the tokens sampled after `seqs`, of which `ends` were computed: none where a prompt is incomplete.

        What a later step did ahead for a sequence that turns out to have ended is dropped.
        """
        block_size, any_finished, num_output_tokens = self.block_manager.block_size, False, 0
        finished = SequenceStatus.FINISHED  # looked up once
        for seq, end, token_ids in zip(seqs, ends, sampled, strict=True):
            if seq.status is finished:
                continue
            if seq.draft_ids:
                token_ids = self._settle(seq, token_ids)
                end = seq.num_computed_tokens
            known, num_new = seq.token_ids, seq.num_scheduled_tokens
            is_complete = end >= len(known)
            if is_complete and seq.error is None and end < seq.max_len:  # else it was only to be scored
                known.fromlist(token_ids)
                num_output_tokens += len(token_ids)
            if end % block_size < num_new:
                self.block_manager.publish(seq, end - num_new, end)
            if is_complete:
                any_finished |= self._finish_if_complete(seq)
        self.num_output_tokens += num_output_tokens
        if any_finished:
            self.running = [seq for seq in self.running if seq.status is SequenceStatus.RUNNING]

    def recover(self) -> None:
        """Restores order after an exception at any point: all that are unfinished wait again.

        They keep their tokens, give their blocks back, and find most of what these hold in the prefix cache.
        """
        self.block_manager.reset()
        self.waiting, self.running, self._forked, self._admission_failed = deque(), [], [], False
        for seq in [*self.held.values(), *self.sequences.values()]:
            seq.block_table, seq.num_computed_tokens, seq.num_scheduled_tokens, seq.draft_ids = [], 0, 0, ()
        self.held = {}
        for seq in self.finished:
            self.sequences.pop(seq.seq_id, None)
        for seq in list(self.sequences.values()):
            seq.status, seq.finish_reason = SequenceStatus.WAITING, None
            if seq.guide is not None:
                seq.guide.restart()
            # A step may have ended between its last token and its end.
            if seq.unscored or not self._finish_if_complete(seq):
                self.waiting.append(seq)

    def finish(self, seq: Sequence, reason: str, stop_reason: str | None = None) -> None:
        """Ends an unfinished sequence where it is; it appears in `finished`."""
        is_running = seq.status is SequenceStatus.RUNNING
        self._finish(seq, reason, stop_reason)
        if is_running:
            self.running.remove(seq)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Adds `child`, which is what `parent` has in the cache and one token more, without recomputing it."""
        self.sequences[child.seq_id] = child
        if parent.block_table and len(self.running) < self.max_num_seqs:
            shared = parent.num_computed_tokens
            self.block_manager.attach(child, self.block_manager.blocks_of(parent, shared), shared)
            assert child.num_computed_tokens == len(child) - 1
            child.status = SequenceStatus.RUNNING
            self.running.append(child)
            self._forked.append(child)
        else:  # the parent had to give its blocks back: what the prefix cache does not have is computed again
            self.waiting.append(child)

    def drop_held(self, seqs: list[Sequence]) -> None:
        """Frees the blocks of finished sequences that kept them."""
        for seq in seqs:
            if seq.seq_id in self.held:
                self._release(seq)
                seq.status = SequenceStatus.FINISHED
                del self.held[seq.seq_id]  # last, so that `recover` knows of it

    # ---- running ones

    def _schedule_running(self, is_ahead: bool) -> list[Sequence]:
        manager, block_size = self.block_manager, self.block_manager.block_size
        going = self.running
        if is_ahead:  # without those that a token which nobody has read makes as long as they may be
            going = [seq for seq in self.running if seq.num_computed_tokens + 1 < seq.max_len]
        growing = [seq for seq in going if seq.num_computed_tokens >= len(seq.block_table) * block_size]
        forked, self._forked = self._forked, []
        for seq in growing + forked:  # oldest first
            while seq.status is SequenceStatus.RUNNING and manager.num_blocks_missing(seq, 1) > manager.num_free_blocks:
                self._preempt_newest()
            if seq.status is SequenceStatus.RUNNING:
                manager.allocate(seq, 1)
        assert not (is_ahead and self._has_preempted), "of a token that nobody has read"
        seqs = going if is_ahead else list(self.running)
        for seq in seqs:
            seq.num_scheduled_tokens = 1
        self.num_decode_tokens = len(seqs)
        self._add_certain(seqs)
        if self.drafter is not None and (len(self.running) == self.max_num_seqs or not self._head()):
            self._add_drafts(self.drafter)
        return seqs

    def _add_certain(self, seqs: list[Sequence]) -> None:
        """Has sequences with a grammar bring the next tokens of which it leaves no choice."""
        most = min(MOST_CERTAIN, self.max_num_batched_tokens)
        for seq in seqs:
            is_certain = seq.guide is not None and seq.guide.plan[0] is not None
            if is_certain and not seq.params.logits_processors:
                room = min(most - self.num_decode_tokens, seq.max_len - len(seq) - 1)
                self._bring(seq, seq.guide.foresee((), max(room, 0)))

    def _add_drafts(self, drafter: Drafter) -> None:
        """Has sequences bring guesses of their next tokens."""
        # Logits processors see each token once.
        seqs = [seq for seq in self.running if not seq.params.logits_processors and not seq.draft_ids]
        for seq, draft_ids in drafter.draft(seqs, self.num_decode_tokens):
            self._bring(seq, seq.guide.foresee(draft_ids, len(draft_ids)) if seq.guide is not None else draft_ids)

    def _bring(self, seq: Sequence, draft_ids: tuple[int, ...]) -> None:
        """Adds drafts to a step, where blocks are free."""
        is_free = self.block_manager.num_blocks_missing(seq, 1 + len(draft_ids)) <= self.block_manager.num_free_blocks
        if draft_ids and is_free:
            self.block_manager.allocate(seq, 1 + len(draft_ids))
            seq.draft_ids, seq.num_scheduled_tokens = draft_ids, 1 + len(draft_ids)
            self.num_decode_tokens += len(draft_ids)

    def _settle(self, seq: Sequence, token_ids: list[int]) -> list[int]:
        """The tokens that are kept of those that its drafts foresaw, up to an end. Gives back what the rest had."""
        if self.drafter is not None and (seq.guide is None or None in seq.guide.plan[: len(seq.draft_ids)]):
            self.drafter.learn(seq, len(token_ids) - 1, len(seq.draft_ids))
        ends = (i + 1 for i, token_id in enumerate(token_ids) if token_id in seq.end_token_ids)
        kept = token_ids[: next(ends, None)]
        seq.num_computed_tokens += len(kept) - seq.num_scheduled_tokens
        seq.num_scheduled_tokens, seq.draft_ids = len(kept), ()
        self.block_manager.trim(seq, seq.num_computed_tokens)
        return kept

    def _preempt_newest(self) -> None:
        """Makes room. A request that cannot go on even alone ends with what it has."""
        self._has_preempted = True
        if (head := self._head()) and head.block_table:
            self._release(head)
        elif self.held:
            self.drop_held([next(reversed(self.held.values()))])
        elif len(self.running) == 1:
            self._finish(self.running.pop(), "length")
        else:
            seq = self.running.pop()
            self._release(seq)
            self.waiting.appendleft(seq)
            self.num_preemptions += 1

    # ---- waiting ones

    def _part_of(self, seq: Sequence) -> int:
        """How many tokens of a prompt a step may compute: of a long one so few that those which decode hardly wait for
        it; but all that fit until half of the batch decodes, for the sooner it is full the better.
        """
        num_left, num_running = len(seq) - seq.num_computed_tokens, self._num_running
        is_filling = min(len(self.waiting), self.max_num_seqs - num_running) > num_running
        if not num_running or is_filling or len(seq) <= LONG_PROMPT * self.chunk_tokens:
            return num_left
        return min(num_left, max(num_running, self.chunk_tokens))

    def _head(self) -> Sequence | None:
        """The first that waits. Those that were ended while they waited are only now taken off."""
        while self.waiting and self.waiting[0].status is SequenceStatus.FINISHED:
            self.waiting.popleft()
        return self.waiting[0] if self.waiting else None

    def _schedule_waiting(self, budget: int) -> list[Sequence]:
        """Prompts of at most `budget` tokens together, of which the last may be a part of one."""
        if self._admission_failed:
            return []
        manager, block_size = self.block_manager, self.block_manager.block_size
        seqs: list[Sequence] = []
        deferred: list[Sequence] = []
        computing: set[int] = set()  # hashes of the blocks that this step will fill, or a later chunk
        self._forecast = None
        while budget > 0 and len(self.running) < self.max_num_seqs > len(deferred) and (seq := self._head()):
            if manager.num_blocks_for(len(seq)) > len(manager.blocks):  # outgrew the cache, then was preempted
                self._finish(self.waiting.popleft(), "length")
                continue
            if not seq.block_table:
                hits = manager.match(seq)
                if self._should_wait(seq, len(hits), seqs, computing):
                    deferred.append(self.waiting.popleft())
                    continue
                if not self._attach_prefix(seq, hits):
                    self._admission_failed = True
                    break
            num_tokens = min(budget, self._part_of(seq))
            if manager.num_blocks_missing(seq, num_tokens) > manager.num_free_blocks:
                self._admission_failed = True
                break
            manager.allocate(seq, num_tokens)
            seq.num_scheduled_tokens = num_tokens
            budget -= num_tokens
            self.num_prefill_tokens += num_tokens
            seqs.append(seq)
            computing.update(manager.hashes(seq)[seq.num_computed_tokens // block_size :])
            if seq.num_computed_tokens + num_tokens < len(seq):
                break  # a chunk: it stays at the head
            self.waiting.popleft()
            seq.status = SequenceStatus.RUNNING
            self.running.append(seq)
            if self._forecast is not None:
                self._forecast.add(seq)
        chunked = [self.waiting.popleft()] if self.waiting and self.waiting[0].block_table else []
        self.waiting.extendleft(reversed(chunked + deferred))
        return seqs

    def _should_wait(self, seq: Sequence, num_hits: int, seqs: list[Sequence], computing: set[int]) -> bool:
        """Whether half or more of what `seq` needs is others' work in this very step, and a step later in the cache.

        For less it does not wait: many prompts, each a little longer than the last, would come one by one.
        """
        if seq.source is not None and seq.source in seqs:
            return True
        if not computing:
            return False
        block_size, num_shared = self.block_manager.block_size, num_hits
        reusable = self.block_manager.hashes(seq)[: seq.num_reusable_tokens // block_size]
        while num_shared < len(reusable) and reusable[num_shared] in computing:
            num_shared += 1
        return len(seq) - num_hits * block_size <= 2 * (num_shared - num_hits) * block_size

    def _attach_prefix(self, seq: Sequence, hits: list[Block]) -> bool:
        """Gives `seq` what is computed of it already, if the cache will hold the rest of it too."""
        manager, source = self.block_manager, seq.source
        num_tokens, num_shared = len(hits) * manager.block_size, seq.num_prompt_tokens - 1  # the last one's logits
        if source is not None and source.num_computed_tokens >= num_shared > num_tokens:
            num_tokens, hits = num_shared, manager.blocks_of(source, num_shared)
        if not manager.num_free_blocks or not self._admits(seq, hits):
            return False
        is_first = seq.num_cached_tokens is None
        manager.attach(seq, hits, num_tokens)
        if is_first:
            self.num_prompt_tokens += seq.num_prompt_tokens
            self.num_cached_tokens += num_tokens
            self._leave_source(seq)
        return True

    def _leave_source(self, seq: Sequence) -> None:
        """`seq` has what it may share of its source, or will never need it."""
        if seq.source is not None:
            seq.source.keeps_blocks -= 1
            if not seq.source.keeps_blocks:
                self.drop_held([seq.source])

    def _admits(self, seq: Sequence, hits: list[Block]) -> bool:
        """Whether the cache will probably hold `seq` beside the running sequences until they finish."""
        if not self.running:
            return True  # alone it goes as far as it can
        if self._forecast is None:
            self._forecast = Forecast(self.block_manager, self.running, self.output_ratio)
        return self._forecast.admits(seq, hits)

    # ---- the end

    def _release(self, seq: Sequence) -> None:
        self.block_manager.free(seq)
        seq.status = SequenceStatus.WAITING
        seq.num_scheduled_tokens = 0
        self._admission_failed = False

    def _finish_if_complete(self, seq: Sequence) -> bool:
        """Ends `seq` if it has failed, or its newest token ends it."""
        token_id, num_tokens, guide = seq.token_ids[-1], len(seq.token_ids), seq.guide
        if num_tokens < seq.max_len and token_id not in seq.end_token_ids and guide is seq.error is None:
            return False  # the usual case, first
        is_ended = token_id in seq.end_token_ids and num_tokens > seq.num_prompt_tokens
        if guide is not None and num_tokens > seq.num_prompt_tokens and seq.error is None:
            guide.follow()
            is_ended = guide.has_ended
        if seq.error is not None:
            self._finish(seq, "error")
        elif is_ended:
            is_stop_token = token_id in seq.params.stop_token_ids and (guide is None or guide.ends_with_token)
            self._finish(seq, "stop", token_id if is_stop_token else None)
        elif num_tokens >= seq.max_len:
            self._finish(seq, "length")
        else:
            return False
        return True

    def _finish(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        if seq.keeps_blocks and seq.block_table and reason != "abort":
            self.held[seq.seq_id] = seq
        else:
            self._release(seq)
        if seq.num_cached_tokens is None:
            self._leave_source(seq)
        if reason != "abort" and not seq.keeps_blocks:
            self.output_ratio = learn_output_ratio(self.output_ratio, seq)
        seq.status, seq.finish_reason, seq.stop_reason = SequenceStatus.FINISHED, reason, stop_reason
        self.finished.append(seq)
        del self.sequences[seq.seq_id]
        if not self.sequences:
            self.waiting.clear()
