"""One page about a training run, from what any of our parts left in its folder."""

import contextlib
import io
import itertools
import math
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
from datasets import Dataset

from hf_iclr.editors.alpha_edit.batches import ADAPTER
from hf_iclr.editors.records.ledger import JOURNAL_NAME, batches_of, committed_events
from hf_iclr.extras import new_figure, require
from hf_iclr.saving import atomic_file
from hf_iclr.trainers.data_shapley.result import DataShapleyResult
from hf_iclr.trainers.safety_audit.report import SafetyReport
from hf_iclr.trainers.squeeze.warning import SqueezeMonitor, read_log
from hf_iclr.untrusted import parse_json, read_json, regular_file


class Panel(NamedTuple):
    """A plot of the page: what is in it, as a pattern of the logged keys; its unit; and how to read it."""

    title: str
    pattern: str
    unit: str
    reading: str
    change: bool = False  # since the first value, where levels of several curves lie far apart


_REFUSALS = Panel(
    "Refusals",
    r"safety/(refusal_rate|over_refusal_rate)",
    "share",
    "Of prompts that should be refused, and of harmless ones. The first should stay up, the second down.",
)
PANELS = (
    Panel("Loss", r"loss|(eval(?:_.+)?)_loss", "nats", "The training's own loss, and that of evaluations."),
    _REFUSALS,
    Panel("Distance from the starting model", r"safety/kl", "nats per token", "KL along its own answers."),
    Panel(
        "Weights of the constrained loss",
        r"constraint/weight_(.+)",
        "weight",
        "One where an answer is as likely as under the reference; less where it has moved away from it.",
    ),
    Panel(
        "Watched answers",
        r"(?:.+_)?probe/(.+)/delta0",
        "change, nats per token",
        "Rejected alone should fall. Chosen answers that fall are being lost.",
    ),
    Panel(
        "Trained answers",
        r"squeeze/logp_tok_(chosen|rejected)|squeeze/(logp_argmax_chosen)",
        "change, nats per token",
        "Both answers falling while the most likely tokens rise is the squeezing effect.",
        change=True,
    ),
    Panel("Rewards of the loss", r"rewards/(chosen|rejected|margins)", "reward", "A margin may grow while both fall."),
    Panel(
        "Loss on what values are for",
        r"shapley/loss_(.+)",
        "nats",
        "Values are shares of its fall.",
    ),
    Panel(
        "Rows that harm",
        r"shapley/(harmful_share)",
        "share",
        "Training rows with a negative value since the last time.",
    ),
    Panel("J&F", r"eval_(?:.+_)?(j_and_f|j|f)", "score", "Of a segmentation model in evaluations."),
    Panel("Learning rate", r"learning_rate", "", "As it was at that step."),
    Panel("Norm of the gradient", r"grad_norm", "", "Before clipping."),
)
_COLOURS = ("#1a5fb4", "#c64600", "#26a269", "#a347ba", "#b58900", "#c01c28", "#5e5c64", "#008c95")


@dataclass
class RunRecord:
    """
    What stands in a run's folder: see [`read_run`]. Names of audits and edits are those of their folders. `unread`
    says what is there and could not be read, as after a crash.
    """

    log: list[dict[str, Any]] = field(default_factory=list)
    values: DataShapleyResult | None = None
    audits: dict[str, SafetyReport] = field(default_factory=dict)
    edits: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    cascades: list[dict[str, Any]] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Within it, what cannot be read is kept as a sentence."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.unread.append(str(error))


