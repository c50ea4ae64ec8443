"""Registers our classes with transformers' registries once those are imported, so `import hf_iclr` stays quick."""

import importlib
import logging
import sys

import wrapt


logger = logging.getLogger(__name__)


def _register_config(upstream, config_class) -> None:
    upstream.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def _register_model(upstream, model_class) -> None:
    upstream.AutoModelForCausalLM.register(model_class.config_class, model_class, exist_ok=True)


def _register_cascade_pipeline(upstream, pipeline_class) -> None:
    from transformers import AutoModelForCausalLM

    upstream.PIPELINE_REGISTRY.register_pipeline(
        "speculative-cascade", pipeline_class, AutoModelForCausalLM, type="text"
    )


def _register_video_pipeline(upstream, pipeline_class) -> None:
    from transformers import AutoModel

    task = "promptable-video-segmentation"
    upstream.PIPELINE_REGISTRY.register_pipeline(task, pipeline_class, AutoModel, type="video")
    # With it, a saved pipeline would ask for remote code, though this class is all it needs.
    del pipeline_class._registered_impl


# upstream module, our module, its class, how to register it
_TABLE = [
    (
        "transformers.models.auto.configuration_auto",
        "hf_iclr.generation.configuration_draft",
        "DraftConfig",
        _register_config,
    ),
    (
        "transformers.models.auto.configuration_auto",
        "hf_iclr.generation.configuration_speculative_cascade",
        "SpeculativeCascadeConfig",
        _register_config,
    ),
    (
        "transformers.models.auto.modeling_auto",
        "hf_iclr.generation.modeling_draft",
        "DraftForCausalLM",
        _register_model,
    ),
    (
        "transformers.models.auto.modeling_auto",
        "hf_iclr.generation.modeling_speculative_cascade",
        "SpeculativeCascadeForCausalLM",
        _register_model,
    ),
    (
        "transformers.pipelines",
        "hf_iclr.generation.pipeline_speculative_cascade",
        "SpeculativeCascadePipeline",
        _register_cascade_pipeline,
    ),
    (
        "transformers.pipelines",
        "hf_iclr.vision.pipeline_promptable_video_segmentation",
        "Sam2VideoPipeline",
        _register_video_pipeline,
    ),
]
_complete: set[str] = set()  # the modules of the table whose import has ended
_registered: set[str] = set()


def _register_ready(module) -> None:
    """Registers each class whose registry is imported; runs at the end of the import of each module of the table."""
    _complete.add(module.__name__)
    if any(ours in sys.modules and ours not in _complete for _, ours, _, _ in _TABLE):
        return  # one of ours is importing this registry: we come back when that one is complete
    for upstream, ours, name, register in _TABLE:
        if upstream not in _complete or name in _registered:
            continue
        _registered.add(name)
        try:
            register(sys.modules[upstream], getattr(importlib.import_module(ours), name))
        except Exception:  # transformers must stay usable without us
            logger.warning("hf_iclr could not register %s with %s.", name, upstream, exc_info=True)


def install() -> None:
    """Registers with what is imported already, and arms the rest."""
    for module in sorted({module for upstream, ours, _, _ in _TABLE for module in (upstream, ours)}):
        wrapt.register_post_import_hook(_register_ready, module)
