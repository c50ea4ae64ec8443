"""Every registration in both import orders, each in a process of its own."""

import subprocess
import sys

import pytest


SHOW = """
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY
print(*PIPELINE_REGISTRY.get_supported_tasks())
print(*(CONFIG_MAPPING[name].__name__ for name in ("speculative-cascade", "affine-draft")))
print(*(found.__name__ for found in AutoModelForCausalLM._model_mapping.values()))
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_iclr; from transformers import pipeline",
        "from transformers import pipeline; import hf_iclr",
        "from transformers import AutoModelForCausalLM; import hf_iclr; from transformers import pipeline",
    ],
)
def test_registered_in_any_order_of_imports(imports):
    done = subprocess.run([sys.executable, "-c", imports + SHOW], capture_output=True, text=True, check=True)
    tasks, configs, models = (set(line.split()) for line in done.stdout.splitlines()[-3:])
    assert {"speculative-cascade", "promptable-video-segmentation"} <= tasks
    assert configs == {"SpeculativeCascadeConfig", "DraftConfig"}
    assert {"SpeculativeCascadeForCausalLM", "DraftForCausalLM"} <= models
    assert "could not register" not in done.stderr
