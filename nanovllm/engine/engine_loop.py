"""The thread that runs the steps: the only one that touches the scheduler, the blocks and the model.

Between two steps it does the callers' jobs, so calls that overlap run in the same batches. Knows nothing of prompts,
and of texts only that they may end a sequence.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import Empty
from time import perf_counter

from nanovllm.engine.call_loop import CallLoop, News
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.sampling import Samples
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.utils.timeline import mark

NUM_BUCKETS = 17  # of step times: under 1, 2, 4, ... milliseconds, and one for those of half a minute and more


class EngineLoop(CallLoop):
    """Steps by itself while a call is open, see `open_call`; otherwise only as a job."""

    def __init__(self, model_runner: ModelRunner, scheduler: Scheduler):
        self.model_runner, self.scheduler = model_runner, scheduler
        self.num_tokens, self.seconds = {True: 0, False: 0}, {True: 0.0, False: 0.0}  # so far, by whether in a prefill
        self.step_times = [0] * NUM_BUCKETS  # how many steps took so long
        self._ahead: Samples | None = None  # of a step that is not postprocessed, for the next is to be scheduled first
        super().__init__("nanovllm engine")

    def is_finished(self) -> bool:
        """Whether nothing is waiting or running. In the thread."""
        return self.scheduler.is_finished()

    @property
    def output_ratio(self) -> float:
        return self.scheduler.output_ratio

    def stats(self) -> dict[str, int | float | list[int]]:
        """What `LLM.stats` says, as numbers that may be added up over engines. Takes the same time whatever runs."""
        scheduler, manager = self.scheduler, self.scheduler.block_manager
        num_running, num_free = len(scheduler.running), manager.num_free_blocks
        return {
            "running": num_running,
            "waiting": max(len(scheduler.sequences) - num_running, 0),
            "blocks_used": len(manager.blocks) - num_free,
            "blocks_free": num_free,
            "blocks_cached": len(manager.cached),
            "preemptions": scheduler.num_preemptions,
            "prompt_tokens": scheduler.num_prompt_tokens,
            "cached_prompt_tokens": scheduler.num_cached_tokens,
            "output_tokens": scheduler.num_output_tokens,
            "prefill_tokens": self.num_tokens[True],
            "decode_tokens": self.num_tokens[False],
            "prefill_seconds": self.seconds[True],
            "decode_seconds": self.seconds[False],
            "step_times": list(self.step_times),
        }

    # ---- in the thread

    def _run(self) -> None:
        try:
            self.model_runner.enter_thread()
            while self.failure is None:
                is_idle = not self._calls or self.scheduler.is_finished()
                try:
                    job = self._jobs.get(block=is_idle)
                except Empty:
                    job = self._step_for_calls
                if job is None:
                    break
                job()
                del job  # which would keep what it refers to while this waits
        finally:
            self.model_runner.close()

    def _step_for_calls(self) -> None:
        with suppress(BaseException):  # each call has been told
            self.step(may_lead=True)

    def step(self, may_lead: bool = False) -> int:
        """One step; returns how many tokens it computed, as a negative number if each is of a running sequence.

        With `may_lead` its tokens may be left to the next step to read. That gives the device its work before it waits
        for those, so that the device need not wait for the host.
        """
        start, scheduler, manager = perf_counter(), self.scheduler, self.scheduler.block_manager
        mark("between steps")
        with self._telling_of_failure():
            before, self._ahead = self._ahead, None
            seqs = scheduler.schedule(is_ahead=before is not None)
            mark("schedule")
            copies, manager.copies = manager.copies, []
            if copies:
                self.model_runner.copy_blocks(copies)
                mark("copy blocks")
            if seqs:
                samples = self.model_runner.run(seqs, before.seqs if before else [])
                samples.ends = scheduler.advance(seqs)
            if before is not None:
                self._postprocess(before)
            may_lead = may_lead and self.model_runner.may_lead and scheduler.may_lead()
            if seqs and may_lead and samples.may_stay():
                self._ahead = samples
            elif seqs:
                self._postprocess(samples)
            else:
                self._report([])
        seconds = perf_counter() - start
        num_prefill, num_decode = scheduler.num_prefill_tokens, scheduler.num_decode_tokens
        for is_prefill, n in ((True, num_prefill), (False, num_decode)):
            self.num_tokens[is_prefill] += n
            self.seconds[is_prefill] += seconds * n / max(num_prefill + num_decode, 1)  # a share by tokens
        if scheduler.drafter is not None and not num_prefill:
            scheduler.drafter.observe(num_decode, seconds)
        self.step_times[min(int(1000 * seconds).bit_length(), NUM_BUCKETS - 1)] += bool(seqs)
        return num_prefill + num_decode if num_prefill else -num_decode

    def _postprocess(self, samples: Samples) -> None:
        seqs = [seq for seq in samples.seqs if seq.finish_reason is None]  # others ended while this step was ahead
        self.scheduler.postprocess(samples.seqs, samples.ends, samples.read())
        mark("postprocess")
        self._report(seqs)
        mark("report")

    def _report(self, seqs: list[Sequence]) -> None:
        """Reads the text of those that wait for a stop string, and tells the watchers of a step's sequences."""
        for seq in seqs:
            if seq.text is not None:
                self._read_text(seq)
            if seq.watcher.follows and seq.finish_reason is None:
                seq.watcher.on_token(seq)
        ended, self.scheduler.finished = self.scheduler.finished, []
        for seq in ended:
            watcher = seq.watcher
            seq.guide = None
            if not seq.keeps_blocks:
                seq.watcher = None  # else they keep each other until the garbage collector comes
            watcher.on_end(seq)

    def _read_text(self, seq: Sequence) -> None:
        try:
            stop = seq.text.feed()
        except Exception as error:  # of a tokenizer: no other sequence is concerned
            seq.error, reason, stop = error, "error", None
        else:
            reason, num_read = "stop", seq.num_prompt_tokens + seq.text.num_read
            self.scheduler.num_output_tokens -= len(seq) - num_read
            del seq.token_ids[num_read:]  # which the same step has computed after a stop string
        if stop is None and seq.error is None:
            return
        if seq.finish_reason is None:
            self.scheduler.finish(seq, reason)
        seq.finish_reason, seq.stop_reason = reason, stop  # also where a length ended it in the same step

    @contextmanager
    def _telling_of_failure(self) -> Iterator[None]:
        """Ends all calls with the error of a step. Requests without a call stay, unless the model cannot go on."""
        try:
            yield
        except BaseException as error:
            self.failure, self._ahead = self.model_runner.failure, None
            calls, self._calls = self._calls, set()
            for news in calls:
                news.put(error)
            if self.failure is None:
                self.scheduler.recover()
                self._report([*self.scheduler.sequences.values(), *self.scheduler.finished])
                for news in calls:
                    self._close_call(news)
            raise

    def _add(self, seqs: list[Sequence], news: News | None) -> None:
        if news is None or news in self._calls:
            for seq in seqs:
                self.scheduler.add(seq)

    def _close_call(self, news: News) -> None:
        self._calls.discard(news)
        scheduler = self.scheduler
        self._abort([seq for seq in scheduler.sequences.values() if seq.watcher.news is news])
        scheduler.drop_held([seq for seq in scheduler.held.values() if seq.watcher.news is news])

    def _abort(self, seqs: list[Sequence]) -> bool:
        unfinished = [seq for seq in seqs if seq.seq_id in self.scheduler.sequences]
        for seq in unfinished:
            self.scheduler.finish(seq, "abort")
        self._report([])
        return bool(unfinished)
