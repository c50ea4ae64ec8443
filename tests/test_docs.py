"""What README, CONTRIBUTING and docs/ point to exists: relative links, files, and names of modules and classes."""

import importlib
import re
from pathlib import Path

import pytest

import hf_iclr


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
ANYWHERE = "|".join(sorted(FOLDERS - {"out", "build", "dist"}))  # which commands write


def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page):
    """`folder/file.py` from the root; beside them stand `Owner/name` of the Hub, which have no such ending."""
    named = re.findall(rf"(?<![\w/.])(?:{ANYWHERE})/[\w/.-]*\w\.(?:pyi?|md|toml|json|html)\b", page.read_text("utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page):
    """`hf_iclr.x.y`, up to what is no attribute of a module or class but of an object."""
    missing = []
    for name in set(re.findall(r"(?<![\w/.\[])hf_iclr(?:\.\w+)+", page.read_text(encoding="utf-8"))):
        found = importlib.import_module("hf_iclr")
        for end, part in enumerate(parts := name.split("."), 1):
            if end == 1:
                continue
            try:
                found = getattr(found, part, None) or importlib.import_module(".".join(parts[:end]))
            except ImportError:
                missing.append(name)
                break
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_stand_in_the_file_that_a_page_says(page):
    """`Name` in `folder/file.py`."""
    said = re.findall(r"`(\w+)` in `([\w/]+\.py)`", page.read_text(encoding="utf-8"))
    assert [pair for pair in said if not re.search(rf"\b{pair[0]}\b", (ROOT / pair[1]).read_text("utf-8"))] == []


def test_what_is_looked_for_is_found():
    """The patterns above see what they are for."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert len(re.findall(r"\]\((?!http)[^)\s]+\)", text)) > 10 and "hf_iclr/upstream.py" in text


def test_each_public_name_stands_in_the_reference():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    named = [name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", pages, re.MULTILINE)]
    assert sorted(named) == sorted(hf_iclr.__all__)


def test_each_page_stands_in_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").glob("**/*.md")}
    assert set(re.findall(r"[\w/]+\.md", navigation)) == pages


PARTS = (
    "cascade", "deep_safety", "safety_audit", "squeeze", "data_shapley", "alphaedit", "concept_editor", "sam2",
    "sam2_data_engine",
)  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_each_part_has_problem_example_picture_figures_and_limits(part):
    """Its first example runs in tests/test_snippets.py."""
    text = (ROOT / "docs" / f"{part}.md").read_text(encoding="utf-8")
    problem, example, rest = text.partition("\n```python\n")
    assert len(problem) > 300 and example, "says what the problem is, and then how little to type"
    pictures = part == "alphaedit" or re.findall(r"!\[([^\]]{20,})\]\((pictures/[\w.]+)\)", rest)
    assert pictures
    assert re.search(r"^\| ---", rest, re.MULTILINE) and re.search(r"`(?:python )?(?:benchmarks|examples)/", text)
    assert re.search(r"^## (Limits|What is tested, and what is not)$", rest, re.MULTILINE)


def test_each_measured_row_of_the_readme_has_its_command():
    """By names that benchmarks/run.py takes."""
    section = (
        (ROOT / "README.md").read_text(encoding="utf-8").partition("## What was measured")[2].partition("\n## ")[0]
    )
    rows = re.findall(r"^\| .* \| `python benchmarks/run.py (\w+)` \|$", section, re.MULTILINE)
    index = (ROOT / "benchmarks" / "index.toml").read_text(encoding="utf-8")
    assert len(rows) == len(re.findall(r"^\|", section, re.MULTILINE)) - 2 >= 12
    assert [name for name in rows if not re.search(rf'^(\[{name}\]|name = "{name}")$', index, re.MULTILINE)] == []
