"""Clips in every form that evaluations take."""

from types import SimpleNamespace

import numpy as np
import pytest

from hf_iclr.vision.annotated_clips import AnnotatedClip, davis_clips, to_clip
from hf_iclr.vision.annotation_json import read_sav, write_sav
from hf_iclr.vision.video_prompts import encode_rle
from tests.vision.segments import SIZE, masks, video
from tests.vision.video_data import VIDEO_DATA, needs_video_data


FRAMES = np.zeros((4, *SIZE, 3), np.uint8)
MASKS = {obj: np.stack([masks(number)[obj] for number in range(4)]) for obj in (1, 2)}


@pytest.mark.parametrize(
    ("clip", "name"),
    [
        (AnnotatedClip(FRAMES, MASKS, "park"), "park"),
        ((FRAMES, MASKS), "clip 7"),
        ({"video": FRAMES, "masks": {"1": MASKS[1], "2": [encode_rle(mask) for mask in MASKS[2]]}}, "clip 7"),
        (SimpleNamespace(frames=FRAMES, masks=MASKS), "clip 7"),
        (AnnotatedClip.from_segments(FRAMES, video(rle=True), "lake"), "lake"),
    ],
)
def test_every_form_is_the_same_clip(clip, name):
    clip = to_clip(clip, 7)
    assert clip.name == name and clip.annotated == [0, 1, 2, 3] and clip.open().num_frames == 4
    assert all(np.array_equal(clip.masks[obj], MASKS[obj]) for obj in (1, 2))
    assert clip.first_visible(1) == 0 and clip.first_visible(2) == 2


def test_every_fourth_frame_of_sav(tmp_path):
    write_sav(video(), tmp_path / "a.json")
    segments, _ = read_sav(tmp_path / "a.json")
    clip = AnnotatedClip.from_segments(np.zeros((13, *SIZE, 3), np.uint8), segments)
    assert clip.annotated == [0, 4, 8, 12] and clip.first_visible(2) == 2


@needs_video_data
def test_a_folder_of_davis():
    (clip,) = davis_clips(VIDEO_DATA / "davis")
    assert clip.name == "car-shadow" and clip.masks[1].shape == (40, 480, 854) and clip.open().num_frames == 40
    with pytest.raises(ValueError, match=r"'nothing'.*got \['car-shadow'\]"):
        davis_clips(VIDEO_DATA / "davis", ["nothing"])


@pytest.mark.parametrize(
    ("clip", "error", "words"),
    [
        (7, TypeError, "got int"),
        ((FRAMES, [MASKS[1]]), TypeError, "masks by object"),
        ((FRAMES, {}), ValueError, "at least one object"),
        ((FRAMES, {1: MASKS[1], 2: MASKS[2][1:]}), ValueError, "Expected 4 masks of each object in clip 0"),
        ((FRAMES[1:], MASKS), ValueError, "at least 4 frames"),
        ((FRAMES[:, 1:], MASKS), ValueError, r"size \(23, 37\)"),
        ((iter(FRAMES), MASKS), ValueError, "only once"),
    ],
)
def test_bad_clips_get_a_sentence(clip, error, words):
    with pytest.raises(error, match=words):
        to_clip(clip).open()
