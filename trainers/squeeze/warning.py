"""A warning when a preference training loses the chosen answers, and a callback that acts on it."""

import logging
import math
import re
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


logger = logging.getLogger(__name__)

ACTIONS = ("warn", "stop", "lower_lr")
# "probe/", with several probe sets "{name}_probe/"; in an evaluation "eval_squeeze/" or "eval_{split}_squeeze/".
# Training batches are not compared: each is another one.
_CHOSEN = re.compile(r"(?:(.*probe)/chosen/logp|(eval_(?:.+_)?)squeeze/logp_tok_chosen)")


@dataclass
class SqueezeMonitor:
    """
    Reads logs one at a time and says whether the chosen answers are being lost: they lie `delta` below the highest
    they have been, for `patience` evaluations in a row. Only answers that are scored again and again can tell: probe
    sets (`probe/chosen/logp`) and evaluation sets (`eval_squeeze/logp_tok_chosen`), each of which is judged alone.

    The rule and its numbers are not the paper's (https://huggingface.co/papers/2407.10490); how often it is right
    stands in docs/squeeze_theory.md.

    Args:
        delta (`float`, *optional*, defaults to `0.1`):
            In nats per token.
        patience (`int`, *optional*, defaults to `2`):
            Evaluations in a row.

    Attributes:
        sets (`dict[str, dict[int, float]]`): of each set the chosen answers' log-probability, nats per token, by step.
        alarms (`dict[str, int]`): the sets whose chosen answers are lost, and the step at which that was seen.

    Raises:
        `ValueError`: when an option lies outside of its range.
    """

    delta: float = 0.1
    patience: int = 2
    sets: dict[str, dict[int, float]] = field(default_factory=dict, init=False)
    alarms: dict[str, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise ValueError(f"delta must be above 0 nats per token, got {self.delta}. For example `delta=0.1`.")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}. For example `patience=2`.")

    def update(self, logs: dict[str, Any], step: int | None = None) -> list[str]:
        """
        Take in one entry of a log history.

        Args:
            logs (`dict`):
                What was logged; entries about something else are let pass.
            step (`int`, *optional*):
                Of the entry, its `"step"` if not given. An entry of an earlier step than the last replaces what came
                after it, as when training is resumed.

        Returns:
            `list[str]`: the sets whose chosen answers are lost as of this entry.

        Raises:
            `ValueError`: when a log-probability is not finite.
        """
        lost = []
        for key, value in logs.items():
            match = _CHOSEN.fullmatch(key)
            if match is None:
                continue
            name = match[1] or match[2].rstrip("_")
            values = self.sets.setdefault(name, {})
            at = logs.get("step", len(values)) if step is None else step
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(
                    f"Log-probabilities should be finite, `{key}` at step {at} is {value}. Drop empty answers; if the "
                    "weights have diverged, lower `learning_rate`."
                )
            for later in [known for known in values if known >= at]:
                del values[later]
            if self.alarms.get(name, at) > at:
                del self.alarms[name]
            values[at] = float(value)
            recent = [*values.values()][-self.patience :]
            highest = max([*values.values()][: -self.patience], default=-math.inf)
            if name not in self.alarms and max(recent) <= highest - self.delta:
                self.alarms[name] = at
                lost.append(name)
        return lost


class SqueezeStoppingCallback(TrainerCallback):
    """
    Warns when the chosen answers are being lost, and may act: by what [`SqueezeProbeCallback`] logs in any trainer, or
    a trainer with [`SqueezeMixin`] in its evaluations. `monitor` holds the [`SqueezeMonitor`].

    Unlike [`~transformers.EarlyStoppingCallback`] it goes by the likelihood of answers instead of
    `metric_for_best_model`. How often it is right, and whether acting helps: docs/squeeze_theory.md.

    Args:
        action (`str`, *optional*, defaults to `"warn"`):
            `"warn"`: log a warning and nothing else. `"stop"`: end training. `"lower_lr"`: multiply the learning rate,
            now and in the rest of the schedule, by `lr_factor`, once.
        lr_factor (`float`, *optional*, defaults to `0.1`):
            For `"lower_lr"`.
        rule (*optional*):
            Options of [`SqueezeMonitor`].

    Raises:
        `ValueError`: when an option lies outside of its range; before the first step, when there are neither probes
            nor evaluations to go by.
    """

    def __init__(self, action: str = "warn", lr_factor: float = 0.1, **rule: Any) -> None:
        if action not in ACTIONS:
            raise ValueError(f"action must be one of {', '.join(ACTIONS)}, got {action!r}.")
        if not 0 < lr_factor < 1:
            raise ValueError(f"lr_factor must be in (0, 1), got {lr_factor}. For example `lr_factor=0.1`.")
        self.action, self.lr_factor, self.rule = action, lr_factor, rule
        self.monitor = SqueezeMonitor(**rule)
        self._acted = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.monitor = SqueezeMonitor(**self.rule)
        for entry in state.log_history:  # of a run that is resumed, and of probes that began before this callback
            self.monitor.update(entry)
        self._acted = bool(self.monitor.alarms)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        evaluates = args.eval_strategy != "no" and getattr(args, "squeeze_metrics", "off") != "off"
        if not self.monitor.sets and not evaluates:  # probes have been scored by now
            raise ValueError(
                "SqueezeStoppingCallback goes by chosen answers that are scored again and again, but there are none. "
                "Add `SqueezeProbeCallback(build_probe_set(held_out_pairs), trainer=trainer)`, or evaluate: "
                "`SqueezeDPOTrainer` with an `eval_dataset` and `eval_strategy='steps'`."
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        lost = self.monitor.update(logs or {}, state.global_step)
        for name in lost if state.is_world_process_zero else ():
            values = self.monitor.sets[name]
            now, highest = values[state.global_step], max(values.values())
            logger.warning(
                f"Squeezing at step {state.global_step}: the chosen answers of {name!r} are at {now:.3f} nats a "
                f"token, {highest - now:.3f} below their highest."
            )
        if not lost or self._acted:
            return
        self._acted = True
        if self.action == "stop":
            control.should_training_stop = True
        elif self.action == "lower_lr":
            for group in optimizer.param_groups:
                group["lr"] *= self.lr_factor
            schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)  # inside of accelerate's
            if hasattr(schedule, "base_lrs"):
                schedule.base_lrs = [rate * self.lr_factor for rate in schedule.base_lrs]
