"""Edits of concepts that were made at once, and the folder or repository whose ledger has them."""

import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from hf_iclr.saving import write_safetensors
from hf_iclr.untrusted import check_links, inside

from ..records.ledger import (
    JOURNAL_NAME,
    MARK,
    batches_of,
    committed_events,
    digests,
    locked,
    read_events,
    write_ledger,
)


WEIGHTS_NAME = "pytorch_lora_weights.safetensors"


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


def write_edits(folder: Path, events: list[dict[str, Any]], state: dict[str, torch.Tensor]) -> None:
    """
    Write the ledger and, in its header marked with the ledger's digest, the LoRA: after a kill in between the edits
    before count.

    Raises:
        ValueError: when the folder has a LoRA of something else, or events that these do not go on from.
    """
    check_links(folder)
    with locked(folder):
        weights = inside(folder, WEIGHTS_NAME)
        if (folder / JOURNAL_NAME).exists():
            _check_same(committed_events(folder, WEIGHTS_NAME), events, folder)
        elif weights.exists():
            raise ValueError(f"Expected a new folder or one with edits of concepts, got {folder} with another LoRA.")
        write_ledger(folder, events, WEIGHTS_NAME)
        write_safetensors(state, weights, {"format": "pt", MARK: digests(events)[-1]})


def check_repository(api: HfApi, repo_id: str, revision: str | None, events: list[dict[str, Any]]) -> str | None:
    """The last commit of a repository; raises `ValueError` when it has events that these do not go on from."""
    head = api.model_info(repo_id, revision=revision)
    if JOURNAL_NAME in [file.rfilename for file in head.siblings or ()]:
        path = Path(api.hf_hub_download(repo_id, JOURNAL_NAME, revision=head.sha))
        _check_same(read_events(path.parent), events, repo_id)
    return head.sha


def _check_same(there: list[dict[str, Any]], events: list[dict[str, Any]], where: str | Path) -> None:
    if digests(there)[-1] not in digests(events):
        others = [batch.get("concepts") for batch in batches_of(there)]
        raise ValueError(
            f"Expected a new place or the one these edits were saved to, got {where} with other edits, {others}. "
            "Load them by `ConceptEditor.from_pretrained` and make yours there, or choose another place."
        )
