"""`import hf_iclr` is quick and lazy; every public name is there."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import hf_iclr


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=True)


def test_import_loads_next_to_nothing():
    """Without `site`, which may have loaded some of these; benchmarks/footprint.py measures what is left."""
    paths = [str(Path(hf_iclr.__file__).parents[1]), sysconfig.get_path("purelib")]
    code = f"import sys; sys.path[:0] = {paths!r}; import hf_iclr; print(*sys.modules)"
    loaded = set(run("-S", "-c", code).stdout.split())
    assert {"hf_iclr", "lazy_loader"} <= loaded
    assert not {"torch", "transformers", "trl", "diffusers", "numpy", "wrapt"} & loaded
    assert not {"asyncio", "importlib.metadata", "inspect", "logging", "pathlib", "threading", "typing"} & loaded


@pytest.mark.parametrize("name", hf_iclr.__all__)
def test_public_name(name):
    assert getattr(hf_iclr, name) is not None
    assert name in dir(hf_iclr)


def test_unknown_name():
    with pytest.raises(AttributeError, match="SpeculativeBananas"):
        hf_iclr.SpeculativeBananas  # noqa: B018
