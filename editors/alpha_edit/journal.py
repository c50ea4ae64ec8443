"""What came of edits, and the record of them all: a line of JSON an event, a file a batch, nothing half-written."""

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from hf_iclr.saving import contiguous_clone, write_safetensors
from hf_iclr.untrusted import as_written_by, inside, parse_json, read_safetensors, regular_file, whole_number

from .projections import DownProjection, Updates
from .requests import EditRequest


logger = logging.getLogger(__name__)

JOURNAL_NAME = "ledger.jsonl"
BATCHES = "batches"
_KINDS = ("residuals", "factors", "keys")


def report_row(request: EditRequest, **values: Any) -> dict[str, Any]:
    """What was asked for, and what came of it, as a row of [`EditReport`]."""
    return {name: getattr(request, name) for name in ("id", "prompt", "subject", "target_new")} | values


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

    def reject(self, request: EditRequest, reason: str) -> None:
        """Enter a request that is not made, and say so in the log."""
        logger.warning("Edit %s (%r -> %r) is not made: %s.", request.id, request.text, request.target_new, reason)
        self.rejected.append(report_row(request, reason=reason))

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


@dataclass
class EditBatch:
    """Edits that were made together. For each layer the update is `residuals @ factors`."""

    name: str  # of its file
    requests: list[EditRequest]
    states: torch.Tensor  # the target states, (n, hidden_size)
    residuals: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> (o, r)
    factors: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> (r, d)
    keys: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> (d, n)
    edits: list[dict[str, Any]] = field(default_factory=list)  # the rows of EditReport
    layers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def updates(self) -> Updates:
        """Residuals and factor of each layer."""
        return {layer: (self.residuals[layer], factor) for layer, factor in self.factors.items()}

    def check_shapes(self, projections: Sequence[DownProjection]) -> None:
        """Raises `ValueError` when the updates are none of these layers'."""
        for p in projections:
            residuals, factor = self.updates.get(p.index, (torch.empty(0), torch.empty(0)))
            rank = factor.shape[0]
            if (tuple(residuals.shape), tuple(factor.shape)) != ((p.out_features, rank), (rank, p.in_features)):
                raise ValueError(
                    f"Expected updates of shapes ({p.out_features}, n) and (n, {p.in_features}) for layer "
                    f"{p.index} in batch {self.name!r}, got {tuple(residuals.shape)} and {tuple(factor.shape)}. "
                    "Get the edits again from where they came."
                )

    def collisions(self, others: Sequence["EditBatch"]) -> list[float]:
        """For each edit the largest |cosine| of its key with that of another one, over layers."""
        # A request has a key for each of its target states, which are zero beyond these.
        states = self.states.view(len(self.requests), -1, self.states.shape[-1])
        owner = states.any(-1).nonzero()[:, 0]
        worst = torch.zeros(len(owner))
        for layer, keys in self.keys.items():
            every = torch.cat([keys, *(other.keys[layer] for other in others)], 1)
            cosine = ((keys / keys.norm(dim=0)).T @ (every / every.norm(dim=0))).abs()
            cosine[:, : len(owner)].masked_fill_(owner[:, None] == owner, 0)
            worst = worst.maximum(cosine.amax(1))
        return torch.zeros(len(self.requests)).scatter_reduce(0, owner, worst, "amax").tolist()

    def save(self, folder: Path) -> None:
        """Write the batch's tensors to `folder/batches`, whole or not at all; a file that is there is the same one."""
        path = inside(folder, f"{BATCHES}/{self.name}.safetensors")
        if path.exists():
            return
        tensors = {"states": self.states}
        for kind in _KINDS:
            tensors |= {f"{kind}.{layer}": value for layer, value in getattr(self, kind).items()}
        write_safetensors(tensors, path)

    @classmethod
    def load(cls, folder: Path, record: dict[str, Any]) -> "EditBatch":
        """The batch of a record in the journal, and of its file."""
        path = inside(folder, f"{BATCHES}/{record['name']}.safetensors")
        if not path.exists():
            raise ValueError(f"Expected {path}, of which the journal speaks, got no such file.")
        tensors, _ = read_safetensors(path)
        with as_written_by("AlphaEditor", path):
            batch = cls(
                name=record["name"],
                requests=[EditRequest.from_dict(request) for request in record["requests"]],
                states=tensors.pop("states"),
                edits=record["edits"],
                layers=record["layers"],
            )
            kinds = {kind: getattr(batch, kind) for kind in _KINDS}
            for name, tensor in tensors.items():
                kind, _, layer = name.partition(".")
                kinds[kind][int(layer)] = contiguous_clone(tensor)
        return batch

    def record(self) -> dict[str, Any]:
        """What of it stands in the journal."""
        return {
            "name": self.name,
            "requests": [request.to_dict() for request in self.requests],
            "edits": self.edits,
            "layers": self.layers,
        }


