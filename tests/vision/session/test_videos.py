"""Video files of every kind give, in any order, the frames that a plain decoder gives."""

import functools
import io
import os
import random
import socket
import struct
import tempfile
import threading
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from hf_iclr.vision.session.frames import StreamedFrames
from hf_iclr.vision.session.videos import open_video
from tests.vision.session.test_frames import smooth, write_video


COUNT = 60
GOP = {"g": "12"}
REORDERED = {**GOP, "bf": "2"}
# name -> codec, container, options, pixel format; made from it: trimmed, turned, varying
KINDS = {
    "mp4": ("libx264", "mp4", {**GOP, "bf": "0"}),
    "mp4_b_frames": ("libx264", "mp4", REORDERED),
    "mp4_open_gop": ("libx264", "mp4", {**REORDERED, "x264-params": "open-gop=1"}),
    "mp4_hevc": ("libx265", "mp4", GOP),
    "mp4_trimmed": ("libx264", "mp4", REORDERED),
    "mkv": ("libx264", "matroska", REORDERED),
    "webm": ("libvpx-vp9", "webm", GOP),
    "avi_h264": ("libx264", "avi", REORDERED),
    "avi_mpeg4": ("mpeg4", "avi", REORDERED),
    "ts": ("libx264", "mpegts", REORDERED),
    "ts_trimmed": ("libx264", "mpegts", REORDERED),
    "ps": ("mpeg2video", "vob", REORDERED),
    "ps_mpeg1": ("mpeg1video", "mpeg", GOP),
    "ps_dvd": ("mpeg2video", "dvd", {"g": "5", "bf": "2"}),
    "ts_mpeg2": ("mpeg2video", "mpegts", GOP),
    "flv": ("libx264", "flv", REORDERED),
    "wmv": ("wmv2", "asf", GOP),
    "raw_h264": ("libx264", "h264", REORDERED),
    "raw_mjpeg": ("mjpeg", "mjpeg", {}),
    "mov_turned": ("libx264", "mov", REORDERED),
    "gif": ("gif", "gif", {}),
    "avi_mjpeg": ("mjpeg", "avi", {}),
    "mp4_varying_rate": ("libx264", "mp4", REORDERED),
}
FORMATS = {"mjpeg": "yuvj420p", "gif": "rgb8"}


@functools.cache
def pictures(count: int = COUNT, noise: int = 0) -> list[np.ndarray]:
    """A gray that grows by 3 a frame, with a patch at the top left; noise makes files large."""
    shown = []
    for number in range(count):
        picture = np.full((48, 64, 3), 10 + 3 * number, np.int64)
        picture += np.random.default_rng(number).integers(-noise, noise + 1, picture.shape)
        picture[4:12, 4:20] = (250, 30, 30)
        shown.append(picture.clip(0, 255).astype(np.uint8))
    return shown


@functools.cache
def film(kind: str, count: int, noise: int) -> bytes:
    """A film of a kind in 24 frames a second; frame 30 is shown for half a second where the rate varies."""
    codec, container, options = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "film")
        with av.open(str(path), "w", format=container) as file:
            threads = {"threads": "1", "x265-params": "log-level=none"}
            stream = file.add_stream(codec, rate=24, options={**threads, **options})
            stream.width, stream.height, stream.pix_fmt = 64, 48, FORMATS.get(codec, "yuv420p")
            for number, picture in enumerate(pictures(count, noise)):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                if kind == "mp4_varying_rate":
                    frame.pts = number + 11 * (number > 30)
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
        if kind.endswith("trimmed"):
            trim(path, container)
        if kind == "mov_turned":
            turn(path, (0, 1, -1, 0))
        return path.read_bytes()


def write(path, kind: str, count: int = COUNT, noise: int = 0) -> str:
    path.write_bytes(film(kind, count, noise))
    return str(path)


def trim(path, container: str) -> None:
    """Copies a stream from frame 17 on, as `ffmpeg -ss ... -c copy` does: with an edit list, or from amid a group."""
    whole = io.BytesIO(path.read_bytes())
    with av.open(whole) as source, av.open(str(path), "w", format=container) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        start = int(17 / 24 / stream.time_base)
        for number, packet in enumerate(source.demux(stream)):
            if packet.dts is None or (number < 12 if container == "mp4" else number < 5):
                continue
            if container == "mp4":
                packet.pts, packet.dts = packet.pts - start, packet.dts - start
            packet.stream = copy
            target.mux(packet)


