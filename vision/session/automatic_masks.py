"""Finds what no person points at: by a grid of clicks, as the reference's mask generator does, or by a detector."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.ops import masks_to_boxes, nms

from .mask_postprocessing import small_regions
from .prompts import ObjectPrompt
from .segments import box_around
from .tracking import as_maps, decode, using


_EDGE = 20.0  # pixels: a mask this near to the border of a crop is another crop's, as in the reference


@dataclass
class AutomaticMaskConfig:
    """
    Options of the reference generator under its names and with its defaults, and when to look in a video. With a
    detector, only `frame` and those after it count.

    Args:
        points_per_side (`int`, *optional*, defaults to `32`): Side of the grid of clicks; unused with `point_grids`.
        points_per_batch (`int`, *optional*, defaults to `64`): Clicks decoded at once.
        pred_iou_thresh (`float`, *optional*, defaults to `0.8`): Least IoU that the model expects of a mask.
        stability_score_thresh (`float`, *optional*, defaults to `0.95`): Least IoU of the masks at shifted thresholds.
        stability_score_offset (`float`, *optional*, defaults to `1.0`): That shift, in logits.
        mask_threshold (`float`, *optional*, defaults to `0.0`): Logit above which a pixel is in a mask.
        box_nms_thresh (`float`, *optional*, defaults to `0.7`): Box IoU above which the worse of two masks goes.
        crop_n_layers (`int`, *optional*, defaults to `0`): Layer `i` looks again at `(2**i)**2` crops.
        crop_nms_thresh (`float`, *optional*, defaults to `0.7`): The same between crops, where the smaller crop wins.
        crop_overlap_ratio (`float`, *optional*, defaults to `512 / 1500`): Overlap of the first layer's crops.
        crop_n_points_downscale_factor (`int`, *optional*, defaults to `1`): Layer `i` divides the grid's side by its
            `i`-th power.
        point_grids (`list[np.ndarray]`, *optional*): Own clicks for each layer, `(n, 2)` of x, y in 0..1.
        min_mask_region_area (`float`, *optional*, defaults to `0`): Holes and islands up to this area, in pixels of
            the image, are removed.
        use_m2m (`bool`, *optional*, defaults to `False`): Whether each mask is fed back once to refine it.
        multimask_output (`bool`, *optional*, defaults to `True`): Whether each click gives three masks.
        frame (`int`, *optional*, defaults to `0`): Frame of a video on which objects are found.
        every (`int`, *optional*): Look again each so many frames for new objects.
        expire_after (`int`, *optional*, defaults to `100`): With `every` and forwards, an object out of sight on so
            many frames in a row is no longer tracked; if it returns, it is found as a new one. `None` keeps all.
        max_overlap (`float`, *optional*, defaults to `0.5`): A mask with at least this IoU with a tracked one is no
            new object.

    Raises:
        ValueError: if a number is out of its range.
    """

    points_per_side: int = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.8
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    mask_threshold: float = 0.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    point_grids: list[np.ndarray] | None = None
    min_mask_region_area: float = 0
    use_m2m: bool = False
    multimask_output: bool = True
    frame: int = 0
    every: int | None = None
    expire_after: int | None = 100
    max_overlap: float = 0.5

    def __post_init__(self):
        least = {"points_per_side": 1, "points_per_batch": 1, "crop_n_points_downscale_factor": 1}
        least |= {"crop_n_layers": 0, "min_mask_region_area": 0, "frame": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"Expected {name} of at least {low}, got {getattr(self, name)}.")
        for name in ("every", "expire_after"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"Expected {name} to be at least 1 frame, or None, got {getattr(self, name)}.")
        if self.point_grids is not None and len(self.point_grids) != self.crop_n_layers + 1:
            raise ValueError(
                f"Expected {self.crop_n_layers + 1} point grids, one a layer, got {len(self.point_grids)}."
            )

    def grid(self, layer: int) -> np.ndarray:
        """Clicks of a layer, `(n, 2)` of x, y in 0..1."""
        if self.point_grids is not None:
            return np.asarray(self.point_grids[layer], dtype=float)
        side = max(1, int(self.points_per_side / self.crop_n_points_downscale_factor**layer))
        ticks = (np.arange(side) + 0.5) / side
        return np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)


def generate_masks(
    model,
    processor,
    image: np.ndarray,
    config: AutomaticMaskConfig | None = None,
    features: list[torch.Tensor] | None = None,
) -> list[dict]:
    """
    Everything in an image.

    Args:
        model: A video segmenter of the family.
        processor: Its processor.
        image (`np.ndarray` of shape `(height, width, 3)`): In uint8 RGB.
        config (`AutomaticMaskConfig`, *optional*): Options.
        features (`list[torch.Tensor]`, *optional*): The image's `fpn_hidden_states`, if they are known.

    Returns:
        `list[dict]`, best first: `segmentation` (boolean array), `area`, `bbox` (x, y, width, height),
        `predicted_iou`, `point_coords`, `stability_score`, `crop_box` (x, y, width, height), `object_score` (logit).
    """
    config = config or AutomaticMaskConfig()
    records = []
    for layer, crop in crop_boxes(image.shape[:2], config.crop_n_layers, config.crop_overlap_ratio):
        with using(model):
            levels = None if layer else features
            found = list(_masks_of_crop(model, processor, image, levels, layer, crop, config))
        records += _without_duplicates(found, [record["predicted_iou"] for record in found], config.box_nms_thresh)
    if config.crop_n_layers:
        smallness = [1 / (record["crop_box"][2] * record["crop_box"][3]) for record in records]
        records = _without_duplicates(records, smallness, config.crop_nms_thresh)
    if config.min_mask_region_area:
        unchanged = [float(not _clean(record, config.min_mask_region_area)) for record in records]
        records = _without_duplicates(records, unchanged, max(config.box_nms_thresh, config.crop_nms_thresh))
    return sorted(records, key=lambda record: -record["predicted_iou"])


def crop_boxes(size: tuple[int, int], layers: int, overlap_ratio: float) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Layer and `(x0, y0, x1, y1)` of the whole image and its crops, as the reference cuts them."""
    height, width = size
    yield 0, (0, 0, width, height)
    for layer in range(1, layers + 1):
        side = 2**layer
        overlap = int(overlap_ratio * min(size) * 2 / side)
        crop_width, crop_height = (math.ceil((overlap * (side - 1) + length) / side) for length in (width, height))
        for column, row in product(range(side), range(side)):
            x, y = (crop_width - overlap) * column, (crop_height - overlap) * row
            yield layer, (x, y, min(x + crop_width, width), min(y + crop_height, height))


