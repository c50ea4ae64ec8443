"""Masks drawn over the frames of a video, as mp4 or GIF."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from scipy import ndimage

from hf_iclr.saving import atomic_file

from ..session.segments import FrameSegments
from ..session.videos import open_video
from .segment_files import PALETTE


def draw_overlay(frame: np.ndarray, segments: FrameSegments, alpha: float = 0.5) -> np.ndarray:
    """
    A frame with its masks in the colours of DAVIS, outlines in full.

    Args:
        frame (`np.ndarray` of shape `(height, width, 3)`):
            RGB in uint8; it stays as it is.
        segments (`FrameSegments`):
            Of this frame; a higher object number is drawn over a lower one.
        alpha (`float`, *optional*, defaults to `0.5`):
            How much of a mask's colour covers what is below, in 0..1.

    Returns:
        `np.ndarray` of the frame's shape, in uint8.
    """
    drawn = frame.copy()
    for obj in sorted(segments.objects):
        mask, color = segments.binary(obj), PALETTE[(obj - 1) % 255 + 1]
        drawn[mask] = ((1 - alpha) * drawn[mask] + alpha * color).round().astype(np.uint8)
        drawn[mask & ~ndimage.binary_erosion(mask)] = color
    return drawn


def write_overlay(
    frames: Any, segments: Iterable[FrameSegments], path: str | Path, rate: float | None = None, alpha: float = 0.5
) -> None:
    """
    Writes a video with its masks drawn over it, frame by frame: memory does not grow with its length.

    Args:
        frames (`Any`):
            The video, in any form that `open_video` takes.
        segments (`Iterable[FrameSegments]`):
            Frames to write, in order; an iterator, such as `pipe.stream(...)`, is read lazily. With an iterator of
            frames too, give each its own, for instance from `itertools.tee`.
        path (`str` or `Path`):
            Ends with .mp4 or .gif.
        rate (`float`, *optional*, defaults to that of the video, or 24 if it has none):
            Frames per second.
        alpha (`float`, *optional*, defaults to `0.5`):
            See [`draw_overlay`].

    Raises:
        ValueError: if the path ends otherwise, `rate` or `alpha` is out of range, or there are no frames.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".mp4", ".gif"):
        raise ValueError(f"Expected a path that ends with .mp4 or .gif, got {str(path)!r}.")
    video = open_video(frames)
    rate = rate if rate is not None else video.rate or 24
    if not rate > 0 or not 0 <= alpha <= 1:
        raise ValueError(f"Expected rate above 0 and alpha in 0..1, got {rate} and {alpha}.")
    gif = suffix == ".gif"
    with atomic_file(path) as part, av.open(str(part), "w", format=suffix[1:]) as container:
        stream: Any = None
        for shown in segments:
            image = draw_overlay(video[shown.frame], shown, alpha)
            if stream is None:
                stream = container.add_stream("gif" if gif else "libx264", rate=Fraction(rate).limit_denominator(1000))
                stream.height, stream.width = (side if gif else side + side % 2 for side in image.shape[:2])
                stream.pix_fmt = "pal8" if gif else "yuv420p"
            container.mux(stream.encode(_gif_frame(image) if gif else _h264_frame(image)))
        if stream is None:
            raise ValueError("Expected masks of at least one frame, got none.")
        container.mux(stream.encode())


def _h264_frame(image: np.ndarray) -> av.VideoFrame:
    # Colour has half the resolution, so sides must be even: the last row and column are repeated if need be.
    even = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge")
    return av.VideoFrame.from_ndarray(even, format="rgb24")


def _gif_frame(image: np.ndarray) -> av.VideoFrame:
    paletted = Image.fromarray(image).quantize(256)
    colors = np.zeros((256, 4), np.uint8)
    colors[:, 0] = 255  # opaque
    used = np.reshape(paletted.getpalette() or [], (-1, 3))
    colors[: len(used), 1:] = used
    numbers_and_colors: Any = (np.asarray(paletted), colors)  # what PyAV wants, though not in its annotation
    return av.VideoFrame.from_ndarray(numbers_and_colors, format="pal8")
