"""What [`DeepSafetySFTTrainer`] makes of its arguments: config, triplets, adapter, reference, tokens of a window."""

import copy
import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset, List, Value, load_dataset
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from trl import SFTTrainer
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer import add_fused_lm_head

from hf_iclr.models import share_storage

from ..safety_audit.checks import changes_base
from .config import DeepSafetySFTConfig
from .reference_log_probs import CONSTRAIN, check_answer_labels


logger = logging.getLogger(__name__)

_OWN_COPY = "hf_iclr_keeps_reference"  # of a model whose adapter "ref" a trainer of ours made


def as_config(args: TrainingArguments | None, model: Any) -> DeepSafetySFTConfig:
    if isinstance(args, DeepSafetySFTConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else model.config.name_or_path or ""
        return DeepSafetySFTConfig(f"{name.split('/')[-1] or 'model'}-DeepSafetySFT")
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"Expected `args` as a `DeepSafetySFTConfig` or other `TrainingArguments`, got {args!r:.80}.")
    values = {item.name: getattr(args, item.name) for item in fields(args) if item.init}
    own = {name: values.pop(name) for name in values.keys() - {item.name for item in fields(DeepSafetySFTConfig)}}
    logger.warning(
        "The arguments are a %s: beta1 of Adam is %s and the warm-up %s as they say; the paper's are 0.5 and 10 "
        "steps. Use `DeepSafetySFTConfig` for those.",
        type(args).__name__,
        args.adam_beta1,
        args.warmup_steps,
    )
    config = DeepSafetySFTConfig(**values)
    for name, value in own.items():  # of a subclass, for the callbacks that came with it
        setattr(config, name, value)
    return config


def disable_dropout(model: torch.nn.Module) -> None:
    """
    No dropout in training, also where a layer keeps its rate alone (OPT) or reads it from the config (Falcon). The
    model's own config, which is saved, keeps its rates.
    """
    configs: dict[int, Any] = {}
    for module in model.modules():
        owners, config = [vars(module)], vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and not isinstance(module, (PreTrainedModel, PeftModel)):
            module.config = configs.setdefault(id(config), copy.copy(config))
            owners.append(vars(module.config))
        for owner in owners:
            owner.update({name: 0.0 for name, rate in owner.items() if "drop" in name and isinstance(rate, float)})
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0


def check_schedule(beta_schedule: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Raises `TypeError` where it is no function, `ValueError` where a strength isn't 0 or a positive number."""
    if not callable(beta_schedule):
        raise TypeError(f"Expected `beta_schedule` as a function of positions, got {beta_schedule!r:.80}.")
    positions = torch.arange(65)[None]
    betas = beta_schedule(positions)
    if not isinstance(betas, torch.Tensor) or betas.shape != positions.shape:
        got = f"shape {tuple(betas.shape)}" if isinstance(betas, torch.Tensor) else f"{betas!r:.80}"
        raise ValueError(f"Expected `beta_schedule` to give a tensor of one strength a position, (1, 65), got {got}.")
    wrong = ~(torch.isfinite(betas) & (betas >= 0))
    if wrong.any():
        position = int(wrong.nonzero()[0, 1])
        raise ValueError(
            f"Expected `beta_schedule` to give strengths of 0 or more, at position {position} it gives "
            f"{betas[0, position].item()}."
        )


def load_triplets(name: str) -> Dataset:
    suffix = Path(name).suffix.lstrip(".")
    builder = {"jsonl": "json"}.get(suffix, suffix)
    if builder in ("json", "csv", "parquet"):
        return load_dataset(builder, data_files=name, split="train")
    return load_dataset(name, split="train")


def check_reference_model(ref_model: Any, model: Any, args: DeepSafetySFTConfig) -> None:
    """Raises where `ref_model` can't be kept frozen beside the model."""
    if ref_model is None:
        return
    if not isinstance(ref_model, (PreTrainedModel, PeftModel)):
        raise TypeError(
            f"Expected `ref_model` to be a model, got {type(ref_model).__name__}. Type "
            "`ref_model=AutoModelForCausalLM.from_pretrained(...)`."
        )
    if not isinstance(model, str) and share_storage(model, ref_model):
        raise ValueError(
            "Expected `ref_model` to be another model than the one to train, got one with the very same weights, also "
            "where adapters were put into it: it would be frozen. Leave it out: the model as it is given is the "
            "reference, and the one under an adapter is found by turning that off."
        )
    if args.reference not in ("auto", "frozen"):
        raise ValueError(
            f"Expected `reference='frozen'` with a `ref_model`, which is kept beside the model, got "
            f"{args.reference!r}. Leave one of them out."
        )


def choose_reference(trainer: Any, ref_model: Any) -> str:
    """What `reference="auto"` is for this trainer; raises where the reference asked for can't be had."""
    parallelism = trainer.accelerator.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "The constrained loss cannot be right here: context and sequence parallelism cut answers across "
            "devices. Turn them off in the accelerate config, or set `constrain='none'`."
        )
    if ref_model is not None:
        size, expected = (
            ref_model.get_input_embeddings().weight.shape[0],
            trainer.model.get_input_embeddings().weight.shape[0],
        )
        if size != expected:
            raise ValueError(
                f"Expected a reference with the vocabulary of the model ({expected} rows of embeddings), got one "
                f"with {size}. Pass the model the training starts from, or leave `ref_model` out."
            )
        return "frozen"
    evaluation = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    every = [rows for rows in (trainer.train_dataset, *evaluation.values()) if rows is not None]
    once = (
        isinstance(trainer, SFTTrainer)
        and all(isinstance(rows, Dataset) and rows.format["type"] != "custom" for rows in every)
        and not trainer._is_vision_dataset
        and not trainer.is_fsdp_enabled
    )
    reference, adapted = trainer.args.reference, isinstance(trainer.model, PeftModel)
    changed = changes_base(trainer.model) if adapted else None
    if reference == "auto":
        reference = "frozen" if changed else "adapter" if adapted else "precompute" if once else "frozen"
    if changed and reference != "frozen":
        raise ValueError(
            f"`reference={reference!r}` turns the adapter off, but {changed} changes the weights under it. Set "
            '`reference="frozen"`.'
        )
    if reference in ("precompute", "window") and not once:
        raise ValueError(
            f"`reference={reference!r}` reads the data once before training, which streamed data (also for "
            "evaluation), `with_transform`, images, FSDP and trainers other than TRL's do not allow. Set "
            '`reference="adapter"` with a `peft_config`, or `reference="frozen"`.'
        )
    if reference == "adapter" and not adapted:
        raise ValueError(
            '`reference="adapter"` turns the adapter off, but the model has none. Pass a `peft_config`, or set '
            '`reference="precompute"`.'
        )
    return reference


