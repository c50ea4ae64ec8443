"""Prompts of a video: which object is pointed at, on which frame, and how."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from hf_iclr.untrusted import parse_json, read_json


_MOST_PIXELS = 2**28  # of a mask: a few bytes of RLE could ask for all memory there is
KEYS = ("points", "labels", "box", "mask")


@dataclass(frozen=True)
class ObjectPrompt:
    """
    How one object is shown on one frame: clicks, a box, both, or a mask alone. Pixels of the original frame.

    Args:
        points (`list[list[float]]`, *optional*, defaults to `[]`):
            Clicks as `[x, y]`.
        labels (`list[int]`, *optional*, defaults to all 1):
            1 for a click on the object, 0 for a click beside it; one for each point.
        box (`list[float]`, *optional*):
            `[x0, y0, x1, y1]`.
        mask (`np.ndarray` of shape `(height, width)`, *optional*):
            Boolean mask; also taken as a tensor, a `PIL.Image` or a COCO RLE, and as logits or probabilities.

    Raises:
        ValueError: if nothing is given, a mask comes with clicks or a box, or a value has a wrong shape.
    """

    points: Any = None
    labels: Any = None
    box: Any = None
    mask: Any = None

    def __post_init__(self):
        points = _numbers(self.points, "points", "[[x, y], ...]", (-1, 2))
        labels = [1] * len(points) if self.labels is None else _numbers(self.labels, "labels", "[1, 0, ...]", (-1,))
        if len(labels) != len(points):
            raise ValueError(f"Expected one label a point, got {len(points)} points and {len(labels)} labels.")
        if any(label not in (0, 1) for label in labels):
            raise ValueError(f"Expected labels of 1 (on the object) or 0 (beside it), got {labels}.")
        box = None if self.box is None else _numbers(self.box, "box", "[x0, y0, x1, y1]", (4,))
        if box is not None and not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"Expected a box [x0, y0, x1, y1] with x0 < x1 and y0 < y1, got {box}.")
        mask = None if self.mask is None else to_boolean_mask(self.mask)
        if not points and box is None and mask is None:
            raise ValueError('Expected at least one of "points", "box" and "mask" in a prompt, got none of them.')
        if mask is not None and (points or box is not None):
            raise ValueError("Expected a mask alone, got points or a box beside it. Add the mask, then correct it.")
        for name, value in (
            ("points", points),
            ("labels", [int(label) for label in labels]),
            ("box", box),
            ("mask", mask),
        ):
            object.__setattr__(self, name, value)

    def clipped_box(self, size: tuple[int, int]) -> list[float] | None:
        """What of the box lies in a frame of `size` (height, width): detectors reach over edges."""
        if self.box is None:
            return None
        height, width = size
        return [min(max(side, 0.0), float(end)) for side, end in zip(self.box, [width, height] * 2, strict=True)]

    def check(self, size: tuple[int, int]) -> None:
        """Raises `ValueError` if a click, a whole box or a mask lies outside a frame of `size` (height, width)."""
        height, width = size
        for x, y in self.points:
            if not (0 <= x <= width and 0 <= y <= height):
                raise ValueError(
                    f"Expected x in 0..{width} and y in 0..{height} (the frame's pixels), got ({x}, {y})."
                )
        if (box := self.clipped_box(size)) is not None:
            x0, y0, x1, y1 = box
            if not (x0 < x1 and y0 < y1):
                raise ValueError(
                    f"Expected a box with x in 0..{width} and y in 0..{height} (the frame's pixels), got {self.box}."
                )
        if self.mask is not None and self.mask.shape != (height, width):
            raise ValueError(f"Expected a mask of the frame's size {(height, width)}, got {self.mask.shape}.")

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold; the mask as COCO RLE."""
        record: dict[str, Any] = {}
        if self.points:
            record |= {"points": [list(point) for point in self.points], "labels": list(self.labels)}
        if self.box is not None:
            record["box"] = list(self.box)
        if self.mask is not None:
            record["mask"] = encode_rle(self.mask)
        return record


