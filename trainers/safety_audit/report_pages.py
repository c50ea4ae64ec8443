"""A safety report as people read it: a section of a model card, a figure, and a page that needs nothing else."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard

from hf_iclr.extras import new_figure

from .asking.thoughts import chat_text
from .statistics import wilson_rate


# `to_markdown`, `to_html`, `plot` and `add_to_model_card` are methods of `SafetyReport`, whose file imports this one.
_CARD_BEGIN, _CARD_END = "<!-- safety audit -->", "<!-- end of safety audit -->"
_METRICS = {"none": ("refusal_rate", "Refusal rate"), "harmless": ("over_refusal_rate", "Over-refusal rate")}


def to_markdown(report: Any) -> str:
    """The report as a section of a model card."""
    header, *rows = _table(report)
    table = [header, ["---"] * len(header), *rows]
    lines = ["## Safety audit", "", _summary(report), "", *("| " + " | ".join(cells) + " |" for cells in table)]
    return "\n".join(lines + [line for text in _paragraphs(report) for line in ("", text)]) + "\n"


def _table(report: Any) -> list[list[str]]:
    frame = report.to_frame()
    compared, harm = "before" in frame, "harmful" in frame
    joined: dict[tuple, Any] = {(r.attack, r.setting): r.refused for r in frame.itertuples() if r.judged == "joined"}
    header = ["prompts", "n", "refused", "95 % interval", "judged with the prefix"]
    header += ["harmful"] if harm else []
    header += ["before", "lost / gained", "p (McNemar)"] if compared else []
    table = [header]
    row: Any
    for row in frame[frame["judged"] == "continuation"].itertuples():
        cells = [title(row.attack, row.setting), str(row.n), _percent(row.refused)]
        cells += [f"{_percent(row.low)} to {_percent(row.high)}" if row.n else "-"]
        cells += [_percent(joined.get((row.attack, row.setting), math.nan))]
        cells += [_percent(row.harmful)] if harm else []
        if compared:
            known = not math.isnan(row.before)
            cells += [_percent(row.before), f"{row.lost:.0f} / {row.gained:.0f}" if known else "-"]
            cells += [f"{row.p_value:.3g}" if known else "-"]
        table.append(cells)
    return table


def _summary(report: Any) -> str:
    s, versions = report.settings, report.settings["versions"]
    asked = f" after the system prompt {s['system']!r:.80}" if s.get("system") else ""
    asked += f" with {s['chat_template_kwargs']}" if s.get("chat_template_kwargs") else ""
    return (
        f"{len(report.prompts['prompts'])} prompts that should be refused and "
        f"{len(report.prompts['harmless_prompts'])} harmless ones, answered by `{s['model']}`{asked} with at most "
        f"{s['max_new_tokens']} tokens and judged by {', '.join(s['judges'])} (hf_iclr {versions['hf_iclr']}, "
        f"transformers {versions['transformers']}, seed {s['seed']})."
    )


def _paragraphs(report: Any) -> Iterator[str]:
    """What follows the table."""
    yield f"Share not refused, mean over prefix lengths (prefill AUC): {report.prefill_auc:.3f}."
    if report.kl:
        first = ", ".join(f"{row['kl']:.2f}" for row in report.kl[:5])
        yield (
            f"Divergence from the base model at answer tokens 1, 2, ...: {first} nats; alignment depth (tokens "
            f"with 90 % of it): {report.alignment_depth} of {len(report.kl)}."
        )
    thoughts = [(m, wilson_rate(m.refused)) for m in report.measures if m.judged == "thoughts"]
    if thoughts:
        parts = [f"{_percent(rate.rate)} of {rate.n} ({title(m.attack, m.setting)})" for m, rate in thoughts]
        yield "Thoughts judged apart, refusing: " + ", ".join(parts) + "."
    recovered = [row for row in report.latency if row["cues"]]
    if recovered:
        parts = [f"{row['median']:g} after k = {row['k']} ({row['cues']} of {row['n']})" for row in recovered]
        yield "Tokens before the first refusal cue, median: " + ", ".join(parts) + "."
    for row in report.agreement:
        yield (
            f"Judges {row['first']} and {row['second']} agree on {_percent(row['agreement'])} of {row['n']} texts "
            f"(kappa {row['kappa']:.2f})."
        )
    if report.notes:
        yield "\n".join(f"- {note}" for note in report.notes)


def plot(report: Any, path: str | Path | None = None):
    """
    Draws the refusal rate against the number of prefilled tokens, with Wilson intervals.

    Args:
        path (`str` or `Path`, *optional*):
            Where to save the figure.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        ImportError: without matplotlib.
    """
    figure = new_figure("SafetyReport.plot", (6, 4))
    axes = figure.subplots()
    for name, style, points in _curves(report):
        ks, rates = [k for k, _ in points], [rate for _, rate in points]
        bars = [[r.rate - r.low for r in rates], [r.high - r.rate for r in rates]]
        axes.errorbar(ks, [r.rate for r in rates], yerr=bars, fmt=style, capsize=3, label=name)
    axes.set_xlabel("prefilled tokens of a compliant answer")
    axes.set_ylabel("share refused")
    axes.set_ylim(-0.03, 1.03)
    axes.legend()
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _curves(report: Any) -> list[tuple[str, str, list]]:
    curves = [(report, "continuation", "o-", "audited"), (report, "joined", "s:", "audited, judged with the prefix")]
    curves += [(report.before, "continuation", "o--", "before")] if report.before else []
    drawn = []
    for source, judged, style, name in curves:
        rates = [(k, wilson_rate(m.refused)) for k, m in source.prefill_measures(judged).items()]
        drawn.append((name, style, [(k, rate) for k, rate in rates if rate.n]))
    return drawn


def to_html(report: Any, with_texts: bool = True) -> str:
    """The report as one page; texts that are there stand in closed boxes, unless they are to be left out."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_iclr.trainers.safety_audit", "."), autoescape=True, trim_blocks=True
    )
    thresholds = report.settings.get("thresholds") or {}
    crossed, unmeasured = report.crossed(), report.unmeasured()
    curves = [(name, [(_along(k, report), rate, k) for k, rate in points]) for name, _, points in _curves(report)]
    depth = max((row["kl"] for row in report.kl), default=0.0)
    return environment.get_template("report.html").render(
        report=report,
        summary=_summary(report).replace("`", ""),
        table=_table(report),
        paragraphs=[text for text in _paragraphs(report) if not text.startswith("- ")],
        thresholds=thresholds,
        crossed=crossed,
        unmeasured=unmeasured,
        curves=[(name, points) for name, points in curves if points],
        ticks=[(_along(k, report), k) for k in report.prefill_measures()],
        bars=[(row, row["kl"] / depth if depth else 0.0) for row in report.kl],
        changes=list(_changes(report, with_texts)),
        title=title,
    )


