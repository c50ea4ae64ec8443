"""How the frames of a moving camera lie over each other, and how much lighter one is than the other."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import fft, ndimage


SIDE = 320  # pixels of the longer side at which frames are compared
_STEPS = 12  # of least squares at most
_RANGE = (12, 243)  # of 255: darker and lighter values tell nothing about a gain
_SMALLEST_SHIFT, _SMALLEST_GAIN = 0.1, 0.004  # of a compared pixel, and of 1: less is none


@dataclass
class View:
    """
    A frame made small.

    Args:
        pixels (`np.ndarray` of shape `(height, width, 3)`): In 0..255.
        free (`np.ndarray` of shape `(height, width)`): Whether nothing that is to be painted lies there.
        scale (`int`): Pixels of the frame to a pixel here.
    """

    pixels: np.ndarray
    free: np.ndarray
    scale: int
    gray: np.ndarray = field(init=False)

    def __post_init__(self):
        self.gray = self.pixels.mean(-1)

    @classmethod
    def of(cls, frame: np.ndarray, weights: np.ndarray) -> "View":
        """A frame and the softened mask of what is to be painted on it."""
        scale = max(-(-max(frame.shape[:2]) // SIDE), 1)
        return cls(_shrink(frame, scale), _shrink(weights, scale) == 0, scale)


@dataclass
class Alignment:
    """
    Where a frame lies over another, the reference.

    Args:
        matrix (`np.ndarray` of shape `(2, 3)`): Of a place `(row, column, 1)` of the frame the place on the reference.
        gain (`np.ndarray` of shape `(3,)`): By which red, green and blue of the frame are lighter.
    """

    matrix: np.ndarray = field(default_factory=lambda: np.eye(2, 3))
    gain: np.ndarray = field(default_factory=lambda: np.ones(3))

    @property
    def still(self) -> bool:
        """Whether the camera has not moved."""
        return np.array_equal(self.matrix, np.eye(2, 3))

    def inverse(self) -> np.ndarray:
        """The matrix `(2, 3)` from places of the reference to those of the frame."""
        turned = np.linalg.inv(self.matrix[:, :2])
        return np.column_stack([turned, -turned @ self.matrix[:, 2]])


def align(reference: View, view: View, guess: Alignment) -> tuple[Alignment, float, float]:
    """
    Finds how a frame lies over a reference: from the best of no motion, a guess and the peak of phase correlation, by
    least squares on shift, turn, scale and shear, with what differs most left out; then the gain of each colour.

    Args:
        reference, view (`View`): Both frames.
        guess (`Alignment`): That of the frame before.

    Returns:
        `tuple`: the [`Alignment`]; of the differences that are left, in levels of 255, what three in four are below;
        and the share of the frame that lies on the reference. Without free pixels to tell by, no motion, 0 and 1.
    """
    scaled = guess.matrix.copy()
    scaled[:, 2] /= view.scale
    shift = np.column_stack([np.eye(2), _phase_shift(reference, view)])
    none = np.eye(2, 3)
    starts = [none, scaled, shift]
    left = [_difference(reference, view, start) for start in starts]
    if left[0][0] is None:
        return Alignment(), 0.0, 1.0
    found = _refine(reference, view, starts[int(np.argmin([np.inf if d is None else d for d, _ in left]))])
    (still, gain), (moved, moved_gain) = left[0], _difference(reference, view, found)
    corners = np.array([[0, 0, 1], [0, view.gray.shape[1], 1], [view.gray.shape[0], 0, 1], [*view.gray.shape, 1]])
    reach = np.abs(corners @ (found - none).T).max()
    if moved is None or still is None or reach < _SMALLEST_SHIFT or still <= 1.1 * moved + 0.1:
        found, moved, moved_gain = none, still, gain
    inside = _sample(np.ones_like(reference.gray), found, view.gray.shape, outside=0.0) > 0.5
    matrix = found.copy()
    matrix[:, 2] *= view.scale
    gains = np.where(np.abs(moved_gain - 1) < _SMALLEST_GAIN, 1.0, moved_gain)
    assert moved is not None
    return Alignment(matrix, gains), moved, float(inside.mean())


def warp(
    image: np.ndarray, matrix: np.ndarray, size: Sequence[int], order: int, outside: float | None = None
) -> np.ndarray:
    """
    An image `(height, width[, channels])` seen from elsewhere: the place `(row, column)` of the result, of the given
    size, shows what lies at `matrix @ (row, column, 1)`, by splines of an order; outside of the image a value, or else
    what is nearest in it.
    """
    channels = image[..., None] if image.ndim == 2 else image
    kwargs: dict[str, Any] = {"output_shape": tuple(size), "order": order, "mode": "nearest"}
    if outside is not None:
        kwargs |= {"mode": "constant", "cval": outside}
    seen = [
        ndimage.affine_transform(channel.astype(np.float32), matrix[:, :2], matrix[:, 2], **kwargs)
        for channel in np.moveaxis(channels, -1, 0)
    ]
    return seen[0] if image.ndim == 2 else np.stack(seen, axis=-1)


def _shrink(image: np.ndarray, scale: int) -> np.ndarray:
    rows, columns = image.shape[0] // scale, image.shape[1] // scale
    cut = image[: rows * scale, : columns * scale].astype(np.float32)
    return cut.reshape(rows, scale, columns, scale, *image.shape[2:]).mean((1, 3))


def _phase_shift(reference: View, view: View) -> np.ndarray:
    """Rows and columns by which the view's content lies further on in the reference, whole pixels."""
    window = np.outer(*(np.hanning(side + 2)[1:-1] for side in view.gray.shape))
    spectra = []
    for each in (reference, view):
        mean = each.gray[each.free].mean() if each.free.any() else 0.0
        spectra.append(fft.rfft2(np.where(each.free, each.gray - mean, 0) * window))
    cross = spectra[0] * spectra[1].conj()
    peaks = fft.irfft2(cross / np.maximum(np.abs(cross), 1e-6), s=view.gray.shape)
    peak = np.array(np.unravel_index(peaks.argmax(), peaks.shape))
    sides = np.array(view.gray.shape)
    return np.where(peak > sides // 2, peak - sides, peak)


def _sample(image: np.ndarray, matrix: np.ndarray, size: Sequence[int], outside: float) -> np.ndarray:
    return warp(image, matrix, size, order=1, outside=outside)


def _difference(reference: View, view: View, matrix: np.ndarray) -> tuple[float | None, np.ndarray]:
    """What three in four differences are below once gains are taken out, and the gains; `None` if nothing tells."""
    free = view.free & (_sample(reference.free.astype(np.float32), matrix, view.gray.shape, outside=0.0) > 0.99)
    if free.sum() < 16:
        return None, np.ones(3)
    there, here = warp(reference.pixels, matrix, view.gray.shape, order=1)[free], view.pixels[free]
    useful = ((there > _RANGE[0]) & (there < _RANGE[1]) & (here > _RANGE[0]) & (here < _RANGE[1])).all(-1)
    gain = np.median(here[useful] / there[useful], axis=0) if useful.sum() >= 16 else np.ones(3)
    return float(np.quantile(np.abs(here - gain * there).mean(-1), 0.75)), gain


def _refine(reference: View, view: View, matrix: np.ndarray) -> np.ndarray:
    """Steps of least squares on the six numbers of a matrix and a gain (Lucas and Kanade's)."""
    image, known = (ndimage.gaussian_filter(each.gray, 1.0) for each in (view, reference))
    slopes = np.gradient(known)
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    span = max(image.shape)
    places = np.stack([rows / span, columns / span, np.ones(image.shape)])  # of one size, for a well-posed system
    gain = 1.0
    for _ in range(_STEPS):
        free = view.free & (_sample(reference.free.astype(np.float32), matrix, image.shape, outside=0.0) > 0.99)
        if free.sum() < 64:
            return matrix
        there, down, right = (_sample(each, matrix, image.shape, outside=0.0)[free] for each in (known, *slopes))
        error = image[free] - gain * there
        kept = np.abs(error) <= 3 * np.median(np.abs(error)) + 1e-3
        design = np.stack([*(gain * down * places[:, free]), *(gain * right * places[:, free]), there], axis=1)[kept]
        normal = design.T @ design
        normal[np.diag_indices(7)] *= 1 + 1e-4
        step = np.linalg.lstsq(normal, design.T @ error[kept], rcond=None)[0]
        change = step[:6].reshape(2, 3) / np.array([span, span, 1.0])
        matrix, gain = matrix + change, gain + step[6]
        if np.abs(step[:6]).max() < 0.01:
            break
    return matrix
