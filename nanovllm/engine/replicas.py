"""The thread that hands requests out to replicas of the model, and hears what becomes of them.

Stands where a single engine's `EngineLoop` would. A replica is sent no more than runs there and a little that waits, so
that the rest is still here for whichever has room first; of what was sent to one that dies nothing is lost.
"""

import atexit
import logging
import os
import pickle
import socket
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from itertools import groupby
from multiprocessing.connection import wait
from queue import Empty
from time import perf_counter

from nanovllm.config import Config
from nanovllm.engine.call_loop import CallLoop, News
from nanovllm.engine.dispatch import Dispatcher
from nanovllm.engine.forecast import learn_output_ratio
from nanovllm.engine.replica import Completion, End, Growth, Orders, PackedError, Ready, Report, Work
from nanovllm.engine.replica_process import ReplicaProcess
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.engine.workers import EXIT_SECONDS
from nanovllm.utils.device import default_threads

MAX_RESTARTS = 2  # of each replica
DEATH_SECONDS = 1.0  # for a process that has closed its connection to be gone
GAUGES = "running", "waiting", "blocks_used", "blocks_free", "blocks_cached"  # statistics that end with a replica
logger = logging.getLogger("nanovllm")


class Group:
    """A prompt's unfinished sequences, which run in the same replica."""

    def __init__(self, seqs: list[Sequence]):
        self.key, self.news, self.seqs = seqs[0].seq_id, seqs[0].watcher.news, seqs
        self.replica: int | None = None

    def num_tokens(self, output_ratio: float) -> float:
        """To be computed, prompt and expected output."""
        expected = sum(max(seq.max_len - len(seq), 0) for seq in self.seqs) * output_ratio
        return len(self.seqs[0]) + expected

    def prefix(self, block_size: int) -> bytes | None:
        """What another prompt must begin with to find something of this one in the prefix cache."""
        first = self.seqs[0]
        return first.token_ids[:block_size].tobytes() if first.num_prompt_tokens > block_size else None

    def pickled(self) -> bytes:
        """The `Work`. Raises whatever pickle does, and what it calls."""
        first, start = self.seqs[0], self.seqs[0].num_prompt_tokens
        completions = [Completion(seq.seq_id, seq.rng_key, seq.token_ids[start:]) for seq in self.seqs]
        options = first.bad_words_ids, first.watcher.follows, first.text is not None
        return pickle.dumps(Work(first.token_ids[:start], first.params, *options, completions))


