"""Tables, bars and plots of benchmarks/squeeze.py."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from common.report import half_interval


MARGIN = 0.6
BYSTANDERS = ("chosen_rephrased", "other_train", "other_human", "permuted")
# Name in the tables -> key of the log, of the probes on training prompts.
QUANTITIES = {
    "chosen": "probe/chosen/logp",
    "rejected": "probe/rejected/logp",
    **{kind: f"probe/{kind}/logp" for kind in BYSTANDERS},
    "argmax | chosen": "probe/chosen/logp_argmax",
    "argmax | rejected": "probe/rejected/logp_argmax",
    "pressure": "probe/rejected/pressure",
    "valley share": "probe/rejected/valley_frac",
}
HELD_OUT = ("chosen", "rejected", "chosen_rephrased", "other_test", "other_human", "permuted")
REPETITION = ("rep_4", "dup_across_prompts", "eos_rate")


def print_tables(runs: list[dict[str, Any]]) -> None:
    """Everything the runs say, means with 95 % t intervals over seeds, then the bars."""
    seeds = sorted({run["seed"] for run in runs})
    curves = {(run["arm"], run["seed"]): curve(run) for run in runs}
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    print(f"\nData: {runs[0]['source']}. Seeds {seeds}. Nats per token unless a share; mean and 95 % interval.")

    def of(arm: str, function) -> list[float]:
        return [function(curves[arm, seed]) for seed in seeds if (arm, seed) in curves]

    show("Before DPO, after the supervised stage", {
        name: {arm: interval(of(arm, lambda c, n=name: c[n].iloc[0])) for arm in arms} for name in QUANTITIES
    })  # fmt: skip
    show("Change over all DPO steps", {
        name: {arm: interval(of(arm, lambda c, n=name: change(c, n))) for arm in arms} for name in QUANTITIES
    })  # fmt: skip
    at_margin = {arm: [row for row in of(arm, lambda c: at(c, MARGIN)) if row is not None] for arm in arms}
    show(f"Change where the margin of rejected below chosen has grown by {MARGIN}", {
        name: {arm: interval([row[name] for row in rows if name in row]) for arm, rows in at_margin.items()}
        for name in (*QUANTITIES, "step")
    })  # fmt: skip
    show("Change on held-out prompts", {
        kind: {
            arm: interval([held_out(run, kind) for run in runs if run["arm"] == arm and has_held_out(run, kind)])
            for arm in arms
        }
        for kind in HELD_OUT
    })  # fmt: skip
    show("Greedy answers, before -> after DPO", {
        name: {
            arm: " -> ".join(
                interval([records(run, f"repeat/{name}")[end][f"repeat/{name}"] for run in runs if run["arm"] == arm])
                for end in (0, -1)
            )
            for arm in arms
        }
        for name in REPETITION
    })  # fmt: skip
    show("Pressure before DPO", {
        "rejected answers": {arm: interval(of(arm, lambda c: c["pressure"].iloc[0])) for arm in arms},
        "own samples of the model": {
            arm: interval([records(run, "onpolicy/pressure_own")[0]["onpolicy/pressure_own"]
                           for run in runs if run["arm"] == arm]) for arm in arms
        },
    })  # fmt: skip
    print_bars(curves, seeds)
    print_paired(curves, seeds)


def print_bars(curves: dict[tuple[str, int], pd.DataFrame], seeds: list[int]) -> None:
    """Each bar holds for every seed or is missed."""
    sft = [curves["sft", seed] for seed in seeds if ("sft", seed) in curves]
    bars = [
        ("rejected falls by at least 1.0", [-change(curve, "rejected") for curve in sft], 1.0),
        *(
            (f"{kind} falls by at least .20", [-change(curve, kind) for curve in sft], 0.2)
            for kind in BYSTANDERS
            if all(kind in curve for curve in sft)
        ),
        ("argmax | chosen rises by at least .08", [change(curve, "argmax | chosen") for curve in sft], 0.08),
        ("argmax | rejected rises by at least .15", [change(curve, "argmax | rejected") for curve in sft], 0.15),
        ("pressure rises by at least .10", [change(curve, "pressure") for curve in sft], 0.1),
    ]
    both = [seed for seed in seeds if {("sft", seed), ("extend", seed)} <= set(curves)]
    valley = [start(curves, "sft", s, "valley share") - start(curves, "extend", s, "valley share") for s in both]
    bars.append(("extend: valley share before DPO lower by at least .05", valley, 0.05))
    points = [(at(curves["extend", seed], MARGIN), at(curves["sft", seed], MARGIN)) for seed in both]
    ratios = [
        extend["argmax | rejected"] / sft["argmax | rejected"]
        for extend, sft in points
        if extend and sft and sft["argmax | rejected"] > 0
    ]
    # As "at least": minus the ratio against minus .8; where SFT's is a fall there is no ratio to speak of
    bars.append((f"extend: argmax | rejected at margin {MARGIN} at most .8 of sft's", [-r for r in ratios], -0.8))
    print("\nBars, each for every seed")
    for text, values, bar in bars:
        enough = len(values) == len(seeds)
        verdict = "reached" if enough and all(value >= bar for value in values) else "NOT REACHED"
        shown = ", ".join(f"{-value if bar < 0 else value:+.3f}" for value in values)
        missing = "" if enough else f"; {len(seeds) - len(values)} seeds have no such point"
        print(f"  {verdict:12} {text}: {shown}{missing}")


def print_paired(curves: dict[tuple[str, int], pd.DataFrame], seeds: list[int]) -> None:
    """What has no bar: the chosen answer's rise and fall, extend against half, on-policy against sft."""
    rows: dict[str, dict[str, str]] = {}
    for arm in dict.fromkeys(arm for arm, _ in curves):
        own = [curves[arm, seed]["chosen"] for seed in seeds if (arm, seed) in curves]
        rows[f"chosen, {arm}: rise to its peak, fall from it"] = {
            "mean and interval": " / ".join(
                interval(values)
                for values in ([c.max() - c.iloc[0] for c in own], [c.max() - c.iloc[-1] for c in own])
            ),
            "seeds": f"peak at steps {', '.join(str(int(c.idxmax())) for c in own)}",
        }
    for first, second, where in (("extend", "half", MARGIN), ("extend", "sft", MARGIN), ("on-policy", "sft", None)):
        both = [seed for seed in seeds if {(first, seed), (second, seed)} <= set(curves)]
        for name in ("rejected", *BYSTANDERS, "argmax | chosen", "argmax | rejected", "pressure"):
            differences = []
            for seed in both:
                one, two = curves[first, seed], curves[second, seed]
                if name not in one:
                    continue
                if where is None:
                    differences.append(change(one, name) - change(two, name))
                elif (here := at(one, where)) and (there := at(two, where)):
                    differences.append(here[name] - there[name])
            if differences:
                place = "over all steps" if where is None else f"at margin {where}"
                rows[f"{name}, {first} - {second} {place}"] = {
                    "mean and interval": interval(differences),
                    "seeds": ", ".join(f"{value:+.2f}" for value in differences),
                }
    show("Without a bar", rows)


