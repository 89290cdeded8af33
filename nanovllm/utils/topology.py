"""Which CPUs share a core, a socket or a memory, as Linux tells it; elsewhere nothing is known.

A NUMA node is some memory and the CPUs that are near it. The CPUs of other nodes get less bandwidth from it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SYSTEM = Path("/sys/devices/system")
FREE = "MemFree", "Active(file)", "Inactive(file)"  # pages of files make room
KIB = 1024


def allowed_cpus() -> set[int]:
    """Those that this thread may use; none where that is not known."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def num_cores(cpus: set[int]) -> int:
    """How many cores they are threads of."""
    return len({_place(cpu)[:3] for cpu in cpus})


def share_of_cpus(index: int, size: int) -> set[int]:
    """Of the CPUs that this thread may use, those for one of `size` processes; none if there are too few.

    Neighbours in the order of nodes, sockets and cores: hyperthreads of a core, which have one cache, go to one
    process, and as many processes as nodes have one each.
    """
    allowed = sorted(allowed_cpus(), key=_place)
    return set(allowed[index * len(allowed) // size : (index + 1) * len(allowed) // size])


def cpus_near(num_bytes: int) -> set[int]:
    """Of the CPUs that this thread may use, those of the fewest nodes whose memory has room for `num_bytes`.

    None if it takes all of them.
    """
    allowed, found = allowed_cpus(), set()
    nodes = (SYSTEM / "node").glob("node[0-9]*")
    for free, cpus in sorted(((_free_memory(node), _cpus_of(node) & allowed) for node in nodes), key=lambda it: -it[0]):
        if cpus and num_bytes > 0:
            found |= cpus
            num_bytes -= free
    return found if num_bytes <= 0 and found < allowed else set()


@contextmanager
def on_cpus(cpus: set[int]) -> Iterator[None]:
    """This thread, and those that it starts, run on these CPUs in the block; on any if there are none."""
    before = allowed_cpus()
    if cpus:
        os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        if cpus:
            os.sched_setaffinity(0, before)


def _place(cpu: int) -> tuple[int, int, int, int]:
    """The numbers of a CPU's node, socket, core and itself; of an unknown machine each is a core of one node."""
    files = SYSTEM / f"cpu/cpu{cpu}"
    node = next((int(link.name[4:]) for link in files.glob("node[0-9]*")), 0)
    try:
        socket, core = (int((files / "topology" / name).read_text()) for name in ("physical_package_id", "core_id"))
    except (OSError, ValueError):
        socket, core = 0, cpu
    return node, socket, core, cpu


def _cpus_of(node: Path) -> set[int]:
    bounds = [part.split("-") for part in (node / "cpulist").read_text().strip().split(",") if part]  # 0-3,8-11
    return {cpu for ends in bounds for cpu in range(int(ends[0]), int(ends[-1]) + 1)}


def _free_memory(node: Path) -> int:
    """Bytes."""
    lines = [line.split() for line in (node / "meminfo").read_text().splitlines()]  # Node 0 MemFree: 123 kB
    return sum(int(words[3]) * KIB for words in lines if words[2].rstrip(":") in FREE)
