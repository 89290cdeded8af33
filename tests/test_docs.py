"""What pages say is there, the README's code runs, and docs/reference.md is what the source says today."""

import json
import re
import runpy

import pytest

from helpers import DEMO_MODEL, ROOT
from nanovllm.config import Config
from nanovllm.models import MODELS
from nanovllm.utils.comments import field_comments

SCRIPT = runpy.run_path(str(ROOT / "docs" / "reference.py"))
README, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
CODE = re.compile(r"(?ms)^```\w*\n.*?^```$")
ANCHOR = re.compile(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)")


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for file, anchor in ANCHOR.findall(page.read_text(encoding="utf-8")):
        target = page.parent / file if file else page
        assert target.exists(), file
        if anchor:
            text = CODE.sub("", target.read_text(encoding="utf-8"))
            headings = [re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()) for line in re.findall("(?m)^#.*", text)]
            assert anchor in [heading.replace(" ", "-") for heading in headings], f"{file}#{anchor}"


def test_every_page_is_linked_from_the_readme():
    pages = {f"docs/{page.name}" for page in ROOT.glob("docs/*.md")}
    assert pages - {"docs/tour.zh.md"} <= {file for file, _ in ANCHOR.findall(README)}
    assert pages - {"docs/tour.md"} <= {file for file, _ in ANCHOR.findall(CHINESE)}


def test_both_readmes_say_the_same():
    """Code word for word, links, and in whatever order headings, rows, items, names and numbers."""
    assert CODE.findall(README) == CODE.findall(CHINESE)
    texts = [" ".join(re.split(r"(?<![\n|])\n(?![\n#|-])", CODE.sub("", text))) for text in (README, CHINESE)]
    for find in (r"(?m)^#+ ", r"(?m)^\|", r"(?m)^- ", r"`[^`]+`"):
        first, second = (sorted(re.findall(find, text)) for text in texts)
        assert first == second, find
    first, second = (set(re.findall(r"\d[\d.,]*\d|\d", text)) for text in texts)
    assert first == second
    first, second = ({file.replace(".zh", "") for file, _ in ANCHOR.findall(text)} for text in texts)
    assert first == second and len(first) > 12


def test_numbers_of_the_readme_are_those_of_the_source():
    row = re.search(r"\| lines of code \| ([\d,]+) Python, ([\d,]+) C\+\+", README)
    for said, kinds in zip(row.groups(), (["py"], ["cpp", "h"]), strict=True):
        files = [file for kind in kinds for file in (ROOT / "nanovllm").rglob(f"*.{kind}")]
        counted = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        assert int(said.replace(",", "")) == pytest.approx(counted, rel=0.1), counted
    assert f"| architectures | {len(MODELS)} |" in README and all(
        f"| `{name}`" in README or f", `{name}`" in README for name in MODELS
    )


def test_the_comparison_in_words_is_the_one_in_the_picture():
    table = json.loads((ROOT / "docs" / "figures" / "comparison.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for engine, values in table.items():
        row = re.search(rf"(?m)^\| {engine}\b.*", page)[0]  # of the first table
        cells = [re.match(r"[\d.]+", cell.strip()) for cell in row.split("|")[2:-1]]
        assert [cell and cell[0] for cell in cells] == [
            str(values[column]) if column in values else None for column in ("bfloat16", "int8", "start-up", "memory")
        ]


@pytest.fixture(scope="module")
def recipes():
    """The blocks of Python of the README's five recipes by their titles, and what the first block makes."""
    part = README.partition("## Five recipes")[2].partition("\n## ")[0]
    blocks = dict(re.findall(r"(?ms)^\*\*([\w ]+)\.\*\*.*?^```python\n(.*?)^```", part))
    assert len(blocks) == 5
    first = re.search(r"(?ms)^```python\n(.*?)^```", part)[1]
    names: dict[str, object] = {}
    assert first.count('"Qwen/Qwen3-0.6B"') == 1
    exec(first.replace("Qwen/Qwen3-0.6B", str(DEMO_MODEL)), names)
    yield blocks, names
    names["llm"].exit()


@pytest.fixture
def cook(recipes, tmp_path, monkeypatch):
    """Runs a recipe after the first block alone, in a directory of its own; returns its names."""
    blocks, names = recipes
    monkeypatch.chdir(tmp_path)

    def cook(title: str) -> dict:
        result = dict(names)
        exec(blocks[title], result)
        return result

    return cook


def test_recipe_chat(cook, capsys):
    names = cook("Chat")
    assert names["output"].text.endswith("89, 97.") and len(names["messages"]) == 3
    assert capsys.readouterr().out.endswith("97.\n517 + 425 = 942.")


def test_recipe_classify(cook):
    names = cook("Classify")
    assert len(names["class_of"]) == 3  # a token for each letter
    assert len(names["found"]) == 3 and set(names["found"]) <= set(names["classes"].values())
    assert all(output.token_ids[0] in names["class_of"] for output in names["outputs"])


def test_recipe_extract_json(cook):
    pytest.importorskip("llguidance")
    record = cook("Extract JSON")["record"]
    assert list(record) == ["name", "age"] and isinstance(record["name"], str)
    assert record["age"] is None or isinstance(record["age"], int)


def test_recipe_score(cook, capsys):
    names = cook("Score")
    scores = [score.logprob for score in names["scores"]]
    best = names["answers"][scores.index(max(scores))]
    assert len(scores) == 3 and capsys.readouterr().out.splitlines()[-1] == f"{best} {max(scores)}"


def test_recipe_a_million_prompts(cook, tmp_path):
    prompts = [f"prompt {i}" for i in range(20)] + ["1 " * 5000]  # the last is too long
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    cook("A million prompts")
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert sorted(record["index"] for record in records) == list(range(21))
    failed = [record for record in records if record["error"]]
    assert [record["index"] for record in failed] == [20] and "max_model_len" in failed[0]["error"]


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
