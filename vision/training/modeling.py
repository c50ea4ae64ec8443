"""The model as it is trained: clips in, the loss out."""

from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .clip_forward import predict_clips
from .config import Sam2TrainingConfig
from .loss import Sam2Loss, sam2_loss


TERMS = tuple(field.name for field in fields(Sam2Loss))


class Sam2ForTraining(nn.Module):
    """
    A SAM 2 whose forward pass is that of training: clips in, their loss out. It is a module like any other, so DDP,
    FSDP and `torch.compile` wrap it, and no method of the model is replaced. Everything else that it is asked for,
    such as `config` or `save_pretrained`, is the model's; weights without the prefix `model.` go into the model.

    Args:
        model (`Sam2VideoModel` or `Sam2Model`):
            What is trained.
        args ([`Sam2TrainingConfig`]):
            Has the weights of the loss, and whether to checkpoint frames.
    """

    def __init__(self, model: nn.Module, args: Sam2TrainingConfig):
        super().__init__()
        self.model = model
        self.weights = {"focal": args.focal_weight, "dice": args.dice_weight}
        self.weights |= {"iou": args.iou_weight, "object": args.object_weight}
        self.checkpointing = args.frame_checkpointing
        self.register_load_state_dict_pre_hook(_add_prefix)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, clips: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Args:
            clips (`list[dict]`): As [`~hf_iclr.vision.training.predict_clips`] takes them.

        Returns:
            `dict`: `loss`, summed over objects, frames and decodings; `terms` `(7,)`, those of [`Sam2Loss`] and the
            number of decoded objects; and in evaluation `masks`, of each clip `(objects, frames, side, side)` in int8:
            what is predicted last for a frame, and -100 where a mask was given.
        """
        checkpointing = self.checkpointing and torch.is_grad_enabled()
        device = clips[0]["masks"].device
        loss, terms = torch.zeros((), device=device), torch.zeros(len(TERMS) + 1, device=device)
        masks = [] if self.training else [torch.full_like(clip["masks"], -100, dtype=torch.int8) for clip in clips]
        for prediction in predict_clips(self.model, clips, checkpointing):
            weights = (prediction, self.weights["focal"], self.weights["dice"])
            parts = checkpoint(sam2_loss, *weights, use_reentrant=False) if checkpointing else sam2_loss(*weights)
            loss = loss + sum(weight * getattr(parts, name) for name, weight in self.weights.items())
            known = [getattr(parts, name) for name in TERMS]
            terms = terms + torch.stack([*known, parts.visible.new_tensor(len(prediction.truth))]).detach()
            if masks:
                shown = prediction.masks()
                owners = torch.tensor(prediction.clips)
                for number in set(prediction.clips):
                    masks[number][:, prediction.frame] = shown[owners == number].to(torch.int8)
        return {"loss": loss, "terms": terms, "masks": masks}


def _add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Names of the bare model, as it is saved, become those of what wraps it."""
    for name in [name for name in state if name.startswith(prefix)]:
        if not name.startswith(f"{prefix}model."):
            state[f"{prefix}model.{name[len(prefix) :]}"] = state.pop(name)
