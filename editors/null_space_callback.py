"""Fine-tuning that leaves alone what down-projections do to text of one kind."""

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

from .alpha_edit.closed_form import PAPERS_THRESHOLD, null_space_rule
from .alpha_edit.statistics import KeyStatistics


logger = logging.getLogger(__name__)


def project_weight(weight: torch.Tensor, preserved: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """
    The weight nearest to `weight` that maps the preserved directions U to `kept`:

        W - (W U - W_old U) U^T = W_old + (W - W_old) P,  P = I - U U^T,

    whenever `kept` = W_old U. This is the projection of https://huggingface.co/papers/2410.02355 put on an update of
    any origin. Because `kept` is a constant, rounding does not add up over steps. Shapes are `(o, d)`, `(d, m)` with
    orthonormal columns, and `(o, m)`.
    """
    return weight - (weight @ preserved - kept) @ preserved.T


@dataclass
class _Target:
    """One trained weight of shape `(o, d)`, or its transpose, with U and what U is to be mapped to."""

    parameter: torch.nn.Parameter
    transposed: bool
    preserved: torch.Tensor
    kept: torch.Tensor

    def project(self) -> None:
        stored = self.parameter.detach()
        weight = (stored.T if self.transposed else stored).to(self.kept.dtype)
        weight = project_weight(weight, self.preserved, self.kept)
        stored.copy_(weight.T if self.transposed else weight)


class NullSpaceCallback(TrainerCallback):
    """
    Projects every update of chosen down-projections onto the null space of key statistics, in any trainer: the same
    constraint that [`AlphaEditor`] puts on edits, during SFT, DPO or plain training. What a layer returns for the
    preserved directions stays as it was, and the optimizer never knows.

    Full weights are projected as W_old + (W - W_old) P. Of LoRA's B A the factor A is projected, so that the adapter
    is B A P; this already happens before the first step, where B is zero. Everything else that is trained moves
    freely: for the full effect train the chosen down-projections alone. Weights in bfloat16 keep their outputs to
    bfloat16's precision.

    Args:
        statistics ([`KeyStatistics`]):
            Of the model as it is when training begins, over text of the kind to be preserved.
        layers (`list[int]`, *optional*):
            Layers to project; left out, all of the statistics.
        nullspace_threshold (`float`, *optional*):
            Preserve the directions whose second moment is at least this; the paper's 2e-2 when no rule is given.
        nullspace_energy (`float`, *optional*):
            Preserve the fewest directions with this share of the second moment's trace.
        nullspace_rank (`int`, *optional*):
            Preserve so many directions; 0 directions change nothing.

    Raises:
        ValueError: when several rules are given or a layer has no statistics. When training begins: when the
            statistics are of another model, no chosen weight is trained, an adapter is not a plain LoRA or already
            moves preserved outputs, or the weights are sharded (FSDP, DeepSpeed).

    Example:

    ```python
    >>> statistics = KeyStatistics.from_dataset(model, tokenizer, general_text)
    >>> trainer = SFTTrainer(
    ...     model, args, train_dataset=rows, callbacks=[NullSpaceCallback(statistics)]
    ... )
    ```
    """

    def __init__(
        self,
        statistics: KeyStatistics,
        layers: Sequence[int] | None = None,
        *,
        nullspace_threshold: float | None = None,
        nullspace_energy: float | None = None,
        nullspace_rank: int | None = None,
    ):
        self.rule = null_space_rule(nullspace_threshold, nullspace_energy, nullspace_rank, PAPERS_THRESHOLD)
        if not isinstance(statistics, KeyStatistics):
            raise TypeError(
                f"Expected KeyStatistics, got {type(statistics).__name__}: {statistics!r:.80}. Collect or load them: "
                "`KeyStatistics.from_dataset(model, tokenizer, dataset)`, `KeyStatistics.from_pretrained(folder)`."
            )
        self.statistics = statistics
        self.layers = statistics.layers if layers is None else layers
        if not isinstance(self.layers, Collection) or not self.layers or not {*self.layers} <= {*statistics.layers}:
            raise ValueError(f"Expected layers among {statistics.layers}, those of the statistics, got {layers}.")
        self.layers = sorted({*self.layers})
        self._targets: list[_Target] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ):
        if getattr(args, "deepspeed", None):
            raise ValueError(
                "Expected weights that each process holds whole, got DeepSpeed, which keeps and writes back copies of "
                "its own. Train with DDP."
            )
        if isinstance(model, PeftModel) or state.global_step == 0:
            self.statistics.check_model(model)
        if isinstance(model, PeftModel):
            model = model.get_base_model()
        self._targets = [target for layer in self.layers for target in self._find_targets(model, layer)]
        if not self._targets:
            names = [self.statistics.module_names[layer] for layer in self.layers]
            raise ValueError(
                f"Expected a trained weight among {names}, got none. Set `requires_grad` of one, or let LoRA target "
                f"it: `LoraConfig(target_modules={[names[0].rpartition('.')[2]]!r})`."
            )
        chosen = tuple(f"{self.statistics.module_names[layer]}." for layer in self.layers)
        free = [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not (name.startswith(chosen) and name.endswith(".weight"))
        ]
        if free:
            logger.warning(
                "%d trained parameters besides the projected ones move freely, the first is %s: only the weights of "
                "the down-projections of layers %s keep what they return.",
                len(free),
                free[0],
                self.layers,
            )
        self._project()

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._project()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._targets = []

    @torch.no_grad()
    def _project(self) -> None:
        for target in self._targets:
            target.project()

    @torch.no_grad()
    def _find_targets(self, model: Any, layer: int) -> Iterator[_Target]:
        name = self.statistics.module_names[layer]
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"Expected a model with the module {name!r}, to which the statistics of "
                f"{self.statistics.model_name!r} belong, got {type(model).__name__} without it. Collect statistics of "
                "this model."
            ) from None
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        trained = [(base.weight, isinstance(base, Conv1D), False)]
        if isinstance(module, BaseTunerLayer):
            if not isinstance(module, LoraLayer) or module.use_dora and any(module.use_dora.values()):
                raise ValueError(
                    f"Expected a plain LoRA adapter at {name!r}, got {type(module).__module__}."
                    f"{type(module).__name__} whose update is not B A. Use `LoraConfig(use_dora=False)`."
                )
            trained += [(factor.weight, False, True) for factor in module.lora_A.values()]
        trained = [entry for entry in trained if entry[0].requires_grad]
        preserved = self.statistics.preserved(layer, *self.rule) if trained else torch.empty(0)
        for parameter, transposed, is_factor in trained:
            inputs = parameter.shape[0 if transposed else -1] if parameter.ndim == 2 else 0
            if isinstance(parameter, DTensor) or inputs != len(preserved):
                raise ValueError(
                    f"Expected a whole weight of {len(preserved)} inputs at {name!r}, got {type(parameter).__name__} "
                    f"of shape {tuple(parameter.shape)}. Weights sharded by FSDP or ZeRO cannot be projected: use DDP."
                )
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            basis = preserved.to(parameter.device, dtype)
            kept = (parameter.T if transposed else parameter).to(dtype) @ basis
            if is_factor:
                moves = any(factor.weight.any() for factor in module.lora_B.values())
                if moves and kept.norm() > 1e-3 * parameter.norm():
                    raise ValueError(
                        f"Expected a new adapter, or one trained with this callback, got one at {name!r} that already "
                        "moves preserved outputs. Merge it first: `model.merge_and_unload()`."
                    )
                kept.zero_()
            yield _Target(parameter, transposed, basis, kept)
