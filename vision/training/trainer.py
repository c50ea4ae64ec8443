"""Trains SAM 2 on images and videos."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModel,
    AutoProcessor,
    PreTrainedModel,
    Sam2Model,
    Sam2VideoModel,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .clip_dataset import ClipDataset, collate_clips
from .clip_forward import predict_clips
from .config import Sam2TrainingConfig
from .loss import sam2_loss


ENCODER_LAYERS = r"vision_encoder\.backbone\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(proj_in|proj_out))"


class Sam2Trainer(Trainer):
    """
    [`~transformers.Trainer`] for SAM 2 (https://huggingface.co/papers/2408.00714): what it adds is the training step
    of the paper, from simulated prompts and corrections to the loss, over all frames of a clip and all parts of the
    model. What it saves is the model as it came, for `from_pretrained`, with nothing of this package in it.

    Logs have the terms of the loss, `focal`, `dice`, `iou_error` and `object`, and `iou`, of the mask that is expected
    to be best, as means over objects in sight and decodings since the last log.

    Args:
        model (`Sam2VideoModel`, `Sam2Model` or `str`):
            `Sam2Model` is trained on single frames. A string is loaded as the former.
        args ([`Sam2TrainingConfig`]):
            How to train.
        train_dataset (`Sequence`, *optional*):
            [`~hf_iclr.vision.formats.AnnotatedVideo`]s (see `read_videos` there), procedural clips,
            or a `datasets.Dataset` with masks as COCO RLE, such as `annotate` returns.
        eval_dataset (`Sequence`, *optional*):
            The same, to tell the loss on.
        processing_class (`ProcessorMixin`, *optional*):
            The processor; loaded where `model` is a string.
        peft_config (`LoraConfig`, *optional*):
            Trains the vision encoder by adapters; its blocks' linear layers, if there are no `target_modules`. The
            other parts are trained as ever, or frozen. Checkpoints keep the adapters apart, `save_model` merges them.
        kwargs:
            Everything else [`~transformers.Trainer`] takes.

    Raises:
        TypeError: if the model is no SAM 2.
        ValueError: if there is no processor, or no video.

    Example:

    ```python
    >>> from hf_iclr import Sam2Trainer, Sam2TrainingConfig
    >>> from hf_iclr.vision.formats import read_videos

    >>> videos = read_videos("DAVIS")
    >>> args = Sam2TrainingConfig("tuned", num_train_epochs=40, bf16=True, frame_checkpointing=True)
    >>> trainer = Sam2Trainer("facebook/sam2.1-hiera-tiny", args, train_dataset=videos)
    >>> trainer.train()
    >>> trainer.save_model()
    ```
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: "PreTrainedModel | str",
        args: Sam2TrainingConfig | None = None,
        train_dataset: Sequence | None = None,
        eval_dataset: Sequence | None = None,
        processing_class: Any = None,
        peft_config: LoraConfig | None = None,
        **kwargs: Any,
    ):
        if isinstance(model, str):
            processing_class = processing_class or AutoProcessor.from_pretrained(model)
            model = AutoModel.from_pretrained(model, dtype=torch.float32)
        if not isinstance(model, Sam2VideoModel | Sam2Model):
            raise TypeError(f"Expected a Sam2VideoModel or a Sam2Model, got {type(model).__name__}.")
        if processing_class is None:
            raise ValueError("Expected the model's processor: processing_class=AutoProcessor.from_pretrained(...).")
        args = args or Sam2TrainingConfig("sam2")
        for part in args.freeze or []:
            if hasattr(model, part):
                getattr(model, part).requires_grad_(False)
        if peft_config is not None:
            peft_config = copy(peft_config)
            peft_config.target_modules = peft_config.target_modules or ENCODER_LAYERS
            model.vision_encoder.requires_grad_(False)
            others = [parameter for parameter in model.parameters() if parameter.requires_grad]
            inject_adapter_in_model(peft_config, model)
            for parameter in others:
                parameter.requires_grad_(True)
        self.processor = processing_class
        self._terms: dict[bool, list[torch.Tensor]] = {True: [], False: []}  # in training and in evaluation
        super().__init__(
            model,
            args,
            data_collator=kwargs.pop("data_collator", collate_clips),
            train_dataset=self._clips(train_dataset, model, args, processing_class),
            eval_dataset=self._clips(eval_dataset, model, args, processing_class),
            # transformers' Trainer looks for a tokenizer in every processor it is given.
            **kwargs,
        )
        self.add_callback(_DrawAnew())

    def compute_loss(
        self, model, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ):
        """The loss of each object, summed over frames and decodings, over the mean number of objects of a process."""
        bare = self.accelerator.unwrap_model(model)
        with _forward_of(bare, partial(self._loss, bare)), self.accelerator.autocast():
            loss = model(inputs["clips"])
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss alone; clips have no labels to compare."""
        with torch.no_grad():
            return self.compute_loss(model, send_to_device(inputs, self.args.device)).detach(), None, None

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As the parent does, but with a learning rate of its own for each layer of the vision encoder."""
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            rates = layer_rates(self.model, self.args)
            by_rate: list[dict[str, Any]] = []
            for group in optimizer.param_groups:
                for rate in sorted({rates[parameter] for parameter in group["params"]}):
                    chosen = [parameter for parameter in group["params"] if rates[parameter] == rate]
                    by_rate.append({**group, "params": chosen, "lr": rate})
            optimizer.param_groups[:] = by_rate
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the parent does, with the terms of the loss."""
        losses = [key for key in logs if key.endswith("loss") and key != "train_loss"]
        if losses and (terms := self._terms[losses[0] == "loss"]):
            prefix = losses[0].removesuffix("loss")
            *sums, objects, visible, count = self.accelerator.reduce(torch.stack(terms).sum(0)).tolist()
            for name, value in zip(("focal", "dice", "iou_error", "iou"), sums, strict=True):
                logs[prefix + name] = value / max(visible, 1)
            logs[f"{prefix}object"] = objects / count
            terms.clear()
        super().log(logs, start_time)

    def _loss(self, model, clips: list[dict[str, Any]]) -> torch.Tensor:
        args, checkpointing = self.args, self.args.frame_checkpointing and torch.is_grad_enabled()
        objects = sum(len(clip["masks"]) for clip in clips)
        loss = torch.zeros((), device=clips[0]["pixel_values"].device)
        terms = torch.zeros(7, device=loss.device)
        for prediction in predict_clips(model, clips, checkpointing):
            weights = (prediction, args.focal_weight, args.dice_weight)
            parts = checkpoint(sam2_loss, *weights, use_reentrant=False) if checkpointing else sam2_loss(*weights)
            loss = loss + args.focal_weight * parts.focal + args.dice_weight * parts.dice
            loss = loss + args.iou_weight * parts.iou + args.object_weight * parts.object
            known = (parts.focal, parts.dice, parts.iou, parts.actual_iou, parts.object, parts.visible)
            terms += torch.stack([*known, parts.visible.new_tensor(len(prediction.truth))]).detach()
        self._terms[model.training].append(terms)
        return loss / self.accelerator.reduce(loss.new_tensor(objects), "mean")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """As the parent does, with the processor, and with adapters merged except in checkpoints."""
        folder = output_dir or self.args.output_dir
        if not Path(folder).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            state_dict = merged_state(self.model)
        super()._save(folder, state_dict)
        if self.args.should_save:
            self.processor.save_pretrained(folder)

    def _clips(self, videos, model, args: Sam2TrainingConfig, processor) -> ClipDataset | None:
        if videos is None or isinstance(videos, ClipDataset):
            return videos
        return ClipDataset(
            videos,
            processor,
            num_frames=1 if isinstance(model, Sam2Model) else args.num_frames,
            max_objects=args.max_objects,
            seed=args.seed if args.data_seed is None else args.data_seed,
            prompts={
                "mask_share": args.mask_share,
                "box_share": args.box_share,
                "max_prompted": args.max_prompted_frames,
                "max_corrected": args.max_corrected_frames,
                "clicks": args.corrective_clicks,
            },
        )


class _DrawAnew(TrainerCallback):
    """Tells the clips the epoch, so that each epoch draws others."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.dataset.epoch.fill_(int(state.epoch))


