"""Edits as a PEFT LoRA adapter: r = alpha, `lora_A` the factor and `lora_B` the residuals."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from hf_iclr.saving import write_safetensors

from .closed_form import low_rank_factors
from .projections import DownProjection


Updates = dict[int, tuple[torch.Tensor, torch.Tensor]]  # layer -> residuals (o, r) and factor (r, d)


def concatenate_updates(updates: Sequence[Updates], rank: int | None = None) -> Updates:
    """
    The sum of some updates as one of them: ranks add, up to what a full matrix has.

    Args:
        updates (`list[dict]`):
            For each layer residuals of shape `(o, r)` and a factor of shape `(r, d)`.
        rank (`int`, *optional*):
            Compress the sum to this rank by singular value decomposition.

    Returns:
        `dict`: the same for the sum.
    """
    total: Updates = {}
    for layer in updates[0]:
        residuals = torch.cat([update[layer][0] for update in updates], 1)
        factor = torch.cat([update[layer][1] for update in updates], 0)
        if residuals.shape[1] > min(rank or len(residuals), len(residuals), factor.shape[1]):
            residuals, factor = (part.float() for part in low_rank_factors(residuals.double() @ factor.double(), rank))
        total[layer] = residuals, factor
    return total


def lora_config(projections: Sequence[DownProjection], updates: Updates, base_model: str | None) -> LoraConfig:
    """
    The adapter's configuration.

    Args:
        projections (`list[DownProjection]`):
            The edited layers.
        updates (`dict`):
            Residuals and factor of each.
        base_model (`str`, *optional*):
            Repository or folder of the unedited model.

    Returns:
        `peft.LoraConfig`
    """
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


def add_adapters(
    model: PreTrainedModel, projections: Sequence[DownProjection], updates: dict[str, Updates], base_model: str | None
) -> PeftModel:
    """
    Put edits on a model as adapters, all of them active.

    Args:
        model (`~transformers.PreTrainedModel`):
            The unedited model.
        projections (`list[DownProjection]`):
            The edited layers.
        updates (`dict[str, dict]`):
            For each adapter's name the updates of each layer.
        base_model (`str`, *optional*):
            Repository or folder of the model.

    Returns:
        `peft.PeftModel`
    """
    peft_model: PeftModel | None = None
    for name, update in updates.items():
        config = lora_config(projections, update, base_model)
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


def save_adapter(
    folder: Path, projections: Sequence[DownProjection], updates: Updates, base_model: str | None
) -> None:
    """
    Write `adapter_model.safetensors` and `adapter_config.json` without touching a model.

    Args:
        folder (`Path`):
            Where to.
        projections (`list[DownProjection]`):
            The edited layers.
        updates (`dict`):
            Residuals and factor of each.
        base_model (`str`, *optional*):
            Repository or folder of the unedited model.
    """
    tensors = {}
    for p in projections:
        residuals, factor = updates[p.index]
        tensors[f"base_model.model.{p.name}.lora_B.weight"] = residuals
        tensors[f"base_model.model.{p.name}.lora_A.weight"] = factor
    lora_config(projections, updates, base_model).save_pretrained(folder)
    write_safetensors(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
