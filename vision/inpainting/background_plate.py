"""What is behind the objects of a video whose camera stands still: the median of what was seen there."""

from collections.abc import Callable

import numpy as np
from scipy.ndimage import distance_transform_edt, zoom

from ..session.frames import VideoFrames
from ..session.segments import box_around


SAMPLES = 64  # of a pixel at most; memory for them does not grow with the video
_BLOCK = 4  # pixels of a side, averaged before frames are compared
_STILL = 10.0  # of 255: three in four blocks of a still camera's frames differ by less


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


def still_spans(frames: VideoFrames, weights: Callable[[int], np.ndarray], count: int) -> list[range]:
    """
    Frames in spans in which the camera stands still, by what is beside the masks: a span ends where a quarter of the
    blocks of 4 x 4 pixels differ by 10 of 255 or more from its first frame. Where no such pixels are left, it goes on.

    Args:
        frames (`VideoFrames`):
            The video.
        weights (`Callable[[int], np.ndarray]`):
            The softened mask of a frame.
        count (`int`):
            How many frames.
    """
    starts = [0]
    first, first_free = _blocks(frames[0]), _blocks(weights(0)) == 0
    for number in range(1, count):
        picture, free = _blocks(frames[number]), _blocks(weights(number)) == 0
        difference = np.abs(picture - first)[free & first_free].mean(axis=-1)
        if len(difference) and np.quantile(difference, 0.75) >= _STILL:
            starts.append(number)
            first, first_free = picture, free
    return [range(start, end) for start, end in zip(starts, [*starts[1:], count], strict=True)]


def _blocks(image: np.ndarray) -> np.ndarray:
    side = min(_BLOCK, *image.shape[:2])
    rows, columns = image.shape[0] // side, image.shape[1] // side
    return image[: rows * side, : columns * side].reshape(rows, side, columns, side, *image.shape[2:]).mean((1, 3))


def seen_background(
    frames: VideoFrames, weights: Callable[[int], np.ndarray], span: range, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    The median over a span of what was seen at each pixel beside the masks, from 64 samples of it at most.

    Args:
        frames (`VideoFrames`):
            The video.
        weights (`Callable[[int], np.ndarray]`):
            The softened mask of a frame: 1 where it hides the background.
        span (`range`):
            The frames.
        seed (`int`, *optional*, defaults to 0):
            Of the draw of samples, where there are more than 64.

    Returns:
        `tuple`: the first frame with the background in place of all masks of the span `(height, width, 3)`, in uint8;
        on how many frames each pixel is hidden `(height, width)`; and whether it was ever seen `(height, width)`, if
        not it is as on the first frame.
    """
    plate = frames[span[0]].copy()
    needed, hidden = np.zeros(plate.shape[:2], bool), np.zeros(plate.shape[:2], int)
    for number in span:
        needed |= weights(number) > 0
        hidden += weights(number) == 1
    places = np.flatnonzero(needed)
    limit, rng = min(SAMPLES, len(span)), np.random.default_rng(seed)
    samples = np.full((limit, len(places), 3), 255, np.uint8)
    counts = np.zeros(len(places), int)
    for number in span:
        free = np.flatnonzero(weights(number).ravel()[places] < 1)
        slots = counts[free]
        counts[free] += 1
        late = slots >= limit
        slots[late] = rng.integers(0, slots[late] + 1)  # reservoir sampling: each sight is as likely to stay
        free, slots = free[slots < limit], slots[slots < limit]
        samples[slots, free] = frames[number].reshape(-1, 3)[places[free]]
    samples.sort(axis=0)  # what was never filled is 255 and comes last
    once = np.flatnonzero(counts)
    kept = np.minimum(counts[once], limit)
    middle = (samples[(kept - 1) // 2, once].astype(int) + samples[kept // 2, once]) / 2
    plate.reshape(-1, 3)[places[once]] = middle.round()
    seen = np.ones(plate.shape[:2], bool)
    seen.ravel()[places] = counts > 0
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
