"""Each example runs on the demo model, and what it prints is what its docstring says."""

import ast
import re
import runpy
import sys
from itertools import pairwise

import pytest

from helpers import DEMO_MODEL, ROOT
from nanovllm.models import MODELS

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs one as from a shell, but in this process, which has PyTorch loaded; returns the lines that it prints."""

    def run(name: str, *arguments: str) -> list[str]:
        file = ROOT / "examples" / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(file), *arguments])
        runpy.run_path(str(file), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_there_are_ten_that_fit_a_screen_and_each_is_tested():
    tests = "".join(name for name in globals() if name.startswith("test_"))
    assert len(EXAMPLES) == 10
    for file in EXAMPLES:
        source = file.read_text()
        assert len(source.splitlines()) <= 40, file.name
        assert source.startswith('"""') and f"python examples/{file.name} [MODEL]" in source, file.name
        assert file.stem in tests, file.name


def test_batch_file(run):
    lines = run("batch_file")
    assert re.fullmatch(r"first run: 10 answered, 1 failed, [1-9]\d* tokens computed", lines[0])
    assert lines[1] == "second run: 10 answered, 1 failed, 0 tokens computed"
    assert lines[2:12] == [f"sum-{a}: {a} + 425 = {a + 425}." for a in range(510, 520)]
    assert lines[12].startswith("hot: error: temperature must be")


def test_streaming_chat_and_the_model_as_an_argument(run):
    first, second, figures = run("streaming_chat", str(DEMO_MODEL))
    assert first.endswith("89, 97.") and second.endswith("12, 11, 10.")
    early, late, whole = map(int, re.findall(r"\d+", figures))
    assert max(early, late) < whole
    with pytest.raises(ValueError, match="no-such-model"):
        run("streaming_chat", "./no-such-model")


def test_json_extraction(run):
    pytest.importorskip("llguidance")
    lines = run("json_extraction")
    records = [ast.literal_eval(line.strip()) for line in lines if line.startswith("  ")]
    assert len(records) >= 2
    for record in records:
        assert list(record) == ["name", "age", "city"] and record["city"] in ("Oslo", "Rome"), record


def test_multiple_choice(run):
    right, times = run("multiple_choice")
    assert int(re.match(r"(\d+) of 100 right", right)[1]) >= 98
    assert re.fullmatch(r"\d+\.\d times as long with prompt_logprobs", times)


def test_best_of_n(run):
    *answers, best = run("best_of_n")
    scores = [float(line.split()[0]) for line in answers]
    assert len(answers) == 8 and scores == sorted(scores, reverse=True) and scores[-1] < scores[0]
    assert best == "best of 8: Reversed: 77, 13, 61, 8, 15, 93, 7, 42."


def test_beam_search(run):
    *hypotheses, greedy = run("beam_search")
    scores = [float(line.split()[0]) for line in hypotheses]
    assert len(scores) == 4 and scores == sorted(scores, reverse=True)
    assert greedy.endswith("(greedy)") and float(greedy.split()[0]) < scores[0]


def test_prefix_cache(run):
    *lines, total = run("prefix_cache")
    counts = [tuple(map(int, re.findall(r"\d+", line))) for line in lines if line.startswith("    prompt: ")]
    assert len(counts) == 4 and counts[0][1] == 0
    for (before, _), (num_tokens, num_cached) in pairwise(counts):
        assert before - 16 < num_cached < num_tokens and num_cached % 16 == 0  # the earlier turns' full blocks
    share = sum(cached for _, cached in counts) / sum(num_tokens for num_tokens, _ in counts)
    assert total.endswith(f"{share:.0%} of them from the cache")


def test_ray_data_pipeline_answers_rows(run, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "local")  # not the cluster that another test has on this machine
    try:
        first, *answers = run("ray_data")
    finally:
        ray.shutdown()
    assert "max_model_len" in first
    assert answers == [f"{a}: {a} + 425 = {a + 425}." for a in range(510, 520)]


def test_ray_data_without_ray_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=r"nanovllm\[ray\]"):
        run("ray_data")


def test_logits_processor(run):
    without, _, processed, _ = run("logits_processor")
    assert re.fullmatch(r"with the processor: 58 of 58 triples are different", processed)
    assert int(re.match(r"without: (\d+) of 58", without)[1]) < 58


def test_own_architecture(run, monkeypatch):
    monkeypatch.setitem(MODELS, "CappedForCausalLM", None)  # so that what the example enters is gone afterwards
    known, capped = run("own_architecture")
    name, answer, logprob = re.fullmatch(r"(\w+): (.*) \((.*)\)", capped).groups()
    assert name == "CappedForCausalLM" and answer == "517 + 425 = 942."
    assert known.startswith(f"Qwen3ForCausalLM: {answer} (") and float(logprob) < float(known.split("(")[1][:-1])
