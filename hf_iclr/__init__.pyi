from .generation import (
    DEFERRAL_RULES,
    SpeculativeCascadeConfig,
    SpeculativeCascadeForCausalLM,
    SpeculativeCascadeGenerationMixin,
    SpeculativeCascadePipeline,
    build_draft_model,
    calibrate_cascade,
    enable_cascade,
    sweep_cascade,
    target_distribution,
)

__version__: str

__all__ = [
    "DEFERRAL_RULES",
    "SpeculativeCascadeConfig",
    "SpeculativeCascadeForCausalLM",
    "SpeculativeCascadeGenerationMixin",
    "SpeculativeCascadePipeline",
    "__version__",
    "build_draft_model",
    "calibrate_cascade",
    "enable_cascade",
    "sweep_cascade",
    "target_distribution",
]
