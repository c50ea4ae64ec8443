"""Folders of masks: what is written can be read again, and other tools read it."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hf_iclr.vision.formats.mask_folders import (
    read_davis,
    read_labels,
    read_object_folders,
    read_yolo,
    read_youtube_vos,
    save_labels,
    write_davis,
    write_object_folders,
    write_yolo,
    write_youtube_vos,
)
from hf_iclr.vision.formats.segment_files import PALETTE, given_segments
from hf_iclr.vision.session.segments import VideoSegments
from tests.vision.formats.segments import SIZE, masks, same_masks, video
from tests.vision.video_data import VIDEO_DATA, needs_video_data


def without_overlap() -> VideoSegments:
    """The second object cut off where the first one is."""
    frames = video()
    for frame in frames:
        frame.masks[2] = frame.masks[2] & ~frame.masks[1]
    return frames


@pytest.mark.parametrize("rle", [False, True])
def test_davis_keeps_all_but_overlaps(tmp_path, rle):
    write_davis(iter(video(rle)), tmp_path / "clip")
    assert [file.name for file in sorted((tmp_path / "clip").iterdir())] == [f"{n:05}.png" for n in range(4)]
    image = Image.open(tmp_path / "clip" / "00003.png")
    assert image.mode == "P" and image.getpalette()[:12] == PALETTE[:4].ravel().tolist()
    first, second = masks(3).values()
    assert np.array_equal(np.asarray(image), np.where(first, 1, np.where(second, 2, 0)))
    again = read_davis(tmp_path / "clip")
    assert same_masks(again, without_overlap())
    assert again[0].visible == {1: True, 2: False} and again[0].scores[1] == 1.0


def test_gray_masks_of_davis_2016_and_void(tmp_path):
    labels = np.zeros(SIZE, np.uint8)
    labels[3:9, 3:9] = 255
    Image.fromarray(labels).save(tmp_path / "00000.png")
    assert np.array_equal(read_davis(tmp_path)[0].masks[1], labels > 0)
    labels[10:12] = 2
    Image.fromarray(labels).save(tmp_path / "00000.png")
    assert read_davis(tmp_path).objects == [2]  # beside other numbers, 255 is void
    Image.new("RGB", SIZE).save(tmp_path / "00000.png")
    with pytest.raises(ValueError, match="palette or gray PNG"):
        read_davis(tmp_path)


@needs_video_data
def test_a_sequence_of_davis():
    annotated = read_davis(VIDEO_DATA / "davis" / "Annotations" / "480p" / "libby")
    assert annotated.frames == list(range(49)) and annotated.objects == [1] and annotated[0].size == (480, 854)


def test_object_folders_keep_overlaps(tmp_path):
    write_object_folders(iter(video()), tmp_path / "clip")
    assert (tmp_path / "clip" / "002" / "00003.png").exists()
    again = read_object_folders(tmp_path / "clip")
    assert same_masks(again, video()) and again[0].objects == [1, 2]


def test_youtube_vos_keeps_names_and_first_frames(tmp_path):
    late = VideoSegments(list(without_overlap())[1:])
    for frame in late:
        if frame.frame < 2:
            del frame.masks[2]
    write_youtube_vos({"a": without_overlap(), "b": late}, tmp_path / "out", {1: "dog"})
    again = read_youtube_vos(tmp_path / "out")
    assert list(again) == ["a", "b"] and same_masks(again["a"], without_overlap()) and same_masks(again["b"], late)
    assert again["a"][1].objects == [1] and again["a"][2].objects == [1, 2]
    text = (tmp_path / "out" / "meta.json").read_text()
    assert '"2": {"category": "object", "frames": ["00002", "00003"]}' in text and '"category": "dog"' in text


@pytest.mark.parametrize("rle", [False, True])
def test_yolo_keeps_holes_and_pieces(tmp_path, rle):
    write_yolo(iter(video(rle)), tmp_path / "labels")
    again = read_yolo(tmp_path / "labels", SIZE)
    assert same_masks(again, video()) and again[1].objects == [1]
    lines = (tmp_path / "labels" / "00003.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1"]
    shares = np.array(lines[0].split()[1:], float)
    assert shares.min() >= 0 and shares.max() <= 1
    assert (tmp_path / "labels" / "classes.txt").read_text() == "object 1\nobject 2\n"


@pytest.mark.parametrize("shape", ["disc", "thin", "ring", "pieces", "edges", "pixel"])
def test_other_readers_of_yolo_get_the_mask(tmp_path, shape):
    """As supervision and ultralytics do it: times width and height, cut to whole pixels, filled with the border."""
    y, x = np.mgrid[:60, :90]
    far = np.hypot(x - 40, y - 30)
    mask = {
        "disc": far < 20,
        "thin": (abs(x - 40) < 2) | (y == 11) & (x > 5),
        "ring": (far < 25) & (far > 12),
        "pieces": (far < 25) & (abs(x - 40) > 3),
        "edges": (x < 20) | (y > 50) | (x > 85),
        "pixel": (x == 89) & (y == 59),
    }[shape]
    write_yolo([given_segments(0, mask.shape, {3: mask})], tmp_path / "labels", {3: "a"})
    assert np.array_equal(read_yolo(tmp_path / "labels", mask.shape)[0].masks[1], mask)
    (line,) = (tmp_path / "labels" / "00000.txt").read_text().splitlines()
    points = (np.array(line.split()[1:], np.float32).reshape(-1, 2) * np.array([90, 60])).astype(int)
    canvas = Image.new("1", (90, 60))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in points.tolist()], fill=1, outline=1)
    read = np.asarray(canvas)
    assert (read & mask).sum() / (read | mask).sum() > (0.99 if shape == "pieces" else 0.9999)


def test_a_yolo_line_of_another_tool_is_filled(tmp_path):
    (tmp_path / "00007.txt").write_text("4 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\n")
    expected = np.zeros((20, 40), bool)
    expected[5:15, 10:30] = True
    assert np.array_equal(read_yolo(tmp_path, (20, 40))[7].masks[5], expected)
    (tmp_path / "00007.txt").write_text("4 0.25 0.25 0.75\n")
    with pytest.raises(ValueError, match="three pairs of x and y"):
        read_yolo(tmp_path, (20, 40))


def test_classes_by_their_names(tmp_path):
    write_yolo(video(), tmp_path / "labels", {1: "dog", 2: "cat"})
    lines = (tmp_path / "labels" / "00003.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["1", "0"]
    assert (tmp_path / "labels" / "classes.txt").read_text() == "cat\ndog\n"


def test_what_is_not_there_gets_a_sentence(tmp_path):
    for read in (read_davis, read_object_folders):
        with pytest.raises(ValueError, match="Expected .* got none"):
            read(tmp_path)
    with pytest.raises(ValueError, match="Expected .* got none"):
        read_yolo(tmp_path / "none", SIZE)


def test_nothing_half_written_is_left(tmp_path):
    frames = video()
    frames[3].masks[300] = frames[3].masks.pop(2)
    with pytest.raises(ValueError, match=r"1\.\.254.*got 300"):
        write_davis(frames, tmp_path / "clip")
    assert not list(tmp_path.iterdir())


def test_void_is_an_object_in_plain_black_and_white_alone(tmp_path):
    """In gray 255 is object 1 where no other number is; in a palette it is void in any case."""
    labels = np.zeros(SIZE, np.uint8)
    labels[:4], labels[8:10] = 255, 1
    Image.fromarray(labels).save(tmp_path / "gray.png")
    assert np.array_equal(read_labels(tmp_path / "gray.png"), labels == 1)
    labels[8:10] = 0
    save_labels(labels, tmp_path / "palette.png")
    assert not read_labels(tmp_path / "palette.png").any()
    Image.fromarray(labels > 0).save(tmp_path / "bits.png")
    assert np.array_equal(read_labels(tmp_path / "bits.png"), labels > 0)
