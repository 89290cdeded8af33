"""A job's requests on a Ray cluster: where replicas run, that they run again, and how answers travel is Ray's part.

Each replica is an actor with an engine of its own. It is given requests before it needs them, and one call at a time
waits there for what has been answered meanwhile. Which replica gets the next request is the `Dispatcher`'s decision.
Knows nothing of files.
"""

import logging
import math
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from queue import Empty, SimpleQueue

from nanovllm.batch.lines import Item
from nanovllm.batch.local import answer
from nanovllm.engine.call_loop import News
from nanovllm.engine.dispatch import Dispatcher
from nanovllm.engine.unordered import failed_output
from nanovllm.llm import LLM
from nanovllm.outputs import RequestOutput
from nanovllm.utils.reader import END, Reader

try:
    import ray
except ImportError as missing:
    raise ImportError("this needs Ray: pip install 'nanovllm[ray]', or 'ray[data]' beside nanovllm") from missing

logger = logging.getLogger("nanovllm")

COLLECT_SECONDS = 0.2  # after an answer, in which a replica waits for more to send at once
IDLE_SECONDS = 10.0  # after which it says that there is none
LEAD = 1.5  # times what a replica holds in its cache at a time: what it is given, so that it never waits
READ_AHEAD = 4096  # requests that wait here
MOST_EVENTS = 64  # that are seen to before work is handed out again
MAX_FAILURES = 3  # of the replica or the call that computes a request; the last of them while it runs there alone
MAX_RESTARTS = 3  # of an actor by Ray; then there is a new one in its place, unless it never could load the model
CHARACTERS_PER_TOKEN = 4
PREFIX = 256  # characters or tokens; requests that begin with the same ones go to the same replica if it has room
LOOK_SECONDS = 2.0  # between two looks at what nodes have joined, and what replicas are back


@dataclass(slots=True)
class _Request:
    item: Item
    num_failures: int = 0


class _Replica:
    """The actor. Its methods run in threads of their own."""

    def __init__(self, model: str, settings: dict[str, object]):
        self._model, self._settings = model, settings
        self._llm: LLM | None = None
        self._given: SimpleQueue[tuple[int, Item]] = SimpleQueue()
        self._answered: SimpleQueue[tuple[int, RequestOutput] | BaseException] = SimpleQueue()
        self._is_broken = False

    def start(self) -> tuple[int, int, int]:
        """Loads the model, in a call so that its errors arrive as they are. `max_num_seqs`, `max_model_len`, slots."""
        if self._is_broken:
            os._exit(1)  # Ray starts another
        if self._llm is None:
            self._llm = LLM(self._model, **self._settings)
            threading.Thread(target=self._run, daemon=True).start()
        config = self._llm.config
        return config.max_num_seqs, config.max_model_len, config.num_kvcache_blocks * config.kvcache_block_size

    def give(self, items: list[tuple[int, Item]]) -> None:
        """Items to be answered, each with its number."""
        for item in items:
            self._given.put(item)

    def answers(self) -> tuple[list[tuple[int, RequestOutput]], dict[str, object]]:
        """What was answered since the last call, if nothing then what is next; and what the engine's `stats` say."""
        answered = []
        with suppress(Empty):
            answered.append(self._answered.get(timeout=IDLE_SECONDS))
            time.sleep(COLLECT_SECONDS)
            answered += [self._answered.get() for _ in range(self._answered.qsize())]
        self._is_broken = any(isinstance(answer, BaseException) for answer in answered)
        if self._is_broken:
            raise answered[-1]
        return answered, self._llm.stats()

    def _run(self) -> None:
        def items() -> Iterator[Item]:
            while True:
                number, item = self._given.get()
                item.line = number  # here it only tells one from another
                yield item

        try:
            for item, output in answer(self._llm, items()):
                self._answered.put((item.line, output))
        except BaseException as error:
            self._answered.put(error)


