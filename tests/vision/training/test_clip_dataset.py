import logging

import numpy as np
import pytest
import torch
from PIL import Image

from hf_iclr.vision.evaluation.procedural_clips import procedural_clip
from hf_iclr.vision.formats.annotated_video import AnnotatedVideo
from hf_iclr.vision.formats.segment_files import given_segments
from hf_iclr.vision.session.segments import VideoSegments
from hf_iclr.vision.training.clip_dataset import ClipDataset
from tests.vision.tiny import SIDE, tiny_processor


CLIP = procedural_clip(0, frames=6, size=48)


def segments_of(clip, frames) -> VideoSegments:
    size = clip.background.shape[:2]
    return VideoSegments(given_segments(t, size, {o: mask[t] for o, mask in clip.masks.items()}) for t in frames)


def write_images(folder, clip):
    folder.mkdir(parents=True)
    for number, frame in enumerate(clip.frames):
        Image.fromarray(frame).save(folder / f"{number:05}.jpg")


def test_clips_are_runs_of_frames_with_their_masks_at_the_models_size():
    clips = ClipDataset([procedural_clip(0, hard=True, size=SIDE)], tiny_processor(), num_frames=3, max_objects=2)
    drawn = procedural_clip(0, hard=True, size=SIDE)
    item = clips[0]
    assert item["noise"].shape == (2, 3, 1 + item["plan"].clicks, 4)
    every = tiny_processor().video_processor(drawn.frames, return_tensors="pt")["pixel_values_videos"][0]
    starts = [t for t in range(6) if torch.equal(every[t : t + 3], item["pixel_values"])]
    assert len(starts) == 1
    truths = [torch.from_numpy(mask[starts[0] : starts[0] + 3]) for mask in drawn.masks.values()]
    for mask in item["masks"]:
        assert mask[0].any()
        assert any(torch.equal(mask, truth) for truth in truths)


def test_what_is_drawn_depends_on_seed_epoch_and_place_alone():
    first, again, other = (ClipDataset([CLIP, CLIP], tiny_processor(), 2, seed=seed) for seed in (0, 0, 1))
    again[0]
    assert torch.equal(first[1]["noise"], again[1]["noise"]) and first[1]["plan"] == again[1]["plan"]

    def differs(a, b):
        return a["noise"].shape != b["noise"].shape or not torch.equal(a["noise"], b["noise"])

    assert differs(first[1], other[1]) and differs(first[0], first[1])
    before = first[1]
    first.epoch.fill_(1)
    assert differs(before, first[1])


def test_videos_that_show_nothing_or_are_broken_are_logged_and_replaced(tmp_path, caplog):
    empty = AnnotatedVideo(CLIP.frames, range(6), lambda frame: {1: np.zeros((48, 48), bool)})
    gone = AnnotatedVideo(str(tmp_path / "gone.mp4"), range(6), lambda frame: {1: CLIP.masks[1][frame]})
    small = AnnotatedVideo(CLIP.frames, range(6), lambda frame: {1: CLIP.masks[1][frame][:20, :20] | True})
    clips = ClipDataset([empty, gone, small, CLIP], tiny_processor())
    with caplog.at_level(logging.WARNING):
        item = clips[0]
    assert item["masks"].any()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"Video {number} can't be trained on" for number in range(3)
    ]
    assert "got (20, 20)" in caplog.text
    with pytest.raises(ValueError, match="None of the videos"):
        ClipDataset([empty, small], tiny_processor())[0]
