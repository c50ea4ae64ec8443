"""When an early warning of the squeezing effect would have fired, from the logs of a run that is over."""

import json
import logging
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hf_iclr.trainers.squeeze import SqueezeMonitor, SqueezeState


logger = logging.getLogger(__name__)

_OFFICIAL = re.compile(r"logps_eval_[^/]+/(.+)")


@dataclass
class SqueezeReplay:
    """
    When a rule would have fired. Positions count evaluations of `table` from 0.

    Args:
        table (`pandas.DataFrame`):
            A row per evaluation: `step`, `chosen`, `peak` (nats per token), `share_down`, `state`.
        signal (`str`):
            What the rule went by: `"probes"`, or `"peak"` where no other answers were logged.
        watch (`int`, *optional*):
            Where WATCH was first reached.
        squeeze (`int`, *optional*):
            Where SQUEEZE was first reached.
        chosen_peak (`int`):
            Where the chosen answer was most likely.
    """

    table: pd.DataFrame
    signal: str
    watch: int | None
    squeeze: int | None
    chosen_peak: int

    @property
    def lead(self) -> int | None:
        """Evaluations from the first WATCH to the peak of the chosen answer; negative if the warning came after."""
        return None if self.watch is None else self.chosen_peak - self.watch


def replay(
    source: "str | Path | Sequence[dict[str, Any]]", tokens_per_answer: float = 50.0, **rule: Any
) -> SqueezeReplay:
    """
    Run the early warning over a run that is over.

    Args:
        source (`str` or `Path` or `list[dict]`):
            `trainer.state.log_history`, the path of a `trainer_state.json`, or the JSON Lines which the authors' code
            writes (one object per evaluation, gzipped or not). Of the last, a half-written line is skipped with a
            warning; and as that code appends, a file may hold several runs, of which the longest is taken.
        tokens_per_answer (`float`, *optional*, defaults to `50.0`):
            The authors' files hold sums over tokens, and not the number of tokens. 50 is about the mean length of the
            answers of their probe set.
        rule (*optional*):
            Options of [`SqueezeMonitor`].

    Returns:
        [`SqueezeReplay`]

    Raises:
        `ValueError`: when there is nothing to replay, a line cannot be read, or a log-probability is not finite.
    """
    if not tokens_per_answer > 0:
        raise ValueError(f"tokens_per_answer must be positive, got {tokens_per_answer}. For example 50.")
    entries = _read(Path(source)) if isinstance(source, (str, Path)) else list(source)
    if any(_OFFICIAL.fullmatch(key) for entry in entries for key in entry):
        entries = _official_entries(entries, tokens_per_answer)
    monitor = SqueezeMonitor(**rule)
    for entry in entries:
        monitor.update(entry)
    if not monitor.rows:
        raise ValueError(
            f"Expected log-probabilities of chosen answers (`probe/chosen/logp`, `squeeze/logp_tok_chosen` or "
            f"`logps_eval_.../chosen`) in {len(entries)} log entries, found none. Train with `SqueezeDPOTrainer` or "
            "add `SqueezeProbeCallback`."
        )
    table = pd.DataFrame(monitor.rows)
    signal = "probes" if len(set(table["values"][0]) - {"chosen", "peak"}) else "peak"

    def first(state: SqueezeState) -> int | None:
        return next((index for index, row in enumerate(monitor.rows) if row["state"] >= state), None)

    table["state"] = [SqueezeState(state).name for state in table["state"]]
    return SqueezeReplay(
        table.drop(columns="values"),
        signal,
        first(SqueezeState.WATCH),
        first(SqueezeState.SQUEEZE),
        int(table["chosen"].idxmax()),
    )


def _read(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        text, rest = b"", data
        while rest:  # members one after the other; unlike gzip's reader this keeps what came before a cut
            member = zlib.decompressobj(wbits=31)
            text += member.decompress(rest)
            rest = member.unused_data
        data = text
    decoded = data.decode(errors="replace")
    try:
        whole = json.loads(decoded)
    except json.JSONDecodeError:
        pass
    else:
        if isinstance(whole, dict):
            whole = whole.get("log_history", [whole])
        return whole
    lines = [line for line in decoded.splitlines() if line.strip()]
    entries = []
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


def _official_entries(entries: list[dict[str, Any]], tokens: float) -> list[dict[str, Any]]:
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
    renamed = []
    for index, entry in enumerate(longest):
        answers = {match[1]: value for key, value in entry.items() if (match := _OFFICIAL.fullmatch(key))}
        row: dict[str, Any] = {f"probe/{kind}/logp": value / tokens for kind, value in answers.items()}
        if "argmax_prob_logits" in entry:
            row["probe/chosen/logp_argmax"] = entry["argmax_prob_logits"] / tokens
        renamed.append({"step": index, **row})
    return renamed
