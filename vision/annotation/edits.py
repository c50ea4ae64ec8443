"""What people do to a session on the page, by name, so that it can be written down and done again."""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from hf_iclr.untrusted import whole_number

from ..session.session import VideoSession


_MOST_OBJECTS = 2**31 - 1  # what a row can hold


def _prompt(session: VideoSession, frame: int, obj: int, points: Any = None, labels: Any = None, box: Any = None):
    if box is None and session.logits(frame, obj) is not None:
        session.correct(frame, obj, points, labels)
    elif box is None and 1 not in (labels or [1]):
        raise ValueError(f"Object {obj} has no mask on frame {frame} yet. Click on the object first, then beside it.")
    else:
        session.add(frame, obj, points, labels, box)


def _brush(session: VideoSession, frame: int, obj: int, stroke: Any, radius: float, erase: bool = False) -> None:
    """Draws a line into the mask of an object, or rubs it out; the mask is then the prompt of its frame."""
    try:
        points = np.asarray(stroke, dtype=float)
        good = points.ndim == 2 and points.shape[1] == 2 and np.isfinite(points).all() and 0 < radius <= 10_000
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(
            f"Expected a stroke as [[x, y], ...] and a radius above 0, got {stroke!r:.80} and {radius!r:.40}."
        )
    height, width = session.size
    drawn = Image.new("1", (width, height))
    pen, line = ImageDraw.Draw(drawn), [tuple(point) for point in points.tolist()]
    pen.line(line, fill=1, width=max(1, round(2 * radius)))
    for x, y in line:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
    known = session.segments(frame, objects=[obj])
    mask = known.binary(obj) if obj in known.objects else np.zeros((height, width), dtype=bool)
    if erase and obj not in session.objects:
        raise ValueError(f"There is no object {obj} to rub out of.")
    session.add(frame, obj, mask=mask & ~np.asarray(drawn) if erase else mask | np.asarray(drawn))


EDITS: dict[str, Callable[..., Any]] = {
    "prompt": _prompt,
    "brush": _brush,
    "remove": lambda session, obj: session.remove_object(obj),
    "clear": lambda session, frame, obj: session.clear(frame, obj),
    "undo": lambda session: session.undo(),
    "redo": lambda session: session.redo(),
    "name": lambda session, obj, category: None,  # the session knows numbers only
}


def apply_edit(session: VideoSession, kind: str, fields: Mapping[str, Any]) -> None:
    """
    Does an edit to a session.

    Args:
        session (`VideoSession`):
            The session.
        kind (`str`):
            One of `EDITS`.
        fields (`Mapping[str, Any]`):
            As they came from the page or from the project.

    Raises:
        ValueError, TypeError: for fields that it can't be done with; the session is then as it was.
    """
    expected = signature(EDITS[kind])
    try:
        expected.bind(session, **fields)
    except TypeError:
        known = ", ".join([*expected.parameters][1:]) or "none"
        raise ValueError(f"Expected for {kind} the fields {known}, got {', '.join(fields) or 'none'}.") from None
    last = (session.num_frames or 1) - 1
    for name, most in (("frame", last), ("obj", _MOST_OBJECTS)):
        if name in fields:
            what = f"a frame in 0..{last}" if name == "frame" else "an object from 0 on"
            try:
                whole_number(fields[name], name, most=most)
            except ValueError:
                raise ValueError(f"Expected {what}, got {fields[name]!r:.40}.") from None
    if kind == "name":
        category = fields.get("category")
        if category is not None and (
            not isinstance(category, str) or len(category) > 80 or not category.isprintable()
        ):
            raise ValueError(f"Expected a category of 80 letters at most, got {category!r:.80}.")
        if fields.get("obj") not in session.objects:
            raise ValueError(f"There is no object {fields.get('obj')!r} to name.")
    EDITS[kind](session, **fields)
