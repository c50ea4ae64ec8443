from collections import Counter

import numpy as np
import pytest
import torch

from hf_iclr.vision.training.prompts import PromptPlan, corrective_click, draw_plan, first_points


def square(*corners, side=20):
    masks = torch.zeros(len(corners), side, side, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, corners, strict=True):
        mask[top:bottom, left:right] = True
    return masks


def test_plans_have_the_papers_shares_and_correct_no_true_mask():
    rng = np.random.default_rng(0)
    plans = [draw_plan(rng, 8) for _ in range(2000)]
    kinds = Counter(plan.kind for plan in plans)
    assert kinds["mask"] / 2000 == pytest.approx(0.5, abs=0.03)
    assert kinds["box"] / 2000 == pytest.approx(0.25, abs=0.03)
    assert Counter(len(plan.prompted) for plan in plans)[1] / 2000 == pytest.approx(0.5, abs=0.04)
    for plan in plans:
        assert plan.prompted[0] == 0
        assert len(plan.prompted) <= 2 and len(plan.corrected) <= 2
        assert max(plan.prompted + plan.corrected) < 8
        if plan.kind == "mask":
            assert not plan.corrected
        else:
            assert set(plan.prompted) <= set(plan.corrected)
            assert plan.clicks == 7
    assert any(len(plan.prompted) == 1 and len(plan.corrected) == 2 for plan in plans)


def test_masks_leave_a_frame_to_predict():
    rng = np.random.default_rng(0)
    plans = [draw_plan(rng, 2) for _ in range(200)]
    assert {len(plan.prompted) for plan in plans if plan.kind == "mask"} == {1}
    assert {len(plan.prompted) for plan in plans if plan.kind != "mask"} == {1, 2}


def test_images_are_never_shown_by_a_mask():
    rng = np.random.default_rng(0)
    plans = [draw_plan(rng, 1) for _ in range(200)]
    assert {plan.kind for plan in plans} == {"click", "box"}
    assert all(plan.prompted == plan.corrected == (0,) for plan in plans)


def test_first_clicks_reach_every_pixel_of_the_object_and_no_other():
    masks = square((3, 5, 7, 8)).expand(500, -1, -1)
    points, labels = first_points("click", masks, torch.rand(500, 4, generator=torch.Generator().manual_seed(0)))
    assert points.shape == (500, 1, 1, 2) and labels.shape == (500, 1, 1)
    assert (labels == 1).all()
    assert {tuple(point) for point in points.view(-1, 2).int().tolist()} == {
        (x, y) for x in range(3, 7) for y in range(5, 8)
    }


def test_boxes_are_off_by_a_tenth_of_their_sides_at_most():
    masks = square((2, 4, 13, 8))
    corners, labels = first_points("box", masks, torch.tensor([[0.0, 1.0, 0.5, 0.5]]))
    assert labels.tolist() == [[[2, 3]]]
    # From the first to the last pixel: x 2 to 12, y 4 to 7; a tenth of the sides is 1 and 0.3.
    torch.testing.assert_close(corners, torch.tensor([[[[1.0, 4.3], [12.0, 7.0]]]]))


@pytest.mark.parametrize("kind", ["click", "box"])
def test_an_object_out_of_sight_is_shown_by_clicks_beside_it(kind):
    masks = torch.cat([square((3, 3, 6, 6)), torch.zeros(1, 20, 20, dtype=torch.bool)])
    points, labels = first_points(kind, masks, torch.full((2, 4), 0.5))
    assert (labels[0] > 0).all()
    assert (labels[1] == 0).all()
    assert points[1].min() >= 0 and points[1].max() < 20


def test_corrective_clicks_fall_into_the_error_with_its_label():
    masks = square((4, 4, 10, 10), (4, 4, 10, 10), (4, 4, 10, 10))
    predicted = square((4, 4, 7, 10), (4, 4, 10, 14), (4, 4, 10, 10))
    for value in (0.11, 0.5, 0.999):
        points, labels = corrective_click(masks, predicted, torch.full((3, 4), value))
        (missed, wrong, exact) = points.view(3, 2).tolist()
        assert labels.flatten().tolist() == [1, 0, 0]
        assert 7 <= missed[0] < 10 and 4 <= missed[1] < 10
        assert 4 <= wrong[0] < 10 and 10 <= wrong[1] < 14
        assert not masks[2, int(exact[1]), int(exact[0])]


def test_a_tenth_of_the_clicks_is_drawn_from_the_true_mask():
    masks, predicted = square((4, 4, 10, 10)), square((4, 4, 10, 14))
    points, labels = corrective_click(masks, predicted, torch.tensor([[0.5, 0.09, 0.0, 0.0]]))
    assert labels.item() == 1
    assert masks[0, int(points[0, 0, 0, 1]), int(points[0, 0, 0, 0])]


def test_bad_plans_get_a_sentence():
    with pytest.raises(ValueError, match="kind mask, click, box, got 'tap'"):
        PromptPlan("tap")
    with pytest.raises(ValueError, match="frame 0 to be prompted first"):
        PromptPlan("click", prompted=(1,))
    with pytest.raises(ValueError, match="needs no correction"):
        PromptPlan("mask", corrected=(0,), clicks=1)