def turn(path, matrix: tuple[int, int, int, int]) -> None:
    """Writes a, b, c, d of the display matrix: x is shown at a x + c y, and y at b x + d y."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def plain_decode(path) -> list[np.ndarray]:
    """What a loop over packets gives that goes on after errors."""
    frames = []
    with av.open(str(path)) as file:
        try:
            for packet in file.demux(video=0):
                try:
                    frames += [frame.to_ndarray(format="rgb24") for frame in packet.decode()]
                except av.error.FFmpegError:
                    pass
        except av.error.FFmpegError:
            pass
    return frames


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_frames_of_a_plain_decode_in_any_order(kind, tmp_path):
    path = write(tmp_path / "film", kind)
    expected = plain_decode(path)
    assert len(expected) == (COUNT if "trimmed" not in kind else len(expected)) and len(expected) > 40
    if kind == "mov_turned":
        expected = [np.rot90(frame, -1) for frame in expected]
    frames = open_video(path)
    assert frames.num_frames == len(expected)
    assert [np.array_equal(*pair) for pair in zip(frames, expected, strict=True)] == [True] * len(expected)
    backward = range(len(expected) - 1, -1, -1)
    jumps = random.Random(0).choices(range(len(expected)), k=30)
    for order in (backward, [len(expected) - 1, *jumps], jumps):
        as_bytes = order is jumps and kind != "raw_mjpeg"  # whose bytes begin as those of a picture
        video = open_video((tmp_path / "film").read_bytes() if as_bytes else path)
        assert all(np.array_equal(video[number], expected[number]) for number in order)
        assert video.damage is None and video.num_frames == len(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rate_and_times(kind, tmp_path):
    frames = open_video(write(tmp_path / "film", kind))
    grid = {"gif": 0.01}.get(kind, 0.001)
    raw_default = 25 if kind in ("raw_mjpeg", "gif") else 24  # raw JPEGs know no rate
    assert frames.rate == pytest.approx(raw_default, rel=0.2 if kind == "mp4_varying_rate" else 0.01)
    late = 12 * 11 / 12 if kind == "mp4_varying_rate" else 0
    step = 1 / (25 if kind == "raw_mjpeg" else 24)
    assert [frames.time(number) for number in (40, 0, 7)] == pytest.approx(
        [(40 + late) * step, 0, 7 * step], abs=1.01 * grid
    )


def test_frames_without_times_are_read_in_any_order(tmp_path):
    """Times below zero are lost in Matroska."""
    path = tmp_path / "early.mkv"
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as file:
        stream = file.add_stream("libx264", rate=24, options={"threads": "1", **REORDERED})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number, picture in enumerate(pictures(20)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number - 10
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    expected = plain_decode(path)
    assert [np.array_equal(*pair) for pair in zip(open_video(path), expected, strict=True)] == [True] * len(expected)
    video = open_video(path)
    assert all(np.array_equal(video[number], expected[number]) for number in reversed(range(len(expected))))
    assert video.time(12) == pytest.approx(0.5)


def test_what_is_no_file_has_no_times():
    frames = open_video(smooth(3))
    assert frames.rate is None and frames.time(2) is None


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), lambda frame: frame),
        ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),
        ((-1, 0, 0, -1), lambda frame: np.rot90(frame, 2)),
        ((0, -1, 1, 0), lambda frame: np.rot90(frame, 1)),
        ((-1, 0, 0, 1), np.fliplr),
        ((0, 1, 1, 0), lambda frame: frame.transpose(1, 0, 2)),
    ],
    ids=["upright", "right", "upside down", "left", "mirrored", "mirrored and turned"],
)
def test_frames_are_shown_as_the_display_matrix_says(matrix, shown, tmp_path):
    path = tmp_path / "phone.mp4"
    write(path, "mp4", 3)
    lying = plain_decode(path)
    turn(path, matrix)
    frames = open_video(path)
    assert np.array_equal(frames[1], shown(lying[1])) and frames.size == shown(lying[1]).shape[:2]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(pictures(1)[0])
    image.save(tmp_path / "a.png", exif=exif)
    # Where the first row and the first column of an image are to be shown, as the standard's table has it.
    row, column = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "lt", 6: "rt", 7: "rb", 8: "lb"}[orientation]
    sides = {(row, column)}
    frame = open_video(tmp_path / "a.png")[0]
    assert frame.shape == ((48, 64, 3) if orientation < 5 else (64, 48, 3))
    ys, xs = np.nonzero(frame[..., 0].astype(int) - frame[..., 1] > 100)
    corner = {("t" if ys.mean() < frame.shape[0] / 2 else "b"), ("l" if xs.mean() < frame.shape[1] / 2 else "r")}
    assert {*sides.pop()} == corner
    opened = Image.open(tmp_path / "a.png")
    for form in ((tmp_path / "a.png").read_bytes(), opened, [opened], tmp_path):
        assert np.array_equal(open_video(form)[0], frame)


@pytest.mark.parametrize("place", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("kind", ["mp4_b_frames", "mp4_hevc", "mkv", "avi_mpeg4", "avi_h264", "ts", "ps"])
def test_after_damage_decoding_goes_on_and_it_is_told(kind, place, tmp_path, caplog):
    path = tmp_path / "film"
    write(path, kind, 80, 90)
    data, dice = bytearray(path.read_bytes()), random.Random(0)
    assert len(data) > 15_000
    start = int(place * len(data))
    data[start : start + 5000] = bytes(dice.randrange(256) for _ in range(5000))
    path.write_bytes(data)
    expected = plain_decode(path)
    assert len(expected) > 50
    frames = open_video(path)
    found = list(frames)
    assert len(found) == len(expected) == frames.num_frames
    # What stands in for what is lost differs from one decoding to the next, but not the other frames.
    assert len([pair for pair in zip(found, expected, strict=True) if not np.array_equal(*pair)]) < 10
    if kind == "mkv" or kind == "mp4_hevc" and len(expected) == 80:
        return  # the parser skips what it can't read, the decoder patches it, without a word
    assert frames.damage in caplog.text
    if len(found) < 80 and kind != "ps":  # in which packets are lost before they are counted
        assert f"{len(found)} of " in frames.damage
    order = [len(expected) - 1, 50, 49, 3, 30]
    video = open_video(path)
    assert [video[number].shape for number in order] == [found[0].shape] * 5
    assert np.array_equal(video[3], expected[3])


def test_a_truncated_file_gives_the_frames_before_its_end_and_says_so(tmp_path, caplog):
    whole = open(write_video(tmp_path / "a.mp4", np.stack(pictures(40, 60)), movflags="faststart"), "rb").read()  # noqa: SIM115
    (tmp_path / "b.mp4").write_bytes(whole[: len(whole) // 2])
    frames = open_video(tmp_path / "b.mp4")
    delivered = list(frames)
    assert 5 < len(delivered) < 40 and len(delivered) == len(plain_decode(tmp_path / "b.mp4"))
    assert np.array_equal(delivered[3], open_video(whole)[3])
    assert f"{len(delivered)} of 40" in frames.damage and frames.damage in caplog.text
    assert frames.num_frames == len(delivered) and len(list(frames)) == len(delivered)


def test_reading_backwards_decodes_each_group_of_pictures_once(tmp_path, monkeypatch):
    frames = open_video(write_video(tmp_path / "clip.mp4", smooth(20)))
    frames[19]
    frames._decoded.clear()
    steps, step = [], frames._step
    monkeypatch.setattr(frames, "_step", lambda: steps.append(frames._position) or step())
    for number in reversed(range(20)):
        frames[number]
    assert len(steps) == 5 * 3  # groups of four, whose first frame a rewind decodes


@pytest.fixture
def camera(tmp_path):
    """An address that gives as many bytes as are asked of it and never ends, as a camera's."""
    data = open(write(tmp_path / "film", "ts"), "rb").read()  # noqa: SIM115
    server = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def serve():
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: video/mp2t\r\n\r\n")
            connection.sendall(data * 4)
            stop.wait(60)  # nothing more comes, and the connection stays open

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}/live"
    stop.set()
    thread.join()
    server.close()


