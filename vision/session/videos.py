"""Opens anything that can be seen as a video; files and addresses are decoded by PyAV."""

import io
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import av
import numpy as np
import torch
from PIL import Image

from .frames import IMAGE_SUFFIXES, EndOfVideo, StreamedFrames, VideoFrames, is_image, open_image


logger = logging.getLogger(__name__)

_IMAGE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"II*\x00", b"MM\x00*")
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")  # in other formats, further images are no frames
_ROW_KEYS = ("video", "frames", "images", "image")
_DECODED_AHEAD = 24  # decoded frames kept by a file, so that reading backwards decodes a group of pictures few times


class FileFrames(VideoFrames):
    """
    Frames of a video file or its bytes, upright as the file says they are to be shown. As FFmpeg does, it goes on
    after what can't be decoded; `damage` then says so.

    Which frames there are, their times and which of them decoding can begin at is learned while decoding: indexes of
    files leave frames out, hide some or have no times. A way back begins at such a frame, or where it can't be found
    again, at the start of the file.

    Args:
        file (`str` or `bytes`):
            A path, an address of a file, or what is in one.
    """

    def __init__(self, file: str | bytes):
        self.file = file
        self._name = "The video" if isinstance(file, bytes) else file
        self._decoded: OrderedDict[int, av.VideoFrame] = OrderedDict()
        self._marks: list[tuple] = []  # (pts, dts) of the frames met so far
        self._numbers: dict[tuple, int | None] = {}  # by mark; None for a mark of several frames
        self._keys: list[int] = []  # numbers of the key frames met so far
        self._in_time = True  # whether times of frames grow from one to the next
        self._reason: str | None = None  # of the first damage
        self._container, self._stream = open_container(self.source_file())
        self._announced, self._hidden, sound = self._demux()
        super().__init__(self._decode, self._announced if sound else None, None if isinstance(file, bytes) else file)
        self.rate = _rate(self._container, self._stream)
        self._threads = "AUTO" if sound else "SLICE"
        self._reopen()
        if not sound:
            while self._step():
                pass
            self._end()

    def time(self, index: int) -> float | None:
        if index >= len(self._marks):
            self[index]
        if not self._in_time:
            return super().time(index)
        return float((self._marks[index][0] - self._marks[0][0]) * self._stream.time_base)

    def _demux(self) -> tuple[int, int, bool]:
        """How many frames are announced to be shown, how many to be hidden, and whether that is to be believed."""
        packets, hidden, sound = 0, 0, True
        try:
            for packet in self._container.demux(self._stream):
                if packet.size:
                    hidden += packet.is_discard or packets == hidden and not packet.is_keyframe
                    packets += 1
                    if packet.is_corrupt:
                        sound = False
                        self._reason = self._reason or f"packet {packets} is corrupt"
        except av.error.FFmpegError:
            sound = False  # decoding meets the same place and tells
        sound &= 0 == hidden < packets >= self._stream.frames
        return max(packets, self._stream.frames) - hidden, hidden, sound

    def source_file(self) -> Any:
        """What FFmpeg opens anew."""
        return io.BytesIO(self.file) if isinstance(self.file, bytes) else self.file

    def _reopen(self) -> None:
        self._container.close()
        self._container, self._stream = open_container(self.source_file(), self._threads)
        self._frames = _decode(self._container, self._stream, self._note)
        self._position, self._sought = -1, False

    def _decode(self, index: int) -> np.ndarray:
        if index not in self._decoded:
            nearest = max((key for key in self._keys if key <= index), default=0)
            if index <= self._position or nearest > self._position + 1:
                self._rewind(index)
            while self._position < index:
                if not self._step():
                    self._end()
                    raise EndOfVideo(self.damage or f"{self._name} has no frame {index}.")
        return _upright(self._decoded[index])

    def _rewind(self, index: int) -> None:
        """Goes to a key frame before a frame; a container may not find the nearest, or none at all."""
        keys = [key for key in self._keys if key <= index]
        for key in keys[-1:] + keys[-2:-1] + keys[-5:-4]:
            try:
                self._container.seek(self._marks[key][0], stream=self._stream, backward=True)
            except av.error.FFmpegError:
                break
            self._frames = _decode(self._container, self._stream, lambda reason: None)
            # Before a key frame there may be others, which lack what they refer to.
            frame = next((frame for frame in self._frames if frame.key_frame), None)
            number = None if frame is None else self._numbers.get((frame.pts, frame.dts))
            if frame is not None and number is not None and number in keys:
                self._position, self._sought = number, True
                self._keep(number, frame)
                return
        self._reopen()

    def _step(self) -> bool:
        """Decodes the next frame; whether there is one."""
        frame, number = next(self._frames, None), self._position + 1
        if frame is not None and frame.is_corrupt:
            self._note(f"frame {number} is corrupt")
        short = frame is None and number < self._announced
        if self._threads == "AUTO" and (short or self._reason is not None):
            self._threads = "SLICE"  # frames by frame, an error in one thread takes those of others with it
            self._reopen()
            return True
        if frame is None:
            return False
        mark = frame.pts, frame.dts
        if number == len(self._marks):
            grows = not number or self._in_time and self._marks[-1][0] < (frame.pts or 0)
            self._in_time = frame.pts is not None and grows
            self._marks.append(mark)
            self._numbers[mark] = None if mark in self._numbers else number
            # In MPEG program streams, what follows a jump has the times of other frames.
            sound = frame.key_frame and not frame.is_corrupt
            if sound and frame.pts is not None and self._container.format.name != "mpeg":
                self._keys.append(number)
        elif self._sought and self._marks[number] != mark:
            self._keys.clear()  # the container leads astray
            self._reopen()
            return True
        self._position = number
        self._keep(number, frame)
        return True

    def _keep(self, number: int, frame: av.VideoFrame) -> None:
        self._decoded[number] = frame
        if len(self._decoded) > _DECODED_AHEAD:
            self._decoded.popitem(last=False)

    def _note(self, reason: str) -> None:
        if self._reason is None:
            self._reason = reason
            self._tell(f"{self._name} is damaged ({reason}); what can be decoded is delivered.")

    def _end(self) -> None:
        self.num_frames = self._position + 1
        if not self.num_frames:
            raise ValueError(f"{self._name} has no frame that can be decoded ({self._reason or 'it is empty'}).")
        if self._reason is not None or self.num_frames < self._announced and not self._hidden:
            self._tell(
                f"{self._name} is damaged ({self._reason or 'it ends early'}): {self.num_frames} of {self._announced} "
                "frames could be read and were delivered."
            )

    def _tell(self, damage: str) -> None:
        self.damage = damage
        logger.warning(damage)


