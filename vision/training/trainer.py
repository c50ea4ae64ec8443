"""Trains SAM 2 on images and videos."""

import re
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch.utils.data import IterableDataset
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

from ..evaluation.j_and_f import j_and_f
from .clip_dataset import ClipDataset, ClipStream, collate_clips
from .config import Sam2TrainingConfig
from .modeling import Sam2ForTraining


ENCODER_LAYERS = r"vision_encoder\.backbone\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(proj_in|proj_out))"


class Sam2Trainer(Trainer):
    """
    [`~transformers.Trainer`] for SAM 2 (https://huggingface.co/papers/2408.00714): what it adds is the training step
    of the paper, from simulated prompts and corrections to the loss, over all frames of a clip and all parts of the
    model. What it saves is the model as it came, for `from_pretrained`, with nothing of this package in it.

    Logs have the terms of the loss, `focal`, `dice`, `iou_error` and `object`, and `iou`, of the mask that is expected
    to be best, as means over objects in sight and decodings since the last log; and `learning_rate`, that of all but
    the vision encoder. Evaluations also have `j`, `f` and `j_and_f` of what is predicted last for each frame, at the
    model's resolution, as means over the objects of clips that are prompted as in training.

    Args:
        model (`Sam2VideoModel`, `Sam2Model` or `str`):
            `Sam2Model` is trained on single frames. A string is loaded as the former.
        args ([`Sam2TrainingConfig`]):
            How to train.
        train_dataset (`Sequence`, *optional*):
            [`~hf_iclr.vision.formats.AnnotatedVideo`]s (see `read_videos` there), procedural clips,
            or a `datasets.Dataset` with masks as COCO RLE, such as `annotate` returns. An `IterableDataset` of these
            is read as it comes; pass `max_steps` with it.
        eval_dataset (`Sequence` or `dict[str, Sequence]`, *optional*):
            The same, or several by name, each with metrics of its own.
        processing_class (`ProcessorMixin`, *optional*):
            The processor; loaded where `model` is a string.
        peft_config (`LoraConfig`, *optional*):
            Trains the vision encoder by adapters; its blocks' linear layers, if there are no `target_modules`. The
            other parts are trained as ever, or frozen. Checkpoints keep the adapters apart, `save_model` merges them.
        kwargs:
            Everything else [`~transformers.Trainer`] takes. `compute_metrics` gets masks as `predictions` and
            `label_ids`, of shape `(clips, frames, objects, side, side)`: 0 or 1, and -100 where there is no such
            frame or object, or its mask was given.

    Raises:
        TypeError: if the model is no SAM 2, or the videos are no list of videos.
        ValueError: if there is no processor, or no video.

    Example:

    ```python
    >>> from hf_iclr import Sam2Trainer, Sam2TrainingConfig
    >>> from hf_iclr.vision.formats import read_videos

    >>> videos = read_videos("DAVIS")
    >>> args = Sam2TrainingConfig("tuned", bf16=True, frame_checkpointing=True)
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
        self._augment = args.augment
        self._quality: list[list[float]] = []  # of each clip, sums of J and F over objects, and how many
        self._drawing = {
            "processor": processing_class,
            "num_frames": 1 if isinstance(model, Sam2Model) else args.num_frames,
            "max_objects": args.max_objects,
            "seed": args.seed if args.data_seed is None else args.data_seed,
            "prompts": {
                "mask_share": args.mask_share,
                "box_share": args.box_share,
                "max_prompted": args.max_prompted_frames,
                "max_corrected": args.max_corrected_frames,
                "clicks": args.corrective_clicks,
            },
        }
        super().__init__(
            Sam2ForTraining(model, args),
            args,
            data_collator=kwargs.pop("data_collator", collate_clips),
            train_dataset=self._clips(train_dataset, training=True),
            eval_dataset=self._clips(eval_dataset),
            # transformers' Trainer looks for a tokenizer in every processor it is given.
            **kwargs,
        )
        self.add_callback(_DrawAnew())

    def compute_loss(
        self, model, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ):
        """The loss of each object, summed over frames and decodings, over the mean number of objects of a process."""
        outputs = model(inputs["clips"])
        self._terms[model.training].append(outputs["terms"])
        objects = outputs["loss"].new_tensor(sum(len(clip["masks"]) for clip in inputs["clips"]))
        loss = outputs["loss"] / self.accelerator.reduce(objects, "mean")
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """
        The loss, and for `compute_metrics` masks `(clips, frames, objects, side, side)` in int8, predicted and true:
        0 or 1, and -100 where a clip has no such frame or object or a mask was given.
        """
        inputs = send_to_device(inputs, self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        truths = []
        for shown, clip in zip(outputs["masks"], inputs["clips"], strict=True):
            predicted = shown[0, :, 0, 0] >= 0
            truths.append(torch.where(predicted[:, None, None], clip["masks"].to(shown.dtype), shown))
            pairs = ((shown[:, predicted] > 0).cpu().numpy(), (truths[-1][:, predicted] > 0).cpu().numpy())
            self._quality.append([j_and_f(*map(list, pairs))[name] * len(shown) for name in ("j", "f")] + [len(shown)])
        if prediction_loss_only:
            return loss.detach(), None, None
        return loss.detach(), self._pad(outputs["masks"]), self._pad(truths)

    def _pad(self, masks: list[torch.Tensor]) -> torch.Tensor:
        """Masks `(objects, frames, side, side)` of clips as one tensor `(clips, frames, objects, side, side)`."""
        frames, objects = max(mask.shape[1] for mask in masks), self.args.max_objects
        padded = masks[0].new_full((len(masks), frames, objects, *masks[0].shape[2:]), -100)
        for clip, mask in zip(padded, masks, strict=True):
            clip[: mask.shape[1], : mask.shape[0]] = mask.transpose(0, 1)
        return padded

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any):
        """As the parent does, with the terms of the loss, and J, F and J&F of predicted masks, means over objects."""
        self._terms[False].clear()
        self._quality.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._quality:
            j, f, objects = self.accelerator.reduce(torch.tensor(self._quality).sum(0).to(self.args.device)).tolist()
            quality = {"j": j / objects, "f": f / objects, "j_and_f": (j + f) / 2 / objects}
            known = {**self._means(False), **quality}
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in known.items()})
        return output

    def get_eval_dataloader(self, eval_dataset: Any = None):
        """As the parent does, of videos too."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._clips(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any):
        """As the parent does, of videos too."""
        return super().get_test_dataloader(self._clips(test_dataset))

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As the parent does, but with a learning rate of its own for each layer of the vision encoder."""
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            rates = layer_rates(self._bare(), self.args)
            by_rate: list[dict[str, Any]] = []
            for group in optimizer.param_groups:
                for rate in sorted({rates[parameter] for parameter in group["params"]}):
                    chosen = [parameter for parameter in group["params"] if rates[parameter] == rate]
                    by_rate.append({**group, "params": chosen, "lr": rate})
            optimizer.param_groups[:] = by_rate
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the parent does, with the terms of the loss, and the learning rate of all but the vision encoder."""
        if "loss" in logs and self._terms[True]:
            logs.update(self._means(True))
        if "learning_rate" in logs:
            rates = {group.get("initial_lr"): group["lr"] for group in self.optimizer.param_groups}
            logs["learning_rate"] = rates.get(self.args.learning_rate, logs["learning_rate"])
        super().log(logs, start_time)

    def _means(self, training: bool) -> dict[str, float]:
        """The terms of the loss since they were asked for last."""
        sums = self.accelerator.reduce(torch.stack(self._terms[training]).sum(0)).tolist()
        self._terms[training].clear()
        focal, dice, iou_error, entropy, iou, visible, count = sums
        means = {"focal": focal, "dice": dice, "iou_error": iou_error, "iou": iou}
        return {**{name: value / max(visible, 1) for name, value in means.items()}, "object": entropy / count}

    def _bare(self):
        """The model as it came."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False).model

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """The model as it came and the processor; adapters are merged except in checkpoints."""
        folder = output_dir or self.args.output_dir
        whole: Any = self.model  # type: ignore[has-type]
        self.model = self._bare()
        if state_dict is not None:  # gathered from the shards of FSDP
            state_dict = {name.removeprefix("model."): value for name, value in state_dict.items()}
        elif not Path(folder).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            state_dict = merged_state(self.model)
        try:
            super()._save(folder, state_dict)
        finally:
            self.model = whole
        if self.args.should_save:
            self.processor.save_pretrained(folder)

    def _clips(self, videos: Any, training: bool = False) -> Any:
        """Videos as clips; a dictionary of several sets, to evaluate on, stays one."""
        if videos is None or isinstance(videos, ClipDataset | ClipStream):
            return videos
        if isinstance(videos, Mapping) and not training:
            return {name: self._clips(own) for name, own in videos.items()}
        stream = isinstance(videos, datasets.IterableDataset | IterableDataset)
        augment = training and self._augment
        return (ClipStream if stream else ClipDataset)(videos, augment=augment, **self._drawing)


class _DrawAnew(TrainerCallback):
    """Tells the clips the epoch, so that each epoch draws others."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        dataset = train_dataloader.dataset
        while not hasattr(dataset, "epoch") or not isinstance(dataset.epoch, torch.Tensor):
            dataset = dataset.dataset  # of what shares a stream out to processes
        dataset.epoch.fill_(int(state.epoch))


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
