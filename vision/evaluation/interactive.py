"""Interactive segmentation with a simulated annotator: what clicks on more and more frames bring."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hf_iclr.extras import new_figure
from hf_iclr.saving import atomic_file

from ..session.session import VideoSession
from .j_and_f import j_and_f, region_similarity
from .simulated_prompts import correct_object, prompt_object
from .vos import clips_with_objects, save_tables


MODES = ("offline", "online")


@dataclass
class InteractiveResult:
    """
    What [`evaluate_interactive`] measured.

    Args:
        mode (`str`):
            "offline" or "online".
        table (`pandas.DataFrame`):
            A row for each clip, object and number of clicked `frames`: `j`, `f`, `j_and_f` in 0..1; the `clicks` and
            `seconds` (of the machine) that it took in all; `clicked`, the frame that came last.
    """

    mode: str
    table: pd.DataFrame

    def mean(self) -> pd.DataFrame:
        """
        Means over objects by number of clicked frames; an object that needed no further frame counts with what it had.
        """
        columns = ["j", "f", "j_and_f", "clicks", "seconds"]
        wide = self.table.pivot_table(index="frames", columns=["clip", "object"], values=columns).ffill()
        return wide.T.groupby(level=0).mean().T[columns]

    def effort(self, j_and_f: float = 0.8) -> pd.Series:
        """
        What it takes to reach a J&F.

        Args:
            j_and_f (`float`, *optional*, defaults to `0.8`):
                The value to reach.

        Returns:
            `pandas.Series`: `reached`, the share of objects that did; `frames`, `clicks` and `seconds`, means over
            objects, in which one that did not counts with all it was given.
        """
        objects = self.table.groupby(["clip", "object"], sort=False)
        reached = objects["j_and_f"].max() >= j_and_f
        ends = [rows[rows["j_and_f"] >= j_and_f].head(1) for _, rows in objects]
        ends = [end if len(end) else rows.tail(1) for end, (_, rows) in zip(ends, objects, strict=True)]
        return pd.Series({"reached": reached.mean(), **pd.concat(ends)[["frames", "clicks", "seconds"]].mean()})

    def plot(self, path: str | Path, others: Mapping[str, "InteractiveResult"] | None = None) -> None:
        """
        Draws J&F against clicked frames, clicks and seconds to an image file.

        Args:
            path (`str` or `Path`):
                The file.
            others (`Mapping[str, InteractiveResult]`, *optional*):
                More curves, by name.
        """
        figure = new_figure("InteractiveResult.plot", (10, 3.4))
        panels = figure.subplots(1, 3, sharey=True)
        for name, result in {self.mode: self, **(others or {})}.items():
            means = result.mean().reset_index()
            for panel, column in zip(panels, ("frames", "clicks", "seconds"), strict=True):
                panel.plot(means[column], means["j_and_f"], marker="o", markersize=3, label=name)
        for panel, label in zip(panels, ("clicked frames", "clicks", "seconds"), strict=True):
            panel.set(xlabel=label)
        panels[0].set(ylabel="J&F")
        panels[0].legend()
        with atomic_file(path) as part:
            figure.savefig(part, dpi=150)

    def save(self, folder: str | Path) -> None:
        """Writes `table.csv`, `mean.csv` and, with matplotlib, `plot.png` to a folder."""
        save_tables(folder, {"table": self.table, "mean": self.mean().reset_index()}, self.plot)


def evaluate_interactive(
    pipe: Any,
    clips: Iterable[Any],
    mode: str = "offline",
    clicks_per_frame: int = 3,
    max_frames: int = 8,
    pause_below: float = 0.75,
    **options: Any,
) -> InteractiveResult:
    """
    Measures what corrections bring: the interactive protocols of https://huggingface.co/papers/2408.00714, with an
    annotator who knows the truth. He clicks on the first frame that shows an object, and each click goes into the
    middle of the largest error that is left.

    Offline he sees the whole video after each pass, and clicks on the frame with the lowest IoU that he has not
    clicked on yet; then all is tracked anew, with all clicks so far. Online he sees each frame once: he pauses where
    the IoU is too low, clicks there, and goes on; each number of frames he may click on is a pass of its own, which
    goes on without him once they are used up. Every object has a session of its own, and all annotated frames from the
    first that shows it count.

    Args:
        pipe (`Sam2VideoPipeline`):
            Or anything with its method `session`.
        clips (`Iterable`):
            As in [`evaluate_vos`].
        mode (`str`, *optional*, defaults to `"offline"`):
            "offline" or "online".
        clicks_per_frame (`int`, *optional*, defaults to `3`):
            N_click of the paper, fewer if the mask becomes exact.
        max_frames (`int`, *optional*, defaults to `8`):
            N_frame of the paper: on how many frames he clicks at most, the first included.
        pause_below (`float`, *optional*, defaults to `0.75`):
            The IoU below which he pauses online.
        options:
            Fields of `VideoSessionConfig`.

    Returns:
        [`InteractiveResult`]

    Raises:
        ValueError: if an argument is out of range or there is no visible object.

    Example:

    ```python
    >>> result = evaluate_interactive(pipe, read_videos("DAVIS", split="val"), mode="online")
    >>> result.mean()
    >>> result.effort(j_and_f=0.8)
    ```
    """
    if mode not in MODES:
        raise ValueError(f"Expected mode to be one of {', '.join(MODES)}, got {mode!r}.")
    if clicks_per_frame < 1 or max_frames < 1 or not 0 <= pause_below <= 1:
        raise ValueError(
            "Expected clicks_per_frame and max_frames of at least 1 and pause_below in 0..1, got "
            f"{clicks_per_frame}, {max_frames} and {pause_below}."
        )
    table: list[dict[str, Any]] = []
    for clip, video, truth, starts in clips_with_objects(clips, 1):
        for obj, start in starts.items():
            session = partial(pipe.session, video)
            annotator = _Annotator(session, obj, truth[obj][start:], clip.frames[start:], clicks_per_frame, options)
            rounds = annotator.offline(max_frames) if mode == "offline" else annotator.online(max_frames, pause_below)
            for frames, row in enumerate(rounds, start=1):
                scores = j_and_f([annotator.masks], [annotator.truth])
                scores = {name: scores[name] for name in ("j", "f", "j_and_f")}
                table.append({"clip": clip.name, "object": obj, "frames": frames, **row, **scores})
    if not table:
        raise ValueError("Expected clips with visible objects, got none.")
    return InteractiveResult(mode, pd.DataFrame(table))


@dataclass
class _Annotator:
    """Clicks on one object of a clip; `masks` are what the session showed last, on the frames of `truth`."""

    open_session: Callable[..., VideoSession]
    obj: int
    truth: np.ndarray
    frames: Sequence[int]
    clicks_per_frame: int
    options: Mapping[str, Any]

    def __post_init__(self):
        self.masks = np.zeros_like(self.truth)
        self.places = {frame: place for place, frame in enumerate(self.frames)}

    def offline(self, max_frames: int) -> Iterator[dict[str, Any]]:
        """A pass over the whole video for each row."""
        begin = time.perf_counter()
        session = self.open_session(**{"undo_levels": 0, **self.options})
        clicks = prompt_object(session, self.frames[0], self.obj, self.truth[0], self.clicks_per_frame)
        seconds = time.perf_counter() - begin
        clicked = [0]
        while True:
            begin = time.perf_counter()
            for segments in session.iterate():
                if segments.frame in self.places:
                    self.masks[self.places[segments.frame]] = segments.binary(self.obj)
            seconds += time.perf_counter() - begin
            yield {"clicked": self.frames[clicked[-1]], "clicks": clicks, "seconds": seconds}
            ious = region_similarity(self.masks, self.truth)
            ious[clicked] = 1
            worst = int(ious.argmin())
            if len(clicked) == max_frames or ious[worst] == 1:
                return
            begin = time.perf_counter()
            segments = session.segments(self.frames[worst])
            clicks += correct_object(session, segments, self.obj, self.truth[worst], self.clicks_per_frame)
            seconds += time.perf_counter() - begin
            clicked.append(worst)

    def online(self, max_frames: int, pause_below: float) -> Iterator[dict[str, Any]]:
        """
        A pass with one more frame to click on for each row. It begins where the one before would have needed that
        frame: what lies before is the same.
        """
        spent, begin = 0.0, time.perf_counter()
        session = self.open_session(**{"feature_cache_bytes": 0, "undo_levels": 0, **self.options, "keep": "all"})
        clicks = prompt_object(session, self.frames[0], self.obj, self.truth[0], self.clicks_per_frame)
        clicked, start = [self.frames[0]], None
        while True:
            pause, until = None, spent
            for segments in session.iterate(start=start) if start is None or start <= self.frames[-1] else ():
                if segments.frame not in self.places:
                    continue
                place = self.places[segments.frame]
                self.masks[place] = segments.binary(self.obj)
                pair = self.masks[place : place + 1], self.truth[place : place + 1]
                if place and pause is None and region_similarity(*pair)[0] < pause_below:
                    pause, until = segments.frame, spent + time.perf_counter() - begin
            yield {"clicked": clicked[-1], "clicks": clicks, "seconds": spent + time.perf_counter() - begin}
            if pause is None or len(clicked) == max_frames:
                return
            spent, begin = until, time.perf_counter()
            place, segments = self.places[pause], session.segments(pause)
            clicks += correct_object(session, segments, self.obj, self.truth[place], self.clicks_per_frame)
            self.masks[place] = session.segments(pause).binary(self.obj)
            clicked.append(pause)
            start = pause + 1
