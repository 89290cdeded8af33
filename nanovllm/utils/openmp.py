"""Keeps PyTorch's idle OpenMP threads from spinning where others could run. Knows nothing of what they compute."""

import ctypes
import os
import re
import threading
from pathlib import Path


def stop_spinning(num_threads: int) -> None:
    """Makes idle threads of GNU's OpenMP sleep after microseconds instead of milliseconds, for this whole process.

    A thread that spins takes the core from the one that it waits for as soon as another program runs: a step then
    takes a hundred times as long. libgomp reads its settings before anybody can change them, but spins only shortly
    while it has more threads than the process has CPUs. So some are started here beside the `num_threads` that will
    compute, and sleep. Does nothing where the user has chosen by environment variables, or OpenMP is another's.
    """
    if num_threads == 1 or not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}.isdisjoint(os.environ):
        return
    library = _libgomp()
    if library is not None and not _is_parked.is_set():
        _is_parked.set()
        num_parked = max(2, library.omp_get_num_procs() - num_threads + 2)
        threading.Thread(target=_park, args=(library, num_parked), name="nanovllm OpenMP", daemon=True).start()


_is_parked = threading.Event()


def _park(library: ctypes.CDLL, num_threads: int) -> None:
    """Its team of threads lasts as long as this thread."""
    nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # of NULL: a function that is safe in any thread
    library.GOMP_parallel(nothing, None, ctypes.c_uint(num_threads), ctypes.c_uint(0))
    threading.Event().wait()


def _libgomp() -> ctypes.CDLL | None:
    """The library that PyTorch has loaded, by whatever name."""
    maps = Path("/proc/self/maps")
    found = re.search(r"/\S*libgomp\S*", maps.read_text()) if maps.is_file() else None
    return ctypes.CDLL(found[0]) if found else None
