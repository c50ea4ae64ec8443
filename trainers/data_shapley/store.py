"""Where the values of a run are kept while it runs: Parquet parts that are only ever added to."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hf_iclr.untrusted import check_links, regular_file


class ShapleyStore:
    """
    Values of training rows by step, in `shapley/rows` and `shapley/steps` of a run's output folder.

    [`~ShapleyStore.flush`] writes one part: first its rows, then its steps, each by renaming a finished file. A part
    counts when its steps are there, so a process killed at any moment loses the steps that were not flushed and no
    others.

    Args:
        folder (`str` or `Path`):
            Output folder of the run. Nothing is written before the first flush.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder) / "shapley"
        self._rows: list[pd.DataFrame] = []
        self._records: list[dict[str, float]] = []
        self._last_step = 0

    def truncate(self, after_step: int) -> None:
        """
        Begin after a step: what a checkpoint of that step holds is taken back, else later steps are dropped.

        Args:
            after_step (`int`):
                Number of optimizer steps done, as in `state.global_step`; 0 clears the store.

        Raises:
            ValueError: when a link leads out of the store or the checkpoint's copy of it: nothing is removed there.
        """
        self._rows, self._records, self._last_step = [], [], after_step
        snapshot = self.folder.parent / f"checkpoint-{after_step}" / self.folder.name
        check_links(self.folder)
        check_links(snapshot)
        if not after_step:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif snapshot.is_dir():
            _copy_folder(snapshot, self.folder)
        self._drop_after(after_step)

    def _drop_after(self, step: int) -> None:
        names = {path.name for path in self.folder.glob("steps/part-*.parquet")}
        for path in self.folder.glob("*/*"):
            if path.name not in names:  # what a killed writer left
                path.unlink()
        for name in names:
            rows, steps = (self.folder / kind / name for kind in ("rows", "steps"))
            frame = read_parquet(steps)
            if frame["step"].min() > step:
                steps.unlink()
                rows.unlink()
            elif frame["step"].max() > step:
                for path in (rows, steps):
                    frame = read_parquet(path)
                    _write(frame[frame["step"] <= step], path)

    def add(self, step: int, rows: dict[str, np.ndarray], record: dict[str, float]) -> None:
        """
        Keep one step until the next flush.

        Args:
            step (`int`):
                Its number, from 1; larger than that of the step before.
            rows (`dict[str, np.ndarray]`):
                One entry for each row and target: `index` (int64, position in the training data) or `id` (str),
                `target` (str), `value` (float64, nats of that target's loss, positive is helpful), `tokens` (int64)
                and, if wanted, `token_values` (a list of floats each).
            record (`dict[str, float]`):
                What is known of the step as a whole: `lr`, and for each target `loss_<target>` (where it was
                measured), `sum_<target>`, `energy_<target>`, `unattributed_<target>`.

        Raises:
            `ValueError`: when the step does not come after the one before.
        """
        if step <= self._last_step:
            raise ValueError(
                f"Expected a step after {self._last_step}, got {step}. Call `truncate(after_step)` before a run."
            )
        self._last_step = step
        columns: dict[str, Any] = {
            name: list(values) if name == "token_values" else values for name, values in rows.items()
        }
        self._rows.append(pd.DataFrame({"step": np.full(len(rows["value"]), step), **columns}))
        self._records.append({"step": step, **record})

    def flush(self) -> None:
        """Write the steps added since the last flush as one part."""
        if not self._records:
            return
        name = f"part-{self._records[0]['step']:09d}.parquet"
        _write(pd.concat(self._rows, ignore_index=True), self.folder / "rows" / name)
        _write(pd.DataFrame(self._records), self.folder / "steps" / name)
        self._rows, self._records = [], []

    def snapshot(self, folder: str | Path) -> None:
        """
        Flush, and copy the store into a checkpoint, from where [`~ShapleyStore.truncate`] takes it on resume.

        Args:
            folder (`str` or `Path`):
                The checkpoint's folder.
        """
        self.flush()
        if self.folder.is_dir():
            _copy_folder(self.folder, Path(folder) / self.folder.name)

    def read(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """
        All that was added, flushed or not.

        Returns:
            `tuple[pandas.DataFrame, pandas.DataFrame]`: rows and steps, both by `step`; columns as in
            [`~ShapleyStore.add`].
        """
        check_links(self.folder)
        names = sorted(path.name for path in self.folder.glob("steps/part-*.parquet"))
        rows = [read_parquet(self.folder / "rows" / name) for name in names]
        steps = [read_parquet(self.folder / "steps" / name) for name in names]
        if self._records:
            rows, steps = rows + self._rows, [*steps, pd.DataFrame(self._records)]
        if not steps:
            raise FileNotFoundError(
                f"Expected the values of a run in {self.folder}, found none. Give the output folder of a run that had "
                "InRunDataShapleyCallback among its callbacks."
            )
        with_rows = [part for part in rows if len(part)] or rows[:1]  # the rest would only blur the column types
        return pd.concat(with_rows, ignore_index=True), pd.concat(steps, ignore_index=True)


def read_parquet(path: Path) -> pd.DataFrame:
    """
    A Parquet file as it is; a damaged one is refused in a sentence.

    Raises:
        ValueError: when it is no Parquet file, or cut short.
    """
    try:
        return pd.read_parquet(regular_file(path))
    except (ValueError, OSError) as error:
        raise ValueError(f"Expected a whole Parquet file, got {path}, which can't be read ({error}).") from error


def check_columns(rows: pd.DataFrame, steps: pd.DataFrame) -> None:
    """Raises `TypeError` where columns as of [`~ShapleyStore.read`] hold something else."""
    counts = [rows[name] for name in ("step", "tokens", *({"index"} & set(rows)))]
    for column in (*counts, steps["step"]):
        if not pd.api.types.is_integer_dtype(column) or (column < 0).any():
            raise TypeError(f"a column {column.name} that is no count")
    if not pd.api.types.is_float_dtype(rows["value"]) or not rows["target"].map(type).eq(str).all():
        raise TypeError("values that are no numbers, or targets that are no text")


def _write(frame: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    frame.to_parquet(temporary, index=False)
    os.replace(temporary, path)


def _copy_folder(source: Path, target: Path) -> None:
    temporary = target.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
