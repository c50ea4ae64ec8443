"""The four areas live at the root, install as `hf_iclr.<area>`, and nothing else gets installed."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
AREAS = ["trainers", "generation", "editors", "vision"]


@pytest.mark.parametrize("area", AREAS)
def test_link_resolves_to_the_area_at_the_root(area):
    link = ROOT / "hf_iclr" / area
    assert link.is_symlink() and link.resolve() == ROOT / area
    assert (ROOT / area / "__init__.py").exists()


def test_packages_are_hf_iclr_and_its_areas():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["packages"] == ["hf_iclr", *(f"hf_iclr.{area}" for area in AREAS)]
    assert setuptools["package-dir"] == {"hf_iclr": "hf_iclr", **{f"hf_iclr.{area}": area for area in AREAS}}


def test_every_module_is_installed(tmp_path):
    code = f"from setuptools import setup; setup(script_args=['-q', 'build_py', '--build-lib', {str(tmp_path)!r}])"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    built = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.py*")}
    here = {f"hf_iclr/{path.name}" for path in (ROOT / "hf_iclr").glob("*.py*")}
    here |= {f"hf_iclr/{area}/{path.name}" for area in AREAS for path in (ROOT / area).glob("*.py*")}
    assert built == here
    assert (tmp_path / "hf_iclr" / "py.typed").exists()


def test_areas_are_flat():
    """The list of packages in pyproject.toml is written by hand, so a sub-package would be left out."""
    for area in AREAS:
        assert not [path for path in (ROOT / area).rglob("*.py") if path.parent != ROOT / area]
