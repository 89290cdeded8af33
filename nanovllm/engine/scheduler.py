"""Who runs in this step. Prefill first, long prompts in chunks, decode with preemption. Knows nothing of tensors."""

from collections import deque

import numpy as np

from nanovllm.engine.block_manager import Block, BlockManager
from nanovllm.engine.sequence import Sequence, SequenceStatus


class Scheduler:
    """Owns every unfinished sequence.

    `waiting` holds, oldest first, those with something to prefill; only its head may hold blocks (a prompt of
    which some chunks are computed). `running` holds, at most `max_num_seqs` long, those of which all tokens but the
    last are in the cache. `max_num_batched_tokens` is what a prefill step may compute.
    """

    def __init__(self, block_manager: BlockManager, max_num_seqs: int, max_num_batched_tokens: int):
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.held: list[Sequence] = []  # finished, but keeping their blocks for others to fork from
        self.finished: list[Sequence] = []  # since the owner last took them away
        self.num_preemptions = 0
        # The share of `max_tokens` that finished requests used: how long the running ones are expected to go on.
        self.output_ratio = 1.0
        self._admission_failed = False  # nothing was released since the head of `waiting` did not fit
        self._forked: list[Sequence] = []  # running ones that may share the block which they write to next

    def is_finished(self) -> bool:
        return not self.waiting and not self.running

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def schedule(self) -> tuple[list[Sequence], bool]:
        """Chooses the sequences of the next step, sets their `num_scheduled_tokens` and allocates the slots to write.

        Also says whether the step is a prefill. No sequences: nothing is left to run, which also happens when the last
        one has outgrown the cache (see `finished`).
        """
        seqs = self._schedule_prefill() if self.waiting and not self._admission_failed else []
        while self.waiting and self.held and not seqs and not self.running:  # those that keep blocks are in the way
            self.drop_held(self.held[-1:])
            seqs = self._schedule_prefill()
        if seqs:
            return seqs, True
        return self._schedule_decode(), False

    def postprocess(self, seqs: list[Sequence], token_ids: list[int]) -> None:
        """Records that `seqs` were computed and sampled `token_ids`, dropped where a prompt is not complete."""
        block_size = self.block_manager.block_size
        any_finished = False
        for seq, token_id in zip(seqs, token_ids, strict=True):
            num_new = seq.num_scheduled_tokens
            seq.num_computed_tokens = num_computed = seq.num_computed_tokens + num_new
            if num_computed % block_size < num_new:
                self.block_manager.publish(seq, num_new)
            if num_computed < len(seq.token_ids):
                continue
            seq.token_ids.append(token_id)
            if token_id in seq.stop_token_ids:
                seq.stop_reason = token_id if token_id in seq.params.stop_token_ids else None
                self._finish(seq, "stop")
                any_finished = True
            elif num_computed + 1 >= seq.max_len:
                self._finish(seq, "length")
                any_finished = True
        if any_finished:
            self.running = [seq for seq in self.running if seq.status is SequenceStatus.RUNNING]

    def requeue(self, seqs: list[Sequence]) -> None:
        """Takes back a `schedule` whose step failed: `seqs` wait again and keep their tokens, not their blocks."""
        for seq in reversed(seqs):
            (self.running if seq.status is SequenceStatus.RUNNING else self.waiting).remove(seq)
            self._release(seq)
            # Behind a prompt of which some chunks are computed, which stays the head.
            self.waiting.insert(1 if self.waiting and self.waiting[0].block_table else 0, seq)

    def abort(self, seq_ids: set[int], reason: str = "abort") -> None:
        """Ends unfinished sequences where they are; they appear in `finished`."""
        for seq in [*self.waiting, *self.running]:
            if seq.seq_id in seq_ids:
                self._finish(seq, reason)
        self.waiting = deque(seq for seq in self.waiting if seq.status is SequenceStatus.WAITING)
        self.running = [seq for seq in self.running if seq.status is SequenceStatus.RUNNING]

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Adds `child`, which is what `parent` has in the cache and one token more, without recomputing it."""
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
            if seq in self.held:
                self.held.remove(seq)
                self._release(seq)
                seq.status = SequenceStatus.FINISHED

    # ---- prefill

    def _schedule_prefill(self) -> list[Sequence]:
        manager, block_size = self.block_manager, self.block_manager.block_size
        budget = self.max_num_batched_tokens
        seqs: list[Sequence] = []
        deferred: list[Sequence] = []
        computing: set[int] = set()  # hashes of the blocks that this step will fill
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if manager.num_blocks_for(len(seq)) > len(manager.blocks):  # outgrew the cache, then was preempted
                self._finish(self.waiting.popleft(), "length")
                continue
            if not seq.block_table:
                hits = manager.match(seq)
                if self._waits_for_others(seq, hits, seqs, computing):
                    deferred.append(self.waiting.popleft())
                    continue
                if not self._attach_prefix(seq, hits):
                    self._admission_failed = True
                    break
            num_tokens = min(budget, len(seq) - seq.num_computed_tokens)
            if manager.num_blocks_missing(seq, num_tokens) > manager.num_free_blocks:
                self._admission_failed = True
                break
            manager.allocate(seq, num_tokens)
            seq.num_scheduled_tokens = num_tokens
            budget -= num_tokens
            seqs.append(seq)
            end = seq.num_computed_tokens + num_tokens
            computing.update(manager.hashes(seq)[seq.num_computed_tokens // block_size : end // block_size])
            if end < len(seq):
                break  # a chunk: the budget is spent, and it stays at the head
            self.waiting.popleft()
            seq.status = SequenceStatus.RUNNING
            self.running.append(seq)
        chunked = [self.waiting.popleft()] if self.waiting and self.waiting[0].block_table else []
        self.waiting.extendleft(reversed(chunked + deferred))
        return seqs

    def _waits_for_others(self, seq: Sequence, hits: list[Block], seqs: list[Sequence], computing: set[int]) -> bool:
        """Whether what `seq` needs next is somebody else's work in this very step: one step later it is a hit."""
        if seq.source is not None and seq.source in seqs:
            return True
        reusable = self.block_manager.hashes(seq)[: (len(seq) - 1) // self.block_manager.block_size]
        return not seq.lacks_prompt_logprobs and len(hits) < len(reusable) and reusable[len(hits)] in computing

    def _attach_prefix(self, seq: Sequence, hits: list[Block]) -> bool:
        """Gives `seq` what is computed of it already, if the cache will hold the rest of it too."""
        manager, source = self.block_manager, seq.source
        num_tokens = len(hits) * manager.block_size
        if source is not None and source.status is SequenceStatus.RUNNING and not seq.num_completion_tokens:
            num_tokens = seq.num_prompt_tokens - 1  # of the last token it needs the logits
            hits = manager.blocks_of(source, num_tokens)
        if not manager.num_free_blocks or not self._admits(seq, hits):
            return False
        manager.attach(seq, hits, num_tokens)
        return True

    def _admits(self, seq: Sequence, hits: list[Block]) -> bool:
        """Whether the cache will probably hold `seq` beside the running sequences until they finish.

        Every `max_tokens` is known, so the blocks in use can be foreseen: just before the i-th sequence to finish
        does so, those that finish later have grown by as many tokens and those before have gone. The largest such
        sum, with lengths scaled by `output_ratio`, must fit. Where the guess is too low, preemption makes room.
        """
        if not self.running:
            return True  # alone it goes as far as it can
        manager = self.block_manager
        seqs = [*self.running, seq]
        held = np.array([len(s.block_table) for s in self.running] + [len(hits)])
        num_tokens = np.array([len(s) for s in seqs])
        remaining = np.maximum((np.array([s.max_len for s in seqs]) - num_tokens) * self.output_ratio, 1)
        order = np.argsort(remaining)
        held, num_tokens, remaining = held[order], num_tokens[order], remaining[order]
        num_left = np.arange(len(seqs), 0, -1)
        tokens_left = num_tokens[::-1].cumsum()[::-1] + num_left * remaining  # of the i-th and all that outlive it
        blocks_left = tokens_left / manager.block_size + 0.5 * num_left  # the last block is half full on average
        blocks_now = manager.num_blocks_for(len(seq)) - len(hits)
        available = manager.num_free_blocks - sum(block.ref_count == 0 for block in hits)
        return blocks_now <= available and (blocks_left - held.sum()).max() <= available

    # ---- decode

    def _schedule_decode(self) -> list[Sequence]:
        manager, block_size = self.block_manager, self.block_manager.block_size
        growing = [seq for seq in self.running if len(seq.token_ids) > len(seq.block_table) * block_size]
        forked, self._forked = self._forked, []
        for seq in growing + forked:  # oldest first
            while seq.status is SequenceStatus.RUNNING and manager.num_blocks_missing(seq, 1) > manager.num_free_blocks:
                self._preempt_newest()
            if seq.status is SequenceStatus.RUNNING:
                manager.allocate(seq, 1)
        for seq in self.running:
            seq.num_scheduled_tokens = 1
        return list(self.running)

    def _preempt_newest(self) -> None:
        """Makes room. A request that cannot go on even alone ends with what it has."""
        if self.waiting and self.waiting[0].block_table:
            self._release(self.waiting[0])
        elif self.held:
            self.drop_held(self.held[-1:])
        elif len(self.running) == 1:
            self._finish(self.running.pop(), "length")
        else:
            seq = self.running.pop()
            self._release(seq)
            self.waiting.appendleft(seq)
            self.num_preemptions += 1

    def _release(self, seq: Sequence) -> None:
        self.block_manager.free(seq)
        seq.status = SequenceStatus.WAITING
        seq.num_scheduled_tokens = 0
        self._admission_failed = False

    def _finish(self, seq: Sequence, reason: str) -> None:
        if seq.keeps_blocks and seq.block_table and reason != "abort":
            self.held.append(seq)
        else:
            self._release(seq)
        if reason != "abort" and not seq.keeps_blocks:
            used = seq.num_completion_tokens / (seq.max_len - seq.num_prompt_tokens)
            self.output_ratio += 0.1 * (used - self.output_ratio)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason
        self.finished.append(seq)
