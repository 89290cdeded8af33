"""What the machine, a container or the user leaves to an engine."""

import platform

import numpy as np
import pytest
import torch

from nanovllm.utils import cgroup, device, topology


@pytest.fixture
def set_machine(monkeypatch):
    """A machine on which PyTorch would take 64 threads, and nobody has chosen another number."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(device, "TORCH_THREADS", 64)

    def set_machine(cores=64, allowed=128, limit=float("inf"), threads=64):
        monkeypatch.setattr(device.psutil, "cpu_count", lambda logical: cores)
        monkeypatch.setattr(device, "allowed_cpus", lambda: set(range(allowed)))
        monkeypatch.setattr(topology, "_place", lambda cpu: (0, 0, cpu % 64, cpu))
        monkeypatch.setattr(cgroup, "cpu_limit", lambda: limit)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    return set_machine


def test_there_are_no_more_threads_than_can_run_at_once(set_machine):
    for machine, expected in (
        ({}, 64),
        ({"limit": 4.0}, 4),
        ({"limit": 2.5}, 3),
        ({"limit": 0.1}, 1),
        ({"allowed": 6}, 6),
        ({"allowed": 0, "cores": 32}, 32),  # not on Linux
        ({"allowed": 0, "cores": None, "limit": 7.0}, 7),
    ):
        set_machine(**machine)
        assert device.default_threads() == expected


def test_a_number_of_threads_that_was_chosen_is_kept(set_machine, monkeypatch):
    set_machine(limit=4.0, threads=10)
    assert device.default_threads() == 10
    set_machine(limit=4.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert device.default_threads() == 64


def test_processes_share_threads_but_those_that_omp_num_threads_gives_to_each(set_machine, monkeypatch):
    set_machine(limit=4.0)
    assert [device.default_threads(n) for n in (1, 2, 3, 8)] == [4, 2, 1, 1]
    set_machine(limit=4.0, threads=10)
    assert device.default_threads(2) == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "10")
    assert device.default_threads(2) == 10


@pytest.mark.parametrize(
    ("machine", "limit", "expected"), [(1000, float("inf"), 1000), (1000, 400, 400), (300, 400, 300)]
)
def test_the_memory_of_a_cpu_is_the_machines_or_what_a_limit_leaves(monkeypatch, machine, limit, expected):
    class Memory:
        available = machine

    monkeypatch.setattr(device.psutil, "virtual_memory", lambda: Memory)
    monkeypatch.setattr(cgroup, "memory_left", lambda: limit)
    assert device.available_memory(torch.device("cpu"), 0.9) == expected


def test_uploads_wait_only_for_the_copy_from_the_buffer_that_they_write_to(monkeypatch):
    """A copy here is done when its event is waited for: what arrives then must be what was sent."""

    class Event:
        def record(self):
            self.copy = copies.pop()

        def synchronize(self):
            waited.append(self)
            target, source = self.copy
            copy_(target, source)

    def late(target, source, non_blocking):
        copies.append((target, source))

    copies, waited, copy_ = [], [], torch.Tensor.copy_
    monkeypatch.setattr(device, "_staging", device._Staging())
    monkeypatch.setattr(torch.Tensor, "copy_", late)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory, **kwargs: empty(*args, **kwargs))
    staging, real_next = device._staging, device._staging.next
    monkeypatch.setattr(staging, "next", lambda num_bytes, is_pinned: real_next(num_bytes, True))
    arrays = [[np.full(n, n, np.int64), None, np.full((2, 3), n, np.float32)] for n in (3, 70, 5, 40, 1, 9, 90, 2)]
    buffer = [torch.zeros(1024, dtype=torch.uint8) for _ in arrays]
    sent = [device.upload(item, torch.device("cpu"), there) for item, there in zip(arrays, buffer, strict=True)]
    assert len(waited) == 4 and len(set(waited)) == 4
    for _ in range(4):
        next(staging._turns[True]).copied.synchronize()
    for item, tensors in zip(arrays, sent, strict=True):
        assert tensors[1] is None
        assert tensors[0].tolist() == item[0].tolist() and tensors[2].tolist() == item[2].tolist()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="PyTorch says this of x86 alone")
def test_instruction_sets_are_those_that_pytorch_finds():
    assert device.cpu_has("avx2") == torch.cpu._is_avx2_supported()
    assert device.cpu_has("avx512f") == torch.cpu._is_avx512_supported()
    assert not device.cpu_has("avx") or not device.cpu_has("asimddp")
