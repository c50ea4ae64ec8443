"""How good the masks of a video are: region similarity J and contour accuracy F."""

import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.spatial import cKDTree

from ..session.prompts import decode_rle, encode_rle
from ..session.segments import box_around


def region_similarity(prediction: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """
    J: the intersection over union of each frame, 1 where both masks are empty.

    Args:
        prediction, reference (`np.ndarray` of shape `(frames, height, width)`):
            Boolean masks.

    Returns:
        `np.ndarray` of shape `(frames,)`.
    """
    shared = np.count_nonzero(prediction & reference, axis=(1, 2))
    union = np.count_nonzero(prediction | reference, axis=(1, 2))
    return np.where(union > 0, shared / np.maximum(union, 1), 1.0)


def contour_accuracy(prediction: np.ndarray, reference: np.ndarray, tolerance: float = 0.008) -> np.ndarray:
    """
    F: on each frame, the harmonic mean of the shares of either contour that lie near the other one, equal to the
    official code of DAVIS, which dilates the contours by a disc.

    Args:
        prediction, reference (`np.ndarray` of shape `(frames, height, width)`):
            Boolean masks.
        tolerance (`float`, *optional*, defaults to `0.008`):
            What is near: a share of the frame's diagonal (rounded up to pixels), or pixels if at least 1.

    Returns:
        `np.ndarray` of shape `(frames,)`.
    """
    radius = tolerance if tolerance >= 1 else math.ceil(tolerance * np.linalg.norm(prediction.shape[1:]))
    pairs = zip(prediction, reference, strict=True)
    return np.array([_contour_accuracy(one, other, radius) for one, other in pairs], dtype=float)


def j_and_f(
    predictions: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
    skip_first_and_last: bool = False,
    tolerance: float = 0.008,
    per_frame: bool = False,
) -> dict[str, Any]:
    """
    J, F and J&F of objects, as the official code of DAVIS computes them: means over frames, then over objects.

    Args:
        predictions, references (`Sequence[np.ndarray]`):
            One boolean array `(frames, height, width)` an object: its masks on the annotated frames.
        skip_first_and_last (`bool`, *optional*, defaults to `False`):
            Whether the first and the last of these frames do not count: the rule of DAVIS 2017 and of SA-V.
        tolerance (`float`, *optional*, defaults to `0.008`):
            See [`contour_accuracy`].
        per_frame (`bool`, *optional*, defaults to `False`):
            Whether to return the values of each object and frame too.

    Returns:
        `dict[str, Any]`: in 0..1, `j`, `f`, their mean `j_and_f`, `j_recall` and `f_recall` (share of frames above
        0.5), `j_decay` and `f_decay` (mean of the first quarter of frames less that of the last); with `per_frame`,
        `j_per_frame` and `f_per_frame`, a list of floats an object.

    Raises:
        ValueError: if there is nothing to measure or an object's masks differ in shape.
    """
    _check(predictions, references)
    kept = slice(1, -1) if skip_first_and_last else slice(None)
    if short := [len(reference) for reference in references if not len(reference[kept])]:
        raise ValueError(f"Expected at least one frame that counts for each object, got masks of {short[0]} frames.")
    values: dict[str, list[np.ndarray]] = {"j": [], "f": []}
    for prediction, reference in zip(predictions, references, strict=True):
        values["j"].append(region_similarity(prediction[kept], reference[kept]))
        values["f"].append(contour_accuracy(prediction[kept], reference[kept], tolerance))
    scores: dict[str, Any] = {}
    for name, rows in values.items():
        scores[name] = float(np.mean([row.mean() for row in rows]))
        scores[f"{name}_recall"] = float(np.mean([(row > 0.5).mean() for row in rows]))
        scores[f"{name}_decay"] = float(np.mean([_decay(row) for row in rows]))
        if per_frame:
            scores[f"{name}_per_frame"] = [row.tolist() for row in rows]
    scores["j_and_f"] = (scores["j"] + scores["f"]) / 2
    return scores


class JAndF(evaluate.Metric):
    """
    [`j_and_f`] as an `evaluate` module: `load_metric("j_and_f").compute(predictions=..., references=...)`, each a list
    of boolean arrays `(frames, height, width)`; the options of the function may be passed too.
    """

    def _info(self) -> evaluate.MetricInfo:
        frames = datasets.List({"size": datasets.List(datasets.Value("int32")), "counts": datasets.Value("string")})
        return evaluate.MetricInfo(
            description=j_and_f.__doc__ or "",
            citation="SAM 2: Segment Anything in Images and Videos, https://huggingface.co/papers/2408.00714",
            inputs_description=j_and_f.__doc__ or "",
            features=datasets.Features({"predictions": frames, "references": frames}),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Takes lists of boolean arrays; they are kept as COCO RLE, a thousandth of their size."""
        _check(predictions, references)
        super().add_batch(
            predictions=[[encode_rle(mask) for mask in video] for video in predictions],
            references=[[encode_rle(mask) for mask in video] for video in references],
            **kwargs,
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Takes the masks of one object."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, Any]:
        return j_and_f(_decode(predictions), _decode(references), **options)


def _decode(videos: Any) -> list[np.ndarray]:
    return [np.stack([decode_rle(mask) for mask in video]) for video in videos]


def _check(predictions: Any, references: Any) -> None:
    if not isinstance(predictions, Sequence) or not isinstance(references, Sequence) or not len(predictions):
        raise ValueError(
            "Expected predictions and references as lists with an array of masks an object, got "
            f"{type(predictions).__name__} and {type(references).__name__}."
        )
    if len(predictions) != len(references):
        raise ValueError(f"Expected as many predictions as references, got {len(predictions)} and {len(references)}.")
    for number, pair in enumerate(zip(predictions, references, strict=True)):
        for masks in pair:
            if not isinstance(masks, np.ndarray) or masks.ndim != 3 or masks.dtype != bool or not len(masks):
                raise ValueError(
                    "Expected masks as a boolean array (frames, height, width), got "
                    f"{getattr(masks, 'dtype', type(masks).__name__)} of shape {getattr(masks, 'shape', None)} at "
                    f"{number}."
                )
        if pair[0].shape != pair[1].shape:
            raise ValueError(f"Expected masks of one shape, got {pair[0].shape} and {pair[1].shape} at {number}.")


def _decay(values: np.ndarray) -> float:
    """Of the official code, but for its 8-bit indices, which are wrong from 256 frames on."""
    edges = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(int)
    return float(values[edges[0] : edges[1] + 1].mean() - values[edges[3] : edges[4] + 1].mean())


def _contour_accuracy(prediction: np.ndarray, reference: np.ndarray, radius: float) -> float:
    x0, y0, x1, y1 = (int(side) for side in box_around(prediction | reference))
    # A contour runs one pixel beyond the mask on the left and above; a row more below shows that it ends there.
    crop = slice(max(y0 - 1, 0), y1 + 1), slice(max(x0 - 1, 0), x1 + 1)
    found, true = np.argwhere(_contour(prediction[crop])), np.argwhere(_contour(reference[crop]))
    if not len(found) or not len(true):
        return float(len(found) == len(true))
    precision, recall = _share_near(found, true, radius), _share_near(true, found, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _contour(mask: np.ndarray) -> np.ndarray:
    """The pixels that differ from the one right of, below or diagonally after them, as the official code has it."""
    after = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    contour = (mask != after[:-1, 1:]) | (mask != after[1:, :-1])
    contour[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return contour


def _share_near(points: np.ndarray, others: np.ndarray, radius: float) -> float:
    distances, _ = cKDTree(others).query(points, distance_upper_bound=radius + 0.5)
    return np.count_nonzero(distances <= radius) / len(points)
