"""However a rank fails or an engine ends, the caller hears why and soon, and nothing stays behind."""

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import psutil
import pytest

from helpers import ROOT, random_prompts, save_model
from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.engine import parallel_runner
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.workers import Channel

SETTINGS = {"kvcache_block_size": 8, "num_kvcache_blocks": 99, "dtype": "float32", "device": "cpu"}
NAMES: list[str] = []  # of the semaphores that a test's engines have made
PATIENCE = 20  # seconds for a failure to be reported, or for a process to be gone


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


def start(path, size=2, **settings) -> LLM:
    return LLM(str(path), tensor_parallel_size=size, **SETTINGS | settings)


def generate(llm, max_tokens=4):
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return llm.generate(random_prompts([9, 30]), params, use_tqdm=False)


def tokens_of(outputs) -> list[list[int]]:
    return [output["token_ids"] for output in outputs]


def worker_pids() -> list[int]:
    """Children of this process but for multiprocessing's resource tracker, of which there is one for good."""
    children = [c for c in psutil.Process().children(recursive=True) if c.status() != psutil.STATUS_ZOMBIE]
    return [child.pid for child in children if "resource_tracker" not in " ".join(child.cmdline())]


def wait_until(condition, seconds=PATIENCE) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def semaphores(channel: Channel) -> list[str]:
    """Their names."""
    return [lock._semlock.name for lock in (*channel.is_written, channel.is_read, channel.has_report)]


def traces() -> set[str]:
    """What these tests' engines leave in shared memory and in the directory of temporary files while they live."""
    shared = [Path("/dev/shm", name.replace("/", "sem.")) for name in NAMES]
    return {str(path) for path in (*shared, *Path(tempfile.gettempdir()).glob("nanovllm-*")) if path.exists()}


def watchdogs() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "watchdog" in thread.name]


def listening() -> int:
    return sum(c.status == psutil.CONN_LISTEN for c in psutil.Process().net_connections())


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path, monkeypatch):
    """At once, but for a worker that was killed while it joined: gloo tries for a while to reach it.

    Other engines may live on this machine.
    """
    NAMES.clear()
    make = Channel.__init__
    monkeypatch.setattr(Channel, "__init__", lambda *args: make(*args) or NAMES.extend(semaphores(args[0])))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    gc.collect()
    wait_until(lambda: not (worker_pids() or traces() or listening()), 60)
    assert (worker_pids(), traces(), listening(), watchdogs()) == ([], set(), 0, [])


# ---- a worker fails


@pytest.mark.parametrize("when", ["idle", "mid-step"])
def test_a_killed_worker_is_named_and_closes_the_engine(path, when):
    llm = start(path)
    generate(llm)
    [pid] = worker_pids()
    threading.Timer(0.0 if when == "idle" else 0.3, os.kill, (pid, signal.SIGKILL)).start()
    if when == "idle":
        assert wait_until(lambda: not worker_pids())
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 was killed by SIGKILL"):
        for _ in range(50):
            generate(llm, max_tokens=400)
    assert time.monotonic() - began < PATIENCE
    assert not worker_pids() and not listening()
    for call in (
        lambda: generate(llm),
        llm.step,
        llm.is_finished,
        lambda: llm.beam_search([[5]]),
        lambda: llm.abort(0),
    ):
        with pytest.raises(RuntimeError, match=r"closed by a failure: .*rank 1 was killed by SIGKILL"):
            call()
    llm.exit()


@pytest.mark.parametrize("when", ["idle", "mid-step"])
def test_a_stopped_worker_is_named_and_killed(path, when):
    """It does not end by itself, nor when it is asked to: it hangs."""
    llm = start(path, worker_timeout=1)
    generate(llm)
    [pid] = worker_pids()
    if when == "idle":
        os.kill(pid, signal.SIGSTOP)
    else:
        threading.Timer(0.3, os.kill, (pid, signal.SIGSTOP)).start()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1 hangs: .* for 1 s.* worker_timeout"):
        for _ in range(50):
            generate(llm, max_tokens=400)
    assert time.monotonic() - began < PATIENCE
    assert not worker_pids() and not watchdogs()
    with pytest.raises(RuntimeError, match=r"closed by a failure: .*rank 1 hangs"):
        generate(llm)


def test_a_step_that_takes_longer_than_the_timeout_is_left_alone(path):
    """A rank that works gets on, however slowly."""
    with start(path, worker_timeout=1) as llm:
        expected = tokens_of(generate(llm, max_tokens=1))
        for layer in llm.model_runner.model.model.layers:
            layer.register_forward_hook(lambda *_: time.sleep(0.8))
        began = time.monotonic()
        assert tokens_of(generate(llm, max_tokens=1)) == expected
        assert time.monotonic() - began > 1.5


def test_a_stopped_worker_does_not_keep_an_engine_from_ending(path):
    llm = start(path)
    os.kill(worker_pids()[0], signal.SIGSTOP)
    llm.exit()
    assert not worker_pids()


def test_a_worker_that_raises_is_reported_with_its_traceback_and_a_new_engine_starts(path):
    llm = start(path)
    generate(llm)
    llm.model_runner.workers.publish("forward", ())
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed:.*in decode.*ValueError"):
        llm.beam_search(random_prompts([9]))
    assert time.monotonic() - began < PATIENCE
    assert not worker_pids()
    with start(path) as llm:
        assert len(generate(llm)) == 2


