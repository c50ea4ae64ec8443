from .pipeline import Sam2VideoPipeline
from .prompts import VideoPrompts
from .segments import FrameSegments, VideoSegments
from .session import VideoSession

__all__ = [
    "FrameSegments",
    "Sam2VideoPipeline",
    "VideoPrompts",
    "VideoSegments",
    "VideoSession",
]
