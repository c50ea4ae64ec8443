from .data_engine import annotate
from .inpainting import inpaint_video
from .interactive_evaluation import evaluate_interactive
from .pipeline_promptable_video_segmentation import Sam2VideoPipeline
from .sam2_trainer import Sam2Trainer
from .sam2_training_config import Sam2TrainingConfig
from .video_prompts import VideoPrompts
from .video_segments import FrameSegments, VideoSegments
from .video_session import VideoSession
from .vos_evaluation import evaluate_vos

__all__ = [
    "FrameSegments",
    "Sam2Trainer",
    "Sam2TrainingConfig",
    "Sam2VideoPipeline",
    "VideoPrompts",
    "VideoSegments",
    "VideoSession",
    "annotate",
    "evaluate_interactive",
    "evaluate_vos",
    "inpaint_video",
]
