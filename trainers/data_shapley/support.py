"""What is measured in a trainer or a plain loop: whether it can be, its validation sets as batches, and their loss."""

import copy
import inspect
import logging
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from .gradients.coverage import check_uncompiled, refusal
from .gradients.direction import is_sharded, untouched
from .identity import RowKeys, take_rows
from .store import VALIDATION


logger = logging.getLogger(__name__)

# Columns of a training set that its rows need but a validation row doesn't
_ONLY_TRAINING = {"seq_lengths", "ref_chosen_logps", "ref_rejected_logps", "ref_logps", "constrain"}

Batches = list[tuple[Any, int]]


def check_trainer(trainer: Trainer, callback_class: type) -> None:
    """
    Raise a `ValueError` with the reason if a trainer's set-up hides what scores are made of, or it has two callbacks.
    """
    mine = [found for found in trainer.callback_handler.callbacks if isinstance(found, callback_class)]
    if len(mine) > 1:
        raise ValueError(
            f"Expected one InRunDataShapleyCallback in a trainer, got {len(mine)}. Measure several validation "
            "sets with one: `InRunDataShapleyCallback(val_dataset, targets={'name': other})`."
        )
    args, model = trainer.args, trainer.model
    check_uncompiled(trainer.model_wrapped)
    if hasattr(trainer, "reward_funcs"):
        raise refusal(f"{type(trainer).__name__}, which writes its rows as it trains", "SFTTrainer or DPOTrainer")
    if getattr(args, "packing", False) and args.packing_strategy == "wrapped":
        raise refusal("packing_strategy='wrapped', which cuts texts into pieces", "`packing_strategy='bfd'`")
    if args.n_gpu > 1:
        raise refusal(
            "DataParallel, whose replicas are gone after each forward pass", "`torchrun`, which makes it DDP"
        )
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise refusal("layers on several devices, each of which knows a part of the scores", "DDP or FSDP2")
    parallel: Any = getattr(trainer.accelerator, "parallelism_config", None)
    for kind in ("tp", "cp", "sp"):
        if parallel is not None and getattr(parallel, f"{kind}_size", 1) > 1:
            raise refusal("tensor, context or sequence parallelism, which divides rows among processes", "DDP")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    full = any(".lora_" not in name for name in trained)
    if trainer.is_fsdp_enabled and not is_sharded(model):
        raise refusal("FSDP other than version 2", "FSDP2 or DDP")
    if args.use_liger_kernel and full:
        raise refusal("Liger's fused loss with the output layer trained, which is never called", "LoRA")


def check_loop(model: Any, optimizer: Any, output_dir: Any) -> None:
    """Raise a `TypeError` or `ValueError` if these are not what a loop trains, by what, and where values can go."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's
    if not isinstance(model, nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "Expected the loop's torch.nn.Module and its torch.optim.Optimizer, got "
            f"{type(model).__name__} and {type(optimizer).__name__}."
        )
    if not isinstance(output_dir, str | os.PathLike | None):
        raise TypeError(f"Expected a folder as output_dir, got {output_dir!r}.")
    if output_dir is not None and os.path.exists(output_dir) and not os.path.isdir(output_dir):
        raise ValueError(f"Expected a folder as output_dir, got the file {output_dir}.")


def check_model(model: nn.Module) -> None:
    """Raise a `ValueError` with the reason if the rows of a model's batches could not be scored."""
    if any("lora_magnitude_vector" in name for name, p in model.named_parameters() if p.requires_grad):
        raise refusal("DoRA, whose magnitudes mix all rows' directions", "LoRA without `use_dora`")


def calling_trainer() -> tuple[Trainer, str | None]:
    """
    The trainer whose event is being handled, and the checkpoint that it was resumed from when that is its beginning;
    transformers hands neither to callbacks.
    """
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner, frame.f_locals.get("resume_from_checkpoint")
        frame = frame.f_back  # type: ignore[assignment]
    raise ValueError("Expected an event of a Trainer. For a loop of your own, use `InRunDataShapleyCallback.attach`.")


