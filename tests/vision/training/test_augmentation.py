"""Clips that look other at each sight: masks follow the frames, all frames of a clip the same way."""

import numpy as np
import pytest

from hf_iclr.vision.evaluation.procedural_clips import procedural_clip
from hf_iclr.vision.training.augmentation import augment_clip
from hf_iclr.vision.training.clip_dataset import ClipDataset
from tests.vision.tiny import SIDE, tiny_processor


def scene() -> tuple[list[np.ndarray], np.ndarray]:
    """Three frames of one picture, with a bright block off the middle, and its mask; another object is never there."""
    frame, mask = np.full((40, 60, 3), (60, 90, 40), np.uint8), np.zeros((2, 3, 40, 60), bool)
    frame[8:18, 10:26] = (250, 240, 200)
    mask[0, :, 8:18, 10:26] = True
    return [frame.copy() for _ in range(3)], mask


def test_masks_follow_the_frames_and_frames_each_other():
    flips, tilts, grays = set(), 0, 0
    for seed in range(60):
        frames, masks = augment_clip(np.random.default_rng(seed), *scene())
        assert masks.shape == (2, 3, 40, 60) and frames[0].dtype == np.uint8 and not masks[1].any()
        assert np.array_equal(masks[0, 0], masks[0, 1]) and np.array_equal(masks[0, 0], masks[0, 2])
        bright = np.stack(frames).min(-1) > 150
        union = bright | masks[0]
        assert (bright & masks[0]).sum() > 0.8 * union.sum()
        tilts += not np.array_equal(masks[0, 0].any(0), masks[0, 0][int(np.argwhere(masks[0, 0])[:, 0].mean())])
        flips.add(np.argwhere(masks[0, 0])[:, 1].mean() > 30)
        spread = np.ptp(np.stack(frames).astype(int), axis=-1).max()
        grays += spread == 0
        # Each frame has a little colour of its own: more than rounding, less than two jitters of a tenth.
        first, second = (frame[20:30, 28:32].mean() for frame in frames[:2])
        assert 0.8 < first / second < 1.25
    assert flips == {False, True} and tilts > 30 and 0 < grays < 12


def test_an_object_never_leaves_the_first_frame():
    frames, masks = scene()
    masks[:] = False
    masks[0, :, 0, 0] = True  # a corner, which nearly any turn would lose
    for seed in range(10):
        _, moved = augment_clip(np.random.default_rng(seed), frames, masks)
        assert moved[0, 0].any()


@pytest.mark.parametrize("augment", [False, True])
def test_clips_are_augmented_where_it_is_said_and_drawn_again_the_same(augment):
    clips = [
        ClipDataset([procedural_clip(0, frames=2, size=SIDE)], tiny_processor(), 2, augment=augment) for _ in "ab"
    ]
    one, other = (dataset[0] for dataset in clips)
    assert np.array_equal(one["pixel_values"], other["pixel_values"])
    plain = tiny_processor().video_processor(procedural_clip(0, frames=2, size=SIDE).frames, return_tensors="pt")
    same = np.array_equal(one["pixel_values"], plain["pixel_values_videos"][0])
    assert same != augment
