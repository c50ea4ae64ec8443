"""Which upstream seams we lean on, in the exact shape we wrote against. A failure names the change: read it first."""

import inspect
import logging
import pkgutil

import pytest
import transformers

from hf_iclr.upstream import SEAMS, check_seams, checkpointing_argument
from tests.architectures import tiny


# Each of our classes -> the private methods of its parents that it overrides.
PRIVATE_OVERRIDES: dict[str, set[str]] = {
    "hf_iclr.generation.cascade_generation:SpeculativeCascadeGenerationMixin": {
        "_assisted_decoding",
        "_get_candidate_generator",
        "_validate_generation_mode",
    },
    "hf_iclr.generation.modeling_speculative_cascade:SpeculativeCascadeForCausalLM": {"_init_weights"},
    "hf_iclr.generation.modeling_draft:DraftForCausalLM": set(),
    "hf_iclr.generation.pipeline_speculative_cascade:SpeculativeCascadePipeline": {"_forward"},
    "hf_iclr.trainers.deep_safety_trainer:DeepSafetySFTTrainer": {
        "_get_train_sampler",
        "_set_signature_columns_if_needed",
    },
    "hf_iclr.trainers.squeeze_trainer:SqueezeDPOTrainer": {"_prepare_dataset"},
    "hf_iclr.editors.edit_evaluate:EditSuccess": {"_compute", "_info"},
    "hf_iclr.editors.edit_evaluate:Perplexity": {"_compute", "_info"},
    "hf_iclr.vision.pipeline_promptable_video_segmentation:Sam2VideoPipeline": {"_forward", "_sanitize_parameters"},
}


@pytest.mark.parametrize("seam", SEAMS)
def test_seam_has_the_shape_we_wrote_against(seam):
    (check,) = check_seams({seam: SEAMS[seam]})
    assert check.found == check.expected


def test_a_changed_and_a_vanished_seam_are_reported():
    changed, vanished = check_seams({"shutil:copyfile": "(src, dst)", "shutil:copy_elsewhere": "(src)"})
    assert not changed.ok and changed.found == "(src, dst, *, follow_symlinks=True)"
    assert not vanished.ok and vanished.found is None


@pytest.mark.parametrize("path", PRIVATE_OVERRIDES)
def test_private_overrides_are_declared(path):
    assert private_overrides(pkgutil.resolve_name(path)) == PRIVATE_OVERRIDES[path]


def test_an_announced_removal_is_an_error():
    with pytest.raises(FutureWarning, match="deprecated"):
        logging.getLogger("transformers.generation").warning("`x` is deprecated")


def private_overrides(cls: type) -> set[str]:
    """Methods with one leading underscore that a class redefines from a parent outside of this project."""
    parents = [parent for parent in cls.__mro__[1:] if not parent.__module__.startswith("hf_iclr.")]
    return {
        name
        for name, value in vars(cls).items()
        if name.startswith("_") and not name.startswith("__") and inspect.isroutine(value)
        if any(name in vars(parent) for parent in parents)
    }


def test_checkpointing_is_switched_by_the_name_of_this_release(tmp_path):
    name = checkpointing_argument()
    arguments = transformers.TrainingArguments(str(tmp_path), **{name: True})
    model = tiny("llama", 0)
    transformers.Trainer(model, arguments, train_dataset=[{"input_ids": [1, 2], "labels": [1, 2]}]).train()
    assert model.model.gradient_checkpointing
