"""The simulated annotator points, verifies and corrects as its truth demands."""

import numpy as np
import pytest

from hf_iclr.vision.annotation.data_engine import annotate
from hf_iclr.vision.annotation.masklets import Masklet, QualityGate
from hf_iclr.vision.annotation.simulated_annotator import SimulatedAnnotator
from hf_iclr.vision.evaluation.procedural_clips import Clip
from hf_iclr.vision.evaluation.simulated_prompts import first_prompt
from hf_iclr.vision.session.prompts import encode_rle
from tests.vision.tiny import clip, tiny_pipe


OPEN = QualityGate(min_object_score=0, min_stability=0, min_cycle_iou=None)


def true_clip() -> Clip:
    """A rectangle that moves from frame 1 on, and nothing on frame 0."""
    masks = np.zeros((4, 48, 80), dtype=bool)
    for frame in range(1, 4):
        masks[frame, 12:30, 8 + 2 * frame : 28 + 2 * frame] = True
    return Clip(clip(4), {3: masks}, clip(1)[0])


def masklet_of(truth: np.ndarray, provenance="manual", obj=3, session=None) -> Masklet:
    session = session or tiny_pipe().session(true_clip().frames, output="rle")
    masks = {frame: encode_rle(mask) for frame, mask in enumerate(truth)}
    return Masklet(true_clip(), "clip", obj, session, provenance=provenance, masks=masks)


def test_points_at_the_first_frame_in_sight():
    session = tiny_pipe().session(true_clip().frames)
    SimulatedAnnotator(max_clicks=2).point(true_clip(), session)
    assert list(session.prompts) == [1] and 1 <= len(session.prompts[1][3].points) <= 2
    (x, y), label = session.prompts[1][3].points[0], session.prompts[1][3].labels[0]
    assert true_clip().masks[3][1][int(y), int(x)] and label == 1


@pytest.mark.parametrize(("phase", "frames"), [(1, [0, 1, 2, 3]), (2, [1])])
def test_in_phases_1_and_2_clicks_make_masks_from_nothing_which_are_drawn(phase, frames):
    """On frame 0 nothing is in sight; the drawn masks are those of a session that saw nothing else."""
    session = tiny_pipe().session(true_clip().frames)
    session.add(2, 3, points=[[60, 40]])
    annotator = SimulatedAnnotator(phase=phase, max_clicks=1)
    annotator.point(true_clip(), session)
    assert sorted(set(session.prompts) - ({2} if phase == 2 else set())) == frames
    click = first_prompt(true_clip().masks[3][1], 1)
    alone = tiny_pipe().session(true_clip().frames).add(1, 3, **click).binary(3)
    assert np.array_equal(session.prompts[1][3].mask, alone)
    assert phase == 2 or not session.prompts[0][3].mask.any()
    masklet = masklet_of(true_clip().masks[3], session=session)
    for _ in range(2):
        annotator.verify(masklet)
        assert masklet.clicks == {frame: 1 for frame in frames if frame}


def test_every_frame_or_the_mean_must_reach_the_threshold():
    """IoUs of 1, 1, 1 and 0: the mean is .75."""
    truth = true_clip().masks[3].copy()
    truth[3] = False
    assert not SimulatedAnnotator(min_iou=0.75).verify(masklet_of(truth))
    assert SimulatedAnnotator(min_iou=0.75, per_frame=False).verify(masklet_of(truth))
    assert not SimulatedAnnotator(min_iou=0.76, per_frame=False).verify(masklet_of(truth))
    assert SimulatedAnnotator().verify(masklet_of(true_clip().masks[3]))


def test_corrects_the_worst_frame_once():
    session = tiny_pipe().session(true_clip().frames, output="rle")
    session.add(1, 3, points=[[20, 20]])
    session.propagate("both")
    truth = true_clip().masks[3].copy()
    truth[2, 12:16], truth[3] = False, False
    masklet = masklet_of(truth, session=session)
    annotator = SimulatedAnnotator(max_clicks=3, min_iou=0.99)
    annotator.correct(masklet)
    assert list(session.prompts) == [1, 3] and 1 <= len(session.prompts[3][3].points) <= 3
    masklet.clicks = {3: 3}
    annotator.correct(masklet)
    assert list(session.prompts) == [1, 2, 3]
    masklet.clicks = {2: 3, 3: 3}
    before = session.prompts
    annotator.correct(masklet)
    assert session.prompts == before


def test_what_is_out_of_sight_is_erased():
    session = tiny_pipe().session(true_clip().frames, output="rle")
    truth = true_clip().masks[3].copy()
    truth[0] = True
    SimulatedAnnotator(phase=2).correct(masklet_of(truth, session=session))
    prompt = session.prompts[0][3]
    assert prompt.mask is not None and not prompt.mask.any()


def test_found_objects_are_matched_and_others_removed():
    annotator = SimulatedAnnotator()
    found = masklet_of(true_clip().masks[3], "auto", obj=9)
    assert annotator.verify(found)
    found.provenance = "manual"  # after a correction it is still the same object
    assert annotator.verify(found)
    session = tiny_pipe().session(true_clip().frames, output="rle")
    session.add(0, 8, points=[[70, 40]])
    session.add(0, 5, points=[[7, 4]])
    nowhere = np.zeros((4, 48, 80), dtype=bool)
    nowhere[:, 40:, 60:] = True
    false = masklet_of(nowhere, "auto", 8, session)
    assert not annotator.verify(false)
    annotator.correct(false)
    assert session.objects == [5]


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_the_engine_takes_it_and_stops(tmp_path, phase):
    annotator = SimulatedAnnotator(phase=phase, max_clicks=2)
    rows = annotate(
        [true_clip()],
        tiny_pipe(),
        annotator.point,
        annotator.verify,
        annotator.correct,
        out=tmp_path,
        gate=OPEN,
        max_rounds=2,
    )
    (row,) = rows
    assert row["object"] == 3 and 1 in row["edited_frames"]
    assert len(row["edited_frames"]) <= 4 and row["clicks"] <= 2 * len(row["edited_frames"])


@pytest.mark.parametrize("wrong", [{"phase": 0}, {"min_iou": 0.0}, {"min_iou": 2.0}, {"max_clicks": 0}])
def test_bad_options_raise(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SimulatedAnnotator(**wrong)
