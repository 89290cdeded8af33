"""Several replicas answer as one engine does, also when some of them die."""

import operator
import os
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch

from helpers import DEMO_MODEL, ROOT, default_interrupts, make_config, random_prompts
from nanovllm import LLM, BeamSearchParams, GenerationError, SamplingParams
from nanovllm.config import check_parallel_size
from nanovllm.engine import replica_process

SETTINGS = {"dtype": "float32", "device": "cpu", "kvcache_block_size": 8, "num_kvcache_blocks": 400}
PATIENCE = 60
KEPT: list[int] = []  # processes that live as long as a fixture
FUNCTIONS = """
class Halt(BaseException):
    pass

def flip(token_ids, logits):
    return -logits

def fail(token_ids, logits):
    raise KeyError("of this request")

def halt(token_ids, logits):
    raise Halt("the step")
"""
LONG = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    """A module that other processes find too: a child starts with its parent's `sys.path`."""
    directory = tmp_path_factory.mktemp("modules")
    (directory / "replica_functions.py").write_text(FUNCTIONS)
    sys.path.append(str(directory))
    import replica_functions

    yield replica_functions
    sys.path.remove(str(directory))


@pytest.fixture(scope="module")
def one():
    with LLM(str(DEMO_MODEL), **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def two(functions):
    with start() as llm:
        KEPT.extend(pids(llm))
        yield llm
        assert wait_until(llm.is_finished)
        assert wait_until(lambda: llm.stats()["running"] == llm.stats()["waiting"] == llm.stats()["blocks_used"] == 0)
        assert pids(llm) == KEPT
    KEPT.clear()
    assert not children()


@pytest.fixture(scope="module")
def mortal():
    """An engine whose replicas may be killed: each, before it is started for the last time, twice."""
    with start() as llm:
        yield llm


def start(**settings) -> LLM:
    return LLM(str(DEMO_MODEL), **SETTINGS | {"data_parallel_size": 2} | settings)


def generate(llm, prompts, params, **kwargs):
    return llm.generate(prompts, params, use_tqdm=False, **kwargs)


def children() -> list[psutil.Process]:
    """That should not be there any more."""
    found = [c for c in psutil.Process().children(recursive=True) if c.status() != psutil.STATUS_ZOMBIE]
    return [c for c in found if c.pid not in KEPT and "resource_tracker" not in " ".join(c.cmdline())]


def pids(llm) -> list[int]:
    return [process._process.pid for process in llm._loop._replicas if process._process is not None]


def wait_until(condition) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def plain(outputs) -> list[list[tuple]]:
    """What must be equal to the last bit."""
    keys = ("text", "token_ids", "finish_reason", "stop_reason")
    return [[tuple(completion[key] for key in keys) for completion in output["outputs"]] for output in outputs]


def mixed(num_prompts: int) -> tuple[list[str], list[SamplingParams]]:
    prompts = [f"{i} + {7 * i} = " + "and " * (i % 5) for i in range(num_prompts)]
    kinds = [
        {"temperature": 0},
        {"seed": 5},
        {},
        {"n": 3},
        {"n": 2, "seed": 6, "stop": "}", "structured_outputs": {"json": {"enum": ["no", {"a": [1, True]}]}}},
        {"stop": ["1", "and"], "max_tokens": 40, "min_tokens": 2},
        {"logprobs": 2, "prompt_logprobs": 1, "n": 2},
        {"top_p": 0.9, "bad_words": ["2"], "repetition_penalty": 1.2},
    ]
    return prompts, [SamplingParams(**{"max_tokens": 12} | kinds[i % len(kinds)]) for i in range(num_prompts)]


# ---- as one engine


def test_outputs_are_those_of_one_engine(one, two):
    """On fresh ones, since a random stream without a seed depends on how many requests there were before."""
    prompts, params = mixed(70)
    expected, got = generate(one, prompts, params), generate(two, prompts, params)
    assert plain(got) == plain(expected)
    for output, other in zip(got, expected, strict=True):
        assert (output["prompt"], output["prompt_token_ids"]) == (other["prompt"], other["prompt_token_ids"])
        for name in ("logprobs", "prompt_logprobs"):
            mine, others = ([entry and entry["logprob"] for entry in o[name] or []] for o in (output, other))
            assert mine == pytest.approx(others, abs=1e-4)


def test_given_completions_are_scored_as_by_one_engine_and_their_prompts_are_shared(one, two):
    prompts = [f"{i} + {7 * i} = " + "and " * (i % 5) for i in range(40)]
    completions, results = [[str(8 * i), "8", "no idea", "and so on and on"] for i in range(40)], []
    for llm in (one, two):
        before = llm.stats()["prefill_tokens"]
        scores = llm.score(prompts, completions, use_tqdm=False)
        results.append((scores, llm.stats()["prefill_tokens"] - before))
    (expected, num_expected), (got, num_computed) = results
    for mine, others in zip(got, expected, strict=True):
        assert [score.token_ids for score in mine] == [score.token_ids for score in others]
        assert [score.logprob for score in mine] == pytest.approx([score.logprob for score in others], abs=1e-3)
    assert num_expected <= num_computed < 1.3 * num_expected  # each replica has a cache of its own


def test_all_replicas_work_and_the_statistics_are_of_all(two):
    before, parts = two.stats(), [process.stats["output_tokens"] for process in two._loop._replicas]
    generate(two, [[5, 6, i] for i in range(2, 42)], SamplingParams(max_tokens=10, ignore_eos=True))
    after, parts_after = two.stats(), [process.stats["output_tokens"] for process in two._loop._replicas]
    assert after["output_tokens"] - before["output_tokens"] == 400
    assert after["prompt_tokens"] - before["prompt_tokens"] == 120
    assert all(now - then >= 150 for now, then in zip(parts_after, parts, strict=True))
    assert after["decode_seconds"] > before["decode_seconds"]
    assert sum(after["step_times"].values()) > sum(before["step_times"].values())
    assert after["blocks_free"] + after["blocks_used"] == 800


def test_streams_chats_and_unordered_outputs_are_those_of_one_engine(one, two):
    greedy = SamplingParams(temperature=0, max_tokens=25)
    prompts = [f"Count from {i} to ten:" for i in range(6)]
    params = [SamplingParams(temperature=0, max_tokens=25, stop=["3"] if i % 2 else None) for i in range(6)]
    expected = generate(one, prompts, params)
    pieces = list(two.generate_stream(prompts, params))
    for i, output in enumerate(expected):
        mine = [piece for piece in pieces if piece["index"] == i]
        assert [token for piece in mine for token in piece["token_ids"]] == output["token_ids"]
        assert all(len(piece["token_ids"]) <= 1 for piece in mine)
        assert "".join(piece["text"] for piece in mine) == output["text"]
        assert [(p["finish_reason"], p["stop_reason"]) for p in mine[-1:]] == [
            (output["finish_reason"], output["stop_reason"])
        ]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    assert plain(two.chat(chats, greedy, use_tqdm=False)) == plain(one.chat(chats, greedy, use_tqdm=False))
    unordered = sorted(two.generate_unordered((prompt for prompt in prompts), greedy), key=operator.itemgetter("index"))
    assert plain(unordered) == plain(generate(one, prompts, greedy))


def test_more_requests_than_run_at_once_wait_in_the_parent(one):
    prompts = random_prompts([5 + i % 20 for i in range(120)], seed=3, vocab_size=300)
    params = [SamplingParams(temperature=0, max_tokens=4 + i % 30, ignore_eos=True) for i in range(120)]
    with start(max_num_seqs=3, num_kvcache_blocks=30) as llm:
        seen = []
        thread = threading.Thread(target=lambda: seen.append(generate(llm, prompts, params)))
        thread.start()
        assert wait_until(lambda: llm.stats()["running"] > 3)
        assert max(len(group.seqs) for group in list(llm._loop._given.values())) == 1
        assert len(llm._loop._given) < 60 and llm.stats()["waiting"] > 40
        thread.join()
    assert plain(seen[0]) == plain(generate(one, prompts, params))


def test_prompts_with_a_common_beginning_go_together(two):
    before, beginnings = two.stats(), random_prompts([64] * 2, seed=9, vocab_size=300)
    prompts = [beginnings[i % 2] + [10 + i // 2] for i in range(40)]
    generate(two, prompts, SamplingParams(max_tokens=4, ignore_eos=True))
    computed = two.stats()["prompt_tokens"] - before["prompt_tokens"]
    computed -= two.stats()["cached_prompt_tokens"] - before["cached_prompt_tokens"]
    assert computed == 40 + 2 * 64


def test_calls_of_several_threads_overlap(one, two):
    greedy = SamplingParams(temperature=0, max_tokens=15)
    prompts = [[f"{i} times 3 is", f"{i} is"] for i in range(6)]
    expected = [plain(generate(one, some, greedy)) for some in prompts]
    got: dict[int, list] = {}
    threads = [
        threading.Thread(target=lambda i=i: got.update({i: plain(generate(two, prompts[i], greedy))})) for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(6)] == expected


def test_leaving_a_stream_frees_its_sequences(two):
    stream = two.generate_stream(["a", "b", "c"], LONG)
    next(stream)
    assert not two.is_finished()
    stream.close()
    assert two.is_finished()
    assert wait_until(lambda: two.stats()["running"] == two.stats()["waiting"] == 0)


def test_a_ctrl_c_keeps_what_is_finished(two):
    params = [SamplingParams(max_tokens=2, ignore_eos=True), LONG, LONG]
    before = two.stats()["output_tokens"]

    def interrupt():
        wait_until(lambda: two.stats()["output_tokens"] > before + 100)
        os.kill(os.getpid(), signal.SIGINT)
        for pid in pids(two):  # a terminal sends it to all
            os.kill(pid, signal.SIGINT)

    with default_interrupts(), pytest.raises(KeyboardInterrupt) as caught:
        threading.Thread(target=interrupt).start()
        generate(two, ["x", "y", "z"] * 20, params * 20)
    assert any(caught.value.outputs) and None in caught.value.outputs
    assert two.is_finished() and len(generate(two, ["x"], params[0])) == 1


def test_what_needs_an_engine_in_this_process_is_refused(two):
    for call in (
        lambda: two.add_request("x"),
        two.step,
        lambda: two.beam_search(["x"], BeamSearchParams(2), use_tqdm=False),
    ):
        with pytest.raises(ValueError, match=r"data_parallel_size=2 has none: use generate"):
            call()
    assert two.is_finished() and not two.abort(0)
    with pytest.raises(ValueError, match="prompts\\[1\\] is empty"):
        generate(two, ["x", []], LONG)


# ---- errors


def test_logits_processors_run_in_the_replicas(one, two, functions):
    flipped = SamplingParams(temperature=0, max_tokens=5, logits_processors=[functions.flip])
    assert plain(generate(two, ["x"], flipped)) == plain(generate(one, ["x"], flipped))


@pytest.mark.parametrize("kind", ["raises", "cannot be sent", "cannot be read"])
def test_a_processor_that_fails_concerns_its_request_only(one, two, functions, kind, monkeypatch):
    module = types.ModuleType("only_in_the_parent")
    exec(FUNCTIONS, vars(module))
    monkeypatch.setitem(sys.modules, "only_in_the_parent", module)
    module.flip.__module__ = "only_in_the_parent"
    processor = {"raises": functions.fail, "cannot be sent": lambda ids, x: x, "cannot be read": module.flip}[kind]
    reason = {
        "raises": "KeyError: 'of this request'",
        "cannot be sent": "TypeError: a request must be picklable",
        "cannot be read": "only_in_the_parent",
    }[kind]
    good = SamplingParams(temperature=0, max_tokens=5)
    params = [good, SamplingParams(temperature=1, max_tokens=5, n=2, logits_processors=[processor]), good]
    outputs = generate(two, ["x", "y", "z"], params, raise_on_error=False)
    assert [output["finish_reason"] == "error" for output in outputs] == [False, True, False]
    assert reason in outputs[1]["error"] and all(o["finish_reason"] == "error" for o in outputs[1]["outputs"])
    assert plain(outputs[::2]) == plain(generate(one, ["x", "z"], good))
    with pytest.raises(GenerationError, match=r"prompts\[1\] failed"):
        generate(two, ["x", "y", "z"], params)


def test_a_step_that_fails_ends_its_call_and_the_engine_goes_on(one, two, functions):
    bad = SamplingParams(max_tokens=5, logits_processors=[functions.halt])
    with pytest.raises(functions.Halt, match="the step") as caught:
        generate(two, ["x"] * 30 + ["y"], [LONG] * 30 + [bad])
    assert "in a replica's process" in str(caught.value.__cause__) and "replica_functions.py" in str(
        caught.value.__cause__
    )
    assert two.is_finished()
    greedy = SamplingParams(temperature=0, max_tokens=5)
    assert plain(generate(two, ["x"] * 9, greedy)) == plain(generate(one, ["x"] * 9, greedy))


def test_settings_that_cannot_work_raise_at_the_start():
    with pytest.raises(ValueError, match="data_parallel_size must be between 1 and 64, got 0"):
        start(data_parallel_size=0)
    with pytest.raises(ValueError, match=r"the KV cache needs .* lower num_kvcache_blocks"):
        start(num_kvcache_blocks=10**9)
    assert not children()


# ---- deaths


def test_requests_of_replicas_that_are_killed_run_again(mortal):
    llm, (prompts, params) = mortal, mixed(48)
    params = [params[i] if i % 4 else LONG for i in range(48)]
    with LLM(str(DEMO_MODEL), **SETTINGS) as fresh:
        expected = generate(fresh, prompts, params)
    first = pids(llm)

    def kill():
        wait_until(lambda: llm.stats()["output_tokens"] > 400)
        os.kill(first[0], signal.SIGKILL)
        wait_until(lambda: len(set(pids(llm)) - set(first)) == 1)
        wait_until(lambda: llm.stats()["output_tokens"] > 1000)
        os.kill(first[1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    assert plain(generate(llm, prompts, params)) == plain(expected)
    thread.join()
    assert not set(first) & set(pids(llm)) and len(pids(llm)) == 2
    assert wait_until(lambda: all(process.ready for process in llm._loop._replicas))
    parts = [process.stats["output_tokens"] for process in llm._loop._replicas]
    generate(llm, prompts[:8], SamplingParams(max_tokens=20, ignore_eos=True))
    assert all(p.stats["output_tokens"] > n for p, n in zip(llm._loop._replicas, parts, strict=True))


def test_streams_go_on_where_they_were_when_a_replica_is_killed(one, mortal):
    prompts = [f"Tell me about {i}" for i in range(5)]
    params = [SamplingParams(max_tokens=200, ignore_eos=True, seed=i) for i in range(5)]
    beginnings = [output["text"][:5] for output in generate(one, prompts, params)]  # no stop before `min_tokens`
    params = [replace(p, stop=[text], min_tokens=15) for p, text in zip(params, beginnings, strict=True)]
    expected = generate(one, prompts, params)
    assert all(output["text"].startswith(text) for output, text in zip(expected, beginnings, strict=True))
    pieces, num_deaths = [], len(mortal._loop._past_stats)
    assert wait_until(lambda: all(process.ready for process in mortal._loop._replicas))
    for piece in mortal.generate_stream(prompts, params):
        pieces.append(piece)
        if len(pieces) in (100, 300):
            os.kill(pids(mortal)[len(pieces) // 300], signal.SIGKILL)
    assert len(mortal._loop._past_stats) > num_deaths
    for i, output in enumerate(expected):
        mine = [piece for piece in pieces if piece["index"] == i]
        assert [token for piece in mine for token in piece["token_ids"]] == output["token_ids"]
        assert "".join(piece["text"] for piece in mine) == output["text"]


def test_when_all_have_died_too_often_calls_say_why(mortal):
    llm = mortal

    def kill_all():
        while llm._loop.failure is None:
            for process in llm._loop._replicas:
                if process.ready is not None:
                    process.shoot()
            time.sleep(0.02)

    thread = threading.Thread(target=kill_all)
    thread.start()
    with pytest.raises(RuntimeError, match=r"no replica is left after 2 restarts of each; .* was killed by SIGKILL"):
        generate(llm, ["x"] * 50, [LONG] * 50)
    thread.join()
    assert [process.num_starts for process in llm._loop._replicas] == [3, 3]
    assert llm.is_closed and wait_until(lambda: not children())
    with pytest.raises(RuntimeError, match=r"closed by a failure: no replica is left .*SIGKILL"):
        generate(llm, ["x"], LONG)
    llm.exit()


def test_exit_ends_calls_and_leaves_no_process():
    """One replica is at work; the other would not end by itself."""
    llm, errors = start(), []

    def call():
        try:
            generate(llm, ["x"] * 20, LONG)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    assert wait_until(lambda: llm.stats()["running"] > 2)
    os.kill(pids(llm)[0], signal.SIGSTOP)
    llm.exit()
    assert not children()
    thread.join()
    assert len(errors) == 1 and "closed by exit()" in errors[0]
    llm.exit()


@pytest.mark.parametrize("how", ["killed", "at its end", "without a guard"])
def test_replicas_end_with_their_parent(tmp_path, how):
    body = f"""
from nanovllm import LLM, SamplingParams
def main():
    llm = LLM({str(DEMO_MODEL)!r}, data_parallel_size=2, **{SETTINGS!r})
    stream = llm.generate_stream(["x"] * 9, SamplingParams(max_tokens=300, ignore_eos=True))
    print(*[process._process.pid for process in llm._loop._replicas], next(stream)["index"], flush=True)
    {"for _ in stream: pass" if how == "killed" else ""}
"""
    script = tmp_path / "script.py"
    script.write_text(body + ("main()" if how == "without a guard" else 'if __name__ == "__main__":\n    main()'))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if how == "without a guard":
        assert "if __name__" in process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 1
        return
    *replicas, _ = map(int, process.stdout.readline().split())
    if how == "killed":
        process.kill()
    error = process.communicate(timeout=PATIENCE)[1]
    assert error == ("" if how == "at its end" else error)
    assert wait_until(lambda: not any(map(psutil.pid_exists, replicas)))


# ---- several ranks, devices


def test_replicas_of_several_ranks_answer_and_survive_a_rank(one):
    greedy, prompts = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True), [f"{i} and" for i in range(12)]
    expected = [[t[1] for t in output] for output in plain(generate(one, prompts, greedy))]
    with start(tensor_parallel_size=2) as llm:
        tokens = [[t[1] for t in output] for output in plain(generate(llm, prompts, greedy))]
        assert tokens == expected
        [rank] = psutil.Process(pids(llm)[1]).children()
        os.kill(rank.pid, signal.SIGKILL)
        tokens = [[t[1] for t in output] for output in plain(generate(llm, prompts, greedy))]
        assert tokens == expected and llm._loop._replicas[1].num_starts == 2
    assert wait_until(lambda: not children())


@pytest.mark.parametrize("before", [None, "4,5,GPU-a,GPU-b"])
def test_each_replica_sees_only_its_own_gpus(monkeypatch, before):
    config = SimpleNamespace(device=torch.device("cuda"), tensor_parallel_size=2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    seen = []
    for index in range(2):
        with replica_process._inheriting_devices(index, 2, config):
            seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == before
    assert seen == (["4,5", "GPU-a,GPU-b"] if before else ["0,1", "2,3"])


def test_too_few_gpus_are_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    check_parallel_size(1, 3, make_config(), torch.device("cuda"))
    with pytest.raises(ValueError, match="data_parallel_size=2 needs 4 GPUs; this machine has 3"):
        check_parallel_size(2, 2, make_config(), torch.device("cuda"))