def read_run(folder: str | Path) -> RunRecord:
    """
    Reads what trainers and our parts have written: `trainer_state.json` (also of a checkpoint), values of training
    rows, audits, ledgers of edits, and the `cascade.jsonl` of `hf-iclr cascade --out`.

    Args:
        folder (`str` or `Path`):
            Output folder of a training. Audits and edits may stand in folders of it, too.

    Raises:
        NotADirectoryError: if there is no such folder.
        TypeError: if it is no path.
        ValueError: if there is nothing of all this that can be read.
    """
    if not isinstance(folder, str | Path):
        raise TypeError(f"Expected the output folder of a run as a path, got {folder!r:.80}. Type `read_run('out')`.")
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"Expected the output folder of a run, got {folder}, which is none.")
    run = RunRecord()
    if any(folder.glob("trainer_state.json")) or any(folder.glob("checkpoint-*/trainer_state.json")):
        with run.reading():
            run.log = [entry for entry in read_log(folder) if isinstance(entry.get("step", 0), int)]
    if any((folder / "shapley").rglob("*.parquet")):
        with run.reading():
            run.values = DataShapleyResult.from_store(folder)
    for path in _here_and_below(folder, "report.json"):
        with run.reading():
            if isinstance(content := read_json(path), dict) and "report" in content:
                run.audits[_name(path, folder)] = SafetyReport.load(path.parent)
    for path in _here_and_below(folder, JOURNAL_NAME):
        with run.reading():
            batches = batches_of(committed_events(path.parent, ADAPTER))
            run.edits[_name(path, folder)] = [batch for batch in batches if "edits" in batch]  # not those of concepts
    if (folder / "cascade.jsonl").is_file():
        with run.reading():
            lines = regular_file(folder / "cascade.jsonl").read_text(encoding="utf-8").splitlines()
            run.cascades = [parse_json(line, folder / "cascade.jsonl") for line in lines if line.strip()]
    if run == RunRecord(unread=run.unread):
        below = [path.parent for path in _here_and_below(folder, "trainer_state.json")]
        runs = dict.fromkeys(path.parent if path.name.startswith("checkpoint-") else path for path in below)
        raise ValueError(
            f"Expected what a trainer or a part of hf_iclr writes in {folder}, got none of it: no trainer_state.json "
            "(set `save_strategy`, or call `trainer.save_state()`), values, audit, edits or cascade.jsonl."
            + "".join(f" {sentence}" for sentence in run.unread)
            + (f" There are runs in {', '.join(map(str, runs))}: name one of these." if runs else "")
        )
    return run


def write_run_report(
    folder: str | Path,
    out: str | Path | None = None,
    train_dataset: Dataset | None = None,
    source_column: str | None = None,
) -> Path:
    """
    Write one page about a run: curves over its steps, warnings, what training rows were worth, audits, edits and
    cascades. It stands alone, and reads on a phone.

    Args:
        folder (`str` or `Path`):
            See [`read_run`].
        out (`str` or `Path`, *optional*):
            The page. Defaults to `run_report.html` in the folder.
        train_dataset ([`~datasets.Dataset`], *optional*):
            The training rows, of which those with the highest and lowest values are then shown.
        source_column (`str`, *optional*):
            Its column to sum values by.

    Returns:
        `Path` of the page.

    Raises:
        NotADirectoryError: if there is no such folder.
        TypeError: if it is no path, or the rows are no dataset.
        ValueError: if it holds nothing to show, or the rows are not those that were trained on.

    Example:

    ```python
    >>> write_run_report("out", train_dataset=rows, source_column="source")
    PosixPath('out/run_report.html')
    ```
    """
    if not isinstance(train_dataset, Dataset | None):
        raise TypeError(
            f"Expected the training rows as a datasets.Dataset, got {type(train_dataset).__name__}. Type "
            "`train_dataset=Dataset.from_list(rows)`."
        )
    if source_column is not None and (train_dataset is None or source_column not in train_dataset.column_names):
        known = "no rows" if train_dataset is None else f"columns {', '.join(train_dataset.column_names)}"
        raise ValueError(f"Expected training rows with a column {source_column!r} to sum by, got {known}.")
    run = read_run(folder)
    monitor = SqueezeMonitor()
    with run.reading():  # a run that diverged has probes without a number
        for entry in run.log:
            monitor.update(entry)
    sections = []
    if run.values is not None:
        sections.append(("Training rows", list(_value_tables(run.values, train_dataset, source_column))))
    sections += [(f"Audit {name}".rstrip(), [_audit_table(report)]) for name, report in run.audits.items()]
    sections += [(f"Edits {name}".rstrip(), [_edit_table(batches)]) for name, batches in run.edits.items()]
    if run.cascades:
        sections.append(("Cascades", [_cascade_table(run.cascades)]))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_iclr.runs", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["cell"] = _cell
    page = environment.get_template("report.html").render(
        name=Path(folder).absolute().name,
        steps=max((entry.get("step", 0) for entry in run.log), default=0),
        notices=list(_notices(run, monitor)),
        panels=list(_panels(run)),
        sections=sections,
        logged=_logged(run.log),
    )
    path = Path(out) if out is not None else Path(folder) / "run_report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def _here_and_below(folder: Path, name: str) -> list[Path]:
    return sorted(path for pattern in (name, f"*/{name}", f"*/*/{name}") for path in folder.glob(pattern))


