"""What `cascade_claim.py` makes of its answers: choice on validation, intervals, verdict, tables, figure."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.report import half_interval


CASCADES = ("chow", "diff", "opt", "token_v1", "token_v2", "token_v3")
BASELINES = ("spec", "spec_top_p", "lossy", "token_cascade", "sequence_cascade")
SEQUENTIAL = ("token_cascade", "sequence_cascade")
BUDGETS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2)
OTHER_SMALL_COSTS = (0.05, 0.2, 0.33)


class Answers(NamedTuple):
    """A method's answers. Arrays of shape `(prompts,)`; forwards are counted as if each prompt were alone."""

    exact: np.ndarray
    large_forwards: np.ndarray
    small_forwards: np.ndarray
    tokens: int  # an answer has


class Report:
    """
    The comparison of all methods under one decoding mode.

    Args:
        seeds (`list[dict[str, dict[str, Answers]]]`):
            For each seed `{method: {setting: answers}}`. `"best_cascade"` is added, with all settings of all cascades.
        validation_prompts (`int`):
            That many first prompts choose settings, the others are the test split.
        small_cost (`float`):
            Cost of a forward of the small model, in forwards of the large one.
    """

    def __init__(self, seeds: list[dict[str, dict[str, Answers]]], validation_prompts: int, small_cost: float):
        self.small_cost = small_cost
        self.validation, self.test = slice(0, validation_prompts), slice(validation_prompts, None)
        self.seeds: list[dict[str, dict[str, Answers]]] = []
        for results in seeds:
            pooled = {f"{rule} {setting}": answers for rule in CASCADES for setting, answers in results[rule].items()}
            self.seeds.append({**results, "best_cascade": pooled})

    def measure(self, answers: Answers, rows: slice) -> dict[str, float]:
        """Exact match, large forwards per token and cost per token of some prompts."""
        large, small = answers.large_forwards[rows].mean(), answers.small_forwards[rows].mean()
        return {
            "exact_match": float(answers.exact[rows].mean()),
            "large_forwards": float(large / answers.tokens),
            "cost": float((large + self.small_cost * small) / answers.tokens),
        }

    def choose(self, settings: dict[str, Answers], budget: float) -> str | None:
        """The setting with the highest validation exact match among those that fit the budget; ties: the cheaper."""
        points = {setting: self.measure(answers, self.validation) for setting, answers in settings.items()}
        fitting = [setting for setting in points if points[setting]["cost"] <= budget + 1e-9]
        return max(fitting, key=lambda s: (points[s]["exact_match"], -points[s]["cost"]), default=None)

    def cheapest(self, settings: dict[str, Answers], exact_match: float = 0.0) -> str | None:
        """The cheapest setting whose validation exact match is at least that high."""
        points = {setting: self.measure(answers, self.validation) for setting, answers in settings.items()}
        fitting = [setting for setting in points if points[setting]["exact_match"] >= exact_match]
        return min(fitting, key=lambda s: points[s]["cost"], default=None)

    def summarize(self, chosen: dict[str, list[str]]) -> dict[str, Any]:
        """Test split: each method at its settings (one a seed), and how far `best_cascade` is above every other."""
        points = {
            method: [
                self.measure(results[method][setting], self.test)
                for results, setting in zip(self.seeds, settings, strict=True)
            ]
            for method, settings in chosen.items()
        }
        methods = {
            method: {
                "chosen": chosen[method],
                **{name: interval([point[name] for point in points[method]]) for name in points[method][0]},
            }
            for method in chosen
        }
        above = {}
        for method in (*BASELINES, "large", "small"):
            if method in points and "best_cascade" in points:
                pairs = zip(points["best_cascade"], points[method], strict=True)
                above[method] = interval([ours["exact_match"] - theirs["exact_match"] for ours, theirs in pairs])
        return {"methods": methods, "best_cascade_above": above}

    def at_budgets(self, budgets: list[float]) -> dict[str, Any]:
        """
        Each method at its best within a budget of cost per token (one a seed). Left out are methods that don't fit the
        budget of every seed, but for `spec`: it has no quality to trade, so it stays in at its cheapest.
        """
        chosen = {}
        for method in self.seeds[0]:
            settings = [
                self.choose(results[method], budget) for results, budget in zip(self.seeds, budgets, strict=True)
            ]
            if method == "spec":
                settings = [self.cheapest(results[method]) for results in self.seeds]
            if None not in settings:
                chosen[method] = settings
        return {"budgets": budgets, **self.summarize(chosen)}

    def at_quality_of_large(self) -> dict[str, Any]:
        """Each method at its cheapest that is as good as the large model on validation; left out if it never is."""
        goals = [self.measure(results["large"][""], self.validation)["exact_match"] for results in self.seeds]
        chosen = {}
        for method in self.seeds[0]:
            settings = [self.cheapest(results[method], goal) for results, goal in zip(self.seeds, goals, strict=True)]
            if None not in settings:
                chosen[method] = settings
        return self.summarize(chosen)

    def curves(self) -> dict[str, list[dict[str, Any]]]:
        """Every setting on the test split, averaged over seeds."""
        report: dict[str, list[dict[str, Any]]] = {}
        for method, settings in self.seeds[0].items():
            if method == "best_cascade":
                continue
            report[method] = []
            for setting in settings:
                points = [self.measure(results[method][setting], self.test) for results in self.seeds]
                values = {name: interval([point[name] for point in points]) for name in points[0]}
                report[method].append({"setting": setting, **values})
        return report

    def compare(self) -> dict[str, Any]:
        """At the cost of speculative decoding, over a grid of budgets, at the large model's quality."""
        spec_costs = [
            self.measure(results["spec"][self.cheapest(results["spec"])], self.validation)["cost"]
            for results in self.seeds
        ]
        at_spec_cost = self.at_budgets(spec_costs)
        grid = {budget: self.at_budgets([budget] * len(self.seeds)) for budget in BUDGETS}
        return {
            "at_spec_cost": at_spec_cost,
            "grid": grid,
            "at_quality_of_large": self.at_quality_of_large(),
            "claim_shown": beats(at_spec_cost, ("spec", "token_cascade")),
            "budgets_that_no_cascade_fits": [b for b in grid if "best_cascade" not in grid[b]["methods"]],
            "budgets_where_it_beats_spec_and_sequential": [b for b in grid if beats(grid[b], ("spec", *SEQUENTIAL))],
            "budgets_where_it_beats_every_baseline": [b for b in grid if beats(grid[b], _fitting(grid[b]))],
        }


