"""Frames by number, read when they are asked for, and as a model takes them."""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
_PREPROCESSED_AHEAD = 4  # frames preprocessed at once, which costs a third of one by one


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
        self.rate: float | None = None  # frames per second, if they are known

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

    def time(self, index: int) -> float | None:
        """Seconds from the first frame to another, as the file tells; `None` if nothing tells."""
        return None if self.rate is None else index / self.rate

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


class PixelValues:
    """Frames by number as the model takes them, `(3, side, side)`; of a video, the next ones of a pass come along."""

    def __init__(self, frames: VideoFrames, processor, model):
        self.frames, self.processor, self.model = frames, processor, model
        self.step = 1  # 1 forward, -1 backward
        self._ahead: dict[int, torch.Tensor] = {}

    def __call__(self, frame: int) -> torch.Tensor:
        kwargs = {"return_tensors": "pt", "device": self.model.device}
        if isinstance(self.frames, StreamedFrames):  # the processor's own way with a stream and with a video
            pixels = self.processor.image_processor(self.frames[frame], **kwargs)["pixel_values"][0]
            return pixels.to(self.model.dtype)
        if frame not in self._ahead:
            pixels = [self.frames[frame]]
            for number in range(1, _PREPROCESSED_AHEAD):
                try:
                    pixels.append(self.frames[frame + number * self.step])
                except (ValueError, TypeError):
                    break  # raised when its turn comes
            values = self.processor.video_processor(np.stack(pixels), **kwargs)["pixel_values_videos"][0]
            self._ahead = {frame + number * self.step: value for number, value in enumerate(values)}
        return self._ahead[frame].to(self.model.dtype)


def is_image(value: Any) -> bool:
    """Whether `value` is one frame rather than a video."""
    if isinstance(value, Image.Image):
        return True
    if isinstance(value, (str, Path)):
        return Path(value).suffix.lower() in IMAGE_SUFFIXES
    if not isinstance(value, (np.ndarray, torch.Tensor)):
        return False
    # Any other array of three dimensions holds gray frames: colours come first in threes, and last.
    return value.ndim == 2 or value.ndim == 3 and (value.shape[-1] in (1, 3, 4) or value.shape[0] in (1, 3))


def open_image(image: Any) -> Image.Image:
    """
    The image in a file, its bytes or a file object.

    Raises:
        ValueError: if it is not there or no image.
    """
    name = f"{image}" if isinstance(image, (str, Path)) else "what was given"
    try:
        return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    except OSError as error:
        raise ValueError(f"Expected an image, got {name:.200}, which can't be read ({error}).") from None


def to_rgb(frame: Any) -> np.ndarray:
    """
    One frame as `(height, width, 3)` uint8. Alpha is dropped, gray repeated, floats in 0..1 and 16 bits scaled to
    0..255, and an image is turned as its EXIF orientation says.

    Raises:
        TypeError: if it is no image.
        ValueError: if it can't be read or has no pixel, no channels we know or floats outside 0..1.
    """
    if isinstance(frame, Mapping):
        frame = next((frame[key] for key in ("bytes", "path") if frame.get(key) is not None), frame)
    if isinstance(frame, (str, Path, bytes, io.IOBase)):
        frame = open_image(frame)
    if isinstance(frame, Image.Image):
        try:
            frame = ImageOps.exif_transpose(frame)
            frame = np.array(frame if frame.mode.startswith(("I", "F")) else frame.convert("RGB"))
        except (OSError, SyntaxError) as error:  # PNGs raise the second
            raise ValueError(f"Expected an image that can be read to its end, got a damaged one ({error}).") from None
    if isinstance(frame, torch.Tensor):
        frame = frame.detach().cpu()
        frame = (frame.float() if frame.is_floating_point() else frame).numpy()  # NumPy has no bfloat16
    if not isinstance(frame, np.ndarray):
        raise TypeError(f"Expected an image, array or tensor as a frame, got {type(frame).__name__}.")
    if not frame.size:
        raise ValueError(f"Expected a frame with pixels, got one of shape {frame.shape}.")
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
    elif frame.dtype == np.uint16:
        frame = (frame >> 8).astype(np.uint8)
    elif frame.dtype != np.uint8:
        raise ValueError(f"Expected frames in uint8 or uint16, or floats in 0..1, got {frame.dtype}.")
    frame = np.repeat(frame, 3, axis=2) if frame.shape[2] == 1 else frame[:, :, :3]
    return np.ascontiguousarray(frame)
