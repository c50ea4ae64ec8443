"""The warning on runs that are over, whoever trained them."""

import json
import logging
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .warning import SqueezeMonitor


logger = logging.getLogger(__name__)

# The log-probability of an answer, summed over its tokens: as TRL evaluates it, and as the paper's authors do.
_SUMS = re.compile(r"(eval_(?:.+_)?)logps/(chosen|rejected)|logps_eval_[^/]+/(.+)")
_AUTHORS_ARGMAX = "argmax_prob_logits"


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """
    The log history of a run.

    Args:
        path (`str` or `Path`):
            A `trainer_state.json`, a checkpoint or the folder of checkpoints it is in; or JSON Lines with an object an
            evaluation, gzipped or not, as the authors of https://huggingface.co/papers/2407.10490 wrote them. Of these
            a half-written line is skipped with a warning; and as their code appends, a file may hold several runs,
            of which the longest is taken.

    Returns:
        `list[dict]`

    Raises:
        `ValueError`: when there is no such file, or it holds something else.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / "trainer_state.json", *path.glob("checkpoint-*/trainer_state.json")]
        found = [file for file in found if file.is_file()]
        if not found:
            raise ValueError(f"Expected a trainer_state.json in {path} or its checkpoints, got none. Name the file.")
        path = max(found, key=lambda file: file.stat().st_mtime)
    if not path.is_file():
        raise ValueError(f"Expected a trainer_state.json or a checkpoint at {path}, got no such file.")
    text = _text(path)
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        entries = _lines(text, path)
    else:
        if isinstance(whole, dict):
            whole = whole.get("log_history", [whole])
        entries = whole if isinstance(whole, list) else [whole]
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        got = next((entry for entry in entries if not isinstance(entry, dict)), "nothing")
        raise ValueError(f"Expected log entries, objects of JSON, in {path}, got {got!r:.60}. Name another file.")
    if any("logps_eval_" in key for key in entries[0]):
        entries = _longest_run(entries)
    return entries


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
    entries = read_log(source) if isinstance(source, (str, Path)) else list(source)
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
    if _AUTHORS_ARGMAX in entry:
        renamed["probe/chosen/logp_argmax"] = entry[_AUTHORS_ARGMAX] / tokens
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
