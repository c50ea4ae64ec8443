"""Early warning of the squeezing effect: a state machine over logged log-probabilities, and a callback that acts."""

import logging
import math
import re
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


logger = logging.getLogger(__name__)

ACTIONS = ("warn", "stop", "lower_lr", "gate")
# "probe/", with several probe sets "{name}_probe/"; "squeeze/", in an evaluation "eval_squeeze/" or "eval_{split}_..."
_CHOSEN = re.compile(r"(?:(.*probe)/chosen/logp|(.*)squeeze/logp_tok_chosen)")


class SqueezeState(IntEnum):
    """How far squeezing has come."""

    OK = 0
    WATCH = 1
    SQUEEZE = 2


@dataclass
class _Track:
    """What one source says, from its start on. Log-probabilities in nats per token."""

    peak_key: str | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    waiting: list[dict[str, float]] = field(default_factory=list)


@dataclass
class SqueezeMonitor:
    """
    Reads logs one at a time and says how far squeezing has come.

    - WATCH: for `patience` evaluations in a row, at least the share `share` of the *other* answers (every probe but
      the chosen one and the frozen greedy one) is `delta` below where it started. Without probes there are no other
      answers, and the peak is compared instead: the most likely token of the chosen answer's contexts has gained
      `delta` on the chosen token.
    - SQUEEZE: on top of that the peak is higher than at the start, and the chosen answer lies `tolerance` below the
      highest it has been.

    A state is left again when its condition no longer holds. The rule and its numbers are not the paper's
    (https://huggingface.co/papers/2407.10490): they were chosen looking at curves its authors published, all of which
    squeeze, so there is no false-alarm rate.

    Of the sources of a log history the best is used: the (first) probe set, `probe/{kind}/logp` and
    `probe/chosen/logp_argmax`; else the first evaluation set, `eval_squeeze/...`; else training batches,
    `squeeze/...`, these averaged over `batch_window` logs because every batch is another one. Where the argmax was
    not measured, `-renyi2_chosen`, a lower bound of its logarithm, stands for the peak.

    Args:
        share (`float`, *optional*, defaults to `0.8`):
            Share of the other answers that must be down.
        delta (`float`, *optional*, defaults to `0.02`):
            In nats per token.
        patience (`int`, *optional*, defaults to `2`):
            Evaluations in a row.
        tolerance (`float`, *optional*, defaults to `0.05`):
            In nats per token.
        batch_window (`int`, *optional*, defaults to `5`):
            Logs of training batches in one mean.

    Raises:
        `ValueError`: when an option lies outside of its range.
    """

    share: float = 0.8
    delta: float = 0.02
    patience: int = 2
    tolerance: float = 0.05
    batch_window: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}. For example `share=0.8`.")
        for name in ("delta", "tolerance"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0 nats per token, got {getattr(self, name)}.")
        for name in ("patience", "batch_window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        self._tracks: dict[str, _Track] = {}

    @property
    def source(self) -> str | None:
        """The source in use: `"probe"`, `"eval_..."`, `""` for training batches, `None` before the first."""
        return min(self._tracks, key=lambda name: (not name.endswith("probe"), not name), default=None)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row per evaluation of the source in use: `step`, `chosen`, `peak`, `share_down`, `state`."""
        return [] if self.source is None else self._tracks[self.source].rows

    @property
    def state(self) -> SqueezeState:
        """After the last evaluation."""
        return self.rows[-1]["state"] if self.rows else SqueezeState.OK

    def update(self, logs: dict[str, Any], step: int | None = None) -> SqueezeState | None:
        """
        Take in one entry of a log history.

        Args:
            logs (`dict`):
                What was logged; entries about something else are let pass.
            step (`int`, *optional*):
                Of the entry, its `"step"` if not given. An entry of an earlier step than the last replaces what came
                after it, as when training is resumed.

        Returns:
            [`SqueezeState`] after this entry, `None` if nothing was learnt from it.

        Raises:
            `ValueError`: when a log-probability is not finite.
        """
        match = next((match for key in logs if (match := _CHOSEN.fullmatch(key))), None)
        if match is None:
            return None
        if match[1] is not None:
            source = match[1]
            ends = len(source) + 1, -len("/logp")
            values = {key[slice(*ends)]: logs[key] for key in logs if key.startswith(source) and key.endswith("/logp")}
            values.pop("initial_greedy", None)  # the old mode: where the mass goes
            keys = [f"{source}/chosen/logp_argmax"]
        else:
            source = match[2]
            values = {"chosen": logs[f"{source}squeeze/logp_tok_chosen"]}
            keys = [f"{source}squeeze/logp_argmax_chosen", f"{source}squeeze/renyi2_chosen"]
        if source not in self._tracks:
            self._tracks[source] = _Track(next((key for key in keys if key in logs), None))
        track = self._tracks[source]
        step = logs.get("step", len(track.rows)) if step is None else step
        if track.peak_key is not None and track.peak_key not in logs:
            return None  # measured only every few steps
        if track.peak_key is not None:
            values["peak"] = logs[track.peak_key] * (-1 if "renyi2" in track.peak_key else 1)
        for name, value in values.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"Log-probabilities should be finite, that of {name!r} at step {step} is {value}. Drop empty "
                    "answers; if the weights have diverged, lower `learning_rate`."
                )
        if source == "":
            track.waiting.append(values)
            if len(track.waiting) < self.batch_window:
                return None
            values = {name: sum(each[name] for each in track.waiting) / len(track.waiting) for name in values}
            track.waiting.clear()
        while track.rows and track.rows[-1]["step"] >= step:
            track.rows.pop()
        self._judge(track.rows, step, values)
        return self.state if source == self.source else None

    def _judge(self, rows: list[dict[str, Any]], step: int, values: dict[str, float]) -> None:
        start = rows[0]["values"] if rows else values
        peak = values.get("peak", math.nan)
        others = [name for name in values if name not in ("chosen", "peak") and name in start]
        if others:
            share_down = sum(values[name] <= start[name] - self.delta for name in others) / len(others)
        else:  # False with a missing peak
            share_down = float(peak - values["chosen"] >= start.get("peak", peak) - start["chosen"] + self.delta)
        row = {
            "step": step,
            "chosen": values["chosen"],
            "peak": peak,
            "share_down": share_down if rows else 0.0,
            "state": SqueezeState.OK,
            "values": values,
        }
        rows.append(row)
        if len(rows) > self.patience and all(each["share_down"] >= self.share for each in rows[-self.patience :]):
            row["state"] = SqueezeState.WATCH
            highest = max(each["chosen"] for each in rows)
            if peak > rows[0]["peak"] and row["chosen"] < highest - self.tolerance:
                row["state"] = SqueezeState.SQUEEZE


class SqueezeStoppingCallback(TrainerCallback):
    """
    Acts when squeezing sets in, on what [`SqueezeDPOTrainer`] and [`SqueezeProbeCallback`] log. Every change to a
    worse state is logged as a warning, whatever the action. `monitor` holds the [`SqueezeMonitor`].

    Unlike [`~transformers.EarlyStoppingCallback`] it needs neither an evaluation set nor `metric_for_best_model`.

    Args:
        action (`str`, *optional*, defaults to `"warn"`):
            `"warn"`: nothing else. `"stop"`: end training. `"lower_lr"`: multiply the learning rate, now and in the
            rest of the schedule, by `lr_factor`. `"gate"`: set `args.pressure_gate` of [`SqueezeDPOTrainer`].
        at (`str`, *optional*, defaults to `"SQUEEZE"`):
            The state at which to act, once: `"WATCH"` or `"SQUEEZE"`.
        lr_factor (`float`, *optional*, defaults to `0.1`):
            For `"lower_lr"`.
        gate (`float`, *optional*, defaults to `10.0`):
            For `"gate"`, see [`SqueezeDPOConfig`].
        rule (*optional*):
            Options of [`SqueezeMonitor`].

    Raises:
        `ValueError`: when an option lies outside of its range, or the trainer has no gate.
    """

    def __init__(
        self, action: str = "warn", at: str = "SQUEEZE", lr_factor: float = 0.1, gate: float = 10.0, **rule: Any
    ) -> None:
        if action not in ACTIONS:
            raise ValueError(f"action must be one of {', '.join(ACTIONS)}, got {action!r}.")
        if at not in ("WATCH", "SQUEEZE"):
            raise ValueError(f"at must be 'WATCH' or 'SQUEEZE', got {at!r}.")
        if not 0 < lr_factor < 1:
            raise ValueError(f"lr_factor must be in (0, 1), got {lr_factor}. For example `lr_factor=0.1`.")
        if not gate > 0:
            raise ValueError(f"gate must be positive, got {gate}. For example `gate=10.0`.")
        self.action, self.at, self.lr_factor, self.gate, self.rule = action, SqueezeState[at], lr_factor, gate, rule
        self.monitor = SqueezeMonitor(**rule)
        self._acted = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.action == "gate" and not hasattr(args, "pressure_gate"):
            raise ValueError("action='gate' needs the gate of `SqueezeDPOTrainer`; elsewhere use `action='lower_lr'`.")
        self.monitor = SqueezeMonitor(**self.rule)
        for entry in state.log_history:  # of a run that is resumed
            self.monitor.update(entry)
        self._acted = any(row["state"] >= self.at for row in self.monitor.rows)
        if self._acted and self.action == "gate":
            args.pressure_gate = self.gate  # unlike the schedule, not kept in a checkpoint

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
        before = self.monitor.state
        now = self.monitor.update(logs or {}, state.global_step)
        if now is None:
            return
        if now > before and state.is_world_process_zero:
            row = self.monitor.rows[-1]
            logger.warning(
                f"{now.name} at step {row['step']}: {row['share_down']:.0%} of what else was watched has lost "
                f"probability; the chosen answers are at {row['chosen']:.3f} nats a token, the peaks of their "
                f"contexts at {row['peak']:.3f}."
            )
        if now < self.at or self._acted:
            return
        self._acted = True
        if self.action == "stop":
            control.should_training_stop = True
        elif self.action == "gate":
            args.pressure_gate = self.gate
        elif self.action == "lower_lr":
            for group in optimizer.param_groups:
                group["lr"] *= self.lr_factor
            schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)  # inside of accelerate's
            if hasattr(schedule, "base_lrs"):
                schedule.base_lrs = [rate * self.lr_factor for rate in schedule.base_lrs]
