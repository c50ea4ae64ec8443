from .calibration import calibrate_cascade, sweep_cascade
from .cascade_generation import SpeculativeCascadeGenerationMixin, enable_cascade
from .configuration_speculative_cascade import SpeculativeCascadeConfig
from .deferral_rules import DEFERRAL_RULES, target_distribution
from .drafting import Eagle3ForCausalLM, build_draft_model
from .modeling_speculative_cascade import SpeculativeCascadeForCausalLM
from .pipeline_speculative_cascade import SpeculativeCascadePipeline

__all__ = [
    "DEFERRAL_RULES",
    "Eagle3ForCausalLM",
    "SpeculativeCascadeConfig",
    "SpeculativeCascadeForCausalLM",
    "SpeculativeCascadeGenerationMixin",
    "SpeculativeCascadePipeline",
    "build_draft_model",
    "calibrate_cascade",
    "enable_cascade",
    "sweep_cascade",
    "target_distribution",
]
