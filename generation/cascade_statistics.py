"""What a cascade did: per prompt, and for the whole call."""

from dataclasses import dataclass, field
from typing import Any

import torch


_COUNTS = ("rounds", "drafted", "accepted", "new_tokens", "deferred", "drift")  # of each row
_COSTS = (
    *("large_forwards", "small_forwards", "large_tokens", "small_tokens"),
    *("draft_seconds", "verify_seconds", "overhead_seconds", "total_seconds"),
)


@dataclass
class CascadeStatistics:
    """
    Counts and times of one `generate` call of a speculative cascade, kept as `model.cascade_statistics`.

    Attributes:
        backend (`str`):
            `"batched"` (this library's loop) or `"assisted"` (the loop of transformers with replaced target logits).
        rule (`str`), alpha (`float`):
            The deferral rule and its parameter.
        rounds, drafted, accepted, new_tokens (`list[int]`, one entry a row):
            Draft-and-verify rounds the row took part in, tokens drafted for it, drafted tokens kept, tokens emitted.
        deferred (`list[float]`, one entry a row):
            Expected number of emitted positions that the large model decided, Σ r (or Σ_u r(u) q(u) for token rules).
            Deferral is not rejection: a deferred draft is still accepted with probability 1 - TV(π, q).
        drift (`list[float]`, one entry a row):
            Σ TV(π, p) over the emitted positions: 0 is the large model's own law.
        large_forwards, small_forwards, large_tokens, small_tokens (`int`):
            Forward passes of each model and the tokens (batch x length) they processed.
        draft_seconds, verify_seconds, total_seconds (`float`):
            Wall time inside the small model's forwards, the large model's, and of the whole loop. On a GPU, which runs
            behind the host, the split shows where the host waited.
    """

    backend: str
    rule: str
    alpha: float
    rounds: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    deferred: list[float] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    large_forwards: int = 0
    small_forwards: int = 0
    large_tokens: int = 0
    small_tokens: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    total_seconds: float = 0.0

    @classmethod
    def for_rows(cls, backend: str, rule: str, alpha: float, rows: int) -> "CascadeStatistics":
        counts: dict[str, Any] = {name: [0] * rows for name in ("rounds", "drafted", "accepted", "new_tokens")}
        return cls(backend, rule, alpha, **counts, deferred=[0.0] * rows, drift=[0.0] * rows)

    def record(self, row: int, drafted: int, accepted: int, deferred: torch.Tensor, drift: torch.Tensor) -> None:
        """Adds one round of a row; `deferred` and `drift` hold one value an emitted token."""
        self.rounds[row] += 1
        self.drafted[row] += drafted
        self.accepted[row] += accepted
        self.new_tokens[row] += len(deferred)
        self.deferred[row] += float(deferred.sum())
        self.drift[row] += float(drift.sum())

    @property
    def overhead_seconds(self) -> float:
        """Wall time outside both models' forwards, in seconds."""
        return self.total_seconds - self.draft_seconds - self.verify_seconds

    def row(self, row: int) -> dict[str, Any]:
        """One prompt's share: counts and rates of that row, and the whole call under `"call"`."""
        counts = {name: getattr(self, name)[row] for name in _COUNTS}
        return {**counts, **_rates(counts, counts["rounds"]), "call": self.to_dict()}

    def to_dict(self) -> dict[str, Any]:
        """The whole call: totals over rows, forwards, tokens and seconds."""
        counts = {name: sum(getattr(self, name)) for name in _COUNTS} | {"rounds": max(self.rounds, default=0)}
        return {
            "backend": self.backend,
            "rule": self.rule,
            "alpha": self.alpha,
            "rows": len(self.rounds),
            **counts,
            **_rates(counts, self.large_forwards),
            **{name: getattr(self, name) for name in _COSTS},
        }


def _rates(counts: dict[str, Any], large_forwards: int) -> dict[str, float | None]:
    drafted, tokens = counts["drafted"], counts["new_tokens"]
    return {
        "acceptance_rate": counts["accepted"] / drafted if drafted else None,
        "deferral_rate": counts["deferred"] / tokens if tokens else None,
        "tokens_per_large_forward": tokens / large_forwards if large_forwards else None,
    }