def check_columns(rows: Any, args: Any) -> None:
    """Raises `ValueError` where a column that is trained on has no text or messages, or `constrain` no flags."""
    if isinstance(rows, IterableDataset):
        first: dict[str, Any] = next(iter(rows), {})
        if any(first.get(name, "") is None for name in ("input_ids", "prompt", "messages", "text")):
            raise ValueError(
                "Expected a stream of texts or one of token ids, got one that mixes them. Concatenate them as "
                "`Dataset`, or make `input_ids` and `labels` of the texts first."
            )
    if not isinstance(rows, Dataset):
        return
    for name in {"prompt", "completion", "messages", CONSTRAIN}.intersection(rows.column_names):
        feature, flags = rows.features[name], name == CONSTRAIN
        held = getattr(feature, "feature", feature)  # by a list
        kinds = ("bool", "null") if flags else ("string", "large_string")
        if isinstance(held, Value) and (held.dtype not in kinds or (held is not feature and not flags)):
            expected = "true or false" if flags else "text or messages"
            raise ValueError(f"Expected {expected} in the column {name!r}, got {feature}.")
        if not flags and "input_ids" not in rows.column_names and rows.data[name].null_count:
            empty = next((row for row, value in enumerate(rows[name]) if value is None), None)
            if empty is not None:
                raise ValueError(f"Expected text or messages in the column {name!r}, row {empty} has none.")
    if args.constrain == "none" or args.assistant_only_loss or not isinstance(rows.features.get("completion"), List):
        return
    for row, messages in enumerate(rows["completion"]):
        if any(message["role"] == "user" for message in messages or ()):
            raise ValueError(
                f"Expected answers in the column 'completion', row {row} has a user's turn, which would have a loss "
                "and hide where the next answer begins. Set `assistant_only_loss=True`, or put earlier turns into "
                "the prompt."
            )


def check_labels(trainer: Any) -> None:
    """Raises where no row, or a row from its first token on, has a loss."""
    if not isinstance(trainer.train_dataset, Dataset) or trainer._is_vision_dataset:
        return
    if not any(label != -100 for row in trainer.train_dataset["labels"] for label in row):
        raise ValueError(
            f"Expected answer tokens to train on, got none in {len(trainer.train_dataset)} rows: all labels are "
            f"masked. Raise `max_length` (now {trainer.args.max_length}) or check the column `labels`."
        )
    for labels in trainer.train_dataset["labels"]:
        check_answer_labels(labels)


def freeze_reference(trainer: Any, ref_model: PreTrainedModel | None) -> torch.nn.Module:
    """`ref_model`, or a copy of the trainer's model, frozen and where the trainer's model is."""
    reference = ref_model if ref_model is not None else copy.deepcopy(trainer.model)
    reference.eval().requires_grad_(False)
    base = reference.get_base_model() if isinstance(reference, PeftModel) else reference
    vars(base).pop("forward", None)  # a copied fused head would still lead to the original's forward
    add_fused_lm_head(base)
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(reference, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(reference, trainer.accelerator)
    return trainer.accelerator.prepare_model(reference, evaluation_mode=True)


def keep_adapter(model: PeftModel) -> None:
    """Copy the adapter in training to a frozen one named "ref", as TRL's DPO trainer does."""
    name = model.active_adapter
    if "ref" in model.peft_config and not getattr(model, _OWN_COPY, False):
        raise ValueError(
            'Expected a model without an adapter named "ref", which is the name of the frozen copy that is the '
            'reference. Type `model.delete_adapter("ref")`, or load it under another name.'
        )
    if "ref" not in model.peft_config:
        model.add_adapter("ref", model.peft_config[name])
        setattr(model, _OWN_COPY, True)
    for path, parameter in list(model.named_parameters()):
        if f".{name}." in path:
            model.get_parameter(path.replace(f".{name}.", ".ref.")).data.copy_(parameter.data)


def template_ids(tokenizer: Any) -> frozenset[int]:
    """Special and added tokens, and tokens that are blank."""
    blank = {index for index in range(len(tokenizer)) if not tokenizer.decode([index]).strip()}
    return frozenset(blank | set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder))


def end_of_thinking_id(tokenizer: Any, args: DeepSafetySFTConfig) -> int | None:
    if args.window_start not in ("answer", "thinking_and_answer"):
        return None
    ids = tokenizer(args.end_of_thinking, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"Expected `end_of_thinking` to be one token of the vocabulary, got {args.end_of_thinking!r}, which is "
            f"{len(ids)}. Set `end_of_thinking` to the token your model ends its thinking with."
        )
    return ids[0]
