"""Two other defences of an alignment, to compare with: a proximal term and the projection of SafeLoRA."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProximalCallback(TrainerCallback):
    r"""
    Adds the proximal term \\( \frac{\rho}{2} \lVert w - w_0 \rVert^2 \\), which keeps the trained weights near those
    at the start of the training. Its gradient \\( \rho (w - w_0) \\) is added just before each optimizer step, after
    the clipping, so the clipping and the logged loss see the data only.

    It is one half of [Lisa](https://huggingface.co/papers/2405.18641), not the method: Lisa also goes to and fro
    between alignment data and the user's data and takes the weights at the last switch as \\( w_0 \\).

    Args:
        rho (`float`, *optional*, defaults to `1.0`):
            Strength of the term, "RHO=1" in the scripts of Lisa's authors. With Adam only its size beside the gradient
            of the data counts.

    Raises:
        ValueError: if `rho` is not positive; when training begins, if it is resumed, as the weights at its start are
            gone then, or if gradients are scaled (fp16).
    """

    def __init__(self, rho: float = 1.0) -> None:
        if not 0 < rho < math.inf:
            raise ValueError(f"Expected `rho` to be a positive number, got {rho}.")
        self.rho = rho
        self._start: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step:
            raise ValueError(
                f"The proximal term pulls towards the weights at the start of the training, which a run resumed at "
                f"step {state.global_step} no longer has. Type `resume_from_checkpoint=False`."
            )
        if args.fp16:
            raise ValueError("The proximal term is added to gradients that fp16 has scaled. Type `bf16=True`.")
        parameters = [parameter for parameter in kwargs["model"].parameters() if parameter.requires_grad]
        self._start = [(parameter, parameter.detach().clone()) for parameter in parameters]

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for parameter, start in self._start:
            if parameter.grad is not None:
                parameter.grad.add_((parameter - start).to(parameter.grad.dtype), alpha=self.rho)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = []


@torch.no_grad()
def project_safe_lora(
    peft_model: PeftModel,
    aligned: PreTrainedModel | Mapping[str, torch.Tensor],
    base: PreTrainedModel | Mapping[str, torch.Tensor],
    *,
    threshold: float | None = None,
    num_layers: int | None = None,
) -> pd.DataFrame:
    r"""
    Project a trained LoRA adapter onto the directions in which its model was aligned
    ([SafeLoRA](https://huggingface.co/papers/2405.16833)). For each layer, with \\( V = W_{aligned} - W_{base} \\) and
    \\( C = V V^T / \lVert V \rVert_F \\), the update \\( B A \\) becomes \\( C B A \\) where their cosine similarity
    is low. B is replaced in place, so the adapter stays a LoRA of the same rank and is saved, loaded and merged as
    before.

    C is the paper's cheap stand-in for the exact projection. It is divided by the norm of V and not by its square, so
    it also scales the update: the smaller the difference made by the alignment, the less is left.

    Args:
        peft_model ([`~peft.PeftModel`]):
            Aligned model with a trained LoRA adapter; its active adapter is edited.
        aligned ([`~transformers.PreTrainedModel`] or `dict[str, torch.Tensor]`):
            The aligned model, or its state dict. An alignment that is itself a LoRA must be merged.
        base ([`~transformers.PreTrainedModel`] or `dict[str, torch.Tensor]`):
            The model before its alignment, or its state dict.
        threshold (`float`, *optional*):
            Layers with a cosine similarity below this are projected. Give this or `num_layers`.
        num_layers (`int`, *optional*):
            This many layers, those of the lowest similarity, are projected, each once.

    Returns:
        `pandas.DataFrame`: a row for each layer of the adapter with `layer`, `similarity` and `projected`. The
        similarity is missing where the alignment or the adapter did not change the layer; such a layer is left alone.

    Raises:
        TypeError: if the model holds no LoRA adapter.
        ValueError: if not exactly one of `threshold` and `num_layers` is given or it is out of range, weights are
            missing or of another shape, alignment and base are equal, or the adapter is of a kind that has no update
            \\( B A \\) of a linear layer.
    """
    if not isinstance(peft_model, PeftModel):
        raise TypeError(f"Expected a `PeftModel` with a LoRA adapter, got {type(peft_model).__name__}.")
    if (threshold is None) == (num_layers is None):
        raise ValueError("Expected one of `threshold` and `num_layers`. Type for instance `threshold=0.5`.")
    if threshold is not None and not -1 <= threshold <= 1:
        raise ValueError(f"Expected a cosine similarity between -1 and 1 as `threshold`, got {threshold}.")
    adapter = peft_model.active_adapter
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.r
    }
    if not layers:
        raise TypeError(f"Expected a LoRA adapter, the active adapter {adapter!r} has no LoRA layer.")
    if num_layers is not None and not 0 <= num_layers <= len(layers):
        raise ValueError(f"Expected `num_layers` between 0 and the adapter's {len(layers)}, got {num_layers}.")
    states = {
        title: model if isinstance(model, Mapping) else model.state_dict()
        for title, model in (("aligned", aligned), ("base", base))
    }

    similarities, projections = [], []
    for name, module in tqdm(layers.items(), desc="Projecting onto the alignment", leave=False):
        difference = _alignment(name, module, adapter, states)
        down, up = module.lora_A[adapter].weight.float(), module.lora_B[adapter].weight.float()
        norm = torch.linalg.matrix_norm(difference)
        projected = difference @ (difference.T @ up) / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        similarities.append(_update_similarity(projected, up, down))
        projections.append(projected if norm > 0 else None)
    if all(projected is None for projected in projections):
        raise ValueError(
            "Expected an aligned model that differs from its base in the layers of the adapter, they are equal there: "
            "no direction of the alignment is known. Type the model before its alignment as `base`."
        )
    table = pd.DataFrame({"layer": list(layers), "similarity": similarities})
    if threshold is not None:
        table["projected"] = table["similarity"] < threshold
    else:
        table["projected"] = table["similarity"].rank(method="first") <= num_layers
    for module, projected, chosen in zip(layers.values(), projections, table["projected"], strict=True):
        if chosen:
            module.lora_B[adapter].weight.copy_(projected)
    return table


def _alignment(name, module, adapter, states) -> torch.Tensor:
    """V of a layer, shape (out_features, in_features), in float32."""
    if adapter not in module.lora_A or not isinstance(module.lora_A[adapter], torch.nn.Linear):
        raise ValueError(f"Expected LoRA on linear layers, {name} is another. Leave it out of `target_modules`.")
    if module.use_dora[adapter]:
        raise ValueError(
            f"Expected an update B A, {name} has one of DoRA, which also rescales. Type `use_dora=False`."
        )
    key, shape = f"{name}.weight", (module.out_features, module.in_features)
    shape = shape[::-1] if module.fan_in_fan_out else shape
    for title, state in states.items():
        if key not in state:
            raise ValueError(
                f"Expected {key!r} in the weights of `{title}`, they have for instance {next(iter(state), None)!r}. "
                "Type a model without adapters; `model.merge_and_unload()` makes one."
            )
        if state[key].shape != shape:
            raise ValueError(
                f"Expected {key!r} of shape {shape} in `{title}`, got {tuple(state[key].shape)}. The models must "
                "have the same architecture."
            )
    device = module.lora_B[adapter].weight.device
    difference = states["aligned"][key].to(device).float() - states["base"][key].to(device).float()
    return difference.T if module.fan_in_fan_out else difference


def _update_similarity(projected, up, down) -> float:
    """Cosine between \\( C B A \\) and \\( B A \\), from the Gram matrix of A: neither product is built."""
    gram = down @ down.T
    dot, length, projected_length = (
        ((left.T @ right) * gram).sum() for left, right in ((projected, up), (up, up), (projected, projected))
    )
    norm = (length.clamp(min=0) * projected_length.clamp(min=0)).sqrt()
    return float(dot / norm) if norm > 0 else math.nan
