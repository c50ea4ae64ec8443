"""What is behind the objects of a video: the median of what was seen there, once frames lie over each other."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy.ndimage import distance_transform_edt, zoom

from ..session.frames import VideoFrames
from ..session.segments import box_around
from .registration import Alignment, View, align, warp


SAMPLES = 64  # of a pixel at most; memory for them does not grow with the video
_DIFFERENT = 10.0  # of 255: three in four pixels of frames that show the same differ by less
_OVERLAP = 0.6  # of a frame


def soften(mask: np.ndarray, dilation: int, feather: int) -> np.ndarray:
    """
    A boolean mask of shape `(height, width)` as weights: 1 on it and `dilation` pixels around it, falling to 0 over
    the next `feather` pixels.
    """
    weights = np.zeros(mask.shape, np.float32)
    place = around(mask, dilation + feather + 1)
    if place is not None:
        distance = distance_transform_edt(~mask[place])
        weights[place] = np.clip(1 - (distance - dilation) / (feather + 1), 0, 1)
    return weights


def around(mask: np.ndarray, margin: int) -> tuple[slice, slice] | None:
    """The rows and columns of a mask with a margin, within the frame; `None` if the mask is empty."""
    x0, y0, x1, y1 = map(int, box_around(mask))
    return (slice(max(y0 - margin, 0), y1 + margin), slice(max(x0 - margin, 0), x1 + margin)) if x1 else None


@dataclass
class Span:
    """
    Frames that share a background.

    Args:
        frames (`range`): Which.
        alignments (`list[Alignment]`, *optional*, defaults to none that moved): How each lies over the first.
    """

    frames: range
    alignments: list[Alignment] = field(default_factory=list)

    def __post_init__(self):
        self.alignments = self.alignments or [Alignment() for _ in self.frames]

    def canvas(self, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
        """Where the canvas that holds all frames begins, by row and column of the first, and its height and width."""
        height, width = size
        corners = np.array([[0, 0, 1], [0, width, 1], [height, 0, 1], [height, width, 1]])
        reached = np.concatenate([corners @ alignment.matrix.T for alignment in self.alignments])
        start, stop = np.floor(reached.min(0)).astype(int), np.ceil(reached.max(0)).astype(int)
        return start, tuple((stop - start).tolist())


def registered_spans(frames: VideoFrames, weights: Callable[[int], np.ndarray], count: int) -> list[Span]:
    """
    Frames in spans in which the camera sees the same, by what is beside the masks, once motion and exposure are taken
    out: a span ends where a quarter of the pixels of small frames differ by 10 of 255 or more from its first frame, or
    less than six tenths of a frame lie on it. Where no such pixels are left, it goes on.

    Args:
        frames (`VideoFrames`):
            The video.
        weights (`Callable[[int], np.ndarray]`):
            The softened mask of a frame.
        count (`int`):
            How many frames.
    """
    first = View.of(frames[0], weights(0))
    spans, latest = [Span(range(1))], Alignment()
    for number in range(1, count):
        view = View.of(frames[number], weights(number))
        alignment, difference, overlap = align(first, view, latest)
        if difference >= _DIFFERENT or overlap < _OVERLAP:
            first, alignment = view, Alignment()
            spans.append(Span(range(number, number)))
        span = spans[-1]
        joined = span.alignments if len(span.frames) else []
        spans[-1] = Span(range(span.frames.start, number + 1), [*joined, alignment])
        latest = alignment
    return spans


def seen_background(
    frames: VideoFrames, weights: Callable[[int], np.ndarray], span: Span, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    The median over a span of what was seen at each pixel beside the masks, from 64 samples of it at most.

    Args:
        frames (`VideoFrames`):
            The video.
        weights (`Callable[[int], np.ndarray]`):
            The softened mask of a frame: 1 where it hides the background.
        span (`Span`):
            The frames.
        seed (`int`, *optional*, defaults to 0):
            Of the draw of samples, where there are more than 64.

    Returns:
        `tuple`: the canvas of the span as its first frame shows it, with the background in place of all masks
        `(height, width, 3)`, in uint8; on how many frames each pixel is hidden `(height, width)`; and whether it was
        ever seen `(height, width)`: if not, it is as on the first frame, or where the camera moves filled smoothly.
    """
    start, size = span.canvas(frames[span.frames[0]].shape[:2])
    moving = not all(alignment.still for alignment in span.alignments)

    def on_canvas(number: int, image: np.ndarray, order: int, outside: float | None = None) -> np.ndarray:
        """An image of a frame, as seen from the canvas."""
        if not moving:
            return image
        matrix = span.alignments[number - span.frames.start].inverse()
        matrix[:, 2] += matrix[:, :2] @ start
        return warp(image, matrix, size, order, outside)

    plate = on_canvas(span.frames[0], frames[span.frames[0]], 1).round().astype(np.uint8)
    needed, hidden = np.zeros(size, bool), np.zeros(size, int)
    for number in span.frames:
        shown = on_canvas(number, weights(number), 1, outside=0.0)
        needed |= shown > 0
        hidden += shown >= (0.999 if moving else 1)
    places = np.flatnonzero(needed)
    limit, rng = min(SAMPLES, len(span.frames)), np.random.default_rng(seed)
    samples = np.full((limit, len(places), 3), 255, np.uint8)
    counts = np.zeros(len(places), int)
    for number, alignment in zip(span.frames, span.alignments, strict=True):
        # A million outside: what lies between the last pixel and what is not there was not seen.
        free = np.flatnonzero(on_canvas(number, weights(number), 1, outside=1e6).ravel()[places] < 1)
        slots = counts[free]
        counts[free] += 1
        late = slots >= limit
        slots[late] = rng.integers(0, slots[late] + 1)  # reservoir sampling: each sight is as likely to stay
        free, slots = free[slots < limit], slots[slots < limit]
        picture = on_canvas(number, frames[number], 3).reshape(-1, 3)[places[free]]
        samples[slots, free] = (picture / alignment.gain).round().clip(0, 255)
    samples.sort(axis=0)  # what was never filled is 255 and comes last
    once = np.flatnonzero(counts)
    kept = np.minimum(counts[once], limit)
    middle = (samples[(kept - 1) // 2, once].astype(int) + samples[kept // 2, once]) / 2
    plate.reshape(-1, 3)[places[once]] = middle.round()
    seen = np.ones(size, bool)
    seen.ravel()[places] = counts > 0
    if moving:  # what nobody needs beside the first frame would shine into what is filled
        beside = on_canvas(span.frames[0], np.ones(frames[span.frames[0]].shape[:2]), 0, outside=0.0) == 0
        plate = fill_smoothly(plate, ~seen | beside & ~needed)
    return plate, hidden, seen


def fill_smoothly(image: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """
    Fills a hole from what is known around it: the mean of 2 x 2 pixels, or of 4 x 4 where they are unknown too, and so
    on, with linear steps in between (push and pull).

    Args:
        image (`np.ndarray` of shape `(height, width, 3)`):
            In uint8; it stays as it is.
        unknown (`np.ndarray` of shape `(height, width)`):
            Where to fill; without anything known, with gray.
    """
    if unknown.all():
        return np.full_like(image, 128)
    filled = _pull(image.astype(np.float32), (~unknown).astype(np.float32))
    return np.where(unknown[..., None], filled.round().clip(0, 255), image).astype(np.uint8)


def _pull(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Values `(height, width, 3)` where `known` is 1, elsewhere those of a grid half as fine."""
    if known.all():
        return values
    height, width = known.shape
    even = ((0, height % 2), (0, width % 2))
    shares = np.pad(known, even).reshape((height + 1) // 2, 2, (width + 1) // 2, 2)
    sums = np.pad(values * known[..., None], (*even, (0, 0))).reshape(*shares.shape, 3).sum((1, 3))
    counts = shares.sum((1, 3))
    coarse = _pull(sums / np.maximum(counts, 1)[..., None], (counts > 0).astype(np.float32))
    finer = zoom(coarse, (2, 2, 1), order=1, mode="nearest", grid_mode=True)[:height, :width]
    return np.where(known[..., None] > 0, values, finer)
