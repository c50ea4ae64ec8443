"""Clips that look other at each sight: the transforms of the reference's fine-tuning, one for all frames of a clip."""

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F


FLIP, DEGREES, SHEAR, GRAY = 0.5, 25.0, 20.0, 0.05
JITTER = (0.1, 0.03, 0.03)  # most change of brightness, contrast and saturation of a clip
FRAME_JITTER = (0.1, 0.05, 0.05)  # and of each frame for itself
FILL = [123.0, 116.0, 103.0]  # the mean of ImageNet, where a turned frame leaves corners


def augment_clip(
    rng: np.random.Generator, frames: list[np.ndarray], masks: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    """
    Flips a clip in half of all cases, turns it by up to 25 degrees and shears it by up to 20, unless an object would
    leave its first frame, changes its colours, those of each frame a little more, and takes them from one clip in 20:
    `sam2.1_hiera_b+_MOSE_finetune.yaml` of the reference.

    Args:
        rng (`np.random.Generator`): Where chance comes from.
        frames (`list[np.ndarray]`): Each `(height, width, 3)` in uint8.
        masks (`np.ndarray` of shape `(objects, frames, height, width)`): Boolean.

    Returns:
        `tuple`: frames and masks of the same shapes.
    """
    pixels, truth = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), torch.from_numpy(masks)
    if rng.random() < FLIP:
        pixels, truth = pixels.flip(-1), truth.flip(-1)
    angle, shear = float(rng.uniform(-DEGREES, DEGREES)), float(rng.uniform(-SHEAR, SHEAR))
    place = {"angle": angle, "translate": [0, 0], "scale": 1.0, "shear": [shear, 0.0]}
    moved = F.affine(truth.flatten(0, 1).byte(), **place).view_as(truth).bool()
    if moved[:, 0].flatten(1).any(1).equal(truth[:, 0].flatten(1).any(1)):
        pixels, truth = F.affine(pixels, **place, interpolation=InterpolationMode.BILINEAR, fill=FILL), moved
    pixels = _jitter(rng, pixels, JITTER)
    if rng.random() < GRAY:
        pixels = F.rgb_to_grayscale(pixels, num_output_channels=3)
    shown = torch.stack([_jitter(rng, frame, FRAME_JITTER) for frame in pixels])
    return list(shown.permute(0, 2, 3, 1).numpy()), truth.numpy()


def _jitter(rng: np.random.Generator, pixels: torch.Tensor, most: tuple[float, ...]) -> torch.Tensor:
    changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    for number in rng.permutation(len(changes)):
        pixels = changes[number](pixels, float(1 + rng.uniform(-most[number], most[number])))
    return pixels
