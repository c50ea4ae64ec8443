"""Semi-supervised video object segmentation: an object is shown once, and J&F tell how well it is followed."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from hf_iclr.extras import new_figure, save_figure
from hf_iclr.saving import atomic_file

from ..formats.annotated_video import to_annotated
from .j_and_f import j_and_f
from .simulated_prompts import check_kind, prompt_object


logger = logging.getLogger(__name__)


@dataclass
class VosResult:
    """
    What [`evaluate_vos`] measured.

    Args:
        table (`pandas.DataFrame`):
            A row for each clip, object and kind of prompt: `j`, `f`, `j_and_f` in 0..1, their recall and decay, the
            `frames` that count, `clicks`, and `seconds` of the clip's pass, shared among its objects.
        frames (`pandas.DataFrame`):
            A row for each of these and frame that counts: `frame`, `since` the prompt, `j`, `f`.
    """

    table: pd.DataFrame
    frames: pd.DataFrame = field(repr=False)

    def mean(self) -> pd.DataFrame:
        """Means over objects by kind of prompt, in the order they were asked for."""
        columns = ["j", "f", "j_and_f", "clicks", "frames", "seconds"]
        return self.table.groupby("prompt", sort=False)[columns].mean()

    def plot(self, path: str | Path) -> None:
        """Draws J&F by kind of prompt, and against the frames since the prompt, to an image file."""
        figure = new_figure("VosResult.plot", (9, 3.6))
        bars, curves = figure.subplots(1, 2, width_ratios=(2, 3))
        means = self.mean()["j_and_f"]
        bars.bar([_label(kind) for kind in means.index], means)
        bars.set(ylabel="J&F", ylim=(0, 1))
        values = self.frames.assign(j_and_f=(self.frames["j"] + self.frames["f"]) / 2)
        for kind, rows in values.groupby("prompt", sort=False):
            curve = rows.groupby("since")["j_and_f"].mean()
            curves.plot(curve.index, curve, label=_label(kind))
        curves.set(xlabel="frames since the prompt", ylim=(0, 1))
        curves.legend()
        with atomic_file(path) as part:
            figure.savefig(part, dpi=150)

    def save(self, folder: str | Path) -> None:
        """Writes `table.csv`, `frames.csv`, `mean.csv` and, with matplotlib, `plot.png` to a folder."""
        tables = {"table": self.table, "frames": self.frames, "mean": self.mean().reset_index()}
        save_tables(folder, tables, self.plot)


def evaluate_vos(
    pipe: Any,
    clips: Iterable[Any],
    prompts: Sequence[str | int] = ("mask", "box", 1, 3, 5),
    skip_first_and_last: bool = True,
    **options: Any,
) -> VosResult:
    """
    Measures how well objects are followed that were shown on one frame, by each kind of prompt: the semi-supervised
    protocol of https://huggingface.co/papers/2408.00714. Prompts come from the true masks, clicks after the first from
    the middle of the largest error that is left.

    An object is shown on the first annotated frame that it is visible on, and only frames from there on count.

    Args:
        pipe (`Sam2VideoPipeline`):
            Or anything with its method `session`.
        clips (`Iterable`):
            A clip is (frames, {object: masks}), an [`~hf_iclr.vision.formats.AnnotatedVideo`], a row
            of a dataset with `frames` and `masks`, or anything with these attributes. See also
            [`~hf_iclr.vision.formats.read_videos`].
        prompts (`Sequence[str | int]`, *optional*, defaults to `("mask", "box", 1, 3, 5)`):
            "mask", "box", or a number of clicks.
        skip_first_and_last (`bool`, *optional*, defaults to `True`):
            Whether the first frame, which is the prompted one, and the last do not count: the rule of DAVIS 2017 and
            of SA-V. An object with fewer than three frames is left out then.
        options:
            Fields of `VideoSessionConfig`, such as `smoothing=0.5`.

    Returns:
        [`VosResult`]

    Raises:
        ValueError: if a kind of prompt is unknown, there is no clip, or nothing of any counts.

    Example:

    ```python
    >>> result = evaluate_vos(pipe, read_videos("DAVIS", split="val"))
    >>> result.mean()
    >>> result.save("vos")
    ```
    """
    if not prompts or isinstance(prompts, str):
        raise ValueError(f'Expected kinds of prompts such as ("mask", "box", 1), got {prompts!r}.')
    for kind in prompts:
        check_kind(kind)
    options = {"keep": "window", "feature_cache_bytes": 0, "undo_levels": 0, **options}
    table: list[dict[str, Any]] = []
    frames: list[dict[str, Any]] = []
    for clip, video, truth, starts in clips_with_objects(clips, 3 if skip_first_and_last else 1):
        for kind in prompts if starts else ():
            begin = time.perf_counter()
            session = pipe.session(video, **options)
            clicks = {
                obj: prompt_object(session, clip.frames[start], obj, truth[obj][start], kind)
                for obj, start in starts.items()
            }
            predictions = {obj: np.zeros_like(truth[obj]) for obj in starts}
            places = {frame: place for place, frame in enumerate(clip.frames)}
            for segments in session.iterate():
                for obj in segments.objects if segments.frame in places else ():
                    predictions[obj][places[segments.frame]] = segments.binary(obj)
            seconds = (time.perf_counter() - begin) / len(starts)
            for obj, start in starts.items():
                row = {"clip": clip.name, "object": obj, "prompt": kind}
                pair = [predictions[obj][start:]], [truth[obj][start:]]
                scores = j_and_f(*pair, skip_first_and_last=skip_first_and_last, per_frame=True)
                values = scores.pop("j_per_frame")[0], scores.pop("f_per_frame")[0]
                counted = clip.frames[start + 1 : -1] if skip_first_and_last else clip.frames[start:]
                table.append({**row, **scores, "frames": len(counted), "clicks": clicks[obj], "seconds": seconds})
                for frame, j, f in zip(counted, *values, strict=True):
                    frames.append({**row, "frame": frame, "since": frame - clip.frames[start], "j": j, "f": f})
    if not table:
        raise ValueError("Expected clips with visible objects, got none.")
    return VosResult(pd.DataFrame(table), pd.DataFrame(frames))


def clips_with_objects(clips: Iterable[Any], least: int) -> Iterator[tuple]:
    """
    Each clip as an [`AnnotatedVideo`], its frames, its masks by object, and by object the place of the annotated frame
    that shows it first. Objects with fewer than `least` annotated frames from there on are left out, which is logged.
    """
    for number, item in enumerate(tqdm(clips, desc="clips")):
        clip = to_annotated(item, number)
        video, truth = clip.load()
        starts = {}
        for obj, masks in truth.items():
            seen = np.flatnonzero(masks.any(axis=(1, 2)))
            if not len(seen) or len(masks) - seen[0] < least:
                logger.warning("Object %s of %s is left out: too few annotated frames show it.", obj, clip.name)
            else:
                starts[obj] = int(seen[0])
        yield clip, video, truth, starts


def save_tables(folder: str | Path, tables: Mapping[str, pd.DataFrame], plot: Callable[[Path], None]) -> None:
    """Writes each table as CSV under its name and, with matplotlib, `plot.png` to a folder."""
    for name, table in tables.items():
        write_csv(table, Path(folder) / f"{name}.csv")
    save_figure(plot, Path(folder) / "plot.png")


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Writes a table, whole or not at all."""
    with atomic_file(path) as part:
        table.to_csv(part, index=False)


def _label(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"{kind} click{'s' * (kind > 1)}"
