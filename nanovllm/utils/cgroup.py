"""What the control groups of a process leave it: how a container limits memory and CPU time (cgroups(7), v1 and v2).

Without control groups, as on other systems than Linux, there is no limit.
"""

import math
from collections.abc import Iterator
from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")
MEMORY_FILES = [  # limit, usage, and in memory.stat what of it are cached pages of files that can be dropped
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
]


def memory_left() -> float:
    """Bytes until the first limit is reached; infinite without one."""
    left = math.inf
    for group in _groups("memory"):
        stat = dict(line.split() for line in _read(group / "memory.stat").splitlines())
        for limit, usage, droppable in MEMORY_FILES:
            used = _number(_read(group / usage), 0) - int(stat.get(droppable, 0))
            left = min(left, _number(_read(group / limit), math.inf) - used)
    return max(left, 0)


def cpu_limit() -> float:
    """CPUs' worth of time that the process may take; infinite without a limit."""
    limit = math.inf
    for group in _groups("cpu"):
        quota, period = (_read(group / "cpu.max") or "max 1").split()
        if not quota.isdigit():
            quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        limit = min(limit, _number(quota, math.inf) / _number(period, 1))
    return limit


def _groups(controller: str) -> Iterator[Path]:
    """The directories of this process's groups and of those around them, which limit it too.

    In a container the paths may be the host's and not exist; the container's own group is then the mount itself.
    """
    for line in _read(MEMBERSHIP).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            mount = MOUNT / controller if controllers else MOUNT
            names = [name for name in path.split("/") if name not in ("", "..")]
            yield from (mount.joinpath(*names[:depth]) for depth in range(len(names) + 1))


def _read(file: Path) -> str:
    """Empty if there is no such file."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _number(text: str, default: float) -> float:
    """The default for what is no number: nothing, "max", or the -1 that means no quota."""
    return int(text) if text.isdigit() else default
