"""Which set-ups of a trainer rows can't be scored in, and why."""

from typing import Any

from transformers import Trainer

from .shapley_engine import is_sharded


def check_trainer(trainer: Trainer) -> None:
    """
    Raise a `ValueError` with the reason if the trainer's set-up hides what scores are made of.

    Args:
        trainer ([`~transformers.Trainer`]):
            A trainer that is about to train.
    """
    args, model = trainer.args, trainer.model
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


def _refuse(what: str, instead: str) -> ValueError:
    return ValueError(f"InRunDataShapleyCallback can't score rows with {what}. Use {instead}.")
