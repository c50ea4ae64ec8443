"""Scores the rows of each optimizer step, whatever loop makes it."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from hf_iclr.saving import in_own_memory

from .gradients.coverage import check_scores, find_unordered, group_modules
from .gradients.direction import (
    Direction,
    decay_gain,
    pack_directions,
    preconditioner,
    sketch,
    squared_norm,
    step_gain,
    unpack_directions,
    validation_gradient,
    warn_of_other_rule,
)
from .gradients.rows import RowLayout, find_layout
from .gradients.scores import TappedModule
from .gradients.taps import Taps, split_by_rate
from .records import StepValues


logger = logging.getLogger(__name__)

CHECK_SKETCH_EVERY = 50  # scored refreshes between two comparisons of sketched with exact scores


@dataclass
class EngineSettings:
    """See [`InRunDataShapleyCallback`]; `rank` is 0 for exact directions."""

    refresh_every: int = 20
    order: int = 1
    rank: int = 0
    adam_warmup: int = 20
    token_values_for: frozenset[int | str] = frozenset()
    seed: int = 0


@dataclass
class _MicroBatch:
    ids: list[Any]
    layout: RowLayout | None = None
    scores: torch.Tensor | None = None
    token_scores: torch.Tensor | None = None
    gradients: list[torch.Tensor | None] = field(default_factory=list)


class ShapleyEngine:
    """
    From the beginning of a step to its values.

    Args:
        model (`torch.nn.Module`):
            The model, not wrapped by DDP.
        optimizer ([`~torch.optim.Optimizer`]):
            The optimizer, not wrapped by accelerate.
        targets (`dict`):
            Batches of each validation set and their number of rows, the same in every process.
        compute_loss (`Callable`):
            `compute_loss(model, batch)`: mean loss of a validation batch's rows.
        settings ([`EngineSettings`]):
            How to score.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        targets: dict[str, list[tuple[Any, int]]],
        compute_loss: Callable[[nn.Module, Any], torch.Tensor],
        settings: EngineSettings,
    ) -> None:
        self.model, self.optimizer, self.targets = model, optimizer, targets
        self.compute_loss, self.settings = compute_loss, settings
        self.names = list(targets)
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        self.parameters = [p for p in model.parameters() if p.requires_grad and id(p) in groups]
        self.param_groups = [groups[id(parameter)] for parameter in self.parameters]
        self.taps = Taps(model)
        self.taps.modules = split_by_rate(self.taps.modules, groups)
        if not self.taps.modules:
            raise ValueError(
                "Expected trainable parameters that the optimizer trains, got none. Unfreeze some, or add an adapter."
            )
        self.groups = group_modules(self.taps.modules, self.parameters)
        self._position = {id(parameter): index for index, parameter in enumerate(self.parameters)}
        self._low_rank = self._sketched()
        self.taps.keep_rows = settings.order == 2
        if settings.order == 2:
            self._check_order_two()
        self.directions: list[list[Direction]] = []  # of each target, by parameter
        self.losses: dict[str, float] = {}
        self._scales: list[Any] = []
        self._decay = np.zeros(len(targets))
        self._energy = np.ones(len(targets))
        self._refreshed = 0
        self._next: list[tuple[list[torch.Tensor], float]] | None = None  # gradients and losses at the present weights
        self._rows_are_known = self._rule_is_known = False
        self._exact: list[list[Direction]] | None = None
        self._micro: list[_MicroBatch] = []
        self._fresh = False
        self.step = 0
        self.open = False
        self.pending: StepValues | None = None
        self._kept: Any = None

    # Before the step

    def begin_step(self, step: int) -> None:
        """Prepare to score optimizer step number `step`, counted from 1."""
        self.close_step()
        self.step, self._micro, self.pending, self._fresh = step, [], None, False
        if not self._rule_is_known and self.optimizer.state:
            self._rule_is_known = True
            warn_of_other_rule(self.optimizer, self.parameters)
        if self._is_warming_up():
            return
        if not self.directions or (step - 1) % self.settings.refresh_every == 0:
            self.refresh()
        self.open = True
        self.taps.fired.clear()
        self.taps.misfits.clear()
        self.taps.attach()
        self.taps.on = True

    def close_step(self) -> None:
        """Remove the taps."""
        self.taps.detach()
        self.open = False

    def begin_micro_batch(self, ids: Sequence[Any]) -> None:
        """The next forward and backward passes are about these rows."""
        if self.open:
            self._store_scores()
            if self._micro and all(parameter.grad is None for parameter in self.parameters):
                self._micro = []  # the loop has thrown their gradients away
            self._micro.append(_MicroBatch(list(ids)))
            self.taps.layout = None

    def see_inputs(self, inputs: dict[str, Any]) -> None:
        """The model is called in training mode."""
        if not (self.open and self._micro):
            return
        self.taps.weights = [self._learning_rate(tapped) for tapped in self.taps.modules]
        micro = self._micro[-1]
        if micro.layout is not None:
            self.taps.layout = find_layout(inputs, len(micro.ids))
            return
        micro.layout = find_layout(inputs, len(micro.ids))
        if not self._rows_are_known:
            unordered = find_unordered(self.model, self.taps, inputs, micro.layout)
            self._rows_are_known = unordered is not None
            self.taps.unordered = unordered or set()
        wanted = not self.settings.token_values_for.isdisjoint(micro.ids)
        self.taps.start(micro.layout, len(self.names) * (2 if self._exact else 1), wanted)

    def refresh(self) -> None:
        """Measure the validation losses and point the taps along their gradients."""
        measured = self._next or (self._pass(name, with_gradient=True) for name in self.names)  # one after the other
        self._next = None
        self._fresh = True
        self._refreshed += 1
        self._scales = [
            preconditioner(self.optimizer, group, parameter)
            for parameter, group in zip(self.parameters, self.param_groups, strict=True)
        ]
        check = any(self._low_rank) and self._refreshed % CHECK_SKETCH_EVERY == 1
        self.directions, self._exact = [], [] if check else None
        generator = torch.Generator().manual_seed(self.settings.seed + self.step)
        for which, (found, loss) in enumerate(measured):
            self.losses[self.names[which]] = loss
            self._decay[which] = decay_gain(self.parameters, self.param_groups, found)
            kept = total = 0.0
            directions: list[Direction] = []
            exact: list[Direction] = []
            for index, gradient in enumerate(found):
                direction = (
                    gradient.mul_(self._scales[index])
                    if self.settings.order == 1
                    else (gradient * self._scales[index])
                )
                found[index] = gradient = torch.empty(0)  # one full copy at a time
                if not self._low_rank[index]:
                    direction = in_own_memory(direction)
                if check:
                    exact.append(direction)
                if self._low_rank[index]:
                    total += float(squared_norm(direction))
                    direction = sketch(direction, self.settings.rank, generator)
                    kept += float(squared_norm(direction))
                directions.append(direction)
            self._energy[which] = kept / total if total else 1.0
            self.directions.append(directions)
            if self._exact is not None:
                self._exact.append(exact)
        self._point_taps()
        if self.settings.order == 1:
            self._scales = []

    def measure_losses(self) -> dict[str, float]:
        """Validation losses of the present weights."""
        if self._next is not None:
            return {name: loss for name, (_, loss) in zip(self.names, self._next, strict=True)}
        return {name: self._pass(name, with_gradient=False)[1] for name in self.names}

    # After the backward passes

    def finish_step(self, scale: float = 1.0) -> None:
        """
        Turn scores into values, once gradients are as the optimizer will use them.

        Args:
            scale (`float`, *optional*, defaults to 1.0):
                What an fp16 scaler multiplied the loss by.

        Raises:
            ValueError: if rows can't be told apart, or scores add up to the gradient of no parameter.
        """
        if not self.open:
            return
        self._store_scores()
        self.close_step()
        self.taps.layout = None
        micro = [batch for batch in self._micro if batch.scores is not None]
        if not micro:
            raise ValueError(
                "No row was scored: no forward pass of the model in training mode belongs to a batch of the data "
                "loader. Give `attach` the model and the data loader of the loop."
            )
        if any(parameter.grad is None for parameter in self.parameters) and all(
            p.grad is None for p in self.parameters
        ):
            raise ValueError("Expected gradients before the optimizer's step, got none: values can't be checked.")
        scores = torch.cat([batch.scores for batch in micro], dim=1)  # type: ignore[misc]
        clip = check_scores(scores[..., 0], self.groups, self.taps, self.parameters, self.directions[0], scale)
        if clip < 0:
            logger.warning(
                "Step %d has no values: the rows' scores add up to the opposite of the gradient, which is not theirs.",
                self.step,
            )
            self._micro = []
            return
        factor = clip / scale / (dist.get_world_size() if dist.is_initialized() else 1)
        rates = torch.tensor(
            [self._learning_rate(tapped) for tapped in self.taps.modules], dtype=scores.dtype, device=scores.device
        )
        for index in self.taps.excluded:
            rates[index] = 0
        rows = torch.einsum("mrk,m->rk", scores, rates).double().cpu().numpy() * factor
        values = rows[:, : len(self.names)]
        record = {"lr": float(self.param_groups[0]["lr"]), "clip_factor": clip}
        if self._fresh:
            for which, name in enumerate(self.names):
                record |= {f"loss_{name}": self.losses[name], f"energy_{name}": float(self._energy[which])}
        if self._exact is not None:
            self._compare_sketch(rows, record)
        self.pending = StepValues(
            self.step,
            [identity for batch in micro for identity in batch.ids],
            values,
            torch.cat([batch.layout.tokens for batch in micro]).cpu().numpy(),  # type: ignore[union-attr]
            [
                found
                for batch in micro
                for found in _token_values(batch, self.settings.token_values_for, values.shape[1], factor)
            ],
            record,
        )
        if self.settings.order == 2:
            gradients = [
                None if all(part is None for part in parts) else torch.cat([p for p in parts if p is not None])
                for parts in zip(*(batch.gradients for batch in micro), strict=True)
            ]
            self._kept = gradients, rates, factor
        self._micro = []

    def commit(self) -> StepValues | None:
        """The optimizer has made its step: what its rows were worth, `None` if it was not scored."""
        found, self.pending = self.pending, None
        if found is None:
            return None
        if self.settings.order == 2:
            found.values = self._average_with_next(found.values)
        totals = torch.from_numpy(found.values.sum(0))
        if dist.is_initialized():
            device = self.parameters[0].device
            totals = totals.to(device)
            dist.all_reduce(totals)
        for which, name in enumerate(self.names):
            found.record[f"sum_{name}"] = float(totals[which])
            if self._fresh:
                gain = step_gain(self.optimizer, self.parameters, self.param_groups, self.directions[which])
                if gain is not None or self._decay[which]:
                    momentum = 0.0 if gain is None else gain - float(totals[which])
                    found.record[f"unattributed_{name}"] = momentum + float(self._decay[which])
        return found

    def drop(self) -> None:
        """The optimizer has skipped its step."""
        self.pending = self._kept = None

    def state(self) -> dict[str, torch.Tensor]:
        """Directions as tensors by name, for a run that is resumed between two refreshes."""
        if not self.directions:
            return {}
        counts = torch.tensor([self._refreshed, *sorted(self.taps.excluded)])
        return pack_directions(self.directions) | {"counts": counts}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what [`~ShapleyEngine.state`] returned."""
        self._refreshed, *excluded = tensors["counts"].tolist()
        self.taps.excluded = set(excluded)
        self.directions = unpack_directions(tensors, len(self.names), self.parameters)
        self._point_taps()

    def _pass(self, name: str, with_gradient: bool) -> tuple[list[torch.Tensor], float]:
        return validation_gradient(
            self.model,
            self.parameters,
            self.targets[name],
            self.compute_loss,
            seed=self.settings.seed,
            with_gradient=with_gradient,
        )

    def _point_taps(self) -> None:
        every: list[list[Direction]] = [*self.directions, *(self._exact or [])]
        for tapped in self.taps.modules:
            tapped.directions = [
                {name: directions[self._position[id(p)]] for name, p in tapped.parameters.items()}
                for directions in every
            ]

    def _sketched(self) -> list[bool]:
        rank = self.settings.rank
        plain = {
            id(tapped.parameters["weight"])
            for tapped in self.taps.modules
            if tapped.kind in ("linear", "conv1d", "embedding") and "weight" in tapped.parameters
            if ".lora_" not in tapped.name
        }
        return [
            bool(rank) and id(parameter) in plain and rank * sum(parameter.shape) < parameter.numel()
            for parameter in self.parameters
        ]

    def _is_warming_up(self) -> bool:
        if not any("betas" in group for group in self.param_groups):
            return False
        states = self.optimizer.state.values()
        steps = [float(state["step"]) for state in states if "step" in state]
        if states and not steps:  # not Adam, though it has betas, as Lion
            return False
        return max(steps, default=0.0) < max(self.settings.adam_warmup, 1)

    def _check_order_two(self) -> None:
        if self.settings.token_values_for:
            raise ValueError(
                "Expected no `token_values_for` with order=2, whose values are those of whole rows. Type `order=1`."
            )
        other = [tapped.name for tapped in self.taps.modules if tapped.kind not in ("linear", "conv1d")]
        if other or any(".lora_" not in tapped.name for tapped in self.taps.modules):
            name = (other or [tapped.name for tapped in self.taps.modules if ".lora_" not in tapped.name])[0]
            raise ValueError(
                "Expected a model of which only LoRA layers are trained for order=2, which keeps each row's gradient, "
                f"got the trainable module {name}. Type `order=1`."
            )

    def _learning_rate(self, tapped: TappedModule) -> float:
        return float(self.param_groups[self._position[id(next(iter(tapped.parameters.values())))]]["lr"])

    def _store_scores(self) -> None:
        if not self._micro or self._micro[-1].layout is None:
            return
        micro = self._micro[-1]
        if self.settings.order == 2:
            micro.gradients = [tapped.rows for tapped in self.taps.modules]
            self.taps.scores = self._score_kept(micro.gradients, self.directions, self.taps.scores)
            for tapped in self.taps.modules:
                tapped.rows = None
        micro.scores, micro.token_scores = self.taps.scores, self.taps.tokens

    def _score_kept(
        self, gradients: Sequence[torch.Tensor | None], directions: list[list[Direction]], like: torch.Tensor
    ) -> torch.Tensor:
        scores = torch.zeros_like(like)
        for tapped, rows in zip(self.taps.modules, gradients, strict=True):
            if rows is None:
                continue
            for which, found in enumerate(directions):
                parts = [found[self._position[id(p)]] for p in tapped.parameters.values()]
                u = torch.cat([part.flatten() for part in parts if isinstance(part, torch.Tensor)])
                scores[tapped.index, :, which] = rows @ u.to(rows.dtype)
        return scores

    def _average_with_next(self, values: np.ndarray) -> np.ndarray:
        gradients, rates, factor = self._kept
        self._kept = None
        self._next = [self._pass(name, with_gradient=True) for name in self.names]
        directions: list[list[Direction]] = [
            [gradient * scale for gradient, scale in zip(found, self._scales, strict=True)] for found, _ in self._next
        ]
        like = torch.zeros(
            len(self.taps.modules), len(values), len(self.names), dtype=rates.dtype, device=rates.device
        )
        scores = self._score_kept(gradients, directions, like)
        after = torch.einsum("mrk,m->rk", scores, rates).double().cpu().numpy() * factor
        return (values + after) / 2

    def _compare_sketch(self, rows: np.ndarray, record: dict[str, float]) -> None:
        sketched, exact = np.split(rows, 2, axis=1)
        for which, name in enumerate(self.names):
            if len(rows) > 2:
                record[f"sketch_pearson_{name}"] = float(np.corrcoef(sketched[:, which], exact[:, which])[0, 1])
        self._exact = None
        self._point_taps()


def _token_values(
    batch: _MicroBatch, wanted: frozenset[int | str], targets: int, factor: float
) -> list[list[np.ndarray] | None]:
    if batch.token_scores is None or batch.layout is None:
        return [None] * len(batch.ids)
    scores = batch.token_scores[..., :targets].double().cpu().numpy() * factor
    return [
        [scores[..., which][positions] for which in range(targets)] if identity in wanted else None
        for identity, positions in zip(batch.ids, batch.layout.positions(), strict=True)
    ]
