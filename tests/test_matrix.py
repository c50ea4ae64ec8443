"""The releases that are promised (pyproject.toml, README), installed (the lock) and run (the matrix) are the same."""

import re
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests import matrix


PROJECT = tomllib.loads((matrix.ROOT / "pyproject.toml").read_text())["project"]
CORE = {need.name: need.specifier for need in map(Requirement, PROJECT["dependencies"])}


def bound(package: str, operator: str) -> Version:
    (version,) = [part.version for part in CORE[package] if part.operator == operator]
    return Version(version)


@pytest.mark.parametrize("package", [*matrix.STACK, "torch"])
def test_the_oldest_release_that_is_run_is_the_lower_bound(package):
    assert Version(matrix.releases(package)[0]) == bound(package, ">=")
    assert all(CORE[package].contains(release) for release in matrix.releases(package))


@pytest.mark.parametrize("package", ["transformers", "trl"])
def test_every_minor_release_below_the_cap_is_run(package):
    first, cap = bound(package, ">="), bound(package, "<")
    minors = [(first.major, minor) for minor in range(first.minor, cap.minor)]
    assert [Version(release).release[:2] for release in matrix.releases(package)] == minors


def test_the_readme_names_the_releases_that_are_run():
    section = (matrix.ROOT / "README.md").read_text().partition("## Tested versions")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| (\w+) \| ([\d., ]+) \|", section, re.MULTILINE))
    assert rows == {package: ", ".join(matrix.releases(package)) for package in [*matrix.STACK, "torch"]}


def test_each_release_has_a_cell_of_its_own():
    cells = [*matrix.light_cells(), *matrix.torch_cells()]
    alone = {overlay.pins[0] for cell in cells if len(cell.overlays) == 1 for overlay in cell.overlays}
    for package in [*matrix.STACK, "torch"]:
        locked = (matrix.pinned("lock.txt") | matrix.pinned("torch.txt"))[package]
        assert {f"{package}=={release}" for release in matrix.releases(package) if release != locked} <= alone
        newest = matrix.one(package, matrix.releases(package)[-1])
        over_oldest = [cell.name for cell in cells if set(cell.overlays) == {matrix.oldest(), newest}]
        assert len(over_oldest) == (len(matrix.releases(package)) > 1)
    assert len({cell.name for cell in cells}) == len(cells)


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder that pip takes packages from, not an index; returns a function that puts a release of trl there."""
    monkeypatch.setattr(matrix, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    def put(version: str, needs: str) -> None:
        info = f"trl-{version}.dist-info"
        with zipfile.ZipFile(tmp_path / f"trl-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("trl/__init__.py", f"__version__ = {version!r}\n")
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: trl\nVersion: {version}\nRequires-Dist: {needs}\n"
            )
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")

    return put


def run_with(pin, tmp_path, capsys):
    test = tmp_path / "test_cell.py"
    test.write_text(
        "import importlib.metadata, trl\n"
        "def test_version():\n"
        "    assert trl.__version__ == importlib.metadata.version('trl') == '1.16.98'\n"
    )
    status = matrix.main(["--add", pin, "--tests", str(test)])
    printed = capsys.readouterr().out
    return status, next(line for line in printed.splitlines() if pin in line), printed


def test_a_cell_runs_the_tests_with_its_release_first(shelf, tmp_path, capsys):
    shelf("1.16.98", "packaging>1")
    status, line, _ = run_with("trl==1.16.98", tmp_path, capsys)
    assert status == 0 and "| 1.16.98 |" in line and "1 passed" in line


def test_a_failing_cell_fails_the_run_and_is_shown(shelf, tmp_path, capsys):
    shelf("1.16.99", "packaging>1")
    status, line, printed = run_with("trl==1.16.99", tmp_path, capsys)
    assert status == 1 and "0 passed, 1 FAILED" in line
    assert "== locked, trl==1.16.99" in printed and "assert '1.16.99' == '1.16.98'" in printed


def test_a_cell_whose_packages_do_not_go_together_says_so(shelf, tmp_path, capsys):
    shelf("1.16.98", "packaging<1")
    status, line, _ = run_with("trl==1.16.98", tmp_path, capsys)
    assert status == 0 and "cannot be installed: trl 1.16.98 needs packaging<1, got " in line


def test_a_release_that_pip_does_not_find_is_said(shelf, tmp_path, capsys):
    status, line, _ = run_with("trl==1.16.98", tmp_path, capsys)
    assert status == 0 and "cannot be installed: No matching distribution found for trl==1.16.98" in line
    assert not list(matrix.CACHE.glob("*"))


def test_cells_left_out_are_said(monkeypatch, capsys):
    monkeypatch.setattr(matrix, "light_cells", lambda: iter(()))
    assert matrix.main([]) == 0
    printed = capsys.readouterr().out
    for cell in matrix.torch_cells():
        assert re.search(
            rf"^\| {cell.name} \|.*left out: gigabytes. `make matrix TORCH=1` runs it", printed, re.MULTILINE
        )
