"""What a squeezing log says, as one HTML page with a figure a source, and the same as JSON."""

import base64
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from hf_iclr.extras import new_figure

from .warning import SqueezeMonitor, log_entries, step_of


# What stands before it says who was measured: nothing for training batches, a probe set, an evaluation set
_OWN = r"squeeze/(?!index$)[^/]+|(?:rewards|logps)/[^/]+"
_PROBED = r"probe/[^/]+/[^/]+|(?:crosstalk|repeat|onpolicy)/[^/]+|squeeze/index"
_KEY = re.compile(rf"(eval_(?:.+?_)?)?({_OWN})|(.+?_)?({_PROBED})")


@dataclass(frozen=True)
class _Panel:
    """A subplot: what is in it (a pattern of keys without their source), its unit and how to read it."""

    title: str
    pattern: str
    unit: str
    reading: str


_PANELS = (
    _Panel(
        "Answers",
        r"probe/(.+)/delta0|squeeze/logp_tok_(.+)",
        "nats per token",
        "Rejected alone should fall. Answers nobody trains on that fall with it lose their mass to the most likely "
        "tokens; chosen answers that fall are being lost.",
    ),
    _Panel(
        "Most likely token of their contexts",
        r"probe/(.+)/logp_argmax|squeeze/logp_argmax_(.+)",
        "nats per token",
        "Rising while the answers fall: this is where the mass goes. Near 0 from the start, it cannot rise any more.",
    ),
    _Panel(
        "Squeeze pressure",
        r"squeeze/pressure_(.+)|probe/(.+)/pressure|onpolicy/pressure_(own)",
        "probability",
        "The higher, the more a push on the rejected token moves the rest; own samples have about zero.",
    ),
    _Panel(
        "Share of tokens in a valley, of pairs down",
        r"squeeze/(valley_frac|.+_down)|probe/rejected/(valley_frac)",
        "share",
        "Valley: tokens with a positive pressure. Down: less likely than under the reference.",
    ),
    _Panel(
        "Index and cross-talk",
        r"squeeze/(index)|(crosstalk)/other_train",
        "nats per token",
        "Index: rise of the most likely token less change of the answers nobody trains on. Cross-talk: how much more "
        "answers to other training prompts have gained than answers to test prompts.",
    ),
    _Panel(
        "Greedy answers",
        r"repeat/(rep_4|dup_across_prompts|eos_rate|distinct_2)",
        "share",
        "rep_4 and dup_across_prompts rising, distinct_2 falling: the model has become a repeater.",
    ),
    _Panel(
        "Rewards of the loss",
        r"rewards/(chosen|rejected|margins)",
        "reward",
        "A margin that grows while both rewards fall is squeezing at its plainest.",
    ),
    _Panel(
        "Whole answers",
        r"logps/(.+)",
        "nats per answer",
        "The log-probabilities TRL logs.",
    ),
)
# One colour a kind, on every panel of every page
_COLOURS = {
    "chosen": "#1b7f4b", "rejected": "#b3261e", "other_train": "#c77700", "other_test": "#7a5c00",
    "permuted": "#6b5b95", "random_words": "#8c8c8c", "initial_greedy": "#1f5fa8", "own": "#1f5fa8",
    "margins": "#1d2129", "index": "#1d2129", "valley_frac": "#c77700", "chosen_down": "#1b7f4b",
    "rejected_down": "#b3261e", "both_down": "#1d2129",
}  # fmt: skip
_MORE_COLOURS = ("#d1477a", "#008c95", "#5c7d00", "#9a6324", "#4363d8", "#e6651a")


