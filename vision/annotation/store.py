"""Annotated videos on disk: one Parquet file each, whole or absent, and statistics of all of them."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Features, List, Value

from hf_iclr.untrusted import check_links, inside, read_json, regular_file

from ..session.frames import IMAGE_SUFFIXES, StreamedFrames, VideoFrames
from ..session.videos import open_video
from .masklets import Masklet


VIDEO_SUFFIXES = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".gif"}

FEATURES = Features(
    {
        "video": Value("string"),
        "name": Value("string"),
        "object": Value("int32"),
        "num_frames": Value("int32"),
        "height": Value("int32"),
        "width": Value("int32"),
        "frames": List(Value("int32")),
        "masks": List({"size": List(Value("int32")), "counts": Value("string")}),
        "scores": List(Value("float32")),
        "object_scores": List(Value("float32")),
        "stability": Value("float32"),
        "cycle_iou": Value("float32"),
        "uncertainty": Value("float32"),
        "provenance": Value("string"),
        "model": Value("string"),
        "revision": Value("string"),
        "phase": Value("int32"),
        "prompts": Value("string"),
        "clicks": Value("int32"),
        "clicked_frames": Value("int32"),
        "edited_frames": List(Value("int32")),
        "rounds": Value("int32"),
        "seconds": Value("float32"),
        "status": Value("string"),
        "reason": Value("string"),
        "damage": Value("string"),
    }
)
_SCHEMA = FEATURES.arrow_schema


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
    found = [entry for entry in sorted(path.iterdir()) if entry.suffix.lower() in VIDEO_SUFFIXES or _has_images(entry)]
    if not found and _has_images(path):
        return [path]
    if not found:
        raise ValueError(f"Expected videos ({', '.join(sorted(VIDEO_SUFFIXES))}) or folders of images in {path}.")
    return found


def _has_images(path: Path) -> bool:
    return path.is_dir() and any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.iterdir())


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
    A name that depends on the video alone, neither on the order nor on the number of videos, and its path if it has
    one: a video with a path is known by that, others by their bytes or pixels.
    """
    while isinstance(video, Mapping) and video.get("bytes") is None:
        inner = [video[key] for key in ("path", "video", "frames", "images", "image") if video.get(key) is not None]
        if not inner:
            break
        video = inner[0]
    if isinstance(video, (str, Path)):
        path = str(video)
        known = path if "://" in path else str(Path(path).resolve())
        return f"{Path(path).stem}-{_digest([known.encode()])}", path
    if isinstance(video, Mapping) and video.get("bytes") is not None:
        video = video["bytes"]
    if isinstance(video, (bytes, bytearray)):
        return f"video-{_digest([bytes(video)])}", None
    return f"video-{_digest(_pixels(open_frames(video)))}", None