class VideoPrompts(Mapping[int, dict[int, ObjectPrompt]]):
    """
    Prompts by frame and object, checked and copied: `{frame: {object: {"points": [[x, y]], "labels": [1]}}}`.

    Args:
        prompts (`Mapping`, *optional*, defaults to `{}`):
            By frame, then object. A mapping by object alone means frame 0.

    Raises:
        TypeError: if `prompts` is no mapping.
        ValueError: if a frame, an object or a prompt is malformed.

    Example:

    ```python
    >>> prompts = VideoPrompts({0: {1: {"points": [[210, 350]]}, 2: {"box": [10, 10, 80, 90]}}})
    >>> print(prompts.describe())
    frame 0: object 1 by 1 point, object 2 by a box
    >>> VideoPrompts.from_json(prompts.to_json()) == prompts
    True
    ```
    """

    SCHEMA: ClassVar[dict[str, Any]] = {
        "type": "object",
        "description": "frame number -> object number -> prompt",
        "additionalProperties": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "properties": {
                    "points": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
                    "labels": {"type": "array", "items": {"enum": [0, 1]}},
                    "box": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4},
                    "mask": {"type": "object", "required": ["size", "counts"], "description": "COCO RLE"},
                },
                "additionalProperties": False,
            },
        },
    }

    def __init__(self, prompts: Mapping | None = None):
        prompts = {} if prompts is None else prompts
        if not isinstance(prompts, Mapping):
            raise TypeError(
                f'Expected prompts such as {{0: {{1: {{"points": [[x, y]], "labels": [1]}}}}}}, got {prompts!r:.80}.'
            )
        if any(isinstance(prompt, Mapping) and set(prompt) & set(KEYS) for prompt in prompts.values()):
            prompts = {0: prompts}
        self._frames: dict[int, dict[int, ObjectPrompt]] = {}
        numbered = [(_integer(key, "frame"), value) for key, value in prompts.items()]
        for frame, objects in sorted(numbered, key=lambda item: item[0]):
            if frame < 0 or frame in self._frames:
                raise ValueError(f"Expected frame numbers from 0 on, each once, got {frame}.")
            if not isinstance(objects, Mapping):
                raise TypeError(f"Expected prompts by object on frame {frame}, got {objects!r:.80}.")
            self._frames[frame] = {
                _integer(obj, "object"): _to_prompt(prompt, frame, obj) for obj, prompt in objects.items()
            }
            if (least := min(self._frames[frame], default=0)) < 0:
                raise ValueError(f"Expected object numbers from 0 on, got {least} on frame {frame}.")

    def __getitem__(self, frame: int) -> dict[int, ObjectPrompt]:
        return self._frames[frame]

    def __iter__(self) -> Iterator[int]:
        return iter(self._frames)

    def __len__(self) -> int:
        return len(self._frames)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VideoPrompts) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"VideoPrompts({self.describe()})"

    @property
    def objects(self) -> list[int]:
        """The numbers of all objects, sorted."""
        return sorted({obj for objects in self._frames.values() for obj in objects})

    def check(self, size: tuple[int, int], num_frames: int | None) -> None:
        """
        Raises `ValueError` for what does not fit a video.

        Args:
            size (`tuple[int, int]`):
                Height and width of a frame.
            num_frames (`int`, *optional*):
                Length of the video; `None` for a stream.
        """
        for frame, objects in self._frames.items():
            if num_frames is not None and frame >= num_frames:
                raise ValueError(f"Expected a frame in 0..{num_frames - 1}, got a prompt on frame {frame}.")
            for prompt in objects.values():
                prompt.check(size)

    def describe(self) -> str:
        """One line a frame."""
        lines = []
        for frame, objects in self._frames.items():
            parts = []
            for obj, prompt in objects.items():
                ways = [f"{len(prompt.points)} point{'s' * (len(prompt.points) > 1)}"] if prompt.points else []
                ways += ["a box"] * (prompt.box is not None) + ["a mask"] * (prompt.mask is not None)
                parts.append(f"object {obj} by {' and '.join(ways)}")
            lines.append(f"frame {frame}: {', '.join(parts)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """What JSON can hold, in the shape of `VideoPrompts.SCHEMA`."""
        return {
            str(frame): {str(obj): prompt.to_dict() for obj, prompt in objects.items()}
            for frame, objects in self._frames.items()
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The prompts as JSON, also written to `path` if one is given."""
        text = json.dumps(self.to_dict())
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> "VideoPrompts":
        """Reads what `to_json` wrote, given as text or as a path."""
        text = str(source)
        return cls(parse_json(text, "the prompts") if text.lstrip().startswith("{") else read_json(source))


def _to_prompt(prompt: Any, frame: int, obj: Any) -> ObjectPrompt:
    if isinstance(prompt, ObjectPrompt):
        return prompt
    if not isinstance(prompt, Mapping) or set(prompt) - set(KEYS):
        raise ValueError(
            f"Expected a prompt with some of {', '.join(KEYS)} for object {obj} on frame {frame}, got {prompt!r:.80}."
        )
    try:
        return ObjectPrompt(**prompt)
    except ValueError as error:
        raise ValueError(f"Object {obj} on frame {frame}: {error}") from None


def _integer(value: Any, name: str) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):  # the last of infinity
        raise ValueError(f"Expected a whole number for the {name}, got {value!r}.") from None
    if isinstance(value, float) and value != number:
        raise ValueError(f"Expected a whole number for the {name}, got {value!r}.")
    return number


