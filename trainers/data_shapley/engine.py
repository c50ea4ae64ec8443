"""Scores the rows of each optimizer step, whatever loop makes it."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from .directions import EngineSettings, TargetDirections
from .gradients.coverage import check_scores, check_uncompiled, find_unordered, group_modules
from .gradients.direction import is_partitioned, warn_of_other_rule
from .gradients.fused_head import tap_fused_head
from .gradients.meter import metered
from .gradients.rows import RowLayout, belongs_to, find_layout
from .gradients.scores import split_by_rate
from .gradients.taps import Taps
from .gradients.zero import ZeroOptimizer
from .store import StepValues


logger = logging.getLogger(__name__)

CHECK_EVERY = 10  # steps between two comparisons of all scores with the gradient


@dataclass
class _MicroBatch:
    ids: list[Any]
    layout: RowLayout | None = None
    scores: torch.Tensor | None = None
    token_scores: torch.Tensor | None = None


class ShapleyEngine:
    """
    From the beginning of a step to its values.

    Model and optimizer, or a [`ZeroOptimizer`], come without DDP's and accelerate's wrappers; `batches` are those of
    each validation set and their number of rows, the same in every process; `compute_loss(model, batch)` is the mean
    loss of a batch's rows; `meter` counts the time of all that a training without values would not do.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        batches: dict[str, list[tuple[Any, int]]],
        compute_loss: Callable[[nn.Module, Any], torch.Tensor],
        settings: EngineSettings,
    ) -> None:
        check_uncompiled(model)
        self.model, self.optimizer, self.settings = model, optimizer, settings
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        self.parameters = [p for p in model.parameters() if p.requires_grad and id(p) in groups]
        self.param_groups = [groups[id(parameter)] for parameter in self.parameters]
        self.taps = Taps(model)
        self.meter = self.taps.meter
        self.taps.modules = split_by_rate(self.taps.modules, groups)
        if not self.taps.modules:
            raise ValueError(
                "Expected trainable parameters that the optimizer trains, got none. Unfreeze some, or add an adapter."
            )
        self.groups = group_modules(self.taps.modules, self.parameters)
        self.targets = TargetDirections(
            model, optimizer, batches, compute_loss, settings, self.parameters, self.param_groups, self.taps.modules
        )
        self.names = self.targets.names
        self._positions = [self.targets.position(next(iter(t.parameters.values()))) for t in self.taps.modules]
        self._rows_are_known = self._rule_is_known = self._is_checked = False
        self._lost: set[str] = set()  # why steps had no values
        self.micro: list[_MicroBatch] = []  # of this step
        self._to_compare = 4  # forward passes yet
        self._fetched: list[Any] = []  # the batch of the last one, and the last two since
        self._fresh = False  # whether directions are those of the present weights
        self.step = 0
        self.open = False
        self.pending: StepValues | None = None
        self._hooks: list[Any] = []

    # Before the step

    @metered
    def begin_step(self, step: int) -> None:
        """Prepare to score optimizer step number `step`, counted from 1."""
        self.close_step()
        self.step, self.micro, self.pending, self._fresh = step, [], None, False
        if not self._rule_is_known and self.optimizer.state:
            self._rule_is_known = True
            warn_of_other_rule(self.optimizer, self.parameters)
        self.open = not self._is_warming_up()
        self._fresh = self.targets.refresh(step, self.meter, self.open)
        self.taps.fired.clear()
        self.taps.misfits.clear()

    @metered
    def attach(self) -> None:
        """Hook the model, if the step is scored and it isn't yet."""
        if self.open and not self._hooks:
            self._hooks = [
                self.model.register_forward_pre_hook(self._see_inputs, with_kwargs=True),
                self.model.register_forward_hook(lambda model, args, output: tap_fused_head(self.taps, output)),
            ]
            if isinstance(self.optimizer, ZeroOptimizer):
                self._hooks.append(self.optimizer.register_step_pre_hook(self.finish_step))
            self.taps.attach()
            self.taps.on = True

    @metered
    def detach(self) -> None:
        """Remove all hooks."""
        self.taps.detach()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def close_step(self) -> None:
        """Score no more of this step."""
        self.detach()
        self.open = False

    @metered
    def begin_micro_batch(self, ids: Sequence[Any], batch: Any = None) -> None:
        """The next forward and backward passes are about these rows, of a batch that a loop has fetched."""
        if self.open:
            if self._to_compare:
                self._fetched = [*self._fetched[:1], *self._fetched[1:][-1:], batch]
            self._store_scores()
            if self.micro and self._has_no_gradient():
                self.micro = []  # the loop has thrown their gradients away
            self.micro.append(_MicroBatch(list(ids)))
            self.taps.layout = None

    @metered
    def _see_inputs(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (self.micro and model.training and torch.is_grad_enabled()):
            return
        inputs = {**{str(index): value for index, value in enumerate(args)}, **kwargs}
        micro = self.micro[-1]
        if micro.layout is not None:
            self.taps.layout = find_layout(inputs, len(micro.ids))
            return
        if self._to_compare:
            *earlier, present = self._fetched
            if any(belongs_to(inputs, batch, present) for batch in earlier):
                raise ValueError(
                    "Expected a loop that uses each batch before it fetches the next, got one that fetches ahead: "
                    "values would be those of other rows. Iterate over the data loader itself, `for batch in loader:`."
                )
            self._to_compare -= 1
            self._fetched = [present] if self._to_compare else []
        micro.layout = find_layout(inputs, len(micro.ids))
        if not self._rows_are_known:
            found = find_unordered(self.model, self.taps, inputs, micro.layout)
            self._rows_are_known = found is not None
            self.taps.unordered, self.taps.common = found or (set(), set())
        wanted = not self.settings.token_values_for.isdisjoint(micro.ids)
        self.taps.weights = self._learning_rates() if wanted else []
        self.taps.start(micro.layout, len(self.names), wanted)

    # After the backward passes

    @metered
    def finish_step(self, scaler: Any = None) -> None:
        """
        Turn scores into values, once gradients are as the optimizer will use them; `scaler` multiplied an fp16 loss.

        Raises `ValueError` if rows can't be told apart, or scores add up to the gradient of no parameter.
        """
        if not self.open:
            return
        self._store_scores()
        self.close_step()
        self.taps.layout = None
        micro = [batch for batch in self.micro if batch.scores is not None]
        if not micro:
            raise ValueError(
                "No row was scored: no forward pass of the model in training mode belongs to a batch of the data "
                "loader. Give `attach` the model and the data loader of the loop, and call the model outside of "
                "functions that torch.compile has compiled."
            )
        if self._has_no_gradient():
            raise ValueError("Expected gradients before the optimizer's step, got none: values can't be checked.")
        scores = torch.cat([batch.scores for batch in micro], dim=1)  # type: ignore[misc]
        scale = 1.0 if scaler is None else scaler.get_scale()
        thorough = not self._is_checked or self.step % CHECK_EVERY == 0
        clip, share = check_scores(
            scores[..., 0], self.groups, self.taps, self.parameters, self.targets.found[0], scale, thorough
        )
        if share is not None:
            self._judge(share)
        if not clip >= 0:  # NaN, too
            self.micro = []
            why = "the rows' scores add up to the opposite of the gradient, which is not theirs"
            if math.isnan(clip):
                why = "its gradient, or the validation set's, is not finite"
            if why not in self._lost and (scale == 1 or clip < 0):  # else a scaler skips the step, to scale less
                logger.warning("Step %d has no values: %s. Later ones are not named.", self.step, why)
                self._lost.add(why)
            return
        factor = clip / scale / (dist.get_world_size() if dist.is_initialized() else 1)
        rates = torch.tensor(self._learning_rates(), dtype=scores.dtype, device=scores.device)
        for index in self.taps.excluded:
            rates[index] = 0
        values = torch.einsum("mrk,m->rk", scores, rates).double().cpu().numpy() * factor
        record = {"lr": float(self.param_groups[0]["lr"]), "clip_factor": clip}
        if share is not None:
            record["scored_share"] = share
        if self._fresh:
            for which, name in enumerate(self.names):
                record[f"energy_{name}"] = self.targets.energy[which]
                if not math.isnan(self.targets.agreement[which]):
                    record[f"agreement_{name}"] = self.targets.agreement[which]
                if name in self.targets.losses:
                    record[f"loss_{name}"] = self.targets.losses[name]
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
        self.micro = []

    @metered
    def commit(self) -> StepValues | None:
        """The optimizer has made its step: what its rows were worth, `None` if it was not scored."""
        found, self.pending = self.pending, None
        if found is None:
            return None
        if isinstance(self.optimizer, ZeroOptimizer):
            _scale(found, self.optimizer.clip_factor())
        totals = torch.from_numpy(found.values.sum(0))
        if dist.is_initialized():
            device = self.parameters[0].device
            totals = totals.to(device)
            dist.all_reduce(totals)
        for which, name in enumerate(self.names):
            found.record[f"sum_{name}"] = float(totals[which])
        return found

    def drop(self) -> None:
        """The optimizer has skipped its step."""
        self.pending = None

    def _judge(self, share: float) -> None:
        """Refuse values of too little at the first scored step; later, when a run would be lost, say so."""
        wanted, first = self.settings.min_scored_share, not self._is_checked
        self._is_checked = True
        if first:
            self.taps.around = [around for around in self.taps.around if around.stands_in]
        if share >= wanted:
            return
        left = [self.taps.modules[index].name for index in sorted(self.taps.excluded)]
        what = (
            f"{share:.0%} of the product of its gradient with the validation gradient, for the rows of {len(left)} "
            f"modules can't be told apart: {', '.join(left[:5])}{', ...' if len(left) > 5 else ''}"
        )
        if first:
            raise ValueError(
                f"Expected values of at least {wanted:.0%} of what a step gains, got {what}. Freeze them, or take "
                f"values without them: `min_scored_share={math.floor(share * 10) / 10}`."
            )
        logger.warning("Values of step %d are of %s.", self.step, what)

    def _is_warming_up(self) -> bool:
        if not any("betas" in group for group in self.param_groups):
            return False
        states = self.optimizer.state.values()
        steps = [float(state["step"]) for state in states if "step" in state]
        if states and not steps:  # not Adam, though it has betas, as Lion
            return False
        return max(steps, default=0.0) < max(self.settings.adam_warmup, 1)

    def _learning_rates(self) -> list[float]:
        """Of each tapped module."""
        return [float(self.param_groups[position]["lr"]) for position in self._positions]

    def _has_no_gradient(self) -> bool:
        return all(p.grad is None and not is_partitioned(p) for p in self.parameters)

    def _store_scores(self) -> None:
        if not self.micro or self.micro[-1].layout is None:
            return
        micro = self.micro[-1]
        micro.scores, micro.token_scores = self.taps.scores, self.taps.tokens


def _scale(found: StepValues, factor: float) -> None:
    found.values *= factor
    found.record["clip_factor"] *= factor
    for values in found.token_values:
        for of_target in values or ():
            of_target *= factor


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
