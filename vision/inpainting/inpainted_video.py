"""A painted video, put together frame by frame."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..formats.overlay import write_video
from ..session.frames import VideoFrames
from .background_plate import around
from .registration import warp


@dataclass
class InpaintedVideo:
    """
    A painted video. Its frames are put together when they are asked for: iterate it, index it or [`save`] it.

    Args:
        key_frames (`list[int]`):
            Each begins a span of frames that share one background; of a video pipeline, one window.
        sources (`dict[str, float]`):
            What painted pixels come from, in shares of them: "seen" (on other frames), "generated" (by the pipeline),
            "interpolated" (from the border of the hole).
    """

    key_frames: list[int]
    sources: dict[str, float]
    _frames: VideoFrames = field(repr=False)
    _weights: Callable[[int], np.ndarray] = field(repr=False)
    _fills: dict[int, "Fill"] = field(repr=False)

    def __len__(self) -> int:
        return len(self._fills)

    def __getitem__(self, frame: int) -> np.ndarray:
        picture, weights = self._frames[frame].copy(), self._weights(frame)
        place, pixels = self._fills[frame].seen_by(weights)
        inside = weights[place] > 0
        share, part = weights[place][inside][:, None], picture[place]
        part[inside] = (part[inside] * (1 - share) + pixels[inside] * share).round()
        return picture

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[frame] for frame in range(len(self)))

    def save(self, path: str | Path, rate: float | None = None) -> None:
        """
        Writes the video frame by frame.

        Args:
            path (`str` or `Path`):
                Ends with .mp4 or .gif.
            rate (`float`, *optional*):
                Frames per second. Left out, frames are shown when those of the video were, and an mp4 has its sound,
                copied as it is.
        """
        write_video(self, path, rate, self._frames)


@dataclass
class Fill:
    """
    What is painted somewhere.

    Args:
        place (`tuple[slice, slice]`): Of the frame.
        pixels (`np.ndarray` of shape `(rows, columns, 3)`): In uint8.
        matrix (`np.ndarray` of shape `(2, 3)`, *optional*): From places of the frame to those of the pixels, where
            they don't simply lie at `place`.
        gain (`np.ndarray` of shape `(3,)`, *optional*): By which the frame is lighter than the pixels.
    """

    place: tuple[slice, slice]
    pixels: np.ndarray
    matrix: np.ndarray | None = None
    gain: np.ndarray = field(default_factory=lambda: np.ones(3))

    def seen_by(self, weights: np.ndarray) -> tuple[tuple[slice, slice], np.ndarray]:
        """The place on the frame that has weights, and the pixels as they look there."""
        place, pixels = self.place, self.pixels
        if self.matrix is not None:
            place = around(weights > 0, 0) or (slice(0, 0), slice(0, 0))
            matrix = self.matrix.copy()
            matrix[:, 2] += matrix[:, :2] @ [side.start for side in place]
            pixels = warp(pixels, matrix, weights[place].shape, order=3)
        return place, (pixels * self.gain).clip(0, 255)
