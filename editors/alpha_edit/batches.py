"""What came of edits that were made together: a report, the batch in a file, and its update as a LoRA adapter."""

import json
import logging
import re
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hf_iclr.saving import atomic_file, contiguous_clone, write_safetensors
from hf_iclr.untrusted import as_written_by, inside, read_safetensors

from .closed_form import low_rank_factors
from .projections import DownProjection, Updates
from .requests import EditRequest


logger = logging.getLogger(__name__)

BATCHES = "batches"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_KINDS = ("residuals", "factors", "keys")
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM serves


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

    @property
    def owners(self) -> torch.Tensor:
        """For each key the index of its request."""
        # A request has a key for each of its target states, at least one, and they are zero beyond these.
        has_key = self.states.view(len(self.requests), -1, self.states.shape[-1]).any(-1)
        has_key[:, 0] = True
        return has_key.nonzero()[:, 0]

    @property
    def without_subject(self) -> torch.Tensor:
        """For each key whether it is of a prompt without a subject."""
        return torch.tensor([request.subject is None for request in self.requests])[self.owners]

    def report(self, others: Sequence["EditBatch"], **columns: list[float]) -> None:
        """Make the rows of its report, of a column's value for each edit and of collisions with other batches."""
        columns["collision"] = self.collisions(others)
        for i, request in enumerate(self.requests):
            self.edits.append(report_row(request, batch=self.name, **{name: v[i] for name, v in columns.items()}))

    def check(self, projections: Sequence[DownProjection]) -> None:
        """Raises `ValueError` when it is no batch of edits of these layers."""
        count, width = len(self.requests), next((len(keys.T) for keys in self.keys.values()), 0)
        expected: dict[tuple[str, int], tuple[int, ...]] = {}
        for p in projections:
            rank = len(self.factors.get(p.index, ()))
            expected["residuals", p.index] = p.out_features, rank
            expected["factors", p.index] = rank, p.in_features
            expected["keys", p.index] = p.in_features, width
        found = {(kind, layer): value for kind in _KINDS for layer, value in getattr(self, kind).items()}
        expected["states", projections[-1].index] = count, *self.states.shape[1:-1], projections[-1].out_features
        found["states", projections[-1].index] = self.states
        for key in expected | found:
            value = found.get(key, torch.empty(0))
            if tuple(value.shape) != expected.get(key) or value.dtype != torch.float32 or not value.isfinite().all():
                raise ValueError(
                    f"Expected finite float32 {key[0]} of shape {expected.get(key)} for layer {key[1]} in batch "
                    f"{self.name!r}, got {value.dtype} of shape {tuple(value.shape)}. Get the edits again from where "
                    "they came."
                )
        if len(self.edits) != count or not all(isinstance(row, dict) for row in self.edits):
            raise ValueError(f"Expected {count} rows of the report in batch {self.name!r}, got {self.edits!r:.80}.")

    def without(self, ids: Collection[str]) -> "EditBatch":
        """What is left without some edits, to be solved anew: it has states, and no updates."""
        stays = [i for i, request in enumerate(self.requests) if request.id not in ids]
        return EditBatch(
            self.name, [self.requests[i] for i in stays], self.states[stays], edits=[self.edits[i] for i in stays]
        )

    def collisions(self, others: Sequence["EditBatch"]) -> list[float]:
        """For each edit the largest |cosine| of its key with that of another one, over layers."""
        owner = self.owners
        worst = torch.zeros(len(owner))
        for layer, keys in self.keys.items():
            every = torch.cat([keys, *(other.keys[layer] for other in others)], 1)
            cosine = ((keys / keys.norm(dim=0)).T @ (every / every.norm(dim=0))).abs()
            cosine[:, : len(owner)].masked_fill_(owner[:, None] == owner, 0)
            worst = worst.maximum(cosine.amax(1))
        return torch.zeros(len(self.requests)).scatter_reduce(0, owner, worst, "amax").tolist()

    def save(self, folder: Path) -> None:
        """Write the batch's tensors to `folder/batches`; a file of its name, which no other has, is this one's."""
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
        if not re.fullmatch(r"\w+", record["name"]):
            raise ValueError(f"Expected a batch's name of letters, digits and '_', got {record['name']!r}.")
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
                kinds[kind][int(layer) if layer.isdecimal() else layer] = contiguous_clone(tensor)
        return batch

    def record(self) -> dict[str, Any]:
        """What of it stands in the journal."""
        return {
            "name": self.name,
            "requests": [request.to_dict() for request in self.requests],
            "edits": self.edits,
            "layers": self.layers,
        }