class Journal:
    """
    The batches in force, and the events that led to them: only ever added to, and, where there is a folder, on the
    disk before they count.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.events: list[dict[str, Any]] = []
        self.batches: list[EditBatch] = []

    @classmethod
    def load(cls, folder: Path) -> "Journal":
        """
        Read the journal of a folder and the batches in force, to go on in memory.

        Raises:
            ValueError: when there is none, or one that cannot be trusted.
        """
        journal = cls()
        journal.events = read_events(folder)
        with as_written_by("AlphaEditor.save_pretrained", folder):
            journal.batches = [EditBatch.load(folder, record) for record in batches_of(journal.events)]
        return journal

    def new_name(self, position: int) -> str:
        """A name that no batch ever had."""
        return f"edit_{len(self.events) + 1:04d}_{position + 1:04d}"

    def commit(self, event: dict[str, Any], undone: int, batches: list[EditBatch]) -> None:
        """From here on the batches are in force in place of the last `undone`, on the disk first."""
        event |= {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "undone": undone,
            "batches": [batch.record() for batch in batches],
        }
        if self.folder is not None:
            for batch in batches:
                batch.save(self.folder)
            append_event(self.folder, event)
        self.events.append(event)
        self.batches = self.batches[: len(self.batches) - undone] + batches

    def saved_in(self, folder: Path) -> int:
        """How many of the events a folder has; raises `ValueError` where it has others."""
        known = read_events(folder) if (folder / JOURNAL_NAME).exists() else []
        if known != self.events[: len(known)]:
            raise ValueError(
                f"Expected a new folder or the one these edits were saved to, got {folder} with other edits."
            )
        return len(known)

    def save(self, folder: Path) -> None:
        """Write to a folder what it does not have yet, the batches first."""
        saved = self.saved_in(folder)
        for batch in self.batches:
            batch.save(folder)
        for event in self.events[saved:]:
            append_event(folder, event)


def append_event(folder: Path, event: dict[str, Any]) -> None:
    """
    Add one line to the journal and have it on the disk before returning: `event` (`"edit"`, `"undo"` or `"remove"`),
    the `batches` made and how many were `undone`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = inside(folder, JOURNAL_NAME)
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a") as file:
        # After a kill in the middle of a line that line stays, unread, and the next one starts anew.
        file.write("\n" * torn + json.dumps(event) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_events(folder: Path) -> list[dict[str, Any]]:
    """
    The events of a folder's journal, without a line that was cut short.

    Raises:
        ValueError: when there is no journal, or a line that is whole cannot be trusted.
    """
    path = inside(folder, JOURNAL_NAME)
    if not path.exists():
        raise ValueError(f"Expected {JOURNAL_NAME} in {folder}, got none: no edits were saved there.")
    events = []
    for number, line in enumerate(regular_file(path).read_bytes().splitlines(), 1):
        try:
            events.append(parse_json(line, f"line {number} of {path}", nan=True))
        except ValueError as error:
            if not isinstance(error.__cause__, json.JSONDecodeError):
                raise
    return events


def batches_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    The records of the batches in force after some events, in order.

    Raises:
        ValueError: when more batches were undone than there were, or two have one name.
    """
    batches: list[dict[str, Any]] = []
    for event in events:
        kept = len(batches) - whole_number(event["undone"], "the number of batches undone", most=len(batches))
        batches = batches[:kept] + event["batches"]
    names = [batch["name"] for batch in batches]
    if len({*names}) < len(names):
        raise ValueError(f"Expected a file of its own for each batch of the journal, got the names {names}.")
    return batches
