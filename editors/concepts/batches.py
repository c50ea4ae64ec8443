"""Edits of concepts that were made at once, and which of them a folder or a repository has."""

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from hf_iclr.saving import atomic_file, write_safetensors
from hf_iclr.untrusted import as_written_by, check_links, inside, read_json, read_safetensors


WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
EDITS_NAME = "concept_edits.json"
_MARK = {"format": "pt", "hf_iclr": "ConceptEditor"}  # in the weights' header


@dataclass
class ConceptBatch:
    """Edits made at once: for each kind of input the keys (d, n), the factor (r, d), and residuals (o, r) by layer."""

    concepts: dict[str, str]
    keys: dict[str, torch.Tensor] = field(default_factory=dict)
    factors: dict[str, torch.Tensor] = field(default_factory=dict)
    residuals: dict[str, torch.Tensor] = field(default_factory=dict)
    name: str = field(default_factory=lambda: secrets.token_hex(4))  # which no other batch has

    def record(self) -> dict[str, Any]:
        """What of it stands in the file of edits."""
        ranks = {kind: len(factor) for kind, factor in self.factors.items()}
        return {"name": self.name, "concepts": self.concepts, "ranks": ranks}


def name_of(record: Mapping[str, Any]) -> str:
    """A batch's name; those of older files are made of their content."""
    return str(record.get("name") or hashlib.sha256(json.dumps(record).encode()).hexdigest()[:8])


def write_edits(
    folder: str | Path, about: dict[str, Any], state: dict[str, torch.Tensor], known: Collection[str]
) -> Path:
    """
    Write the edits and their LoRA. Batches stand in the LoRA one after the other, so a kill in between leaves a folder
    whose edits are the first of it.

    Raises:
        ValueError: when the folder has a LoRA of something else, or edits that are not among the known names.
    """
    folder = check_links(folder)
    path, weights, common = inside(folder, EDITS_NAME), inside(folder, WEIGHTS_NAME), 0
    if path.exists():
        there = _known_batches(read_json(path), known, folder)
        pairs = zip(there, about["batches"], strict=False)
        common = next((i for i, pair in enumerate(pairs) if len({*map(name_of, pair)}) > 1), len(there))
        if common < len(there):
            _write_json(path, about | {"batches": about["batches"][:common]})
    elif weights.exists() and read_safetensors(weights)[1].get("hf_iclr") != _MARK["hf_iclr"]:
        raise ValueError(f"Expected a new folder or one with edits of concepts, got {folder} with another LoRA.")
    write_safetensors(state, weights, _MARK)
    _write_json(path, about)
    return folder


def check_repository(api: HfApi, repo_id: str, revision: str | None, known: Collection[str]) -> str | None:
    """The last commit of a repository; raises `ValueError` when it has edits that are not among the known names."""
    head = api.model_info(repo_id, revision=revision)
    if EDITS_NAME in [file.rfilename for file in head.siblings or ()]:
        _known_batches(read_json(Path(api.hf_hub_download(repo_id, EDITS_NAME, revision=head.sha))), known, repo_id)
    return head.sha


def _write_json(path: Path, about: dict[str, Any]) -> None:
    with atomic_file(path) as part:
        part.write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")


def _known_batches(about: Any, known: Collection[str], where: str | Path) -> list[dict[str, Any]]:
    with as_written_by("ConceptEditor.save_pretrained", where):
        others = [batch["concepts"] for batch in about["batches"] if name_of(batch) not in known]
        if others:
            raise ValueError(
                f"Expected a new place or the one these edits were saved to, got {where} with other edits, {others}. "
                "Load them by `ConceptEditor.from_pretrained` and make yours there, or choose another place."
            )
        return about["batches"]