def write_squeeze_report(
    log_history: Sequence[dict[str, Any]], out_dir: str | Path, title: str = "Squeezing report"
) -> Path:
    """
    Write `squeeze_report.html`, which stands alone, its figures `squeeze_report*.png` and `squeeze_report.json`.

    Whatever was logged is shown, the change of each curve since it began: the metrics of a trainer with
    [`SqueezeMixin`], those of [`SqueezeProbeCallback`] from any trainer, or just TRL's own log-probabilities and
    rewards. Each source (training batches, a probe set, an evaluation set) has a figure of its own. Warnings are those
    of [`SqueezeMonitor`] with its default rule.

    Args:
        log_history (`Sequence[dict]`):
            `trainer.state.log_history`, or that of a `trainer_state.json`.
        out_dir (`str` or `Path`):
            Made if it does not exist.
        title (`str`, *optional*, defaults to `"Squeezing report"`):
            Heading.

    Returns:
        `Path` of the HTML page.

    Raises:
        `ValueError`: when the log has nothing to show.
    """
    sources = _sources(log_entries(log_history, "log_history"))
    figures = {}
    for source, series in sources.items():
        panels = [(panel, curves) for panel in _PANELS if (curves := _curves(panel, series))]
        # Nothing is seen of what was measured once, unless all was
        panels = [panel for panel in panels if any(len(points) > 1 for points in panel[1].values())] or panels
        if panels:
            figures[source] = panels
    if not figures:
        raise ValueError(
            f"The report needs log entries with keys such as squeeze/logp_tok_chosen or probe/chosen/logp, got "
            f"{len(log_history)} entries without one. Train first (`logging_steps` must be reached), with "
            "`SqueezeDPOTrainer` or `SqueezeProbeCallback`."
        )
    monitor = SqueezeMonitor()
    for entry in log_history:
        monitor.update(entry)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    pages: list[dict[str, Any]] = []
    for number, (source, panels) in enumerate(figures.items()):
        alarm = monitor.alarms.get(source)
        path = out_dir / f"squeeze_report{f'_{number + 1}' if number else ''}.png"
        _draw(panels, alarm, path)
        pages.append(
            {
                "name": _name(source),
                "alarm": alarm,
                "watched": source in monitor.sets,
                "panels": [(panel.title, panel.reading) for panel, _ in panels],
                "figure": base64.b64encode(path.read_bytes()).decode(),
                "summary": [_summarise(key, points) for key, points in sources[source].items()],
            }
        )
    report = {
        "title": title,
        "warnings": [{"source": source, "step": step} for source, step in monitor.alarms.items()],
        "summary": [row for page in pages for row in page["summary"]],
        "series": {
            key: {"step": list(points), "value": list(points.values())}
            for series in sources.values()
            for key, points in series.items()
        },
    }
    (out_dir / "squeeze_report.json").write_text(json.dumps(report, indent=1))
    template = jinja2.Template(
        (Path(__file__).parent / "report.html").read_text(encoding="utf-8"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    path = out_dir / "squeeze_report.html"
    path.write_text(template.render(title=title, pages=pages), encoding="utf-8")
    return path


def _sources(log_history: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """Values by step for each key of each source, probes first; what was logged again after resuming counts."""
    sources: dict[str, dict[str, dict[int, float]]] = {}
    for entry in log_history:
        for key, value in entry.items():
            match = _KEY.fullmatch(key)
            if (
                match is None
                or isinstance(value, bool)
                or not isinstance(value, int | float)
                or not math.isfinite(value)
            ):
                continue
            source = (match[1] or "").rstrip("_") if match[2] else f"{match[3] or ''}probe"
            sources.setdefault(source, {}).setdefault(key, {})[step_of(entry, key, 0)] = float(value)
    order = sorted(sources, key=lambda source: (not source.endswith("probe"), not source, source))
    return {source: {key: dict(sorted(points.items())) for key, points in sources[source].items()} for source in order}


def _name(source: str) -> str:
    if source == "":
        return "Training batches"
    kind, name = ("Probes", source[: -len("probe")]) if source.endswith("probe") else ("Evaluation", source[4:])
    return f"{kind}: {name.strip('_')}" if name.strip("_") else kind


def _curves(panel: _Panel, series: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """What a panel shows, as change since the beginning, by what it is called there."""
    curves = {}
    for key, points in series.items():
        match = re.fullmatch(rf"(?:.+_)?(?:{panel.pattern})", key)
        if match is not None:
            start = next(iter(points.values()))
            name = next(filter(None, match.groups()))
            curves[name] = {step: value - start for step, value in points.items()}
    return curves


def _draw(panels: list[tuple[_Panel, dict[str, dict[int, float]]]], alarm: int | None, path: Path) -> None:
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure("write_squeeze_report", (6.2 * columns, 3.2 * rows))
    more = iter(_MORE_COLOURS * 3)
    colours = dict(_COLOURS)
    for axes, (panel, curves) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
        for name, points in curves.items():
            colour = colours.setdefault(name, next(more, "#1d2129"))
            axes.plot(list(points), list(points.values()), color=colour, marker=".", ms=4, lw=1.4)
        axes.axhline(0, color="#5c6472", lw=0.6)
        if alarm is not None:
            axes.axvline(alarm, color="#b3261e", ls=":", lw=1.2)
            axes.set_title(
                "dotted: warning" if axes is figure.axes[0] else "", fontsize=8, loc="right", color="#b3261e"
            )
        axes.set_title(panel.title, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel(f"change, {panel.unit}", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        _label(axes, {name: points[max(points)] for name, points in curves.items()}, colours)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    figure.savefig(path, dpi=110)


def _label(axes: Any, ends: dict[str, float], colours: dict[str, str]) -> None:
    """The curves' names at their ends, moved apart where they would overprint."""
    low, high = axes.get_ylim()
    gap = 0.085 * (high - low)
    at: list[float] = []
    order = sorted(ends, key=ends.__getitem__)
    for name in order:
        at.append(max(ends[name], at[-1] + gap) if at else ends[name])
    shift = max(0.0, at[-1] - high) if at else 0.0  # not out at the top, and centred on the ends where there is room
    middle = sum(y - ends[name] for name, y in zip(order, at, strict=True)) / max(len(at), 1)
    for name, y in zip(order, at, strict=True):
        axes.annotate(
            name, (1.01, y - max(shift, min(middle, at[0] - low))), xycoords=axes.get_yaxis_transform(), fontsize=8,
            color=colours[name], va="center", annotation_clip=False,
        )  # fmt: skip


def _summarise(key: str, points: dict[int, float]) -> dict[str, Any]:
    values = list(points.values())
    peak = max(points, key=points.__getitem__)
    return {"key": key, "first": values[0], "last": values[-1], "change": values[-1] - values[0], "peak_step": peak}
