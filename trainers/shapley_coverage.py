"""Whether the scores of all rows add up to the gradient that was applied, and which parameters they miss."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from .shapley_taps import TappedModule


@dataclass
class Group:
    """Modules that share parameters, which can only be checked together."""

    modules: list[int]
    parameters: list[int]  # positions in the list of trainable parameters
    names: list[str]


def group_modules(modules: Sequence[TappedModule], parameters: Sequence[nn.Parameter]) -> list[Group]:
    """Divide tapped modules so that tied parameters fall into one group."""
    position = {id(parameter): index for index, parameter in enumerate(parameters)}
    owner: dict[int, Group] = {}
    groups: list[Group] = []
    for tapped in modules:
        mine = [position[id(parameter)] for parameter in tapped.parameters.values()]
        group = next((owner[index] for index in mine if index in owner), None)
        if group is None:
            group = Group([], [], [])
            groups.append(group)
        group.modules.append(tapped.index)
        group.names += [f"{tapped.name}.{name}" for name in tapped.parameters]
        group.parameters += [index for index in mine if index not in group.parameters]
        owner |= dict.fromkeys(mine, group)
    return groups


def clip_factor(gradient: np.ndarray, scores: np.ndarray) -> float:
    """
    What all gradients were multiplied by between the backward pass and the step.

    Args:
        gradient (`np.ndarray` of shape `(groups,)`):
            `<G_g, u_g>` with the gradient that will be applied.
        scores (`np.ndarray` of shape `(groups,)`):
            Sum over rows of `<g_{i,g}, u_g>`.

    Returns:
        `float`: median of the groups' ratios, weighted by the size of their scores, so that groups whose scores miss
        something don't matter; 1 if all scores are 0.
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
    What scores of a loss scaled by an fp16 scaler are multiplied by to be those of the step.

    Args:
        ratio (`float`):
            Of present gradients to scores, see [`clip_factor`].
        scale (`float`):
            The scaler's, 1 without one.

    Returns:
        `float`: the ratio if gradients were unscaled for clipping, else the ratio over the scale, as the scaler is
        still going to divide them. Clipping never raises a gradient, so the two can be told apart.
    """
    return ratio / scale if scale > 1 and ratio > 1 / np.sqrt(scale) else ratio


def find_gaps(
    gradient: np.ndarray, scores: np.ndarray, sizes: np.ndarray, factor: float, tolerance: float
) -> list[int]:
    """
    Groups whose scores don't add up to their gradient.

    Args:
        gradient, scores (`np.ndarray` of shape `(groups,)`), factor (`float`):
            As in [`clip_factor`].
        sizes (`np.ndarray` of shape `(groups,)`):
            Sum over rows of the scores' absolute values: rounding errors are relative to it.
        tolerance (`float`):
            Error that counts as rounding.
    """
    error = np.abs(gradient - factor * scores)
    size = np.abs(factor) * sizes + np.abs(gradient)
    return [int(group) for group in np.flatnonzero(error > tolerance * size) if size[group] > 1e-7 * size.sum()]
