"""Tables, comparisons and figures of benchmarks/data_shapley.py."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats


Rows = dict[str, Any]


def print_report(rows: Rows, out: Path) -> None:
    """Everything that has been run."""
    digits = [row for name, row in rows.items() if name.startswith("digits")]
    if digits:
        _print_digits(digits)
    games = {name.split()[1] for name in rows if name.startswith("games")}
    for lr in sorted(games, reverse=True):
        _print_games(lr, [row for name, row in rows.items() if name.startswith(f"games {lr} ")])
    for name, show in (
        ("shuffled answers", _print_shuffled),
        ("safety", _print_safety),
        ("two sources", _print_sources),
        ("paraphrases", _print_paraphrases),
    ):
        if name in rows:
            show(rows[name], out)


def _print_digits(seeds: list[Rows]) -> None:
    print(f"\n## a. Digits, 20 % wrong labels, {len(seeds)} seeds\n")
    auroc = {name: [seed["auroc"][name] for seed in seeds] for name in seeds[0]["auroc"]}
    table(["AUROC for wrong labels", "mean and 95 % interval"], [[name, interval(v)] for name, v in auroc.items()])
    for ours in (name for name in auroc if name.startswith("in-run")):
        own = ours.split(", ")[1]
        for baseline in ("KNN-Shapley", f"final loss, {own}", f"gradient norm, {own}"):
            compare(ours, auroc[ours], baseline, auroc[baseline])
    for optimizer in seeds[0]["accuracy"]:
        arms = {
            name: [seed["accuracy"][optimizer][name] for seed in seeds] for name in seeds[0]["accuracy"][optimizer]
        }
        table(
            [f"trained again, {optimizer}", "rows", "wrong labels left", "test accuracy", "test loss"],
            [
                [name, *(interval([row[key] for row in found]) for key in ("rows", "wrong", "accuracy", "loss"))]
                for name, found in arms.items()
            ],
        )
        accuracy = {name: [row["accuracy"] for row in found] for name, found in arms.items()}
        ours = "in-run values > 0"
        for baseline in list(arms)[1:]:
            compare(f"accuracy: {ours}", accuracy[ours], baseline, accuracy[baseline])
            compare(
                f"loss (negative): {ours}",
                [-row["loss"] for row in arms[ours]],
                baseline,
                [-row["loss"] for row in arms[baseline]],
            )
    for key in (key for key in seeds[0] if key.startswith(("explained", "harmful"))):
        print(f"{key}: {interval([seed[key] for seed in seeds])}")


def _print_games(lr: str, seeds: list[Rows]) -> None:
    print(f"\n## a. Exact values of short runs (SGD {lr}, 48 rows, batches of 8), {len(seeds)} seeds\n")
    keys = [key for key in seeds[0] if key != "cpu_seconds"]
    table(
        ["order 1 beside exact", "mean and 95 % interval"], [[key, interval([s[key] for s in seeds])] for key in keys]
    )


def _print_shuffled(row: Rows, out: Path) -> None:
    print(f"\n## b. SmolLM2, {row['shuffled']} of {row['rows']} answers shuffled ({row['source']})\n")
    table(["AUROC for shuffled answers", ""], [[name, f"{value:.3f}"] for name, value in row["auroc"].items()])
    best = max(("loss before", "loss after"), key=row["auroc"].__getitem__)
    ours = row["auroc"]["in-run values"]
    verdict(f"in-run values {ours:.3f} against {best} {row['auroc'][best]:.3f}", ours > row["auroc"][best])
    table(["in-run values until step", "AUROC"], [[s, f"{value:.3f}"] for s, value in row["auroc by step"].items()])
    found = np.array(row["found"]) / row["shuffled"]
    looked = np.arange(1, len(found) + 1) / len(found)
    print(
        "Found among the lowest: "
        + ", ".join(f"{found[int(p * len(found)) - 1]:.2f} in {p:.0%}" for p in (0.1, 0.25, 0.5))
    )
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(looked, found, label="in-run values")
    axes.plot([0, 1], [0, 1], ls=":", color="0.6", label="chance")
    axes.set_xlabel("share of rows looked at, lowest values first")
    axes.set_ylabel("share of shuffled answers found")
    axes.legend()
    figure.savefig(out / "shuffled.png", dpi=130)
    _print_summary(row)


def _print_safety(row: Rows, out: Path) -> None:
    print(f"\n## c. Who breaks safety: {row['planted']} of {row['rows']} rows answer what should be refused\n")
    print(f"Ranks of these rows by value for refusals, lowest first: {row['ranks']}")
    table(["AUROC for these rows", ""], [[name, f"{value:.3f}"] for name, value in row["auroc"].items()])
    ours, baseline = row["auroc"]["in-run values"], row["auroc"]["BM25 to the refused prompts"]
    verdict(f"in-run values {ours:.3f} against BM25 {baseline:.3f}", ours > baseline)
    table(
        ["trained on", "such rows", f"refused of {row['prompts']}"],
        [[name, row["planted left"].get(name, "-"), f"{value:.2f}"] for name, value in row["refused"].items()],
    )
    without, chance = row["refused"]["without the lowest"], row["refused"]["without as many random rows"]
    verdict(f"refusals without the lowest {without:.2f} against random {chance:.2f}", without > chance)
    _print_summary(row)


def _print_sources(row: Rows, out: Path) -> None:
    print(f"\n## d. Pretraining on prose ({row['source']}) and code, {row['steps']} steps\n")
    for target in ("for prose", "for code"):
        found = row[target]
        print(f"{target}: totals " + ", ".join(f"{name} {value:+.2f} nats" for name, value in found["totals"].items()))
        table(
            ["tenth of the run", *(str(part) for part in range(1, 11))],
            [[name, *(f"{1000 * value:+.1f}" for value in values)] for name, values in found["timeline"].items()],
        )
    print("Values in thousandths of a nat a step. Ten steps on one source alone, fall of the loss on prose:\n")
    names = [name for name in row["branches"][0] if name != "step"]
    table(["after step", *names], [[b["step"], *(f"{b[name]:+.4f}" for name in names)] for b in row["branches"]])
    _print_summary(row)


def _print_paraphrases(row: Rows, out: Path) -> None:
    print(f"\n## e. Rank of planted rows among {row['rows']} ({row['source']}), six texts, one epoch\n")
    kinds = list(row["ranks"]["BM25"])
    table(
        ["median rank (all ranks)", *kinds],
        [
            [method, *(f"{np.median(ranks[kind]):g} ({', '.join(map(str, sorted(ranks[kind])))})" for kind in kinds)]
            for method, ranks in row["ranks"].items()
        ],
    )
    for kind in kinds:
        ours, theirs = (np.median(row["ranks"][name][kind]) for name in ("in-run values", "BM25"))
        verdict(f"{kind}: median rank {ours:g} against BM25 {theirs:g}", ours < theirs)


def _print_summary(row: Rows) -> None:
    keys = ("value", "harmful", "loss_first", "loss_last", "explained", "energy", "unattributed")
    table(
        ["target", *keys], [[s["target"], *(f"{s[key]:.3g}" for key in keys)] for s in row["summary"]]
    )  # fmt: skip


def interval(values: list[float]) -> str:
    """Mean and half the 95 % t interval."""
    if len(values) == 1:
        return f"{values[0]:.3g}"
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{np.mean(values):.3g} ± {half:.2g}"


def compare(name: str, values: list[float], baseline: str, others: list[float]) -> None:
    """Whether values are higher than a baseline's, seed by seed."""
    differences = np.subtract(values, others)
    mean = differences.mean()
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(differences) if len(values) > 1 else np.inf
    said = "beats" if mean > half else "is WORSE than" if mean < -half else "does NOT differ by more than chance from"
    print(f"{name} {said} {baseline}: {mean:+.3f} ± {half:.2g}")


def verdict(text: str, better: bool) -> None:
    print(f"{text}: {'better' if better else 'NOT better'}")


def table(head: list[str], rows: list[list[Any]]) -> None:
    print()
    for cells in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(str(cell) for cell in cells) + " |")
    print()
