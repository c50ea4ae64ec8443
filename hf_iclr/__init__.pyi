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
from .trainers import (
    DeepSafetySFTConfig,
    DeepSafetySFTTrainer,
    constrained_sft_loss,
    make_safety_recovery_dataset,
)

__version__: str

__all__ = [
    "DEFERRAL_RULES",
    "DeepSafetySFTConfig",
    "DeepSafetySFTTrainer",
    "SpeculativeCascadeConfig",
    "SpeculativeCascadeForCausalLM",
    "SpeculativeCascadeGenerationMixin",
    "SpeculativeCascadePipeline",
    "__version__",
    "build_draft_model",
    "calibrate_cascade",
    "constrained_sft_loss",
    "enable_cascade",
    "make_safety_recovery_dataset",
    "sweep_cascade",
    "target_distribution",
]