def test_a_camera_is_read_as_it_comes(camera):
    frames = open_video(camera)
    assert isinstance(frames, StreamedFrames) and frames.num_frames is None and frames.rate == pytest.approx(24)
    assert np.abs(frames[20][40, 40].astype(int) - (10 + 3 * 20)).max() <= 4
    with pytest.raises(ValueError, match="can't go back"):
        frames[3]


def test_a_pipe_is_read_once_and_forward(tmp_path):
    data = open(write(tmp_path / "film", "ts"), "rb").read()  # noqa: SIM115
    expected = plain_decode(tmp_path / "film")
    os.mkfifo(tmp_path / "pipe")
    thread = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(data), daemon=True)
    thread.start()
    frames = open_video(tmp_path / "pipe")
    assert isinstance(frames, StreamedFrames)
    assert [np.array_equal(*pair) for pair in zip(frames, expected, strict=True)] == [True] * COUNT
    thread.join()


def test_an_empty_film_is_told(tmp_path):
    data = bytearray(open(write(tmp_path / "a.mp4", "mp4", 5), "rb").read())  # noqa: SIM115
    start = data.index(b"mdat") + 4
    data[start : data.index(b"moov") - 4] = bytes(data.index(b"moov") - 4 - start)
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(ValueError, match="a.mp4 has no frame that can be decoded"):
        list(open_video(tmp_path / "a.mp4"))


def test_the_film_is_chosen_not_the_picture_of_its_cover(tmp_path):
    with av.open(str(tmp_path / "film.mkv"), "w") as file:
        for codec, size in (("mjpeg", (32, 32)), ("libx264", (64, 48))):
            stream = file.add_stream(codec, rate=24)
            stream.width, stream.height = size
            stream.pix_fmt = FORMATS.get(codec, "yuv420p")
        for stream, shown in zip(file.streams.video, (1, COUNT), strict=True):
            for picture in pictures(shown):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())
    assert open_video(str(tmp_path / "film.mkv")).num_frames == COUNT


def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch):
    write_video(tmp_path / "film.mp4", smooth(3))
    monkeypatch.chdir(tmp_path)
    os.rename("film.mp4", "12:30.mp4")
    assert open_video("12:30.mp4").num_frames == 3
