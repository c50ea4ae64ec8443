"""What the callback keeps of scored steps: running totals for the logs, and columns for the store."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist

from .result import VALIDATION


@dataclass
class StepValues:
    """What a step found out: rows in the order they came, values of shape `(rows, targets)` in nats."""

    step: int
    ids: list[int] | list[str]
    values: np.ndarray
    tokens: np.ndarray
    token_values: list[list[np.ndarray] | None]
    record: dict[str, float]


class RunTotals:
    """
    Sums over a run, for its logs.

    Args:
        targets (list of `str`):
            Names of the validation sets.

    Attributes:
        first_losses (`dict`): of each target before its first scored step, in nats.
        sums (`dict`): of each target's values so far, in nats, over all processes.
        text_ids (`bool`): whether rows are known by text rather than by number.
    """

    def __init__(self, targets: list[str]) -> None:
        self.targets = targets
        self.first_losses: dict[str, float] = {}
        self.sums = dict.fromkeys(targets, 0.0)
        self._measured: dict[str, tuple[float, float]] = {}  # last loss, and the sum of values before it
        self._last: dict[str, float] = {}
        self.text_ids = False
        self._rows = self._harmful = 0

    def add(self, found: StepValues) -> None:
        """Count a step."""
        self.text_ids = self.text_ids or bool(found.ids) and isinstance(found.ids[0], str)
        for name in self.targets:
            loss = found.record.get(f"loss_{name}")
            if loss is not None:
                self.first_losses.setdefault(name, loss)
                self._measured[name] = loss, self.sums[name]
                self._last = found.record
            self.sums[name] += found.record.get(f"sum_{name}", 0.0)
        self._rows += len(found.values)
        self._harmful += int((found.values[:, 0] < 0).sum())

    def explained_ratio(self, target: str) -> float:
        """Sum of values over the fall of the loss, both up to its last measurement; NaN where it did not change."""
        loss, total = self._measured[target]
        drop = self.first_losses[target] - loss
        return total / drop if drop else float("nan")

    def logs(self) -> dict[str, float]:
        """What to log about the last measurement; counts of rows start anew."""
        if not self.first_losses:
            return {}
        logs = {f"shapley/loss_{name}": self._measured[name][0] for name in self.targets}
        ratio = self.explained_ratio(VALIDATION)
        if not np.isnan(ratio):
            logs["shapley/explained_ratio"] = ratio
        if self._rows:
            logs["shapley/harmful_share"] = self._harmful / self._rows
        for key in ("energy", "unattributed"):
            if f"{key}_{VALIDATION}" in self._last:
                logs[f"shapley/{key}"] = self._last[f"{key}_{VALIDATION}"]
        self._rows = self._harmful = 0
        return logs


def gather_columns(
    steps: Sequence[StepValues], targets: list[str], with_tokens: bool, text_ids: bool
) -> list[dict[str, np.ndarray]]:
    """
    Rows of each step, of all processes, as columns for [`ShapleyStore.add`]: one entry for each row and target.

    Args:
        steps (list of [`StepValues`]):
            Of this process; every process has the same steps.
        targets (list of `str`):
            Names of the validation sets.
        with_tokens (`bool`):
            Whether there is a column with values of tokens.
        text_ids (`bool`):
            Whether rows are known by text rather than by number; steps without rows don't show it.
    """
    parts = [list(steps)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        parts = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, list(steps))
    return [
        _columns([part[position] for part in parts], targets, with_tokens, text_ids) for position in range(len(steps))
    ]


def _columns(parts: list[StepValues], targets: list[str], with_tokens: bool, text_ids: bool) -> dict[str, np.ndarray]:
    ids = [identity for part in parts for identity in part.ids]
    values = np.concatenate([part.values for part in parts])
    rows = {
        "target": np.repeat(np.array(targets, dtype=object), len(ids)),
        "value": values.T.reshape(-1),
        "tokens": np.tile(np.concatenate([part.tokens for part in parts]), len(targets)),
    }
    if with_tokens:
        kept = [found for part in parts for found in part.token_values]
        rows["token_values"] = np.empty(len(rows["value"]), dtype=object)
        for entry in range(len(rows["value"])):
            which, row = divmod(entry, len(ids))
            found = kept[row]
            rows["token_values"][entry] = None if found is None else found[which].tolist()
    if text_ids:
        rows["id"] = np.tile(np.array(ids, dtype=object), len(targets))
    else:
        rows["index"] = np.tile(np.array(ids, dtype=np.int64), len(targets))
    return rows
