from .data_shapley import DataShapleyResult, InRunDataShapleyCallback
from .deep_safety import DeepSafetySFTConfig, DeepSafetySFTTrainer, constrained_sft_loss, make_safety_recovery_dataset
from .safety_audit import (
    HarmJudge,
    OpenAIEndpoint,
    RefusalJudge,
    SafetyDriftCallback,
    SafetyReport,
    audit_safety,
)
from .squeeze import (
    SqueezeDPOConfig,
    SqueezeDPOTrainer,
    SqueezeProbeCallback,
    SqueezeStoppingCallback,
    build_probe_set,
    extend_for_sft,
)

__all__ = [
    "DataShapleyResult",
    "DeepSafetySFTConfig",
    "DeepSafetySFTTrainer",
    "HarmJudge",
    "InRunDataShapleyCallback",
    "OpenAIEndpoint",
    "RefusalJudge",
    "SafetyDriftCallback",
    "SafetyReport",
    "SqueezeDPOConfig",
    "SqueezeDPOTrainer",
    "SqueezeProbeCallback",
    "SqueezeStoppingCallback",
    "audit_safety",
    "build_probe_set",
    "constrained_sft_loss",
    "extend_for_sft",
    "make_safety_recovery_dataset",
]
