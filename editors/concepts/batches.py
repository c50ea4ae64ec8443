"""Edits of concepts that were made at once."""

import secrets
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class ConceptBatch:
    """Edits made at once: for each kind of input the keys (d, n), the factor (r, d), and residuals (o, r) by layer."""

    concepts: dict[str, str]
    keys: dict[str, torch.Tensor] = field(default_factory=dict)
    factors: dict[str, torch.Tensor] = field(default_factory=dict)
    residuals: dict[str, torch.Tensor] = field(default_factory=dict)
    name: str = field(default_factory=lambda: secrets.token_hex(4))  # which no other batch has

    def record(self) -> dict[str, Any]:
        """What of it stands in the ledger."""
        ranks = {kind: len(factor) for kind, factor in self.factors.items()}
        return {"name": self.name, "concepts": self.concepts, "ranks": ranks}
