"""What is kept of scored steps: sums for the logs, and values in memory and in Parquet parts, only ever added to."""

import json
import logging
import os
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from hf_iclr.untrusted import as_written_by, check_links, parse_json, read_safetensors, regular_file

from .trained_rows import TrainedRows


logger = logging.getLogger(__name__)

VALIDATION = "validation"
_FOLDER, _WRITER = "shapley", "InRunDataShapleyCallback"
_STATE_FILE = "shapley_direction.safetensors"  # of a checkpoint
_RUN = re.compile(r"run-\d{8}T\d{6}-[0-9a-f]{8}")


class ShapleyStore:
    """
    Values of training rows by step, one line a row, and what is known of each step.

    Every run has a folder of its own, `shapley/run-<time>-<number>` in its output folder, so that none touches the
    values of another. [`~ShapleyStore.add`] writes one part by renaming a finished file, with the records of its steps
    in its metadata: a process killed at any moment loses the steps that were not added and no others. All stays in
    memory, too, so that values outlive an output folder.

    Args:
        folder (`str` or `Path`, *optional*):
            Output folder of the run. Nothing is written without one, nor before there are steps.
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

    def resume(self, after_step: int, run: str, checkpoint: Path) -> None:
        """
        Go on with a run after a step: what it has stored of later ones is dropped. Values are read from beside the
        checkpoint, which may be in another output folder. `ValueError` when a link leads out of a store, a part is
        damaged, it is of other rows, or this is no name of a run.
        """
        if not _RUN.fullmatch(run):
            raise ValueError(f"Expected the name of a run in {checkpoint}, got {run!r:.80}. Begin a new run.")
        self.run = run
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

    def add(self, rows: Sequence[pd.DataFrame], steps: list[dict[str, float]]) -> None:
        """
        Keep and write steps that come after those before: lines as [`DataShapleyResult`] has them, in one table or
        several, and what is known of each step as a whole.
        """
        if steps:
            part = _concat(rows)
            part.attrs = {"trained": self.trained.facts(), "steps": steps}
            self._parts.append(part)
            if self.root is not None:
                self._write(part)

    def read(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """All rows and steps that were added."""
        rows, steps = _join(self._parts)
        return rows, pd.DataFrame(steps)

    def _write(self, part: pd.DataFrame) -> str:
        assert self.root is not None
        folder = self.root / self.run
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"part-{part.attrs['steps'][0]['step']:09d}.parquet"
        temporary = path.with_suffix(".tmp")
        part.to_parquet(temporary, index=False)
        os.replace(temporary, path)
        return path.name


@dataclass
class StepValues:
    """What a step found out: rows in the order they came, values of shape `(rows, targets)` in nats."""

    step: int
    ids: list[int] | list[str]
    values: np.ndarray
    tokens: np.ndarray
    token_values: list[list[np.ndarray] | None]
    record: dict[str, float]


class RunRecords:
    """
    The scored steps of a run, from the engine to the logs and the store, which writes to `folder` if there is one.

    `collected` are steps of this process that are not yet in the store; `first_losses` those of each target before its
    first scored step, and `sums` those of its values so far, over all processes, in nats; `ended`: whether the losses
    after the last step are known.
    """

    def __init__(self, folder: Path | None, trained: TrainedRows, targets: list[str], with_tokens: bool) -> None:
        self.store, self.targets, self.with_tokens = ShapleyStore(folder, trained), targets, with_tokens
        self.collected: list[StepValues] = []
        self.first_losses: dict[str, float] = {}
        self.sums = dict.fromkeys(targets, 0.0)
        self._measured: dict[str, tuple[float, float]] = {}  # last loss, and the sum of values before it
        self._last: dict[str, float] = {}
        self._scored: float | None = None
        self._text_ids = self.ended = self._is_new = False
        self._rows = self._harmful = 0

    def add(self, found: StepValues | None) -> None:
        """Count a step, if it was scored."""
        if found is None:
            return
        self.collected.append(found)
        self._text_ids = self._text_ids or bool(found.ids) and isinstance(found.ids[0], str)
        for name in self.targets:
            loss = found.record.get(f"loss_{name}")
            if loss is not None:
                self.first_losses.setdefault(name, loss)
                self._measured[name] = loss, self.sums[name]
                self._is_new = True
            self.sums[name] += found.record.get(f"sum_{name}", 0.0)
        self._scored = found.record.get("scored_share", self._scored)
        if f"energy_{VALIDATION}" in found.record:
            self._last = found.record
        self._rows += len(found.values)
        self._harmful += int((found.values[:, 0] < 0).sum())

    def add_end(self, step: int, losses: dict[str, float]) -> None:
        """Count the validation losses after the last step, as a step without rows."""
        self.ended = True
        record = {f"loss_{name}": loss for name, loss in losses.items()}
        self.add(StepValues(step, [], np.zeros((0, len(losses))), np.zeros(0, dtype=np.int64), [], record))
        ratio = self._explained_ratio()
        if ratio < 0.5 or ratio > 2:  # not NaN
            logger.warning(
                "The values add up to %.3g times the fall of the validation loss (%.4g to %.4g nats). Their sizes "
                "mean little, their order may still: take smaller steps, or refresh more often.",
                ratio,
                self.first_losses[VALIDATION],
                losses[VALIDATION],
            )

    def _explained_ratio(self) -> float:
        """Sum of values over the fall of the loss, both up to its last measurement; NaN where it did not change."""
        loss, total = self._measured[VALIDATION]
        drop = self.first_losses[VALIDATION] - loss
        return total / drop if drop else float("nan")

    def logs(self) -> dict[str, float]:
        """What to log about the last measurement; counts of rows start anew."""
        logs = {}
        if self._is_new:
            logs = {f"shapley/loss_{name}": self._measured[name][0] for name in self.targets if name[-1] != "]"}
            ratio = self._explained_ratio()
            if not np.isnan(ratio):
                logs["shapley/explained_ratio"] = ratio
            self._is_new = False
        if self._rows:
            logs["shapley/harmful_share"] = self._harmful / self._rows
        for key in ("energy", "agreement"):
            if f"{key}_{VALIDATION}" in self._last:
                logs[f"shapley/{key}"] = self._last[f"{key}_{VALIDATION}"]
        if self._scored is not None:
            logs["shapley/scored_share"] = self._scored
        self._rows = self._harmful = 0
        return logs

    def flush(self) -> None:
        """Bring the rows of all processes together, which have the same steps, and write them."""
        steps, self.collected = self.collected, []
        parts = [steps]
        if not self.is_alone:
            parts = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(parts, steps)
        if _is_first_process():
            rows = [self._table(found) for of_step in zip(*parts, strict=True) for found in of_step]
            self.store.add(rows, [{"step": found.step, **found.record} for found in steps])

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process."""
        return not dist.is_initialized() or dist.get_world_size() == 1

    def _table(self, found: StepValues) -> pd.DataFrame:
        """One line for each row, as in [`DataShapleyResult`]."""
        name, kind = ("id", object) if self._text_ids else ("index", np.int64)  # steps without rows don't show it
        ids = np.array(found.ids, dtype=kind)
        columns: dict[str, Any] = {"step": np.full(len(ids), found.step), name: ids, "tokens": found.tokens}
        for which, target in enumerate(self.targets):
            columns[column_of(target)] = found.values[:, which]
            if self.with_tokens:
                of_target = [None if kept is None else kept[which].tolist() for kept in found.token_values]
                columns[column_of(target, "token_values")] = pd.Series(of_target, dtype=object)
        return pd.DataFrame(columns)

    def save(self, folder: Path, directions: dict[str, torch.Tensor]) -> None:
        """Write what a checkpoint needs to go on: the directions, the sums, and which run it is."""
        sums = {
            f"explained.{name}": torch.tensor([loss, self.sums[name]], dtype=torch.float64)
            for name, loss in self.first_losses.items()
        }
        metadata = {"targets": json.dumps(self.targets), "run": self.store.run}
        save_file(directions | sums, folder / _STATE_FILE, metadata=metadata)

    def resume(self, checkpoint: Path, step: int) -> dict[str, torch.Tensor]:
        """Take back a checkpoint's sums and the values until its step, and return its directions."""
        path = checkpoint / _STATE_FILE
        if not path.exists():
            logger.warning("%s is missing: the direction is measured anew, and values of earlier steps aren't.", path)
            return {}
        tensors, metadata = read_safetensors(path)
        targets = parse_json(metadata.get("targets", "null"), path)
        if targets not in (None, self.targets):
            raise ValueError(
                f"Expected the validation sets of the checkpoint, {targets}, got {self.targets}. Resume with the same "
                "`targets` in the same order, or begin a new run: `trainer.train()` without `resume_from_checkpoint`."
            )
        for name in self.targets:
            known = tensors.pop(f"explained.{name}", None)
            if known is not None:
                self.first_losses[name], self.sums[name] = known.tolist()
        if _is_first_process():
            self.store.resume(step, metadata.get("run", ""), checkpoint)
        return tensors


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


def _is_first_process() -> bool:
    """Whether this process is the one that writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


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


def _concat(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One below the other; parts without rows would only blur the column types."""
    parts = [part for part in parts if len(part)] or parts[:1]
    bare = [part.rename(columns=str) for part in parts]  # copies without what `concat` compares
    for part in bare:
        part.attrs = {}
    return pd.concat(bare, ignore_index=True) if bare else pd.DataFrame()