def wrap_training_step(trainer: Any, keys: RowKeys, score: weakref.WeakMethod) -> Callable[[], None]:
    """
    The trainer's `training_step` takes the rows off its batch and trains within `score(rows)`, as long as the callback
    whose method this is lives and belongs to the trainer. No hook is on the model outside of it, so that none survives
    an interruption whose traceback keeps all of this alive; `_prepare_inputs`, which could take rows off as well, does
    not see where a step ends and is called in evaluation, too. Returns what gives back the trainer and the loader.
    """
    training_step = trainer.training_step

    def scored_step(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        inputs, rows = take_rows(inputs)
        scoring = score()
        if rows is None or scoring is None or scoring.__self__ not in trainer.callback_handler.callbacks:
            return training_step(model, inputs, *args, **kwargs)
        with scoring(rows):
            return training_step(model, inputs, *args, **kwargs)

    vars(scored_step)["before"] = vars(trainer).get("training_step")
    trainer.training_step = scored_step
    of, mine = weakref.ref(trainer), weakref.ref(scored_step)  # what is returned must not keep the callback alive

    def restore() -> None:
        keys.close()
        found, step = of(), mine()
        if found is not None and step is not None and vars(found).get("training_step") is step:
            del found.training_step
            if (before := vars(step)["before"]) is not None:
                found.training_step = before

    return restore


def trainer_batches(
    trainer: Trainer, loader: DataLoader, name: str, dataset: Any, *, batch_size: int, id_column: str | None = None
) -> Batches:
    """
    Batches of a validation set as the trainer would make them of its training set, and how many rows each has: TRL's
    tokenise and mask raw text themselves. `loader` is the training set's, `name` for messages, and `id_column` one
    that validation rows don't need. `ValueError` if the set is empty or its columns aren't the training set's.
    """
    as_listed = not hasattr(loader.dataset, "column_names") and not hasattr(trainer, "_prepare_dataset")
    dataset = _as_dataset(name, dataset, as_listed)
    if isinstance(dataset, datasets.Dataset):
        if hasattr(trainer, "_prepare_dataset"):
            dataset = _prepare(trainer, name, dataset)
            if getattr(trainer, "precompute_ref_logps", False):
                dataset = trainer._precompute_ref_logps(dataset, name, batch_size)
        columns = getattr(loader.dataset, "column_names", None)
        if columns:
            columns = [column for column in columns if column != id_column]
            missing = set(columns) - set(dataset.column_names) - _ONLY_TRAINING
            if missing and (trainer.args.remove_unused_columns or missing == set(columns)):
                raise ValueError(
                    f"Expected the validation set {name!r} to have the columns the trainer trains on, {columns}, got "
                    f"{dataset.column_names}. Prepare it like the training set."
                )
            dataset = dataset.select_columns([column for column in columns if column in dataset.column_names])
    with untouched(trainer.model, trainer.args.device, trainer.args.seed):
        batches = _collate(name, dataset, loader.collate_fn, batch_size)
    return _check_batches(name, batches, trainer.model)


def single_rows(batches: Batches, dataset: Any) -> dict[str, Batches]:
    """A target of each validation row."""
    if any(rows != 1 for _, rows in batches) or len(batches) != len(dataset):
        raise ValueError(
            f"Expected validation rows with something to predict, one by one, for per_target_rows, got {len(batches)} "
            f"batches of the {len(dataset)} that were given. Give a dataset of rows, none of them without labels."
        )
    return {f"{VALIDATION}[{place}]": [batch] for place, batch in enumerate(batches)}


def loop_batches(
    model: nn.Module, loader: DataLoader, name: str, dataset: Any, batch_size: int | None = None
) -> Batches:
    """For a plain loop: those of a data loader or list of batches, or of rows, collated as training rows are."""
    listed = isinstance(dataset, list | tuple)
    with untouched(model, next(model.parameters()).device, seed=0):
        made = isinstance(dataset, DataLoader) or hasattr(dataset, "base_dataloader")
        if listed and dataset and not made:
            row = () if isinstance(loader.dataset, IterableDataset) else loader.dataset[0]
            made = all(_is_batch(item, row) for item in dataset)
        if made:
            batches = [(batch, next((len(value) for value in _tensors(batch)), 1)) for batch in dataset]
        else:
            dataset = _as_dataset(name, dataset, as_listed=True)
            batches = _collate(name, dataset, loader.collate_fn, batch_size or loader.batch_size or 8)
    return _check_batches(name, batches, model)


def check_mean(
    model: nn.Module, compute_loss: Callable[[nn.Module, Any], torch.Tensor], batches: Batches, name: str
) -> None:
    """
    Raise a `ValueError` unless the loss is one number that does not grow when a batch holds its rows twice.

    Values are in nats of the mean loss of a row, and batches are weighted by their rows.
    """
    batch, rows = batches[0]
    device = next(model.parameters()).device

    def loss_of(rows: Any) -> Any:
        return compute_loss(model, send_to_device(copy.copy(rows), device))

    some = range(min(rows, 2))  # which cost less than all
    few, twice = _take(batch, rows, [*some]), _take(batch, rows, [*some, *some])
    with untouched(model, device, 0), torch.no_grad():
        try:
            once = loss_of(batch if few is None else few)
            if few is not None and isinstance(once, torch.Tensor) and not torch.isfinite(once).all():
                once, twice = loss_of(batch), None  # perhaps they have no labels
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if str(error).startswith("Expected"):  # which is a sentence already
                raise
            raise ValueError(
                f"Expected rows like those of the training set in the validation set {name!r}, got some whose loss "
                f"can't be computed ({type(error).__name__}: {error}). Prepare them like the training set."
            ) from error
        if not isinstance(once, torch.Tensor) or once.dim() != 0:
            raise ValueError(
                f"Expected the loss of {name!r} to be a tensor with one number, the mean over rows, got "
                f"{tuple(once.shape) if isinstance(once, torch.Tensor) else once!r}. Give a `compute_loss`."
            )
        if not torch.isfinite(once):
            raise ValueError(
                f"Expected a finite loss of the validation set {name!r}, got {float(once)} for its first batch. Look "
                "at its rows, and at the model's weights."
            )
        if twice is None:
            return
        double = loss_of(twice)
    if abs(once) > 1e-6 and abs(double / once - 2) < 1e-2:
        raise ValueError(
            f"Expected the loss of {name!r} to be a mean over rows, got one that doubles, from {float(once):.4g} to "
            f"{float(double):.4g}, when a batch holds its rows twice: a sum. Take its mean."
        )


def _prepare(trainer: Any, name: str, dataset: datasets.Dataset) -> datasets.Dataset:
    arguments = {"packing": False, "formatting_func": getattr(trainer, "_formatting_func", None)}
    accepted = inspect.signature(trainer._prepare_dataset).parameters
    arguments = {key: value for key, value in arguments.items() if key in accepted}
    try:
        return trainer._prepare_dataset(
            dataset, processing_class=trainer.processing_class, args=trainer.args, dataset_name=name, **arguments
        )
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{type(trainer).__name__} can't prepare the validation set {name!r} with the columns "
            f"{dataset.column_names}: {error}. Give it rows like those of the training set."
        ) from error


