from .clip_dataset import ClipDataset
from .clip_forward import MaskPrediction, predict_clips
from .config import Sam2TrainingConfig
from .prompts import PromptPlan
from .trainer import Sam2Trainer

__all__ = [
    "ClipDataset",
    "MaskPrediction",
    "PromptPlan",
    "Sam2Trainer",
    "Sam2TrainingConfig",
    "predict_clips",
]