def _digest(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()[:12]


def _pixels(frames: VideoFrames) -> Iterator[bytes]:
    for frame in frames:
        yield str(frame.shape).encode()
        yield np.ascontiguousarray(frame).tobytes()


def to_row(masklet: Masklet, path: str | None, model: str, revision: str | None) -> dict[str, Any]:
    """A masklet as a row of `FEATURES`; `path` of the video, name and commit of the model."""
    session, frames = masklet.session, sorted(masklet.masks)
    height, width = session.size
    obj = str(masklet.object)
    prompts = {frame: objects[obj] for frame, objects in session.prompts.to_dict().items() if obj in objects}
    return {
        "video": path,
        "name": masklet.name,
        "object": masklet.object,
        "num_frames": session.num_frames,
        "height": height,
        "width": width,
        "frames": frames,
        "masks": [masklet.masks[frame] for frame in frames],
        "scores": [masklet.scores[frame] for frame in frames],
        "object_scores": [masklet.object_scores[frame] for frame in frames],
        "stability": masklet.stability,
        "cycle_iou": masklet.cycle_iou,
        "uncertainty": masklet.uncertainty,
        "provenance": masklet.provenance,
        "model": model,
        "revision": revision,
        "phase": masklet.phase,
        "prompts": json.dumps(prompts),
        "clicks": sum(masklet.clicks.values()),
        "clicked_frames": sum(clicks > 0 for clicks in masklet.clicks.values()),
        "edited_frames": sorted(masklet.clicks),
        "rounds": masklet.rounds,
        "seconds": masklet.seconds,
        "status": masklet.status,
        "reason": masklet.reason,
        "damage": session.frames.damage,
    }


class AnnotationStore:
    """
    A folder of annotated videos: `shards/<name>.parquet`, one file a video, and `settings.json`. A file is there whole
    or not at all, whenever the process is killed; several processes may write to one folder.

    Args:
        folder (`str` or `Path`):
            Made if it does not exist.
        settings (`dict[str, Any]`):
            What all of its videos have in common.

    Raises:
        ValueError: if the folder was made with other settings, or a link leads out of it.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]):
        self.folder = check_links(folder)
        self.shards = self.folder / "shards"
        self.shards.mkdir(parents=True, exist_ok=True)
        path = self.folder / "settings.json"
        known = read_json(path) if path.exists() else settings
        if known != settings:
            raise ValueError(
                f"{folder} holds annotations made with {known}, not with {settings}. Take another folder."
            )
        self.write_json("settings.json", settings)

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        """
        Writes the masklets of a video; none are a file too, which says that the video is done.

        Raises:
            OSError: if it can't be written, for instance to a full disk. Nothing of it is left then.
        """
        table = pa.Table.from_pylist(rows, schema=_SCHEMA)

        def write(part: Path) -> None:
            if rows:
                pq.write_table(table, part, use_dictionary=False, write_statistics=False)
            else:  # `write_table` writes a group of no rows, which `load_dataset` can't read
                pq.ParquetWriter(part, _SCHEMA).close()

        self._replace(self._path(name), write)

    def write_json(self, name: str, content: Any) -> None:
        """Writes a file of the folder in the same way."""
        text = json.dumps(content, indent=2)
        self._replace(inside(self.folder, name), lambda part: part.write_text(text))

    def read(self, skipped: list[dict[str, str]]) -> datasets.Dataset:
        """All masklets in the folder, by video and object; `skipped` videos are listed in its description."""
        check_links(self.folder)
        shards = {path: regular_file(path).read_bytes() for path in sorted(self.shards.glob("*.parquet"))}
        tables = [_read_shard(path, shard) for path, shard in shards.items()]
        table = pa.concat_tables(tables) if tables else _SCHEMA.empty_table()
        description = f"{len(table)} masklets of {len(tables)} videos."
        if skipped:
            description += f" Skipped: {json.dumps(skipped)}"
        info = datasets.DatasetInfo(description=description, features=FEATURES)
        return datasets.Dataset(table, info, fingerprint=_digest(shards.values()))

    def _path(self, name: str) -> Path:
        return inside(self.shards, f"{name}.parquet")

    @staticmethod
    def _replace(path: Path, write) -> None:
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            write(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def _read_shard(path: Path, shard: bytes) -> pa.Table:
    """The masklets of a video; anything else is refused in a sentence."""
    try:
        table = pq.ParquetFile(pa.BufferReader(shard)).read()
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} is no whole Parquet file ({error}). Remove it: its video is then done anew."
        ) from None
    if not table.schema.equals(_SCHEMA):
        raise ValueError(f"Expected the columns of masklets in {path}, got {table.column_names}. Take another folder.")
    return table


def review_queue(annotations: datasets.Dataset) -> datasets.Dataset:
    """
    The masklets that wait for review, the most uncertain first.

    Args:
        annotations (`datasets.Dataset`): From [`annotate`].
    """
    order = np.argsort(-np.array(annotations["uncertainty"], dtype=float), kind="stable")
    return annotations.select([int(row) for row in order if annotations["status"][int(row)] == "waiting"])


def annotation_statistics(
    annotations: datasets.Dataset, seconds_per_click: float = 7.72, seconds_per_look: float = 0.77
) -> dict[str, float]:
    """
    What annotations took, in the terms of the paper's table 1 (https://huggingface.co/papers/2408.00714).

    Args:
        annotations (`datasets.Dataset`):
            From [`annotate`], or some of its rows.
        seconds_per_click (`float`, *optional*, defaults to `7.72`):
            A person's time for one click, with what belongs to it.
        seconds_per_look (`float`, *optional*, defaults to `0.77`):
            A person's time for looking at a frame. These two are the line of least squares through the three phases of
            the paper's table (clicks a frame, seconds a frame), not measurements of ours.

    Returns:
        `dict[str, float]`: `masklets`, `accepted`, `waiting`, `rejected`, `automatic`, `masks` (frames of all
        masklets), `edited_share` (of these, edited by hand), `clicks_per_clicked_frame`, `seconds_per_frame`
        (measured, in the functions given to `annotate`), `modelled_seconds_per_frame`.
    """
    table = annotations.select_columns(
        ["status", "provenance", "frames", "edited_frames", "clicks", "clicked_frames", "seconds"]
    ).to_pandas()
    masks = max(int(table["frames"].map(len).sum()), 1)
    clicks = int(table["clicks"].sum())
    return {
        "masklets": len(table),
        **{status: int((table["status"] == status).sum()) for status in ("accepted", "waiting", "rejected")},
        "automatic": int((table["provenance"] == "auto").sum()),
        "masks": int(table["frames"].map(len).sum()),
        "edited_share": float(table["edited_frames"].map(len).sum() / masks),
        "clicks_per_clicked_frame": clicks / max(int(table["clicked_frames"].sum()), 1),
        "seconds_per_frame": float(table["seconds"].sum() / masks),
        "modelled_seconds_per_frame": seconds_per_look + seconds_per_click * clicks / masks,
    }