def _as_dataset(name: str, dataset: Any, as_listed: bool) -> Any:
    """
    A dataset with a length, of a dataset or a list of rows; anything else is refused. `as_listed`: a list stays one,
    for collators of rows that are no [`~datasets.Dataset`]'s may want the tensors in them.
    """
    listed = isinstance(dataset, list | tuple) and not as_listed
    if listed and dataset and all(isinstance(row, Mapping) for row in dataset):
        return datasets.Dataset.from_list([dict(row) for row in dataset])
    if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        instead = f"one of its splits, {', '.join(dataset)}: `val_dataset=found[{next(iter(dataset), 'test')!r}]`"
    elif isinstance(dataset, str | bytes | Mapping | int | float):
        instead = "`load_dataset(...)` or `Dataset.from_list(rows)`"
    elif isinstance(dataset, type) or not hasattr(dataset, "__len__"):
        instead = "a stream as a dataset: `Dataset.from_list(list(stream.take(200)))`"
    elif len(dataset) == 0:
        raise ValueError(f"Expected rows in the validation set {name!r}, got none. A few hundred give stable values.")
    else:
        return dataset
    raise ValueError(
        f"Expected a dataset with a length as the validation set {name!r}, got {type(dataset).__name__} "
        f"{dataset!r:.60}. Give {instead}."
    )


