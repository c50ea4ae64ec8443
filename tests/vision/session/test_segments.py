"""Masks in every form, and what is derived from them."""

import tracemalloc

import numpy as np
import pytest

from hf_iclr.vision.session.prompts import decode_rle, encode_rle
from hf_iclr.vision.session.segments import (
    FrameSegments,
    VideoSegments,
    box_around,
    decode_mask,
    encode_mask,
    to_polygons,
)


LOGITS = np.full((12, 16), -3.0, np.float32)
LOGITS[2:9, 4:13] = 2.0
LOGITS[4:6, 6:9] = -1.0  # a hole
MASK = LOGITS > 0


def segments(frame: int, output: str = "mask", objects=(1,), score: float = 1.0) -> FrameSegments:
    masks = {obj: encode_mask(LOGITS, output) for obj in objects}
    return FrameSegments(frame, (12, 16), masks, dict.fromkeys(objects, 0.8), dict.fromkeys(objects, score))


@pytest.mark.parametrize("output", ["mask", "logits", "rle", "polygon"])
def test_every_form_holds_the_mask(output):
    frame = segments(0, output)
    assert np.array_equal(frame.binary(1), MASK)
    assert frame.areas == {1: 7 * 9 - 2 * 3} and frame.boxes == {1: [4.0, 2.0, 13.0, 9.0]}


def test_masks_are_shown_in_the_form_asked_for():
    shown = {output: segments(0, output).masks[1] for output in ("mask", "logits", "rle", "polygon")}
    assert shown["mask"].dtype == bool and np.array_equal(shown["mask"], MASK)
    assert shown["logits"] is LOGITS and shown["rle"] == encode_rle(MASK)
    assert [len(polygon) for polygon in shown["polygon"]] == [len(polygon) for polygon in to_polygons(MASK)]
    for form in shown.values():  # a result made of any of these shows it again
        frame = FrameSegments(0, MASK.shape, {1: form}, {1: 1.0}, {1: 1.0})
        assert type(frame.masks[1]) is type(form) and np.array_equal(frame.binary(1), MASK)
        assert np.array_equal(decode_rle(frame.rle(1)), MASK)


@pytest.mark.parametrize("output", ["mask", "rle", "polygon"])
def test_results_keep_no_pixels(output):
    yy, xx = np.mgrid[:270, :480]
    tracemalloc.start()
    try:
        frames = []
        for number in range(60):
            disc = 60.0**2 - (yy - 135) ** 2 - (xx - 100 - 4 * number) ** 2
            masks = {obj: encode_mask(disc, output) for obj in range(5)}
            frames.append(
                FrameSegments(number, disc.shape, masks, dict.fromkeys(masks, 1.0), dict.fromkeys(masks, 1.0))
            )
        video = VideoSegments(frames)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 0.05 * 60 * 5 * disc.size  # of the bytes that booleans would take
    assert video[7].areas[4] == video[7].binary(4).sum() > 10_000


def test_polygons_are_outlines_with_holes():
    outer, hole = sorted(to_polygons(MASK), key=lambda polygon: -len(polygon))
    assert outer.min(axis=0).tolist() == [3.5, 1.5] and outer.max(axis=0).tolist() == [12.5, 8.5]
    assert hole.min(axis=0).tolist() == [5.5, 3.5]
    assert to_polygons(np.zeros((3, 3), bool)) == [] and not decode_mask([], (3, 3)).any()


def test_polygons_of_ragged_masks_lose_nothing():
    random = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9):
        mask = random.random((30, 41)) < share
        assert np.array_equal(decode_mask(to_polygons(mask), mask.shape), mask)


def test_an_empty_mask_has_an_empty_box():
    assert box_around(np.zeros((3, 3), bool)) == [0.0, 0.0, 0.0, 0.0]
    empty = FrameSegments(0, (3, 3), {1: encode_mask(-np.ones((3, 3)), "rle")}, {1: 0.1}, {1: -4.0})
    assert empty.boxes == {1: [0.0] * 4} and empty.areas == {1: 0} and empty.visible == {1: False}


def test_a_video_is_in_order_and_keeps_the_last_of_a_frame():
    video = VideoSegments([segments(2), segments(0), segments(2, objects=(1, 5))])
    assert [frame.frame for frame in video] == video.frames == [0, 2] and len(video) == 2
    assert video[2].objects == [1, 5] == video.objects
    with pytest.raises(KeyError, match=r"no masks of frame 1; there are of frames \[0, 2\]"):
        video[1]


def test_tracks_follow_an_object_and_tell_when_it_is_in_sight():
    scores = {0: 1.0, 1: 2.0, 2: -1.0, 4: 0.5, 5: 0.5}
    tracks = VideoSegments(segments(frame, score=score) for frame, score in scores.items()).tracks()
    assert tracks[1]["visible"] == [(0, 1), (4, 5)] and tracks[1]["object_scores"] == scores
    assert list(tracks[1]["boxes"]) == [0, 1, 2, 4, 5] and tracks[1]["areas"][4] == 57


def test_records_have_the_pipelines_usual_form():
    frame = segments(3, "rle", objects=(1, 2))
    frame.prompted = frozenset({2})
    first, second = VideoSegments([frame]).to_dicts()
    assert first == {
        "frame": 3,
        "object": 1,
        "mask": encode_rle(MASK),
        "box": [4.0, 2.0, 13.0, 9.0],
        "area": 57,
        "score": 0.8,
        "object_score": 1.0,
        "visible": True,
        "prompted": False,
        "corrected": False,
    }
    assert second["prompted"]