def open_video(video: Any) -> VideoFrames:
    """
    Opens anything that holds frames.

    Args:
        video (`Any`):
            A video file, URL, its bytes or a file opened in binary mode; a folder of images; one image (path,
            `PIL.Image` or array of shape `(height, width[, channels])`), of an animated one all frames; a list of
            images; an array or tensor of shape `(frames, height, width, channels)`, `(frames, channels, height,
            width)` or, in gray, `(frames, height, width)`, but for `(3, height, width)`, which is one image; a row of
            a `datasets.Dataset`; a decoder with a length and items; any other iterable, which is read lazily and only
            forwards, as are addresses without a known end, such as cameras.

    Raises:
        TypeError: if it is none of these.
        ValueError: if it is empty or can't be read.
    """
    if isinstance(video, VideoFrames):
        return video
    if isinstance(video, (str, Path)):
        return _open_path(str(video))
    if isinstance(video, (bytes, bytearray, memoryview)):
        video = bytes(video)
        if video.startswith(_IMAGE_MAGIC) or video[8:12] == b"WEBP":
            return _open_image(open_image(video))
        return FileFrames(video)
    if hasattr(video, "readable"):  # a file object
        return open_video(video.read()) if video.seekable() else _stream_of(*open_container(video))
    if isinstance(video, Image.Image):
        return _open_image(video)
    if isinstance(video, Mapping):
        if video.get("bytes") is not None:
            return open_video(video["bytes"])
        for key in ("path", *_ROW_KEYS):
            if video.get(key) is not None:
                return open_video(video[key])
        raise ValueError(f"Expected a row with one of bytes, path, {', '.join(_ROW_KEYS)}, got {list(video)}.")
    if is_image(video):
        return VideoFrames([video].__getitem__, 1)
    if isinstance(video, (np.ndarray, torch.Tensor)):
        if video.ndim not in (3, 4):
            raise ValueError(
                "Expected an image (height, width), (height, width, channels) or (channels, height, width) or a video "
                "(frames, height, width), (frames, height, width, channels) or (frames, channels, height, width), got "
                f"shape {tuple(video.shape)}."
            )
        return VideoFrames(video.__getitem__, len(video))
    if isinstance(video, Sequence) or (hasattr(video, "__len__") and hasattr(video, "__getitem__")):
        return VideoFrames(video.__getitem__, len(video))
    if isinstance(video, Iterable):
        return StreamedFrames(video)
    raise TypeError(f"Expected a video (path, bytes, images, array, tensor or iterator), got {type(video).__name__}.")


