"""Tables, comparisons and figures of benchmarks/data_shapley.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from common.report import half_interval, print_table


Rows = dict[str, Any]


def print_report(rows: Rows, out: Path) -> None:
    """Everything that has been run."""
    digits = [row for name, row in rows.items() if name.startswith("digits")]
    if digits:
        _print_digits(digits)
    games = {name.split()[1] for name in rows if name.startswith("games")}
    for lr in sorted(games, reverse=True):
        _print_games(lr, [row for name, row in rows.items() if name.startswith(f"games {lr} ")])
    for name, show in (("shuffled answers", _print_shuffled), ("safety", _print_safety)):
        seeds = [row for key, row in sorted(rows.items()) if key.startswith(f"{name} ")]
        if seeds:
            show(seeds, out)
    for name, show in (("two sources", _print_sources), ("paraphrases", _print_paraphrases)):
        if name in rows:
            show(rows[name], out)


def _print_digits(seeds: list[Rows]) -> None:
    print(f"\n## a. Digits, 20 % wrong labels, {len(seeds)} seeds\n")
    auroc = {name: [seed["auroc"][name] for seed in seeds] for name in seeds[0]["auroc"]}
    print_table(
        ["AUROC for wrong labels", "mean and 95 % interval"], [[name, interval(v)] for name, v in auroc.items()]
    )
    for ours in (name for name in auroc if name.startswith("in-run")):
        own = ours.split(", ")[1]
        for baseline in ("KNN-Shapley", f"final loss, {own}", f"gradient norm, {own}"):
            compare(ours, auroc[ours], baseline, auroc[baseline])
    for optimizer in seeds[0]["accuracy"]:
        arms = {
            name: [seed["accuracy"][optimizer][name] for seed in seeds] for name in seeds[0]["accuracy"][optimizer]
        }
        print_table(
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
    print_table(
        ["order 1 beside exact", "mean and 95 % interval"], [[key, interval([s[key] for s in seeds])] for key in keys]
    )


def _print_shuffled(seeds: list[Rows], out: Path) -> None:
    first = seeds[0]
    print(
        f"\n## b. SmolLM2, {first['shuffled']} of {first['rows']} answers shuffled ({first['source']}), "
        f"{len(seeds)} seeds\n"
    )
    _print_auroc("AUROC for shuffled answers", seeds, ("loss before", "loss after"))
    print_table(
        ["in-run values until step", "AUROC"],
        [[step, interval([seed["auroc by step"][step] for seed in seeds])] for step in first["auroc by step"]],
    )
    found = np.array([seed["found"] for seed in seeds]) / first["shuffled"]
    looked = np.arange(1, found.shape[1] + 1) / found.shape[1]
    print(
        "Found among the lowest: "
        + ", ".join(f"{interval(found[:, int(p * len(looked)) - 1])} in {p:.0%}" for p in (0.1, 0.25, 0.5))
    )
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for number, curve in enumerate(found):
        axes.plot(looked, curve, color="C0", label=None if number else "in-run values, each seed")
    axes.plot([0, 1], [0, 1], ls=":", color="0.6", label="chance")
    axes.set_xlabel("share of rows looked at, lowest values first")
    axes.set_ylabel("share of shuffled answers found")
    axes.legend()
    figure.savefig(out / "shuffled.png", dpi=130)
    for seed in seeds:
        _print_summary(seed)


def _print_safety(seeds: list[Rows], out: Path) -> None:
    first = seeds[0]
    print(
        f"\n## c. Who breaks safety: {first['planted']} of {first['rows']} rows answer what should be refused, "
        f"{len(seeds)} seeds\n"
    )
    print("Ranks of these rows by value for refusals, lowest first, by seed:")
    for seed in seeds:
        print(sorted(seed["ranks"]))
    _print_auroc("AUROC for these rows", seeds, ("BM25 to the refused prompts",))
    refused = {name: [seed["refused"][name] for seed in seeds] for name in first["refused"]}
    print_table(
        ["trained on", "such rows, by seed", f"refused of {first['prompts']}, by seed", "mean and 95 % interval"],
        [
            [
                name,
                ", ".join(str(seed["planted left"].get(name, "-")) for seed in seeds),
                ", ".join(f"{rate:.2f}" for rate in rates),
                interval(rates),
            ]
            for name, rates in refused.items()
        ],
    )
    compare(
        "refusals: without the lowest", refused["without the lowest"],
        "without as many random rows", refused["without as many random rows"],
    )  # fmt: skip
    for seed in seeds:
        _print_summary(seed)


def _print_auroc(head: str, seeds: list[Rows], baselines: tuple[str, ...]) -> None:
    auroc = {name: [seed["auroc"][name] for seed in seeds] for name in seeds[0]["auroc"]}
    print_table([head, "mean and 95 % interval"], [[name, interval(values)] for name, values in auroc.items()])
    for baseline in baselines:
        compare("in-run values", auroc["in-run values"], baseline, auroc[baseline])


def _print_sources(row: Rows, out: Path) -> None:
    print(f"\n## d. Pretraining on prose ({row['source']}) and code, {row['steps']} steps\n")
    for target in ("for prose", "for code"):
        found = row[target]
        print(f"{target}: totals " + ", ".join(f"{name} {value:+.2f} nats" for name, value in found["totals"].items()))
        print_table(
            ["tenth of the run", *(str(part) for part in range(1, 11))],
            [[name, *(f"{1000 * value:+.1f}" for value in values)] for name, values in found["timeline"].items()],
        )
    print("Values in thousandths of a nat a step. Ten steps on one source alone, fall of the loss on prose:\n")
    names = [name for name in row["branches"][0] if name != "step"]
    print_table(["after step", *names], [[b["step"], *(f"{b[name]:+.4f}" for name in names)] for b in row["branches"]])
    _print_summary(row)


def _print_paraphrases(row: Rows, out: Path) -> None:
    print(f"\n## e. Rank of planted rows among {row['rows']} ({row['source']}), six texts, one epoch\n")
    kinds = list(row["ranks"]["BM25"])
    print_table(
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
    keys = ("value", "harmful", "loss_first", "loss_last", "explained", "energy", "agreement")
    print_table(
        ["target", *keys], [[s["target"], *(f"{s[key]:.3g}" for key in keys)] for s in row["summary"]]
    )  # fmt: skip


def interval(values: Sequence[float]) -> str:
    """Mean and half the 95 % t interval."""
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{np.mean(values):.3g} ± {half_interval(values):.2g}"


def compare(name: str, values: list[float], baseline: str, others: list[float]) -> None:
    """Whether values are higher than a baseline's, seed by seed."""
    differences = np.subtract(values, others)
    mean = differences.mean()
    half = half_interval(differences)
    said = "beats" if mean > half else "is WORSE than" if mean < -half else "does NOT differ by more than chance from"
    print(f"{name} {said} {baseline}: {mean:+.3f} ± {half:.2g}")


def verdict(text: str, better: bool) -> None:
    print(f"{text}: {'better' if better else 'NOT better'}")
