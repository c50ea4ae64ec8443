"""Options of `SqueezeDPOTrainer`."""

from dataclasses import dataclass, field

from trl import DPOConfig


SQUEEZE_METRICS = ("off", "default", "full")


@dataclass
class SqueezeDPOConfig(DPOConfig):
    r"""
    [`~trl.DPOConfig`] and what [`SqueezeDPOTrainer`] measures. Nothing here changes the loss, and only `pressure_gate`
    changes its gradient.

    Args:
        squeeze_metrics (`str`, *optional*, defaults to `"default"`):
            `"off"`: none. `"default"`: at every step, what TRL's fused head tells for free. `"full"`: also the exact
            argmax mass, every `argmax_every` steps and in every evaluation.
        argmax_every (`int`, *optional*, defaults to `10`):
            Optimiser steps between two measurements of the argmax mass. The mean since the last log is logged.
        probe_every (`int`, *optional*, defaults to `25`):
            Least optimiser steps between two passes over `probe_dataset`; 25 is how often the authors' code evaluates.
        probe_budget (`float`, *optional*, defaults to `0.05`):
            Share of the run's time that all passes together may take, in (0, 1]; a longer interval, a multiple of
            `probe_every`, is chosen where they would take more. 1.0: a pass every `probe_every` steps.
        pressure_gate (`float`, *optional*):
            Strength of the gate on rejected tokens, per unit of probability: their gradients are scaled by
            `exp(-pressure_gate * max(S, 0))`, S the squeeze pressure; `inf` drops those in a valley. `None`: no gate.
            It is read at every step.
        kwargs:
            Options of [`~trl.DPOConfig`].

    Raises:
        `ValueError`: when an option lies outside of its range.
    """

    squeeze_metrics: str = field(
        default="default",
        metadata={
            "help": "What to measure: 'off', 'default' (every step, nearly free) or 'full' (also the argmax mass).",
            "choices": list(SQUEEZE_METRICS),
        },
    )
    argmax_every: int = field(
        default=10, metadata={"help": "Optimiser steps between two measurements of the argmax mass."}
    )
    probe_every: int = field(
        default=25, metadata={"help": "Least optimiser steps between two passes over the probe dataset."}
    )
    probe_budget: float = field(
        default=0.05,
        metadata={"help": "Share of the run's time that passes over the probe dataset may take; 1.0: no limit."},
    )
    pressure_gate: float | None = field(
        default=None,
        metadata={
            "help": "Scale the gradients of rejected tokens by exp(-pressure_gate * max(S, 0)), S their squeeze "
            "pressure. Off when not set."
        },
    )

    def __post_init__(self) -> None:
        if self.squeeze_metrics not in SQUEEZE_METRICS:
            raise ValueError(
                f"squeeze_metrics must be one of {', '.join(SQUEEZE_METRICS)}, got {self.squeeze_metrics!r}."
            )
        for name in ("argmax_every", "probe_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}. For example `{name}=10`.")
        if not 0 < self.probe_budget <= 1:
            raise ValueError(
                f"probe_budget must be in (0, 1], got {self.probe_budget}. For example `probe_budget=0.05`."
            )
        if self.pressure_gate is not None and not self.pressure_gate >= 0:
            raise ValueError(
                f"pressure_gate must be at least 0, got {self.pressure_gate}. Leave it out for plain DPO; "
                "`pressure_gate=10.0` halves the gradient of a token at a pressure of .07."
            )
        super().__post_init__()
