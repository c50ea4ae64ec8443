"""What the callback keeps of scored steps: sums for the logs, and columns for the store and for checkpoints."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from hf_iclr.untrusted import parse_json, read_safetensors

from .store import VALIDATION, ShapleyStore, column_of
from .trained_rows import TrainedRows


logger = logging.getLogger(__name__)

_STATE_FILE = "shapley_direction.safetensors"


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
        if not is_first_process():
            return
        for of_step in zip(*parts, strict=True):
            self.store.add(of_step[0].step, self._columns(of_step), of_step[0].record)
        self.store.flush()

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process."""
        return not dist.is_initialized() or dist.get_world_size() == 1

    def flush_if_alone(self) -> None:
        """Where other processes may not be flushing too."""
        if self.is_alone:
            self.flush()

    def _columns(self, parts: tuple[StepValues, ...]) -> dict[str, Any]:
        """One entry for each row, as [`ShapleyStore.add`] takes them."""
        ids = [identity for part in parts for identity in part.ids]
        name, kind = ("id", object) if self._text_ids else ("index", np.int64)  # steps without rows don't show it
        columns = {name: np.array(ids, dtype=kind), "tokens": np.concatenate([part.tokens for part in parts])}
        values = np.concatenate([part.values for part in parts])
        kept = [found for part in parts for found in part.token_values]
        for which, target in enumerate(self.targets):
            columns[column_of(target)] = values[:, which]
            if self.with_tokens:
                of_target = np.empty(len(ids), dtype=object)
                for row, found in enumerate(kept):
                    of_target[row] = None if found is None else found[which].tolist()
                columns[column_of(target, "token_values")] = of_target
        return columns

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
        if is_first_process():
            self.store.resume(step, metadata.get("run", ""), checkpoint)
        return tensors


def is_first_process() -> bool:
    """Whether this process is the one that writes."""
    return not dist.is_initialized() or dist.get_rank() == 0