def _collate(name: str, dataset: Any, collate: Callable[[list[Any]], Any], batch_size: int) -> Batches:
    batches = []
    for start in range(0, len(dataset), batch_size):
        rows: list[Any] = []
        try:
            rows.extend(dataset[index] for index in range(start, min(start + batch_size, len(dataset))))
            batches.append((collate(rows), len(rows)))
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            what = f"{type(dataset).__name__} with {type(rows[0]).__name__ if rows else 'no'} rows"
            raise ValueError(
                f"Expected rows like those of the training set in the validation set {name!r}, for its collator, got "
                f"{what} ({type(error).__name__}: {error}). Give a dataset with the columns of the training set."
            ) from error
    return batches


def _check_batches(name: str, batches: Batches, model: nn.Module) -> Batches:
    """Those in which there is something to predict."""
    find: Any = getattr(model, "get_input_embeddings", lambda: None)
    try:
        size = getattr(find(), "num_embeddings", None)
    except (NotImplementedError, AttributeError):  # as of models of images and audio
        size = None
    kept = []
    for batch, rows in batches:
        entries = batch if isinstance(batch, Mapping) else {}
        ids, labels = entries.get("input_ids"), entries.get("labels")
        least, most = (int(ids.min()), int(ids.max())) if size is not None and ids is not None else (0, -1)
        if size is not None and (least < 0 or most >= size):
            raise ValueError(
                f"Expected token ids below {size}, the model's vocabulary, in the validation set {name!r}, got "
                f"{most if most >= size else least}. Tokenise it with the model's own tokenizer."
            )
        floats = (value for value in _tensors(batch) if value.is_floating_point())
        if any(value.isnan().any() for value in floats):
            raise ValueError(f"Expected numbers in the validation set {name!r}, got NaN in some rows. Leave them out.")
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.ne(-100).any():
            kept.append((batch, rows))
    if len(kept) < len(batches):
        logger.warning(
            "%d of %d batches of the validation set %r have no label but -100 and are left out.",
            len(batches) - len(kept), len(batches), name,
        )  # fmt: skip
    if not kept:
        raise ValueError(
            f"Expected rows with labels in the validation set {name!r}, got none: no token of it is to be predicted. "
            "A few hundred give stable values."
        )
    return kept


def _is_batch(item: Any, row: Any) -> bool:
    """Whether an entry of a list is a batch rather than a row, which has numbers, lists or tensors as others have."""
    count = 1 if isinstance(item, torch.Tensor) else len(item) if isinstance(item, Mapping | list | tuple) else 0
    dims = [[value.dim() for value in _tensors(found)] for found in (item, row)]
    return 0 < count == len(dims[0]) and dims[0] != dims[1]


def _tensors(batch: Any) -> list[torch.Tensor]:
    """Those that begin with the rows of a batch."""
    values: Any = batch.values() if isinstance(batch, Mapping) else batch
    values = values if isinstance(batch, Mapping | list | tuple) else [batch]
    return [value for value in values if isinstance(value, torch.Tensor) and value.dim()]


def _take(batch: Any, rows: int, places: list[int]) -> Any:
    """The batch with the rows at these places, `None` if tensors don't begin with the rows."""
    if isinstance(batch, Mapping):
        if "position_ids" in batch or "completion_mask" in batch:
            return None  # flattened rows, pairs in two halves
        taken = {name: _take(value, rows, places) for name, value in batch.items()}
        return None if any(value is None for value in taken.values()) else taken
    if isinstance(batch, (list, tuple)):
        parts = [_take(value, rows, places) for value in batch]
        return None if any(part is None for part in parts) else type(batch)(parts)
    return batch[places] if isinstance(batch, torch.Tensor) and batch.dim() and len(batch) == rows else None


def trainer_loss(trainer: Trainer, model: nn.Module, batch: Any) -> torch.Tensor:
    """The trainer's own loss, as it evaluates, without an entry in the metrics that TRL collects."""
    _check_names(batch, " from the trainer's data_collator. Give a collator that returns a dictionary, or")
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
    _check_names(batch, ". Give")
    return model(**batch).loss


def _check_names(batch: Any, instead: str) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"Expected batches that name the model's inputs, got {type(batch).__name__}{instead} "
            "`compute_loss=lambda model, batch: ...`, the mean loss of a batch's rows."
        )


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
