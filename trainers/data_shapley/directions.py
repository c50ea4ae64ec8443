"""Along which directions the rows of a run are scored, for each validation set: measured, refreshed and resumed."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_iclr.saving import contiguous_clone

from .gradients.direction import (
    Direction,
    dense,
    inner,
    pack_directions,
    precondition,
    sketch,
    squared_norm,
    unpack_directions,
    validation_gradient,
)
from .gradients.meter import Meter
from .gradients.schedule import RefreshSchedule
from .gradients.scores import TappedModule


logger = logging.getLogger(__name__)

RANK = 16  # of sketches


@dataclass
class EngineSettings:
    """See [`InRunDataShapleyCallback`]; values out of range raise `TypeError` or `ValueError`."""

    refresh_every: int | None = None
    cost: float = 0.05
    exact: bool = False
    rank: int | None = None
    adam_warmup: int = 20
    min_scored_share: float = 0.8
    token_values_for: Any = frozenset()
    batch_size: int | None = None
    seed: int = 0
    steps: int = 1000  # about how many the run has
    rows_per_step: int = 8  # in one process

    def __post_init__(self) -> None:
        for name, smallest in (("refresh_every", 1), ("rank", 1), ("batch_size", 1), ("adam_warmup", 0)):
            value = getattr(self, name)
            if value is None and name != "adam_warmup":
                continue
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"Expected a whole number for {name}, such as 20, got {value!r}.")
            if value < smallest:
                raise ValueError(f"Expected {name} of at least {smallest}, got {value}.")
        rows = self.token_values_for
        if isinstance(rows, Mapping | str | bytes) or not isinstance(rows, Iterable):
            raise TypeError(
                f"Expected a list of rows in token_values_for, got {rows!r}. Type `token_values_for=[{rows!r}]`."
            )
        rows = list(rows)
        if not all(isinstance(row, str) or hasattr(row, "__index__") for row in rows):
            raise TypeError(f"Expected positions or ids of rows in token_values_for, such as [3], got {rows!r:.80}.")
        self.token_values_for = frozenset(row if isinstance(row, str) else int(row) for row in rows)
        if not isinstance(self.exact, bool):
            raise TypeError(f"Expected exact=True or exact=False, got {self.exact!r}.")
        for name, least, within in (("cost", 1e-9, "above 0 and up to 1"), ("min_scored_share", 0, "from 0 to 1")):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= 1:
                raise ValueError(f"Expected {name} {within}, got {value!r}.")


class TargetDirections:
    """
    The gradients of the validation losses, preconditioned as the optimizer does and sketched.

    `found` holds directions of each target, by parameter; `losses`, in nats, those of targets whose direction was not
    averaged into one; `energy` the share of the squared norm that sketches keep, and `agreement` the cosine of the
    newest batches' direction with the one before, NaN for the first, both of shape `(targets,)`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: dict[str, list[tuple[Any, int]]],
        compute_loss: Callable[[nn.Module, Any], torch.Tensor],
        settings: EngineSettings,
        parameters: Sequence[nn.Parameter],
        groups: Sequence[dict[str, Any]],
        modules: Sequence[TappedModule],
    ) -> None:
        self.model, self.optimizer, self.batches, self.compute_loss = model, optimizer, batches, compute_loss
        self.settings, self.parameters, self.groups, self.modules = settings, parameters, groups, modules
        self.names = list(batches)
        self.found: list[list[Direction]] = []
        self.losses: dict[str, float] = {}
        self.energy, self.agreement = np.ones(len(batches)), np.full(len(batches), math.nan)
        self.refreshed = 0
        rows = sum(max(rows for _, rows in found) for found in batches.values())
        longest = max(map(len, batches.values()))
        self.schedule = RefreshSchedule(
            settings.refresh_every, settings.cost, longest, settings.steps, rows / settings.rows_per_step
        )
        if not settings.refresh_every and self.schedule.affordable < longest:
            logger.warning(
                "A run of %d steps is too short for cost=%g to measure more than %d of %d validation batches: values "
                "will be noisy. Raise the cost, or give `refresh_every`.",
                settings.steps, settings.cost, max(self.schedule.first, int(self.schedule.affordable)), longest,
            )  # fmt: skip
        self._position = {id(parameter): index for index, parameter in enumerate(parameters)}
        self._rank = settings.rank or RANK
        plain = {
            id(tapped.parameters["weight"])
            for tapped in modules
            if tapped.kind in ("linear", "conv1d", "embedding") and "weight" in tapped.parameters
            if ".lora_" not in tapped.name and not settings.exact
        }
        self._low_rank = [
            id(parameter) in plain and self._rank * sum(parameter.shape) < parameter.numel()
            for parameter in parameters
        ]

    def position(self, parameter: nn.Parameter) -> int:
        """Where a parameter stands in the list of those that are trained."""
        return self._position[id(parameter)]

    def refresh(self, step: int, meter: Meter | None = None, scored: bool = True) -> bool:
        """
        Measure losses before a step, if it is time to, and point the taps along their gradients; whether it did.
        `meter`: of what is spent beside the training, `scored`: whether the step will have values.
        """
        meter = meter or Meter()
        places = self.schedule.begin(step, bool(self.found), meter.seconds, scored)
        if places is None:
            return False
        began = time.perf_counter()
        self._measure(step, places)
        self.schedule.took(time.perf_counter() - began, len(places), meter.seconds)
        return True

    def _measure(self, step: int, places: list[int]) -> None:
        self.refreshed += 1
        share = self.schedule.share(len(places))
        before, self.found = self.found, []
        generator = torch.Generator().manual_seed(self.settings.seed + step)
        for which, name in enumerate(self.names):
            found, loss = self._pass(name, places, with_gradient=True)
            if share == 1:
                self.losses[name] = loss
            else:
                self.losses.pop(name, None)
            if before and not math.isfinite(loss):  # of which a mean would never recover
                self.found.append(before[which])
                self.agreement[which] = math.nan
                continue
            kept = total = shared = old = new = 0.0
            directions: list[Direction] = []
            for index, gradient in enumerate(found):
                direction: Any = precondition(gradient, self.optimizer, self.groups[index], self.parameters[index])
                if before:
                    shared += float(inner(before[which][index], direction))
                    old += float(squared_norm(before[which][index]))
                    new += float(squared_norm(direction))
                if share < 1 and math.isfinite(old):
                    direction = torch.lerp(dense(before[which][index]).to(direction.dtype), direction, share)
                found[index] = gradient = torch.empty(0)  # one full copy at a time
                if self._low_rank[index]:
                    total += float(squared_norm(direction))
                    direction = sketch(direction, self._rank, generator)
                    kept += float(squared_norm(direction))
                else:
                    direction = contiguous_clone(direction)
                directions.append(direction)
            self.energy[which] = kept / total if total else 1.0
            self.agreement[which] = shared / math.sqrt(old * new) if old * new else math.nan
            self.found.append(directions)
        self.point_taps()

    def measure_losses(self) -> dict[str, float]:
        """Validation losses of the present weights."""
        first = list(range(self.schedule.first))  # those that the first loss is of
        return {name: self._pass(name, first, with_gradient=False)[1] for name in self.names}

    def pack(self, excluded: set[int]) -> dict[str, torch.Tensor]:
        """Directions as tensors by name, for a run that is resumed between two refreshes; modules left out, too."""
        if not self.found:
            return {}
        counts = torch.tensor([self.refreshed, *sorted(excluded)])
        return pack_directions(self.found) | {"counts": counts, "schedule": self.schedule.pack()}

    def unpack(self, tensors: dict[str, torch.Tensor]) -> set[int]:
        """Take back what [`~TargetDirections.pack`] returned; the modules left out."""
        self.refreshed, *excluded = tensors["counts"].tolist()
        self.found = unpack_directions(tensors, len(self.names), self.parameters)
        self.schedule.unpack(tensors["schedule"])
        self.point_taps()
        return set(excluded)

    def point_taps(self) -> None:
        """Score along what was found."""
        for tapped in self.modules:
            tapped.directions = [
                {name: directions[self.position(p)] for name, p in tapped.parameters.items()}
                for directions in self.found
            ]

    def _pass(self, name: str, places: list[int], with_gradient: bool) -> tuple[list[torch.Tensor], float]:
        batches = self.batches[name]
        return validation_gradient(
            self.model,
            self.parameters,
            [batches[place] for place in dict.fromkeys(place % len(batches) for place in places)],
            self.compute_loss,
            seed=self.settings.seed,
            with_gradient=with_gradient,
        )