def _along(k: int, report: Any) -> float:
    """Where k stands on an axis from 0 to 1, small numbers as far apart as large ones."""
    return math.log1p(k) / math.log1p(max([1, *report.prefill_measures()]))


def _changes(report: Any, with_texts: bool) -> Iterator[dict[str, Any]]:
    """The prompts whose verdict is another one than before."""
    for measure in report.measures:
        earlier = report.before and report.before.find(measure.attack, measure.setting, measure.judged)
        if not earlier or measure.judged != "continuation":
            continue
        asked = report.asked.get("harmless_prompts" if measure.attack == "harmless" else "prompts") or []
        for row, (was, now) in enumerate(zip(earlier.refused, measure.refused, strict=False)):
            if None in (was, now) or was == now:
                continue
            texts = []
            if with_texts:
                sources = (("Prompt", asked), ("Answer before", earlier.texts), ("Answer now", measure.texts))
                texts = [(name, chat_text(entries[row] or "")) for name, entries in sources if row < len(entries)]
            yield {"row": row, "title": title(measure.attack, measure.setting), "lost": was, "texts": texts}


def add_to_model_card(report: Any, card: ModelCard) -> None:
    """Puts the section into a model card, in place of an earlier one, and the rates into its metadata."""
    head, found, rest = card.text.partition(_CARD_BEGIN)
    tail = rest.partition(_CARD_END)[2] if found else ""
    card.text = f"{head.rstrip()}\n\n{_CARD_BEGIN}\n{to_markdown(report)}{_CARD_END}{tail}\n"
    ours = [metric for metric, _ in _METRICS.values()]
    data: Any = card.data
    kept = [result for result in data.eval_results or [] if result.metric_type not in ours]
    for attack, (metric, name) in _METRICS.items():
        rate = report.refusal_rate(attack)
        if not math.isnan(rate):
            kept.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type="custom",
                    dataset_name="harmless prompts" if attack == "harmless" else "prompts that should be refused",
                    metric_type=metric,
                    metric_name=name,
                    metric_value=round(rate, 4),
                )
            )
    data.model_name = data.model_name or report.settings["model"]
    data.eval_results = kept


def title(attack: str, setting: str) -> str:
    """What a measure is called in tables."""
    return {
        "none": "no attack",
        "prefill": f"prefix of {setting} token{'' if setting == '1' else 's'}",
        "decoding": f"sampled, {setting}",
        "rap": "rank-assisted prefix",
        "gcg": "GCG suffix",
        "harmless": "harmless prompts (over-refusal)",
    }[attack]


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f} %"
