from .clip_dataset import ClipDataset, ClipStream
from .clip_forward import MaskPrediction, predict_clips
from .config import Sam2TrainingConfig
from .modeling import Sam2ForTraining
from .prompts import PromptPlan
from .trainer import Sam2Trainer

__all__ = [
    "ClipDataset",
    "ClipStream",
    "MaskPrediction",
    "PromptPlan",
    "Sam2ForTraining",
    "Sam2Trainer",
    "Sam2TrainingConfig",
    "predict_clips",
]
