"""Masks drawn over the frames of a video, as mp4 or GIF."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from scipy import ndimage

from hf_iclr.saving import atomic_file

from ..session.frames import VideoFrames
from ..session.segments import FrameSegments
from ..session.videos import FileFrames, open_container, open_video
from .segment_files import PALETTE


logger = logging.getLogger(__name__)

_TICK = Fraction(1, 90_000)  # of a second, in which uneven times are written
_SOUND_OF_MP4 = {"aac", "ac3", "alac", "eac3", "flac", "mp2", "mp3", "opus"}  # FFmpeg's decoders, mp3float among them


def draw_overlay(frame: np.ndarray, segments: FrameSegments, alpha: float = 0.5) -> np.ndarray:
    """
    A frame with its masks in the colours of DAVIS, outlines in full.

    Args:
        frame (`np.ndarray` of shape `(height, width, 3)`):
            RGB in uint8; it stays as it is.
        segments (`FrameSegments`):
            Of this frame; a higher object number is drawn over a lower one.
        alpha (`float`, *optional*, defaults to `0.5`):
            How much of a mask's colour covers what is below, in 0..1.

    Returns:
        `np.ndarray` of the frame's shape, in uint8.
    """
    drawn = frame.copy()
    for obj in sorted(segments.objects):
        mask, color = segments.binary(obj), PALETTE[(obj - 1) % 255 + 1]
        drawn[mask] = ((1 - alpha) * drawn[mask] + alpha * color).round().astype(np.uint8)
        drawn[mask & ~ndimage.binary_erosion(mask)] = color
    return drawn


def write_overlay(
    frames: Any, segments: Iterable[FrameSegments], path: str | Path, rate: float | None = None, alpha: float = 0.5
) -> None:
    """
    Writes a video with its masks drawn over it, frame by frame: memory does not grow with its length.

    Args:
        frames (`Any`):
            The video, in any form that `open_video` takes.
        segments (`Iterable[FrameSegments]`):
            Frames to write, in order; an iterator, such as `pipe.stream(...)`, is read lazily. With an iterator of
            frames too, give each its own, for instance from `itertools.tee`.
        path (`str` or `Path`):
            Ends with .mp4 or .gif.
        rate (`float`, *optional*, defaults to that of the video, or 24 if it has none):
            Frames per second.
        alpha (`float`, *optional*, defaults to `0.5`):
            See [`draw_overlay`].

    Raises:
        ValueError: if the path ends otherwise, `rate` or `alpha` is out of range, or there are no frames.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"Expected alpha in 0..1, got {alpha}.")
    video = open_video(frames)
    images = (draw_overlay(video[shown.frame], shown, alpha) for shown in segments)
    write_video(images, path, video.rate or 24 if rate is None else rate)


def write_video(
    images: Iterable[np.ndarray], path: str | Path, rate: float | None = None, source: VideoFrames | None = None
) -> None:
    """
    Writes images as a video, one by one, whole or not at all.

    Args:
        images (`Iterable[np.ndarray]`):
            Each `(height, width, 3)` in uint8.
        path (`str` or `Path`):
            Ends with .mp4 or .gif.
        rate (`float`, *optional*):
            Images per second.
        source (`VideoFrames`, *optional*):
            Where `rate` is left out, the video whose rate, times and, in mp4, sound it has; 24 where it has none.

    Raises:
        ValueError: if the path ends otherwise, `rate` is out of range, or there are no images.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".mp4", ".gif"):
        raise ValueError(f"Expected a path that ends with .mp4 or .gif, got {str(path)!r}.")
    if rate is not None and not rate > 0:
        raise ValueError(f"Expected a rate above 0, got {rate}.")
    kept = source if rate is None else None
    rate = rate or (kept.rate if kept is not None else None) or 24
    gif = suffix == ".gif"
    times = [] if kept is None or gif else _uneven_times(kept, rate)
    with ExitStack() as stack:
        part = stack.enter_context(atomic_file(path))
        container: Any = stack.enter_context(av.open(str(part), "w", format=suffix[1:]))
        stream: Any = None
        sound: Iterator[tuple[float, Any]] = iter(())
        for number, image in enumerate(images):
            if stream is None:
                stream = container.add_stream("gif" if gif else "libx264", rate=Fraction(rate).limit_denominator(1001))
                stream.height, stream.width = (side if gif else side + side % 2 for side in image.shape[:2])
                stream.pix_fmt = "pal8" if gif else "yuv420p"
                if times:
                    stream.codec_context.time_base = _TICK
                if kept is not None and not gif:
                    sound = _copied_sound(stack, kept, container)
                waiting = next(sound, None)
            frame = _gif_frame(image) if gif else _h264_frame(image)
            if number < len(times):
                frame.pts, frame.time_base = round(times[number] / _TICK), _TICK
            container.mux(stream.encode(frame))
            while waiting is not None and waiting[0] <= (times[number] if number < len(times) else number / rate):
                container.mux(waiting[1])
                waiting = next(sound, None)
        if stream is None:
            raise ValueError("Expected at least one frame to write, got none.")
        container.mux(stream.encode())
        while waiting is not None:
            container.mux(waiting[1])
            waiting = next(sound, None)


def _uneven_times(source: VideoFrames, rate: float) -> list[float]:
    """Seconds of all frames; none where they follow from the rate."""
    times = [source.time(number) for number in range(source.num_frames or 0)]
    known = [time for time in times if time is not None]
    uneven = any(abs(time - number / rate) > 0.5 / rate for number, time in enumerate(known))
    return known if uneven and len(known) == len(times) else []


def _copied_sound(stack: ExitStack, source: VideoFrames, container: Any) -> Iterator[tuple[float, Any]]:
    """The packets of the sound of a file, for which the container gets streams, and seconds from its first picture."""
    if not isinstance(source, FileFrames):
        return iter(())
    opened, picture = open_container(source.source_file())
    stack.enter_context(opened)
    streams = {}
    for stream in opened.streams.audio:
        if stream.codec_context.name.removesuffix("float") in _SOUND_OF_MP4:
            streams[stream.index] = container.add_stream_from_template(stream)
        else:
            logger.warning("The sound (%s) can't be copied into mp4 and is left out.", stream.codec_context.name)
    start = float((picture.start_time or 0) * picture.time_base)

    def packets() -> Iterator[tuple[float, Any]]:
        for packet in opened.demux([opened.streams[index] for index in streams]):
            if packet.dts is None or packet.pts is None:  # the end, or no time
                continue
            seconds = float(packet.pts * packet.time_base) - start
            if seconds + float((packet.duration or 0) * packet.time_base) <= 0:
                continue
            offset = round(start / packet.time_base)
            packet.pts, packet.dts = packet.pts - offset, packet.dts - offset
            packet.stream = streams[packet.stream.index]
            yield seconds, packet

    return packets() if streams else iter(())


def _h264_frame(image: np.ndarray) -> av.VideoFrame:
    # Colour has half the resolution, so sides must be even: the last row and column are repeated if need be.
    even = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge")
    return av.VideoFrame.from_ndarray(even, format="rgb24")


def _gif_frame(image: np.ndarray) -> av.VideoFrame:
    paletted = Image.fromarray(image).quantize(256)
    colors = np.zeros((256, 4), np.uint8)
    colors[:, 0] = 255  # opaque
    used = np.reshape(paletted.getpalette() or [], (-1, 3))
    colors[: len(used), 1:] = used
    numbers_and_colors: Any = (np.asarray(paletted), colors)  # what PyAV wants, though not in its annotation
    return av.VideoFrame.from_ndarray(numbers_and_colors, format="pal8")
