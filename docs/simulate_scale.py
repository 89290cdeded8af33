"""A discrete-event simulation of a job on a thousand replicas: what the dispatch costs, and what failures do.

    PYTHONPATH=. python docs/simulate_scale.py        the tables of docs/scale.md, in less than a minute

The model. A replica computes up to `slots` requests at a time, others that it was given wait. While `n` run, a step
takes `STEP + n / slots * STEP_OF_FULL_LOAD` seconds, divided by the replica's speed, and gives each one token; a
request that begins holds up the others of its replica for `PROMPT_TOKEN` seconds a token of its prompt. The driver
hears of an answer `LATENCY` seconds late. A replica that fails loses what it has not answered, and is back after
`RECOVERY` seconds. Prompts and completions have log-normal lengths. Nobody knows those of completions beforehand: the
dispatcher, which is the real one, goes by their mean.
"""

import argparse
import heapq
import math
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

from nanovllm.batch.ray_backend import COLLECT_SECONDS, LEAD
from nanovllm.engine.dispatch import Dispatcher

# Qwen3-0.6B on an H200: 5.5 ms a step of 256 sequences, as read off the kernels (design, not measured yet).
STEP, STEP_OF_FULL_LOAD, PROMPT_TOKEN = 1.5e-3, 4e-3, 1.2e-6
MEDIAN_PROMPT, MEDIAN_OUTPUT, SIGMA, MOST_TOKENS = 400, 200, 1.0, 4096  # means 640 and 320
LATENCY = COLLECT_SECONDS
RECOVERY = 30.0


Request = tuple[int, int, int]  # its number, tokens of its prompt, and of its completion


@dataclass(eq=False)
class Replica:
    speed: float
    slots: int
    now: float = 0.0  # until when it was computed
    tokens: float = 0.0  # that a request would have got which ran from the start
    prefill: float = 0.0  # seconds of it that are still to be done
    running: list[tuple[float, Request]] = field(default_factory=list)  # by `tokens` at which they end
    queue: deque[Request] = field(default_factory=deque)
    version: int = 0  # of its next event
    is_up: bool = True

    @property
    def step(self) -> float:
        return (STEP + len(self.running) / self.slots * STEP_OF_FULL_LOAD) / self.speed

    def advance(self, now: float) -> list[Request]:
        """Computes until `now`; the requests that have ended."""
        if not self.is_up:
            return []
        seconds = now - self.now
        in_prefill = min(self.prefill, seconds)
        self.prefill -= in_prefill
        self.tokens += (seconds - in_prefill) / self.step
        self.now, ended = now, []
        while self.running and self.running[0][0] <= self.tokens + 1e-6:
            ended.append(heapq.heappop(self.running)[1])
        while self.queue and len(self.running) < self.slots:
            request = self.queue.popleft()
            self.prefill += request[1] * PROMPT_TOKEN / self.speed
            heapq.heappush(self.running, (self.tokens + request[2], request))
        return ended

    def next_end(self) -> float:
        return self.now + self.prefill + (self.running[0][0] - self.tokens) * self.step

    def fail(self) -> list[Request]:
        """The requests that it has not answered."""
        lost = [request for _, request in self.running] + list(self.queue)
        self.running, self.queue, self.prefill = [], deque(), 0.0
        self.is_up = False
        self.version += 1
        return lost


@dataclass
class Result:
    seconds: float  # until the last answer
    utilisation: float  # what the replicas have computed, of what all of them could have until then
    steady: float  # the same from when half of the requests were answered until the last one was handed out
    tail: float  # seconds from then on
    num_failures: int


