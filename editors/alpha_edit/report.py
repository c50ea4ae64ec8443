"""What came of some edits."""

from dataclasses import dataclass, field
from typing import Any

import pandas as pd


@dataclass
class EditReport:
    """
    What [`AlphaEditor.edit`] did.

    Args:
        edits (`list[dict]`):
            For each edit made: `id`, `prompt`, `subject`, `target_new`, `batch`, `p_before` and `p_after` (probability
            of the target after the plain prompt: the geometric mean of its tokens), `loss` (nats per target token when
            the target state was found), `steps`, `collision` (largest |cosine| of its key with that of another edit,
            over layers).
        rejected (`list[dict]`):
            Requests that were not made: `id`, `prompt`, `subject`, `target_new`, `reason`.
        layers (`list[dict]`):
            For each batch and layer: `batch`, `layer`, `preserved` (m), `width` (d), `editable` (||P k|| / ||k||,
            mean), `residual` (mean norm), `change` (norm of the update by that of the weight).
    """

    edits: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)

    def to_pandas(self) -> pd.DataFrame:
        """One row an edit, the rejected ones with their reason."""
        return pd.DataFrame(self.edits + self.rejected)

    def __str__(self) -> str:
        if not self.edits:
            return f"no edit made, {len(self.rejected)} rejected"
        table = pd.DataFrame(self.edits)
        return (
            f"{len(table)} edits made, {len(self.rejected)} rejected; target's probability "
            f"{table.p_before.mean():.3f} -> {table.p_after.mean():.3f} (mean), {(table.p_after > 0.5).mean():.0%} "
            "above one half"
        )
