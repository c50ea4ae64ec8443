"""SFT that keeps an alignment: recovery rows and the constrained loss of https://huggingface.co/papers/2406.05946."""

import contextlib
import dataclasses
import functools
import logging
import statistics
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTTrainer
from trl.models.utils import prepare_deepspeed
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from typing_extensions import override

from hf_iclr.models import FusedOutputsProxy, evaluation_mode, hash_weights
from hf_iclr.trainers.measuring import SummedMetrics, rows_of_this_process

from .arguments import (
    as_config,
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
from .config import DeepSafetySFTConfig
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
from .reference_log_probs import CONSTRAIN, POSITIONS, REF_LOGPS, ConstrainedCollator, Window, add_reference_log_probs
from .refused_prompts import find_refusals, mark_answers


if TYPE_CHECKING:
    from trl.trainer.utils import FusedCausalLMOutput


logger = logging.getLogger(__name__)

# β₁ times the negative log-probability (nats) of a compliant first token that kept refusals; see docs/deep_safety.md.
STRONG_CONSTRAINT = 20.0


class DeepSafetySFTTrainer(SummedMetrics, SFTTrainer):
    """
    [`~trl.SFTTrainer`] whose loss keeps the first tokens of every answer near the model it starts from, and which can
    mix safety-recovery rows into every step.

    Normalisation, metrics, packing and everything else are TRL's. `eval_loss` stays plain cross-entropy;
    `eval_constrained_loss` stands beside it. Logged by bucket (`first`, `initial` and `rest` of the answer tokens):
    `constraint/weight_*`, the mean weight of the cross-entropy gradient, and `constraint/log_ratio_*`, the mean of
    log π - log π_ref in nats.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The aligned model. As it is when it gets here, it is the reference. A PEFT model with a trained adapter
            keeps a frozen copy of the adapter, named "ref".
        args ([`DeepSafetySFTConfig`], *optional*):
            Settings. Any other [`~transformers.TrainingArguments`] are taken over as they are, with our defaults for
            the rest.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            As in [`~trl.SFTTrainer`]: prompt-completion, or conversations with `assistant_only_loss=True`. A boolean
            column `constrain` that is `False` gives a row plain cross-entropy.
        safety_dataset ([`~datasets.Dataset`], *optional*):
            Triplets with the columns `prompt`, `harmful` and `refusal`. A share `safety_ratio` of every step is made
            of them.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            Another reference than the starting point, with the same vocabulary; kept frozen.
        beta_schedule (`Callable`, *optional*):
            Positions (`torch.LongTensor`, 1 at the start of a window, 0 outside of answers) -> strengths, instead of
            those in `args`. A strength of 0 is plain cross-entropy.
        kwargs (`dict`, *optional*):
            Everything else [`~trl.SFTTrainer`] takes.

    Raises:
        ValueError: where the constrained loss could not be right, before anything is computed: full-sequence labels, a
            loss or packing it cannot rewrite, a reference of another vocabulary, sequence parallelism.
    """

    # Set by the parents, whose types are not read.
    args: Any
    data_collator: Any
    train_dataset: Any
    eval_dataset: Any
    _signature_columns: Any

    _tag_names: ClassVar[list[str]] = ["trl", "sft", "hf_iclr", "deep-safety"]
    _name = "Deep safety SFT"
    _paper: ClassVar[dict[str, str]] = {
        "title": "Safety Alignment Should Be Made More Than Just a Few Tokens Deep",
        "id": "2406.05946",
        "citation": (
            "@inproceedings{qi2025safety,\n"
            "    title        = {{Safety Alignment Should Be Made More Than Just a Few Tokens Deep}},\n"
            "    author       = {Xiangyu Qi and Ashwinee Panda and Kaifeng Lyu and Xiao Ma and Subhrajit Roy and "
            "Ahmad Beirami and Prateek Mittal and Peter Henderson},\n"
            "    year         = 2025,\n"
            "    booktitle    = {International Conference on Learning Representations},\n"
            "}"
        ),
    }

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
        args = as_config(args, model)
        if safety_dataset is None and args.safety_dataset_name is not None:
            safety_dataset = load_triplets(args.safety_dataset_name)
        self._constrains = args.constrain != "none"
        if self._constrains and kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "The constrained loss cannot be right here: `compute_loss_func` takes its own loss from full logits. "
                "Leave it out, or set `constrain='none'`."
            )
        mixes = safety_dataset is not None or args.rehearse_refusals
        if mixes and not args.packing and args.train_sampling_strategy != "random":
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
        self._triplets_to_pack = safety_dataset if args.packing else None
        super().__init__(model, args, *positional, **kwargs)

        if args.disable_dropout and (self._constrains or mixes):
            disable_dropout(self.model)
        triplets = []  # what may be wrong with them shows before the reference is computed
        if safety_dataset is not None and not args.packing:
            triplets = list(tokenize_triplets(safety_dataset, self._tokenizer, max_length=args.max_length))
        self.reference = choose_reference(self, ref_model) if self._constrains else None
        if self._constrains:
            self._set_up_constraint(ref_model)
        if mixes and not args.packing:
            mix_in_recovery_rows(self, triplets)

    @override
    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
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
        args: DeepSafetySFTConfig = self.args
        check_labels(self)
        window = Window(
            args.window_start,
            template_ids(self._tokenizer) if args.window_start != "completion" else frozenset(),
            end_of_thinking_id(self._tokenizer, args),
            args.num_initial_tokens if self.reference == "window" else None,
        )
        stored = self.reference in ("precompute", "window")
        self.data_collator = ConstrainedCollator(self.data_collator, window, stored)
        if self.reference == "frozen":
            self._ref_model = freeze_reference(self, ref_model)
        if args.constrain == "refused":
            self._map_datasets(self._mark_refused)
            if self.beta_schedule is None:
                self._warn_of_a_weak_constraint()
        if stored:
            self._map_datasets(functools.partial(self._score, window=window, keep=True))

    def _warn_of_a_weak_constraint(self) -> None:
        every = self.train_dataset
        rows = every.select([i for i, marks in enumerate(every[CONSTRAIN]) if any(marks)])
        if not len(rows):
            logger.warning(
                "The reference refuses no prompt of the %d training rows, by the English cues of `RefusalJudge`: "
                "nothing is constrained, this is plain SFT. Mark rows in a boolean column `constrain` and set "
                "`constrain='all'`.",
                len(every),
            )
            return
        rows = rows.map(
            lambda row: {
                "labels": [t if mark else -100 for t, mark in zip(row["labels"], row[CONSTRAIN], strict=True)]
            }
        )
        first_token = dataclasses.replace(self.data_collator.window, stored_tokens=1)
        scored = self._score(rows, "refused rows' first tokens", window=first_token, keep=False)[REF_LOGPS]
        logger.info("The reference refuses the prompts of %d of %d training rows.", len(rows), len(every))
        loss, beta = -statistics.mean(value for values in scored for value in values), self.args.beta_first
        if beta * loss < STRONG_CONSTRAINT:
            logger.warning(
                "On the %d prompts it refuses, the reference finds the first token of the training answers only %.1f "
                "nats unlikely. `beta_first=%s` gives way by ln(1 + 2 β r t) / β nats, so refusals may be lost; set "
                "`beta_first=%.1f`.",
                *(len(rows), loss, beta, STRONG_CONSTRAINT / max(loss, 0.1)),
            )

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
                " `with_transform` and images do not allow. Mark rows in a boolean column `constrain` yourself "
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
        if not self._constrains:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
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
            outputs.log_probs = torch.where(mask, -losses, 0.0)
        return outputs

    def _betas(self, positions: torch.Tensor) -> torch.Tensor:
        args: DeepSafetySFTConfig = self.args
        if self.beta_schedule is not None:
            betas = self.beta_schedule(positions).to(torch.float32)
        else:
            betas = schedule_betas(
                positions, args.beta_first, args.beta_initial, args.beta_rest, args.num_initial_tokens
            )
        window: Window = self.data_collator.window
        return torch.where(window.stored(positions), betas, 0.0)

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