class ReplicaLoop(CallLoop):
    """Starts `config.data_parallel_size` replicas, and sets what of `config` an engine would set.

    What a replica cannot start with is raised. Later one that ends is started again, `MAX_RESTARTS` times.
    """

    def __init__(self, config: Config):
        self.output_ratio = 1.0  # see `Scheduler`
        self._waiting: deque[Group] = deque()
        self._num_waiting = 0  # sequences of these
        self._given: dict[int, Group] = {}  # what replicas have, by key
        self._seqs: dict[int, tuple[Sequence, Group]] = {}  # the same, by the sequences' ids
        self._dispatcher = Dispatcher()
        self._num_reserved = max(8, config.max_num_seqs // 4)  # sequences that are to wait in a replica
        self._past_stats: list[dict[str, object]] = []  # of replicas that have ended
        self._bell, self._ear = socket.socketpair()  # rung when there is a job
        for end in (self._bell, self._ear):
            end.setblocking(False)
        num_threads = default_threads(config.data_parallel_size if config.device.type == "cpu" else 1)
        self._replicas = [ReplicaProcess(i, config, num_threads) for i in range(config.data_parallel_size)]
        try:
            for process in self._replicas:
                process.start()
            self._await_start()
        except BaseException:
            self._close(patience=0)
            raise
        config.num_kvcache_blocks = min(process.ready.num_kvcache_blocks for process in self._replicas)
        config.kvcache_block_size = self._block_size = self._replicas[0].ready.kvcache_block_size
        # Before multiprocessing ends its processes at the end of Python, which would look like their deaths.
        self._owner = os.getpid()
        atexit.register(self.end)
        super().__init__("nanovllm replicas")

    # ---- for other threads

    @property
    def num_tokens(self) -> dict[bool, int]:
        """As an `EngineLoop`'s."""
        return {True: self._total("prefill_tokens"), False: self._total("decode_tokens")}

    @property
    def seconds(self) -> dict[bool, float]:
        """Those in which replicas have computed at the same time count once."""
        size = len(self._replicas)
        return {True: self._total("prefill_seconds") / size, False: self._total("decode_seconds") / size}

    def stats(self) -> dict[str, int | float | list[int]]:
        """The sums over all replicas, also those that are gone."""
        each = self._each_stats()
        times = [sum(counts) for counts in zip(*(stats["step_times"] for stats in each), strict=True)]
        total = {name: self._total(name) for name in each[0] if name != "step_times"}
        return total | {"waiting": total["waiting"] + self._num_waiting, "step_times": times}

    def _each_stats(self) -> list[dict[str, object]]:
        return [stats for stats in [*self._past_stats, *(process.stats for process in self._replicas)] if stats]

    def _total(self, name: str) -> int | float:
        return sum(stats[name] for stats in self._each_stats())

    def is_finished(self) -> bool:
        """Whether nothing is waiting or running."""
        return not self._waiting and not self._given

    def post(self, job: Callable[[], object] | None) -> None:
        super().post(job)
        with suppress(OSError):  # full, so it rings already; or closed
            self._bell.send(b"!")

    def end(self) -> None:
        """Ends the processes after the steps that are running, or soon. Idempotent."""
        if os.getpid() != self._owner:  # a forked child at its end
            return
        atexit.unregister(self.end)
        self.post(None)
        if not self.is_this_thread:
            self._thread.join(2 * EXIT_SECONDS)
            for process in self._replicas if self._thread.is_alive() else []:  # it sends to one that does not read
                process.shoot()
            self._thread.join()

    # ---- in the thread

    def _run(self) -> None:
        try:
            while self.failure is None:
                connections = {process.connection: process for process in self._replicas if process.connection}
                for ready in wait([self._ear, *connections]):
                    if ready is not self._ear:
                        self._receive(connections[ready])
                    elif not self._do_jobs():
                        return
                self._hand_out()
        except BaseException as error:
            logger.exception("a mistake of the library's own")
            self._fail(f"{type(error).__name__}: {error}")
        finally:
            self._close()

    def _do_jobs(self) -> bool:
        """False if the thread is to end."""
        with suppress(OSError):
            self._ear.recv(2**16)
        with suppress(Empty):
            while (job := self._jobs.get_nowait()) is not None:
                job()
            return False
        return True

    def _close(self, patience: float = EXIT_SECONDS) -> None:
        for process in self._replicas:
            process.end()
        deadline = perf_counter() + patience
        for process in self._replicas:
            process.kill(max(0.0, deadline - perf_counter()))
        self._bell.close()
        self._ear.close()

    def _add(self, seqs: list[Sequence], news: News | None) -> None:
        if news not in self._calls:
            return
        for _, same in groupby(seqs, key=lambda seq: seq.watcher):
            group = Group(list(same))
            self._waiting.append(group)
            self._num_waiting += len(group.seqs)

    def _close_call(self, news: News) -> None:
        self._calls.discard(news)
        self._waiting = deque(group for group in self._waiting if group.news is not news)
        self._num_waiting = sum(len(group.seqs) for group in self._waiting)
        aborted = defaultdict(list)
        for group in [group for group in self._given.values() if group.news is news]:
            aborted[group.replica] += [seq.seq_id for seq in group.seqs]
            for seq in list(group.seqs):
                self._forget(seq, group)
        for index, seq_ids in aborted.items():
            self._replicas[index].send(Orders([], seq_ids))

    def _forget(self, seq: Sequence, group: Group) -> None:
        """It has ended."""
        del self._seqs[seq.seq_id]
        group.seqs.remove(seq)
        if not group.seqs:
            del self._given[group.key]
            self._dispatcher.finish(group.key)

    def _hand_out(self) -> None:
        """Sends what waits to the replicas that have room for it."""
        works: dict[int, list[tuple[bytes, list[int]]]] = defaultdict(list)
        while self._waiting:
            group = self._waiting[0]
            prefix = group.prefix(self._block_size)
            index = self._dispatcher.choose(prefix)
            if index is None:
                break
            self._waiting.popleft()
            self._num_waiting -= len(group.seqs)
            try:
                works[index].append((group.pickled(), [seq.seq_id for seq in group.seqs]))
            except Exception as error:
                self._refuse(group, error)
                continue
            self._dispatcher.give(index, group.key, group.num_tokens(self.output_ratio), prefix)
            group.replica, self._given[group.key] = index, group
            self._seqs |= {seq.seq_id: (seq, group) for seq in group.seqs}
            self._replicas[index].num_sent += len(group.seqs)
            self._update_room(index)
        for index, some in works.items():
            self._replicas[index].send(Orders(some, []))

    def _update_room(self, index: int) -> None:
        process = self._replicas[index]
        self._dispatcher.set_room(index, 1 - (process.num_sent - process.num_started) / self._num_reserved)

    def _refuse(self, group: Group, error: Exception) -> None:
        for seq in group.seqs:
            seq.error = TypeError(
                "a request must be picklable with data_parallel_size > 1, since it runs in another process; of "
                f"logits_processors, functions and classes at the top of a module are. {type(error).__name__}: {error}"
            )
            self._end(seq, "error")

    # ---- what replicas say

    def _receive(self, process: ReplicaProcess) -> None:
        try:
            message = process.connection.recv()
        except (EOFError, OSError):
            self._on_death(process, process.kill(DEATH_SECONDS))
            return
        if isinstance(message, PackedError):
            process.kill()
            self._on_death(process, f"failed: {message.message}")
        elif isinstance(message, Ready):
            process.set_ready(message)
            self._dispatcher.add(process.index)
        else:
            self._read(process, message)

    def _read(self, process: ReplicaProcess, report: Report) -> None:
        process.stats = report.stats
        if report.is_last:  # its ranks can no longer work together
            process.kill(DEATH_SECONDS)
            self._on_death(process, f"failed: {report.error.message}")
            return
        if report.error is not None:
            self._on_error(process, report.error)
        for growth in report.growths:
            self._grow(growth)
        for end in report.ends:
            self._read_end(end)
        process.num_started = report.num_started
        self._update_room(process.index)

    def _grow(self, growth: Growth) -> None:
        if growth.seq_id in self._seqs:
            seq, _ = self._seqs[growth.seq_id]
            seq.token_ids += growth.token_ids
            if seq.text is not None:
                seq.text.text += growth.text
            seq.watcher.on_token(seq)

    def _read_end(self, end: End) -> None:
        if end.seq_id not in self._seqs:
            return
        seq, group = self._seqs[end.seq_id]
        seq.token_ids += end.token_ids
        seq.stop_reason, seq.logprobs, seq.num_cached_tokens = end.stop_reason, end.logprobs, end.num_cached_tokens
        seq.prompt_logprobs = end.prompt_logprobs
        if end.text is not None:
            seq.text.text, seq.text.stop = end.text, end.stop_reason
        if end.error is not None:
            seq.error = end.error.unpack()
        self._forget(seq, group)
        self.output_ratio = learn_output_ratio(self.output_ratio, seq)
        self._end(seq, end.finish_reason)

    def _end(self, seq: Sequence, reason: str) -> None:
        seq.finish_reason, seq.status = reason, SequenceStatus.FINISHED
        watcher, seq.watcher = seq.watcher, None
        watcher.on_end(seq)

    def _on_error(self, process: ReplicaProcess, packed: PackedError) -> None:
        """A step has failed: so do the calls which it was for, wherever else they run."""
        error = packed.unpack()
        for news in {group.news for group in self._given.values() if group.replica == process.index}:
            news.put(error)
            self._close_call(news)

    def _on_death(self, process: ReplicaProcess, how: str) -> None:
        """Has others do what a replica has left undone, and starts it again unless it has died too often."""
        index = process.index
        if index in self._dispatcher:
            groups = [self._given.pop(key) for key in self._dispatcher.remove(index)]
            for seq in (seq for group in groups for seq in group.seqs):
                del self._seqs[seq.seq_id]
                self._num_waiting += 1
            self._waiting.extendleft(reversed(groups))
            self._past_stats.append(process.stats | dict.fromkeys(GAUGES, 0))
            process.stats = {}
        is_restarted = process.num_starts <= MAX_RESTARTS
        logger.warning("replica %d %s%s", index, how, "; it starts again" if is_restarted else "; it stays away")
        if is_restarted:
            process.start()
        elif not any(process.connection for process in self._replicas):
            self._fail(f"no replica is left after {MAX_RESTARTS} restarts of each; the last, replica {index}, {how}")

    def _fail(self, reason: str) -> None:
        self.failure = reason
        for news in self._calls:
            news.put(RuntimeError(reason))

    def _await_start(self) -> None:
        """Until all replicas are up; raises what the first to fail has failed of."""
        while missing := {process.connection: process for process in self._replicas if process.ready is None}:
            for connection in wait(list(missing)):
                process = missing[connection]
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    how = process.kill(DEATH_SECONDS)
                    raise RuntimeError(f"replica {process.index} {how}") from None
                if isinstance(message, PackedError):
                    raise message.unpack()
                process.set_ready(message)
                self._dispatcher.add(process.index)
