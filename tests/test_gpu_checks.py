"""The script of GPU checks isolates them, and says so where there is no GPU. What it checks is not run here."""

import json
import re
import subprocess
import sys

import pytest
import torch

from helpers import ROOT
from tests import gpu_checks

DRY = """
import os, sys, time
from unittest.mock import MagicMock
names = "", ".kernels.attention", ".layers.attention", ".utils.context"
names = *("nanovllm" + name for name in names), "bench", "benchmarks", "benchmarks.machine", "benchmarks.workload"
for name in ("torch", "helpers", *names):
    sys.modules[name] = MagicMock()  # what takes long to import, and is not needed here
sys.path.insert(0, ".")
from tests import gpu_checks
def good(): yield "a", "1", "1", True; yield "b", "", "3 GB", None
def bad(): yield "c", "2", "3", False; raise ValueError("broken")
def lacking(): raise gpu_checks.Skip("no such thing"); yield
def dying(): yield "d", "4", "4", True; os._exit(3)
def hanging(): time.sleep(60); yield
gpu_checks.GROUPS = {"one": (60, [good, bad, lacking]), "two": (60, [dying]), "three": (5, [hanging])}
sys.exit(gpu_checks.main(sys.argv[1:]))
"""


def test_without_a_gpu_it_says_so_and_exits_with_2(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_checks.main([]) == 2 and "no GPU" in capsys.readouterr().out


def test_neither_an_error_nor_a_crash_nor_a_hang_ends_the_others(monkeypatch, tmp_path, capsys):
    popen = subprocess.Popen
    monkeypatch.setattr(
        gpu_checks.subprocess, "Popen", lambda command, **kw: popen([sys.executable, "-c", DRY, *command[3:]], **kw)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    groups = {"one": (60, []), "two": (60, []), "three": (5, [])}
    monkeypatch.setattr(gpu_checks, "GROUPS", groups)
    assert gpu_checks.main(["--json", str(tmp_path / "out.json")]) == 1
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["group"], row["check"], row["result"]) for row in rows] == [
        ("one", "a", "pass"), ("one", "b", "-"), ("one", "c", "FAIL"), ("one", "bad", "FAIL"),
        ("one", "lacking", "skip"), ("two", "d", "pass"), ("two", "two", "FAIL"), ("three", "three", "FAIL"),
    ]  # fmt: skip
    assert "exit code 3" in rows[6]["seen"] and "not done after 5 s" in rows[7]["seen"]
    assert "ValueError: broken" in capsys.readouterr().out


def test_every_open_check_of_the_list_is_a_group_of_the_script():
    text = (ROOT / "docs" / "gpu-checks.md").read_text().partition("## Open")[2]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")][1:]
    assert {name for row in rows for name in re.findall(r"`([a-z-]+)`", row[2])} == set(gpu_checks.GROUPS)
