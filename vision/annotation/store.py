"""Annotated videos on disk: one Parquet file each, whole or absent, and statistics of all of them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value

from hf_iclr.untrusted import check_links, inside, read_json, regular_file

from .masklets import Masklet
from .sources import digest


FEATURES = Features(
    {
        "video": Value("string"),
        "name": Value("string"),
        "object": Value("int32"),
        "category": Value("string"),
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
        "weights": Value("string"),
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
_LATER = {"category", "weights"}  # columns that shards of earlier versions lack


def to_row(masklet: Masklet, path: str | None, model: str, revision: str | None, weights: str) -> dict[str, Any]:
    """A masklet as a row of `FEATURES`; `path` of the video, name, commit and hash of weights of the model."""
    session, frames = masklet.session, sorted(masklet.masks)
    height, width = session.size
    obj = str(masklet.object)
    prompts = {frame: objects[obj] for frame, objects in session.prompts.to_dict().items() if obj in objects}
    return {
        "video": path,
        "name": masklet.name,
        "object": masklet.object,
        "category": masklet.category,
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
        "weights": weights,
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
    A folder of annotated videos: `shards/NAME.parquet`, one file a video, and `settings.json`. A file is there whole
    or not at all, whenever the process is killed; several processes may write to one folder.

    Args:
        folder (`str` or `Path`):
            Made if it does not exist.
        settings (`dict[str, Any]`):
            What all of its videos have in common. Models are compared by the hash of their weights if both sides know
            it, else by their names.

    Raises:
        ValueError: if the folder was made with other settings, or a link leads out of it.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]):
        self.folder = check_links(folder)
        self.shards = self.folder / "shards"
        path = self.folder / "settings.json"
        known = read_json(path) if path.exists() else settings
        without = {"model"} if isinstance(known, dict) and "weights" in known.keys() & settings.keys() else {"weights"}
        if not isinstance(known, dict) or _without(known, without) != _without(settings, without):
            raise ValueError(
                f"{folder} holds annotations made with {known}, not with {settings}. Take another folder."
            )
        self.shards.mkdir(parents=True, exist_ok=True)
        if not path.exists() or "weights" not in known:
            self.write_json("settings.json", settings)

    def names(self) -> list[str]:
        """The videos that are there."""
        return sorted(file.stem for file in self.shards.glob("*.parquet"))

    def find(self, name: str, path: str | None = None) -> str | None:
        """
        Under which name a video is there, if it is: the end of a name says what is in it. Its path is renewed if there
        is nothing under the old one any more.
        """
        ends = [f"-{name.rsplit('-', 1)[-1]}"]
        if path is not None:  # names of earlier versions ended with a hash of the path
            ends.append(f"-{digest([str(Path(path).resolve()).encode()])}")
        for known in self.names():
            if known == name or known.endswith(tuple(ends)):
                if path is not None:
                    self._relocate(inside(self.shards, f"{known}.parquet"), path)
                return known
        return None

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        """
        Writes the masklets of a video; none are a file too, which says that the video is done.

        Raises:
            OSError: if it can't be written, for instance to a full disk. Nothing of it is left then.
        """
        self._write_table(inside(self.shards, f"{name}.parquet"), pa.Table.from_pylist(rows, schema=_SCHEMA))

    def write_json(self, name: str, content: Any) -> None:
        """Writes a file of the folder in the same way."""
        text = json.dumps(content, indent=2)
        self._replace(inside(self.folder, name), lambda part: part.write_text(text))

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The masklets of a video, none if it is not there."""
        path = inside(self.shards, f"{name}.parquet")
        return _read_shard(path).to_pylist() if path.exists() else []

    def collect(self) -> Path:
        """Writes one file of all masklets, by video and object, for `read`; of several processes one does."""
        check_links(self.folder)
        path = self.folder / ".cache" / "rows.arrow"
        path.parent.mkdir(exist_ok=True)

        def write(part: Path) -> None:
            with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as stream:
                for name in self.names():  # one at a time: all of them may be more than there is memory
                    file = inside(self.shards, f"{name}.parquet")
                    if len(table := _read_shard(file)):
                        stream.write_table(table)
                    elif pq.read_metadata(file).num_row_groups:  # as earlier versions wrote it
                        self._write_table(file, table)

        self._replace(path, write)
        return path

    def read(self, skipped: list[dict[str, str]], collect: bool = True) -> datasets.Dataset:
        """All masklets, mapped into memory, collected anew or not; `skipped` videos are listed in the description."""
        path = self.collect() if collect else self.folder / ".cache" / "rows.arrow"
        rows = datasets.Dataset.from_file(str(path), info=datasets.DatasetInfo(features=FEATURES))
        status = rows.data.column("status").to_pylist()
        counts = ", ".join(f"{status.count(kind)} {kind}" for kind in ("accepted", "waiting", "rejected"))
        videos, empty = len(names := self.names()), len(set(names) - set(rows.data.column("name").to_pylist()))
        rows.info.description = (
            f"{len(rows)} masklets of {videos} videos: {counts}."
            + f" {empty} videos have no object." * bool(empty)
            + f" Skipped: {json.dumps(skipped)}" * bool(skipped)
        )
        return rows

    def _relocate(self, file: Path, path: str) -> None:
        table = _read_shard(file)
        known = table.column("video")[0].as_py() if len(table) else path
        if known is not None and known != path and not Path(known).exists():
            place = table.schema.get_field_index("video")
            moved = pa.array([path] * len(table), _SCHEMA.field("video").type)
            self._write_table(file, table.set_column(place, _SCHEMA.field("video"), moved))

    def _write_table(self, path: Path, table: pa.Table) -> None:
        def write(part: Path) -> None:
            if len(table):
                pq.write_table(table, part, use_dictionary=False, write_statistics=False)
            else:  # `write_table` writes a group of no rows, which `load_dataset` can't read
                pq.ParquetWriter(part, _SCHEMA).close()

        self._replace(path, write)

    @staticmethod
    def _replace(path: Path, write: Callable[[Path], Any]) -> None:
        part = path.with_name(f".{path.name}.{os.getpid()}.part")  # nothing looks for files that end so
        try:
            write(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def _without(settings: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in keys}


def _read_shard(path: Path) -> pa.Table:
    """The masklets of a video; anything else is refused in a sentence."""
    try:
        with pq.ParquetFile(regular_file(path), memory_map=True) as file:
            table = file.read()
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} is no whole Parquet file ({error}). Remove it: its video is then done anew."
        ) from None
    names = table.column_names
    if set(names) | _LATER != set(_SCHEMA.names) or not table.schema.equals(pa.schema([*map(_SCHEMA.field, names)])):
        raise ValueError(f"Expected the columns of masklets in {path}, got {names}. Take another folder.")
    for number, field in enumerate(_SCHEMA):
        if field.name not in names:
            table = table.add_column(number, field, pa.nulls(len(table), field.type))
    return table.cast(_SCHEMA)


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
