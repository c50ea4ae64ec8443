"""Registers our classes with transformers once its registries are imported, so `import hf_iclr` stays quick."""

import logging

import wrapt


logger = logging.getLogger(__name__)


def _register_configs(module) -> None:
    from hf_iclr.generation.configuration_draft import DraftConfig
    from hf_iclr.generation.configuration_speculative_cascade import SpeculativeCascadeConfig

    for config_class in (DraftConfig, SpeculativeCascadeConfig):
        module.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def _register_models(module) -> None:
    from hf_iclr.generation.modeling_draft import DraftForCausalLM
    from hf_iclr.generation.modeling_speculative_cascade import SpeculativeCascadeForCausalLM

    for model_class in (DraftForCausalLM, SpeculativeCascadeForCausalLM):
        module.AutoModelForCausalLM.register(model_class.config_class, model_class, exist_ok=True)


def _register_pipelines(module) -> None:
    from transformers import AutoModelForCausalLM

    from hf_iclr.generation.pipeline_speculative_cascade import SpeculativeCascadePipeline

    module.PIPELINE_REGISTRY.register_pipeline(
        "speculative-cascade", SpeculativeCascadePipeline, AutoModelForCausalLM, type="text"
    )


_HOOKS = {
    "transformers.models.auto.configuration_auto": _register_configs,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.pipelines": _register_pipelines,
}


def _guarded(name, register):
    def run(module):
        try:
            register(module)
        except Exception:  # transformers must stay usable without us
            logger.warning("hf_iclr could not register its classes with %s.", name, exc_info=True)

    return run


def install() -> None:
    """Runs the registrations of modules that are imported, and arms the others."""
    for name, register in _HOOKS.items():
        wrapt.register_post_import_hook(_guarded(name, register), name)
