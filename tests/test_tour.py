"""The tour says what is there: files, names, figures, and the same in both languages."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT

DOCS = ROOT / "docs"
LANGUAGES = ("tour.md", "tour.zh.md")
LINK = re.compile(r"\[([^\]]*)\]\(([^)#]+)(?:#[^)]*)?\)")
COMMANDS = re.compile(r"```bash\n(.*?)```", re.DOTALL)


def text_of(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def sources() -> str:
    files = [ROOT / "bench.py", *(ROOT / "nanovllm").rglob("*.py"), *(ROOT / "nanovllm").rglob("*.cpp")]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@pytest.mark.parametrize("name", LANGUAGES)
def test_links_lead_to_files_that_have_what_they_name(name):
    links = LINK.findall(text_of(name))
    assert len(links) > 30
    for label, target in links:
        file = (DOCS / target).resolve()
        assert file.is_file(), target
        if label.startswith("`") and file.suffix == ".py":
            for part in label.strip("`").split("."):
                assert re.search(rf"\b(def|class) {part}\b", file.read_text(encoding="utf-8")), (label, target)


@pytest.mark.parametrize("name", LANGUAGES)
def test_names_in_the_text_exist(name):
    code = sources()
    for quoted in re.findall(r"`([A-Za-z_]+\.[A-Za-z_]+)`", text_of(name)):
        owner, member = quoted.split(".")
        if owner[0].isupper() or owner.startswith("_"):
            assert re.search(rf"class {owner}\b", code) and re.search(rf"def {member}\b", code), quoted


def test_both_languages_have_the_same_stations_links_commands_and_figures():
    texts = [text_of(name) for name in LANGUAGES]
    for find in (r"^## (\d+)", r"\]\((\.\./[^)]+|figures/[^)]+)\)"):
        first, second = (re.findall(find, text, re.MULTILINE) for text in texts)
        assert first == second and len(first) > 9
    assert COMMANDS.findall(texts[0]) == COMMANDS.findall(texts[1])


def test_figures_are_what_the_script_draws(tmp_path: Path):
    command = [sys.executable, str(DOCS / "figures.py"), "--out", str(tmp_path)]
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=os.environ | environment)
    drawn = {file.name: file.read_bytes() for file in tmp_path.glob("*.svg")}
    assert drawn == {file.name: file.read_bytes() for file in (DOCS / "figures").glob("*.svg")}
    assert len(drawn) == 11 and all(len(svg) < 30_000 for svg in drawn.values())
