"""What pages say is there, and docs/reference.md is what the source says today."""

import re
import runpy

import pytest

from helpers import ROOT
from nanovllm.config import Config
from nanovllm.utils.comments import field_comments

SCRIPT = runpy.run_path(str(ROOT / "docs" / "reference.py"))


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for file, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
        target = page.parent / file if file else page
        assert target.exists(), file
        if anchor:
            text = target.read_text(encoding="utf-8")
            headings = [re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()) for line in re.findall("(?m)^#.*", text)]
            assert anchor in [heading.replace(" ", "-") for heading in headings] + re.findall('name="(.*?)"', text)


def test_names_that_contributors_are_told_exist():
    """Those of tables, classes and files."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`([A-Z]\w+|\w+\.(?:py|h))`", text)) - {"ValueError", "TypeError"}
    files = [
        file for part in ("nanovllm", "tests") for kind in ("py", "h") for file in (ROOT / part).rglob(f"*.{kind}")
    ]
    found = {file.name for file in [*files, *ROOT.glob("*.py")]}
    for file in files:
        found |= set(re.findall(r"(?m)^(?:class )?([A-Z]\w+)\b", file.read_text(encoding="utf-8")))
    assert len(names) > 8 and names <= found, names - found


def test_the_reference_is_that_of_this_source():
    message = "run `python docs/reference.py`"
    assert SCRIPT["FILE"].read_text(encoding="utf-8") == SCRIPT["reference"](), message


def test_every_field_says_what_it_means():
    for source in SCRIPT["PARTS"].values():
        for name, _, _, meaning in SCRIPT["fields"](source):
            assert len(meaning) > 5, f"{source.__name__}: {name}"


def test_comments_above_and_beside_a_field_are_its_own():
    class Source:
        """Of two fields.

        first: a line of a docstring
        """

        # Not of a field.

        # A comment of
        # two lines.
        first: int = 1
        second: dict[str, int]  # what stands: beside it
        third: str = "CUDA"
        fourth: int = 0  # CUDA keeps its capitals

        def method(self) -> None:
            # Nobody's.
            other: int = 2  # nor this
            print(other)

    expected = ["a comment of two lines", "what stands: beside it", "", "CUDA keeps its capitals"]
    assert field_comments(Source) == dict(zip(["first", "second", "third", "fourth"], expected, strict=True))
    assert "block_size" not in field_comments(Config) and "eos" in field_comments(Config)
