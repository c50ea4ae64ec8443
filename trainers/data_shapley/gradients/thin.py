"""
Scores linear layers along thin directions, those of LoRA and of sketches: what most trained layers are, with the least
that has to be done for each of them.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .direction import Direction, LowRank, dense, wide
from .scores import TappedModule


class ThinDirections:
    """
    Directions of all targets for a layer that multiplies its input by a matrix, as two thin factors: of an input `x`
    and the gradient `b` of the output, a position's score is the sum of products of `x @ before` and `b @ after`,
    where a factor that is `None` leaves the other as it is, and of `b @ bias`.
    """

    def __init__(self, tapped: TappedModule, dtype: torch.dtype) -> None:
        factors = [_factors(tapped, directions.get("weight")) for directions in tapped.directions]
        self.targets = len(factors)
        self.before = self.after = self.bias = None
        self.is_thin = bool(factors) and None not in factors and len({_widths(found) for found in factors}) == 1
        if not self.is_thin:
            return
        before, after = zip(*factors, strict=True)  # type: ignore[misc]
        self.before = None if before[0] is None else torch.cat(before, dim=1).to(dtype).contiguous()
        self.after = None if after[0] is None else torch.cat(after, dim=1).to(dtype).contiguous()
        self.columns = next(found.shape[1] for found in (self.before, self.after) if found is not None) // self.targets
        if "bias" in tapped.directions[0]:
            biases = [dense(directions["bias"]) for directions in tapped.directions]
            self.bias = torch.stack(biases, dim=1).to(dtype)

    def project(self, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What [`~ThinDirections.score`] needs of a gradient: `b @ after`, and `b @ bias`."""
        left = b if self.after is None else b @ self.after
        return left, None if self.bias is None else b @ self.bias

    def score(
        self, right: torch.Tensor, left: torch.Tensor, biased: torch.Tensor | None, shape: Sequence[int]
    ) -> torch.Tensor:
        """
        (`torch.Tensor` of shape `(*shape, targets)`): `right` is `x @ before`, the shape that of positions, or
        `(batch,)` for sums over the positions of an input.
        """
        total = wide(left.dtype)
        if left.dtype is not total:
            left, right = left.to(total), right.to(total)
        if self.targets == 1:
            scores = (left * right).reshape(*shape, -1).sum(-1, keepdim=True)
        else:
            left, right = (
                part.reshape(*shape, -1, 1 if factor is None else self.targets, self.columns)
                for part, factor in ((left, self.after), (right, self.before))
            )
            scores = (left * right).sum((-3, -1))
        if biased is not None:
            scores = scores + biased.to(total).reshape(*shape, -1, self.targets).sum(-2)
        return scores


class ThinLayer:
    """
    A layer with its [`ThinDirections`], as long as they are those of the module, and the layers that were last seen to
    read the same tensor after it, as those of keys and values do after that of queries.
    """

    def __init__(self, tapped: TappedModule) -> None:
        self.tapped, self.together = tapped, [self]
        self.thin: ThinDirections | None = None
        self._of: tuple[Any, torch.dtype] | None = None
        self._joined: tuple[list[ThinDirections | None], torch.Tensor, list[int]] | None = None

    def point(self, dtype: torch.dtype) -> ThinDirections | None:
        """The directions for gradients of this type, `None` if they are not thin."""
        directions = self.tapped.directions
        if self._of is None or self._of[0] is not directions or self._of[1] is not dtype:
            self._of = directions, dtype
            found = ThinDirections(self.tapped, dtype)
            self.thin = found if found.is_thin else None
        return self.thin

    def joined(self, dtype: torch.dtype) -> tuple[torch.Tensor, list[int]]:
        """The factors of the layers that read one tensor beside one another, and how many columns each has."""
        those = [layer.point(dtype) for layer in self.together]
        if self._joined is None or self._joined[0] != those:
            parts = [found.before for found in those if found is not None and found.before is not None]
            self._joined = those, torch.cat(parts, dim=1), [part.shape[1] for part in parts]
        return self._joined[1:]


class ThinProducts:
    """
    Products of the inputs of a forward pass with thin factors. Layers that read one tensor one after the other have
    them taken at once, which costs little more than one of them, from the second pass on, when they are known.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Let go of the last tensor."""
        self._x: torch.Tensor | None = None
        self._version = 0
        self._first: ThinLayer | None = None
        self._found: dict[int, torch.Tensor] = {}

    def of(self, layer: ThinLayer, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What [`~ThinDirections.score`] needs of a layer's input."""
        thin = layer.thin
        assert thin is not None
        if thin.before is None:
            return x.detach()
        if x is self._x and x._version == self._version and self._first is not None:
            found = self._found.pop(id(layer), None)
            if found is not None:
                return found
            if layer not in self._first.together:
                self._first.together.append(layer)
            return x.detach().to(dtype) @ thin.before
        if self._first is not None and self._found:  # some that were expected did not read it
            self._first.together = [self._first]
        self._x, self._version, self._first = x, x._version, layer
        factors, sizes = layer.joined(dtype)
        product = x.detach().to(dtype) @ factors
        if len(sizes) == 1:
            self._found = {}
            return product
        first, *others = product.split(sizes, dim=-1)
        self._found = dict(zip(map(id, layer.together[1:]), others, strict=True))
        return first


def _factors(tapped: TappedModule, u: Direction | None) -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
    """By what input and gradient are multiplied, `(inputs, few)` and `(outputs, few)`; `None` where it isn't thin."""
    if u is None or tapped.kind not in ("linear", "conv1d"):
        return None
    if isinstance(u, LowRank):
        return (u.right.T, u.left) if tapped.kind == "linear" else (u.left, u.right.T)
    weight = u if tapped.kind == "linear" else u.T
    outputs, inputs = weight.shape
    if 8 * outputs <= inputs:
        return weight.T, None
    return (None, weight) if 8 * inputs <= outputs else None


def _widths(factors: Any) -> tuple[int | None, ...]:
    return tuple(None if factor is None else factor.shape[1] for factor in factors)
