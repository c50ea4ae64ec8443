from .automatic_masks import AutomaticMaskConfig, generate_masks
from .config import VideoSessionConfig
from .pipeline import Sam2VideoPipeline
from .prompts import ObjectPrompt, VideoPrompts, decode_rle, encode_rle
from .segments import FrameSegments, VideoSegments
from .session import VideoSession
from .videos import open_video

__all__ = [
    "AutomaticMaskConfig",
    "FrameSegments",
    "ObjectPrompt",
    "Sam2VideoPipeline",
    "VideoPrompts",
    "VideoSegments",
    "VideoSession",
    "VideoSessionConfig",
    "decode_rle",
    "encode_rle",
    "generate_masks",
    "open_video",
]
