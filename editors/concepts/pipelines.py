"""Where a text-to-image pipeline reads its text: the linear layers of its denoiser, and what they are given."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_iclr.extras import require

from ..alpha_edit.closed_form import count_preserved, project_out


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# For each class of denoiser the layers that read every token's state, and those that read the pooled state.
TEXT_LAYERS = {
    "UNet2DConditionModel": (r".*\.attn2\.to_[kv]", r"$^"),
    "FluxTransformer2DModel": (r"context_embedder", r"time_text_embed\.text_embedder\.linear_1"),
    "SD3Transformer2DModel": (r"context_embedder", r"time_text_embed\.text_embedder\.linear_1"),
    "AuraFlowTransformer2DModel": (r"context_embedder", r"$^"),
    "PixArtTransformer2DModel": (r"caption_projection\.linear_1", r"$^"),
    "SanaTransformer2DModel": (r"caption_projection\.linear_1", r"$^"),
}
BATCH_SIZE = 16
ROUNDING = 1e-6  # of float32 text encoders: singular values that are smaller, relative to the largest, are noise


def denoiser_name(pipeline: "DiffusionPipeline") -> str:
    """
    Name of the component that is edited, `"unet"` or `"transformer"`.

    Raises:
        ImportError: without diffusers.
        TypeError: when it is no pipeline of diffusers.
        ValueError: when it has neither, or encodes no prompts.
    """
    require("diffusion", "ConceptEditor")
    from diffusers import DiffusionPipeline

    if not isinstance(pipeline, DiffusionPipeline):
        raise TypeError(
            f"Expected a pipeline, got {type(pipeline).__name__}. Load it: `DiffusionPipeline.from_pretrained(name)`."
        )
    name = next((name for name in ("unet", "transformer") if getattr(pipeline, name, None) is not None), None)
    if name is None or not hasattr(pipeline, "encode_prompt"):
        raise ValueError(
            "Expected a text-to-image pipeline with `encode_prompt` and a `unet` or `transformer`, got "
            f"{type(pipeline).__name__} of {sorted(pipeline.components)}."
        )
    return name


def find_text_layers(denoiser: nn.Module, modules: str | None = None) -> dict[str, dict[str, nn.Linear]]:
    """
    The layers of a denoiser that read text, by name: under `"states"` those that read every token's state, under
    `"pooled"`, where there are any, those that read the pooled state. `modules` is a regular expression for the full
    names of other layers than those of `TEXT_LAYERS`; each must be given the states that `encode_prompt` returns.

    Raises:
        ValueError: when the class is unknown and no expression is given, nothing matches, a weight is quantised or
            offloaded, or the states are projected before they reach the layers.
    """
    kind = type(denoiser).__name__
    if modules is None and kind not in TEXT_LAYERS:
        raise ValueError(
            f"Expected one of {sorted(TEXT_LAYERS)}, got {kind}. Name the linear layers that read the text encoder's "
            "states: `ConceptEditor(..., modules=r'context_embedder')`."
        )
    if getattr(denoiser, "encoder_hid_proj", None) is not None:
        raise ValueError(
            f"Expected attention layers that read the text encoder's states, got a {kind} whose `encoder_hid_proj` "
            "projects them first. Unload the image-prompt adapter, or use a pipeline without one."
        )
    patterns = (modules, r"$^") if modules is not None else TEXT_LAYERS[kind]
    found: dict[str, dict[str, nn.Linear]] = {}
    for key, pattern in zip(("states", "pooled"), patterns, strict=True):
        found[key] = {
            name: module
            for name, module in denoiser.named_modules()
            if isinstance(module, nn.Linear) and re.fullmatch(pattern, name)
        }
    if not found["states"]:
        raise ValueError(
            f"Expected linear layers named {patterns[0]!r} in {kind}, got none. If a LoRA is loaded, take it out or "
            "merge it first: `pipeline.unload_lora_weights()`."
        )
    found = {key: layers for key, layers in found.items() if layers}
    for name, module in [entry for layers in found.values() for entry in layers.items()]:
        if module.weight.is_meta or not module.weight.is_floating_point():
            raise ValueError(
                f"Expected floating-point weights in memory, got {name} of {module.weight.dtype} on "
                f"{module.weight.device}. Load the pipeline without quantisation or sequential offloading, edit it, "
                "and load the saved LoRA into the other one."
            )
    return found


@torch.no_grad()
def encode_prompts(
    pipeline: "DiffusionPipeline",
    prompts: Sequence[str],
    options: Mapping[str, Any],
    layers: Mapping[str, Mapping[str, nn.Linear]],
) -> dict[str, torch.Tensor]:
    """
    What a denoiser is given for prompts, float64 on the CPU: `"states"` of shape `(prompts, tokens, d)` and, where
    there is one, `"pooled"` of shape `(prompts, 1, p)`. `options` are further arguments of `encode_prompt`; the others
    are those that calling the pipeline gives it by default, such as Sana's instruction. `layers` are what reads it,
    see [`find_text_layers`].

    Raises:
        ValueError: when a layer reads another number of inputs, or a state is not finite.
    """
    parameters = inspect.signature(pipeline.encode_prompt).parameters
    call = inspect.signature(pipeline.__call__).parameters
    if not isinstance(options, Mapping) or not {*options} <= {*parameters} - {"prompt"}:
        raise ValueError(f"Expected encode_options among {sorted(parameters)} but the prompt, got {options!r:.80}.")
    # Defaults of `encode_prompt` itself are others in Sana and PixArt.
    known = {name: given.default for name, given in call.items() if given.default is not given.empty}
    known.pop("prompt", None)
    known |= {"device": pipeline._execution_device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    known = {name: value for name, value in known.items() if name in parameters}
    for name, parameter in parameters.items():  # the second and third encoders' prompts
        if parameter.default is inspect.Parameter.empty and re.fullmatch(r"prompt_\d", name):
            known[name] = None
    parts: dict[str, list[torch.Tensor]] = {"states": [], "pooled": []}
    for start in range(0, len(prompts), BATCH_SIZE):
        outputs = pipeline.encode_prompt(prompt=list(prompts[start : start + BATCH_SIZE]), **{**known, **options})
        tensors = [output for output in outputs if isinstance(output, torch.Tensor)]
        for name, ndim in (("states", 3), ("pooled", 2)):
            first = next((tensor for tensor in tensors if tensor.ndim == ndim), None)
            if first is not None:
                parts[name].append(first.cpu().double().reshape(len(first), -1, first.shape[-1]))
    encoded = {name: torch.cat(part) for name, part in parts.items() if part}
    for kind, readers in layers.items():
        for name, layer in readers.items():
            size = encoded[kind].shape[-1] if kind in encoded else None
            if size != layer.in_features:
                raise ValueError(
                    f"Expected {name} to read the text encoder's {kind} of {size} numbers, but it reads "
                    f"{layer.in_features}. Name other layers with `modules`."
                )
            if not encoded[kind].isfinite().all():
                raise ValueError(
                    f"Expected finite {kind} of {list(prompts)}, got NaN or infinity. Load the text encoder in "
                    "float32."
                )
    return encoded


def guidance_options(pipeline: "DiffusionPipeline") -> dict[str, Any]:
    """Arguments of `encode_prompt` that differ for the prompt which guidance leads away from."""
    name = "complex_human_instruction"
    return {name: None} if name in inspect.signature(pipeline.encode_prompt).parameters else {}


def preserved_directions(
    retained: torch.Tensor,
    fixed: torch.Tensor,
    threshold: float | None = None,
    energy: float | None = None,
    rank: int | None = None,
) -> torch.Tensor:
    """
    Directions that an edit must not touch, orthonormal columns of shape `(d, m)`: the main ones of the retained states
    of shape `(d, n)`, n may be 0, and all of the fixed ones of shape `(d, k)`. A rule, see [`null_space_rule`],
    is of the eigenvalues of the mean of x x^T over retained states x.
    """
    main = retained[:, :0]
    if retained.shape[1]:
        left, values, _ = torch.linalg.svd(retained / retained.shape[1] ** 0.5, full_matrices=False)
        count = count_preserved(values.square(), threshold, energy, rank)
        main = left[:, : min(count, int((values > ROUNDING * values[0]).sum()))]
    left, values, _ = torch.linalg.svd(project_out(fixed, main), full_matrices=False)
    rest = left[:, values > ROUNDING * fixed.norm()]
    return torch.linalg.qr(torch.cat([main, project_out(rest, main)], 1))[0]
