"""Idle threads of OpenMP sleep. What that is worth can only be measured: see docs/internals.md."""

import os
import subprocess
import sys

import pytest

from helpers import ROOT
from nanovllm.utils import openmp

CODE = """
import os, time, torch
from nanovllm.utils.openmp import stop_spinning

def count(): return len(os.listdir("/proc/self/task"))

before = count()
for _ in range(2):
    stop_spinning({num_threads})
    time.sleep(0.5)
    print(count() - before)
"""


@pytest.mark.skipif(openmp._libgomp() is None, reason="PyTorch has another OpenMP here")
@pytest.mark.parametrize(("num_threads", "chosen"), [(2, {}), (1, {}), (2, {"OMP_WAIT_POLICY": "active"})])
def test_more_threads_than_cpus_sleep_unless_the_user_has_chosen(num_threads, chosen):
    """Whatever was imported first: PyTorch has long been. Nothing is needed for one thread."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    code = CODE.format(num_threads=num_threads)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment | chosen
    )
    first, second = map(int, done.stdout.split())
    num_cpus = len(os.sched_getaffinity(0))
    assert first == second == (0 if chosen or num_threads == 1 else max(2, num_cpus - num_threads + 2))
    assert first == 0 or first - 1 + num_threads > num_cpus  # threads of teams, the masters left out, and the first
