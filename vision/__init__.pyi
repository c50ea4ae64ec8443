from .evaluate_interactive import evaluate_interactive
from .evaluate_vos import evaluate_vos
from .pipeline_promptable_video_segmentation import Sam2VideoPipeline
from .video_prompts import VideoPrompts
from .video_segments import FrameSegments, VideoSegments
from .video_session import VideoSession

__all__ = [
    "FrameSegments",
    "Sam2VideoPipeline",
    "VideoPrompts",
    "VideoSegments",
    "VideoSession",
    "evaluate_interactive",
    "evaluate_vos",
]
