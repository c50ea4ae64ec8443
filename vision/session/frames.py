"""Frames of anything that can be seen as a video, decoded when they are asked for."""

import io
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image


logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
_IMAGE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"II*\x00", b"MM\x00*")
_ROW_KEYS = ("video", "frames", "images", "image")
_PREPROCESSED_AHEAD = 4  # frames preprocessed at once, which costs a third of one by one
_DECODED_AHEAD = 24  # decoded frames kept by a file, so that reading backwards decodes a group of pictures few times


class EndOfVideo(ValueError):
    """There is no such frame (any more): the stream has ended, or the file is damaged from here on."""


class VideoFrames:
    """
    Frames by number, each `(height, width, 3)` in uint8 RGB; gray and RGBA frames are converted.

    Args:
        read (`Callable[[int], Any]`):
            Gives the frame of a number.
        num_frames (`int`, *optional*):
            `None` if only the end of the stream will tell.
        source (`str`, *optional*):
            Path, if it can be opened again.

    Raises:
        ValueError: if the video is empty or a frame is empty or of another size than the first.
    """

    def __init__(self, read: Callable[[int], Any], num_frames: int | None, source: str | None = None):
        if num_frames == 0:
            raise ValueError("Expected a video of at least one frame, got an empty one.")
        self._read = read
        self.num_frames = num_frames
        self.source = source
        self.size: tuple[int, int] | None = None  # (height, width), known once a frame was read
        self.damage: str | None = None  # a sentence, once a damaged place was met

    def __getitem__(self, index: int) -> np.ndarray:
        if index < 0 or self.num_frames is not None and index >= self.num_frames:
            raise EndOfVideo(self.damage or f"The video has {self.num_frames} frames, there is no frame {index}.")
        frame = to_rgb(self._read(index))
        if self.size is None:
            self.size = frame.shape[:2]
        if frame.shape[:2] != self.size:
            raise ValueError(
                f"Expected all frames to be {self.size[0]} x {self.size[1]} (height x width) like the first, got "
                f"{frame.shape[0]} x {frame.shape[1]} on frame {index}. Resize them, or start a new session."
            )
        return frame

    def __iter__(self) -> Iterator[np.ndarray]:
        index = 0
        while self.num_frames is None or index < self.num_frames:
            try:
                yield self[index]
            except EndOfVideo:
                return
            index += 1


class StreamedFrames(VideoFrames):
    """Frames of an iterator, of which only the latest is kept."""

    def __init__(self, frames: Iterable):
        super().__init__(self._take, None)
        self._iterator = iter(frames)
        self._latest: Any = None
        self.position = -1  # number of the latest frame

    def _take(self, index: int) -> Any:
        if index < self.position:
            raise ValueError(
                f"A stream can't go back: frame {index} is gone, frame {self.position} is the latest. Pass "
                "`list(frames)` to move both ways."
            )
        while self.position < index:
            try:
                self._latest = next(self._iterator)
            except StopIteration:
                raise EndOfVideo(f"The stream has {self.position + 1} frames, there is no frame {index}.") from None
            self.position += 1
        return self._latest

    def resume(self, position: int, latest: Any) -> None:
        """Counts on from a frame that was taken before; the iterator gives the next one."""
        self.position, self._latest = position, latest