@pytest.mark.parametrize("phase", ["starting", "joining", "loading"])
def test_a_worker_killed_during_construction_is_named(path, phase, monkeypatch):
    killed_at = []

    def kill():
        killed_at.append(time.monotonic())
        os.kill(worker_pids()[0], signal.SIGKILL)

    if phase == "starting":
        threading.Thread(target=lambda: (wait_until(worker_pids), time.sleep(0.2), kill())).start()
    elif phase == "joining":
        connect = parallel_runner.connect

        def join_late(*args):
            kill()
            return connect(*args)

        monkeypatch.setattr(parallel_runner, "connect", join_late)
    else:
        build = ModelRunner._build_model
        monkeypatch.setattr(ModelRunner, "_build_model", lambda runner: kill() or time.sleep(0.2) or build(runner))
    with pytest.raises(RuntimeError, match="rank 1 was killed by SIGKILL"):
        start(path)
    assert time.monotonic() - killed_at[0] < PATIENCE
    assert not worker_pids()


# ---- construction fails in rank 0


def test_sizes_that_do_not_divide_the_model_are_refused_before_anything_starts(path, tmp_path):
    with pytest.raises(ValueError, match=r"tensor_parallel_size=3 .*num_attention_heads=4.* use one of \[1, 2, 4\]"):
        start(path, size=3)
    save_model(tmp_path, num_attention_heads=6, num_key_value_heads=3, intermediate_size=90)
    with pytest.raises(ValueError, match=r"use one of \[1, 3, 6\]"):
        Config(str(tmp_path), tensor_parallel_size=2)
    assert Config(str(tmp_path), tensor_parallel_size=6).tensor_parallel_size == 6


def test_what_rank_0_finds_wrong_is_raised_as_with_one_rank(tmp_path):
    save_model(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        start(tmp_path)
    assert not worker_pids()


# ---- ends


def test_engines_one_after_another_leave_nothing(path):
    def usage():
        gc.collect()
        me = psutil.Process()
        return {"fds": me.num_fds(), "threads": me.num_threads(), "children": len(me.children())}, me.memory_info().rss

    for i in range(3):
        llm = start(path)
        generate(llm)
        assert len(traces()) == 4  # semaphores and a directory
        if i % 2:
            llm.exit()
            llm.exit()
        del llm
        if not i:
            first, first_bytes = usage()
    last, last_bytes = usage()
    assert last == first and not worker_pids()
    assert last_bytes < 1.03 * first_bytes


SCRIPT = """
import psutil
from nanovllm import LLM, SamplingParams

def main():
    llm = LLM({path!r}, tensor_parallel_size=2, **{settings!r})
    print(len(llm.generate([[5, 6]], SamplingParams(temperature=0), use_tqdm=False)), flush=True)
    print(*[child.pid for child in psutil.Process().children()], flush=True)
    channel = llm.model_runner.workers._channel
    for lock in (*channel.is_written, channel.is_read, channel.has_report):
        print(lock._semlock.name, flush=True)
    {end}

{guard}
    main()
"""


def run_script(tmp_path, path, end="pass", guard="if __name__ == '__main__':", **kwargs) -> subprocess.Popen:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(path=str(path), settings=SETTINGS, end=end, guard=guard))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(script)], env=environment, cwd=tmp_path, **pipes)


def own_lines(lines: Iterable[str]) -> Iterator[str]:
    """What the script itself has printed; gloo in PyTorch 2.8 does so, too."""
    return (line.strip() for line in lines if not line.startswith("[Gloo]"))


def test_a_script_that_never_calls_exit_ends_cleanly(path, tmp_path):
    with run_script(tmp_path, path) as script:
        out, err = script.communicate(timeout=50)
    assert script.returncode == 0 and next(own_lines(out.splitlines())) == "1"
    assert "Traceback" not in err and "leaked" not in err


@pytest.mark.parametrize("end", ["import time; time.sleep(100)", "while True: llm.generate([[5]], use_tqdm=False)"])
def test_workers_end_when_their_parent_is_killed(path, tmp_path, end):
    with run_script(tmp_path, path, end=end) as script:
        try:
            lines = own_lines(script.stdout)
            assert next(lines) == "1"
            pids = [int(pid) for pid in next(lines).split()]
            NAMES.extend(islice(lines, 3))
            assert len(pids) == 2 and all(map(psutil.pid_exists, pids))  # a worker and the resource tracker
            assert len(traces()) == 4
            time.sleep(0.3)
        finally:
            script.kill()
    assert wait_until(lambda: not any(map(psutil.pid_exists, pids)))


def test_a_script_without_a_main_guard_is_told_so(path, tmp_path):
    with run_script(tmp_path, path, guard="if True:") as script:
        out, err = script.communicate(timeout=50)
    assert script.returncode == 1 and out == ""
    last_line = err.strip().splitlines()[-1]
    assert "WorkerError: tensor-parallel rank 1" in last_line and 'if __name__ == "__main__"' in last_line
    assert err.count("Traceback") == 2  # the parent's and its only child's
