"""TRL's SFT with what keeps an alignment."""

from typing import Any, ClassVar

from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTTrainer

from .arguments import as_config
from .mixin import DeepSafetyMixin


class DeepSafetySFTTrainer(DeepSafetyMixin, SFTTrainer):
    """
    [`~trl.SFTTrainer`] with [`DeepSafetyMixin`]: its loss keeps the first tokens of every answer near the model it
    starts from, and it can mix safety-recovery rows into every step.

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
        **kwargs: Any,
    ) -> None:
        super().__init__(model, as_config(args, model), *positional, **kwargs)
