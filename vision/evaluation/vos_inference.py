"""Video object segmentation over a dataset, as the reference's tool of that name: masks in its layout, and J&F."""

import json
import logging
import shutil
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from tqdm import tqdm

from ..formats.annotated_video import AnnotatedVideo
from ..formats.annotated_videos import read_png_videos, read_videos
from ..formats.mask_folders import save_labels, to_labels
from ..formats.segment_files import atomic_folder, read_json, write_json
from ..session.prompts import to_boolean_mask
from ..session.segments import FrameSegments
from .j_and_f import j_and_f
from .vos import write_csv


logger = logging.getLogger(__name__)

_COLUMNS = ["video", "object", "j", "f", "j_and_f", "frames"]


def segment_dataset(
    pipe: Any, dataset: str | Path, out: str | Path, split: str = "val", **options: Any
) -> pd.DataFrame | None:
    """
    Follows every object of a dataset from the mask that shows it first, and writes `masks` in the dataset's own
    layout, a folder for each video; `table.csv`, J&F of each object by the rule of DAVIS 2017 and SA-V; `run.json`.

    Killed and called again, it goes on with the video it was at. Started by `accelerate launch` or `torchrun`, every
    process takes its share of the videos.

    Args:
        pipe (`Sam2VideoPipeline`):
            Or anything with its method `session`.
        dataset (`str` or `Path`):
            A folder of DAVIS or YouTube-VOS (`JPEGImages` and `Annotations`) or of SA-V's validation and test sets
            (`JPEGImages_24fps` and `Annotations_6fps`, a folder an object).
        out (`str` or `Path`):
            New, or what an earlier call with the same arguments left.
        split (`str`, *optional*, defaults to `"val"`):
            Which list of videos to keep to (`ImageSets/2017/val.txt`, `sav_val.txt`); without lists all count.
        options:
            Fields of `VideoSessionConfig`.

    Returns:
        `pandas.DataFrame`: a row an object, with J, F and J&F in 0..1 and the number of `frames` that count, in all
        processes; or `None` if no frame but those that show an object first has masks, as in the validation set of
        YouTube-VOS.

    Raises:
        ValueError: if `dataset` has none of these layouts, or `out` holds something else.
    """
    dataset, out, state = Path(dataset), Path(out), processes()
    by_object = (dataset / "Annotations_6fps").is_dir()
    videos = _sav_videos(dataset, split) if by_object else read_videos(dataset, split)
    if not videos:
        raise ValueError(f"Expected videos of the split {split!r} in {dataset}, got none.")
    model = getattr(getattr(pipe, "model", None), "name_or_path", "")
    run = {"dataset": str(dataset.resolve()), "split": split, "model": model, "options": {**options}}
    if state.is_main_process:
        _begin(run, out)
    state.wait_for_everyone()
    if read_json(out / "run.json", ("dataset",)) != json.loads(json.dumps(run)):
        raise ValueError(
            f"Expected {out} to be new or of this very run, got that of {(out / 'run.json').read_text()}."
        )
    options = {"keep": "window", "feature_cache_bytes": 0, "undo_levels": 0, **options, "output": "rle"}
    mine = list(islice(videos, state.process_index, None, state.num_processes))
    for video in tqdm(mine, desc="videos", disable=not state.is_main_process):
        scores = out / "scores" / f"{video.name}.csv"
        if not scores.exists():
            rows = _segment(pipe, video, out / "masks" / video.name, by_object, options)
            write_csv(pd.DataFrame(rows, columns=_COLUMNS), scores)
    state.wait_for_everyone()
    parts = [pd.read_csv(out / "scores" / f"{video.name}.csv", dtype={"video": str}) for video in videos]
    table = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    if not len(table):
        return None
    if state.is_main_process:
        write_csv(table, out / "table.csv")
    return table


def processes() -> PartialState:
    """The processes of this run; without an accelerator, accelerate takes several for one unless it is told."""
    return PartialState(cpu=not torch.accelerator.is_available())


def _begin(run: Mapping[str, Any], out: Path) -> None:
    if (out / "run.json").exists():
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"Expected a new folder, or one that an earlier call left, got {out}, which holds others.")
    write_json(run, out / "run.json")


def _sav_videos(folder: Path, split: str) -> list[AnnotatedVideo]:
    videos = read_png_videos(folder / "JPEGImages_24fps", folder / "Annotations_6fps")
    names = folder / f"sav_{split}.txt"
    listed = names.read_text().split() if names.exists() else [video.name for video in videos]
    return [video for video in videos if video.name in listed]


def _segment(pipe: Any, video: AnnotatedVideo, folder: Path, by_object: bool, options: Mapping) -> list[dict]:
    """Tracks the objects of a video and writes their masks; a row of scores for each that has some."""
    names = [Path(image).stem for image in video.video]
    starts: dict[int, int] = {}
    session = pipe.session(video.video, **options)
    for frame in video.frames:
        for obj, mask in video.masks(frame).items():
            if obj not in starts and (shown := to_boolean_mask(mask)).any():
                starts[obj] = frame
                session.add(frame, obj, mask=shown)
    if not starts:
        logger.warning("No mask of %s shows an object; it is left out.", video.name)
        return []
    truth = video.stacked(video.frames, session.size, list(starts))
    found = {obj: np.zeros_like(masks) for obj, masks in truth.items()}
    places = {frame: place for place, frame in enumerate(video.frames)}
    if folder.exists():  # of a run that was killed before its scores were written
        shutil.rmtree(folder)
    with atomic_folder(folder) as part:
        write = _write_objects if by_object else _write_palette
        for frame in range(min(starts.values())):
            write(FrameSegments(frame, session.size, {}, {}, {}), sorted(starts), part, names)
        for segments in session.iterate():
            write(segments, sorted(starts), part, names)
            for obj in segments.objects if segments.frame in places else ():
                found[obj][places[segments.frame]] = segments.binary(obj)
    rows = []
    for obj in sorted(starts):
        first = places[starts[obj]]
        counted = len(video.frames) - first - 2
        if counted > 0:
            scores = j_and_f([found[obj][first:]], [truth[obj][first:]], skip_first_and_last=True)
            row = {name: scores[name] for name in ("j", "f", "j_and_f")}
            rows.append({"video": video.name, "object": obj, **row, "frames": counted})
    return rows


def _write_palette(segments: FrameSegments, objects: list[int], folder: Path, names: list[str]) -> None:
    save_labels(to_labels(segments), folder / f"{names[segments.frame]}.png")


def _write_objects(segments: FrameSegments, objects: list[int], folder: Path, names: list[str]) -> None:
    for obj in objects:
        mask = segments.binary(obj) if obj in segments.masks else np.zeros(segments.size, bool)
        (folder / f"{obj:03}").mkdir(exist_ok=True)
        save_labels(mask.astype(np.uint8), folder / f"{obj:03}" / f"{names[segments.frame]}.png")
