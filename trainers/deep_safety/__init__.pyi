from .baselines import ProximalCallback, project_safe_lora
from .config import DeepSafetyOptions, DeepSafetySFTConfig
from .constrained_loss import constrained_sft_loss
from .mixin import DeepSafetyMixin
from .recovery_rows import make_recovery_preference_dataset, make_safety_recovery_dataset
from .trainer import DeepSafetySFTTrainer
from .utility_anchor import distill_utility_anchor

__all__ = [
    "DeepSafetyMixin",
    "DeepSafetyOptions",
    "DeepSafetySFTConfig",
    "DeepSafetySFTTrainer",
    "ProximalCallback",
    "constrained_sft_loss",
    "distill_utility_anchor",
    "make_recovery_preference_dataset",
    "make_safety_recovery_dataset",
    "project_safe_lora",
]
