"""Frames from everything that holds some, read when asked for, and what is said about what holds none."""

import io

import av
import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from hf_iclr.vision.session.frames import StreamedFrames, to_rgb
from hf_iclr.vision.session.videos import open_video
from tests.vision.tiny import clip


VIDEO = clip(5)


def write_video(path, frames, codec="libx264", gop=4, **options) -> str:
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10, options={"g": str(gop), "crf": "10", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


def smooth(frames: int) -> np.ndarray:
    """Frames of one gray value each, which survive a lossy codec: 10, 20, 30, ..."""
    return np.stack([np.full((48, 64, 3), 10 + 10 * number, dtype=np.uint8) for number in range(frames)])


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", smooth(20))


def gray(frame: np.ndarray) -> int:
    """The number of a frame of `smooth`."""
    return round((float(frame.mean()) - 10) / 10)


def png(*frames: np.ndarray, form: str = "png", **options) -> io.BytesIO:
    first, *others = map(Image.fromarray, frames)
    file = io.BytesIO()
    first.save(file, form, **({"save_all": True, "append_images": others, **options} if others else {}))
    file.seek(0)
    return file


@pytest.fixture
def folder(tmp_path):
    for number, frame in enumerate(VIDEO):
        Image.fromarray(frame).save(tmp_path / f"{number + 7}.png")  # 7 .. 11: sorted as numbers, not as text
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


@pytest.mark.parametrize(
    "make",
    [
        lambda: VIDEO,
        lambda: torch.from_numpy(VIDEO),
        lambda: torch.from_numpy(VIDEO).permute(0, 3, 1, 2),
        lambda: VIDEO.astype(np.float32) / 255,
        lambda: list(VIDEO),
        lambda: [Image.fromarray(frame) for frame in VIDEO],
        lambda: {"video": list(VIDEO)},
        lambda: (frame for frame in VIDEO),
        lambda: iter([Image.fromarray(frame) for frame in VIDEO]),
        lambda: VIDEO.astype(np.uint16) << 8,
        lambda: (png(frame).getvalue() for frame in VIDEO),
    ],
    ids=["THWC", "tensor", "TCHW", "floats", "arrays", "images", "row", "generator", "iterator", "16 bits", "bytes"],
)
def test_every_form_gives_the_same_frames(make):
    assert np.array_equal(np.stack(list(open_video(make()))), VIDEO)


def test_a_folder_is_read_in_the_order_of_its_numbers(folder):
    frames = open_video(folder)
    assert frames.num_frames == 5 and frames.source == str(folder)
    assert np.array_equal(np.stack(list(frames)), VIDEO)


def test_rows_of_a_dataset_are_videos(folder):
    files = [str(folder / f"{number}.png") for number in range(7, 12)]
    rows = Dataset.from_dict({"frames": [files]}).cast_column("frames", [ImageFeature()])
    assert np.array_equal(np.stack(list(open_video(rows[0]))), VIDEO)
    undecoded = Dataset.from_dict({"frames": [files]}).cast_column("frames", [ImageFeature(decode=False)])
    assert np.array_equal(np.stack(list(open_video(undecoded[0]))), VIDEO)


def test_bytes_are_an_image_or_a_video(mp4, folder):
    png = (folder / "7.png").read_bytes()
    assert np.array_equal(open_video(png)[0], VIDEO[0]) and open_video({"bytes": png}).num_frames == 1
    with open(mp4, "rb") as file:
        frames = open_video(file.read())
    assert [gray(frame) for frame in frames] == list(range(20)) and frames.source is None


def test_a_single_image_is_one_frame(folder):
    for image in (VIDEO[0], Image.fromarray(VIDEO[0]), folder / "7.png"):
        frames = open_video(image)
        assert frames.num_frames == 1 and np.array_equal(frames[0], VIDEO[0])


@pytest.mark.parametrize("form", ["gif", "webp", "png", "tiff"])
def test_all_frames_of_an_animation_count(form, tmp_path):
    shown = smooth(4)
    options = {"lossless": True} if form == "webp" else {}
    data = png(*shown, form=form, **({} if form == "tiff" else {"duration": 100}), **options).getvalue()
    path = tmp_path / f"animation.{form}"
    path.write_bytes(data)
    for animation in (path, data, io.BytesIO(data), {"bytes": data, "path": None}, Image.open(path)):
        frames = open_video(animation)
        assert [gray(frame) for frame in frames] == [0, 1, 2, 3]
        assert [gray(frames[number]) for number in (3, 0, 2)] == [3, 0, 2]
        assert form in ("tiff", "webp") or frames.rate == pytest.approx(10, rel=0.01)


def test_a_thumbnail_is_no_frame(tmp_path):
    (tmp_path / "a.tif").write_bytes(png(VIDEO[0], VIDEO[0][:12, :20], form="tiff").getvalue())
    frames = open_video(tmp_path / "a.tif")
    assert frames.num_frames == 1 and np.array_equal(frames[0], VIDEO[0])


def test_a_file_that_is_open_is_a_video(mp4, folder):
    with open(mp4, "rb") as file:
        assert [gray(frame) for frame in open_video(file)] == list(range(20))
    with open(folder / "7.png", "rb") as file:
        assert np.array_equal(open_video(file)[0], VIDEO[0])


def test_addresses_of_files_are_files(mp4, folder, tmp_path):
    named = tmp_path / "a b #1%20é.mp4"
    named.write_bytes(open(mp4, "rb").read())  # noqa: SIM115
    assert open_video(named.as_uri()).num_frames == 20 and open_video(folder.as_uri()).num_frames == 5


def test_deep_images_are_scaled_to_eight_bits(tmp_path):
    ramp = np.tile(np.arange(256, dtype=np.uint16) << 8, (4, 1))
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert np.array_equal(open_video(tmp_path / "deep.png")[0][..., 0], ramp >> 8)
    assert np.array_equal(to_rgb(Image.fromarray(ramp.astype(np.float32) / 65280))[..., 0], ramp >> 8)
    with pytest.raises(ValueError, match=r"float frames in 0\.\.1"):
        to_rgb(Image.fromarray(ramp.astype(np.float32)))
    assert to_rgb(torch.full((2, 2, 3), 0.5, dtype=torch.bfloat16))[0, 0, 0] == 128


def test_a_file_is_read_in_any_order(mp4):
    frames = open_video(mp4)
    assert frames.num_frames == 20
    order = [0, 13, 2, 19, 18, 17, 16, 3, 4, 5, 12, 0]
    assert [gray(frames[number]) for number in order] == order
    assert [gray(frames[number]) for number in reversed(range(20))] == list(reversed(range(20)))


def test_a_stream_reads_no_frame_ahead_and_keeps_one():
    taken = []
    frames = StreamedFrames(taken.append(number) or frame for number, frame in enumerate(VIDEO))
    assert not taken
    frames[1]
    assert taken == [0, 1] and frames.position == 1
    with pytest.raises(ValueError, match="can't go back: frame 0 is gone"):
        frames[0]


@pytest.mark.parametrize("count", [2, 4, 5])
def test_gray_videos_are_videos(count):
    gray_video = VIDEO[:count, :, :, 0]
    for form in (gray_video, torch.from_numpy(gray_video)):
        frames = open_video(form)
        assert frames.num_frames == count and np.array_equal(
            frames[1], np.repeat(gray_video[1, :, :, None], 3, axis=2)
        )
    assert open_video(VIDEO[0].transpose(2, 0, 1)).num_frames == 1  # colours first


def test_gray_and_transparent_frames_become_rgb():
    assert np.array_equal(to_rgb(VIDEO[0, :, :, 0]), np.repeat(VIDEO[0, :, :, :1], 3, axis=2))
    rgba = np.concatenate([VIDEO[0], np.full((48, 80, 1), 9, np.uint8)], axis=2)
    for frame in (rgba, Image.fromarray(rgba), rgba.transpose(2, 0, 1)):
        assert np.array_equal(to_rgb(frame), VIDEO[0])


@pytest.mark.parametrize(
    ("video", "sentence"),
    [
        ([], "at least one frame"),
        (np.zeros((0, 4, 4, 3), np.uint8), "at least one frame"),
        (np.zeros((2, 0, 4, 3), np.uint8), "with pixels"),
        (np.zeros((2, 4, 4, 3), np.int64), "uint8"),
        (np.full((2, 4, 4, 3), 2.0), r"float frames in 0\.\.1"),
        (np.zeros((2, 5, 5, 7), np.uint8), "channels"),
        (np.zeros((1, 2, 4, 4, 3), np.uint8), r"got shape \(1, 2, 4, 4, 3\)"),
        ("nowhere.mp4", "There is no video nowhere.mp4"),
        (["nowhere.png"], "Expected an image, got nowhere.png"),
        (png(VIDEO[0]).getvalue()[:900], "read to its end"),
        (b"these bytes are no video", "no video that FFmpeg can read"),
        ({"label": 3}, r"got \['label'\]"),
        ([VIDEO[0], VIDEO[1, :20]], "48 x 80 .height x width. like the first, got 20 x 80 on frame 1"),
    ],
)
def test_what_is_no_video_is_told(video, sentence):
    with pytest.raises(ValueError, match=sentence):
        list(open_video(video))


def test_other_things_are_told(tmp_path):
    with pytest.raises(TypeError, match="Expected a video"):
        open_video(3)
    with pytest.raises(TypeError, match="as a frame, got int"):
        open_video([1, 2])[0]
    with pytest.raises(ValueError, match="Expected images"):
        open_video(tmp_path)
    sound = io.BytesIO()
    with av.open(sound, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match="no video stream"):
        open_video(sound.getvalue())
