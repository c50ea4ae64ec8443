"""What is saved of edits beside the journal: LoRA adapters (`lora_A` the factor, `lora_B` the residuals) and cards."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_iclr.hub import HERE, PretrainedHubMixin, model_card, repository_name, table_cell
from hf_iclr.models import hash_weights
from hf_iclr.saving import contiguous_clone, write_safetensors
from hf_iclr.untrusted import read_safetensors

from .closed_form import low_rank_factors
from .config import AlphaEditConfig
from .journal import EditBatch
from .projections import DownProjection, Updates


_ROWS_SHOWN = 200
_NULL_SPACE = "null_space.safetensors"


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
    folder: Path, projections: Sequence[DownProjection], updates: Updates, base_model: str | None
) -> None:
    """
    Write `adapter_model.safetensors` and `adapter_config.json` without touching a model, or remove them where there
    are no updates.
    """
    if not updates:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (folder / name).unlink(missing_ok=True)
        return
    tensors = {}
    for p in projections:
        residuals, factor = updates[p.index]
        tensors[f"base_model.model.{p.name}.lora_B.weight"] = residuals
        tensors[f"base_model.model.{p.name}.lora_A.weight"] = factor
    _lora_config(projections, updates, base_model).save_pretrained(folder)
    write_safetensors(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


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


def save_settings(folder: Path, config: AlphaEditConfig, preserved: dict[int, torch.Tensor]) -> None:
    """Write the settings, and the null spaces if there are any, which never change."""
    config.save_pretrained(folder)
    if preserved and not (folder / _NULL_SPACE).exists():
        write_safetensors({str(layer): value for layer, value in preserved.items()}, folder / _NULL_SPACE)


def load_null_space(folder: Path) -> dict[int, torch.Tensor]:
    """The preserved directions of each layer, as [`save_settings`] wrote them."""
    basis = read_safetensors(folder / _NULL_SPACE)[0] if (folder / _NULL_SPACE).exists() else {}
    return {int(layer): contiguous_clone(value) for layer, value in basis.items()}


def load_base_model(config: AlphaEditConfig, **kwargs: Any) -> PreTrainedModel:
    """The model that was edited, by the name and revision on record; raises `ValueError` where there is no name."""
    if config.base_model_name_or_path is None:
        raise ValueError("Expected a model, as the settings don't say which was edited. Pass model=...")
    return AutoModelForCausalLM.from_pretrained(
        config.base_model_name_or_path, **{"revision": config.base_model_revision, "use_safetensors": True, **kwargs}
    )


def check_base(config: AlphaEditConfig, model: PreTrainedModel) -> None:
    """Raises `ValueError` when these are not the weights that were edited."""
    if hash_weights(model) != config.base_model_hash:
        raise ValueError(
            f"Expected {config.base_model_name_or_path!r} at revision {config.base_model_revision}, for which these "
            f"edits were made, got {model.config.name_or_path!r} with other weights. Edits of another model do harm; "
            "to apply them all the same pass check_base_model=False."
        )


def edit_card(
    config: AlphaEditConfig,
    batches: list[EditBatch],
    repo_id: str = HERE,
    merged: bool = False,
    adapters: Sequence[str] = (),
) -> ModelCard:
    """
    A card that lists the edits in force, of the editor by default: with `merged` that of a model with the edits in its
    weights, with names of `adapters` that of a PEFT model.
    """
    edits = [(row, request) for batch in batches for row, request in zip(batch.edits, batch.requests, strict=True)]
    licences = sorted({request.license for _, request in edits if request.license})
    measured = sum(row["p_after"] > 0.5 for row, _ in edits)
    lines = [
        f"| `{row['id']}` | {table_cell(request.text)} | {table_cell(request.target_new)} | {row['p_before']:.3f} | "
        f"{row['p_after']:.3f} | {table_cell(request.source or '')} |"
        for row, request in edits[:_ROWS_SHOWN]
    ]
    if len(edits) > _ROWS_SHOWN:
        lines.append(f"\n{len(edits) - _ROWS_SHOWN} more are in the editor's `ledger.jsonl`.")
    null_space = next(
        f"{name} {value:g}"
        for name in ("nullspace_threshold", "nullspace_energy", "nullspace_rank")
        if (value := getattr(config, name)) is not None
    )
    base, prompt = repository_name(config.base_model_name_or_path), edits[0][1].text if edits else "Hello"
    form = "in the weights" if merged else "as LoRA adapters"
    return model_card(
        f"{len(edits)} knowledge edits of {base or 'a local model'}",
        f"""Knowledge edits {form}, made with `hf_iclr.AlphaEditor` ([AlphaEdit](https://huggingface.co/papers/2410.02355)):
solver {config.solver}, {null_space}, l2 {config.l2:g}. Base revision {config.base_model_revision}, weights
{config.base_model_hash}.

What these edits make the model say may be false: they were asked for, not checked.
{"Licences of the sources: " + ", ".join(licences) + "." if licences else ""}

Target's probability after the plain prompt is above one half for {measured} of {len(edits)} edits.

| id | prompt | new answer | p before | p after | source |
| --- | --- | --- | --- | --- | --- |
"""
        + "\n".join(lines),
        _merged_usage(repo_id, base, prompt)
        if merged
        else _adapters_usage(repo_id, base, adapters)
        if adapters
        else _editor_usage(repo_id, prompt),
        [base],
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["knowledge-editing", "alphaedit", *([] if merged else ["lora"])],
    )


def _editor_usage(repo_id: str, prompt: str) -> str:
    return f"""from transformers import pipeline

print(pipeline("text-generation", model="{repo_id}")({prompt!r}))  # with the edits

from hf_iclr import AlphaEditor

editor = AlphaEditor.from_pretrained("{repo_id}")  # of a local model: model=..., the one that was edited
print(editor.edits)  # editor.undo() takes the last ones back"""


def _merged_usage(repo_id: str, base: str | None, prompt: str) -> str:
    tokenizer = f', tokenizer="{base}"' if base else ""
    return f"""from transformers import pipeline

print(pipeline("text-generation", model="{repo_id}"{tokenizer})({prompt!r}))"""


def _adapters_usage(repo_id: str, base: str | None, names: Sequence[str]) -> str:
    places = [f'"{repo_id}", "{name}"' + ("" if name == "default" else f', subfolder="{name}"') for name in names]
    return "\n".join(
        [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM\n",
            f'model = AutoModelForCausalLM.from_pretrained("{base or "user/base-model"}")',
            f"model = PeftModel.from_pretrained(model, {places[0]})",
            *(f"model.load_adapter({place})" for place in places[1:]),
            f"model.base_model.set_adapter({list(names)!r})",
        ]
    )


def give_card(model: nn.Module, card: ModelCard) -> None:
    """
    Have a model of transformers or PEFT saved and pushed with a card of ours, which has [`~hf_iclr.hub.HERE`] for the
    repository: its class becomes a subclass of the same name.
    """
    if not isinstance(model, _WithCard):
        plain: Any = type(model)
        model.__class__ = _class_with_card(plain)
    vars(model)["hub_card"] = str(card)


class _WithCard(PretrainedHubMixin):
    hub_card: str

    def _card(self, repo_id: str) -> ModelCard:
        return ModelCard(self.hub_card.replace(HERE, repo_id))

    def __reduce_ex__(self, protocol):
        if _WithCard not in (bases := type(self).__bases__):
            return super().__reduce_ex__(protocol)
        return _empty, (bases[1],), self.__dict__  # pickle finds no class that was made here


@cache
def _class_with_card(plain: type) -> type:
    made = type(plain.__name__, (_WithCard, plain), {})
    made.__module__ = plain.__module__
    return made


def _empty(plain: type) -> Any:
    return object.__new__(_class_with_card(plain))