def concatenate_updates(updates: Sequence[Updates], rank: int | None = None) -> Updates:
    """
    The sum of some updates as one of them: ranks add, up to what a full matrix has, or are compressed to `rank` by
    singular value decomposition.
    """
    total: Updates = {}
    for layer in updates[0] if updates else ():
        residuals = torch.cat([update[layer][0] for update in updates], 1)
        factor = torch.cat([update[layer][1] for update in updates], 0)
        if residuals.shape[1] > min(rank or len(residuals), len(residuals), factor.shape[1]):
            residuals, factor = (part.float() for part in low_rank_factors(residuals.double() @ factor.double(), rank))
        total[layer] = residuals, factor
    return total


def add_adapters(
    model: PreTrainedModel, projections: Sequence[DownProjection], updates: dict[str, Updates], base_model: str | None
) -> PeftModel:
    """Put updates, for each adapter's name those of the edited layers, on a model as adapters, all of them active."""
    peft_model: PeftModel | None = None
    for name, update in updates.items():
        config = _lora_config(projections, update, base_model)
        if peft_model is None:
            peft_model = get_peft_model(model, config, adapter_name=name)
        else:
            peft_model.add_adapter(name, config)
        for p in projections:
            layer = peft_model.base_model.model.get_submodule(p.name)
            for side, value in (("lora_B", update[p.index][0]), ("lora_A", update[p.index][1])):
                weight = getattr(layer, side)[name].weight
                weight.data = value.to(device=weight.device, dtype=torch.float32, copy=True)
    assert peft_model is not None
    peft_model.base_model.set_adapter(list(updates), inference_mode=True)
    return peft_model.eval()


def remove_adapters(peft_model: PeftModel) -> PreTrainedModel:
    """The plain model again, with no trace that would make `save_pretrained` write an adapter."""
    model = peft_model.unload().eval()
    for name in ("peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(name, None)
    return model


def save_adapter(
    folder: Path,
    projections: Sequence[DownProjection],
    updates: Updates,
    base_model: str | None,
    metadata: dict[str, str],
) -> None:
    """
    Write `adapter_model.safetensors` and `adapter_config.json` without touching a model; without updates the adapter
    is zero. Zeros fill the rank up to one that vLLM serves, so the second file hardly ever changes.
    """
    rank = max((len(factor) for _, factor in updates.values()), default=0)
    rank = next((ready for ready in _RANKS if ready >= rank), -(-rank // _RANKS[-1]) * _RANKS[-1])
    tensors, padded = {}, {}
    for p in projections:
        residuals, factor = torch.zeros(p.out_features, rank), torch.zeros(rank, p.in_features)
        if updates:
            own = len(updates[p.index][1])
            residuals[:, :own], factor[:own] = updates[p.index]
        tensors[f"base_model.model.{p.name}.lora_B.weight"] = residuals
        tensors[f"base_model.model.{p.name}.lora_A.weight"] = factor
        padded[p.index] = residuals, factor
    config = _lora_config(projections, padded, base_model).to_dict()
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)  # a set's order would be another every time
    path = inside(folder, ADAPTER_CONFIG)
    new = not path.exists() or path.read_text() != text
    with ExitStack() as files:  # which take their names last in, first out
        if new:
            files.enter_context(atomic_file(path)).write_text(text)
        save_file(tensors, files.enter_context(atomic_file(inside(folder, ADAPTER))), {"format": "pt", **metadata})
        if new:  # while the two files are of different ranks, this one is not there
            path.unlink(missing_ok=True)


def _lora_config(projections: Sequence[DownProjection], updates: Updates, base_model: str | None) -> LoraConfig:
    ranks = {p.name: updates[p.index][1].shape[0] for p in projections}
    rank = max(ranks.values())
    differing = {name: own for name, own in ranks.items() if own != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(ranks),
        rank_pattern=differing,
        alpha_pattern=differing,
        fan_in_fan_out=projections[0].is_conv1d,
        base_model_name_or_path=base_model,
        task_type="CAUSAL_LM",
        inference_mode=True,
        init_lora_weights=False,
    )
