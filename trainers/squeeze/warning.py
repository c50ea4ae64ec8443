"""A warning when a preference training loses the chosen answers: live, with a callback that acts, and in logs."""

import json
import logging
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


logger = logging.getLogger(__name__)

ACTIONS = ("warn", "stop")
# "probe/", with several probe sets "{name}_probe/"; in an evaluation "eval_squeeze/" or "eval_{split}_squeeze/".
# Training batches are not compared: each is another one.
_CHOSEN = re.compile(r"(?:(.*probe)/chosen/logp|(eval_(?:.+_)?)squeeze/logp_tok_chosen)")
# The log-probability of an answer, summed over its tokens: as TRL evaluates it, and as the paper's authors do.
_SUMS = re.compile(r"(eval_(?:.+_)?)logps/(chosen|rejected)|logps_eval_[^/]+/(.+)")


@dataclass
class SqueezeMonitor:
    """
    Reads logs one at a time and says whether the chosen answers are being lost: they lie `delta` below the highest
    they have been, at one evaluation or `patience` in a row. Only answers that are scored again and again can tell:
    probe sets (`probe/chosen/logp`) and evaluation sets (`eval_squeeze/logp_tok_chosen`), each of which is judged
    alone.

    The rule and its numbers are not the paper's (https://huggingface.co/papers/2407.10490); how often it is right
    stands in docs/squeeze_theory.md.

    Args:
        delta (`float`, *optional*, defaults to `0.25`):
            In nats per token.
        patience (`int`, *optional*, defaults to `1`):
            Evaluations in a row.

    Attributes:
        sets (`dict[str, dict[int, float]]`): of each set the chosen answers' log-probability, nats per token, by step.
        alarms (`dict[str, int]`): the sets whose chosen answers are lost, and the step at which that was seen.

    Raises:
        `ValueError`: when an option lies outside of its range.
    """

    delta: float = 0.25
    patience: int = 1
    sets: dict[str, dict[int, float]] = field(default_factory=dict, init=False)
    alarms: dict[str, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.delta, int | float) and self.delta > 0):
            raise ValueError(f"delta must be above 0 nats per token, got {self.delta}. For example `delta=0.25`.")
        if not (isinstance(self.patience, int) and self.patience >= 1):
            raise ValueError(f"patience must be at least 1, got {self.patience}. For example `patience=1`.")

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
            at = step_of(logs, key, len(values)) if step is None else step_of({"step": step}, key)
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
            `"warn"`: log a warning and nothing else. `"stop"`: end training.
        rule (*optional*):
            Options of [`SqueezeMonitor`].

    Raises:
        `ValueError`: when an option lies outside of its range; before the first step, when there are neither probes
            nor evaluations to go by.
    """

    def __init__(self, action: str = "warn", **rule: Any) -> None:
        if action not in ACTIONS:
            raise ValueError(f"action must be one of {', '.join(ACTIONS)}, got {action!r}.")
        self.action, self.rule = action, rule
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

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.monitor.sets and state.is_world_process_zero:
            logger.warning(
                "SqueezeStoppingCallback can never act: neither this evaluation nor probes tell how likely the chosen "
                "answers are. Add `SqueezeProbeCallback(build_probe_set(held_out_pairs), trainer=trainer)`."
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
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


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """
    The log history of a run.

    Args:
        path (`str` or `Path`):
            A `trainer_state.json`, a checkpoint or the folder of checkpoints it is in, of which the run trained last
            is taken; or JSON Lines with an object an evaluation, gzipped or not, as the authors of
            https://huggingface.co/papers/2407.10490 wrote them. Of these a half-written line is skipped with a
            warning; and as their code appends, a file may hold several runs, of which the longest is taken.

    Returns:
        `list[dict]`

    Raises:
        `ValueError`: when there is no such file, or it holds something else.
    """
    path = Path(path)
    if path.is_dir():
        return _log_of_folder(path)
    if not path.is_file():
        raise ValueError(f"Expected a trainer_state.json or a checkpoint at {path}, got no such file.")
    text = _text(path)
    try:
        whole = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"Expected log entries in {path}, got JSON nested too deep to read.") from error
    except json.JSONDecodeError:
        entries = _lines(text, path)
    else:
        if isinstance(whole, dict):
            whole = whole.get("log_history", [whole])
        entries = whole if isinstance(whole, list) else [whole]
    if not entries:
        raise ValueError(f"Expected log entries in {path}, got none: nothing was logged. Set `logging_steps`.")
    if not all(isinstance(entry, dict) for entry in entries):
        got = next(entry for entry in entries if not isinstance(entry, dict))
        raise ValueError(f"Expected log entries, objects of JSON, in {path}, got {got!r:.60}. Name another file.")
    if any("logps_eval_" in key for key in entries[0]):
        entries = _longest_run(entries)
    return entries


def _log_of_folder(folder: Path) -> list[dict[str, Any]]:
    """
    Of the run trained last. Each state holds the log so far: one that goes on in another is an earlier one of that
    run, whatever a copy has made of the times of the files. A state that was cut short is passed over.
    """
    files = [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")]
    logs: list[list[dict[str, Any]]] = []
    damaged = ValueError(f"Expected a trainer_state.json in {folder} or its checkpoints, got none. Name the file.")
    for file in sorted(filter(Path.is_file, files), key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            logs.append(read_log(file))
        except ValueError as error:
            damaged = error
            logger.warning(f"Passed over: {error}")
    texts = [[json.dumps(entry) for entry in log] for log in logs]  # in which NaN equals itself
    for log, text in zip(logs, texts, strict=True):
        if not any(len(text) < len(other) and text == other[: len(text)] for other in texts):
            return log
    raise damaged


def log_entries(entries: Any, name: str) -> list[dict[str, Any]]:
    """What somebody gave as a log history; something else is refused in a sentence that calls it `name`."""
    expected = f"Expected {name} as a list of log entries, such as `trainer.state.log_history`"
    if isinstance(entries, Mapping) or not isinstance(entries, Iterable):
        more = " Type `state['log_history']`." if isinstance(entries, Mapping) and "log_history" in entries else ""
        raise TypeError(f"{expected}, got {entries!r:.60}.{more}")
    entries = list(entries)
    if not all(isinstance(entry, dict) for entry in entries):
        got = next(entry for entry in entries if not isinstance(entry, dict))
        raise TypeError(f"{expected}, each a dictionary, got {got!r:.60}.")
    return entries


def step_of(entry: dict[str, Any], key: str, default: int = 0) -> int:
    step = entry.get("step", default)
    if isinstance(step, bool) or not isinstance(step, int):
        raise ValueError(  # noqa: TRY004  of a file, not of a caller
            f"The step of a log entry should be a whole number, that with `{key}` has {step!r:.60}."
        )
    return step


def replay_log(
    source: "str | Path | Sequence[dict[str, Any]]", tokens_per_answer: float = 50.0, **rule: Any
) -> pd.DataFrame:
    """
    When the warning would have come.

    Args:
        source (`str` or `Path` or `list[dict]`):
            What [`read_log`] reads, or a log history.
        tokens_per_answer (`float`, *optional*, defaults to `50.0`):
            For logs with sums over the tokens of an answer instead of means: those of TRL's own trainers
            (`eval_logps/chosen`) and of the paper's authors, who do not say how many tokens there were.
        rule (*optional*):
            Options of [`SqueezeMonitor`].

    Returns:
        `pandas.DataFrame`: a row per set of answers that was scored again and again: `watched`, its name in the log;
            `evaluations`; `highest_at`, the step where its chosen answers were most likely; `alarm`, the step of the
            warning or `None`; `fall`, how far they ended below their highest, in nats per token.

    Raises:
        `ValueError`: when there is nothing to replay, or a log-probability is not finite.
    """
    if not tokens_per_answer > 0:
        raise ValueError(f"tokens_per_answer must be positive, got {tokens_per_answer}. For example 50.")
    entries = read_log(source) if isinstance(source, (str, Path)) else log_entries(source, "source")
    monitor = SqueezeMonitor(**rule)
    for index, entry in enumerate(entries):
        monitor.update(_per_token(entry, tokens_per_answer), entry.get("step", index))
    if not monitor.sets:
        raise ValueError(
            f"Expected chosen answers that are scored again and again (`probe/chosen/logp`, `eval_logps/chosen`) in "
            f"{len(entries)} log entries, found none. Train with `eval_strategy='steps'` or `SqueezeProbeCallback`."
        )
    rows = []
    for name, values in monitor.sets.items():
        highest_at = max(values, key=values.__getitem__)
        fall = values[highest_at] - values[max(values)]
        alarm = monitor.alarms.get(name)
        rows.append((name, len(values), highest_at, alarm, fall))
    table = pd.DataFrame(rows, columns=["watched", "evaluations", "highest_at", "alarm", "fall"])
    return table.astype({"alarm": object}).where(table.notna(), None)


def _per_token(entry: dict[str, Any], tokens: float) -> dict[str, Any]:
    renamed = dict(entry)
    for key, value in entry.items():
        match = _SUMS.fullmatch(key)
        if match is None or not isinstance(value, (int, float)):
            continue
        if match[3] is not None:
            renamed[f"probe/{match[3]}/logp"] = value / tokens
        elif f"{match[1]}squeeze/logp_tok_{match[2]}" not in entry:
            renamed[f"{match[1]}squeeze/logp_tok_{match[2]}"] = value / tokens
    return renamed


def _text(path: Path) -> str:
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        text, rest = b"", data
        while rest:  # members one after the other; unlike gzip's reader this keeps what came before a cut
            member = zlib.decompressobj(wbits=31)
            try:
                text += member.decompress(rest)
            except zlib.error as error:
                raise ValueError(f"Expected a whole gzip file at {path}, got one that is damaged: {error}.") from error
            rest = member.unused_data
        data = text
    return data.decode(errors="replace")


def _lines(text: str, path: Path) -> list[Any]:
    lines = [line for line in text.splitlines() if line.strip()]
    entries: list[Any] = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            start = line.rfind('{"')
            try:  # a line cut short, and on the same line the first of the next run
                entries.append(json.loads(line[max(start, 1) :]))
            except json.JSONDecodeError:
                if number < len(lines) or not entries:
                    raise ValueError(
                        f"Expected a JSON object on line {number} of {path}, got {line[:40]!r}. Give a "
                        "`trainer_state.json` or a file with one JSON object per evaluation."
                    ) from None
            logger.warning(f"Line {number} of {path} is cut short; this evaluation is left out.")
    return entries


def _longest_run(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first = json.dumps(entries[0])
    runs: list[list[dict[str, Any]]] = []
    for entry in entries:
        if json.dumps(entry) == first:
            runs.append([])
        runs[-1].append(entry)
    longest = max(runs, key=len)
    if len(runs) > 1:
        logger.warning(
            f"{len(runs)} runs one after the other, of {', '.join(str(len(run)) for run in runs)} evaluations; the "
            "longest is replayed."
        )
    return longest