def _name(path: Path, folder: Path) -> str:
    return "" if path.parent == folder else path.parent.relative_to(folder).as_posix()


def _notices(run: RunRecord, monitor: SqueezeMonitor) -> Iterator[tuple[bool, str]]:
    """Sentences for the top of the page, and whether each is bad news."""
    for sentence in dict.fromkeys(run.unread):
        yield True, sentence
    for name, step in monitor.alarms.items():
        yield True, f"Chosen answers were being lost from step {step} on ({name or 'evaluation'})."
    if refusals := [
        *_curves(Panel("", r"(safety/refusal_rate)", "", ""), run.log).get("safety/refusal_rate", {}).values()
    ]:
        yield refusals[-1] < refusals[0], f"Refusals went from {refusals[0]:.0%} to {refusals[-1]:.0%}."
    for name, report in run.audits.items():
        crossed = report.crossed()
        for sentence in crossed:
            yield True, f"Audit {name}: {sentence}"
        if not crossed:
            yield False, f"Audit {name}: {_percent(report.refusal_rate('none'))} of the prompts are refused."
    for name, batches in run.edits.items():
        edits = [edit for batch in batches for edit in batch["edits"]]
        held = sum(edit["p_after"] > 0.5 for edit in edits)
        yield held < len(edits) / 2, f"Edits {name}: {len(edits)} in force, {held} of them above one half."
    if run.values is not None:
        values = run.values.values()
        yield False, f"{(values < 0).mean():.0%} of {len(values)} training rows have a negative value."
        if run.log and not any(key.startswith("shapley/") for entry in run.log for key in entry):
            yield True, "The values of rows seem to be of another run in this folder: the log knows of none."


def _panels(run: RunRecord) -> Iterator[tuple[Panel, str]]:
    """Each panel that has something to show, and its plot as SVG; all over the same steps."""
    drawn = [(panel, curves) for panel in PANELS if (curves := _curves(panel, run.log))]
    if run.values is not None:
        steps = run.values.rows.groupby("step")["value"].sum().cumsum()
        summed = Panel("Values of the rows", "", "nats", "Sum of all values so far: what the steps gained.")
        drawn.append((summed, {"sum": steps.to_dict()}))
    last = max((max(points) for _, curves in drawn for points in curves.values()), default=0)
    for panel, curves in drawn:
        yield panel, _draw(panel, curves, last)


