from .constrained_loss import constrained_sft_loss
from .data_shapley_callback import InRunDataShapleyCallback
from .deep_safety_config import DeepSafetySFTConfig
from .deep_safety_trainer import DeepSafetySFTTrainer
from .extend_for_sft import extend_for_sft
from .refusal_judge import RefusalJudge
from .safety_audit import audit_safety
from .safety_drift import SafetyDriftCallback
from .safety_recovery import make_safety_recovery_dataset
from .safety_report import SafetyReport
from .shapley_result import DataShapleyResult
from .squeeze_config import SqueezeDPOConfig
from .squeeze_probes import SqueezeProbeCallback, build_probe_set
from .squeeze_trainer import SqueezeDPOTrainer
from .squeeze_warning import SqueezeStoppingCallback

__all__ = [
    "DataShapleyResult",
    "DeepSafetySFTConfig",
    "DeepSafetySFTTrainer",
    "InRunDataShapleyCallback",
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
