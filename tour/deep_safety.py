"""Deep safety alignment in the tour: the prefill curve of a model trained on the spot, before and after."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from hf_iclr.trainers.safety_audit import wilson_rate

from .demo.organism import ANSWER_TOKENS, Toy
from .pages import TourSection


KS = (0, 1, 3, 5, 8)
CONSTRAINED_NAME = "attack: 5/5/.1"
CONSTRAINED = {"constrain": "refused", "beta_first": 5.0, "beta_initial": 5.0}


def section(out_dir: Path, quick: bool, progress: Callable[..., Any]) -> TourSection:
    """
    Train a tiny Llama to refuse one kind of question, then deepen the refusal (method A), then attack it by 30
    compliant answers, with and without the constrained loss (method B).
    """
    toy = Toy()
    recovery = {"safety_dataset": toy.triplets(), "safety_ratio": 0.5, "max_prefix_tokens": ANSWER_TOKENS - 1}
    runs: dict[str, tuple[list, int, float, dict[str, Any]]] = {
        "method A": (toy.allowed, 40, 2e-3, {"constrain": "none", **recovery}),
        "attack: SFT": (toy.attack, 30, 1e-3, {"constrain": "none"}),
        "attack: .5/2/.1": (toy.attack, 30, 1e-3, {}),
        CONSTRAINED_NAME: (toy.attack, 30, 1e-3, CONSTRAINED),
    }
    if quick:
        del runs["attack: .5/2/.1"]
    models = {"taught": toy.model}
    with tempfile.TemporaryDirectory() as folder:
        for name, (rows, steps, learning_rate, settings) in progress(runs.items(), desc="Fine-tuning the toy"):
            models[name] = toy.fine_tune(folder, rows, steps, learning_rate, **settings)
    rows = []
    for name, model in models.items():
        refused = {f"k = {k}": toy.refusal_rate(model, toy.held_out, k) for k in KS}
        first, later = toy.nll(model, toy.attack)
        over = toy.refusal_rate(model, toy.allowed_held_out)
        rows.append({"model": name, **refused, "over-refusal": over, "NLL first": first, "NLL after 5": later})
    table = pd.DataFrame(rows).round(3)
    kept = {row["model"]: row["k = 0"] for row in rows}
    summary = [
        (
            "A tiny Llama was trained here to refuse questions about half of its objects: it refuses "
            f"{kept['taught']:.0%} of {len(toy.held_out)} unseen ones, but {rows[0]['k = 3']:.0%} once three tokens "
            "of a compliant answer are given."
        ),
        f"Recovery rows raise that to {rows[1]['k = 3']:.0%}.",
        (
            f"Fine-tuned on 30 compliant answers, SFT keeps {kept['attack: SFT']:.0%} of the refusals; the "
            f"constrained loss on refused prompts with β = 5 keeps {kept[CONSTRAINED_NAME]:.0%} at about the same "
            "loss on later tokens (NLL of the 30 answers, nats)."
        ),
    ]
    return TourSection(
        title="Safety alignment deeper than a few tokens",
        headline=f"After 30 compliant answers {kept[CONSTRAINED_NAME]:.0%} of the refusals are left, with SFT "
        f"{kept['attack: SFT']:.0%}.",
        command="hf-iclr audit MODEL --prompts FILE",
        summary=summary,
        table=table,
        figures=[_figure(table, len(toy.held_out), out_dir / "deep_safety_prefill.png")],
    )


def _figure(table: pd.DataFrame, count: int, path: Path) -> Path:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for _, row in table.iterrows():
        rates = [row[f"k = {k}"] for k in KS]
        intervals = [wilson_rate([True] * round(rate * count) + [False] * round((1 - rate) * count)) for rate in rates]
        below = [rate - interval.low for rate, interval in zip(rates, intervals, strict=True)]
        above = [interval.high - rate for rate, interval in zip(rates, intervals, strict=True)]
        axes.errorbar(KS, rates, yerr=[below, above], label=row["model"], marker="o", capsize=3)
    axes.set_xlabel("tokens of a compliant answer given (k)")
    axes.set_ylabel("refused")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    return path