def interval(values) -> dict[str, float | None]:
    """Mean and 95 % t interval over seeds; `None` where fewer than two seeds leave no interval."""
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = half_interval(values)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def beats(report: dict[str, Any], baselines) -> bool:
    """Whether `best_cascade` is above all of these by intervals that exclude 0; a missing one isn't beaten."""
    above = report["best_cascade_above"]
    return all(name in above and above[name]["low"] is not None and above[name]["low"] > 0 for name in baselines)


def _fitting(report: dict[str, Any]) -> list[str]:
    return ["spec", *(name for name in BASELINES if name in report["methods"])]


def shown(value: dict[str, Any]) -> str:
    if value["low"] is None:
        return f"{value['mean']:.3f}"
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def verdict(mode: str, comparison: dict[str, Any], by_small_cost: dict[float, dict[str, Any]]) -> list[str]:
    """What the numbers say, computed from them."""
    at_spec = comparison["at_spec_cost"]
    methods, above = at_spec["methods"], at_spec["best_cascade_above"]
    lines = []
    if "best_cascade" in methods:
        best = methods["best_cascade"]
        lines.append(
            f"{mode}, at no more than the cost of speculative decoding: best cascade "
            f"({', '.join(dict.fromkeys(best['chosen']))}) exact match {shown(best['exact_match'])} at cost "
            f"{best['cost']['mean']:.2f}; it"
        )
    for name, difference in above.items():
        word = "is not shown to differ from"
        if difference["low"] is not None and difference["low"] > 0:
            word = "beats"
        elif difference["high"] is not None and difference["high"] < 0:
            word = "is beaten by"
        lines.append(
            f"  {word} {name}, {methods[name]['exact_match']['mean']:.3f} at cost {methods[name]['cost']['mean']:.2f} "
            f"(difference {shown(difference)})"
        )
    lines.append(
        f"  Claim (above speculative decoding and the sequential token cascade, at that cost): "
        f"{'SHOWN' if comparison['claim_shown'] else 'NOT SHOWN'} for {mode}."
    )
    for key in (name for name in comparison if name.startswith("budgets_")):
        budgets = ", ".join(f"{budget:g}" for budget in comparison[key]) or "none"
        lines.append(f"  {key.replace('_', ' ')}: {budgets}.")
    for cost, other in by_small_cost.items():
        lines.append(
            f"  Had a forward of the small model cost {cost:g}: {'SHOWN' if other['claim_shown'] else 'NOT SHOWN'}."
        )
    return lines


