from .constrained_loss import constrained_sft_loss
from .deep_safety_config import DeepSafetySFTConfig
from .deep_safety_trainer import DeepSafetySFTTrainer
from .safety_recovery import make_safety_recovery_dataset

__all__ = [
    "DeepSafetySFTConfig",
    "DeepSafetySFTTrainer",
    "constrained_sft_loss",
    "make_safety_recovery_dataset",
]
