"""Clicks of a simulated annotator: where, on which side, and what they do to a session."""

import numpy as np
import pytest

from hf_iclr.vision.evaluation.simulated_prompts import (
    correct_object,
    first_prompt,
    middle_click,
    next_click,
    prompt_object,
)
from tests.vision.tiny import clip, tiny_pipe


TRUTH = np.zeros((48, 80), bool)
TRUTH[10:31, 20:51] = True
EMPTY = np.zeros_like(TRUTH)


def test_the_first_click_is_in_the_middle():
    disc = np.hypot(*(np.mgrid[:48, :80] - np.array([22, 41])[:, None, None])) < 9
    assert middle_click(disc) == [41.0, 22.0]


def test_a_missed_part_is_clicked_as_the_objects():
    prediction = TRUTH.copy()
    prediction[14:19, 30:35] = False
    assert next_click(prediction, TRUTH) == ([32.0, 16.0], 1)


def test_a_wrong_part_is_clicked_as_not_the_objects():
    prediction = TRUTH.copy()
    prediction[14:19, 30:33] = False
    prediction[35:44, 60:69] = True
    assert next_click(prediction, TRUTH) == ([64.0, 39.0], 0)


def test_the_largest_error_is_the_one_that_holds_the_largest_disc():
    """A thin strip of 60 wrong pixels loses against a square of 25 missed ones."""
    prediction = TRUTH.copy()
    prediction[14:19, 30:35] = False
    prediction[40, 10:70] = True
    assert next_click(prediction, TRUTH) == ([32.0, 16.0], 1)


def test_the_frames_edge_counts_as_outside():
    corner = EMPTY.copy()
    corner[:9, :9] = True
    assert middle_click(corner) == [4.0, 4.0]


def test_an_absent_object_is_clicked_away():
    assert next_click(TRUTH, EMPTY)[1] == 0


def test_an_exact_mask_needs_no_click():
    assert next_click(TRUTH, TRUTH) is None and next_click(EMPTY, EMPTY) is None


def test_prompts_of_each_kind():
    assert first_prompt(TRUTH, "box") == {"box": [20.0, 10.0, 51.0, 31.0]}
    assert first_prompt(TRUTH, "mask")["mask"] is TRUTH
    point = first_prompt(TRUTH, 3)
    assert point["labels"] == [1] and TRUTH[int(point["points"][0][1]), int(point["points"][0][0])]


@pytest.mark.parametrize("kind", ["points", 0, -1, True, 1.5, None])
def test_another_kind_is_refused(kind):
    with pytest.raises(ValueError, match="number of clicks from 1 on"):
        first_prompt(TRUTH, kind)


def test_bad_masks_get_a_sentence():
    with pytest.raises(ValueError, match="object is visible"):
        middle_click(EMPTY)
    with pytest.raises(ValueError, match=r"two masks of shape \(height, width\)"):
        next_click(TRUTH[:-1], TRUTH)


def test_clicks_follow_the_sessions_own_errors():
    """Three clicks are the loop of a first click and two corrections written by hand."""
    session, by_hand = (tiny_pipe().session(clip(2)) for _ in range(2))
    assert prompt_object(session, 0, 1, TRUTH, 3) == 3
    segments = by_hand.add(0, 1, points=[middle_click(TRUTH)])
    for _ in range(2):
        point, label = next_click(segments.masks[1], TRUTH)
        segments = by_hand.correct(0, 1, points=[point], labels=[label])
    assert session.prompts == by_hand.prompts and len(session.prompts[0][1].points) == 3
    assert np.array_equal(session.segments(0).masks[1], segments.masks[1])


def test_no_more_clicks_once_the_mask_is_exact():
    session = tiny_pipe().session(clip(2))
    segments = session.add(0, 1, mask=TRUTH)
    assert correct_object(session, segments, 1, segments.masks[1], 3) == 0
    assert prompt_object(session, 0, 1, segments.masks[1], "mask") == 0
