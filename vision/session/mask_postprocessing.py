"""Cleans masks on any device: holes, sprinkles, and flicker between frames."""

import numpy as np
import torch
from scipy import ndimage


_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)
HOLE_LOGIT = 0.1  # just positive, as in the reference predictor
SPRINKLE_LOGIT = -10.0


def small_regions(mask: np.ndarray, max_area: float) -> np.ndarray:
    """
    The 8-connected regions of `mask` of at most `max_area` pixels.

    Args:
        mask (`np.ndarray` of shape `(height, width)`): Boolean.
        max_area (`float`): In pixels of `mask`.

    Returns:
        `np.ndarray` of shape `(height, width)`, boolean.
    """
    labels, _ = ndimage.label(mask, structure=_EIGHT_NEIGHBOURS)
    areas = np.bincount(labels.ravel())
    small = areas <= max_area
    small[0] = False  # what is not in `mask`
    return small[labels]


def clean_logits(logits: torch.Tensor, max_hole_area: float = 0, max_sprinkle_area: float = 0) -> torch.Tensor:
    """
    Fills small holes and removes small islands, as the reference predictor does with its CUDA kernel.

    Args:
        logits (`torch.Tensor` of shape `(objects, 1, height, width)`): Mask logits, positive on the object.
        max_hole_area (`float`, *optional*, defaults to `0`): Holes up to this area get the logit 0.1.
        max_sprinkle_area (`float`, *optional*, defaults to `0`): Islands up to this area get the logit -10.

    Returns:
        `torch.Tensor` of the same shape, dtype and device; `logits` itself if there is nothing to do.
    """
    for max_area, value, sign in ((max_hole_area, HOLE_LOGIT, -1), (max_sprinkle_area, SPRINKLE_LOGIT, 1)):
        if max_area > 0:
            masks = (logits > 0 if sign > 0 else logits <= 0).cpu().numpy()
            small = np.stack([small_regions(mask[0], max_area) for mask in masks])[:, None]
            logits = logits.masked_fill(torch.from_numpy(small).to(logits.device), value)
    return logits


def smooth_logits(logits: torch.Tensor, previous: torch.Tensor | None, weight: float) -> torch.Tensor:
    """
    Mixes a frame's mask logits with those of the frame before, clamped to -32..32 so that one frame without the object
    does not outweigh many.

    Args:
        logits (`torch.Tensor` of shape `(1, 1, height, width)`): Of the current frame.
        previous (`torch.Tensor` of shape `(1, 1, height, width)`, *optional*): The smoothed logits before it.
        weight (`float`): Share of `previous`, in 0..1.
    """
    if previous is None or weight == 0:
        return logits
    return (1 - weight) * logits.clamp(-32, 32) + weight * previous.to(logits).clamp(-32, 32)