def _numbers(value: Any, name: str, expected: str, shape: tuple[int, ...]) -> list:
    if value is None:
        return []
    try:
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(f"Expected {name} as {expected}, got {value!r:.80}.") from None
    if array.size == 0:
        array = array.reshape([0, *shape[1:]])
    if array.ndim != len(shape) or any(want not in (-1, have) for want, have in zip(shape, array.shape, strict=True)):
        raise ValueError(f"Expected {name} as {expected}, got {value!r:.80}.")
    return array.tolist()


def to_boolean_mask(mask: Any) -> np.ndarray:
    """
    Any form of a mask as a boolean array of shape `(height, width)`.

    Args:
        mask (`np.ndarray`, `torch.Tensor`, `PIL.Image.Image` or `dict`):
            Booleans; whole numbers, of which anything but zero is the object; floats, of which 0 and 1 (or 0 and 255)
            alone are the same, others within 0..1 are probabilities, and with some below zero logits; a `dict` is a
            COCO RLE. Leading dimensions of 1 are dropped.

    Raises:
        ValueError: if it has another shape, or numbers that are none of these.
    """
    if isinstance(mask, Mapping):
        return decode_rle(mask)
    if isinstance(mask, Image.Image):
        mask = mask if mask.mode == "F" else mask.convert("L")
    elif hasattr(mask, "detach"):
        mask = mask.detach().cpu()
        mask = (mask.float() if mask.is_floating_point() else mask).numpy()
    try:
        array = np.asarray(mask)
    except ValueError:
        raise ValueError(f"Expected a mask of shape (height, width), got {mask!r:.80}.") from None
    while array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise ValueError(f"Expected a mask of shape (height, width), got {array.shape} of {array.dtype}.")
    if not array.size or array.dtype.kind in "bu":
        return array != 0
    low, high = array.min(), array.max()
    if array.dtype.kind == "i" and low >= 0 or np.isin(array, (0, 1)).all() or np.isin(array, (0, 255)).all():
        return array != 0
    if array.dtype.kind == "f" and np.isfinite([low, high]).all() and (low < 0 or high <= 1):
        return array > (0 if low < 0 else 0.5)
    raise ValueError(
        f"Expected a mask of booleans, labels from 0 on, probabilities in 0..1 or logits below and above 0, got "
        f"{array.dtype} from {low} to {high}. Pass `mask > threshold`."
    )


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """A boolean mask as COCO RLE: `size` (height, width) and `counts` (text)."""
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_rle(rle: Mapping) -> np.ndarray:
    """
    The boolean mask of a COCO RLE, whose `counts` are text, bytes or an uncompressed list.

    Raises:
        ValueError: if it has no `size` and `counts`, or is larger than any frame.
    """
    check_rle(rle)
    compressed = coco.frPyObjects(dict(rle), *rle["size"]) if isinstance(rle["counts"], list) else dict(rle)
    return coco.decode(compressed).astype(bool)


def check_rle(rle: Mapping) -> None:
    """
    Raises `ValueError` for what is no COCO RLE of a frame, before pycocotools reads it.

    Args:
        rle (`Mapping`):
            With `size` and `counts`.
    """
    if "size" not in rle or "counts" not in rle:
        raise ValueError(f'Expected a COCO RLE {{"size": [height, width], "counts": ...}}, got keys {list(rle)}.')
    sides = rle["size"]
    fitting = len(sides) == 2 and all(0 <= side <= _MOST_PIXELS and side % 1 == 0 for side in sides)
    if not fitting or sides[0] * sides[1] > _MOST_PIXELS:
        raise ValueError(
            f"Expected a COCO RLE of height and width, {_MOST_PIXELS:,} pixels at most, got {sides!r:.80}."
        )
    runs = rle["counts"]
    if isinstance(runs, list) and (min(runs, default=0) < 0 or sum(runs) != sides[0] * sides[1]):
        raise ValueError(f"Expected runs of all {sides[0] * sides[1]} pixels of a COCO RLE, got {runs!r:.80}.")
