"""What Linux tells of machines that are larger than this one: two sockets, nodes, hyperthreads."""

import os
from types import SimpleNamespace

import pytest
import torch

from helpers import random_prompts, save_model
from nanovllm import LLM, SamplingParams
from nanovllm.engine import model_runner
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.utils import device, topology

GIB_IN_KIB = 2**20


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Writes what Linux says of `sockets`, each one node or more of cores with two threads, numbered as it does.

    The first threads of all cores come first: with 4 nodes of 2 cores, CPUs 0 and 1, and 8 and 9, are node 0's.
    """
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def write(free: list[int], num_cores: int, nodes_per_socket: int = 1) -> int:
        num_threads = 2 * num_cores * len(free)
        for cpu in range(num_threads):
            node, core = divmod(cpu % (num_threads // 2), num_cores)
            place = tmp_path / f"cpu/cpu{cpu}"
            (place / "topology").mkdir(parents=True)
            (place / f"node{node}").mkdir()
            (place / "topology/physical_package_id").write_text(f"{node // nodes_per_socket}\n")
            (place / "topology/core_id").write_text(f"{core + node % nodes_per_socket * num_cores}\n")
        for i, gib in enumerate(free):
            place = tmp_path / f"node/node{i}"
            place.mkdir(parents=True)
            bounds = (f"{first}-{first + num_cores - 1}" for first in (i * num_cores, (len(free) + i) * num_cores))
            place.joinpath("cpulist").write_text(",".join(bounds) + "\n")
            lines = {"MemTotal": 999 * GIB_IN_KIB, "MemFree": gib * GIB_IN_KIB - 3, "Inactive(file)": 3, "Active": 7}
            text = "".join(f"Node {i} {name}:  {kib} kB\n" for name, kib in lines.items())
            place.joinpath("meminfo").write_text(text + f"Node {i} HugePages_Total:     0\n")
        monkeypatch.setattr(topology, "SYSTEM", tmp_path)
        allow(set(range(num_threads)))
        return num_threads

    def allow(cpus: set[int]) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cpus), raising=False)
        monkeypatch.setattr(device, "TORCH_THREADS", len(cpus))
        monkeypatch.setattr(torch, "get_num_threads", lambda: len(cpus))

    return SimpleNamespace(write=write, allow=allow)


def test_a_thread_for_each_core_of_the_fewest_nodes_that_hold_the_model(machine):
    machine.write([100, 120], num_cores=32)
    node = set(range(32, 64)) | set(range(96, 128))
    assert topology.cpus_near(120 * 2**30) == node  # the one with more room
    assert topology.cpus_near(120 * 2**30 + 1) == set()  # both: as they are
    assert topology.cpus_near(221 * 2**30) == set()
    assert device.default_threads() == 64  # cores, and not their 128 threads
    machine.allow(node)
    assert device.default_threads() == 32 and topology.cpus_near(2**30) == set()
    machine.allow({0, 1, 2, 64, 65, 33})  # of the node with more room one CPU alone
    assert topology.cpus_near(2**30) == {33}
    assert topology.num_cores({0, 1, 2, 64, 65}) == 3


def test_three_nodes_of_four_if_a_model_takes_them(machine):
    machine.write([10, 40, 30, 20], num_cores=2, nodes_per_socket=2)
    assert topology.cpus_near(80 * 2**30) == {2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15}


def test_replicas_get_whole_cores_of_whole_nodes(machine):
    machine.write([64] * 4, num_cores=2, nodes_per_socket=2)
    assert [topology.share_of_cpus(i, 4) for i in range(4)] == [
        {0, 1, 8, 9},
        {2, 3, 10, 11},
        {4, 5, 12, 13},
        {6, 7, 14, 15},
    ]
    machine.allow(set(range(15)))
    shares = [topology.share_of_cpus(i, 4) for i in range(4)]
    assert shares == [{0, 8, 1}, {9, 2, 10, 3}, {11, 4, 12, 5}, {13, 6, 14, 7}]
    assert [topology.share_of_cpus(i, 20) for i in (0, 19)] == [set(), {7}]


def test_where_nothing_is_known_each_cpu_is_a_core(tmp_path, monkeypatch):
    monkeypatch.setattr(topology, "SYSTEM", tmp_path)
    assert topology.num_cores({3, 4, 5}) == 3 and topology.cpus_near(1) == set()


def test_an_engine_stays_near_its_memory_and_its_caller_does_not(tmp_path, monkeypatch):
    """On the CPUs of this machine, one of which is said to be a node that holds the model."""
    before = topology.allowed_cpus()
    if len(before) < 2:
        pytest.skip("there is no choice")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(device, "TORCH_THREADS", torch.get_num_threads())  # nobody has chosen another number
    save_model(tmp_path)
    near = {max(before)}
    asked, seen = [], {}
    monkeypatch.setattr(model_runner, "cpus_near", lambda num_bytes: asked.append(num_bytes) or near)
    build, run = ModelRunner._build_model, ModelRunner.run
    monkeypatch.setattr(
        ModelRunner, "_build_model", lambda self: [seen.update(build=topology.allowed_cpus()), build(self)][1]
    )
    monkeypatch.setattr(ModelRunner, "run", lambda *args: [seen.update(run=topology.allowed_cpus()), run(*args)][1])
    with LLM(str(tmp_path), device="cpu", num_kvcache_blocks=8) as llm:
        llm.generate(random_prompts([5]), SamplingParams(max_tokens=2), use_tqdm=False)
        assert llm.model_runner.num_threads == 1
    assert seen == {"build": near, "run": near} and topology.allowed_cpus() == before
    assert asked == [(tmp_path / "model.safetensors").stat().st_size + device.CPU_CACHE_BYTES]