def write_plots(runs: list[dict[str, Any]], out: Path) -> None:
    """Each quantity's change by step and by margin, an arm a colour, a seed a line."""
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    for axis in ("step", "margin"):
        figure = Figure(figsize=(13, 5.5), layout="constrained")
        for axes, name in zip(figure.subplots(2, 5).flat, QUANTITIES, strict=True):
            for run in runs:
                own = curve(run)
                if name in own:
                    x = own.index if axis == "step" else margin(own)
                    first = run is next(other for other in runs if other["arm"] == run["arm"])
                    label = run["arm"] if first else None
                    axes.plot(x, own[name] - own[name].iloc[0], color=f"C{arms.index(run['arm'])}", label=label)
            axes.set_title(name, fontsize=9)
            axes.axhline(0, color="0.8", lw=0.8)
            axes.set_xlabel("DPO step" if axis == "step" else "growth of the margin, nats per token", fontsize=8)
        figure.axes[0].legend(fontsize=8)
        figure.savefig(out / f"by_{axis}.png", dpi=130)


def curve(run: dict[str, Any]) -> pd.DataFrame:
    """The probes on training prompts: a row a pass, indexed by step."""
    entries = records(run, "probe/chosen/logp")
    table = pd.DataFrame(entries).set_index("step")
    return table[[key for key in QUANTITIES.values() if key in table]].rename(
        columns={key: name for name, key in QUANTITIES.items()}
    )


def records(run: dict[str, Any], key: str) -> list[dict[str, Any]]:
    return [entry for entry in run["log_history"] if key in entry]


def has_held_out(run: dict[str, Any], kind: str) -> bool:
    return bool(records(run, f"held_out_probe/{kind}/delta0"))


def held_out(run: dict[str, Any], kind: str) -> float:
    return records(run, f"held_out_probe/{kind}/delta0")[-1][f"held_out_probe/{kind}/delta0"]


def change(curve: pd.DataFrame, name: str) -> float:
    return curve[name].iloc[-1] - curve[name].iloc[0] if name in curve else float("nan")


def start(curves: dict[tuple[str, int], pd.DataFrame], arm: str, seed: int, name: str) -> float:
    return curves[arm, seed][name].iloc[0]


def margin(curve: pd.DataFrame) -> pd.Series:
    gap = curve["chosen"] - curve["rejected"]
    return gap - gap.iloc[0]


def at(curve: pd.DataFrame, where: float) -> dict[str, float] | None:
    """Changes where the margin first reaches `where`, by straight lines between passes; `None` if it never does."""
    grown = margin(curve).to_numpy()
    after = next((index for index in range(1, len(grown)) if grown[index] >= where), None)
    if after is None:
        return None
    weight = (where - grown[after - 1]) / (grown[after] - grown[after - 1])
    table = curve.reset_index()
    row = table.iloc[after - 1] + weight * (table.iloc[after] - table.iloc[after - 1]) - table.iloc[0]
    return row.to_dict()


def interval(values: list[float]) -> str:
    """Mean and half the width of its 95 % t interval."""
    values = [value for value in values if not np.isnan(value)]
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:+.3f}"
    return f"{np.mean(values):+.3f} ± {half_interval(values):.3f}"


def show(title: str, rows: dict[str, dict[str, str]]) -> None:
    print(f"\n{title}\n{pd.DataFrame(rows).T.fillna('–').to_string()}")
