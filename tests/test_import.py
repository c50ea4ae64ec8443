"""`import hf_iclr` is quick and lazy, and registers our task whichever of the two libraries comes first."""

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


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param("import hf_iclr; from transformers import pipeline", marks=pytest.mark.slow),
        "from transformers import pipeline; import hf_iclr",
        "from hf_iclr import SpeculativeCascadeForCausalLM; from transformers import pipeline",
        pytest.param("from hf_iclr import SpeculativeCascadePipeline", marks=pytest.mark.slow),
    ],
)
def test_registered_in_any_order_of_imports(imports):
    show = """
from transformers import AutoModelForCausalLM
from transformers.pipelines import PIPELINE_REGISTRY
print(*PIPELINE_REGISTRY.get_supported_tasks(), *(c.__name__ for c in AutoModelForCausalLM._model_mapping))
"""
    done = run("-c", f"{imports}\n{show}")
    assert {"speculative-cascade", "SpeculativeCascadeConfig"} <= set(done.stdout.split())
    assert "could not register" not in done.stderr