class FileFrames(VideoFrames):
    """Frames of a video file or its bytes, decoded by PyAV; a damaged file gives what comes before the damage."""

    def __init__(self, file: str | bytes):
        self._file = io.BytesIO(file) if isinstance(file, bytes) else file
        self._name = "The video" if isinstance(file, bytes) else file
        try:
            self._container: Any = av.open(self._file)
        except (av.error.FFmpegError, OSError) as error:
            raise ValueError(f"{self._name} is no video that FFmpeg can read ({error}).") from None
        if not self._container.streams.video:
            raise ValueError(f"{self._name} has no video stream.")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        packets = self._packets()
        self._numbers: dict[Any, int] = {pts: number for number, (pts, _) in enumerate(packets)}
        self._keys = [number for number, (_, key) in enumerate(packets) if key] or [0]
        self._times = list(self._numbers)
        super().__init__(self._decode, len(packets), None if isinstance(file, bytes) else file)
        self._decoded: OrderedDict[int, np.ndarray] = OrderedDict()
        self._rewind(0)

    def _packets(self) -> list[tuple[int, bool]]:
        """Time and key flag of every frame, in the order of showing, without decoding."""
        packets = []
        try:
            for packet in self._container.demux(self._stream):
                if packet.pts is not None and packet.size:
                    packets.append((packet.pts, packet.is_keyframe))
        except av.error.FFmpegError:
            pass  # decoding meets the same place and tells
        return sorted(set(packets))

    def _rewind(self, key: int) -> None:
        self._container.seek(self._times[key], stream=self._stream, backward=True)
        self._frames = self._container.decode(self._stream)
        self._position = key - 1

    def _decode(self, index: int) -> np.ndarray:
        if index in self._decoded:
            return self._decoded[index]
        key = max(number for number in self._keys if number <= max(index, self._keys[0]))
        if index <= self._position or key > self._position + 1:
            self._rewind(key)
        while self._position < index:
            try:
                frame = next(self._frames)
            except (StopIteration, av.error.FFmpegError) as error:
                self._stop(error)
            self._position = self._numbers.get(frame.pts, self._position + 1)
            self._decoded[self._position] = frame.to_ndarray(format="rgb24")
            if len(self._decoded) > _DECODED_AHEAD:
                self._decoded.popitem(last=False)
        if index not in self._decoded:
            raise EndOfVideo(f"{self._name} has no frame {index}.")
        return self._decoded[index]

    def _stop(self, error: Exception) -> None:
        announced, self.num_frames = self.num_frames, self._position + 1
        reason = "it ends early" if isinstance(error, StopIteration) else str(error)
        self.damage = (
            f"{self._name} is damaged: {self.num_frames} of {announced} frames could be read ({reason}); the frames "
            "before the damage were delivered."
        )
        logger.warning(self.damage)
        if not self.num_frames:
            raise ValueError(self.damage)
        raise EndOfVideo(self.damage)


class PixelValues:
    """Frames by number as a model takes them, `(3, side, side)`; of a video, the next ones of a pass come along."""

    def __init__(self, frames: VideoFrames, processor, model):
        self.frames, self.processor, self.model = frames, processor, model
        self.step = 1  # 1 forward, -1 backward
        self._ahead: dict[int, torch.Tensor] = {}

    def __call__(self, frame: int) -> torch.Tensor:
        kwargs = {"return_tensors": "pt", "device": self.model.device}
        if isinstance(self.frames, StreamedFrames):  # the processor's own way with a stream and with a video
            return self.processor.image_processor(self.frames[frame], **kwargs)["pixel_values"][0]
        if frame not in self._ahead:
            pixels = [self.frames[frame]]
            for number in range(1, _PREPROCESSED_AHEAD):
                try:
                    pixels.append(self.frames[frame + number * self.step])
                except (ValueError, TypeError):
                    break  # raised when its turn comes
            values = self.processor.video_processor(np.stack(pixels), **kwargs)["pixel_values_videos"][0]
            self._ahead = {frame + number * self.step: value for number, value in enumerate(values)}
        return self._ahead[frame]


def open_video(video: Any) -> VideoFrames:
    """
    Opens anything that holds frames.

    Args:
        video (`Any`):
            A video file, URL or its bytes; a folder of images; one image (path, `PIL.Image` or array of shape
            `(height, width[, channels])`); a list of images; an array or tensor of shape `(frames, height, width,
            channels)` or `(frames, channels, height, width)`; a row of a `datasets.Dataset`; a decoder with a length
            and items; any other iterable, which is read lazily and only forwards.

    Raises:
        TypeError: if it is none of these.
        ValueError: if it is empty or can't be read.
    """
    if isinstance(video, VideoFrames):
        return video
    if isinstance(video, (str, Path)):
        return _open_path(str(video))
    if isinstance(video, (bytes, bytearray)):
        video = bytes(video)
        if video.startswith(_IMAGE_MAGIC) or video[8:12] == b"WEBP":
            return open_video(Image.open(io.BytesIO(video)))
        return FileFrames(video)
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
        if video.ndim != 4:
            raise ValueError(
                "Expected an image of 2 or 3 dimensions or a video (frames, height, width, channels) or (frames, "
                f"channels, height, width), got shape {tuple(video.shape)}."
            )
        return VideoFrames(video.__getitem__, len(video))
    if isinstance(video, Sequence) or (hasattr(video, "__len__") and hasattr(video, "__getitem__")):
        return VideoFrames(video.__getitem__, len(video))
    if isinstance(video, Iterable):
        return StreamedFrames(video)
    raise TypeError(f"Expected a video (path, bytes, images, array, tensor or iterator), got {type(video).__name__}.")


