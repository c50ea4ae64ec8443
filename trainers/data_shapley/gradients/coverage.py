"""Whether the scores of all rows add up to the gradient that was applied, and which parameters they miss."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import is_compiled_module
from torch import nn

from .direction import Direction, applied_gradient, inner, is_sharded, untouched
from .follow import leaves
from .rows import RowLayout
from .scores import TappedModule
from .taps import Taps


logger = logging.getLogger(__name__)

_ROTATED = 4  # rows that are enough to see whether outputs move along

# Attributes of functions that torch.compile and torch.compiler.disable have returned; those of the latter have both
_COMPILED, _NOT_COMPILED = "_torchdynamo_orig_callable", "_torchdynamo_disable"


def refusal(what: str, instead: str) -> ValueError:
    """That rows of such a set-up can't be scored, and what to use."""
    return ValueError(f"InRunDataShapleyCallback can't score rows with {what}. Use {instead}.")


def check_uncompiled(model: nn.Module) -> None:
    """Raises `ValueError` if `torch.compile` has been applied to a model or a module in it."""
    for name, module in model.named_modules():
        compiled = module._compiled_call_impl is not None or hasattr(module.forward, _COMPILED)
        if (compiled or is_compiled_module(module)) and not hasattr(module.forward, _NOT_COMPILED):
            raise ValueError(
                "Expected a model that is not compiled, for rows are scored by hooks of its modules, which compiled "
                f"code doesn't call, got a compiled {name or type(module).__name__}. Type `torch_compile=False`, or "
                "don't call torch.compile."
            )


@dataclass
class Group:
    """Modules that share parameters, which can only be checked together."""

    modules: list[int]
    parameters: list[int]  # positions in the list of trainable parameters
    names: list[str]
    size: int = 0  # elements of the parameters


def group_modules(modules: Sequence[TappedModule], parameters: Sequence[nn.Parameter]) -> list[Group]:
    """Divide tapped modules so that tied parameters fall into one group."""
    position = {id(parameter): index for index, parameter in enumerate(parameters)}
    groups: list[Group] = []
    for tapped in modules:
        mine = [position[id(parameter)] for parameter in tapped.parameters.values()]
        merged, alike = Group([], [], []), set(mine)
        for group in [found for found in groups if not alike.isdisjoint(found.parameters)]:
            groups.remove(group)
            merged.modules += group.modules
            merged.parameters += group.parameters
            merged.names += group.names
        merged.modules.append(tapped.index)
        merged.names += [f"{tapped.name}.{name}".lstrip(".") for name in tapped.parameters]
        merged.parameters += [index for index in mine if index not in merged.parameters]
        groups.append(merged)
    for group in groups:
        group.size = sum(parameters[index].numel() for index in group.parameters)
    return groups


def clip_factor(gradient: np.ndarray, scores: np.ndarray) -> float:
    """
    What all gradients were multiplied by between the backward pass and the step: the median of the groups' ratios of
    `<G_g, u_g>` to the sum over rows of `<g_{i,g}, u_g>`, weighted by the size of the latter, so that groups whose
    scores miss something don't matter; 1 if all scores are 0.
    """
    weights = np.abs(scores)
    known = weights > 0
    if not known.any():
        return 1.0
    ratios, weights = gradient[known] / scores[known], weights[known]
    order = np.argsort(ratios)
    middle = np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2)
    return float(ratios[order][middle])


def applied_factor(ratio: float, scale: float) -> float:
    """
    What scores of a loss scaled by an fp16 scaler are multiplied by to be those of the step: [`clip_factor`]'s ratio
    if gradients were unscaled for clipping, else the ratio over the scale, as the scaler is still going to divide
    them. Clipping never raises a gradient, so the two can be told apart.
    """
    return ratio / scale if scale > 1 and ratio > np.sqrt(scale) else ratio


def find_gaps(
    gradient: np.ndarray, scores: np.ndarray, sizes: np.ndarray, factor: float, tolerance: float
) -> list[int]:
    """
    Groups whose scores don't add up to their gradient; `sizes` are sums over rows of the scores' absolute values, to
    which rounding errors, up to `tolerance`, are relative.
    """
    error = np.abs(gradient - factor * scores)
    size = np.abs(factor) * sizes + np.abs(gradient)
    return [int(group) for group in np.flatnonzero(error > tolerance * size) if size[group] > 1e-7 * size.sum()]


