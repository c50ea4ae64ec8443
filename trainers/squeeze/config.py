"""Options of `SqueezeDPOTrainer` and of other trainers that watch themselves."""

from dataclasses import dataclass, field

from trl import DPOConfig

from hf_iclr.untrusted import check_field_types


SQUEEZE_METRICS = ("off", "default", "full")


@dataclass
class SqueezeOptions:
    r"""
    What a trainer with [`SqueezeMixin`] measures. Nothing here changes a loss or its gradient.

    Put it in front of any configuration of TRL: `class MyConfig(SqueezeOptions, KTOConfig)`, under `@dataclass`.

    Args:
        squeeze_metrics (`str`, *optional*, defaults to `"default"`):
            `"off"`: none. `"default"`: six keys that the fused head of TRL tells for free. `"full"`: all of them, and
            the exact argmax mass every `argmax_every` steps and in every evaluation.
        argmax_every (`int`, *optional*, defaults to `10`):
            Optimiser steps between two measurements of the argmax mass. The mean since the last log is logged.
        probe_every (`int`, *optional*, defaults to `25`):
            Least optimiser steps between two passes over `probe_dataset`; 25 is how often the authors' code evaluates.
        probe_budget (`float`, *optional*, defaults to `0.05`):
            Share of the run's time that all passes together may take, in (0, 1]; a longer interval, a multiple of
            `probe_every`, is chosen where they would take more. 1.0: a pass every `probe_every` steps.

    Raises:
        `ValueError`: when an option lies outside of its range.
    """

    squeeze_metrics: str = field(
        default="default",
        metadata={
            "help": "What to log: 'off', 'default' (six keys) or 'full' (all, also the argmax mass).",
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

    def __post_init__(self) -> None:
        check_field_types(self, SqueezeOptions)
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
        super().__post_init__()  # type: ignore[misc]  # of the configuration behind it


@dataclass
class SqueezeDPOConfig(SqueezeOptions, DPOConfig):
    r"""
    [`~trl.DPOConfig`] and what [`SqueezeDPOTrainer`] measures, see
    [`~hf_iclr.trainers.squeeze.config.SqueezeOptions`]; nothing here changes the loss or its gradient.

    Args:
        kwargs:
            Options of [`~trl.DPOConfig`] and of [`~hf_iclr.trainers.squeeze.config.SqueezeOptions`].
    """
