"""
Where the early warning would have fired on logged curves, for several thresholds.

    python benchmarks/squeeze_replay.py --data DIR --out results
    python benchmarks/squeeze_replay.py out/trainer_state.json

DIR holds the curves that the authors of https://huggingface.co/papers/2407.10490 published (`src/exp_results` of
Joshua-Ren/Learning_dynamics_LLM, renamed `refcurve_*.json.gz`). Positions count evaluations from 0; a lead is the
number of evaluations from the first WATCH to the peak of the chosen answer. `on` is the share of evaluations not OK.
"""

import argparse
import logging
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from hf_iclr.trainers.squeeze_replay import replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", nargs="*", type=Path, help="trainer_state.json, or JSON Lines of the authors")
    parser.add_argument("--data", type=Path, help="folder with refcurve_*.json.gz")
    parser.add_argument("--deltas", type=float, nargs="+", default=[0.01, 0.02, 0.05], help="nats per token")
    parser.add_argument("--out", type=Path, default=Path("results/squeeze_replay"), help="folder for table and figure")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    curves = [*arguments.curves, *(sorted(arguments.data.glob("refcurve_*.json*")) if arguments.data else [])]
    if not curves:
        parser.error("no curves: give files, or --data with a folder that holds refcurve_*.json.gz")

    rows, default = [], {}
    for path in curves:
        name = path.name.split(".")[0].removeprefix("refcurve_")
        for delta in arguments.deltas:
            found = replay(path, delta=delta)
            rows.append(
                {
                    "curve": name,
                    "evals": len(found.table),
                    "signal": found.signal,
                    "delta": delta,
                    "watch": found.watch,
                    "squeeze": found.squeeze,
                    "chosen peaks": found.chosen_peak,
                    "lead": found.lead,
                    "on": (found.table["state"] != "OK").mean(),
                }
            )
        default[name] = replay(path)
    table = pd.DataFrame(rows).astype(dict.fromkeys(("watch", "squeeze", "lead"), "Int64"))
    print(table.round(2).to_string(index=False))

    shown = {name: found for name, found in default.items() if len(found.table) > 1}
    figure = Figure(figsize=(8, 2.4 * len(shown)), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown.items(), strict=True):
        start = found.table.iloc[0]
        axes.plot(found.table["chosen"] - start["chosen"], label="chosen")
        axes.plot(found.table["peak"] - start["peak"], label="most likely token")
        for at, color, label in ((found.watch, "C1", "WATCH"), (found.squeeze, "C3", "SQUEEZE")):
            if at is not None:
                axes.axvline(at, color=color, ls="--", label=label)
        axes.axvline(found.chosen_peak, color="C0", ls=":", label="chosen peaks")
        axes.set_title(name, fontsize=9)
        axes.set_ylabel("change, nats/token", fontsize=8)
        axes.legend(fontsize=7)
    axes.set_xlabel("evaluation")
    arguments.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.out / "squeeze_replay.csv", index=False)
    figure.savefig(arguments.out / "squeeze_replay.png", dpi=130)


if __name__ == "__main__":
    main()