def check_scores(
    scores: torch.Tensor,
    groups: Sequence[Group],
    taps: Taps,
    parameters: Sequence[nn.Parameter],
    directions: Sequence[Direction],
    scale: float,
    all_groups: bool = True,
) -> tuple[float, float | None]:
    """
    Compare the scores of this process's rows, of shape `(modules, rows)`, with the gradient the optimizer will use.

    Groups that don't add up are left out from here on, with a warning that names them; `ValueError` if none does.
    Without `all_groups` only the clip factor is found, which a few small parameters tell.

    Returns:
        `(float, float | None)`: the clip factor, NaN where gradients, or scores in any process, are not finite; share
        of `<G, u>` that is scored, by the absolute values of the groups' parts, `None` unless `all_groups`.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    places, members = zip(*((index, m) for index, group in enumerate(groups) for m in group.modules), strict=True)
    of_modules = torch.stack([scores.sum(1), scores.abs().sum(1)], dim=1).double()[torch.tensor(members)]
    owner = torch.tensor(places, device=scores.device)
    sums = of_modules.new_zeros(len(groups), 2).index_add_(0, owner, of_modules)
    if world > 1:
        dist.all_reduce(sums)
    expected, sizes = (sums.cpu().numpy() / world / scale).T

    def measure(which: Sequence[int]) -> np.ndarray:
        zero = scores.new_zeros(())
        found = [
            sum(
                (
                    inner(directions[index], grad)
                    for index in groups[group].parameters
                    if (grad := applied_gradient(parameters[index])) is not None
                ),
                zero,
            )
            for group in which
        ]
        return torch.stack(found).double().cpu().numpy()

    share = None
    gradient = measure(range(len(groups))) if all_groups else np.zeros(0)
    if not (np.isfinite(expected).all() and np.isfinite(gradient).all()):
        return math.nan, None
    if all_groups:
        active = np.array([not taps.excluded.issuperset(group.modules) for group in groups])
        ratio = clip_factor(gradient * active, expected * active)
        coarse = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in parameters)
        coarse = coarse or torch.is_autocast_enabled(scores.device.type) or scale > 1 or taps.low_precision
        tolerance = 0.05 if coarse else 1e-3
        gaps = find_gaps(gradient * active, expected * active, sizes * active, ratio, tolerance)
        if gaps:
            _leave_out([groups[gap] for gap in gaps], len(groups), int(active.sum()), taps)
            active[gaps] = False
        size = np.abs(gradient).sum()
        share = float(np.abs(gradient[active]).sum() / size) if size else 1.0
    few = _few(groups, taps.excluded, expected)
    ratio = clip_factor(measure(few), expected[few])
    rounding = 2 * max(torch.finfo(parameter.dtype).eps for parameter in parameters)
    if abs(ratio - 1) * np.abs(expected[few]).sum() <= rounding * sizes[few].sum():
        ratio = 1.0  # as near as can be told where the scores of rows cancel
    return applied_factor(ratio, scale), share


def _few(groups: Sequence[Group], excluded: set[int], expected: np.ndarray) -> list[int]:
    """The smallest groups that hold a hundredth of what is scored, eight at least: clipping is alike for all."""
    known = [place for place, group in enumerate(groups) if expected[place] and not excluded.issuperset(group.modules)]
    known.sort(key=lambda place: groups[place].size)
    held = np.cumsum([groups[place].size for place in known])
    enough = int(np.searchsorted(held, held[-1] / 100)) + 1 if known else 0
    return known[: max(enough, 8)] or [0]


def find_unordered(
    model: nn.Module, taps: Taps, inputs: Mapping[str, Any], layout: RowLayout
) -> tuple[set[int], set[int]] | None:
    """
    Modules whose output isn't laid out by rows, which a sum of scores can't tell: what is taken for a row's part of it
    doesn't move along when the rows of a batch are rotated. `inputs` are what the model was called with, positional
    arguments under their number. `ValueError` if that is every module.

    Returns:
        `(set[int], set[int])`: indices of those modules, and of those whose output stays as it is when the rows are
        rotated, which rows have in common; `None` if this batch can't tell.
    """
    if layout.segments is not None or is_sharded(model):
        return set(), set()
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.dim()}
    if layout.batch < 2 or any(len(value) != layout.batch for value in tensors.values()):
        return None
    tensors = {name: value[:_ROTATED] for name, value in tensors.items()}
    if all(torch.equal(value, value.roll(1, 0)) for value in tensors.values()):
        return None
    some, rotated = {**inputs, **tensors}, {**inputs, **{name: value.roll(1, 0) for name, value in tensors.items()}}
    batch = min(layout.batch, _ROTATED)
    signs = _Signs()
    once, moved = (_outputs(model, taps, given, batch, 0, signs) for given in (some, rotated))
    if not all(torch.isfinite(call.print) for calls in (*once.values(), *moved.values()) for call in calls):
        return None
    unordered, common = set(), set()
    for index, calls in once.items():
        if len(calls) != len(moved[index]):
            continue
        pairs = list(zip(calls, moved[index], strict=True))
        if calls and all(torch.equal(one.print, then.print) for one, then in pairs):
            common.add(index)
        elif not all(one.turns_into(then) for one, then in pairs):
            unordered.add(index)
    if unordered | common:  # or random
        again = _outputs(model, taps, some, batch, 1, signs)
        fixed = {
            index
            for index in unordered | common
            if len(again[index]) == len(once[index])
            and all(torch.equal(one.print, two.print) for one, two in zip(once[index], again[index], strict=True))
        }
        unordered, common = unordered & fixed, common & fixed
    if len(unordered) == len(taps.modules):
        raise ValueError(
            f"Expected outputs that begin with the {layout.batch} rows of the batch, got none: no module's output is "
            "rotated when the rows are, so what each row contributes can't be computed."
        )
    return unordered, common


@dataclass
class _Output:
    """What is kept of a module's output: a sum of what would be each row's part, and a fingerprint of the whole."""

    rows: torch.Tensor | None
    print: torch.Tensor
    rounding: float = 0.0

    @classmethod
    def of(cls, output: torch.Tensor, batch: int, signs: "_Signs") -> "_Output":
        wide = output.detach().double().flatten()
        weights = signs(len(wide), wide.device)
        if not (output.dim() and len(output) % batch == 0):
            return cls(None, wide @ weights)
        parts = wide.view(batch, -1)
        rows, size = parts @ weights[: parts.shape[1]], torch.linalg.vector_norm(parts, dim=1).max()
        return cls(rows - rows.mean(), wide @ weights, float(size) * 16 * torch.finfo(output.dtype).eps)

    def turns_into(self, other: "_Output") -> bool:
        """Whether rotated rows give the other, as far as that can be told."""
        if self.rows is None or other.rows is None:
            return True
        first, then = self.rows.roll(1), other.rows
        tolerance = 2e-2 * float(torch.maximum(first.abs(), then.abs()).max()) + max(self.rounding, other.rounding)
        return bool((first - then).abs().max() <= tolerance)


class _Signs:
    """
    Weights with signs, so that what all rows have in common, as a bias, does not outweigh in what they differ; made
    once for the largest output, for sines take longer than all the rest.
    """

    def __init__(self) -> None:
        self._known = torch.zeros(0, dtype=torch.float64)

    def __call__(self, count: int, device: torch.device) -> torch.Tensor:
        if len(self._known) < count or self._known.device != device:
            self._known = torch.arange(1, count + 1, dtype=torch.float64, device=device).sin_()
        return self._known[:count]


def _outputs(
    model: nn.Module, taps: Taps, inputs: Mapping[str, Any], batch: int, seed: int, signs: _Signs
) -> dict[int, list[_Output]]:
    """Of each call of each module, its tensors."""
    found: dict[int, list[_Output]] = {tapped.index: [] for tapped in taps.modules}

    def keep(index: int, output: Any) -> None:
        tensors = [value for value in leaves(output) if isinstance(value, torch.Tensor)]
        found[index] += [_Output.of(value, batch, signs) for value in tensors if value.is_floating_point()]

    handles = [
        tapped.module.register_forward_hook(lambda _, __, output, index=tapped.index: keep(index, output))
        for tapped in taps.modules
    ]
    args = [inputs[str(place)] for place in range(len(inputs)) if str(place) in inputs]
    kwargs = {name: value for name, value in inputs.items() if not name.isdigit()}
    try:
        with taps.paused(), untouched(model, next(model.parameters()).device, seed), torch.no_grad():
            output = model.forward(*args, **kwargs)  # around hooks of its own
    finally:
        for handle in handles:
            handle.remove()
    for tapped in taps.modules:
        if tapped.module is model:
            keep(tapped.index, output)
    return found


def _leave_out(gaps: Sequence[Group], total: int, active: int, taps: Taps) -> None:
    reasons = []
    for group in gaps:
        why = [taps.misfits[index] for index in group.modules if index in taps.misfits]
        silent = [taps.modules[index].name for index in group.modules if index not in taps.fired]
        if not why and silent:
            why = [
                f"{silent[0]} is used without being called, as by a fused output layer or compiled code"
                if silent[0]
                else "the model's own, for which all of it would have to be run again"
            ]
        other = (
            "used outside of the module they belong to, or their gradient was changed by more than one factor for "
            "all, as clipping by value does"
        )
        reasons.append(f"{', '.join(group.names)} ({why[0] if why else other})")
        taps.excluded.update(group.modules)
    if len(gaps) == active:
        raise ValueError(
            "The scores of the rows add up to the gradient of no parameter, so values would be wrong: "
            f"{'; '.join(reasons[:3])}."
        )
    logger.warning(
        "Values leave out %d of %d groups of parameters, whose gradient the rows' scores don't add up to: %s.",
        len(gaps),
        total,
        "; ".join(reasons[:5]) + ("; ..." if len(reasons) > 5 else ""),
    )