def _masks_of_crop(model, processor, image, levels, layer, crop, config) -> Iterator[dict[str, Any]]:
    left, top, right, bottom = crop
    pixels = np.ascontiguousarray(image[top:bottom, left:right])
    height, width = pixels.shape[:2]
    if levels is None:
        inputs = processor.image_processor(pixels, return_tensors="pt", device=model.device)["pixel_values"]
        levels = model.get_image_features(inputs.to(model.dtype), return_dict=True).fpn_hidden_states
    *fine, coarse = levels
    embeddings = as_maps([*fine, coarse + model.no_memory_embedding], model.backbone_feature_sizes)
    points = torch.from_numpy(config.grid(layer) * [width, height]).float()
    for batch in points.split(config.points_per_batch):
        clicks = (batch * (processor.target_size / torch.tensor([width, height]))).to(model.device)
        logits, scores, object_scores = _of_clicks(model, embeddings, clicks, None, config.multimask_output)
        places = batch.repeat_interleave(logits.shape[1], dim=0)
        clicks = clicks.repeat_interleave(logits.shape[1], dim=0)
        object_scores = object_scores.flatten().repeat_interleave(logits.shape[1])
        logits, scores = logits.flatten(0, 1)[:, None], scores.flatten()
        if config.use_m2m and len(logits):
            logits, scores, object_scores = _of_clicks(model, embeddings, clicks, logits, False)
            scores, object_scores = scores.flatten(), object_scores.flatten()
        good = scores > config.pred_iou_thresh
        if not good.any():
            continue
        high = torch.nn.functional.interpolate(logits[good].float(), (height, width), mode="bilinear")[:, 0]
        inner = (high > config.mask_threshold + config.stability_score_offset).sum((1, 2))
        outer = (high > config.mask_threshold - config.stability_score_offset).sum((1, 2))
        stability = inner / outer.clamp(min=1)
        columns = (scores[good], stability, places[good.cpu()], object_scores[good])
        for mask, score, stable, place, object_score in zip(high > config.mask_threshold, *columns, strict=True):
            if (
                stable < config.stability_score_thresh
                or not mask.any()
                or _at_inner_border(mask, crop, image.shape[:2])
            ):
                continue
            whole = np.zeros(image.shape[:2], dtype=bool)
            whole[top:bottom, left:right] = mask.cpu().numpy()
            yield {
                "segmentation": whole,
                "area": int(whole.sum()),
                "bbox": _xywh(whole),
                "predicted_iou": float(score),
                "point_coords": [[float(place[0]) + left, float(place[1]) + top]],
                "stability_score": float(stable),
                "crop_box": [left, top, width, height],
                "object_score": float(object_score),
            }


