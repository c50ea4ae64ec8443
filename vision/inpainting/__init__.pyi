from .inpainted_video import InpaintedVideo
from .inpainting import inpaint_video

__all__ = [
    "InpaintedVideo",
    "inpaint_video",
]
