"""The weight of one down-projection with edits added and taken away again, bit for bit."""

from collections.abc import Sequence

import torch
from torch.utils.hooks import RemovableHandle

from .down_projections import DownProjection


class EditedWeight:
    """
    Adds low-rank updates to a down-projection. A floating-point weight is written: original + sum, added in float32
    and rounded once. Any other (a quantised one) is left alone, and the updates are added to the module's output.

    Args:
        projection (`DownProjection`):
            Where to add.
    """

    def __init__(self, projection: DownProjection) -> None:
        self.projection = projection
        weight = projection.module.weight
        self.is_float = isinstance(weight, torch.Tensor) and weight.is_floating_point()
        self.original = weight.detach().clone() if self.is_float else None
        self._hook: RemovableHandle | None = None

    @property
    def device(self) -> torch.device:
        return self.projection.module.weight.device

    def set(self, updates: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """
        Make the weight the original one plus these updates, in their order; none restore it exactly.

        Args:
            updates (`list[tuple[torch.Tensor, torch.Tensor]]`):
                float32 residuals of shape `(o, n)` and factors of shape `(n, d)`.
        """
        if self.original is not None:
            with torch.no_grad():
                self.projection.module.weight.copy_(self.total(updates) if updates else self.original)
            return
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if updates:
            moved = [(residuals.to(self.device), factor.to(self.device)) for residuals, factor in updates]

            def add(_, inputs, output: torch.Tensor) -> torch.Tensor:
                keys = inputs[0].float()
                return output + sum(keys @ factor.T @ residuals.T for residuals, factor in moved).to(output)

            self._hook = self.projection.module.register_forward_hook(add)

    def total(self, updates: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """float32 weight as it is stored, before it is rounded to the model's type."""
        assert self.original is not None
        total = self.original.float()
        for residuals, factor in updates:
            total = total + self.projection.as_stored(residuals.to(self.device) @ factor.to(self.device))
        return total
