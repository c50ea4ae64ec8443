from .inpainting import inpaint_video

__all__ = [
    "inpaint_video",
]