def print_tables(mode: str, comparison: dict[str, Any]) -> None:
    """Three tables on the test split; settings were chosen on the validation split."""
    names = ("large", "small", *BASELINES, *CASCADES, "best_cascade")
    for title, report in (
        ("highest exact match at no more than the cost of speculative decoding", comparison["at_spec_cost"]),
        ("lowest cost at no less than the exact match of the large model", comparison["at_quality_of_large"]),
    ):
        print(f"\n{mode}: {title}\n{'method':<17} {'exact match':<21} {'large/token':>11}  {'cost/token':<21}  chosen")
        for name in names:
            if name in report["methods"]:
                row = report["methods"][name]
                print(
                    f"{name:<17} {shown(row['exact_match']):<21} {row['large_forwards']['mean']:>11.2f}  "
                    f"{shown(row['cost']):<21}  {', '.join(dict.fromkeys(row['chosen']))}"
                )
    names = ("best_cascade", *BASELINES)
    print(f"\n{mode}: exact match by budget of cost a token (- does not fit; spec stays at its cheapest)")
    print(f"{'budget':<8}" + "".join(f"{name:>17}" for name in names))
    for budget, report in comparison["grid"].items():
        cells = [report["methods"].get(name) for name in names]
        print(f"{budget:<8g}" + "".join(f"{c['exact_match']['mean']:>17.3f}" if c else f"{'-':>17}" for c in cells))


def plot(curves: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Exact match against large forwards and against cost, a column a decoding mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"large_forwards": "forwards of the large model per token", "cost": "cost per token (large forwards)"}
    colors = dict(zip(("large", "small", *BASELINES, *CASCADES), plt.get_cmap("tab20").colors, strict=False))
    figure, axes = plt.subplots(2, 2, figsize=(13, 9), sharey=True, layout="constrained")
    for row, (key, label) in zip(axes, labels.items(), strict=True):
        for axis, (mode, by_method) in zip(row, curves.items(), strict=True):
            for method, points in by_method.items():
                points = sorted(points, key=lambda point: point[key]["mean"])
                x, y = ([point[name]["mean"] for point in points] for name in (key, "exact_match"))
                style = "-o" if method in CASCADES else "--s" if method in BASELINES else "*"
                axis.plot(x, y, style, color=colors[method], label=method, markersize=12 if style == "*" else 4)
            axis.set(title=mode, xlabel=label, ylabel="exact match")
            axis.grid(alpha=0.3)
    handles, labels_shown = axes[0][1].get_legend_handles_labels()
    figure.legend(handles, labels_shown, loc="outside right center")
    figure.savefig(path, dpi=120)
    plt.close(figure)
