"""Clicks, boxes and masks as an annotator who knows the truth would give them."""

from typing import Any

import numpy as np
from scipy import ndimage

from ..session.segments import FrameSegments, box_around
from ..session.session import VideoSession


def next_click(prediction: np.ndarray, truth: np.ndarray) -> tuple[list[float], int] | None:
    """
    The next click of a simulated annotator (https://huggingface.co/papers/2408.00714): the middle of the
    largest error region, which is where the largest disc of missed pixels or of wrongly covered ones fits, as in the
    reference code.

    Args:
        prediction (`np.ndarray` of shape `(height, width)`):
            Boolean mask.
        truth (`np.ndarray` of shape `(height, width)`):
            Boolean mask; empty where the object is out of sight.

    Returns:
        `tuple`: the click `[x, y]`, and 1 if the object was missed there or 0 if it was wrongly covered; `None` if the
        prediction is exact.

    Raises:
        ValueError: if the masks have different shapes.
    """
    if prediction.shape != truth.shape or truth.ndim != 2:
        raise ValueError(f"Expected two masks of shape (height, width), got {prediction.shape} and {truth.shape}.")
    missed, missed_depth = _deepest(truth & ~prediction)
    wrong, wrong_depth = _deepest(prediction & ~truth)
    if missed_depth == wrong_depth == 0:
        return None
    return (missed, 1) if missed_depth > wrong_depth else (wrong, 0)


def middle_click(truth: np.ndarray) -> list[float]:
    """
    The first click on an object: `[x, y]` of the pixel furthest from its outline.

    Raises:
        ValueError: if the mask is empty.
    """
    _check_visible(truth)
    return _deepest(truth)[0]


def first_prompt(truth: np.ndarray, kind: str | int) -> dict[str, Any]:
    """
    The prompt that shows an object on its first frame, for [`VideoSession.add`].

    Args:
        truth (`np.ndarray` of shape `(height, width)`):
            Boolean mask, not empty.
        kind (`str` or `int`):
            "mask", "box" (the tightest), or a number of clicks, of which this is the first.

    Raises:
        ValueError: if the mask is empty or the kind is none of these.
    """
    check_kind(kind)
    _check_visible(truth)
    if kind == "mask":
        return {"mask": truth}
    if kind == "box":
        return {"box": box_around(truth)}
    return {"points": [middle_click(truth)], "labels": [1]}


def prompt_object(session: VideoSession, frame: int, obj: int, truth: np.ndarray, kind: str | int) -> int:
    """
    Shows an object to a session by a mask, a box or a number of clicks, each after the first in the middle of the
    largest error that is left.

    Args:
        session (`VideoSession`):
            Gets the prompts.
        frame, obj (`int`):
            Numbers of the frame and the object.
        truth (`np.ndarray` of shape `(height, width)`):
            The object's boolean mask on this frame, not empty.
        kind (`str` or `int`):
            "mask", "box" or the number of clicks.

    Returns:
        `int`: clicks made; fewer than asked for if the mask became exact.
    """
    segments = session.add(frame, obj, **first_prompt(truth, kind))
    if isinstance(kind, str):
        return 0
    assert segments is not None  # only a stream's frame to come has none
    return 1 + correct_object(session, segments, obj, truth, kind - 1)


def correct_object(session: VideoSession, segments: FrameSegments, obj: int, truth: np.ndarray, clicks: int) -> int:
    """
    Corrects an object on a frame by clicks in the middle of the largest error left.

    Args:
        session (`VideoSession`):
            Gets the clicks.
        segments (`FrameSegments`):
            The frame as the session shows it.
        obj (`int`):
            Number of the object.
        truth (`np.ndarray` of shape `(height, width)`):
            The object's boolean mask on this frame.
        clicks (`int`):
            How many at most.

    Returns:
        `int`: clicks made; fewer if the mask became exact.
    """
    for made in range(clicks):
        click = next_click(segments.binary(obj), truth)
        if click is None:
            return made
        segments = session.correct(segments.frame, obj, points=[click[0]], labels=[click[1]])
    return clicks


def check_kind(kind: str | int) -> None:
    """Raises `ValueError` if `kind` is no way to show an object."""
    if kind not in ("mask", "box") and not (isinstance(kind, int) and kind > 0 and not isinstance(kind, bool)):
        raise ValueError(f'Expected "mask", "box" or a number of clicks from 1 on, got {kind!r}.')


def _check_visible(truth: np.ndarray) -> None:
    if not truth.any():
        raise ValueError("Expected a frame on which the object is visible, got an empty mask.")


def _deepest(region: np.ndarray) -> tuple[list[float], float]:
    """The pixel of a boolean region furthest from what is outside of it, the frame's edge included, and how far."""
    x0, y0, x1, y1 = (int(side) for side in box_around(region))
    if x0 == x1:
        return [0.0, 0.0], 0.0
    depth = ndimage.distance_transform_edt(np.pad(region[y0:y1, x0:x1], 1))
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return [float(x0 + x - 1), float(y0 + y - 1)], float(depth[y, x])
