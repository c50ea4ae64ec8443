"""
When the warning would have come on logged curves, for several thresholds.

    python benchmarks/squeeze_replay.py --data DIR
    python benchmarks/squeeze_replay.py out/trainer_state.json

DIR holds the curves that the authors of https://huggingface.co/papers/2407.10490 published (`src/exp_results` of
Joshua-Ren/Learning_dynamics_LLM, renamed `refcurve_*.json.gz`). Without curves two are made up: one of a run that
loses its chosen answers, one of a run that doesn't. Positions count evaluations from 0.
"""

import argparse
import sys
from pathlib import Path

from common.arguments import make_parser, parse


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("curves", nargs="*", type=Path, help="trainer_state.json, or JSON Lines of the authors")
    parser.add_argument("--data", type=Path, help="folder with refcurve_*.json.gz")
    parser.add_argument("--deltas", type=float, nargs="+", default=[0.05, 0.1, 0.25], help="nats per token")
    return parse(parser)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import pandas as pd

from common.report import print_frame
from hf_iclr.trainers.squeeze import replay_log


def main(args: argparse.Namespace) -> None:
    paths = [*args.curves, *(sorted(args.data.glob("refcurve_*.json*")) if args.data else [])]
    curves = {path.name.split(".")[0].removeprefix("refcurve_"): path for path in paths}
    if args.data and not paths:
        print(f"Expected refcurve_*.json.gz in {args.data}, got none. Give a folder with them.", file=sys.stderr)
        sys.exit(2)
    if not curves:
        lost = [-2 + 0.03 * min(step, 10) - 0.04 * max(step - 10, 0) for step in range(20)]
        kept = [-2 + 0.03 * step for step in range(20)]
        curves = {
            name: [{"step": step, "probe/chosen/logp": value} for step, value in enumerate(values)]
            for name, values in (("lost, made up", lost), ("kept, made up", kept))
        }
    tables = []
    for name, curve in curves.items():
        for delta in args.deltas:
            table = replay_log(curve, delta=delta)
            tables.append(table[table["watched"] == "probe"].assign(curve=name, delta=delta))
    table = pd.concat(tables)[["curve", "evaluations", "delta", "highest_at", "alarm", "fall"]]
    print_frame(table.assign(alarm=table["alarm"].astype(object)), digits=2)
    table.to_csv(args.out / "squeeze_replay.csv", index=False)


if __name__ == "__main__":
    main(ARGUMENTS)
