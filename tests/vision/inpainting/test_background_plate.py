"""What is behind moving objects: soft masks, still spans, the median of what was seen, and smooth fills."""

import numpy as np

from hf_iclr.vision.inpainting.background_plate import Span, fill_smoothly, registered_spans, seen_background, soften
from hf_iclr.vision.session.videos import open_video


NONE = np.zeros((16, 16), np.float32)


def column(start: int, stop: int) -> np.ndarray:
    mask = np.zeros((16, 16), bool)
    mask[:, start:stop] = True
    return mask


def test_a_soft_mask_is_full_on_the_dilated_mask_and_fades_out():
    """From a mask in columns 5 and 6, dilated by 1 and feathered by 3: the distance d falls by (d - 1) / 4."""
    weights = soften(column(5, 7), dilation=1, feather=3)
    expected = [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0]
    assert np.array_equal(weights, np.tile(np.float32(expected), (16, 1)))
    assert np.array_equal(soften(column(5, 7), 0, 0), column(5, 7))
    assert not soften(column(5, 5), 4, 2).any()


def test_a_pixel_is_the_median_of_what_was_seen_there():
    """Column 2 is hidden on frame 0 and 1: of 30, 40 and 90 the median is 40; of two sights, 10 and 21, it is 15.5,
    rounded to the even 16; column 4 is never seen and stays as on the first frame."""
    video = np.full((5, 4, 6, 3), 7, np.uint8)
    for number, value in enumerate((200, 200, 30, 90, 40)):
        video[number, :, 2] = value
    for number, value in enumerate((10, 21, 200, 200, 200)):
        video[number, :, 3] = value
    hidden = np.zeros((5, 4, 6), np.float32)
    hidden[:2, :, 2], hidden[2:, :, 3], hidden[:, :, 4] = 1, 1, 1
    plate, counts, seen = seen_background(open_video(video), lambda number: hidden[number], Span(range(5)))
    assert (plate[:, 2] == 40).all() and (plate[:, 3] == 16).all() and (plate[:, [0, 1, 4, 5]] == 7).all()
    assert np.array_equal(counts[0], [0, 0, 2, 3, 5, 0])
    assert np.array_equal(seen[0], [True, True, True, True, False, True])


def test_many_frames_are_sampled_evenly():
    """Values rise over 400 frames; the median of 64 samples is near the middle one, far from that of the first 64."""
    video = np.repeat((np.arange(400) / 2).astype(np.uint8), 16 * 3).reshape(400, 4, 4, 3)
    hidden = np.zeros((400, 4, 4), np.float32)
    hidden[0] = 1
    plate, _, _ = seen_background(open_video(video), lambda number: hidden[number], Span(range(400)))
    assert abs(plate.mean() - 100) < 10
    again, _, _ = seen_background(open_video(video), lambda number: hidden[number], Span(range(400)))
    assert np.array_equal(plate, again)


def test_a_camera_that_moves_ends_a_span():
    scene = np.random.default_rng(0).integers(0, 255, (16, 64, 3), dtype=np.uint8)
    video = np.stack([scene[:, left : left + 16] for left in (0, 0, 0, 9, 9, 30)])
    spans = registered_spans(open_video(video), lambda _: NONE, 6)
    assert [span.frames for span in spans] == [range(3), range(3, 5), range(5, 6)]


def test_what_moves_under_the_masks_or_in_a_small_place_ends_none():
    video = np.full((4, 16, 16, 3), 100, np.uint8)
    video[np.arange(4), :, 4 * np.arange(4)] = 255
    masks = [column(4 * number, 4 * number + 1).astype(np.float32) for number in range(4)]
    assert [span.frames for span in registered_spans(open_video(video), masks.__getitem__, 4)] == [range(4)]
    masks[2][:] = 1  # nothing is left to tell by
    assert [span.frames for span in registered_spans(open_video(video), masks.__getitem__, 4)] == [range(4)]
    small = np.full((4, 16, 16, 3), 100, np.uint8)
    small[2, :8, :4] = 255  # an eighth of the frame
    assert [span.frames for span in registered_spans(open_video(small), lambda _: NONE, 4)] == [range(4)]


def test_a_hole_is_filled_from_its_border():
    rows, columns = np.mgrid[:32, :32]
    image = np.stack([100 + 2 * rows, 100 + 2 * columns, np.full((32, 32), 50)], axis=-1).astype(np.uint8)
    hole = np.zeros((32, 32), bool)
    hole[8:24, 10:22] = True
    spoiled = np.where(hole[..., None], 255, image).astype(np.uint8)
    filled = fill_smoothly(spoiled, hole)
    assert np.array_equal(filled[~hole], image[~hole]) and (filled[hole][:, 2] == 50).all()
    assert np.abs(filled.astype(int) - image)[hole].mean() < 3  # of the 28 levels that the slope rises over the hole
    assert (fill_smoothly(spoiled, np.ones((32, 32), bool)) == 128).all()
