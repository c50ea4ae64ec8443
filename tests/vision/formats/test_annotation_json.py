"""Masks as JSON: exact round trips, real files of SA-V, and pycocotools as the judge of COCO."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco
from pycocotools.coco import COCO

from hf_iclr.vision.formats.annotation_json import (
    read_coco,
    read_sav,
    read_ytvis,
    write_coco,
    write_sav,
    write_ytvis,
)
from hf_iclr.vision.session.segments import VideoSegments
from tests.vision.formats.segments import SIZE, masks, same_masks, video
from tests.vision.video_data import VIDEO_DATA, needs_video_data


@needs_video_data
def test_a_file_of_sav_comes_back_as_it_was(tmp_path):
    """Also what is counted: sizes, buckets, visibility changes and first appearances."""
    source = VIDEO_DATA / "sav_000001_manual.json"
    segments, about = read_sav(source)
    assert segments.frames[:3] == [0, 4, 8] and len(segments) == 121 and segments.objects == [0, 1, 2, 3, 4]
    official = json.loads(source.read_text())
    write_sav(segments, tmp_path / "again.json", about)
    assert json.loads((tmp_path / "again.json").read_text()) == official
    others = ("video_id", "video_duration", "video_environment", "video_split", "video_frame_count")
    others += ("masklet_type", "masklet_edited_frame_count", "masklet_stability_score")
    decoded = VideoSegments(segments)
    for frame in decoded:
        frame.masks = {obj: frame.binary(obj) for obj in frame.objects}
    write_sav(decoded, tmp_path / "counted.json", {key: official[key] for key in others})
    assert json.loads((tmp_path / "counted.json").read_text()) == official


@pytest.mark.parametrize("rle", [False, True])
def test_sav_of_any_masks(tmp_path, rle):
    write_sav(video(rle), tmp_path / "park.json")
    again, about = read_sav(tmp_path / "park.json")
    assert same_masks(again, video())
    assert about["video_id"] == "park" and about["masklet_first_appeared_frame"] == [0.0, 2.0]
    assert about["masklet_visibility_changes"] == [0, 0] and about["masklet_size_bucket"] == ["small", "small"]
    assert about["masklet_size_abs"] == [12 * 14 - 6.0, masks(3)[2].sum()]


@pytest.mark.parametrize(
    ("frames", "length", "numbers"),
    [
        (4, 13, [0, 4, 8, 12]),
        (4, 16, [0, 4, 8, 12]),
        (2, 5, [0, 4]),
        (4, 4, [0, 1, 2, 3]),
        (4, 10, [0, 3, 6, 9]),
        (1, 200, [0]),
        (4, 22, [0, 7, 14, 21]),
        (4, 3, None),
        (4, None, None),
    ],
)
def test_which_frames_a_file_of_sav_is_of_follows_from_the_length_of_its_video(tmp_path, frames, length, numbers):
    write_sav(video(numbers=range(frames)), tmp_path / "a.json", {"video_frame_count": length})
    record = json.loads((tmp_path / "a.json").read_text())
    record.pop("masklet_frames", None)
    (tmp_path / "a.json").write_text(json.dumps(record))
    if numbers is None:
        with pytest.raises(ValueError, match="which frames its 4 annotated ones are, .* Pass stride="):
            read_sav(tmp_path / "a.json")
        numbers = [0, 2, 4, 6]
        assert read_sav(tmp_path / "a.json", stride=2)[0].frames == numbers
    else:
        assert read_sav(tmp_path / "a.json")[0].frames == numbers


@pytest.mark.parametrize("frames", [(0, 1, 2, 3), (0, 3), (1, 3), (2,)])
@pytest.mark.parametrize("about", [{}, {"video_frame_count": 300.0}])
def test_frames_of_sav_come_back_with_their_numbers(tmp_path, frames, about):
    write_sav(video(numbers=frames), tmp_path / "a.json", about)
    again, others = read_sav(tmp_path / "a.json")
    assert same_masks(again, video(numbers=frames)) and "masklet_frames" not in others
    record = json.loads((tmp_path / "a.json").read_text()) | {"masklet_frames": [3, 3]}
    (tmp_path / "a.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="which frames"):
        read_sav(tmp_path / "a.json")


@pytest.mark.parametrize("rle", [False, True])
def test_pycocotools_reads_our_coco(tmp_path, rle):
    write_coco({"park": video(rle), "lake": video(rle, numbers=(2,))}, tmp_path / "a.json", {1: "dog"})
    loaded = COCO(tmp_path / "a.json")
    assert [image["file_name"] for image in loaded.loadImgs([1, 5])] == ["park/00000.jpg", "lake/00002.jpg"]
    annotations = loaded.loadAnns(loaded.getAnnIds(imgIds=4))
    for annotation, mask in zip(annotations, masks(3).values(), strict=True):
        assert np.array_equal(loaded.annToMask(annotation), mask) and annotation["area"] == mask.sum()
    assert annotations[0]["bbox"] == [6.0, 4.0, 14.0, 12.0] and annotations[0]["score"] == 0.75
    names = [loaded.loadCats(annotation["category_id"])[0]["name"] for annotation in annotations]
    assert names == ["dog", "object"]
    again = read_coco(tmp_path / "a.json")
    assert same_masks(again["park"], video()) and again["park"][0].objects == [1]
    assert again["park"][3].scores == {1: 0.75, 2: 0.5} and again["lake"].frames == [2]


def test_coco_of_other_tools_has_polygons_and_runs(tmp_path):
    square = [10.0, 5.0, 30.0, 5.0, 30.0, 15.0, 10.0, 15.0]
    runs = {"size": [20, 40], "counts": [0, 20, 780]}
    record = {
        "images": [{"id": 9, "file_name": "x.jpg", "height": 20, "width": 40}],
        "annotations": [{"image_id": 9, "segmentation": s} for s in ([square], runs)],
    }
    (tmp_path / "a.json").write_text(json.dumps(record))
    frame = read_coco(tmp_path / "a.json")["x.jpg"][0]
    expected = np.zeros((20, 40), bool)
    expected[5:15, 10:30] = True
    assert np.array_equal(frame.binary(1), expected)
    assert frame.binary(2)[:, 0].all() and frame.areas[2] == 20


@pytest.mark.parametrize("rle", [False, True])
def test_youtube_vis_keeps_tracks(tmp_path, rle):
    write_ytvis({"park": video(rle), "lake": video(rle, numbers=(1, 3))}, tmp_path / "a.json", {2: "cat"})
    again = read_ytvis(tmp_path / "a.json")
    assert same_masks(again["park"], video()) and same_masks(again["lake"], video(numbers=(1, 3)))
    record = json.loads((tmp_path / "a.json").read_text())
    track = record["annotations"][1]
    assert track["segmentations"][:2] == [None, None] and track["areas"][3] == masks(3)[2].sum()
    assert len(track["bboxes"]) == record["videos"][0]["length"] == 4 and track["score"] == 0.5
    assert [category["name"] for category in record["categories"]] == ["cat", "object"]


def test_trackeval_reads_our_youtube_vis(tmp_path):
    """What its reader does with each mask of the truth: `frPyObjects`, which takes lists of runs and no text."""
    late = video()
    late[0].masks[1] = np.ones(SIZE, bool)
    write_ytvis({"park": late}, tmp_path / "a.json")
    for track, obj in zip(json.loads((tmp_path / "a.json").read_text())["annotations"], (1, 2), strict=True):
        for frame, runs in enumerate(track["segmentations"]):
            if runs:
                rle = coco.frPyObjects(runs, track["height"], track["width"])
                assert np.array_equal(coco.decode(rle), late[frame].binary(obj))
                assert sum(runs["counts"]) == SIZE[0] * SIZE[1]


def test_files_of_ovis_are_numbered_by_place(tmp_path):
    write_ytvis({"park": video()}, tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    record["videos"][0]["file_names"] = [f"park/img_{number + 1:07}.jpg" for number in range(4)]
    (tmp_path / "b.json").write_text(json.dumps(record))
    again = read_ytvis(tmp_path / "b.json")["park"]
    assert again.frames == [0, 1, 2, 3] and np.array_equal(again[3].binary(2), masks(3)[2])


def test_files_without_an_object_or_a_mask(tmp_path):
    record = {"masklet": [[], []], "masklet_id": [], "video_frame_count": 5, "video_height": 4, "video_width": 6}
    (tmp_path / "a.json").write_text(json.dumps(record))
    segments, _ = read_sav(tmp_path / "a.json")
    assert segments.frames == [0, 4] and segments.objects == [] and segments[0].size == (4, 6)
    image = {"id": 9, "file_name": "x.jpg", "height": 20, "width": 40}
    record = {"images": [image], "annotations": [{"image_id": 9, "bbox": [1, 2, 3, 4], "segmentation": []}]}
    (tmp_path / "b.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="segmentation is empty"):
        read_coco(tmp_path / "b.json")


def test_categories_are_those_that_objects_have(tmp_path):
    for write in (write_coco, write_ytvis):
        write({"park": video()}, tmp_path / "a.json", {1: "dog", 2: "cat"})
        record = json.loads((tmp_path / "a.json").read_text())
        assert [category["name"] for category in record["categories"]] == ["cat", "dog"]
        assert {annotation["category_id"] for annotation in record["annotations"]} == {1, 2}


def test_files_of_another_kind_get_a_sentence(tmp_path):
    write_coco({"park": video()}, tmp_path / "a.json")
    with pytest.raises(ValueError, match="Expected masklet, masklet_id in"):
        read_sav(tmp_path / "a.json")
    with pytest.raises(ValueError, match="Expected videos, annotations in"):
        read_ytvis(tmp_path / "a.json")
    with pytest.raises(ValueError, match="at least one object"):
        write_sav(VideoSegments([]), tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists() and SIZE == video()[0].size