class Simulation:
    """`policy` is "dispatcher", or "random" or "round robin": all handed out at the beginning, whatever happens."""

    def __init__(
        self, policy: str, num_replicas: int, num_requests: int, slots: int, lead: float = LEAD,
        slow_share: float = 0.02, failures_per_second: float = 0.0, seed: int = 0
    ):  # fmt: skip
        self.rng, self.slots = random.Random(seed), slots
        rng = self.rng
        # One or two percent between good devices, and some that run at half the speed.
        speeds = [0.5 if rng.random() < slow_share else rng.uniform(0.97, 1.0) for _ in range(num_replicas)]
        self.speed, self.replicas = sum(speeds), [Replica(speed, slots) for speed in speeds]
        sizes = [(length(rng, MEDIAN_PROMPT), length(rng, MEDIAN_OUTPUT)) for _ in range(num_requests)]
        mean_prompt, self.mean_output = (sum(lengths) / num_requests for lengths in zip(*sizes, strict=True))
        self.waiting = deque((i, *size) for i, size in enumerate(sizes))
        self.num_unanswered = self.num_requests = num_requests
        self.dispatcher = Dispatcher(lead * slots * (mean_prompt + self.mean_output))
        self.is_static, self.failures_per_second, self.num_failures = policy != "dispatcher", failures_per_second, 0
        self.all_given = False
        self.now = self.work = 0.0  # seconds that what was answered takes at full speed and full load
        self.marks = [(0.0, 0.0), (0.0, 0.0)]  # (now, work) at half of the answers, and when all were handed out
        self.events: list[tuple[float, int, str, int | Request, int]] = []  # (when, order, what, of what, version)
        self.order = count()
        for i in range(num_replicas):
            if not self.is_static:
                self.dispatcher.add(i)
        for i in range(self.num_requests if self.is_static else 0):
            chosen = rng.randrange(num_replicas) if policy == "random" else i % num_replicas
            self.replicas[chosen].queue.append(self.waiting.popleft())

    def run(self) -> Result:
        if self.failures_per_second:
            self.add(self.rng.expovariate(self.failures_per_second), "fail", 0)
        self.compute(range(len(self.replicas)))
        while self.num_unanswered:
            if not self.is_static:
                self.hand_out()
            self.now, _, what, of, version = heapq.heappop(self.events)
            if what == "end" and version == self.replicas[of].version:
                self.compute([of])
            elif what == "answered":
                self.num_unanswered -= 1
                self.work += of[1] * PROMPT_TOKEN + of[2] * (STEP + STEP_OF_FULL_LOAD) / self.slots
                self.dispatcher.finish(of[0])
                if self.num_unanswered == self.num_requests // 2:
                    self.marks[0] = self.now, self.work
            elif what == "fail":
                self.add(self.rng.expovariate(self.failures_per_second), "fail", 0)
                self.fail(self.rng.randrange(len(self.replicas)))
            elif what == "back":
                self.replicas[of].is_up, self.replicas[of].now = True, self.now
                if not self.is_static:
                    self.dispatcher.add(of)
                self.compute([of])
        (begin, work), (end, work_then) = self.marks
        steady = (work_then - work) / self.speed / (end - begin) if end > begin else math.nan
        tail = math.nan if self.is_static else self.now - end
        return Result(self.now, self.work / self.speed / self.now, steady, tail, self.num_failures)

    def add(self, seconds: float, what: str, of: int | Request, version: int = 0) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.order), what, of, version))

    def hand_out(self) -> None:
        touched = set()
        while self.waiting and (chosen := self.dispatcher.choose()) is not None:
            request = self.waiting.popleft()
            self.dispatcher.give(chosen, request[0], request[1] + self.mean_output)
            self.replicas[chosen].queue.append(request)
            touched.add(chosen)
            if not self.all_given:
                self.marks[1], self.all_given = (self.now, self.work), not self.waiting
        self.compute(touched)

    def compute(self, replicas: Iterable[int]) -> None:
        for i in replicas:
            replica = self.replicas[i]
            for request in replica.advance(self.now):
                self.add(LATENCY, "answered", request)
            replica.version += 1
            if replica.running:
                self.add(replica.next_end() - self.now, "end", i, replica.version)

    def fail(self, i: int) -> None:
        replica = self.replicas[i]
        if replica.is_up:
            lost = replica.fail()
            self.num_failures += 1
            self.add(RECOVERY, "back", i)
            if self.is_static:
                replica.queue.extendleft(lost)
            else:
                self.dispatcher.remove(i)
                self.waiting.extendleft(lost)


def length(rng: random.Random, median: int) -> int:
    return min(MOST_TOKENS, 1 + int(rng.lognormvariate(math.log(median), SIGMA)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()

    def show(name: str, policy: str, *size: int, **options: float) -> None:
        r = Simulation(policy, *size, **options).run()
        print(f"{name:35} {r.seconds:5.0f} s  {r.utilisation:5.1%} {r.steady:6.1%} {r.tail:7.1f} s {r.num_failures:5}")

    size = 1000, 500_000, 32
    print(f"{'1,000 replicas of 32 slots':35}    time   used  steady      tail failures")
    for policy in ("dispatcher", "round robin", "random"):
        if policy != "random":
            show(f"{policy}, all equally fast", policy, *size, slow_share=0.0)
            show(f"{policy}, and a failure a second", policy, *size, failures_per_second=1.0)
        show(f"{policy}, 2% at half the speed", policy, *size)
    print("16 replicas of 256 slots")
    for lead in (1.0, 1.25, LEAD):
        show(f"dispatcher, lead {lead:g}", "dispatcher", 16, 40_000, 256, lead=lead)


if __name__ == "__main__":
    main()
