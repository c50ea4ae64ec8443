"""Streams: prompts that wait, bad frames, corrections without end, and going on after a stop."""

import numpy as np
import pytest

from hf_iclr.vision.session.session import VideoSession
from tests.vision.session.test_memory import kept_bytes
from tests.vision.tiny import clip, near_pipe


VIDEO = clip(14)
CLICK = {"points": [[20, 20]]}
BOX = {"box": [40, 5, 70, 40]}


def opened(frames, **options) -> VideoSession:
    return near_pipe().session(iter(frames), output="logits", **options)


def rest(session: VideoSession, count: int | None = None) -> dict[int, dict[int, np.ndarray]]:
    return {segments.frame: segments.masks for segments in session.iterate(max_frames=count)}


def equal(left, right) -> bool:
    return left.keys() == right.keys() and all(
        left[frame].keys() == right[frame].keys()
        and all(np.abs(mask - right[frame][obj]).max() < 1e-4 for obj, mask in left[frame].items())
        for frame in left
    )


@pytest.mark.parametrize(
    "bad", [VIDEO[0, :20], None, np.zeros((48, 80, 2), np.uint8)], ids=["size", "none", "channels"]
)
def test_a_bad_frame_is_told_once_and_passed_over(bad):
    session = opened([*VIDEO[:3], bad, *VIDEO[4:]])
    session.add(0, 1, **CLICK)
    session.add(3, 2, **BOX)
    shown = rest(session, 3)
    with pytest.raises((ValueError, TypeError)):
        rest(session)
    shown |= rest(session)
    assert sorted(shown) == [0, 1, 2, *range(4, 14)]
    assert session.prompts.describe() == "frame 0: object 1 by 1 point\nframe 4: object 2 by a box"
    clean = opened([*VIDEO[:3], *VIDEO[4:]])
    clean.add(0, 1, **CLICK)
    expected = rest(clean, 4)
    # Of the frames around it only the distance to it changes.
    assert all(np.array_equal(shown[frame][1], expected[frame][1]) for frame in range(3))
    assert not np.array_equal(shown[4][1], expected[3][1]) and set(shown[4]) == {1, 2}


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_a_failure_of_the_camera_itself_takes_no_frame(error):
    class Camera:
        def __init__(self):
            self.frames, self.fails = iter(VIDEO[:6]), iter([False, False, False, True, False, False, False, False])

        def __iter__(self):
            return self

        def __next__(self):
            if next(self.fails):
                raise error("unplugged")
            return next(self.frames)

    session, clean = opened(Camera()), opened(VIDEO[:6])
    for one in (session, clean):
        one.add(0, 1, **CLICK)
    shown = rest(session, 3)
    with pytest.raises(error, match="unplugged"):
        rest(session)
    assert equal(shown | rest(session), rest(clean)) and session.frames.position == 5


def test_a_first_frame_that_is_none_is_passed_over():
    session = opened([None, *VIDEO[1:4]])
    with pytest.raises(TypeError):
        rest(session)
    assert list(rest(session)) == [1, 2, 3]


def test_a_bad_waiting_prompt_is_told_when_it_is_given_and_the_others_stay():
    session = opened(VIDEO)
    session.add(0, 1, **CLICK)
    session.add(3, 2, **BOX)
    with pytest.raises(ValueError, match=r"x in 0\.\.80"):
        session.add(3, 3, points=[[500, 3]])
    with pytest.raises(ValueError, match="frame's size"):
        session.add(3, 4, mask=np.ones((4, 4), bool))
    assert list(rest(session)[3]) == [1, 2]


def test_a_failure_of_the_model_keeps_the_prompts_that_wait(monkeypatch):
    session = opened(VIDEO)
    session.add(0, 1, **CLICK)
    session.add(2, 2, **BOX)
    rest(session, 2)
    monkeypatch.setattr(session.model.mask_decoder, "forward", lambda **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rest(session)
    monkeypatch.undo()
    assert session.prompts.describe() == "frame 0: object 1 by 1 point\nframe 2: object 2 by a box"
    assert list(rest(session)[2]) == [1, 2]


def test_waiting_prompts_can_be_taken_back():
    session = opened(VIDEO)
    session.add(0, 1, **CLICK)
    session.add(3, 2, **BOX)
    session.add(4, 3, **BOX)
    session.add(5, 4, **BOX)
    session.undo()
    session.add(4, 4, **BOX)
    session.clear(4, 4)  # and the other one goes on waiting there
    session.clear(3, 2)
    session.remove_object(3)
    assert session.prompts.describe() == "frame 0: object 1 by 1 point"
    session.undo()
    assert session.prompts.describe() == "frame 0: object 1 by 1 point\nframe 4: object 3 by a box"
    assert list(rest(session)[4]) == [1, 3]


def test_moments_that_are_gone_are_told():
    session = opened(VIDEO)
    session.add(0, 1, **CLICK)
    rest(session, 3)
    with pytest.raises(ValueError, match="A stream goes forward"):
        session.propagate("both")
    with pytest.raises(ValueError, match="can't go back"):
        session.add(0, 3, **CLICK)


@pytest.mark.parametrize("seen", [0, 1, 6])
def test_a_saved_stream_goes_on_where_it_was(tmp_path, seen):
    def prompted(camera):
        session = near_pipe().session(camera, output="logits")
        session.add(0, 1, **CLICK)
        session.add(8, 2, **BOX)
        session.add(10, 1, points=[[60, 30]])
        return session

    expected = rest(prompted(iter(VIDEO)))
    camera = iter(VIDEO)
    session = prompted(camera)
    shown = rest(session, seen)
    session.save(tmp_path / "state")
    again = VideoSession.load(near_pipe(), tmp_path / "state", video=camera)
    assert again.prompts == session.prompts and again.size == (48, 80)
    if seen:  # the latest frame can still be corrected
        left, right = (s.correct(seen - 1, 1, points=[[60, 30]]).masks[1] for s in (session, again))
        assert np.array_equal(left, right)
        again.undo()
    assert equal(shown | rest(again), expected)


def test_a_stream_that_has_seen_a_bad_frame_is_saved(tmp_path):
    camera = iter([*VIDEO[:3], None, *VIDEO[4:]])
    session = near_pipe().session(camera)
    session.add(0, 1, **CLICK)
    rest(session, 3)
    with pytest.raises(TypeError):
        rest(session)
    session.save(tmp_path / "state")
    assert list(rest(VideoSession.load(near_pipe(), tmp_path / "state", video=camera))) == list(range(4, 14))


def corrected_sizes(frames: int, every: int, **options) -> list[int]:
    """Bytes kept after each frame of a stream that is corrected again and again."""
    video, sizes = clip(14), []
    session = opened((video[number % 14] for number in range(frames)), undo_levels=0, **options)
    session.add(0, 1, **CLICK)
    for segments in session.iterate():
        if segments.frame % every == every - 1:
            session.correct(segments.frame, 1, points=[[30, 20]])
        sizes.append(kept_bytes(session))
        assert len(session._prompts) <= 12 and len(session._corrected) <= 12
    return sizes


def test_a_stream_with_corrections_is_flat():
    sizes = corrected_sizes(40, 2)
    assert max(sizes[30:]) == max(sizes[22:30])  # eight conditioning frames are there after frame 16
    assert max(corrected_sizes(20, 2, max_cond_frames=2)) < max(sizes)


@pytest.mark.slow
def test_a_stream_of_2000_frames_with_corrections_is_flat():
    sizes = corrected_sizes(2000, 10)
    assert max(sizes[1900:]) == max(sizes[100:200])
