"""What a callback has to do with the trainer it is in: find it, check it, compute its loss."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .gradients.direction import is_sharded


def check_trainer(trainer: Trainer, callback_class: type) -> None:
    """
    Raise a `ValueError` with the reason if the trainer's set-up hides what scores are made of.

    Args:
        trainer ([`~transformers.Trainer`]):
            A trainer that is about to train.
        callback_class (`type`):
            Of which it may have one.
    """
    mine = [found for found in trainer.callback_handler.callbacks if isinstance(found, callback_class)]
    if len(mine) > 1:
        raise ValueError(
            f"Expected one InRunDataShapleyCallback in a trainer, got {len(mine)}. Measure several validation "
            "sets with one: `InRunDataShapleyCallback(val_dataset, targets={'name': other})`."
        )
    args, model = trainer.args, trainer.model
    if hasattr(trainer, "reward_funcs"):
        raise _refuse(f"{type(trainer).__name__}, which writes its rows as it trains", "SFTTrainer or DPOTrainer")
    if getattr(args, "packing", False) and args.packing_strategy == "wrapped":
        raise _refuse("packing_strategy='wrapped', which cuts texts into pieces", "`packing_strategy='bfd'`")
    if trainer.is_deepspeed_enabled:
        raise _refuse("DeepSpeed, which keeps the gradients that values are checked against to itself", "DDP")
    if args.n_gpu > 1:
        raise _refuse(
            "DataParallel, whose replicas are gone after each forward pass", "`torchrun`, which makes it DDP"
        )
    parallel: Any = getattr(trainer.accelerator, "parallelism_config", None)
    for kind in ("tp", "cp", "sp"):
        if parallel is not None and getattr(parallel, f"{kind}_size", 1) > 1:
            raise _refuse("tensor, context or sequence parallelism, which divides rows among processes", "DDP")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    full = any(".lora_" not in name for name in trained)
    if trainer.is_fsdp_enabled and (full or not is_sharded(model)):
        raise _refuse("FSDP other than version 2 with only LoRA layers trained", "FSDP2 and LoRA, or DDP")
    if args.use_liger_kernel and full:
        raise _refuse("Liger's fused loss with the output layer trained, which is never called", "LoRA")
    if any("lora_magnitude_vector" in name for name in trained):
        raise _refuse("DoRA, whose magnitudes mix all rows' directions", "LoRA without `use_dora`")


def calling_trainer() -> Trainer:
    """The trainer whose event is being handled, which transformers doesn't hand to callbacks."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    raise ValueError("Expected an event of a Trainer. For a loop of your own, use `InRunDataShapleyCallback.attach`.")


def trainer_loss(trainer: Trainer, model: nn.Module, batch: Any) -> torch.Tensor:
    """The trainer's own loss, as it evaluates, without an entry in the metrics that TRL collects."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"Expected batches that name the model's inputs, got {type(batch).__name__} from the trainer's "
            "data_collator. Give a collator that returns a dictionary, or `compute_loss=lambda model, batch: ...`."
        )
    metrics = getattr(trainer, "_metrics", None)
    kept = None if metrics is None else {key: list(value) for key, value in metrics["eval"].items()}
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=_count_labels(trainer, batch))
    if metrics is not None and kept is not None:
        metrics["eval"].clear()
        metrics["eval"].update(kept)
    return loss


def model_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """The loss that a model returns for a batch of its inputs by name."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"Expected batches that name the model's inputs, got {type(batch).__name__}. Give "
            "`compute_loss=lambda model, batch: ...`, the mean loss of a batch's rows."
        )
    return model(**batch).loss


def _count_labels(trainer: Trainer, batch: Mapping[str, Any]) -> torch.Tensor | None:
    """
    What `Trainer.evaluate` gives to the loss as `num_items_in_batch`, but of this process alone: others may have no
    batch.
    """
    labels = batch.get("shift_labels", batch.get("labels"))
    if not isinstance(labels, torch.Tensor) or not (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func):
        return None
    if trainer._loss_shifts_labels and "shift_labels" not in batch:
        labels = labels[..., 1:]
    processes = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
    return labels.ne(-100).sum() * processes  # by which `Trainer.compute_loss` multiplies


def _refuse(what: str, instead: str) -> ValueError:
    return ValueError(f"InRunDataShapleyCallback can't score rows with {what}. Use {instead}.")
