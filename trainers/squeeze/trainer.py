"""`SqueezeDPOTrainer`: TRL's DPO, logging where probability mass goes; the same for its kin by `SqueezeMixin`."""

import dataclasses
import inspect
import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import DPOConfig, DPOTrainer
from trl.trainer import add_fused_lm_head

from hf_iclr.models import FusedOutputsProxy
from hf_iclr.trainers.measuring import SummedMetrics, rows_of_this_process

from .argmax import HiddenStateTap, exact_argmax, from_logits
from .config import SqueezeDPOConfig, SqueezeOptions
from .metrics import DEFAULT_METRICS, batch_sums, metrics_from_sums
from .rows import check_answers


if TYPE_CHECKING:
    from peft import PeftModel
    from trl.trainer.utils import FusedCausalLMOutput

logger = logging.getLogger(__name__)


class SqueezeMixin(SummedMetrics):
    """
    Goes in front of a preference trainer of TRL, which then logs the squeezing effect: how likely, how peaked and how
    far in a valley the chosen and rejected answers are, and what the loss does about it. Loss, gradients and weights
    are bit for bit those of the parent.

    ```python
    class SqueezeKTOTrainer(SqueezeMixin, KTOTrainer): ...
    ```

    | trainer | chosen and rejected are |
    |---|---|
    | `DPOTrainer`, `CPOTrainer` (which has SimPO), `ORPOTrainer` | the two answers of a pair |
    | `KTOTrainer` | the answers with a true and with a false label |
    | `GRPOTrainer` | the samples with a positive and with a negative advantage; at the sampling temperature |
    | any other | nothing at every step; probes and the report are there all the same |

    The keys `squeeze/...` (see [`~hf_iclr.trainers.squeeze.metrics.token_quantities`] and
    [`~hf_iclr.trainers.squeeze.metrics.metrics_from_sums`]) appear in the logs, in what `evaluate()` returns, once per
    split as `eval_{split}_squeeze/...`, and may be used as `metric_for_best_model`. They are means over all tokens or
    answers since the last log and over all processes, which costs one collective per log. `squeeze/force` is that of
    DPO and KTO, and the shares below the reference are logged where the trainer has a reference model at hand.

    Args:
        args, kwargs:
            All that the trainer takes. Its configuration may have [`~hf_iclr.trainers.squeeze.config.SqueezeOptions`];
            without, they have their defaults.
        probe_dataset (`Dataset` or `dict[str, Dataset]`, *optional*):
            Answers to watch during training, see [`SqueezeProbeCallback`].

    Raises:
        `ValueError`: when an answer of a pair is empty, or, at the next log, when a log-probability is not finite.
    """

    ref_model: Any  # what the trainers of TRL have
    precompute_ref_logps: bool
    ld_alpha: float | None
    is_encoder_decoder: bool
    get_batch_logps: Callable[..., torch.Tensor]

    def __init__(self, *args: Any, probe_dataset: Dataset | dict[str, Dataset] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for field in dataclasses.fields(SqueezeOptions):
            if not hasattr(self.args, field.name):
                setattr(self.args, field.name, field.default)
        self._base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        self.sums = {}
        if self.args.squeeze_metrics != "off":
            if hasattr(self, "get_batch_logps"):  # CPO and ORPO build the logits
                self.get_batch_logps = partial(self._add_logits, self.get_batch_logps)
            elif "fused_lm_head" in inspect.signature(self._base.forward, follow_wrapped=False).parameters:
                add_fused_lm_head(
                    self._base,
                    temperature=getattr(self, "temperature", 1.0),  # GRPO has these two
                    cast_lm_head_to_fp32=getattr(self.args, "cast_lm_head_to_fp32", False),
                    outputs=("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"),
                )
        if probe_dataset is not None:
            from .probes import SqueezeProbeCallback

            self.add_callback(
                SqueezeProbeCallback(
                    probe_dataset, trainer=self, every=self.args.probe_every, probe_budget=self.args.probe_budget
                )
            )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        known = isinstance(self, DPOTrainer) or "label" in inputs or "advantages" in inputs
        if self.args.squeeze_metrics == "off" or not known:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        seen: dict[str, Any] = {}
        training = torch.is_grad_enabled()
        if self._argmax_is_due:
            seen["tap"] = HiddenStateTap(self._base)
        reference = self.model if self.ref_model is None else self.ref_model
        with torch.enable_grad(), ExitStack() as stack:
            stack.callback(reference.register_forward_hook(partial(_keep_log_probs, seen)).remove)
            # In an evaluation only the model runs without a graph: that of the loss tells the force on each token.
            proxy = FusedOutputsProxy(model, partial(self._rewrite, seen, stack), graph=training)
            result = super().compute_loss(proxy, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if "outputs" in seen:  # a loss of one's own may do without the fused head
            self._add_batch(seen, inputs, loss)
        loss = loss if training else loss.detach()
        return (loss, result[1]) if return_outputs else loss

    @property
    def _argmax_is_due(self) -> bool:
        return self.args.squeeze_metrics == "full" and (
            not self.model.training or self.state.global_step % self.args.argmax_every == 0
        )

    def _rewrite(
        self, seen: dict[str, Any], stack: ExitStack, outputs: "FusedCausalLMOutput", kwargs: dict[str, Any]
    ) -> "FusedCausalLMOutput":
        """Note the policy's outputs, and hand TRL log-probabilities to which a gradient can be asked for."""
        if not torch.is_grad_enabled():  # KTO's estimate of a KL divergence
            return outputs
        seen.update(outputs=outputs, labels=kwargs["labels"].to(outputs.log_probs.device))
        if "tap" in seen:
            seen["hidden_states"] = seen.pop("tap").pop()
        # Activation offloading hands out a saved tensor once, but the loss's own few are read twice: keep it off them.
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved))
        # A node of its own: asking for its gradient runs none of the hooks FSDP leaves on outputs of the model.
        log_probs = outputs.log_probs
        seen["log_probs"] = log_probs.view_as(log_probs) if log_probs.requires_grad else log_probs.requires_grad_()
        return type(outputs)(**{**outputs, "log_probs": seen["log_probs"]})

    def _add_batch(self, seen: dict[str, Any], inputs: dict[str, Any], loss: torch.Tensor) -> None:
        labels, length = seen["labels"], seen["labels"].size(1) - 1
        sides = gradients = argmax = reference_logps = None
        if "advantages" in inputs:
            advantages = inputs["advantages"]
            sides = advantages if advantages.dim() == 1 else advantages.sum(1)
            if "tool_mask" in inputs:  # what tools wrote is no answer
                mask = inputs["tool_mask"]
                labels = labels.clone()
                labels[:, -mask.size(1) :].masked_fill_(mask == 0, -100)
        else:
            if "label" in inputs:
                sides = torch.as_tensor(inputs["label"], device=labels.device).long() * 2 - 1
            if loss.requires_grad:  # a loss of one's own may have no graph, or none that leads here
                (gradients,) = torch.autograd.grad(
                    loss, seen["log_probs"], retain_graph=True, allow_unused=True, materialize_grads=True
                )
                gradients = gradients[:, -length:]
            if not self.precompute_ref_logps:
                reference_logps = seen["reference"][:, -length:].sum(1)
            elif sides is not None:
                reference_logps = inputs["ref_logps"]
            elif self.ld_alpha is None:  # precomputed sums are weighted by it, and cannot be compared
                reference_logps = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        if "hidden_states" in seen:
            hidden_states = seen.pop("hidden_states")[:, :-1][:, -length:] / getattr(self, "temperature", 1.0)
            with self.accelerator.autocast():
                argmax = exact_argmax(self._base, hidden_states, labels[:, 1:])
        rows = len(labels) // (2 if sides is None else 1)
        sums = batch_sums(
            seen["outputs"],
            labels,
            self._base.config.get_text_config().vocab_size,
            log_prob_gradients=gradients,
            reference_logps=reference_logps,
            argmax=argmax,
            sides=sides,
            num_rows=rows_of_this_process(self, rows),
        )
        self.add_sums(sums)

    def _add_logits(
        self, get_batch_logps: Callable[..., torch.Tensor], logits: torch.Tensor, labels: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Count a batch of a trainer that has logits, and go on as it does."""
        if not self.is_encoder_decoder:
            outputs, argmax = from_logits(logits.detach(), labels)
            self.add_sums(
                batch_sums(
                    outputs,
                    labels,
                    logits.size(-1),
                    argmax=argmax if self._argmax_is_due else None,
                    num_rows=rows_of_this_process(self, len(labels) // 2),
                )
            )
        return get_batch_logps(logits, labels, **kwargs)

    def metrics_from(self, sums: torch.Tensor) -> dict[str, float]:
        metrics = metrics_from_sums(sums)
        if self.args.squeeze_metrics == "full":
            return metrics
        return {key: value for key, value in metrics.items() if key.removeprefix("squeeze/") in DEFAULT_METRICS}

    def squeeze_report(self, directory: str | Path, **kwargs: Any) -> Any:
        """
        Write what was logged so far as a report, see [`write_squeeze_report`].

        Args:
            directory (`str` or `Path`):
                Made if it does not exist.
            kwargs:
                Options of [`write_squeeze_report`].
        """
        from .report import write_squeeze_report

        return write_squeeze_report(self.state.log_history, directory, **kwargs)


class SqueezeDPOTrainer(SqueezeMixin, DPOTrainer):
    """
    [`~trl.DPOTrainer`] with [`SqueezeMixin`]: it also logs the squeezing effect. Loss, gradients and weights are bit
    for bit those of the parent, for every loss type.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As in [`~trl.DPOTrainer`].
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            As in [`~trl.DPOTrainer`].
        args ([`SqueezeDPOConfig`], *optional*):
            A plain [`~trl.DPOConfig`] gets the default options.
        kwargs:
            Everything else [`~trl.DPOTrainer`] takes, and `probe_dataset` of [`SqueezeMixin`].

    Raises:
        `ValueError`: when an answer is empty, when no prompt fits into `max_length`, or, at the next log, when a
        log-probability is not finite.
    """

    _tag_names: ClassVar = ["trl", "dpo", "squeeze-dpo"]
    _name = "DPO with squeezing metrics"
    _paper: ClassVar = {
        "title": "Learning Dynamics of LLM Finetuning",
        "id": "2407.10490",
        # docstyle-ignore
        "citation": (
            "@inproceedings{ren2025learning,\n"
            "    title     = {{Learning Dynamics of LLM Finetuning}},\n"
            "    author    = {Yi Ren and Danica J. Sutherland},\n"
            "    year      = 2025,\n"
            "    booktitle = {The Thirteenth International Conference on Learning Representations, {ICLR} 2025},\n"
            "    url       = {https://openreview.net/forum?id=tPNHOoZFl9},\n"
            "}"
        ),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        *positional: Any,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path or ""
            args = SqueezeDPOConfig(f"{name.split('/')[-1]}-SqueezeDPO")
        super().__init__(model, ref_model, args, *positional, **kwargs)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: DPOConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        if isinstance(dataset, Dataset):
            check_answers(dataset, dataset_name)
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(dataset, Dataset) and len(prepared) < len(dataset) and dataset_name != "probes":
            message = (
                f"{len(dataset) - len(prepared)} of {len(dataset)} rows of the {dataset_name} dataset have a prompt "
                f"that alone fills max_length={args.max_length} tokens"
            )
            if not len(prepared):
                raise ValueError(f"{message}, so nothing is left to train on. Raise `max_length`.")
            logger.warning(f"{message}; they are left out. Raise `max_length` to keep them.")
        return prepared


def _keep_log_probs(seen: dict[str, Any], module: torch.nn.Module, args: tuple, output: Any) -> None:
    # With an adapter policy and reference are one module, and the reference runs last.
    if getattr(output, "log_probs", None) is not None:
        seen["reference"] = output.log_probs.detach()
