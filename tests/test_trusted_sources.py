"""What the package promises of its own sources, its metadata and its citation: read, not believed."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import hf_iclr


ROOT = Path(__file__).parents[1]
AREAS = ("hf_iclr", "trainers", "generation", "editors", "vision", "tour")
SOURCES = sorted(path for area in AREAS for path in (ROOT / area).rglob("*.py"))
PICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
RUNNING = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "torch.load", "torch.save", "torch.hub.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "np.save",
    "pd.read_pickle", "os.system", "os.popen",
}  # fmt: skip
TRUSTING = {("trust_remote_code", True), ("allow_pickle", True), ("weights_only", False), ("shell", True)}


def violations(source: str) -> list[str]:
    """What in a source could run or trust what somebody else wrote."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [f"imports {name}" for name in names if name.split(".")[0] in PICKLING]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS or name in RUNNING:
                found.append(f"calls {name}")
        for word in getattr(node, "keywords", []):
            if isinstance(word.value, ast.Constant) and (word.arg, word.value.value) in TRUSTING:
                found.append(f"passes {word.arg}={word.value.value}")
        if isinstance(node, ast.Dict):
            pairs = [(ast.unparse(k).strip("'\""), v) for k, v in zip(node.keys, node.values, strict=True) if k]
            known = [(name, value.value) for name, value in pairs if isinstance(value, ast.Constant)]
            found += [f"passes {name}={value}" for name, value in known if (name, value) in TRUSTING]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_unpickles_runs_text_or_trusts_remote_code(path):
    assert violations(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "bad",
    [
        "import pickle", "from joblib import load", "import torch\ntorch.load('x')", "eval('1')", "exec(text)",
        "import yaml\nyaml.load(text)", "f(trust_remote_code=True)", "f(**{'trust_remote_code': True})",
        "np.load('x', allow_pickle=True)", "torch.load('x', weights_only=False)", "subprocess.run('ls', shell=True)",
        "import os\nos.system('ls')", "pd.read_pickle('x')",
    ],
)  # fmt: skip
def test_each_of_them_would_be_found(bad):
    assert violations(bad)


def test_harmless_code_is_left_alone():
    good = (
        "model.eval()\nre.compile('x')\nnp.load('x')\nf(trust_remote_code=None)\nyaml.safe_load(text)\nf(shell=False)"
    )
    assert violations(good) == []


def test_the_sources_are_all_of_them():
    assert len(SOURCES) > 150 and ROOT / "hf_iclr" / "untrusted.py" in SOURCES


def test_metadata_is_what_an_index_takes():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert str(Version(hf_iclr.__version__)) == project["version"]
    assert all(re.fullmatch(r"https://\S+", url) and len(name) <= 32 for name, url in project["urls"].items())
    classifiers = project["classifiers"]
    assert not [name for name in classifiers if name.startswith("License")]  # the expression says it
    wanted = SpecifierSet(project["requires-python"])
    named = {name.rsplit(" ", 1)[1] for name in classifiers if re.search(r":: 3\.\d+$", name)}
    assert {"3.11", "3.12", "3.13"} <= named and all(f"{version}.1" in wanted for version in named)
    assert len(project["description"]) <= 512 and project["keywords"]
    for requirement in project["dependencies"]:
        Requirement(requirement)
    index = (ROOT / "docs" / "paper_index.md").read_text(encoding="utf-8")
    assert len(project["urls"]) >= 6 and all(
        f"({url})" in index for url in project["urls"].values() if "papers" in url
    )


def test_the_citation_names_the_six_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == hf_iclr.__version__ and citation["license"] == "Apache-2.0"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    index = (ROOT / "docs" / "paper_index.md").read_text(encoding="utf-8")
    assert len(citation["references"]) == 6
    for paper in citation["references"]:
        assert f"({paper['url']})" in readme and f"## {paper['title']}\n" in index
        assert paper["authors"] and all(set(author) == {"given-names", "family-names"} for author in paper["authors"])
    ours = [paper for paper in citation["references"] if paper["title"].startswith(("Safety", "Learning"))]
    sources = "".join((ROOT / "trainers" / name / "trainer.py").read_text() for name in ("deep_safety", "squeeze"))
    for author in [author for paper in ours for author in paper["authors"]]:
        assert f"{author['given-names']} {author['family-names']}" in sources  # as the model cards cite them


def test_the_security_policy_names_what_is_there():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for name in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (ROOT / name).exists()
    assert "hf_iclr.untrusted.inside" in text and "127.0.0.1" in text and "trust_remote_code" in text