def _curves(panel: Panel, log: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    curves: dict[str, dict[int, float]] = {}
    for entry in log:
        for key, value in entry.items():
            match = re.fullmatch(panel.pattern, key)
            if match and isinstance(value, int | float) and math.isfinite(value):
                name = next(filter(None, match.groups()), "training" if key == "loss" else key)
                curves.setdefault(name, {})[entry.get("step", 0)] = float(value)
    if panel.change:
        curves = {
            name: {step: y - points[min(points)] for step, y in points.items()} for name, points in curves.items()
        }
    return curves


def _draw(panel: Panel, curves: dict[str, dict[int, float]], last: int) -> str:
    require("cli", "write_run_report", "matplotlib")
    import matplotlib

    figure = new_figure("write_run_report", (4.6, 2.7))
    axes = figure.subplots()
    for (name, points), colour in zip(sorted(curves.items()), itertools.cycle(_COLOURS)):
        axes.plot(list(points), list(points.values()), color=colour, lw=1.5, marker=".", ms=4, label=name)
    axes.set_xlim(0, last or 1)
    if panel.unit == "share":
        axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.spines[["top", "right"]].set_visible(False)
    for part in (axes.xaxis, axes.yaxis):  # a grey that reads on white and on black
        part.label.set_color("#7a828e")
        axes.tick_params(colors="#7a828e", labelsize=8)
    for spine in axes.spines.values():
        spine.set_color("#7a828e")
    if len(curves) > 1:
        axes.legend(fontsize=7, frameon=False, labelcolor="#7a828e")
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # words stay words, in the page's own size of file
        figure.savefig(
            file,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg = file.getvalue()
    return svg[svg.index("<svg") :]


def _value_tables(
    values: DataShapleyResult, rows: Dataset | None, source_column: str | None
) -> Iterator[tuple[str, pd.DataFrame]]:
    lowest = values.bottom(10)
    trained = None if rows is None or values.key != "index" else values.to_dataset(rows)
    for title, table in (("Highest values", values.top(10)), ("Negative values", lowest[lowest["value"] < 0])):
        table = table[["value", "exposures", "tokens"]].reset_index()
        if trained is not None:
            table["row"] = [_text(row) for row in trained.select(table["index"].tolist())]
        yield title, table
    if source_column is not None:
        totals = values.by_source(source_column, rows).totals.sort_values("value", ascending=False)
        yield f"By {source_column}", totals[["value", "rows", "value_per_token", "harmful"]].reset_index()


def _text(row: dict[str, Any]) -> str:
    texts = [value for value in row.values() if isinstance(value, str)]
    turns = [turn for value in row.values() if isinstance(value, list) for turn in value if isinstance(turn, dict)]
    texts += [str(turn.get("content")) for turn in turns]
    return textwrap.shorten(" | ".join(texts), 160, placeholder=" ...")


def _audit_table(report: SafetyReport) -> tuple[str, pd.DataFrame]:
    table = report.to_frame()
    table = table[table["judged"] == "continuation"]
    names = [name for name in ("attack", "setting", "n", "refused", "low", "high", "before") if name in table]
    return "Share refused, with a 95 % interval", table[names]


def _edit_table(batches: list[dict[str, Any]]) -> tuple[str, pd.DataFrame]:
    edits = [edit for batch in batches for edit in batch["edits"]]
    names = ["batch", "prompt", "subject", "target_new", "p_before", "p_after"]
    return "Probability of the target, before and after", pd.DataFrame(edits, columns=names)


def _cascade_table(cascades: list[dict[str, Any]]) -> tuple[str, pd.DataFrame]:
    records = [{**{k: v for k, v in record.items() if k != "call"}, **record.get("call", {})} for record in cascades]
    return "One row an answer", pd.DataFrame(records).drop(columns=["draft_lengths", "round_seconds"], errors="ignore")


def _logged(log: list[dict[str, Any]]) -> pd.DataFrame:
    """First and last value of all keys."""
    series: dict[str, list[float]] = {}
    for entry in log:
        for key, value in entry.items():
            if isinstance(value, int | float) and key not in ("step", "epoch"):
                series.setdefault(key, []).append(value)
    rows = [(key, values[0], values[-1], len(values)) for key, values in sorted(series.items())]
    return pd.DataFrame(rows, columns=["key", "first", "last", "times"])


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, Real):
        return "–" if value is None else str(value)
    if math.isnan(value):
        return "–"
    return f"{value:,}" if isinstance(value, Integral) else f"{value:.4g}"


def _percent(share: float) -> str:
    return "none measured" if math.isnan(share) else f"{share:.0%}"
