"""Load for hours, outside of the test run: what must hold holds at the end, and memory does not grow.

    python -m tests.soak requests [20000]   short requests through a cache in which preemption is constant
    python -m tests.soak calls [3600]       so many seconds of random calls on two threads, with Ctrl-C and exceptions

From the repository's root, on a CPU. Prints a line a minute; raises what went wrong.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # before what is found there is imported
# ruff: noqa: E402

import psutil
import torch
from transformers import AutoTokenizer

from helpers import DEMO_MODEL, reference_tokens, save_model
from nanovllm import LLM, BeamSearchParams, GenerationError, SamplingParams

SETTINGS = {"dtype": "float32", "device": "cpu", "kvcache_block_size": 4}


def resident() -> float:
    """MB of this process."""
    return psutil.Process().memory_info().rss / 1e6


def check_idle(llm: LLM) -> None:
    """Nothing is left of any call: no sequence, no block, no reference."""
    manager, scheduler = llm.block_manager, llm.scheduler
    assert llm.is_finished() and not scheduler.sequences and not scheduler.held and not scheduler.running
    assert not llm._loop._calls and not llm._added
    assert manager.num_free_blocks == len(manager.blocks) == len(set(manager.free_ids))
    assert all(block.ref_count == 0 for block in manager.blocks)
    assert all(manager.cached[block.hash] is block for block in manager.blocks if block.hash is not None)


def before_each_step(llm: LLM, work: Callable[[], None]) -> None:
    run = llm.model_runner.run
    llm.model_runner.run = lambda *args: work() or run(*args)


def soak_requests(num_requests: int) -> None:
    """In rounds of 500, of which each is compared with the first: the same prompts, greedy."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as path:
        save_model(Path(path), eos_token_id=None)
        with LLM(path, num_kvcache_blocks=16, max_num_seqs=64, **SETTINGS) as llm:
            prompts = [[rng.randrange(2, 300) for _ in range(rng.randrange(1, 24))] for _ in range(500)]
            params = [SamplingParams(temperature=0, max_tokens=rng.randrange(1, 24)) for _ in prompts]
            before_each_step(llm, lambda: setattr(llm.scheduler, "output_ratio", 0.0))  # admits without foresight
            expected, warm = None, 0.0
            for num_done in range(500, num_requests + 1, 500):
                got = [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]
                expected = expected or got
                assert got == expected
                check_idle(llm)
                warm = warm or (resident() if num_done >= 2000 else 0.0)
                print(
                    f"{num_done} requests, {llm.scheduler.num_preemptions} preemptions, {resident():.0f} MB", flush=True
                )
            growth = resident() - warm
            print(f"resident memory grew by {growth:.1f} MB since 2,000 requests")
            assert growth < 20


class Calls:
    """What one thread does to the engine, and what must come of it."""

    def __init__(self, llm: LLM, seed: int, pool: list[list[int]], greedy: dict, seeded: dict):
        self.llm, self.rng, self.pool, self.greedy, self.seeded = llm, random.Random(seed), pool, greedy, seeded
        self.counts: Counter[str] = Counter()

    def pick(self) -> list[int]:
        return [self.rng.randrange(len(self.pool)) for _ in range(self.rng.randrange(1, 6))]

    def prompts(self, picked: list[int]) -> list[list[int]]:
        return [self.pool[i] for i in picked]

    def generate_greedily(self) -> None:
        picked = self.pick()
        outputs = self.llm.generate(self.prompts(picked), SamplingParams(temperature=0, max_tokens=15), use_tqdm=False)
        assert [output["token_ids"] for output in outputs] == [self.greedy[i] for i in picked]

    def generate_seeded(self) -> None:
        picked = self.pick()
        outputs = self.llm.generate(self.prompts(picked), SEEDED, use_tqdm=False)
        got = [[completion["token_ids"] for completion in output["outputs"]] for output in outputs]
        self.counts["seeded that differ"] += sum(g != self.seeded[i] for g, i in zip(got, picked, strict=True))

    def generate_with_options(self) -> None:
        choose = self.rng.choice
        params = SamplingParams(
            temperature=choose([0.5, 2]), max_tokens=self.rng.randrange(1, 20), n=choose([1, 2, 4]),
            top_k=choose([0, 5]), top_p=choose([1, 0.8]), stop=choose([None, ["e"], ["a", "the"]]),
            logprobs=choose([None, 2]), prompt_logprobs=choose([None, None, 1]), repetition_penalty=choose([1.0, 1.2]),
        )  # fmt: skip
        for output in self.llm.generate(self.prompts(self.pick()), params, use_tqdm=False):
            assert len(output["outputs"]) == params.n
            for completion in output["outputs"]:
                assert completion["finish_reason"] in ("stop", "length")
                assert 1 <= len(completion["token_ids"]) <= params.max_tokens

    def stream(self) -> None:
        picked = self.pick()
        stream = self.llm.generate_stream(self.prompts(picked), SamplingParams(temperature=0, max_tokens=15))
        if self.rng.random() < 0.5:
            for _ in range(self.rng.randrange(9)):
                next(stream, None)
            stream.close()
            return
        tokens: list[list[int]] = [[] for _ in picked]
        for piece in stream:
            tokens[piece["index"]] += piece["token_ids"]
        assert tokens == [self.greedy[i] for i in picked]

    def beam_search(self) -> None:
        for output in self.llm.beam_search(self.prompts(self.pick()), BeamSearchParams(3, 8), use_tqdm=False):
            assert len(output["outputs"]) == 3

    def fail_alone(self) -> None:
        def process(token_ids, logits):
            if len(token_ids) == 3:
                raise ZeroDivisionError
            return logits

        picked = self.pick()
        bad = SamplingParams(temperature=0, max_tokens=15, ignore_eos=True, logits_processors=[process])
        params = [SamplingParams(temperature=0, max_tokens=15) for _ in picked[1:]]
        try:
            self.llm.generate(self.prompts(picked), [bad, *params], use_tqdm=False)
        except GenerationError as error:
            assert [output["token_ids"] for output in error.outputs[1:]] == [self.greedy[i] for i in picked[1:]]
        else:
            raise AssertionError("did not fail")

    def step_by_hand(self) -> None:
        picked = self.pick()
        ids = {self.llm.add_request(self.pool[i], SamplingParams(temperature=0, max_tokens=15)): i for i in picked}
        if self.rng.random() < 0.3:
            self.llm.abort(self.rng.choice(list(ids)))
        while ids:
            for output in self.llm.step()[0]:
                i = ids.pop(output["request_id"])
                if output["finish_reason"] != "abort":
                    assert output["token_ids"] == self.greedy[i]

    def one(self, kinds: list) -> None:
        kind = self.rng.choice(kinds)
        self.counts[kind.__name__] += 1
        kind()


