"""Overlays: what is drawn, that files can be read again, and that they are written frame by frame."""

import itertools

import numpy as np
import pytest
from PIL import Image

from hf_iclr.vision.formats.overlay import draw_overlay, write_overlay
from hf_iclr.vision.formats.segment_files import PALETTE
from hf_iclr.vision.session.videos import open_video
from tests.vision.formats.segments import SIZE, masks, video
from tests.vision.tiny import clip, tiny_pipe


FRAMES = np.full((4, *SIZE, 3), 100, np.uint8)


@pytest.mark.parametrize("rle", [False, True])
def test_masks_are_tinted_outlined_and_nothing_else_changes(rle):
    drawn = draw_overlay(FRAMES[3], video(rle)[3])
    first, second = masks(3).values()
    assert (drawn[~first & ~second] == 100).all() and (FRAMES == 100).all()
    assert drawn[6, 8].tolist() == [114, 50, 50] and drawn[4, 8].tolist() == PALETTE[1].tolist()
    assert drawn[21, 33].tolist() == [50, 114, 50]
    assert drawn[12, 15].tolist() == [57, 89, 25]  # the second over the first


def test_transparent_masks_leave_outlines():
    drawn = draw_overlay(FRAMES[0], video()[0], alpha=0)
    assert drawn[6, 6].tolist() == [100] * 3 and drawn[4, 6].tolist() == PALETTE[1].tolist()


@pytest.mark.parametrize("name", ["a.mp4", "a.GIF"])
def test_a_video_can_be_read_again(tmp_path, name):
    write_overlay(FRAMES, iter(video()), tmp_path / name, rate=12.5)
    written = open_video(str(tmp_path / name))
    shown = np.stack(list(written)).astype(int)
    assert shown.shape == ((4, 24, 38, 3) if name == "a.mp4" else (4, *SIZE, 3))
    expected = np.stack([draw_overlay(image, frame) for image, frame in zip(FRAMES, video(), strict=True)])
    error = np.abs(shown[:, :, : SIZE[1]] - expected)
    assert error.mean() < 8 if name == "a.mp4" else error.max() == 0
    assert float(written._stream.average_rate) == 12.5 and len(list(tmp_path.iterdir())) == 1


def test_a_gif_plays_in_pillow(tmp_path):
    write_overlay(FRAMES, video(), tmp_path / "a.gif", rate=10)
    image = Image.open(tmp_path / "a.gif")
    assert image.n_frames == 4 and image.info["duration"] == 100


def test_frames_and_masks_are_read_one_by_one(tmp_path):
    """A stream of the pipeline and its own camera: never more than a few frames apart."""
    video_frames = clip(5)
    read: list[int] = []

    def camera():
        for number, frame in enumerate(video_frames):
            read.append(number)
            yield frame

    ours, theirs = itertools.tee(camera())
    done = []

    def stream():
        for segments in tiny_pipe().stream(ours, prompts={0: {1: {"points": [[20, 20]]}}}):
            done.append(max(read))
            yield segments

    write_overlay(theirs, stream(), tmp_path / "a.mp4")
    assert done == [0, 1, 2, 3, 4] and open_video(str(tmp_path / "a.mp4")).num_frames == 5


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("a.avi", {}, "ends with .mp4 or .gif"),
        ("a.mp4", {"rate": 0}, "rate above 0"),
        ("a.mp4", {"alpha": 2}, "alpha in 0..1"),
    ],
)
def test_bad_options_get_a_sentence(tmp_path, name, options, words):
    with pytest.raises(ValueError, match=words):
        write_overlay(FRAMES, video(), tmp_path / name, **options)


@pytest.mark.parametrize("segments", [[], video(numbers=(3, 4))])
def test_nothing_half_written_is_left(tmp_path, segments):
    """Without masks, and with masks of a frame that is not there."""
    with pytest.raises(ValueError, match="at least one frame|there is no frame 4"):
        write_overlay(FRAMES, segments, tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())
