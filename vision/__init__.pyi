from .annotation import AnnotationProject, annotate
from .evaluation import evaluate_interactive, evaluate_vos
from .inpainting import inpaint_video
from .session import FrameSegments, Sam2VideoPipeline, VideoPrompts, VideoSegments, VideoSession
from .training import Sam2Trainer, Sam2TrainingConfig

__all__ = [
    "AnnotationProject",
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
