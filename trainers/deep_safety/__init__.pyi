from .config import DeepSafetySFTConfig
from .constrained_loss import constrained_sft_loss
from .recovery_rows import make_safety_recovery_dataset
from .trainer import DeepSafetySFTTrainer

__all__ = [
    "DeepSafetySFTConfig",
    "DeepSafetySFTTrainer",
    "constrained_sft_loss",
    "make_safety_recovery_dataset",
]
