"""A job over files: every line is answered once, whatever happens on the way."""

import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import zstandard

from helpers import DEMO_MODEL, ROOT, default_interrupts
from nanovllm import LLM, SamplingParams, batch
from nanovllm.batch import BatchError, runner
from nanovllm.batch.inputs import Inputs
from nanovllm.batch.output import Output

SETTINGS = {"dtype": "float32", "device": "cpu", "num_kvcache_blocks": 200, "max_num_seqs": 16}
TASKS = "reverse", "sort", "count", "copy"


def plain_lines(n: int, max_tokens: int = 6) -> list[dict]:
    rng = random.Random(n)
    return [
        {
            "custom_id": f"request {i}", "prompt": f"{rng.choice(TASKS)}: {rng.randrange(10**6)}",
            "max_tokens": 1 + i % max_tokens, "temperature": i % 2, "ignore_eos": True,
        }
        for i in range(n)
    ]  # fmt: skip


def write(path, lines: list) -> str:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(text)
    return str(path)


def records(path) -> dict[str, dict]:
    """By custom_id, each of which is there once."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    by_id = {record["custom_id"]: record for record in found}
    assert len(by_id) == len(found)
    return by_id


def texts(path) -> dict[str, str | None]:
    return {
        custom_id: record["response"] and record["response"]["body"]["choices"][0]["text"]
        for custom_id, record in records(path).items()
    }


def run(inputs, output, **options) -> dict:
    return batch.run(inputs, str(output), str(DEMO_MODEL), use_tqdm=False, **SETTINGS | options)


def start(inputs: str, output, limit: str = "") -> subprocess.Popen:
    """The same as a process of its own."""
    code = (
        f"import resource, signal; signal.signal(signal.SIGINT, signal.default_int_handler); {limit}\n"
        "from nanovllm import batch\n"
        f"print('begins', flush=True)\n"
        f"raise SystemExit(batch.run({inputs!r}, {str(output)!r}, {str(DEMO_MODEL)!r}, use_tqdm=False, **{SETTINGS!r})"
        "['exit_code'])"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    assert process.stdout.readline() == "begins\n"
    return process


def wait_for_lines(process: subprocess.Popen, output, number: int) -> None:
    while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < number):
        time.sleep(0.002)


# ---- answers


def test_each_line_gets_the_answer_of_generate(tmp_path):
    lines = plain_lines(40)
    lines[7] = {"messages": [{"role": "user", "content": "sort: 3 1 2"}], "temperature": 0, "max_tokens": 8}
    figures = run(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", summary=str(tmp_path / "summary"))
    assert figures == json.loads((tmp_path / "summary").read_text())
    assert (figures["exit_code"], figures["answered"], figures["failed"]) == (0, 40, 0)
    with LLM(str(DEMO_MODEL), **SETTINGS) as llm:
        greedy = [line for line in lines if line["temperature"] == 0 and "prompt" in line]
        params = [SamplingParams(temperature=0, max_tokens=x["max_tokens"], ignore_eos=True) for x in greedy]
        expected = llm.generate([line["prompt"] for line in greedy], params, use_tqdm=False)
        chat = llm.chat(lines[7]["messages"], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    found = records(tmp_path / "out.jsonl")
    assert found["line-8"]["response"]["body"]["choices"][0]["message"]["content"] == chat[0].text
    for line, output in zip(greedy, expected, strict=True):
        body = found[line["custom_id"]]["response"]["body"]
        assert body["choices"][0]["text"] == output.text and body["object"] == "text_completion"
        assert body["usage"]["completion_tokens"] == len(output.token_ids)
    total = sum(record["response"]["body"]["usage"]["completion_tokens"] for record in found.values())
    assert figures["output_tokens"] == total


def test_bad_lines_are_records_that_say_why_and_the_others_go_on(tmp_path):
    lines = [
        *plain_lines(3), "{", "\x00", json.dumps("text"), '{"prompt": 5}', '{"prompt": "x", "tempratur": 1}', "", "   ",
        {"custom_id": "long", "prompt": "x " * 5000}, {"custom_id": "empty", "prompt": []},
        {"custom_id": "request 1", "prompt": "again"}, {"custom_id": "bad role", "messages": [5]},
    ]  # fmt: skip
    figures = run(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    assert (figures["exit_code"], figures["answered"], figures["failed"]) == (3, 3, 9)
    found = records(tmp_path / "out.jsonl")
    assert len(found) == 12
    errors = {custom_id: record["error"] for custom_id, record in found.items() if record["error"]}
    assert all(found[custom_id]["response"] is None for custom_id in errors)
    assert "'tempratur'" in errors["line-8"]["message"] and "temperature" in errors["line-8"]["message"]
    assert "max_model_len" in errors["long"]["message"] and "empty" in errors["empty"]["message"]
    [duplicate] = [error for error in errors.values() if error["code"] == "duplicate_custom_id"]
    assert "'request 1'" in duplicate["message"] and "in.jsonl:2" in duplicate["message"]


def test_in_order_means_the_order_of_the_lines(tmp_path):
    lines = plain_lines(60, max_tokens=30)
    lines[3:3] = ["no JSON"]
    for in_order in (True, False):
        output = tmp_path / f"{in_order}.jsonl"
        run(write(tmp_path / "in.jsonl", lines), output, in_order=in_order)
        order = [json.loads(line)["custom_id"] for line in output.read_text().splitlines()]
        expected = [line["custom_id"] if isinstance(line, dict) else "line-4" for line in lines]
        assert (order == expected) == in_order and sorted(order) == sorted(expected)
    assert texts(tmp_path / "True.jsonl") == texts(tmp_path / "False.jsonl")  # sampled ones too


def test_inputs_may_be_compressed_patterns_and_standard_input(tmp_path, monkeypatch):
    lines = [json.dumps(line).encode() + b"\n" for line in plain_lines(40)]
    (tmp_path / "1.jsonl").write_bytes(b"".join(lines[:10])[:-1])  # the last line without an end
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[10:20])))
    (tmp_path / "3.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines[20:30])))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"".join(lines[30:]))))
    run([str(tmp_path / "*.jsonl*"), "-"], tmp_path / "out", in_order=True)
    assert list(texts(tmp_path / "out")) == [f"request {i}" for i in range(40)]


# ---- mistakes


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inputs": "nosuch*.jsonl"}, ValueError, "fits no file"),
        ({"inputs": ["-", "-"]}, ValueError, "only once"),
        ({"output": "nosuch/out"}, BatchError, "cannot be written: No such file"),
        ({"output": "."}, BatchError, "cannot be written: Is a directory"),
        ({"output": "in.jsonl"}, ValueError, "one of the inputs"),
        ({"model": "nosuch"}, ValueError, "neither a directory"),
        ({"defaults": {"temperature": -1}}, ValueError, "temperature must be"),
        ({"defaults": {"tempratur": 1}}, ValueError, "tempratur"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_anything_is_computed(tmp_path, monkeypatch, change, error, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "_open", None)
    write(tmp_path / "in.jsonl", plain_lines(2))
    arguments = {"inputs": "in.jsonl", "output": "out", "model": str(DEMO_MODEL)} | change
    with pytest.raises(error, match=message):
        batch.run(**arguments)


def test_two_jobs_do_not_write_the_same_output(tmp_path):
    lines = write(tmp_path / "in.jsonl", plain_lines(3))
    other = Output(str(tmp_path / "out"), {}, Inputs([lines]))
    with pytest.raises(BatchError, match="being written by another job"):
        run(lines, tmp_path / "out")
    other.close()


# ---- going on


def test_only_what_is_missing_is_computed(tmp_path, monkeypatch):
    lines, output = plain_lines(20), tmp_path / "out"
    lines[5] = "no JSON"
    path = write(tmp_path / "in.jsonl", lines)
    run(path, output)
    whole, before = output.read_bytes(), texts(output)
    kept = whole.splitlines(keepends=True)[:12]
    output.write_bytes(b"".join(kept) + whole.splitlines()[12][:30])  # the line after them is torn
    figures = run(path, output)
    assert output.read_bytes().startswith(b"".join(kept)) and texts(output) == before
    missing = [json.loads(line) for line in whole.splitlines()[12:]]
    tokens = sum(record["response"]["body"]["usage"]["completion_tokens"] for record in missing if record["response"])
    assert (figures["answered"], figures["failed"], figures["output_tokens"]) == (19, 1, tokens)
    monkeypatch.setattr(runner, "_open", None)  # nothing is missing: no model is loaded
    assert run(path, output)["exit_code"] == 3 and texts(output) == before


def test_a_changed_job_is_refused(tmp_path):
    lines, output = plain_lines(20), tmp_path / "out"
    path = write(tmp_path / "in.jsonl", lines)
    run(path, output)
    before = output.read_bytes()
    for change, name in [({"dtype": "bfloat16"}, "dtype"), ({"defaults": {"top_k": 3}}, "default top_k")]:
        with pytest.raises(BatchError, match=rf"begun with another {name}.*--force"):
            run(path, output, **change)
    run(path, output, max_num_seqs=3)  # on which no answer depends
    for changed in ([*lines[:4], "{}", *lines[5:]], lines[:-1]):
        with pytest.raises(BatchError, match="begun with another input"):
            run(write(tmp_path / "in.jsonl", changed), output)
    assert output.read_bytes() == before
    assert run(path, output, force=True)["answered"] == 20
    more = [*lines, {"custom_id": "one more", "prompt": "x"}]  # an input may grow
    assert run(write(tmp_path / "in.jsonl", more), output)["answered"] == 21
    (tmp_path / "out.job").unlink()
    with pytest.raises(BatchError, match=r"no .*out\.job tells"):
        run(path, output)
    output.write_text("something else\n")
    with pytest.raises(BatchError, match="line 1, is no answer"):
        run(path, output, force=True)


def test_an_interrupted_job_says_so_and_goes_on(tmp_path):
    path, output = write(tmp_path / "in.jsonl", plain_lines(150, max_tokens=40)), tmp_path / "out"
    process = start(path, output)
    wait_for_lines(process, output, 5)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert 5 <= len(records(output)) < 150

    def interrupt() -> None:
        num_lines = len(records(output))
        while output.read_bytes().count(b"\n") < num_lines + 5:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with default_interrupts():
        thread.start()
        assert run(path, output)["exit_code"] == 130
        thread.join()
    assert len(records(output)) < 150
    assert run(path, output)["exit_code"] == 0
    run(path, tmp_path / "at once")
    assert texts(output) == texts(tmp_path / "at once")


def test_killed_at_any_moment_a_job_loses_nothing_and_repeats_nothing(tmp_path):
    path, output = write(tmp_path / "in.jsonl", plain_lines(250, max_tokens=40)), tmp_path / "out"
    rng, num_kills = random.Random(0), 0
    for _ in range(3):
        process = start(path, output)
        if rng.random() < 0.7:  # the others while the model is loaded, or the output read
            wait_for_lines(process, output, output.read_bytes().count(b"\n") + 1 if output.exists() else 1)
        time.sleep(rng.random() * 0.1)
        process.kill()
        num_kills += process.wait() == -signal.SIGKILL
        process.communicate()
    num_kept = output.read_bytes().count(b"\n")
    assert num_kills == 3 and 2 <= num_kept < 250
    assert run(path, output)["exit_code"] == 0
    run(path, tmp_path / "at once")
    assert len(records(output)) == 250 and texts(output) == texts(tmp_path / "at once")


def test_a_full_disk_ends_a_job_that_goes_on_later(tmp_path):
    path, output = write(tmp_path / "in.jsonl", plain_lines(100)), tmp_path / "out"
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"
    process = start(path, output, limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "cannot be written: File too large" in errors and "the same command goes on" in errors
    assert output.stat().st_size == 9000
    assert run(path, output)["exit_code"] == 0 and len(records(output)) == 100


def test_an_input_that_breaks_off_is_named_and_the_next_one_read(tmp_path):
    lines = [json.dumps(line).encode() + b"\n" for line in plain_lines(60)]
    (tmp_path / "1.gz").write_bytes(gzip.compress(b"".join(lines[:40]))[:-300])
    (tmp_path / "2").write_bytes(b"".join(lines[40:]))
    figures = run([str(tmp_path / "1.gz"), str(tmp_path / "2")], tmp_path / "out")
    assert figures["exit_code"] == 3 and list(figures["unreadable"]) == [str(tmp_path / "1.gz")]
    assert {f"request {i}" for i in range(40, 60)} <= set(texts(tmp_path / "out"))


def test_memory_does_not_grow_with_the_input(tmp_path):
    """The reader and the writer, with an engine that answers at once."""
    code = f"""
import resource, sys
from nanovllm.batch import runner
from nanovllm.outputs import CompletionOutput, RequestOutput
end = dict(finish_reason="stop", stop_reason=None, logprobs=None, cumulative_logprob=None)
peaks = []
class Stub:
    stats = dict
    def run(self, items):
        for i, item in enumerate(items):
            one = CompletionOutput(index=0, text="x", token_ids=[1], **end)
            about = dict(prompt="", prompt_token_ids=[1], prompt_logprobs=None, num_cached_tokens=0)
            yield item, RequestOutput(one | about, outputs=[one])
            if i % 20000 == 19999:
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    def close(self): pass
runner._open = lambda *args: Stub()
runner.run("-", {str(tmp_path / "out")!r}, {str(DEMO_MODEL)!r}, use_tqdm=False)
print(*peaks)
"""
    lines = "".join(f'{{"custom_id": "request number {i}", "prompt": "What is {i}?"}}\n' for i in range(100_000))
    peaks = subprocess.run([sys.executable, "-c", code], input=lines, capture_output=True, text=True, check=True).stdout
    first, *_, last = map(int, peaks.split())
    assert last - first < 8, peaks  # MB; the custom_ids alone are 10