def _of_clicks(model, embeddings, clicks: torch.Tensor, logits: torch.Tensor | None, multimask: bool):
    """Mask logits `(clicks, masks, height, width)`, their expected IoU and object scores, for each click alone."""
    labels = torch.ones(len(clicks), 1, 1, dtype=torch.int32, device=clicks.device)
    *fine, coarse = (level.expand(len(clicks), -1, -1, -1) for level in embeddings)
    points = clicks[:, None, None].to(model.dtype), labels
    masks, scores, _, object_scores = decode(model, coarse, fine, multimask, points, logits)
    return masks[:, 0], scores[:, 0], object_scores


def _at_inner_border(mask: torch.Tensor, crop: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Whether a mask touches a border of its crop that is none of the image's; of the whole image none is."""
    offset = torch.tensor([crop[0], crop[1], crop[0], crop[1]], dtype=torch.float32)
    box = masks_to_boxes(mask[None])[0].cpu() + offset
    near_crop = (box - torch.tensor(crop)).abs() <= _EDGE
    near_image = (box - torch.tensor([0, 0, size[1], size[0]])).abs() <= _EDGE
    return bool((near_crop & ~near_image).any())


def _without_duplicates(records: list[dict], scores: list[float], threshold: float) -> list[dict]:
    if not records:
        return records
    boxes = torch.tensor([record["bbox"] for record in records], dtype=torch.float32)
    boxes[:, 2:] += boxes[:, :2]
    keep = nms(boxes, torch.tensor(scores), threshold)
    return [records[index] for index in keep.tolist()]


def _clean(record: dict[str, Any], max_area: float) -> bool:
    """Removes small holes and islands of a record's mask in place; whether there were any."""
    mask = record["segmentation"] | small_regions(~record["segmentation"], max_area)
    islands = small_regions(mask, max_area)
    if (mask & ~islands).any():
        mask &= ~islands
    changed = bool((mask != record["segmentation"]).any())
    record.update(segmentation=mask, area=int(mask.sum()), bbox=_xywh(mask))
    return changed


def _xywh(mask: np.ndarray) -> list[float]:
    x0, y0, x1, y1 = box_around(mask)
    return [x0, y0, x1 - x0, y1 - y0]


def detect_objects(detector: Callable[[Image.Image], Any], image: np.ndarray) -> list[tuple[ObjectPrompt, str | None]]:
    """
    Asks a detector for the objects in an image. Boxes with no part of the image in them are left out.

    Args:
        detector (`Callable`):
            Takes a `PIL.Image` and gives a list with a `dict` for each object, as `pipeline("object-detection")` does:
            `box` (a `dict` of `xmin`, `ymin`, `xmax`, `ymax`, or `[x0, y0, x1, y1]`) and, *optional*, `label` and
            `score`; or boxes alone, `(n, 4)`.
        image (`np.ndarray` of shape `(height, width, 3)`):
            In uint8 RGB.

    Returns:
        `list[tuple[ObjectPrompt, str | None]]`: the box of each and what it is, the surest first.

    Raises:
        ValueError: if the detector gives something else.
    """
    given, found = detector(Image.fromarray(image)), []
    try:
        for record in given:
            record = record if isinstance(record, Mapping) else {"box": record}
            box = record["box"]
            sides = [box[key] for key in ("xmin", "ymin", "xmax", "ymax")] if isinstance(box, Mapping) else box
            x0, y0, x1, y1 = (float(side) for side in sides)
            if min(x1, image.shape[1]) > max(x0, 0) and min(y1, image.shape[0]) > max(y0, 0):
                prompt = ObjectPrompt(box=[x0, y0, x1, y1])
                found.append((float(record.get("score", 1.0)), prompt, record.get("label")))
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            'Expected the detector to give [{"box": {"xmin": 1, "ymin": 2, "xmax": 3, "ymax": 4}, "label": "cat", '
            f'"score": 0.9}}, ...] or boxes [[x0, y0, x1, y1], ...], got {given!r:.80}.'
        ) from None
    return [(prompt, label) for _, prompt, label in sorted(found, key=lambda one: -one[0])]


def new_objects(found: list[dict], tracked: list[np.ndarray], max_overlap: float) -> list[dict]:
    """Those of `found` whose mask has less than `max_overlap` IoU with all tracked masks and those kept before it."""
    known, kept = list(tracked), []
    for record in found:
        if is_new(record["segmentation"], known, max_overlap):
            known.append(record["segmentation"])
            kept.append(record)
    return kept


def is_new(mask: np.ndarray, known: list[np.ndarray], max_overlap: float) -> bool:
    """Whether a mask has less than `max_overlap` IoU with all known ones."""
    return all((mask & other).sum() < max_overlap * (mask | other).sum() for other in known)
