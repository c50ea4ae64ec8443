"""
Where the early warning would have fired on logged curves, for several thresholds.

    python benchmarks/squeeze_replay.py --data DIR
    python benchmarks/squeeze_replay.py out/trainer_state.json

DIR holds the curves that the authors of https://huggingface.co/papers/2407.10490 published (`src/exp_results` of
Joshua-Ren/Learning_dynamics_LLM, renamed `refcurve_*.json.gz`). Without curves two are made up: one of a run that is
squeezed, one of a run that isn't. Positions count evaluations from 0; a lead is the number of evaluations from the
first WATCH to the peak of the chosen answer. `on` is the share of evaluations not OK.
"""

import argparse
import logging
import sys
from pathlib import Path

from common.arguments import make_parser, parse


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("curves", nargs="*", type=Path, help="trainer_state.json, or JSON Lines of the authors")
    parser.add_argument("--data", type=Path, help="folder with refcurve_*.json.gz")
    parser.add_argument("--deltas", type=float, nargs="+", default=[0.01, 0.02, 0.05], help="nats per token")
    return parse(parser)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import pandas as pd
from matplotlib.figure import Figure

from common.squeeze_replay import replay


def read_curves(args: argparse.Namespace) -> dict[str, Path]:
    paths = [*args.curves, *(sorted(args.data.glob("refcurve_*.json*")) if args.data else [])]
    if not paths:
        print(
            f"Expected refcurve_*.json.gz in {args.data}, got none. Give a folder with them, or files.",
            file=sys.stderr,
        )
        sys.exit(2)
    return {path.name.split(".")[0].removeprefix("refcurve_"): path for path in paths}


def make_curves(evaluations: int = 20) -> dict[str, list[dict[str, float]]]:
    """Logs of a run whose other answers fall before the chosen one, and of one whose rejected answer alone falls."""
    squeezed, healthy = [], []
    for step in range(evaluations):
        rise, fall = 0.03 * min(step, 10), 0.04 * max(step - 10, 0)
        others = {f"probe/{kind}/logp": -5 - 0.05 * max(step - 4, 0) for kind in ("other_train", "permuted")}
        peak = {"probe/chosen/logp_argmax": -1 + 0.02 * step}
        squeezed.append({"step": step, "probe/chosen/logp": -2 + rise - fall, "probe/rejected/logp": -2 - 0.1 * step})
        squeezed[-1] |= others | peak
        healthy.append({"step": step, "probe/chosen/logp": -2 + 0.03 * step, "probe/rejected/logp": -2 - 0.01 * step})
        healthy[-1] |= dict.fromkeys(others, -5.0) | peak
    return {"squeezed, made up": squeezed, "healthy, made up": healthy}


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    curves = read_curves(args) if args.curves or args.data else make_curves()

    rows, default = [], {}
    for name, curve in curves.items():
        for delta in args.deltas:
            found = replay(curve, delta=delta)
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
        default[name] = replay(curve)
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
    table.to_csv(args.out / "squeeze_replay.csv", index=False)
    figure.savefig(args.out / "squeeze_replay.png", dpi=130)


if __name__ == "__main__":
    main(ARGUMENTS)
