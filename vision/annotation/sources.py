"""The videos to annotate: found in folders, opened, and named by what is in them, wherever they lie."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from ..session.frames import IMAGE_SUFFIXES, StreamedFrames, VideoFrames
from ..session.videos import open_video


VIDEO_SUFFIXES = {
    ".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".vob", ".ts", ".mts", ".m2ts", ".wmv", ".asf",
    ".flv", ".3gp", ".ogv", ".mxf", ".gif",
}  # fmt: skip
_CHUNK = 2**20  # bytes read at once


def list_videos(videos: Any) -> Iterable[Any]:
    """
    The videos of a folder, of a dataset, or as they are given.

    Raises:
        TypeError: if it is one video rather than several.
        ValueError: if the path does not exist or holds no video.
    """
    if isinstance(videos, (str, Path)):
        return _videos_in(Path(videos))
    if isinstance(videos, (datasets.Dataset, datasets.IterableDataset)):
        for name, feature in (videos.features or {}).items():
            if isinstance(feature, datasets.Video):
                videos = videos.cast_column(name, datasets.Video(decode=False))  # decoded by us, when its turn comes
        return videos
    if isinstance(videos, (Mapping, bytes, np.ndarray, torch.Tensor)) or not isinstance(videos, Iterable):
        raise TypeError(f"Expected several videos, got {type(videos).__name__}. Pass [video] for a single one.")
    return videos


def _videos_in(path: Path) -> list[Path]:
    if not path.exists():
        raise ValueError(f"There is no {path}. Give a video file or a folder of videos or of folders of images.")
    if path.is_file():
        return [path]
    found = sorted(_search(path, set()))
    if not found:
        raise ValueError(
            f"Expected videos ({', '.join(sorted(VIDEO_SUFFIXES))}) or folders of images in {path}, at any depth."
        )
    return found


def _search(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """The video files below a folder, and the folders of images that hold no video; hidden ones are left out."""
    if folder.resolve() in seen:  # a link to where we are
        return
    seen.add(folder.resolve())
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    videos = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in VIDEO_SUFFIXES]
    yield from videos
    if not videos and any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in entries):
        yield folder
    for entry in entries:
        if entry.is_dir():
            yield from _search(entry, seen)


def open_frames(video: Any) -> VideoFrames:
    """
    Opens anything that `open_video` takes or that has such frames as `frames`.

    Raises:
        ValueError: if it can't be read, or is a stream, which can't go back.
    """
    frames = open_video(getattr(video, "frames", video))
    if isinstance(frames, StreamedFrames):
        raise ValueError("A stream can't be annotated, for it can't go back. Pass `list(frames)`.")  # noqa: TRY004
    return frames


def name_video(video: Any) -> tuple[str, str | None]:
    """
    The name of a video, whose last part depends on its content alone (bytes of a file or of a folder's images, else
    pixels), so that it is known again wherever it was moved; and its path if it has one.

    Raises:
        ValueError, OSError: if it can't be read.
    """
    while isinstance(video, Mapping) and video.get("bytes") is None:
        inner = [video[key] for key in ("path", "video", "frames", "images", "image") if video.get(key) is not None]
        if not inner:
            break
        video = inner[0]
    if isinstance(video, (str, Path)):
        path = Path(video)
        if "://" in str(video):
            return f"{file_stem(path)}-{digest([str(video).encode()])}", str(video)
        if not path.exists():
            raise ValueError(f"There is no video {video}.")
        return f"{file_stem(path)}-{digest(_content(path))}", str(video)
    if isinstance(video, Mapping) and video.get("bytes") is not None:
        video = video["bytes"]
    if isinstance(video, (bytes, bytearray)):
        return f"video-{digest([bytes(video)])}", None
    return f"video-{digest(_pixels(open_frames(video)))}", None


def file_stem(path: Path) -> str:
    """Of the name of a file what any file system takes with something behind it."""
    name = re.sub(r'[][\\/:*?"<>|\x00-\x1f]', "_", path.stem)
    return name.encode("utf-8", "replace")[:150].decode("utf-8", "ignore")


def digest(chunks: Iterable[bytes]) -> str:
    """12 hexadecimal digits of what all chunks say together."""
    known = hashlib.sha256()
    for chunk in chunks:
        known.update(chunk)
    return known.hexdigest()[:12]


def _content(path: Path) -> Iterator[bytes]:
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    for file in files:
        if path.is_dir():
            yield f"{file.name}/{file.stat().st_size}/".encode()
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK):
                yield chunk


def _pixels(frames: VideoFrames) -> Iterator[bytes]:
    for frame in frames:
        yield str(frame.shape).encode()
        yield np.ascontiguousarray(frame).tobytes()