def _open_path(path: str) -> VideoFrames:
    if path.startswith("file://"):
        path = unquote(path.removeprefix("file://"))
    if "://" in path:
        return _open_address(path)
    if not Path(path).exists():
        raise ValueError(f"There is no video {path}. Give the path of a video file, an image or a folder of images.")
    if Path(path).is_dir():
        files = list_images(path)
        if not files:
            raise ValueError(f"Expected images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {path}, got none.")
        return VideoFrames(files.__getitem__, len(files), source=path)
    if Path(path).suffix.lower() in IMAGE_SUFFIXES:
        return _open_image(open_image(path), path)
    return FileFrames(path) if Path(path).is_file() else _open_address(path)


def _open_image(image: Image.Image, source: str | None = None) -> VideoFrames:
    """An image, or all frames of an animated one; pages of another size, as of a thumbnail, are none."""

    def read(index: int) -> Image.Image:
        image.seek(index)
        return image

    count, size = getattr(image, "n_frames", 1) if image.format in _ANIMATED else 1, image.size
    if image.format == "TIFF":
        count = next((page for page in range(1, count) if read(page).size != size), count)
    frames = VideoFrames(read, count, source)
    if duration := image.info.get("duration"):  # milliseconds
        frames.rate = 1000 / duration
    return frames


def list_images(folder: str | Path) -> list[Path]:
    """The images in a folder, none if it is not there, in the order of the numbers in their names."""
    images = [file for file in Path(folder).glob("*") if file.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(images, key=lambda file: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", file.name)])


def _open_address(address: str) -> VideoFrames:
    """A file elsewhere, or what has no end that is known, which is read as it comes."""
    container, stream = open_container(address)
    if container.duration:
        container.close()
        return FileFrames(address)
    return _stream_of(container, stream)


def _stream_of(container: Any, stream: Any) -> StreamedFrames:
    frames = StreamedFrames(_upright(frame) for frame in _decode(container, stream, logger.warning))
    frames.rate = _rate(container, stream)
    return frames


def open_container(file: Any, threads: str = "AUTO") -> tuple[Any, Any]:
    """
    PyAV's container of a path, an address or a file object, and its video stream.

    Raises:
        ValueError: if there is none.
    """
    name = file if isinstance(file, str) else "The video"
    try:
        # Else FFmpeg takes what is before a colon for a protocol.
        container: Any = av.open(f"file:{file}" if isinstance(file, str) and "://" not in file else file)
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"{name} is no video that FFmpeg can read ({error}).") from None
    stream = container.streams.best("video")  # as FFmpeg chooses: the first may be a picture of the cover
    if stream is None:
        raise ValueError(f"{name} has no video stream.")
    stream.thread_type = threads
    return container, stream


def _decode(container: Any, stream: Any, note: Callable[[str], None]) -> Iterator[av.VideoFrame]:
    """All frames from where a container is; what can't be decoded is told to `note` and passed over."""
    packets = container.demux(stream)
    while packets is not None:
        packet = None  # after the last one, the decoder gives what it holds back
        try:
            packet = next(packets, None)
        except av.error.FFmpegError as error:
            note(str(error))
        if packet is None:
            packets = None
        try:
            frames = stream.decode(packet)
        except av.error.EOFError:
            frames = []  # it has given all
        except av.error.FFmpegError as error:
            note(str(error))
            frames = []
        yield from frames


def _rate(container: Any, stream: Any) -> float | None:
    rates = (stream.average_rate if container.duration else None, stream.guessed_rate)
    return next((float(rate) for rate in rates if rate and rate < 1000), None)  # DV files average their time base


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """The pixels of a frame as its display matrix turns and mirrors them by right angles."""
    pixels = frame.to_ndarray(format="rgb24")
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(b) > abs(a):  # x is shown as y
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
