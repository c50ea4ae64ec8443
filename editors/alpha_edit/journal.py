"""What came of edits, and the record of them all: a line of JSON an event, a file a batch, nothing half-written."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from hf_iclr.saving import in_own_memory, write_safetensors
from hf_iclr.untrusted import as_written_by, inside, parse_json, read_safetensors, regular_file, whole_number

from .requests import EditRequest


LEDGER_NAME = "ledger.jsonl"
BATCHES = "batches"
_KINDS = ("residuals", "factors", "keys")


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


@dataclass
class EditBatch:
    """
    Edits that were made together.

    Args:
        name (`str`):
            Name of its file.
        requests (`list[EditRequest]`):
            The edits.
        states (`torch.Tensor` of shape `(n, hidden_size)`):
            Their target states.
        residuals (`dict[int, torch.Tensor]`):
            For each layer, of shape `(o, r)`.
        factors (`dict[int, torch.Tensor]`):
            For each layer, of shape `(r, d)`: the update is `residuals @ factors`.
        keys (`dict[int, torch.Tensor]`):
            For each layer, of shape `(d, n)`.
        edits (`list[dict]`):
            Their rows of [`EditReport`].
        layers (`list[dict]`):
            The layers' rows of [`EditReport`].
    """

    name: str
    requests: list[EditRequest]
    states: torch.Tensor
    residuals: dict[int, torch.Tensor] = field(default_factory=dict)
    factors: dict[int, torch.Tensor] = field(default_factory=dict)
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    edits: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)

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
        """The batch of a ledger line's record and its file."""
        path = inside(folder, f"{BATCHES}/{record['name']}.safetensors")
        if not path.exists():
            raise ValueError(f"Expected {path}, of which the ledger speaks, got no such file.")
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
                kinds[kind][int(layer)] = in_own_memory(tensor)
        return batch

    def record(self) -> dict[str, Any]:
        """What of it stands in the ledger."""
        return {
            "name": self.name,
            "requests": [request.to_dict() for request in self.requests],
            "edits": self.edits,
            "layers": self.layers,
        }


def append_event(folder: Path, event: dict[str, Any]) -> None:
    """
    Add one line to the ledger and have it on the disk before returning.

    Args:
        folder (`Path`):
            Where the ledger is.
        event (`dict`):
            `event` (`"edit"`, `"undo"` or `"remove"`), and the `batches` made or how many were `undone`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = inside(folder, LEDGER_NAME)
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a") as file:
        # After a kill in the middle of a line that line stays, unread, and the next one starts anew.
        file.write("\n" * torn + json.dumps(event) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_events(folder: Path) -> list[dict[str, Any]]:
    """
    The events of a ledger, without a line that was cut short.

    Args:
        folder (`Path`):
            Where the ledger is.

    Returns:
        `list[dict]`

    Raises:
        ValueError: when there is no ledger, or a line that is whole cannot be trusted.
    """
    path = inside(folder, LEDGER_NAME)
    if not path.exists():
        raise ValueError(f"Expected {LEDGER_NAME} in {folder}, got none: no edits were saved there.")
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
    What is in force after some events.

    Args:
        events (`list[dict]`):
            Lines of a ledger.

    Returns:
        `list[dict]`: the records of the batches, in order.

    Raises:
        ValueError: when more batches were undone than there were, or two have one name.
    """
    batches: list[dict[str, Any]] = []
    for event in events:
        kept = len(batches) - whole_number(event["undone"], "the number of batches undone", most=len(batches))
        batches = batches[:kept] + event["batches"]
    names = [batch["name"] for batch in batches]
    if len({*names}) < len(names):
        raise ValueError(f"Expected a file of its own for each batch of the ledger, got the names {names}.")
    return batches
