"""Every registration whichever of the two libraries comes first, each in a process of its own."""

import subprocess
import sys

import pytest


SHOW = """
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY
print(*PIPELINE_REGISTRY.get_supported_tasks())
configs = [CONFIG_MAPPING[name] for name in ("speculative-cascade", "affine-draft")]
print(*(config.__name__ for config in configs))
print(*(AutoModelForCausalLM._model_mapping[config].__name__ for config in configs))
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_iclr; from transformers import pipeline",
        pytest.param("from transformers import pipeline; import hf_iclr", marks=pytest.mark.slow),
        pytest.param(
            "from hf_iclr import SpeculativeCascadeForCausalLM; from transformers import pipeline",
            marks=pytest.mark.slow,
        ),
        pytest.param("from hf_iclr import SpeculativeCascadePipeline", marks=pytest.mark.slow),
    ],
)
def test_registered_in_any_order_of_imports(imports):
    done = subprocess.run([sys.executable, "-c", imports + SHOW], capture_output=True, text=True, check=True)
    check(done.stdout)
    assert "could not register" not in done.stderr


def test_registered_where_transformers_is_there_already(hub):
    """In a fork of a process that has imported transformers' pipelines and nothing of ours."""
    check(hub.run(f"import sys\nassert 'hf_iclr' not in sys.modules\nimport hf_iclr{SHOW}"))


def check(printed):
    tasks, configs, models = (line.split() for line in printed.splitlines()[-3:])
    assert {"speculative-cascade", "promptable-video-segmentation"} <= set(tasks)
    assert configs == ["SpeculativeCascadeConfig", "DraftConfig"]
    assert models == ["SpeculativeCascadeForCausalLM", "DraftForCausalLM"]