def replica_resources(settings: dict[str, object], max_replicas: int | None = None) -> dict[str, float]:
    """What Ray must give each replica: GPUs where the cluster has some and `device` allows them, else CPUs.

    Of CPUs all of the smallest node that has any, or what makes room for `max_replicas` now, if that is less. Ray sets
    OMP_NUM_THREADS to their number.
    """
    device, nodes = str(settings.get("device", "auto")), _nodes()
    if device == "cuda" or (device == "auto" and any(node.get("GPU") for node in nodes)):
        return {"num_gpus": settings.get("tensor_parallel_size", 1) * settings.get("data_parallel_size", 1)}
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1] or [1]
    return {"num_cpus": max(1, min(min(cpus), sum(cpus) // (max_replicas or 1)))}


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


class RayBackend:
    """Replicas of a model on a cluster.

    They start as Ray finds room for them, and get work when they are up. With GPUs a replica has
    `tensor_parallel_size` of them; see `replica_resources`.

    Args:
        model: As for `LLM`; a path must exist on every node.
        settings: Fields of `Config`.
        address: Of the cluster, as for `ray.init`; None: the one that RAY_ADDRESS or this process has, or a new one.
        min_replicas: The job ends with an error when fewer than these can load the model.
        max_replicas: None: as many as the nodes have room for, also those that join later.

    Raises:
        ValueError: No cluster answers at the address, or the numbers of replicas contradict each other.
    """

    def __init__(
        self, model: str, settings: dict[str, object], address: str | None = None, min_replicas: int = 1,
        max_replicas: int | None = None
    ):  # fmt: skip
        if min_replicas < 1 or (max_replicas is not None and max_replicas < min_replicas):
            raise ValueError(f"min_replicas={min_replicas} must be 1 to max_replicas={max_replicas}")
        self._owns_connection = not ray.is_initialized()
        if self._owns_connection:
            connect(address)
        self._needs = replica_resources(settings, max_replicas)
        actor = ray.remote(_Replica).options(
            **self._needs,
            scheduling_strategy="SPREAD",
            max_concurrency=3,
            max_restarts=MAX_RESTARTS,
            max_task_retries=0,  # what it had goes to any that has room, and does not wait until it is back
        )
        self._new_actor = partial(actor.remote, model, dict(settings))
        self._min_replicas, self._max_replicas = min_replicas, max_replicas
        self._actors: dict[int, ray.actor.ActorHandle] = {}
        self._num_made = self._num_broken = 0  # of the latter none could ever load the model
        self._were_up: set[int] = set()
        self._is_down: set[int] = set()  # replicas that are to load the model when they are back
        self._next_look = -math.inf
        self._stats: dict[int, dict[str, object]] = {}  # of each replica that is up, as they came last
        self._dispatcher = Dispatcher(capacity=0)
        self._news = News()  # items, their end, and what is to be called with a call's result
        self._waiting: deque[_Request] = deque()
        self._suspects: deque[_Request] = deque()  # that have failed as often as they may among others
        self._running: dict[int, _Request] = {}  # by number
        self._numbers = count()
        self._max_model_len = 0
        self._slots_per_item = 0.0  # a moving average of what was handed out
        self._most_seqs, self._most_slots = math.inf, math.inf  # that the smallest replica has room for
        self._num_allowed, self._num_generated = 1, 1  # tokens of answered requests

    def run(self, items: Iterable[Item]) -> Iterator[tuple[Item, RequestOutput]]:
        """Answers any number of items, of which as many are in memory as keep the replicas busy. To be called once.

        Args:
            items: Taken in a thread of its own, and as there is room: it may block.

        Yields:
            Each item with its output, in the order in which they finish. One that fails, or whose replica or call
            has failed three times, has `finish_reason` "error" and says in `error` of what.

        Raises:
            ValueError, RuntimeError: What fewer than `min_replicas` could start for.
            Exception: What `items` raises.
            KeyboardInterrupt: After Ctrl-C, with `outputs`: the pairs that had come.
        """
        self._reader = Reader(iter(items), self._news, READ_AHEAD)
        self._reader.start()
        is_read = False
        try:
            while not is_read or self._waiting or self._suspects or self._running:
                self._look_for_room()
                for event in self._events():
                    if event is END:
                        is_read = True
                    elif isinstance(event, BaseException):
                        raise event
                    elif isinstance(event, tuple):
                        self._waiting.append(_Request(event[1]))
                    else:
                        yield from event()
                self._hand_out()
        except KeyboardInterrupt as interrupt:
            answered = [self._news.get() for _ in range(self._news.qsize())]
            interrupt.outputs = [pair for event in answered if isinstance(event, partial) for pair in event()]
            raise
        finally:
            self._reader.stop()

    def stats(self) -> dict[str, float]:
        """The sums of what `LLM.stats` said on each replica that is up, with its last answers; and `replicas`."""
        total: dict[str, float] = {"replicas": len(self._stats)}
        for stats in list(self._stats.values()):
            for name, value in stats.items():
                if isinstance(value, int | float) and not name.endswith("_rate"):
                    total[name] = total.get(name, 0) + value
        return total

    def close(self) -> None:
        """Ends the replicas, and the connection if it was made here. Idempotent."""
        while self._actors:
            ray.kill(self._actors.popitem()[1])
        if self._owns_connection:
            self._owns_connection = False
            ray.shutdown()

    # ---- inside

    def _events(self) -> Iterator[object]:
        """What has come, after waiting for something a moment; nothing endless, so that work goes out soon."""
        try:
            yield self._news.get(timeout=LOOK_SECONDS)
            for _ in range(MOST_EVENTS):
                yield self._news.get_nowait()
        except Empty:
            pass

    def _look_for_room(self) -> None:
        """Makes the replicas for which there is room now; Ray holds those back that do not fit yet."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_SECONDS
        [(key, amount)] = self._needs.items()
        key = {"num_gpus": "GPU", "num_cpus": "CPU"}[key]
        there = [node.get(key, 0) for node in _nodes()]
        fitting = sum(int(has // amount) for has in there)
        wanted = self._max_replicas or max(self._min_replicas, fitting)
        while len(self._actors) + self._num_broken < wanted:
            self._actors[self._num_made] = self._new_actor()
            self._is_down.add(self._num_made)
            self._num_made += 1
        while self._is_down:
            self._start(self._is_down.pop())
        if not self._stats:
            logger.info("no replica is up; each needs %g %s, the nodes have %s", amount, key, there)

    def _start(self, replica: int) -> None:
        """Has a replica load the model: one that is new when Ray finds room for it, one that restarts if it is back."""
        self._on_result(self._actors[replica].start.remote(), self._on_start, replica)

    def _on_result(self, ref: "ray.ObjectRef", handler: Callable, replica: int) -> None:
        """Has `handler` called in the thread that runs `run`, with the call's future."""
        ref.future().add_done_callback(lambda future: self._news.put(partial(handler, replica, future)))

    def _on_start(self, replica: int, future: Future) -> Iterator[tuple[Item, RequestOutput]]:
        try:
            max_num_seqs, self._max_model_len, slots = future.result()
        except ray.exceptions.ActorUnavailableError:
            self._is_down.add(replica)
        except Exception as error:
            logger.warning("replica %d cannot be started: %s", replica, error)
            ray.kill(self._actors.pop(replica))
            if replica not in self._were_up:
                self._num_broken += 1
                if len(self._actors) < self._min_replicas:
                    raise _cause(error) from None
        else:
            self._were_up.add(replica)
            self._most_seqs, self._most_slots = min(self._most_seqs, max_num_seqs), min(self._most_slots, slots)
            self._stats[replica] = {}
            self._dispatcher.add(replica)
            self._on_result(self._actors[replica].answers.remote(), self._on_answers, replica)
        yield from ()

    def _hand_out(self) -> None:
        """Gives requests to replicas while they have room; what may be the cause of failures last, each alone."""
        given: dict[int, list[tuple[int, Item]]] = {}
        while self._stats and (self._waiting or self._suspects):
            request = (self._waiting or self._suspects)[0]
            expected, prefix = self._expected_tokens(request.item), _prefix(request.item)
            self._slots_per_item = self._slots_per_item or expected
            self._dispatcher.capacity = LEAD * min(self._most_slots, self._most_seqs * self._slots_per_item)
            replica = self._dispatcher.choose(prefix if self._waiting else None)
            if replica is None:
                break
            if self._waiting:
                self._waiting.popleft()
                self._slots_per_item += 0.01 * (expected - self._slots_per_item)
            elif self._dispatcher.num_requests(replica):
                break
            else:
                self._suspects.popleft()
                expected = math.inf
            if not request.num_failures:
                self._reader.release()
            number = next(self._numbers)
            self._dispatcher.give(replica, number, expected, prefix)
            self._running[number] = request
            given.setdefault(replica, []).append((number, request.item))
        for replica, items in given.items():
            self._actors[replica].give.remote(items)

    def _on_answers(self, replica: int, future: Future) -> Iterator[tuple[Item, RequestOutput]]:
        try:
            answered, self._stats[replica] = future.result()
        except Exception as error:
            logger.warning("replica %d died, its requests run again: %s", replica, error)
            del self._stats[replica]
            self._is_down.add(replica)
            yield from self._run_again([self._running.pop(n) for n in self._dispatcher.remove(replica)], error)
            return
        self._on_result(self._actors[replica].answers.remote(), self._on_answers, replica)
        for number, output in answered:
            request = self._running.pop(number, None)
            if request is not None:  # else it was taken for lost, and another was faster
                self._dispatcher.finish(number)
                self._num_allowed += self._most_tokens(request.item)
                self._num_generated += sum(len(completion["token_ids"]) for completion in output["outputs"])
                yield request.item, output

    def _run_again(self, requests: list[_Request], error: Exception) -> Iterator[tuple[Item, RequestOutput]]:
        for request in reversed(requests):
            request.num_failures += 1
            if request.num_failures == MAX_FAILURES:
                yield request.item, failed_output(request.item.line, request.item.prompt, _cause(error))
            elif request.num_failures == MAX_FAILURES - 1:
                self._suspects.append(request)
            else:
                self._waiting.appendleft(request)

    def _expected_tokens(self, item: Item) -> float:
        prompt = item.prompt or "".join(str(message.get("content")) for message in item.messages or ())
        num_prompt = len(prompt) / (CHARACTERS_PER_TOKEN if isinstance(prompt, str) else 1)
        return num_prompt + self._most_tokens(item) * self._num_generated / self._num_allowed

    def _most_tokens(self, item: Item) -> int:
        most = item.params.max_tokens
        return item.params.n * (self._max_model_len if most is None else min(most, self._max_model_len))


def _prefix(item: Item) -> object:
    if item.messages:
        return str(item.messages[0])[:PREFIX]
    prompt = item.prompt or ""
    return prompt[:PREFIX] if isinstance(prompt, str) else tuple(prompt[:PREFIX])


def _cause(error: Exception) -> Exception:
    """What a replica raised, without Ray's frames around it."""
    return getattr(error, "cause", None) or error


def connect(address: str | None) -> None:
    """Joins a cluster or makes one. Keeps the handler of SIGTERM, which Ray would replace."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    host, _, port = (address or "").rpartition(":")
    try:
        if port.isdigit():  # else Ray takes minutes to find that nobody is there
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    except OSError as error:
        raise ValueError(f"no Ray cluster answers at address={address!r}: {error}") from error
    finally:
        if is_main and handler is not None:
            signal.signal(signal.SIGTERM, handler)
