"""The demo model does what its card and the example promise, through the engine."""

import json
import runpy
import subprocess
import sys

import pytest

from helpers import DEMO_MODEL, ROOT


def test_the_card_holds_on_held_out_prompts(tmp_path):
    """50 held-out prompts of each family, and the example's prompts greedily and 100 times at temperature 0.6."""
    command = [sys.executable, DEMO_MODEL / "evaluate.py", "--backend", "nanovllm", "--precision", "bf16"]
    command += ["--count", "50", "--json", tmp_path / "rows.json"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    rows = json.loads((tmp_path / "rows.json").read_text())
    families = ("introduce", "primes", "add", "sort", "count", "extreme", "reverse", "parity", "other")
    examples = [name for name in rows if name.endswith(("greedy", "T=0.6"))]
    assert len(examples) == 4
    for name in (*families, *examples):
        right, total = rows[name]
        assert right / total >= 0.95, name


def test_the_example_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["example.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "example.py"), run_name="__main__")
    assert "python example.py Qwen/Qwen3-0.6B" in capsys.readouterr().out


def test_the_example_answers_without_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["example.py"])
    monkeypatch.chdir(ROOT)
    runpy.run_path("example.py", run_name="__main__")
    printed = capsys.readouterr().out
    assert "Prompt: introduce yourself\nCompletion: I am nano-qwen3" in printed and "97." in printed


def test_the_checkpoint_is_small_enough_for_git():
    size = sum(file.stat().st_size for file in DEMO_MODEL.iterdir() if file.is_file())
    assert size < 8_000_000


def test_ci_runs_the_readmes_commands():
    readme = (ROOT / "README.md").read_text()
    command = "pip install -r requirements.txt -r requirements-dev.txt && pytest"
    assert f"```bash\n{command}\n```" in readme
    assert "```bash\npip install -r requirements.txt && python example.py\n```" in readme
    assert command in (ROOT / ".ci" / "run").read_text()
