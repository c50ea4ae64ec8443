"""What is shown: the masks of all objects on a frame, and of a video."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from contourpy import contour_generator
from pycocotools import mask as coco

from .prompts import decode_rle, encode_rle


OUTPUTS = ("mask", "logits", "rle", "polygon")


@dataclass(frozen=True)
class KeptMask:
    """
    A mask as results keep it, a hundredth of its pixels, with the form in which it is shown.

    Args:
        kept (`dict` or `np.ndarray`):
            COCO RLE; of logits, they themselves.
        output (`str`):
            "mask" (boolean array), "logits", "rle" or "polygon" (list of `(n, 2)` arrays of x, y).
    """

    kept: Any
    output: str

    @classmethod
    def of(cls, mask: Any, size: tuple[int, int]) -> "KeptMask":
        """Any form that is shown, of a frame of `size` (height, width), to be shown in that form."""
        if isinstance(mask, cls):
            return mask
        if isinstance(mask, Mapping):
            return cls(encode_rle(decode_rle(mask)) if isinstance(mask.get("counts"), list) else dict(mask), "rle")
        if isinstance(mask, np.ndarray):
            return cls(encode_rle(mask), "mask") if mask.dtype == bool else cls(mask, "logits")
        filled = np.zeros(size, dtype=bool)
        for polygon in mask:
            filled ^= fill_polygon(polygon, size)
        return cls(encode_rle(filled), "polygon")

    def binary(self) -> np.ndarray:
        """The boolean mask."""
        return self.kept > 0 if self.output == "logits" else decode_rle(self.kept)

    def shown(self) -> Any:
        """The mask in the form that was asked for."""
        if self.output in ("rle", "logits"):
            return self.kept
        return to_polygons(self.binary()) if self.output == "polygon" else self.binary()


class MaskViews(MutableMapping[int, Any]):
    """Masks by object, decoded when they are asked for."""

    def __init__(self, masks: Mapping[int, Any], size: tuple[int, int]):
        known: Mapping[int, Any] = masks.kept if isinstance(masks, MaskViews) else masks
        self.size = size
        self.kept: dict[int, KeptMask] = {obj: KeptMask.of(mask, size) for obj, mask in known.items()}

    def __getitem__(self, obj: int) -> Any:
        return self.kept[obj].shown()

    def __setitem__(self, obj: int, mask: Any) -> None:
        self.kept[obj] = KeptMask.of(mask, self.size)

    def __delitem__(self, obj: int) -> None:
        del self.kept[obj]

    def __contains__(self, obj: object) -> bool:
        return obj in self.kept

    def __iter__(self) -> Iterator[int]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def __repr__(self) -> str:
        return f"MaskViews({self.kept})"


def encode_mask(logits: np.ndarray, output: str) -> KeptMask:
    """
    Mask logits as results keep them, to be shown in the form a user asked for.

    Args:
        logits (`np.ndarray` of shape `(height, width)`): Positive on the object.
        output (`str`): One of `OUTPUTS`.
    """
    return KeptMask(logits if output == "logits" else encode_rle(logits > 0), output)


def decode_mask(mask: Any, size: tuple[int, int]) -> np.ndarray:
    """
    The boolean mask of any form in which masks are shown.

    Args:
        mask (`np.ndarray`, `dict` or `list`): Mask or logits, COCO RLE, polygons.
        size (`tuple[int, int]`): Height and width.
    """
    return KeptMask.of(mask, size).binary()


def to_polygons(mask: np.ndarray) -> list[np.ndarray]:
    """
    The outlines of a boolean mask, each an array `(n, 2)` of x, y, halfway between the pixels in it and those beside
    it; whole numbers are middles of pixels. Outlines of holes come too: what two outlines hold is not in the mask.
    """
    padded = np.pad(mask.astype(float), 1)
    lines: Any = contour_generator(z=padded).lines(0.5)
    return [line[:-1] - 1 for line in lines]


def fill_polygon(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """
    The pixels whose middles (whole numbers) lie within a polygon, by the rule of even and odd crossings.

    Args:
        points (`np.ndarray` of shape `(n, 2)`): As x, y; the last is joined to the first.
        size (`tuple[int, int]`): Height and width.
    """
    ends = np.stack([points, np.roll(points, -1, axis=0)])
    order = ends[..., 1].argsort(axis=0, kind="stable")
    (x0, y0), (x1, y1) = np.take_along_axis(ends, order[..., None], axis=0).transpose(0, 2, 1)
    first, last = (np.ceil(y).clip(0, size[0]).astype(int) for y in (y0, y1))
    edges = np.repeat(np.arange(len(points)), last - first)
    rows = np.arange(len(edges)) - np.repeat((last - first).cumsum() - last, last - first)
    columns = x0[edges] + (rows - y0[edges]) * (x1 - x0)[edges] / (y1 - y0)[edges]
    crossings = np.zeros((size[0], size[1] + 1), np.int64)
    np.add.at(crossings, (rows, np.ceil(columns).clip(0, size[1]).astype(int)), 1)
    return crossings.cumsum(axis=1)[:, :-1] % 2 == 1


@dataclass
class FrameSegments:
    """
    All objects on one frame. Every mapping is by object number.

    Args:
        frame (`int`):
            Number of the frame, from 0.
        size (`tuple[int, int]`):
            Height and width of the frame in pixels.
        masks (`MutableMapping[int, Any]`):
            In the form asked for: boolean array or logits of shape `(height, width)`, COCO RLE, or polygons. All but
            logits are kept as COCO RLE and decoded each time one is asked for.
        scores (`dict[int, float]`):
            The IoU with the true mask that the model expects, in 0..1; 1 for a mask that was given.
        object_scores (`dict[int, float]`):
            Logit that the object is visible.
        prompted (`frozenset[int]`, *optional*):
            Objects with a prompt or a correction on this frame.
        corrected (`frozenset[int]`, *optional*):
            Objects with a correction on this frame.
        labels (`dict[int, str]`, *optional*):
            What objects are, as the detector that found them says.
    """

    frame: int
    size: tuple[int, int]
    masks: MutableMapping[int, Any] = field(repr=False)
    scores: dict[int, float]
    object_scores: dict[int, float]
    prompted: frozenset[int] = frozenset()
    corrected: frozenset[int] = frozenset()
    labels: dict[int, str] = field(default_factory=dict)

    def __post_init__(self):
        self.masks = MaskViews(self.masks, self.size)

    @property
    def objects(self) -> list[int]:
        """Numbers of the objects."""
        return list(self.masks)

    @property
    def visible(self) -> dict[int, bool]:
        """Whether each object is in sight, as the model judges it."""
        return {obj: score > 0 for obj, score in self.object_scores.items()}

    def binary(self, obj: int) -> np.ndarray:
        """The boolean mask of an object, whatever form `masks` has."""
        return self._kept(obj).binary()

    def rle(self, obj: int) -> dict[str, Any]:
        """The COCO RLE of an object, whatever form `masks` has."""
        mask = self._kept(obj)
        return encode_rle(mask.binary()) if mask.output == "logits" else dict(mask.kept)

    @cached_property
    def areas(self) -> dict[int, int]:
        """Pixels of each mask."""
        return {obj: int(coco.area(self.rle(obj))) for obj in self.objects}

    @cached_property
    def boxes(self) -> dict[int, list[float]]:
        """`[x0, y0, x1, y1]` around each mask, the last pixel within; zeros for an empty one."""
        return {obj: _xyxy(coco.toBbox(self.rle(obj))) for obj in self.objects}

    def _kept(self, obj: int) -> KeptMask:
        masks = self.masks  # users may have put a plain dictionary here
        return masks.kept[obj] if isinstance(masks, MaskViews) else KeptMask.of(masks[obj], self.size)

    def to_dicts(self) -> list[dict[str, Any]]:
        """One record an object, as pipelines return them."""
        return [
            {
                "frame": self.frame,
                "object": obj,
                "mask": mask,
                "box": self.boxes[obj],
                "area": self.areas[obj],
                "score": self.scores[obj],
                "object_score": self.object_scores[obj],
                "visible": self.visible[obj],
                "prompted": obj in self.prompted,
                "corrected": obj in self.corrected,
                **({"label": self.labels[obj]} if obj in self.labels else {}),
            }
            for obj, mask in self.masks.items()
        ]

    def to_coco(self, categories: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
        """
        One row for each object with a pixel in sight, as COCO's evaluation reads results: `image_id` (the frame),
        `category_id`, `segmentation` (RLE), `bbox` (x, y, width, height) and `score`; beside these, `object`, its
        number.

        Args:
            categories (`Mapping[str, int]`, *optional*):
                The number of each label. Left out, all are of category 1.
        """
        return [
            {
                "image_id": self.frame,
                "category_id": _category(self.labels.get(obj), categories, 1),
                "segmentation": self.rle(obj),
                "bbox": coco.toBbox(self.rle(obj)).tolist(),
                "score": self.scores[obj],
                "object": obj,
            }
            for obj in self.objects
            if self.areas[obj]
        ]

    def to_supervision(self, categories: Mapping[str, int] | None = None) -> Any:
        """
        `supervision.Detections` of the objects with a pixel in sight: boxes, masks, scores, their numbers as
        `tracker_id` and labels as `class_name`.

        Args:
            categories (`Mapping[str, int]`, *optional*):
                The `class_id` of each label. Left out, all have 0.

        Raises:
            ImportError: without supervision.
        """
        try:
            from supervision import Detections
        except ImportError as error:
            raise ImportError("Expected supervision, got none installed. Type `pip install supervision`.") from error
        objects = [obj for obj in self.objects if self.areas[obj]]
        return Detections(
            xyxy=np.array([self.boxes[obj] for obj in objects], np.float32).reshape(-1, 4),
            mask=np.array([self.binary(obj) for obj in objects], bool).reshape(-1, *self.size),
            confidence=np.array([self.scores[obj] for obj in objects], np.float32),
            class_id=np.array([_category(self.labels.get(obj), categories, 0) for obj in objects], int),
            tracker_id=np.array(objects, int),
            data={"class_name": np.array([self.labels.get(obj, "object") for obj in objects], str)},
        )


def box_around(mask: np.ndarray) -> list[float]:
    """`[x0, y0, x1, y1]` around a boolean mask, zeros if it is empty."""
    xs, ys = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return [float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)] if len(xs) else [0.0] * 4


def _xyxy(box: np.ndarray) -> list[float]:
    x, y, width, height = box.tolist()
    return [x, y, x + width, y + height]


class VideoSegments:
    """
    The [`FrameSegments`] of a video in the order of its frames; a frame given twice is kept as given last.

    Args:
        frames (`Iterable[FrameSegments]`):
            In any order.
        damage (`str`, *optional*):
            What was wrong with the file, if it could not be read to its end.

    Example:

    ```python
    >>> for frame in result:
    ...     frame.frame, frame.masks[1], frame.boxes[1]
    >>> result[12].scores[1]  # by number of the frame
    >>> result.tracks()[1]["visible"]  # [(0, 17), (25, 79)]
    ```
    """

    def __init__(self, frames: Iterable[FrameSegments], damage: str | None = None):
        self._frames: dict[int, FrameSegments] = dict(sorted({frame.frame: frame for frame in frames}.items()))
        self.damage = damage

    def __iter__(self) -> Iterator[FrameSegments]:
        return iter(self._frames.values())

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, frame: int) -> FrameSegments:
        if frame not in self._frames:
            raise KeyError(f"There are no masks of frame {frame!r}; there are of frames {list(self._frames)}.")
        return self._frames[frame]

    def __repr__(self) -> str:
        return f"VideoSegments({len(self)} frames, objects {self.objects})"

    @property
    def frames(self) -> list[int]:
        """Numbers of the frames, sorted."""
        return list(self._frames)

    @property
    def objects(self) -> list[int]:
        """Numbers of all objects, sorted."""
        return sorted({obj for frame in self for obj in frame.objects})

    def tracks(self) -> dict[int, dict[str, Any]]:
        """
        Every object through time: `masks`, `boxes`, `areas`, `scores` and `object_scores` by frame, and `visible`, the
        spans (first frame, last frame) in which it is in sight.
        """
        tracks: dict[int, dict[str, Any]] = {}
        for obj in self.objects:
            frames = [frame for frame in self if obj in frame.masks]
            track: dict[str, Any] = {
                name: {frame.frame: getattr(frame, name)[obj] for frame in frames}
                for name in ("masks", "boxes", "areas", "scores", "object_scores")
            }
            track["visible"] = _spans([frame.frame for frame in frames if frame.visible[obj]])
            tracks[obj] = track
        return tracks

    def to_dicts(self) -> list[dict[str, Any]]:
        """One record an object and frame."""
        return [record for frame in self for record in frame.to_dicts()]

    def to_coco(self, categories: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
        """The rows of [`FrameSegments.to_coco`] of all frames."""
        return [row for frame in self for row in frame.to_coco(categories)]


def _category(label: str | None, categories: Mapping[str, int] | None, otherwise: int) -> int:
    if categories is None:
        return otherwise
    if label is None or label not in categories:
        raise ValueError(f"Expected a number of each label in categories, got none of {label!r}.")
    return categories[label]


def _spans(frames: list[int]) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for frame in frames:
        if spans and frame == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], frame)
        else:
            spans.append((frame, frame))
    return spans
