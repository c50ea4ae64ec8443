"""Where the values of a run are kept while it runs: in memory, and as Parquet parts that are only ever added to."""

import logging
import os
import re
import secrets
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hf_iclr.untrusted import as_written_by, check_links, regular_file

from .trained_rows import TrainedRows


logger = logging.getLogger(__name__)

VALIDATION = "validation"
_FOLDER, _WRITER = "shapley", "InRunDataShapleyCallback"
_RUN = re.compile(r"run-\d{8}T\d{6}-[0-9a-f]{8}")


class ShapleyStore:
    """
    Values of training rows by step, one line a row, and what is known of each step.

    Every run has a folder of its own, `shapley/run-<time>-<number>` in its output folder, so that none touches the
    values of another. [`~ShapleyStore.flush`] adds one part by renaming a finished file, with the records of its steps
    in its metadata: a process killed at any moment loses the steps that were not flushed and no others. All stays in
    memory, too, so that values outlive an output folder.

    Args:
        folder (`str` or `Path`, *optional*):
            Output folder of the run. Nothing is written without one, nor before the first flush.
        trained ([`TrainedRows`]):
            What is known of the rows.

    Attributes:
        run (`str`): name of the run's folder.
    """

    def __init__(self, folder: str | Path | None, trained: TrainedRows) -> None:
        self.root = None if folder is None else Path(folder) / _FOLDER
        self.trained = trained
        self.run = f"run-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
        self._parts: list[pd.DataFrame] = []
        self._rows: list[pd.DataFrame] = []  # not yet flushed
        self._steps: list[dict[str, float]] = []
        self._last_step = 0

    def resume(self, after_step: int, run: str, checkpoint: Path) -> None:
        """
        Go on with a run after a step: what it has stored of later ones is dropped. Values are read from beside the
        checkpoint, which may be in another output folder. `ValueError` when a link leads out of a store, a part is
        damaged, it is of other rows, or this is no name of a run.
        """
        if not _RUN.fullmatch(run):
            raise ValueError(f"Expected the name of a run in {checkpoint}, got {run!r:.80}. Begin a new run.")
        self.run, self._last_step = run, after_step
        beside = checkpoint.absolute().parent / _FOLDER / run
        mine = None if self.root is None else self.root / run
        source = beside if beside.is_dir() or mine is None else mine
        if not source.is_dir():
            logger.warning(
                "The values of steps up to %d are not in %s, beside the checkpoint: those of later steps are added to "
                "nothing. To have all, copy that folder from where the run has been, and resume again.",
                after_step,
                beside,
            )
        parts = [_part_until(after_step, part) for part in _read_parts(source)]
        self._parts = [part for part in parts if part.attrs["steps"]]
        for part in self._parts[-1:]:
            with as_written_by(_WRITER, source):
                known = TrainedRows.from_facts(part.attrs["trained"])
            if "index" in part and not self.trained.may_be(known):
                raise ValueError(
                    f"Expected the rows of the run that is resumed from {checkpoint}, {known.length} of them, got "
                    f"{self.trained.length} others, or in another order: its values would belong to other rows. "
                    "Begin a new run, or give each row an id: `id_column`."
                )
        if mine is None:
            return
        check_links(mine)
        names = [self._write(part) for part in self._parts]
        for path in mine.glob("*"):
            if path.name not in names:
                path.unlink()

    def add(self, step: int, rows: dict[str, Any], record: dict[str, float]) -> None:
        """
        Keep one step, larger than the one before, until the next flush: columns with one entry for each row, see
        [`DataShapleyResult`], and what is known of the step as a whole. `ValueError` when it does not come after.
        """
        if step <= self._last_step:
            raise ValueError(f"Expected a step after {self._last_step}, got {step}: a run's steps come once.")
        self._last_step = step
        self._rows.append(pd.DataFrame({"step": np.full(len(rows["tokens"]), step), **rows}))
        self._steps.append({"step": step, **record})

    def flush(self) -> None:
        """Write the steps added since the last flush as one part."""
        if not self._steps:
            return
        part = _concat(self._rows)
        part.attrs = {"trained": self.trained.facts(), "steps": self._steps}
        if self.root is not None:
            self._write(part)
        self._parts.append(part)
        self._rows, self._steps = [], []

    def read(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Rows and steps that were added, flushed or not."""
        rows, steps = _join(self._parts)
        return _concat([rows, *self._rows]), pd.DataFrame([*steps, *self._steps])

    def _write(self, part: pd.DataFrame) -> str:
        assert self.root is not None
        folder = self.root / self.run
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"part-{part.attrs['steps'][0]['step']:09d}.parquet"
        temporary = path.with_suffix(".tmp")
        part.to_parquet(temporary, index=False)
        os.replace(temporary, path)
        return path.name


def read_run(folder: str | Path) -> tuple[pd.DataFrame, pd.DataFrame, TrainedRows]:
    """
    Rows, steps and what is known of the rows of the run in `folder`, or of the one in its `shapley/` written last;
    `FileNotFoundError` when there is none, `ValueError` when a part is damaged or something else.
    """
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"Expected the output folder of a run, got {folder!r}.")
    folder = Path(folder)
    inside = folder if folder.name == _FOLDER else folder / _FOLDER
    runs = [path for path in inside.glob("run-*") if any(path.glob("part-*.parquet"))]
    if any(folder.glob("part-*.parquet")):
        runs = [folder]
    if not runs:
        raise FileNotFoundError(
            f"Expected the values of a run in {folder}, found none. Give the output folder of a run that had "
            "InRunDataShapleyCallback among its callbacks."
        )
    last = max(runs, key=lambda run: max(path.lstat().st_mtime_ns for path in run.glob("part-*.parquet")))
    parts = _read_parts(last)
    with as_written_by(_WRITER, last):
        rows, steps = _join(parts)
        trained = TrainedRows.from_facts(parts[0].attrs["trained"])
        check_columns(rows, pd.DataFrame(steps))
    return rows, pd.DataFrame(steps), trained


def column_of(target: str, name: str = "value") -> str:
    """The column with the values, or another quantity, of a target; `"validation[3]"` is a row of the first one."""
    if target.endswith("]"):
        return f"row_{name}_{target[len(VALIDATION) + 1 : -1]}"
    return name if target == VALIDATION else f"{name}_{target}"


def read_parquet(path: Path) -> pd.DataFrame:
    """A Parquet file as it is; `ValueError` for one that is damaged."""
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
    values = [rows["value"], *(rows[name] for name in rows if str(name).startswith("value_"))]
    if not all(pd.api.types.is_float_dtype(column) for column in values):
        raise TypeError("values that are no numbers")
    if not {"index", "id"} & set(rows):
        raise TypeError("rows without an index or id")


def _read_parts(folder: Path) -> list[pd.DataFrame]:
    check_links(folder)
    parts = [read_parquet(path) for path in sorted(folder.glob("part-*.parquet"))]
    with as_written_by(_WRITER, folder):
        for part in parts:
            if not all(isinstance(record["step"], int) for record in part.attrs["steps"]):
                raise TypeError("a step that is no number")
    return parts


def _part_until(step: int, part: pd.DataFrame) -> pd.DataFrame:
    kept = part[part["step"] <= step].reset_index(drop=True)
    kept.attrs = {**part.attrs, "steps": [record for record in part.attrs["steps"] if record["step"] <= step]}
    return kept


def _join(parts: list[pd.DataFrame]) -> tuple[pd.DataFrame, list[dict[str, float]]]:
    return _concat(parts), [record for part in parts for record in part.attrs["steps"]]


def _concat(parts: list[pd.DataFrame]) -> pd.DataFrame:
    """One below the other; parts without rows would only blur the column types."""
    parts = [part for part in parts if len(part)] or parts[:1]
    bare = [part.rename(columns=str) for part in parts]  # copies without what `concat` compares
    for part in bare:
        part.attrs = {}
    return pd.concat(bare, ignore_index=True) if bare else pd.DataFrame()
