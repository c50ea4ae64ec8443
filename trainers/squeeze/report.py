"""What a squeezing log says, as one HTML page with its figure, and the same as JSON."""

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

from .warning import SqueezeMonitor, SqueezeState


_KEY = re.compile(r"(.*?_)?((?:squeeze|probe|repeat|onpolicy|crosstalk)/.+|logps/(?:chosen|rejected))")


@dataclass(frozen=True)
class _Panel:
    """A subplot: what is in it (a pattern of keys without their prefix), its unit and how to read it."""

    title: str
    pattern: str
    unit: str
    reading: str


_PANELS = (
    _Panel(
        "Chosen and rejected answers",
        r"squeeze/logp_tok_.+",
        "log-probability, nats per token",
        "Both falling is squeezing at its plainest; a rejected curve that falls alone is what DPO is for.",
    ),
    _Panel(
        "Whole answers",
        r"logps/.+",
        "log-probability, nats per answer",
        "TRL's own curves of the same.",
    ),
    _Panel(
        "Probes",
        r"probe/.+/delta0",
        "change of log-probability, nats per token",
        "Answers nobody trains on that fall together lose their mass to the most likely tokens.",
    ),
    _Panel(
        "Argmax against the rest",
        r"squeeze/(?:logp_argmax|rest_logmass)_.+|probe/.+/logp_argmax",
        "log-probability, nats per token",
        "The most likely token of each context gains (argmax) while everything else together (rest) shrinks.",
    ),
    _Panel(
        "Pressure and valleys",
        r"squeeze/(?:pressure_rejected|valley_frac)|probe/.+/(?:pressure|valley_frac)|onpolicy/.+",
        "probability; share of tokens",
        "About zero is benign and what own samples have; the higher, the more a push on the rejected token moves the "
        "rest.",
    ),
    _Panel(
        "Squeeze index",
        r"squeeze/(?:index|frac_probes_down|displacement|(?:chosen|rejected|both)_down)|crosstalk/.+",
        "nats per token; share of answers",
        "Index: rise of the argmax less change of the other answers. Displacement: fall of the chosen answers.",
    ),
    _Panel(
        "Greedy answers",
        r"repeat/(?:rep_4|dup_across_prompts|eos_rate|distinct_2)",
        "share",
        "rep_4 and dup_across_prompts rising, distinct_2 falling: the model has become a repeater.",
    ),
)


def write_squeeze_report(
    log_history: Sequence[dict[str, Any]], out_dir: str | Path, title: str = "Squeezing report"
) -> Path:
    """
    Write `squeeze_report.html`, which stands alone, `squeeze_report.png` and `squeeze_report.json`.

    Whatever was logged is shown: the metrics of [`SqueezeDPOTrainer`], those of [`SqueezeProbeCallback`] from any
    trainer, or just TRL's own log-probabilities. States are those of [`SqueezeMonitor`] with its default rule.

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
    series = _series(log_history)
    if not series:
        raise ValueError(
            f"The report needs log entries with keys such as squeeze/logp_tok_chosen or probe/chosen/logp, got "
            f"{len(log_history)} entries without one. Train first (`logging_steps` must be reached), with "
            "`SqueezeDPOTrainer` or `SqueezeProbeCallback`."
        )
    states = _states(log_history)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    panels = _panels(series)
    _draw(panels, states, out_dir / "squeeze_report.png")
    summary = [_summarise(key, points) for key, points in series.items()]
    report = {
        "title": title,
        "states": states,
        "summary": summary,
        "series": {key: {"step": list(points), "value": list(points.values())} for key, points in series.items()},
    }
    (out_dir / "squeeze_report.json").write_text(json.dumps(report, indent=1))
    template = jinja2.Template(
        (Path(__file__).parent / "report.html").read_text(encoding="utf-8"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    page = template.render(
        title=title,
        states=states,
        summary=summary,
        readings=list({panel.title: panel.reading for _, panel, _ in panels}.items()),
        figure=base64.b64encode((out_dir / "squeeze_report.png").read_bytes()).decode(),
    )
    path = out_dir / "squeeze_report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _series(log_history: Sequence[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Values by step for each key; what was logged again after resuming counts."""
    series: dict[str, dict[int, float]] = {}
    for entry in log_history:
        for key, value in entry.items():
            if _KEY.fullmatch(key) and isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(key, {})[entry.get("step", 0)] = float(value)
    return {key: dict(sorted(points.items())) for key, points in series.items()}


def _states(log_history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every change of state: its step and name."""
    monitor = SqueezeMonitor()
    for entry in log_history:
        monitor.update(entry)
    changes, before = [], SqueezeState.OK
    for row in monitor.rows:
        if row["state"] != before:
            changes.append({"step": row["step"], "state": row["state"].name, "chosen": row["chosen"]})
            before = row["state"]
    return changes


def _panels(series: dict[str, dict[int, float]]) -> list[tuple[str, _Panel, dict[str, dict[int, float]]]]:
    """Prefix, panel and labelled curves of each subplot that has any."""
    split = {key: ((match[1] or ""), match[2]) for key in series if (match := _KEY.fullmatch(key))}
    panels = []
    for prefix in sorted({prefix for prefix, _ in split.values()}):
        for panel in _PANELS:
            curves = {
                name.partition("/")[2]: series[key]
                for key, (own, name) in split.items()
                if own == prefix and re.fullmatch(panel.pattern, name)
            }
            if curves:
                panels.append((prefix, panel, curves))
    return panels


def _draw(panels: list, states: list[dict[str, Any]], path: Path) -> None:
    rows = math.ceil(len(panels) / 2)
    figure = new_figure("write_squeeze_report", (12, 3.6 * rows))
    for axes, (prefix, panel, curves) in zip(figure.subplots(rows, 2, squeeze=False).flat, panels, strict=False):
        for label, points in curves.items():
            axes.plot(list(points), list(points.values()), marker=".", label=label.removesuffix("/delta0"))
        for change in states:
            colour = {"OK": "C2", "WATCH": "C1", "SQUEEZE": "C3"}[change["state"]]
            axes.axvline(change["step"], color=colour, ls=":", lw=1)
            axes.annotate(
                change["state"], (change["step"], 1), xycoords=("data", "axes fraction"), rotation=90, fontsize=7,
                va="top", ha="right", color=colour,
            )  # fmt: skip
        axes.set_title(
            f"{panel.title} ({prefix.strip('_').replace('_', ' ')})" if prefix else panel.title, fontsize=10
        )
        axes.set_xlabel("step")
        axes.set_ylabel(panel.unit, fontsize=8)
        axes.legend(fontsize=7, ncols=1 + len(curves) // 7)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    figure.savefig(path, dpi=110)


def _summarise(key: str, points: dict[int, float]) -> dict[str, Any]:
    values = list(points.values())
    peak = max(points, key=points.__getitem__)
    return {"key": key, "first": values[0], "last": values[-1], "change": values[-1] - values[0], "peak_step": peak}
