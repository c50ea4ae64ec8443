"""What the page draws over a frame."""

import io

import numpy as np
from PIL import Image, ImageColor

from ..session.segments import FrameSegments


COLOURS = (
    "#4c9aff",
    "#ff8b3d",
    "#3ddc97",
    "#ff5f9e",
    "#ffd23f",
    "#b388ff",
    "#2ee6d6",
    "#ff6b5e",
    "#a3e048",
    "#e8b4a0",
)
_FILL = 110  # of 255


def colour(obj: int) -> str:
    return COLOURS[(obj - 1) % len(COLOURS)]


def overlay_png(segments: FrameSegments) -> bytes:
    """A PNG of the frame's size: every mask in its object's colour, half transparent, with an opaque outline."""
    height, width = segments.size
    canvas = np.zeros((height, width), dtype=np.uint8)
    for obj in segments.objects:
        mask = segments.binary(obj)
        place = 2 * ((obj - 1) % len(COLOURS))
        canvas[mask] = place + 1
        canvas[mask & ~_eroded(mask, max(1, height // 360))] = place + 2
    shades = [(0, 0, 0), *(ImageColor.getrgb(shade) for shade in COLOURS for _ in range(2))]
    image = Image.fromarray(canvas, "P")  # a palette: a quarter of the bytes to compress
    image.putpalette([part for shade in shades for part in shade])
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1, transparency=bytes([0, *[_FILL, 255] * len(COLOURS)]))
    return file.getvalue()


def _eroded(mask: np.ndarray, times: int) -> np.ndarray:
    """A mask without its border of some pixels; beyond the frame is no mask."""
    for _ in range(times):
        inner = np.zeros_like(mask)
        inner[1:-1, 1:-1] = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
        mask = inner
    return mask
