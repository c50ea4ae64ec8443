"""Annotated videos in every form that training and evaluations take."""

from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset
from PIL import Image

from hf_iclr.vision.annotation.store import FEATURES, AnnotationStore
from hf_iclr.vision.evaluation.procedural_clips import procedural_clip
from hf_iclr.vision.formats.annotated_video import AnnotatedVideo, to_annotated
from hf_iclr.vision.formats.annotated_videos import (
    read_png_videos,
    read_rows,
    read_sav_videos,
    read_videos,
)
from hf_iclr.vision.formats.annotation_json import read_sav, write_sav
from hf_iclr.vision.formats.mask_folders import write_davis
from hf_iclr.vision.session.prompts import encode_rle, to_boolean_mask
from hf_iclr.vision.training.clip_dataset import ClipDataset
from tests.vision.formats.segments import SIZE, masks, video
from tests.vision.tiny import SIDE, tiny_processor
from tests.vision.training.test_clip_dataset import segments_of, write_images
from tests.vision.video_data import VIDEO_DATA, needs_video_data


CLIP = procedural_clip(0, frames=6, size=48)
FRAMES = np.zeros((4, *SIZE, 3), np.uint8)
MASKS = {obj: np.stack([masks(number)[obj] for number in range(4)]) for obj in (1, 2)}


def assert_masks_are(video: AnnotatedVideo, clip, frames):
    assert list(video.frames) == list(frames)
    for frame in frames:
        masks = video.masks(frame)
        for obj, mask in clip.masks.items():
            known = to_boolean_mask(masks[obj]) if obj in masks else np.zeros_like(mask[frame])
            assert np.array_equal(known, mask[frame])


@pytest.mark.parametrize(
    ("clip", "name"),
    [
        (AnnotatedVideo.from_masks(FRAMES, MASKS, name="park"), "park"),
        ((FRAMES, MASKS), "clip 7"),
        ({"video": FRAMES, "masks": {"1": MASKS[1], "2": [encode_rle(mask) for mask in MASKS[2]]}}, "clip 7"),
        (SimpleNamespace(frames=FRAMES, masks=MASKS), "clip 7"),
        (AnnotatedVideo.from_segments(FRAMES, video(rle=True), "lake"), "lake"),
    ],
)
def test_every_form_is_the_same_video(clip, name):
    clip = to_annotated(clip, 7)
    frames, masks = clip.load()
    assert clip.name == name and list(clip.frames) == [0, 1, 2, 3] and frames.num_frames == 4
    assert all(np.array_equal(masks[obj], MASKS[obj]) for obj in (1, 2))


def test_every_fourth_frame_of_sav(tmp_path):
    write_sav(video(), tmp_path / "a.json")
    segments, _ = read_sav(tmp_path / "a.json", stride=4)
    clip = AnnotatedVideo.from_segments(np.zeros((13, *SIZE, 3), np.uint8), segments)
    masks = clip.load()[1]
    assert clip.frames == [0, 4, 8, 12] and masks[2].any(axis=(1, 2)).argmax() == 2


@needs_video_data
def test_a_folder_of_davis():
    (clip,) = read_videos(VIDEO_DATA / "davis")
    frames, masks = clip.load()
    assert clip.name == "car-shadow" and masks[1].shape == (40, 480, 854) and frames.num_frames == 40


def test_folders_of_davis_are_read_where_both_images_and_masks_are(tmp_path):
    write_images(tmp_path / "JPEGImages" / "dog", CLIP)
    write_images(tmp_path / "JPEGImages" / "cat", CLIP)
    (tmp_path / "Annotations").mkdir()
    write_davis(segments_of(CLIP, [1, 2, 3, 5]), tmp_path / "Annotations" / "dog")
    for folder, suffix in ((tmp_path / "JPEGImages" / "dog", ".JPG"), (tmp_path / "Annotations" / "dog", ".png")):
        for file in sorted(folder.iterdir(), reverse=True):  # as cameras name them
            file.rename(folder / f"img_{int(file.stem) + 7}{suffix}")
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


def test_masklets_of_any_frames_lie_where_they_were_seen(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    for frames in (range(6), [1, 2, 5], [0], [3]):
        write_sav(segments_of(CLIP, frames), tmp_path / "a_manual.json")
        (video,) = read_sav_videos(tmp_path)
        assert_masks_are(video, CLIP, frames)


def test_a_video_without_objects_is_a_file_that_can_be_read(tmp_path):
    """Also as it was written before, with a group of no rows, on which `load_dataset` dies."""
    write_images(tmp_path / "dog", CLIP)
    store = AnnotationStore(tmp_path / "out", {})
    rows = [
        dict.fromkeys(FEATURES) | {"video": str(tmp_path / "dog"), "name": "dog", "object": 1, "status": "accepted"}
        | {"frames": [0, 1], "masks": [encode_rle(mask) for mask in CLIP.masks[1][:2]]}
    ]  # fmt: skip
    for name, masklets in (("a", []), ("b", rows)):
        store.write(name, masklets)
    files = sorted(str(file) for file in (tmp_path / "out" / "shards").glob("*.parquet"))
    assert load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))["name"] == [
        "dog"
    ]
    pq.write_table(FEATURES.arrow_schema.empty_table(), tmp_path / "out" / "shards" / "c.parquet")
    out = (tmp_path / "out").rename(tmp_path / "out [720p]")  # no pattern
    (video,) = read_videos(out)
    assert list(video.frames) == [0, 1] and np.array_equal(to_boolean_mask(video.masks(1)[1]), CLIP.masks[1][1])
    (out / "shards" / "b.parquet").unlink()
    with pytest.raises(ValueError, match="Expected accepted masklets"):
        read_videos(out)


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
    decided = [{**row, "status": status} for row, status in zip(rows, ("rejected", "accepted"), strict=True)]
    (video,) = read_rows(decided)
    assert sorted(video.masks(0)) == [2]
    with pytest.raises(ValueError, match="at least one accepted masklet to train on, got none in 1 rows"):
        ClipDataset(decided[:1], tiny_processor())
    with pytest.raises(ValueError, match="Row 0 has no video, for it was annotated in memory"):
        read_rows([{**rows[0], "video": None}])


@pytest.mark.parametrize(
    ("clip", "error", "words"),
    [
        (7, TypeError, "got int"),
        ((FRAMES, [MASKS[1]]), TypeError, "masks by object"),
        ((FRAMES, {}), ValueError, "at least one object"),
        ((FRAMES, {1: []}), ValueError, "at least one object"),
        ((FRAMES, {1: MASKS[1], 2: MASKS[2][1:]}), ValueError, "Expected 4 masks of each object in clip 0"),
        ((FRAMES[1:], MASKS), ValueError, "at least 4 frames"),
        ((FRAMES[:, 1:], MASKS), ValueError, r"size \(23, 37\)"),
        ((iter(FRAMES), MASKS), ValueError, "only once"),
    ],
)
def test_bad_clips_get_a_sentence(clip, error, words):
    with pytest.raises(error, match=words):
        to_annotated(clip).load()
