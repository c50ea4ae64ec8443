import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from hf_iclr.vision.annotation_json import write_sav
from hf_iclr.vision.clip_dataset import AnnotatedVideo, ClipDataset, read_png_videos, read_rows, read_sav_videos
from hf_iclr.vision.mask_folders import write_davis
from hf_iclr.vision.procedural_clips import procedural_clip
from hf_iclr.vision.segment_files import given_segments
from hf_iclr.vision.video_prompts import encode_rle, to_boolean_mask
from hf_iclr.vision.video_segments import VideoSegments
from tests.vision.tiny import SIDE, tiny_processor


CLIP = procedural_clip(0, frames=6, size=48)


def segments_of(clip, frames) -> VideoSegments:
    size = clip.background.shape[:2]
    return VideoSegments(given_segments(t, size, {o: mask[t] for o, mask in clip.masks.items()}) for t in frames)


def write_images(folder, clip):
    folder.mkdir(parents=True)
    for number, frame in enumerate(clip.frames):
        Image.fromarray(frame).save(folder / f"{number:05}.jpg")


def assert_masks_are(video: AnnotatedVideo, clip, frames):
    assert list(video.frames) == list(frames)
    for frame in frames:
        masks = video.masks(frame)
        for obj, mask in clip.masks.items():
            known = to_boolean_mask(masks[obj]) if obj in masks else np.zeros_like(mask[frame])
            assert np.array_equal(known, mask[frame])


def test_folders_of_davis_are_read_where_both_images_and_masks_are(tmp_path):
    write_images(tmp_path / "JPEGImages" / "dog", CLIP)
    write_images(tmp_path / "JPEGImages" / "cat", CLIP)
    (tmp_path / "Annotations").mkdir()
    write_davis(segments_of(CLIP, [1, 2, 3, 5]), tmp_path / "Annotations" / "dog")
    (video,) = read_png_videos(tmp_path / "JPEGImages", tmp_path / "Annotations")
    assert_masks_are(video, CLIP, [1, 2, 3, 5])
    item = ClipDataset([video], tiny_processor(), num_frames=2)[0]
    assert item["pixel_values"].shape == (2, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match="folders of the same names"):
        read_png_videos(tmp_path / "Annotations", tmp_path / "JPEGImages")


def test_gray_masks_of_255_are_object_1_and_255_beside_others_is_void(tmp_path):
    write_images(tmp_path / "frames" / "dog", CLIP)
    (tmp_path / "masks" / "dog").mkdir(parents=True)
    labels = np.zeros((48, 48), np.uint8)
    labels[4:9, 4:9] = 255
    Image.fromarray(labels).save(tmp_path / "masks" / "dog" / "00000.png")
    labels[20:30, 20:30] = 3
    Image.fromarray(labels).save(tmp_path / "masks" / "dog" / "00001.png")
    (video,) = read_png_videos(tmp_path / "frames", tmp_path / "masks")
    assert video.masks(0)[1].sum() == 25
    assert sorted(video.masks(1)) == [3]


def test_masklets_of_sav_lie_on_every_fourth_frame(tmp_path):
    long = procedural_clip(1, frames=9, size=48)
    write_sav(segments_of(long, [0, 4, 8]), tmp_path / "sav_000001_manual.json")
    with pytest.raises(ValueError, match="name_manual.json beside name.mp4"):
        read_sav_videos(tmp_path)
    (tmp_path / "sav_000001.mp4").write_bytes(b"")
    (video,) = read_sav_videos(tmp_path)
    assert_masks_are(video, long, [0, 4, 8])


def test_rows_of_a_dataset_are_joined_by_their_video(tmp_path):
    write_images(tmp_path / "dog", CLIP)
    rows = [
        {
            "video": str(tmp_path / "dog"),
            "object": obj,
            "frames": [0, 1, 2, 3],
            "masks": [encode_rle(mask[t]) for t in range(4)],
        }
        for obj, mask in CLIP.masks.items()
    ]
    dataset = Dataset.from_list([*rows, {**rows[0], "video": str(tmp_path / "cat")}])
    dog, cat = read_rows(dataset)
    assert_masks_are(dog, CLIP, range(4))
    assert sorted(cat.masks(0)) == [1]
    item = ClipDataset(dataset, tiny_processor())[0]
    assert item["masks"].shape == (2, 4, SIDE, SIDE)
    with pytest.raises(ValueError, match="as many masks in row 0"):
        read_rows([{**rows[0], "frames": [0]}])


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
    clips = ClipDataset([empty, gone, small, AnnotatedVideo.from_clip(CLIP)], tiny_processor())
    with caplog.at_level(logging.WARNING):
        item = clips[0]
    assert item["masks"].any()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"Video {number} can't be trained on" for number in range(3)
    ]
    assert "masks of size (20, 20)" in caplog.text
    with pytest.raises(ValueError, match="None of the videos"):
        ClipDataset([empty, small], tiny_processor())[0]
