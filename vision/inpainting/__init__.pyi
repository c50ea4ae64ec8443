from .inpainting import InpaintedVideo, inpaint_video

__all__ = [
    "InpaintedVideo",
    "inpaint_video",
]
