"""What each training row was worth to a validation loss, measured while the model is trained."""

import contextlib
import functools
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_iclr.trainers.measuring import log_beside

from . import support
from .directions import EngineSettings
from .engine import ShapleyEngine
from .gradients.zero import optimizer_of
from .identity import RowKeys, check_loader, watched_loop
from .result import DataShapleyResult
from .store import VALIDATION, RunRecords
from .trained_rows import TrainedRows


FLUSH_EVERY = 50  # steps


class InRunDataShapleyCallback(TrainerCallback):
    """
    Measures during an ordinary training what each row was worth: by how many nats its share in the steps lowered the
    loss of a validation set. Weights, optimizer states and random states stay bit for bit those of a run without it.

    The value of row i in a step with learning rate `lr` is, to first order (equation 5 of
    https://huggingface.co/papers/2406.11011, section 4.1), the Shapley value of its gradient,
    `lr * <grad l_i, grad l_val>`, here with the sign that makes helpful rows positive, with the row's share `l_i` of
    the loss as it is trained, clipping included, and summed over steps. With Adam the second gradient is divided,
    element by element, by the root of the second moment before the step, https://huggingface.co/papers/2602.00329.
    Sums of values come close to the fall of the validation loss where steps are small: `shapley/explained_ratio`.

    Limits: the first order equals TracIn with every step as a checkpoint (https://huggingface.co/papers/2002.08484).
    Values belong to this run and its order of rows; they don't say what training without a row would give, and the
    paper's faster training on filtered data was not reproduced by others. A small validation set makes values noisy.
    Where a loss mixes rows (contrastive losses, batch normalisation), a value is that of the row's share of the
    batch's gradient. Under Adam, momentum of earlier steps and weight decay move the loss as well. Between two
    refreshes the direction is an old one, and within `cost` it is the mean of many: see `shapley/agreement`.

    Rows are known by their position in `trainer.train_dataset`. Packed rows are divided into their source texts, known
    by a hash of their tokens, as are rows of an iterable dataset. A pair of DPO is one row.

    Logged whenever the direction is refreshed:

    | key | |
    |---|---|
    | `shapley/explained_ratio` | sum of values over the fall of the validation loss, so far |
    | `shapley/harmful_share` | share of rows with a negative value since the last time |
    | `shapley/scored_share` | share of what a step gains that values cover, see `min_scored_share` |
    | `shapley/energy` | share of the direction's squared norm that its sketch keeps |
    | `shapley/agreement` | cosine of the newly measured direction with the one before: at 0 that held no longer |
    | `shapley/loss_<target>` | mean loss of the target's rows, in nats |

    Args:
        val_dataset ([`~datasets.Dataset`]):
            Rows like those of the training set, raw or tokenised; a few hundred. The target `"validation"`.
        refresh_every (`int`, *optional*):
            Optimizer steps between two passes over the whole validation sets, whatever they cost. Defaults to `cost`.
        targets (`dict[str, Dataset]`, *optional*):
            More validation sets, by name.
        exact (`bool`, *optional*, defaults to `False`):
            Whether matrices outside of LoRA layers are scored exactly, at about a third more floating-point
            operations, rather than by a sketch of low rank.
        rank (`int`, *optional*, defaults to 16):
            Of the sketch.
        id_column (`str`, *optional*):
            Column with the rows' own ids. The trainer must keep it: `remove_unused_columns=False`.
        cost (`float`, *optional*, defaults to 0.05):
            Share of the training's time for all of this: the direction begins with as many validation batches as half
            of it pays for, then takes in one after the other, as often as what is left allows once scoring is timed.
        adam_warmup (`int`, *optional*, defaults to 20):
            Steps of Adam before the first values: its second moment is not known yet.
        min_scored_share (`float`, *optional*, defaults to 0.8):
            What the first scored step must cover of the product of its gradient with the validation gradient, by the
            absolute values of its parts. Parameters whose rows can't be told apart are left out, by name in a warning.
        batch_size (`int`, *optional*):
            Validation rows in one pass. Defaults to `per_device_eval_batch_size`.
        compute_loss (`Callable`, *optional*):
            `compute_loss(model, batch)`, the mean loss of a batch's rows. Defaults to the trainer's, and to the
            model's own in a plain loop.
        token_values_for (sequence of `int` or `str`, *optional*):
            Rows of which the value of each token is kept.
        per_target_rows (`bool`, *optional*, defaults to `False`):
            Whether to keep values for each row of `val_dataset`, too: which training row taught which answer, see
            [`~DataShapleyResult.target_rows`]. Every such row is a direction of its own, with its validation pass and
            its share in scoring: for a few dozen.

    Raises:
        ValueError: if an option is out of range; and when the training begins, if a validation set is empty, has other
            columns or another vocabulary, its loss is not a mean over rows, nothing is trained, or rows could not be
            told apart.

    Example:

    ```python
    >>> shapley = InRunDataShapleyCallback(val_dataset)
    >>> trainer = SFTTrainer(model, train_dataset=rows, callbacks=[shapley])
    >>> trainer.train()
    >>> shapley.result.bottom(10)
    ```
    """

    def __init__(
        self,
        val_dataset: Any,
        refresh_every: int | None = None,
        targets: Mapping[str, Any] | None = None,
        exact: bool = False,
        rank: int | None = None,
        id_column: str | None = None,
        *,
        cost: float = 0.05,
        adam_warmup: int = 20,
        min_scored_share: float = 0.8,
        batch_size: int | None = None,
        compute_loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
        token_values_for: Sequence[int | str] = (),
        per_target_rows: bool = False,
    ) -> None:
        if not isinstance(per_target_rows, bool):
            raise TypeError(f"Expected per_target_rows=True or per_target_rows=False, got {per_target_rows!r}.")
        names = targets or ()
        if not isinstance(targets, Mapping | None) or not all(
            isinstance(n, str) and n and n[-1] != "]" for n in names
        ):
            raise TypeError(f"Expected validation sets by name in targets, `{{'safety': rows}}`, got {targets!r:.80}.")
        if VALIDATION in (targets or {}):
            raise ValueError(f"Expected names other than {VALIDATION!r} in targets: it is the name of val_dataset.")
        if not isinstance(id_column, str | None):
            raise TypeError(f"Expected the name of a column as id_column, such as 'uid', got {id_column!r}.")
        if not (compute_loss is None or callable(compute_loss)):
            raise TypeError(f"Expected a function as compute_loss, compute_loss(model, batch), got {compute_loss!r}.")
        self.datasets = {VALIDATION: val_dataset, **(targets or {})}
        self.settings = EngineSettings(
            refresh_every, cost, exact, rank, adam_warmup, min_scored_share, token_values_for, batch_size
        )
        self.id_column, self.compute_loss, self.per_target_rows = id_column, compute_loss, per_target_rows
        self._warmup = 0  # steps of this run that have no values
        self._restore: Callable[[], Any] = lambda: None
        self._engine: Any = None  # while a training runs
        self._records: Any = None  # from the first one's beginning

    @property
    def result(self) -> DataShapleyResult:
        """
        What was measured so far, see [`DataShapleyResult`]. With several processes, in the first one and up to the
        last time that they brought their rows together: every 50 steps, at checkpoints and at the end.

        Raises:
            ValueError: before the first value is known.
        """
        if self._records is None:
            raise ValueError("Expected a training before its result. Call `trainer.train()` first.")
        if self._records.is_alone:
            self._records.flush()
        rows, steps = self._records.store.read()
        if steps.empty:
            why = f" Adam's first adam_warmup={self._warmup} steps have none." if self._warmup else ""
            if not self._records.is_alone:
                why += f" Several processes bring theirs together every {FLUSH_EVERY} steps."
            raise ValueError(f"Expected a step with values, found none yet.{why}")
        trained = self._records.store.trained
        return DataShapleyResult(rows, steps, trained.dataset, trained)

    # In a Trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close()
        trainer, resumed = support.calling_trainer()
        support.check_trainer(trainer, InRunDataShapleyCallback)
        loader = check_loader(kwargs["train_dataloader"], self.id_column)
        adam = any("betas" in group for group in kwargs["optimizer"].param_groups)
        self._warmup = self.settings.adam_warmup if adam else 0
        if 0 < state.max_steps <= self._warmup:
            raise ValueError(
                f"Expected more than adam_warmup={self._warmup} steps, got {state.max_steps}: no row would get a "
                f"value. Type `adam_warmup={state.max_steps // 10}`, say."
            )
        batch_size = self.settings.batch_size or args.per_device_eval_batch_size
        batches = functools.partial(
            support.trainer_batches, trainer, loader, batch_size=batch_size, id_column=self.id_column
        )
        compute_loss = self.compute_loss or functools.partial(support.trainer_loss, trainer)
        trained = TrainedRows.of(trainer.train_dataset, loader.dataset, self.id_column)
        checkpoint = Path(resumed or Path(args.output_dir, f"checkpoint-{state.global_step}"))
        rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        run = {"seed": args.seed, "steps": state.max_steps, "rows_per_step": rows_per_step}
        model, at = trainer.accelerator.unwrap_model(trainer.model), (state.global_step, checkpoint)
        self._start(model, optimizer_of(trainer), batches, compute_loss, trained, Path(args.output_dir), *at, **run)
        keys, score = RowKeys(loader, self.id_column), weakref.WeakMethod(self._scoring)
        self._restore = weakref.finalize(self, support.wrap_training_step(trainer, keys, score))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._engine.begin_step(state.global_step + 1)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._engine.finish_step(getattr(kwargs["optimizer"], "scaler", None))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if getattr(kwargs["optimizer"], "step_was_skipped", False):
            self._engine.drop()
        else:
            self._records.add(self._engine.commit())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        last = state.global_step >= state.max_steps or control.should_training_stop
        collected = self._records.collected
        fresh = bool(collected) and f"energy_{VALIDATION}" in collected[-1].record
        if last:
            self._measure_end(state.global_step + 1)
        if fresh or last:
            log_beside(support.calling_trainer()[0], self._records.logs(), control)
        if last or len(collected) >= FLUSH_EVERY:
            self._records.flush()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # The trainer's last log tells of a run that was stopped after `on_step_end`, by `on_evaluate` for example.
        # `on_train_end` would be too late: the best checkpoint may have been loaded.
        ended = "train_runtime" in (logs or {}) and self._engine is not None
        if ended and self._records.first_losses and not self._records.ended:
            self._measure_end(state.global_step + 1)
            log_beside(support.calling_trainer()[0], self._records.logs(), control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._records.flush()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            self._records.save(folder, self._engine.targets.pack(self._engine.taps.excluded))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._records.flush()
        self._close()

    # In a plain loop

    @classmethod
    @contextlib.contextmanager
    def attach(
        cls,
        model: nn.Module,
        optimizer: Any,
        dataloader: Any,
        val_dataset: Any,
        *,
        output_dir: str | Path | None = None,
        **options: Any,
    ) -> Iterator["InRunDataShapleyCallback"]:
        """
        The same around a plain loop, prepared by accelerate or not: a batch of `dataloader`, a forward pass of
        `model`, a backward pass, `optimizer.step()`. Each batch is used before the next is fetched; a loop that is
        seen to fetch ahead is refused, for values would be those of other rows.

        Args:
            model (`torch.nn.Module`), optimizer ([`~torch.optim.Optimizer`]), dataloader (`DataLoader`):
                Those the loop uses.
            val_dataset (dataset, [`~torch.utils.data.DataLoader`] or list of batches):
                The target `"validation"`. A dataset is collated as `dataloader` does.
            output_dir (`str` or `pathlib.Path`, *optional*):
                Where values are stored. Without one they are only in `result`.
            options (`Any`):
                Other arguments of [`InRunDataShapleyCallback`]; `compute_loss` unless the model, called with a batch,
                returns its mean `loss`.

        Example:

        ```python
        >>> with InRunDataShapleyCallback.attach(model, optimizer, loader, val, compute_loss=loss_of) as shapley:
        ...     for batch in loader:
        ...         loss_of(model, batch).backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> shapley.result.top(10)
        ```
        """
        self = cls(val_dataset, **options)
        loader = check_loader(dataloader, self.id_column)
        support.check_loop(model, optimizer, output_dir)
        model, plain = getattr(model, "module", model), getattr(optimizer, "optimizer", optimizer)
        batches = functools.partial(support.loop_batches, model, loader)
        trained = TrainedRows.of(loader.dataset, loader.dataset, self.id_column)
        folder = None if output_dir is None else Path(output_dir)
        run: dict[str, Any] = {}
        with contextlib.suppress(TypeError):  # of a stream
            run["steps"] = len(dataloader)
        self._start(model, plain, batches, self.compute_loss or support.model_loss, trained, folder, **run)
        done = 0

        def on_rows(rows: Any, batch: Any) -> None:
            if not self._engine.open:
                self._engine.begin_step(done + 1)
            self._engine.begin_micro_batch(rows, batch)
            self._engine.attach()

        def before_step(*_: Any) -> None:
            self._engine.finish_step(getattr(optimizer, "scaler", None))

        def after_step(*_: Any) -> None:
            nonlocal done
            done += 1
            self._records.add(self._engine.commit())
            if len(self._records.collected) >= FLUSH_EVERY:
                self._records.flush()

        handles = [plain.register_step_pre_hook(before_step), plain.register_step_post_hook(after_step)]
        keys = RowKeys(dataloader, self.id_column)
        try:
            with watched_loop(dataloader, on_rows):
                yield self
            self._engine.close_step()
            self._measure_end(done + 1)
            self._records.flush()
        finally:
            for restore in (keys.close, *(handle.remove for handle in handles), self._close):
                restore()
            if self._records.is_alone:  # else others may not be flushing too
                self._records.flush()

    # What both share

    def _start(
        self,
        model: nn.Module,
        optimizer: Any,
        make_batches: Callable[..., support.Batches],
        compute_loss: Callable[[nn.Module, Any], torch.Tensor],
        trained: TrainedRows,
        folder: Path | None,
        step: int = 0,
        checkpoint: Path | None = None,
        **run: Any,
    ) -> None:
        began = time.perf_counter()
        support.check_model(model)
        batches = {name: make_batches(name, dataset) for name, dataset in self.datasets.items()}
        if self.per_target_rows:
            rows = self.datasets[VALIDATION]
            batches |= support.single_rows(make_batches(VALIDATION, rows, batch_size=1), rows)
        records = RunRecords(folder, trained, list(batches), bool(self.settings.token_values_for))
        engine = ShapleyEngine(model, optimizer, batches, compute_loss, replace(self.settings, **run))
        for name, found in batches.items():
            support.check_mean(model, compute_loss, found, name)
        if step and checkpoint is not None:
            tensors = records.resume(checkpoint, step)
            if "counts" in tensors:
                engine.taps.excluded = engine.targets.unpack(tensors)
        engine.meter.add(time.perf_counter() - began)
        # Only now that nothing is refused any more, for this lets go of an earlier run's values
        self._engine, self._records = engine, records

    @contextlib.contextmanager
    def _scoring(self, rows: list[int] | list[str]) -> Iterator[None]:
        self._engine.begin_micro_batch(rows)
        self._engine.attach()
        try:
            yield
        except BaseException:
            self._close()
            raise
        self._engine.detach()

    def _measure_end(self, step: int) -> None:
        if self._records.first_losses:
            self._records.add_end(step, self._engine.targets.measure_losses())

    def _close(self) -> None:
        """Give back the model, the trainer and the data loader as they were."""
        self._restore()
        if self._engine is not None:
            self._engine.close_step()
            self._engine = None
