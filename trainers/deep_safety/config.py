"""Settings of [`DeepSafetySFTTrainer`] and of other trainers that keep refusals."""

from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from hf_iclr.untrusted import check_field_types

from .constrained_loss import WINDOW_STARTS


REFERENCES = ("auto", "adapter", "frozen", "precompute", "window")
CONSTRAIN = ("all", "refused", "none")


@dataclass
class DeepSafetyOptions:
    """
    What a trainer with [`DeepSafetyMixin`] does, by both methods of https://huggingface.co/papers/2406.05946. Defaults
    are the paper's. A trainer whose arguments have no such fields takes those of its `safety_options`.

    Args:
        constrain (`str`, *optional*, defaults to `"all"`):
            Which answers get the constrained loss: `"all"`, `"refused"` (those to turns that the reference refuses, by
            one short greedy answer to each before training) or `"none"`. The others get plain cross-entropy, as do
            rows with a column `constrain` that is `False`, whose prompts are not rehearsed either.
        rehearse_refusals (`bool`, *optional*, defaults to `False`):
            With `constrain="refused"`: mix the reference's own refusals of those prompts into every step, a share
            `safety_ratio` of its rows. The constraint only weakens a push; these rows pull back.
        beta_first (`float`, *optional*, defaults to `0.5`):
            Strength β₁ at the first token of an answer. Larger keeps the token closer to the reference.
        beta_initial (`float`, *optional*, defaults to `2.0`):
            Strength at tokens 2 to `num_initial_tokens`.
        beta_rest (`float`, *optional*, defaults to `0.1`):
            Strength at all later tokens. Not used with `reference="window"`: later tokens get plain cross-entropy
            then.
        num_initial_tokens (`int`, *optional*, defaults to `5`):
            Length of the protected window in tokens.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Train without dropout wherever one of the two methods is used, as the paper and TRL's DPO do. The reference
            has none, so with dropout the weights of the loss would not begin at 1.
        reference (`str`, *optional*, defaults to `"auto"`):
            Where the reference log-probabilities come from. `"adapter"`: the PEFT model without its adapter, one more
            forward a step. `"frozen"`: a frozen copy of the model, one more forward a step. `"precompute"`: computed
            once before training, 4 bytes a loss token. `"window"`: computed once for the window only, 20 bytes a row.
            `"auto"`: `"adapter"` for a PEFT model, `"frozen"` where nothing can be precomputed (streamed data, images,
            FSDP), else `"precompute"`.
        window_start (`str`, *optional*, defaults to `"completion"`):
            Where the window starts in an answer: `"completion"`, `"after_template"` (skips leading special and blank
            tokens), `"answer"` (after the thinking) or `"thinking_and_answer"` (one window at each).
        end_of_thinking (`str`, *optional*, defaults to `"</think>"`):
            The token that ends the thinking.
        safety_dataset_name (`str`, *optional*):
            Triplets for the recovery data where the trainer gets no `safety_dataset`: a dataset on the Hub, a folder,
            or a JSON, CSV or Parquet file.
        safety_ratio (`float`, *optional*, defaults to `0.2`):
            Share of recovery rows in every step (α of equation 2).
        recovery_probability (`float`, *optional*, defaults to `0.5`):
            Probability p that a recovery row starts inside a harmful answer.
        max_prefix_tokens (`int`, *optional*, defaults to `100`):
            Longest such start C, in tokens.
    """

    constrain: str = field(
        default="all", metadata={"help": "Rows that get the constrained loss.", "choices": list(CONSTRAIN)}
    )
    rehearse_refusals: bool = field(
        default=False, metadata={"help": "Mix the reference's own refusals of training prompts into every step."}
    )
    beta_first: float = field(default=0.5, metadata={"help": "Strength at the first answer token."})
    beta_initial: float = field(default=2.0, metadata={"help": "Strength at the other initial answer tokens."})
    beta_rest: float = field(default=0.1, metadata={"help": "Strength at all later answer tokens."})
    num_initial_tokens: int = field(default=5, metadata={"help": "Length of the protected window in tokens."})
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout, as the reference runs."})
    reference: str = field(
        default="auto", metadata={"help": "Where reference log-probs come from.", "choices": list(REFERENCES)}
    )
    window_start: str = field(
        default="completion", metadata={"help": "Where the window starts.", "choices": list(WINDOW_STARTS)}
    )
    end_of_thinking: str = field(default="</think>", metadata={"help": "The token that ends the thinking."})
    safety_dataset_name: str | None = field(
        default=None, metadata={"help": "Hub name, folder or file of triplets (prompt, harmful, refusal)."}
    )
    safety_ratio: float = field(default=0.2, metadata={"help": "Share of recovery rows in every step."})
    recovery_probability: float = field(
        default=0.5, metadata={"help": "Probability that a recovery row starts inside a harmful answer."}
    )
    max_prefix_tokens: int = field(default=100, metadata={"help": "Longest such start in tokens."})

    def __post_init__(self) -> None:
        betas = (self.beta_first, self.beta_initial, self.beta_rest)
        if not all(isinstance(beta, (int, float)) and 0 < beta < 1e30 for beta in betas):  # float32 holds them
            raise ValueError(
                f"Expected every beta to be positive and finite, got beta_first={self.beta_first}, "
                f"beta_initial={self.beta_initial}, beta_rest={self.beta_rest}. To leave later tokens free set "
                '`reference="window"`; to leave the loss alone set `constrain="none"`.'
            )
        check_field_types(self, DeepSafetyOptions)
        for name, allowed in (("constrain", CONSTRAIN), ("reference", REFERENCES), ("window_start", WINDOW_STARTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Expected `{name}` to be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if self.num_initial_tokens < 1:
            raise ValueError(f"Expected `num_initial_tokens` of at least 1, got {self.num_initial_tokens}.")
        if self.rehearse_refusals and self.constrain != "refused":
            raise ValueError(
                f"`rehearse_refusals=True` takes the refusals that `constrain='refused'` finds, got "
                f"constrain={self.constrain!r}. Set `constrain='refused'`, or pass a `safety_dataset`."
            )
        if not 0 < self.safety_ratio < 1:
            raise ValueError(
                f"Expected `safety_ratio` between 0 and 1, got {self.safety_ratio}. The paper's value is 0.2."
            )
        if not 0 <= self.recovery_probability <= 1 or self.max_prefix_tokens < 1:
            raise ValueError(
                "Expected `recovery_probability` from 0 to 1 and `max_prefix_tokens` of at least 1, got "
                f"{self.recovery_probability} and {self.max_prefix_tokens}. The paper's values are 0.5 and 100."
            )


@dataclass
class DeepSafetySFTConfig(DeepSafetyOptions, SFTConfig):
    """
    [`~trl.SFTConfig`] and [`~hf_iclr.trainers.deep_safety.config.DeepSafetyOptions`]. Defaults are the paper's, also
    where they differ from TRL's: Adam's beta1 is 0.5 and the learning rate warms up for 10 steps.

    Args:
        kwargs:
            Options of [`~trl.SFTConfig`] and of [`~hf_iclr.trainers.deep_safety.config.DeepSafetyOptions`].
    """

    adam_beta1: float = field(default=0.5, metadata={"help": "The beta1 hyperparameter of Adam; the paper's 0.5."})
    warmup_steps: float = field(
        default=10, metadata={"help": "Steps, or share of all steps below 1, of linear warm-up; the paper's 10."}
    )

    def __post_init__(self) -> None:
        for name in ("max_length", "per_device_train_batch_size", "gradient_accumulation_steps"):
            size = getattr(self, name)
            if isinstance(size, int) and size < 1:
                raise ValueError(f"Expected `{name}` of at least 1, got {size}.")
        SFTConfig.__post_init__(self)
        DeepSafetyOptions.__post_init__(self)
        check_constrained(self)


def check_constrained(args: Any) -> None:
    """Raises `ValueError` where the constrained loss could not be right with these arguments of a trainer."""
    packing = getattr(args, "packing", False)  # which only TRL's arguments have
    reason = None
    if getattr(args, "loss_type", "nll") == "dft":
        reason = "`loss_type='dft'` multiplies the log-probabilities this loss rewrites. Set `loss_type='nll'`"
    elif args.label_smoothing_factor > 0:
        reason = "`label_smoothing_factor` takes its loss from full logits. Set it to 0"
    elif packing and args.constrain == "refused":
        reason = "`constrain='refused'` answers every prompt first, and packed rows have none. Set `packing=False`"
    elif packing and args.packing_strategy != "bfd":
        reason = (
            f"`packing_strategy={args.packing_strategy!r}` cuts answers in the middle, where their positions "
            "would start again at 1. Set `packing_strategy='bfd'`"
        )
    elif getattr(args, "truncation_mode", "keep_start") == "keep_end":
        reason = "`truncation_mode='keep_end'` cuts off the start of an answer. Set `truncation_mode='keep_start'`"
    if reason and args.constrain != "none":
        raise ValueError(f"The constrained loss cannot be right here: {reason}, or `constrain='none'`.")
