import numpy as np
import pytest

from hf_iclr.vision.evaluation.procedural_clips import procedural_clip


def test_a_seed_draws_the_same_clip_and_another_seed_another():
    first, again, other = procedural_clip(3), procedural_clip(3), procedural_clip(4)
    assert np.array_equal(first.frames, again.frames)
    assert all(np.array_equal(first.masks[obj], again.masks[obj]) for obj in first.masks)
    assert not np.array_equal(first.frames, other.frames)


@pytest.mark.parametrize(("hard", "objects"), [(False, [1, 2]), (True, [1, 2, 3])])
def test_masks_are_disjoint_and_outside_them_only_noise_covers_the_background(hard, objects):
    clip = procedural_clip(5, hard=hard, frames=5, size=96)
    assert clip.frames.shape == (5, 96, 96, 3)
    assert clip.frames.dtype == clip.background.dtype == np.uint8
    assert sorted(clip.masks) == objects
    covered = sum(mask.astype(int) for mask in clip.masks.values())
    assert covered.max() == 1
    error = np.abs(clip.frames.astype(int) - clip.background)
    assert error[covered == 0].max() <= 10
    assert error[covered == 1].mean() > 20


def test_objects_move():
    moved = []
    for seed in range(20):
        first, *_, last = procedural_clip(seed).masks[1]
        moved.append((first & last).sum() / (first | last).sum())
    assert np.mean(moved) < 0.4


def test_hard_objects_leave_the_frame_and_cross():
    clips = [procedural_clip(seed, hard=True, frames=24) for seed in range(10)]
    assert any(not mask.any(axis=(1, 2)).all() for clip in clips for mask in clip.masks.values())


def test_the_shifted_look_is_gray_and_has_the_same_interface():
    clip = procedural_clip(0, shifted=True)
    assert np.ptp(clip.frames, axis=-1).max() == 0
    assert clip.masks[1].any()
    assert np.ptp(procedural_clip(0).frames, axis=-1).max() > 50