def _open_path(path: str) -> VideoFrames:
    if "://" in path:
        return FileFrames(path)
    if not Path(path).exists():
        raise ValueError(f"There is no video {path}. Give the path of a video file, an image or a folder of images.")
    if Path(path).is_dir():
        files = sorted(
            (file for file in Path(path).iterdir() if file.suffix.lower() in IMAGE_SUFFIXES), key=_natural_order
        )
        if not files:
            raise ValueError(f"Expected images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {path}, got none.")
        return VideoFrames(files.__getitem__, len(files), source=path)
    if Path(path).suffix.lower() in IMAGE_SUFFIXES:
        return VideoFrames([path].__getitem__, 1, source=path)
    return FileFrames(path)


def _natural_order(file: Path) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)]


def is_image(value: Any) -> bool:
    """Whether `value` is one frame rather than a video."""
    if isinstance(value, Image.Image):
        return True
    if isinstance(value, (str, Path)):
        return Path(value).suffix.lower() in IMAGE_SUFFIXES
    return isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim in (2, 3)


def to_rgb(frame: Any) -> np.ndarray:
    """
    One frame as `(height, width, 3)` uint8. Alpha is dropped, gray repeated, floats in 0..1 scaled to 0..255.

    Raises:
        TypeError: if it is no image.
        ValueError: if it has no pixel, no channels we know or floats outside 0..1.
    """
    if isinstance(frame, (str, Path)):
        frame = Image.open(frame)
    if isinstance(frame, Mapping) and (frame.get("bytes") is not None or frame.get("path") is not None):
        frame = Image.open(io.BytesIO(frame["bytes"]) if frame.get("bytes") is not None else frame["path"])
    if isinstance(frame, Image.Image):
        return _with_pixels(np.array(frame.convert("RGB")))
    if isinstance(frame, torch.Tensor):
        frame = frame.detach().cpu().numpy()
    if not isinstance(frame, np.ndarray):
        raise TypeError(f"Expected an image, array or tensor as a frame, got {type(frame).__name__}.")
    _with_pixels(frame)
    if frame.ndim == 2:
        frame = frame[:, :, None]
    if frame.ndim != 3:
        raise ValueError(f"Expected a frame (height, width, channels), got shape {frame.shape}.")
    if frame.shape[-1] not in (1, 3, 4):
        if frame.shape[0] not in (1, 3, 4):
            raise ValueError(f"Expected 1, 3 or 4 channels at either end, got a frame of shape {frame.shape}.")
        frame = frame.transpose(1, 2, 0)
    if np.issubdtype(frame.dtype, np.floating):
        if not (frame.min() >= 0 and frame.max() <= 1):
            raise ValueError(f"Expected float frames in 0..1, got {frame.min()} to {frame.max()}. Pass uint8 instead.")
        frame = (frame * 255).round().astype(np.uint8)
    elif frame.dtype != np.uint8:
        raise ValueError(f"Expected frames in uint8, or floats in 0..1, got {frame.dtype}.")
    frame = np.repeat(frame, 3, axis=2) if frame.shape[2] == 1 else frame[:, :, :3]
    return np.ascontiguousarray(frame)


def _with_pixels(frame: np.ndarray) -> np.ndarray:
    if not frame.size:
        raise ValueError(f"Expected a frame with pixels, got one of shape {frame.shape}.")
    return frame
