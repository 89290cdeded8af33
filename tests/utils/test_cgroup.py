"""The limits of control groups, in made-up trees of both versions."""

import math

import pytest

from nanovllm.utils import cgroup


@pytest.fixture
def make_tree(tmp_path, monkeypatch):
    """Makes files of text, and says of which groups the process is a member."""
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(cgroup, "MOUNT", tmp_path / "mount")

    def make(membership: str, files: dict[str, str]) -> None:
        (tmp_path / "membership").write_text(membership + "\n")
        for name, text in files.items():
            file = tmp_path / "mount" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")

    return make


def test_without_control_groups_there_is_no_limit(make_tree):
    assert cgroup.memory_left() == cgroup.cpu_limit() == math.inf
    make_tree("0::/user.slice", {})
    assert cgroup.memory_left() == cgroup.cpu_limit() == math.inf


@pytest.mark.parametrize("path", ["/", "/system.slice/docker-1.scope", "/../other"])
def test_a_container_of_version_2_finds_its_group_at_the_mount(make_tree, path):
    """Whether it sees the host's path of it or not."""
    stat = "anon 5\ninactive_file 30\nactive_file 40"
    files = {"memory.max": "1000", "memory.current": "600", "memory.stat": stat, "cpu.max": "150000 100000"}
    make_tree(f"0::{path}", files)
    assert cgroup.memory_left() == 1000 - (600 - 30)
    assert cgroup.cpu_limit() == 1.5


def test_version_1_counts_what_is_below_a_group_too(make_tree):
    files = {
        "memory/memory.limit_in_bytes": "1000",
        "memory/memory.usage_in_bytes": "600",
        "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 30",
        "cpu/cpu.cfs_quota_us": "400000",
        "cpu/cpu.cfs_period_us": "100000",
    }
    make_tree("3:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n1:name=systemd:/docker/1\n0::/docker/1", files)
    assert cgroup.memory_left() == 1000 - (600 - 30)
    assert cgroup.cpu_limit() == 4


def test_the_tightest_of_the_groups_around_a_process_decides(make_tree):
    files = {
        "a/memory.max": "1000", "a/memory.current": "900",  # 100 left for all that is in it
        "a/b/memory.max": "max", "a/b/memory.current": "700",
        "a/b/c/memory.max": "400", "a/b/c/memory.current": "100",
        "a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000", "a/b/c/cpu.max": "800000 100000",
        "a/d/memory.max": "1", "a/d/memory.current": "1", "a/d/cpu.max": "1 100000",  # another one's
    }  # fmt: skip
    make_tree("0::/a/b/c", files)
    assert cgroup.memory_left() == 100
    assert cgroup.cpu_limit() == 3


def test_what_is_unlimited_says_so_in_each_version(make_tree):
    files = {
        "memory.max": "max", "memory.current": "5", "cpu.max": "max 100000",
        "memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "5",
        "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
    }  # fmt: skip
    make_tree("3:cpu:/\n4:memory:/\n0::/", files)
    assert cgroup.memory_left() > 2**62
    assert cgroup.cpu_limit() == math.inf


def test_a_group_that_is_over_its_limit_has_nothing_left(make_tree):
    make_tree("0::/", {"memory.max": "100", "memory.current": "150"})
    assert cgroup.memory_left() == 0
