"""Recovery rows and the constrained loss of https://huggingface.co/papers/2406.05946, in front of a trainer of SFT."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTTrainer
from trl.models.utils import prepare_deepspeed
from trl.trainer import add_fused_lm_head
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from typing_extensions import override

from hf_iclr.models import FusedOutputsProxy, evaluation_mode, hash_weights
from hf_iclr.trainers.measuring import SummedMetrics, rows_of_this_process

from .arguments import (
    as_config,
    check_columns,
    check_labels,
    check_reference_model,
    check_schedule,
    choose_reference,
    disable_dropout,
    end_of_thinking_id,
    freeze_reference,
    keep_adapter,
    load_triplets,
    template_ids,
)
from .config import DeepSafetyOptions, check_constrained
from .constrained_loss import constrained_sft_loss, constraint_means, constraint_sums, schedule_betas
from .recovery_mixture import (
    RecoveryMixture,
    RecoveryMixtureSampler,
    check_rows_to_mix,
    columns_of,
    mix_in_recovery_rows,
    pack_with_recovery_rows,
    partly_tokenized,
    prepare_texts,
)
from .recovery_rows import tokenize_triplets
from .reference_log_probs import (
    CONSTRAIN,
    POSITIONS,
    REF_LOGPS,
    ConstrainedCollator,
    Window,
    add_reference_log_probs,
    check_answer_labels,
)
from .refused_prompts import find_refusals, mark_answers, warn_of_a_weak_constraint


if TYPE_CHECKING:
    from trl.trainer.utils import FusedCausalLMOutput


class DeepSafetyMixin(SummedMetrics):
    """
    Goes in front of a trainer of SFT, whose loss then keeps the first tokens of every answer near the model it starts
    from. Normalisation, metrics, packing and everything else stay the trainer's.

    ```python
    class DeepSafetyTrainer(DeepSafetyMixin, Seq2SeqTrainer):
        safety_options = DeepSafetyOptions(beta_first=1.0)
    ```

    | in front of | there is |
    |---|---|
    | [`~trl.SFTTrainer`] and what inherits from it | all of [`DeepSafetySFTTrainer`] |
    | other trainers, for batches with `labels` on answers only | the constrained loss; reference: adapter or copy |

    Attributes:
        safety_options ([`~hf_iclr.trainers.deep_safety.config.DeepSafetyOptions`]):
            Options of a trainer whose arguments have none.

    Args:
        args, kwargs:
            All that the trainer takes, and `safety_dataset`, `ref_model` and `beta_schedule` of
            [`DeepSafetySFTTrainer`].
    """

    # Set by the parents, whose types are not read.
    args: Any
    data_collator: Any
    train_dataset: Any
    eval_dataset: Any
    _signature_columns: Any
    _is_vision_dataset = False  # what only trainers of TRL have
    padding_free = False

    safety_options: ClassVar[DeepSafetyOptions] = DeepSafetyOptions()

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: TrainingArguments | None = None,
        *positional: Any,
        safety_dataset: Dataset | None = None,
        ref_model: PreTrainedModel | None = None,
        beta_schedule: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        args = as_config(None, model) if args is None else args
        for option in dataclasses.fields(DeepSafetyOptions):
            if not hasattr(args, option.name):
                setattr(args, option.name, getattr(self.safety_options, option.name))
        check_constrained(args)
        if safety_dataset is None and args.safety_dataset_name is not None:
            safety_dataset = load_triplets(args.safety_dataset_name)
        self._constrains = args.constrain != "none"
        if self._constrains and kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "The constrained loss cannot be right here: `compute_loss_func` takes its own loss from full logits. "
                "Leave it out, or set `constrain='none'`."
            )
        mixes = safety_dataset is not None or args.rehearse_refusals
        if not isinstance(self, SFTTrainer) and (mixes or args.constrain == "refused"):
            raise ValueError(
                "Recovery rows and `constrain='refused'` need the rows of TRL's `SFTTrainer`, got "
                f"{type(self).__name__}, which is none. Leave them out, or use `DeepSafetySFTTrainer`."
            )
        packs = getattr(args, "packing", False)
        if mixes and not packs and args.train_sampling_strategy != "random":
            raise ValueError(
                "Recovery rows are mixed into every step in random order, got "
                f"train_sampling_strategy={args.train_sampling_strategy!r}. Set `train_sampling_strategy='random'`, "
                "or concatenate the rows of `make_safety_recovery_dataset` with yours of `input_ids` and `labels`."
            )
        if beta_schedule is not None:
            check_schedule(beta_schedule)
        if self._constrains:
            check_reference_model(ref_model, model, args)
        if self._constrains and ref_model is None and isinstance(model, PeftModel) and not kwargs.get("peft_config"):
            keep_adapter(model)
        self.beta_schedule = beta_schedule
        self._ref_model: torch.nn.Module | None = None
        self.sums = {}
        self.own_refusals: dict[tuple[int, ...], list[int]] = {}
        self._triplets_to_pack = safety_dataset if packs else None
        if positional:
            super().__init__(model, args, *positional, **kwargs)
        else:  # in front of others in some trainers
            super().__init__(model=model, args=args, **kwargs)

        if args.disable_dropout and (self._constrains or mixes):
            disable_dropout(self.model)
        triplets = []  # what may be wrong with them shows before the reference is computed
        if safety_dataset is not None and not packs:
            triplets = list(tokenize_triplets(safety_dataset, self._tokenizer, max_length=args.max_length))
        self.reference = choose_reference(self, ref_model) if self._constrains else None
        if self._constrains:
            self._set_up_constraint(ref_model)
        if mixes and not packs:
            mix_in_recovery_rows(self, triplets)

    @override
    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        check_columns(dataset, args)
        triplets, self._triplets_to_pack = self._triplets_to_pack, None  # the training rows are prepared first
        parent, marked = super()._prepare_dataset, self._constrains and CONSTRAIN in columns_of(dataset)
        marked = packing and (triplets is not None or marked or partly_tokenized(dataset))

        def prepare(rows: Any) -> Any:
            return parent(rows, processing_class, args, packing and not marked, formatting_func, dataset_name)

        if triplets is not None:
            check_rows_to_mix(dataset)
            triplets = tokenize_triplets(triplets, self._tokenizer, max_length=args.max_length)
        rows = prepare_texts(dataset, prepare)
        return pack_with_recovery_rows(rows, triplets, args) if marked else rows

    def _set_up_constraint(self, ref_model: PreTrainedModel | None) -> None:
        args = self.args
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)  # a processor has one
        self._window = window = Window(
            args.window_start,
            template_ids(tokenizer) if args.window_start != "completion" else frozenset(),
            end_of_thinking_id(tokenizer, args),
            args.num_initial_tokens if self.reference == "window" else None,
        )
        stored = self.reference in ("precompute", "window")
        if isinstance(self, SFTTrainer):
            check_labels(self)
            self.data_collator = ConstrainedCollator(self.data_collator, window, stored)
        else:
            add_fused_lm_head(self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)
        if self.reference == "frozen":
            self._ref_model = freeze_reference(self, ref_model)
        if args.constrain == "refused":
            self._map_datasets(self._mark_refused)
            if self.beta_schedule is None:
                warn_of_a_weak_constraint(self)
        if stored:
            self._map_datasets(functools.partial(self._score, window=window, keep=True))

    def _map_datasets(self, function: Callable[[Dataset, str], Dataset]) -> None:
        """Apply `function` to the training rows and to every evaluation set known now."""
        self.train_dataset = function(self.train_dataset, "train")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: function(rows, name) for name, rows in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = function(self.eval_dataset, "eval")

    def _mark_refused(self, rows: Dataset, name: str) -> Dataset:
        plain = isinstance(rows, Dataset) and rows.format["type"] != "custom" and not self._is_vision_dataset
        if not plain or "seq_lengths" in rows.column_names:
            raise ValueError(
                "`constrain='refused'` answers every prompt once before training, which packed rows, streamed data, "
                "`with_transform` and images do not allow. Mark rows in a boolean column `constrain` yourself "
                "and set `constrain='all'`."
            )
        with self._reference_weights(), evaluation_mode(self.model):
            model = self.accelerator.unwrap_model(self._reference_model)
            refusals = find_refusals(rows, model, self._tokenizer, self.accelerator, name)
        marks, refused = mark_answers(rows, refusals)
        if rows is self.train_dataset:
            self.own_refusals = refused
        rows = rows.remove_columns([column for column in rows.column_names if column == CONSTRAIN])
        return rows.add_column(CONSTRAIN, marks)

    def _score(self, rows: Dataset, name: str, window: Window, keep: bool) -> Dataset:
        """Rows with the reference log-probabilities of the tokens that `window` stores, kept on disk if wanted."""
        if "seq_lengths" in rows.column_names:  # packed rows are scored one by one, as they are
            collator, batch_size = self.data_collator.collator, 1
        else:
            collator = DataCollatorForLanguageModeling(pad_token_id=self._tokenizer.pad_token_id)
            batch_size = self.args.per_device_eval_batch_size
        model = self._reference_model
        if self._ref_model is None and self.is_deepspeed_enabled:
            model = prepare_deepspeed(self.model, self.accelerator)

        def score(batch: dict[str, Any]) -> torch.Tensor:
            kwargs = {key: value for key, value in batch.items() if key != POSITIONS}
            with self.accelerator.autocast(), self._reference_weights(), evaluation_mode(self.model):
                outputs = model(**kwargs, use_cache=False, fused_lm_head=True)
            return outputs.log_probs[:, 1 - batch["labels"].shape[1] :]

        return add_reference_log_probs(
            rows,
            score,
            ConstrainedCollator(collator, window, stored=False),
            self.accelerator,
            batch_size,
            hash_weights(model, exact=True) if keep else None,
            name,
        )

    @override
    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(rows, RecoveryMixture):
            return RecoveryMixtureSampler(rows, ratio=self.args.safety_ratio, seed=self.args.seed)
        return super()._get_train_sampler(train_dataset)

    @override
    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, REF_LOGPS, CONSTRAIN})

    @override
    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        trl = isinstance(self, SFTTrainer)
        if not self._constrains or not (trl or self.model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not trl:
            for row in inputs["labels"].tolist():
                check_answer_labels(row)
            positions = self._window.positions(F.pad(inputs["labels"][:, 1:], (1, 0), value=-100))
            inputs = {**inputs, POSITIONS: positions, "fused_lm_head": True}
        positions, stored = inputs.pop(POSITIONS, None), inputs.pop(REF_LOGPS, None)
        if positions is None:
            raise ValueError(
                f"Expected `{POSITIONS}` in the batch, got {sorted(inputs)}: the trainer's `data_collator` was "
                "replaced. Wrap yours in the trainer's: `trainer.data_collator.collator = yours`."
            )

        def rewrite(outputs: "FusedCausalLMOutput", kwargs: dict[str, Any]) -> "FusedCausalLMOutput":
            return self._constrain(outputs, kwargs, positions[:, 1:], stored)

        return super().compute_loss(FusedOutputsProxy(model, rewrite), inputs, return_outputs, num_items_in_batch)

    def _constrain(
        self,
        outputs: "FusedCausalLMOutput",
        kwargs: dict[str, Any],
        positions: torch.Tensor,
        stored: torch.Tensor | None,
    ) -> "FusedCausalLMOutput":
        if self.reference not in ("precompute", "window"):
            ref_logps = self._reference_log_probs(kwargs, positions.shape[1])
        elif stored is not None:
            ref_logps = stored[:, 1:]
        elif self.model.training:
            raise ValueError(
                f"Expected the column `{REF_LOGPS}` in every training row, got rows without it. It is added when the "
                'trainer is made: pass the rows as `train_dataset` then, or set `reference="frozen"`.'
            )
        else:  # rows first seen by `evaluate` after training began: the reference is gone
            return outputs
        betas = self._betas(positions)
        # Prompt-learning adapters put virtual tokens in front; the positions of the real tokens come last.
        logps = outputs.log_probs[:, -positions.shape[1] :]
        mask = outputs.label_mask[:, -positions.shape[1] :]
        losses = constrained_sft_loss(logps, ref_logps, betas)
        rows = len(positions) if self.padding_free else rows_of_this_process(self, len(positions))
        counted = (tensor.detach()[:rows] for tensor in (logps, ref_logps, betas, positions, losses, mask))
        self.add_sums(constraint_sums(*counted, window_tokens=self.args.num_initial_tokens))
        if self.model.training:
            plain = outputs.log_probs.sum()
            outputs.log_probs = torch.where(mask, -losses, 0.0)
            count = kwargs.get("num_items_in_batch")  # TRL's trainers take their own mean of the log-probabilities
            outputs.loss = outputs.loss + (plain - outputs.log_probs.sum()) / (mask.sum() if count is None else count)
        return outputs

    def _betas(self, positions: torch.Tensor) -> torch.Tensor:
        args = self.args
        if self.beta_schedule is not None:
            betas = self.beta_schedule(positions).to(torch.float32)
        else:
            betas = schedule_betas(
                positions, args.beta_first, args.beta_initial, args.beta_rest, args.num_initial_tokens
            )
        return torch.where(self._window.stored(positions), betas, 0.0)

    def _reference_log_probs(self, kwargs: dict[str, Any], length: int) -> torch.Tensor:
        kwargs = {key: value for key, value in kwargs.items() if key != "output_router_logits"}
        with torch.no_grad():
            if self._ref_model is not None:
                outputs = self._ref_model(**kwargs)
            else:
                with self._reference_weights(), evaluation_mode(self.model):
                    outputs = self.model(**kwargs)
        return outputs.log_probs[:, -length:]

    @property
    def _reference_model(self) -> torch.nn.Module:
        """The frozen one, or the model itself, to be used within `_reference_weights`."""
        return self.model if self._ref_model is None else self._ref_model

    @contextlib.contextmanager
    def _reference_weights(self) -> Iterator[None]:
        """Inside, the model is the reference: a PEFT model without the adapter in training."""
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PeftModel):
            yield
            return
        if "ref" not in model.peft_config:
            with model.disable_adapter():
                yield
            return
        in_training = model.active_adapter
        model.set_adapter("ref")
        try:
            yield
        finally:
            model.set_adapter(in_training)

    def metrics_from(self, sums: torch.Tensor) -> dict[str, float]:
        losses, tokens, *buckets = sums.tolist()
        means = {} if self.model.training or not tokens else {"constrained_loss": losses / tokens}
        return means | constraint_means(buckets)