SEEDED = SamplingParams(temperature=1.0, max_tokens=12, n=2, top_p=0.9, seed=7)


class Soak(Exception):
    """What the model runner raises now and then."""


def soak_calls(seconds: float) -> None:
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as path:
        tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
        model = save_model(Path(path), vocab_size=len(tokenizer), eos_token_id=2)
        for file in DEMO_MODEL.glob("tokenizer*"):
            shutil.copy(file, path)
        pool = [[rng.randrange(3, 900) for _ in range(rng.randrange(1, 40))] for _ in range(20)]
        pool += [[*prompt[: rng.randrange(1, 20)], rng.randrange(3, 900)] for prompt in pool]  # prefixes in common
        greedy = {i: reference_tokens(model, prompt, 15) for i, prompt in enumerate(pool)}
        with LLM(path, num_kvcache_blocks=36, max_num_seqs=16, max_num_batched_tokens=50, **SETTINGS) as llm:
            outputs = [llm.generate([prompt], SEEDED, use_tqdm=False)[0]["outputs"] for prompt in pool]
            seeded = {i: [completion["token_ids"] for completion in o] for i, o in enumerate(outputs)}
            failures = random.Random(2)

            def fail() -> None:
                llm.scheduler.output_ratio = 0.0
                if failures.random() < 1 / 3000:
                    raise Soak

            before_each_step(llm, fail)
            run_for(seconds, llm, [Calls(llm, seed, pool, greedy, seeded) for seed in range(2)])


def run_for(seconds: float, llm: LLM, both: list[Calls]) -> None:
    start = reported = time.monotonic()
    warm, problems = 0.0, []

    def work(calls: Calls, is_over: threading.Event) -> None:
        kinds = [calls.generate_greedily, calls.generate_seeded, calls.generate_with_options, calls.stream]
        kinds += [calls.beam_search, calls.fail_alone] + [calls.step_by_hand] * (calls is both[1])
        try:
            while not is_over.is_set():
                try:
                    calls.one(kinds)
                except Soak:
                    calls.counts["failed steps"] += 1
                    with suppress(Soak):
                        while calls is both[1] and not llm.is_finished():  # those that were added by hand go on
                            llm.step()
        except BaseException as error:
            problems.append(error)
            raise

    while time.monotonic() - start < seconds and not problems:
        is_over = threading.Event()
        other = threading.Thread(target=work, args=(both[1], is_over))
        other.start()
        interrupted_for(10, lambda: work(both[0], threading.Event()), both[0].counts, problems)
        is_over.set()
        other.join()
        while not llm.is_finished():  # what an exception left of requests that were added by hand
            with suppress(Soak):
                llm.step()
        llm._added.clear()
        check_idle(llm)
        if time.monotonic() - reported > 60 or not warm:
            reported, warm = time.monotonic(), warm or resident()
            counts = dict(sum((calls.counts for calls in both), Counter()))
            print(
                f"{reported - start:.0f} s, {resident():.0f} MB, {llm.scheduler.num_preemptions} preemptions, {counts}"
            )
            sys.stdout.flush()
    if problems:
        raise problems[0]
    print(f"resident memory grew by {resident() - warm:.1f} MB since the first round")


def interrupted_for(seconds: float, work, counts: Counter, problems: list) -> None:
    """Runs `work` again and again in the main thread, each time until a Ctrl-C that comes at a random moment."""
    end, rng = time.monotonic() + seconds, random.Random(time.time())
    while time.monotonic() < end and not problems:
        timer = threading.Timer(rng.random() * 0.5, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            work()
        except KeyboardInterrupt:
            counts["Ctrl-C"] += 1
            problems[:] = [problem for problem in problems if not isinstance(problem, KeyboardInterrupt)]
        timer.join()


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it
    what, amount = sys.argv[1], sys.argv[2:]
    if what == "requests":
        soak_requests(int(*amount or [20000]))
    else:
        soak_calls(float(*amount or [3600]))