@contextmanager
def _forward_of(model, forward: Callable) -> Iterator[None]:
    """The model's forward pass is another one for a while; its wrappers call it as they would its own."""
    before = model.__dict__.get("forward")
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


def layer_rates(model, args: Sam2TrainingConfig) -> dict[torch.nn.Parameter, float]:
    """
    The learning rate of each parameter: `vision_learning_rate` in the encoder, there times `layer_decay` for each
    block from the last one down (the patch embedding is one more; position embeddings are not scaled, as in the
    reference); `learning_rate` elsewhere.
    """
    depth = len(model.vision_encoder.backbone.blocks)
    rates = {}
    for name, parameter in model.named_parameters():
        rates[parameter] = args.vision_learning_rate if name.startswith("vision_encoder.") else args.learning_rate
        block = re.match(r"vision_encoder\.backbone\.(?:blocks\.(\d+)|patch_embed)\.", name)
        if block:
            place = depth if block[1] is None else depth - 1 - int(block[1])
            rates[parameter] *= args.layer_decay ** (place + 1)
    return rates


def merged_state(model) -> dict[str, torch.Tensor]:
    """The weights of a model with its adapters merged, under the names it has without them; the model keeps them."""
    state = {name: value for name, value in model.state_dict().items() if ".lora_" not in name}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weight = state[f"{name}.base_layer.weight"]
            for adapter in layer.active_adapters:
                weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
            state[f"{name}.base_layer.weight"] = weight
    return {name.replace(".base_layer.", "."): value for name, value in state.items()}
