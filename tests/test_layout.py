"""The house (docs/layout.md): a room for each paper, arrows that go down, and every room in the wheel."""

import ast
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hf_iclr


ROOT = Path(__file__).parents[1]
AREAS = ["trainers", "generation", "editors", "vision"]
LINKED = [*AREAS, "tour"]
# From the roof to the ground. What stands in one line sees nothing of its neighbours, only of the lines below.
FLOORS = {
    "": [["cli"], ["tour"], ["doctor", "runs"], AREAS, [""]],
    "trainers": [["deep_safety", "squeeze", "data_shapley"], ["safety_audit"], [""]],
    "trainers.data_shapley": [[""], ["gradients"]],
    "trainers.safety_audit": [[""], ["asking"]],
    "generation": [["calibration", "drafting", "vllm"], [""]],
    "editors": [["", "concepts"], ["alpha_edit"], ["records"]],
    "vision": [["annotation"], ["training", "inpainting"], ["evaluation"], ["formats"], ["session"]],
    "tour": [[""], ["demo"]],
}


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in ("hf_iclr", *parts[parts[0] == "hf_iclr" :]) if part != "__init__")


SOURCES = {
    module(path): path
    for folder in ("hf_iclr", *LINKED)
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not path.is_symlink()
}
ROOMS = {path.parent: name for name, path in SOURCES.items() if path.name == "__init__.py"}


def imports(name: str) -> set[str]:
    """The modules of ours that a module imports, wherever in it."""
    package = name.split(".") if SOURCES[name].name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(SOURCES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            found |= {f"{source}.{alias.name}" for alias in node.names} | {source}
    return {known for known in found if known in SOURCES} - {name}


IMPORTS = {name: imports(name) for name in SOURCES}


@pytest.mark.parametrize("folder", LINKED)
def test_link_resolves_to_the_folder_at_the_root(folder):
    link = ROOT / "hf_iclr" / folder
    assert link.is_symlink() and link.resolve() == ROOT / folder
    assert (ROOT / folder / "__init__.py").exists()


def test_packages_are_the_rooms():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(setuptools["packages"]) == sorted(ROOMS.values())
    assert setuptools["package-dir"] == {"hf_iclr": "hf_iclr", **{f"hf_iclr.{folder}": folder for folder in LINKED}}
    assert {path.parent for path in SOURCES.values()} == set(ROOMS), "a folder with code needs an __init__.py"


def test_every_module_is_installed(tmp_path):
    code = f"from setuptools import setup; setup(script_args=['-q', 'build_py', '--build-lib', {str(tmp_path)!r}])"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    built = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    here = {
        f"{name.replace('.', '/')}/{path.name}"
        for folder, name in ROOMS.items()
        for path in folder.iterdir()
        if path.suffix in (".py", ".pyi", ".html", ".js", ".md", ".txt", ".typed")
    }
    assert built == here


@pytest.mark.parametrize("folder", sorted(ROOMS), ids=lambda folder: ROOMS[folder])
def test_room(folder):
    """A sentence says what it is for; it is small enough to be seen at once."""
    sentence = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert sentence and sentence.endswith(".") and "\n" not in sentence
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py" and not path.is_symlink()]) <= 12


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_file_is_one_idea(name):
    assert len(SOURCES[name].read_text().splitlines()) <= 400


def floor_of(name: str, inside: str) -> str:
    """The room of `inside` (an area, or "" for the whole) that a module stands in; "" for what lies in none."""
    if name == "hf_iclr.__main__":
        return "cli"
    rest = name.removeprefix("hf_iclr").removeprefix(f".{inside}" if inside else "").split(".")[1:]
    rooms = [room for line in FLOORS[inside] for room in line]
    return rest[0] if rest and rest[0] in rooms else ""


@pytest.mark.parametrize("inside", sorted(FLOORS), ids=lambda inside: inside or "hf_iclr")
def test_arrows_go_down(inside):
    height = {room: level for level, line in enumerate(FLOORS[inside]) for room in line}
    root = f"hf_iclr.{inside}" if inside else "hf_iclr"
    here = [name for name in SOURCES if name == root or name.startswith(f"{root}.")]
    up = []
    for name in here:
        for other in IMPORTS[name] & set(here) - {root}:
            mine, its = floor_of(name, inside), floor_of(other, inside)
            if mine != its and height[mine] >= height[its]:
                up.append(f"{name} -> {other}")
    assert not up


def test_rooms_are_all_on_a_floor():
    for inside, lines in FLOORS.items():
        folder = ROOT / inside.replace(".", "/") if inside else ROOT / "hf_iclr"
        rooms = {path.name for path in folder.iterdir() if (path / "__init__.py").exists()}
        assert rooms == {room for line in lines for room in line} - {""}


# Where somebody who has seen the tree of docs/layout.md once looks for what README names.
GUESSES = {
    "AlphaEditor": "editors/alpha_edit/editor.py",
    "ConceptEditor": "editors/concepts/editor.py",
    "DataShapleyResult": "trainers/data_shapley/result.py",
    "DeepSafetySFTConfig": "trainers/deep_safety/config.py",
    "DeepSafetySFTTrainer": "trainers/deep_safety/trainer.py",
    "InRunDataShapleyCallback": "trainers/data_shapley/callback.py",
    "KeyStatistics": "editors/alpha_edit/statistics.py",
    "NullSpaceCallback": "editors/null_space_callback.py",
    "RefusalJudge": "trainers/safety_audit/judge.py",
    "SafetyDriftCallback": "trainers/safety_audit/drift.py",
    "Sam2Trainer": "vision/training/trainer.py",
    "SpeculativeCascadeForCausalLM": "generation/modeling_speculative_cascade.py",
    "SqueezeDPOTrainer": "trainers/squeeze/trainer.py",
    "SqueezeProbeCallback": "trainers/squeeze/probes.py",
    "SqueezeStoppingCallback": "trainers/squeeze/warning.py",
    "VideoSession": "vision/session/session.py",
    "annotate": "vision/annotation/data_engine.py",
    "audit_safety": "trainers/safety_audit/audit.py",
    "evaluate_vos": "vision/evaluation/vos.py",
    "inpaint_video": "vision/inpainting/inpainting.py",
}


@pytest.mark.parametrize("name", GUESSES)
def test_found_in_one_guess(name):
    assert name in (ROOT / "README.md").read_text()
    assert Path(inspect.getsourcefile(getattr(hf_iclr, name))).resolve() == ROOT / GUESSES[name]


def test_no_circles():
    done, path = set(), []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(IMPORTS[name] - {"hf_iclr"}):
            visit(other)
        path.pop()
        done.add(name)

    for name in SOURCES:
        visit(name)
