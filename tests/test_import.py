"""`import hf_iclr` is quick and lazy, and registers our task whichever of the two libraries comes first."""

import subprocess
import sys

import pytest

import hf_iclr


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=True)


def test_import_takes_less_than_150_ms():
    def cumulative_seconds() -> float:
        *_, last = run("-X", "importtime", "-c", "import hf_iclr").stderr.splitlines()
        assert last.split("|")[2].strip() == "hf_iclr"
        return int(last.split("|")[1]) / 1e6

    assert min(cumulative_seconds() for _ in range(5)) < 0.15


def test_import_loads_neither_torch_nor_transformers():
    loaded = run("-c", "import sys, hf_iclr; print(*sys.modules)").stdout.split()
    assert not {"torch", "transformers", "trl", "diffusers", "numpy"} & set(loaded)


@pytest.mark.parametrize("name", hf_iclr.__all__)
def test_public_name(name):
    assert getattr(hf_iclr, name) is not None
    assert name in dir(hf_iclr)


def test_unknown_name():
    with pytest.raises(AttributeError, match="SpeculativeBananas"):
        hf_iclr.SpeculativeBananas  # noqa: B018


@pytest.mark.parametrize(
    "imports",
    ["import hf_iclr; from transformers import pipeline", "from transformers import pipeline; import hf_iclr"],
    ids=["hf_iclr first", "transformers first"],
)
def test_task_is_registered(imports):
    show = "from transformers.pipelines import PIPELINE_REGISTRY; print(*PIPELINE_REGISTRY.get_supported_tasks())"
    assert "speculative-cascade" in run("-c", f"{imports}; {show}").stdout.split()
