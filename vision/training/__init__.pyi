from .config import Sam2TrainingConfig
from .trainer import Sam2Trainer

__all__ = [
    "Sam2Trainer",
    "Sam2TrainingConfig",
]
