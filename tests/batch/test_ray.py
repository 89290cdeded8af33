"""On a real cluster of two nodes on this machine: whatever dies, every answer is that of one engine."""

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

pytest.importorskip("ray")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import psutil
import pyarrow
import pyarrow.parquet as parquet
import ray
from ray.cluster_utils import Cluster

from helpers import DEMO_MODEL, random_prompts, save_model
from nanovllm import LLM, SamplingParams
from nanovllm.batch import ray_backend
from nanovllm.batch.lines import Item
from nanovllm.batch.ray_backend import RayBackend
from nanovllm.ray import build_processor

SETTINGS = {"kvcache_block_size": 8, "num_kvcache_blocks": 99, "dtype": "float32", "device": "cpu", "max_num_seqs": 8}
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Of two nodes with room for a replica each."""
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return str(path)


@pytest.fixture(scope="module")
def backend(cluster, path) -> Iterator[RayBackend]:
    """For one job after the other, whatever happened before; closed by the last test that takes it."""
    backend = RayBackend(path, SETTINGS, cluster.address)
    yield backend
    backend.close()


def greedy_items(n: int, most_tokens: int = 60) -> list[Item]:
    prompts = random_prompts([3 + i * 7 % 50 for i in range(n)])
    limits = [1 + i * 11 % most_tokens for i in range(n)]
    return [
        Item(i, f"id {i}", SamplingParams(temperature=0, max_tokens=most, ignore_eos=True), prompt=prompt)
        for i, (prompt, most) in enumerate(zip(prompts, limits, strict=True))
    ]


def answers_of_one_engine(path: str, items: list[Item]) -> dict[int, list[int]]:
    with LLM(path, **SETTINGS) as llm:
        outputs = llm.generate([item.prompt for item in items], [item.params for item in items], use_tqdm=False)
    return {item.line: output["token_ids"] for item, output in zip(items, outputs, strict=True)}


def processes_of_replicas() -> list[psutil.Process]:
    """Oldest first."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended meanwhile
            if any("ray::_Replica" in word for word in process.cmdline()):
                found[process] = process.create_time()
    return sorted(found, key=found.get)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_replicas_share_the_work(path, backend):
    items = greedy_items(200)
    wait_for_replicas(backend, 2, items)
    tokens = [stats["output_tokens"] for stats in backend._stats.values()]
    assert sum(tokens) == backend.stats()["output_tokens"] and min(tokens) > 0.3 * sum(tokens)


def wait_for_replicas(backend: RayBackend, n: int, items: list[Item]) -> None:
    """Runs the items; only the first until `n` replicas are up."""

    def source() -> Iterator[Item]:
        yield items[0]
        wait_until(lambda: backend.stats()["replicas"] == n)
        yield from items[1:]

    assert sum(1 for _ in backend.run(source())) == len(items)


def test_a_killed_actor_and_a_lost_node_cost_no_answer_and_change_none(cluster, path, backend, caplog):
    """And a node that joins gets the replica that the lost one had."""
    items, answers = greedy_items(900), {}
    for number, (item, output) in enumerate(backend.run(iter(items))):
        assert item.line not in answers
        answers[item.line] = output["token_ids"]
        if number == 50:
            backend_stats = backend.stats()
            [killed, *_] = processes_of_replicas()
            killed.send_signal(signal.SIGKILL)
        if number == 350:
            lose_a_node(cluster)
            cluster.add_node(**NODE)
    assert answers == answers_of_one_engine(path, items)
    assert backend_stats["output_tokens"] > 0
    assert "replica 0 died" in caplog.text and "replica 1 died" in caplog.text
    assert len(processes_of_replicas()) == 2


def lose_a_node(cluster: Cluster) -> None:
    """With its replica. It is killed, nobody is told."""
    [node] = cluster.worker_nodes
    [raylet] = node.all_processes["raylet"]
    [replica] = [p for p in processes_of_replicas() if any(q.pid == raylet.process.pid for q in p.parents())]
    cluster.remove_node(node)
    wait_until(lambda: replica not in processes_of_replicas())


def test_what_a_request_fails_of_concerns_no_other(path, backend, monkeypatch):
    """One is too long for the model; one kills whatever process computes it, at first with those beside it."""
    monkeypatch.setattr(ray_backend, "MAX_FAILURES", 2)  # each takes the time of a start
    items = greedy_items(60)
    wrong = {7: [2] * 600, 23: items[23].prompt}
    items[7].prompt = wrong[7]
    deadly = SamplingParams(temperature=0, logits_processors=[lambda token_ids, logits: os._exit(1)])
    items[23].params = deadly
    outputs = {item.line: output for item, output in backend.run(iter(items))}
    assert "leaves no room" in outputs[7]["error"] and "ActorUnavailableError" in outputs[23]["error"]
    assert {line for line, output in outputs.items() if output["finish_reason"] == "error"} == wrong.keys()
    good = [item for item in items if item.line not in wrong]
    assert {item.line: outputs[item.line]["token_ids"] for item in good} == answers_of_one_engine(path, good)


