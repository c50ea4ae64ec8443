import math

import pytest
import torch

from hf_iclr.vision.training.clip_forward import MaskPrediction
from hf_iclr.vision.training.loss import mask_ious, sam2_loss


def prediction(logits, scores, seen, truth) -> MaskPrediction:
    return MaskPrediction([0] * len(truth), 0, truth, logits, torch.tensor(scores), torch.tensor(seen))


def test_the_terms_of_one_flat_mask_by_hand():
    """
    Logits of 0 everywhere are a chance of 1/2: focal = (1/4 * 1/4 + 3/4 * 3/4) * (1/2)^2 * ln 2, the first quarter of
    the pixels being the object's; dice = 1 - (2 * 1 * 1/2 + 1) / (4 * 1/2 + 1 + 1) with 4 pixels; no pixel is above 0,
    so the actual IoU is 0 and the expected 0.7 is off by 0.7; an object score of 2 costs ln(1 + e^-2).
    """
    truth = torch.tensor([[[True, False], [False, False]]])
    loss = sam2_loss(prediction(torch.zeros(1, 1, 2, 2), [[0.7]], [[2.0]], truth))
    assert loss.focal.item() == pytest.approx((1 / 16 + 9 / 16) / 4 * math.log(2))
    assert loss.dice.item() == pytest.approx(0.5)
    assert loss.iou.item() == pytest.approx(0.7)
    assert loss.object.item() == pytest.approx(math.log(1 + math.exp(-2)))


def test_the_best_of_three_masks_is_trained_and_the_iou_of_each():
    truth = torch.zeros(1, 8, 8, dtype=torch.bool)
    truth[:, :4] = True
    right = torch.where(truth, 5.0, -5.0)
    logits = torch.stack([-right, right, torch.zeros(1, 8, 8)], dim=1).requires_grad_()
    loss = sam2_loss(prediction(logits, [[0.5, 0.6, 0.9]], [[1.0]], truth))
    alone = sam2_loss(prediction(logits[:, 1:2], [[0.6]], [[1.0]], truth))
    assert loss.focal == alone.focal and loss.dice == alone.dice
    assert loss.iou.item() == pytest.approx((0.5 + 0.4 + 0.9) / 3)
    assert loss.actual_iou.item() == 0  # of the third, which is expected to be best
    (loss.focal + loss.dice).backward()
    assert logits.grad[0, 1].abs().sum() > 0
    assert logits.grad[0, [0, 2]].abs().sum() == 0


def test_an_object_out_of_sight_trains_its_score_only():
    truth = torch.zeros(1, 4, 4, dtype=torch.bool)
    loss = sam2_loss(prediction(torch.ones(1, 1, 4, 4), [[0.3]], [[3.0]], truth))
    assert loss.focal == loss.dice == loss.iou == loss.visible == 0
    assert loss.object.item() == pytest.approx(math.log(1 + math.exp(3)))


def test_a_mask_of_an_object_believed_absent_is_empty():
    truth = torch.ones(1, 4, 4, dtype=torch.bool)
    loss = sam2_loss(prediction(torch.full((1, 1, 4, 4), 9.0), [[1.0]], [[-1.0]], truth))
    assert loss.actual_iou == 0
    assert loss.focal.item() == pytest.approx(0.25 * 1024)


def test_losses_are_sums_over_objects():
    torch.manual_seed(0)
    truth, logits = torch.rand(3, 8, 8) > 0.5, torch.randn(3, 2, 2, 2)
    scores, seen = torch.rand(3, 2).tolist(), torch.rand(3, 1).tolist()
    together = sam2_loss(prediction(logits, scores, seen, truth))
    each = [
        sam2_loss(prediction(logits[i : i + 1], scores[i : i + 1], seen[i : i + 1], truth[i : i + 1]))
        for i in range(3)
    ]
    for name, value in vars(together).items():
        torch.testing.assert_close(value, sum(getattr(single, name) for single in each))


def test_iou_of_two_empty_masks_is_zero():
    empty = torch.zeros(2, 3, 3, dtype=torch.bool)
    assert mask_ious(empty, empty).tolist() == [0, 0]
