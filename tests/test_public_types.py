"""A type checker understands users' scripts: `public_types.py`, which says what it must see, and the examples."""

import subprocess
import sys

import pytest

from helpers import ROOT


def test_mypy_sees_what_users_may_do_and_objects_to_the_rest(tmp_path):
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--cache-dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
