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
    SqueezeMixin,
    SqueezeProbeCallback,
    SqueezeStoppingCallback,
    audit_pairs,
    build_probe_set,
    extend_for_sft,
    influence_audit,
    write_squeeze_report,
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
    "SqueezeMixin",
    "SqueezeProbeCallback",
    "SqueezeStoppingCallback",
    "audit_pairs",
    "audit_safety",
    "build_probe_set",
    "constrained_sft_loss",
    "extend_for_sft",
    "influence_audit",
    "make_safety_recovery_dataset",
    "write_squeeze_report",
]