def test_an_endless_input_is_read_as_there_is_room_and_answers_do_not_wait_for_it(path, backend):
    items, taken, answered = greedy_items(10), itertools.count(), threading.Event()

    def source() -> Iterator[Item]:
        yield from items
        assert answered.wait(60)  # while this blocks, what is there is answered
        for i in taken:
            yield Item(10 + i, "", SamplingParams(temperature=0, max_tokens=1), prompt=[5, i % 300])

    outputs = backend.run(source())
    assert sorted(item.line for item, _ in itertools.islice(outputs, 10)) == list(range(10))
    answered.set()
    num_answers = sum(1 for _ in itertools.islice(outputs, 500))
    num_outstanding = 2 * ray_backend.LEAD * SETTINGS["max_num_seqs"] + 2
    assert next(taken) < num_answers + num_outstanding + ray_backend.READ_AHEAD
    outputs.close()


def test_an_input_that_raises_ends_the_job_with_its_error(path, backend):
    def source() -> Iterator[Item]:
        yield from greedy_items(3)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(backend.run(source()))


def test_a_closed_backend_leaves_no_replica(backend):
    backend.close()
    wait_until(lambda: not processes_of_replicas())


def test_a_job_whose_driver_is_killed_goes_on_with_what_is_missing(cluster, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = [f"What is {i} + {i + 7}?" for i in range(400)]
    source.write_text("".join(json.dumps({"prompt": prompt, "temperature": 0}) + "\n" for prompt in prompts))
    settings = SETTINGS | {"kvcache_block_size": 16, "num_kvcache_blocks": 200}
    options = settings | {"defaults": {"max_tokens": 60}, "ray": cluster.address, "use_tqdm": False}
    job = f"from nanovllm import batch; batch.run({str(source)!r}, {str(output)!r}, {str(DEMO_MODEL)!r}, **{options})"
    driver = subprocess.Popen([sys.executable, "-c", job])
    wait_until(lambda: output.exists() and output.read_bytes().count(b"\n") >= 20)
    driver.kill()
    driver.wait()
    num_written = output.read_bytes().count(b"\n")
    assert num_written < len(prompts)
    subprocess.run([sys.executable, "-c", job], check=True, timeout=120)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    answers = {record["custom_id"]: record["response"]["body"]["choices"][0]["text"] for record in records}
    with LLM(str(DEMO_MODEL), **settings) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=60), use_tqdm=False)
    assert len(records) == len(prompts)
    assert answers == {f"line-{i + 1}": output["text"] for i, output in enumerate(outputs)}


def test_a_model_that_cannot_be_loaded_raises_the_engines_own_error(cluster, path):
    backend = RayBackend(path, SETTINGS | {"tensor_parallel_size": 3}, cluster.address)
    with pytest.raises(ValueError, match=r"^tensor_parallel_size=3 does not divide") as raised:
        list(backend.run(greedy_items(3)))
    assert type(raised.value) is ValueError
    backend.close()
    wait_until(lambda: not processes_of_replicas())


def test_connecting_keeps_the_handler_of_sigterm_and_says_what_is_wrong(cluster, path):
    ray.shutdown()
    previous = signal.signal(signal.SIGTERM, handler := lambda *_: None)
    try:
        with pytest.raises(ValueError, match=r"no Ray cluster answers at address='127\.0\.0\.1:1'"):
            RayBackend(path, SETTINGS, "127.0.0.1:1")
        RayBackend(path, SETTINGS, cluster.address).close()
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert not ray.is_initialized()
    with pytest.raises(ValueError, match="min_replicas=3 must be 1 to max_replicas=2"):
        RayBackend(path, SETTINGS, cluster.address, min_replicas=3, max_replicas=2)


def test_a_dataset_keeps_its_columns_and_its_rows_get_the_answers_of_one_engine(cluster, path, tmp_path):
    ray.init(cluster.address, ignore_reinit_error=True)
    items = greedy_items(40)
    prompts = [item.prompt for item in items]
    prompts[5] = [2] * 600
    parquet.write_table(pyarrow.table({"id": range(40), "ids": prompts, "other": ["x"] * 40}), tmp_path / "in.parquet")
    params = SamplingParams(temperature=0, max_tokens=20)
    process = build_processor(path, params, prompt_column="ids", output_column="out", batch_size=7, **SETTINGS)
    process(ray.data.read_parquet(str(tmp_path / "in.parquet"))).write_parquet(str(tmp_path / "out"))
    table = parquet.read_table(tmp_path / "out").sort_by("id").to_pydict()
    assert list(table) == ["id", "ids", "other", "out", "finish_reason", "error"]
    assert (table["id"], table["ids"], table["other"]) == (list(range(40)), prompts, ["x"] * 40)
    with LLM(path, **SETTINGS) as llm:
        outputs = llm.generate([prompt for prompt in prompts if len(prompt) < 600], params, use_tqdm=False)
    assert (table["out"].pop(5), table["finish_reason"].pop(5)) == (None, "error")
    assert "leaves no room" in table["error"].pop(5)
    assert table["out"] == [output["text"] for output in outputs] and not any(table["error"])
    assert table["finish_reason"] == [output["finish_reason"] for output in outputs]


def test_columns_that_would_be_there_twice_are_refused():
    with pytest.raises(ValueError, match=r"different names, got \['error', 'generated_text', 'finish_reason', 'error'"):
        build_processor("model", prompt_column="error")


def test_without_ray_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("nanovllm.ray", "nanovllm.batch.ray_backend"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install 'nanovllm\[ray\]'"):
        importlib.import_module("nanovllm.ray")
