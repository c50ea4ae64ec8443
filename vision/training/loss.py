"""The loss of SAM 2: focal and dice of the best mask, its expected IoU, and whether the object is in sight."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..session.tracking import NO_OBJECT
from .clip_forward import MaskPrediction


ALPHA, GAMMA = 0.25, 2.0  # of the focal loss, the reference's


@dataclass
class Sam2Loss:
    """
    The terms of a loss, each summed over objects.

    Args:
        focal (`torch.Tensor`): Mean focal loss over the pixels of the best mask, in nats.
        dice (`torch.Tensor`): 1 minus its soft dice coefficient, smoothed by 1.
        iou (`torch.Tensor`): Distance of the expected from the actual IoU, mean over all masks.
        object (`torch.Tensor`): Cross-entropy of the object score, in nats.
        actual_iou (`torch.Tensor`): IoU of the mask that is expected to be best; not trained.
        visible (`torch.Tensor`): Number of objects in sight, over which all but `object` are sums.
    """

    focal: torch.Tensor
    dice: torch.Tensor
    iou: torch.Tensor
    object: torch.Tensor
    actual_iou: torch.Tensor
    visible: torch.Tensor


def sam2_loss(prediction: MaskPrediction, focal_weight: float = 20.0, dice_weight: float = 1.0) -> Sam2Loss:
    """
    The loss of one decoding as in the reference code of https://huggingface.co/papers/2408.00714: of several masks,
    the one with the least weighted focal and dice loss is trained, and the expected IoU of each. Objects out of sight
    train their object score only; those that the model believes to be have a mask of -1024 everywhere.

    Args:
        prediction ([`MaskPrediction`]): Logits are stretched to the size of the true masks.
        focal_weight (`float`, *optional*, defaults to `20.0`): Of the focal loss when the best mask is chosen.
        dice_weight (`float`, *optional*, defaults to `1.0`): Of the dice loss, likewise.

    Returns:
        [`Sam2Loss`]
    """
    visible = prediction.truth.flatten(1).any(dim=1).float()
    scores, object_scores = prediction.scores.float(), prediction.object_scores.float()
    logits = torch.where(object_scores[..., None, None] > 0, prediction.logits.float(), NO_OBJECT)
    logits = F.interpolate(logits, prediction.truth.shape[1:], mode="bilinear", align_corners=False)
    truth = prediction.truth[:, None].float().expand_as(logits)
    chance = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    right = chance * truth + (1 - chance) * (1 - truth)
    weight = ALPHA * truth + (1 - ALPHA) * (1 - truth)
    focal = (weight * entropy * (1 - right) ** GAMMA).mean((2, 3))
    overlap, total = (chance * truth).sum((2, 3)), (chance + truth).sum((2, 3))
    dice = 1 - (2 * overlap + 1) / (total + 1)
    best = (focal_weight * focal + dice_weight * dice).argmin(dim=1, keepdim=True)
    ious = mask_ious(logits > 0, truth > 0)
    expected_best = ious.gather(1, scores.argmax(dim=1, keepdim=True))[:, 0]
    return Sam2Loss(
        focal=(focal.gather(1, best)[:, 0] * visible).sum(),
        dice=(dice.gather(1, best)[:, 0] * visible).sum(),
        iou=((scores - ious).abs().mean(dim=1) * visible).sum(),
        object=F.binary_cross_entropy_with_logits(object_scores[:, 0], visible, reduction="sum"),
        actual_iou=(expected_best * visible).sum(),
        visible=visible.sum(),
    )


def mask_ious(predicted: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """IoU over the last two dimensions of boolean masks, 0 where both are empty."""
    union = (predicted | truth).sum((-1, -2))
    return (predicted & truth).sum((-1, -2)) / union.clamp(min=1)
