"""Holes, sprinkles, overlap and flicker."""

import numpy as np
import pytest
import torch

from hf_iclr.vision.session.mask_postprocessing import clean_logits, small_regions, smooth_logits
from tests.vision.tiny import clip, tiny_pipe


def logits() -> torch.Tensor:
    """One mask of 8 x 8 with a hole of 2 pixels, one of 4, and two islands that touch by a corner (2 pixels)."""
    mask = torch.full((1, 1, 16, 16), -3.0)
    mask[..., 1:9, 1:9] = 5.0
    mask[..., 2, 2:4] = -2.0
    mask[..., 5:7, 5:7] = -2.0
    mask[..., 12, 12] = mask[..., 13, 13] = 4.0
    return mask


def test_regions_join_at_corners():
    mask = logits()[0, 0].numpy() > 0
    assert small_regions(mask, 2)[12, 12] and not small_regions(mask, 1).any()
    assert small_regions(~mask, 3).sum() == 2


def test_holes_up_to_an_area_are_filled_and_islands_removed():
    before = logits()
    filled = clean_logits(before, max_hole_area=2)
    assert torch.equal((filled != before).nonzero()[:, 2:], torch.tensor([[2, 2], [2, 3]]))
    assert filled[filled != before].tolist() == pytest.approx([0.1, 0.1])
    assert int(((clean_logits(before, max_hole_area=4) > 0) & (before <= 0)).sum()) == 6
    cleaned = clean_logits(before, max_sprinkle_area=2)
    assert cleaned[..., 12, 12] == cleaned[..., 13, 13] == -10.0 and int((cleaned != before).sum()) == 2
    assert torch.equal(before, logits())  # not in place


def test_nothing_to_do_is_nothing_done():
    before = logits()
    assert clean_logits(before) is before
    assert clean_logits(before.to(torch.bfloat16), 2, 2).dtype == torch.bfloat16


def test_smoothing_mixes_in_the_frame_before_but_not_without_bound():
    now, gone = torch.full((1, 1, 2, 2), 4.0), torch.full((1, 1, 2, 2), -1024.0)
    assert smooth_logits(now, None, 0.5) is now and smooth_logits(now, gone, 0.0) is now
    assert torch.equal(smooth_logits(now, gone, 0.25), torch.full((1, 1, 2, 2), 0.75 * 4 - 0.25 * 32))


def run(**options):
    prompts = {0: {1: {"points": [[20, 20]]}, 2: {"points": [[60, 30]]}}}
    return tiny_pipe()(clip(4), prompts=prompts, **options)


def test_objects_can_be_kept_from_overlapping():
    assert any((frame.masks[1] & frame.masks[2]).any() for frame in run())
    plain = run(output="logits")
    for frame, logits in zip(run(non_overlap=True), plain, strict=True):
        assert not (frame.masks[1] & frame.masks[2]).any()
        best = np.argmax([logits.masks[1], logits.masks[2]], axis=0)
        assert np.array_equal(frame.masks[2], (logits.masks[2] > 0) & (best == 1))


def test_cleaning_and_smoothing_change_what_is_shown_and_not_what_is_remembered():
    pipe = tiny_pipe()
    shown = {}
    for name, options in {
        "plain": {},
        "clean": {"max_hole_area": 100, "max_sprinkle_area": 100},
        "smooth": {"smoothing": 0.5},
    }.items():
        session = pipe.session(clip(4), output="logits", **options)
        session.add(0, 1, points=[[20, 20]])
        masks = session.propagate()
        shown[name] = (masks[3].masks[1], session._memories[1].tracked[3]["pred_masks"], masks[0].masks[1])
    for name in ("clean", "smooth"):
        assert not np.array_equal(shown[name][0], shown["plain"][0])
        assert torch.equal(shown[name][1], shown["plain"][1])
    assert np.array_equal(shown["smooth"][2], shown["plain"][2])  # the first frame has none before it
