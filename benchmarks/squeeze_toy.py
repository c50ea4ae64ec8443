"""
The softmax model of the squeezing effect: the five panels, and how often the exact threshold is right.

    python benchmarks/squeeze_toy.py
"""

import argparse

from common.arguments import make_parser, parse


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--cases", type=int, default=3000)
    return parse(parser, cases=100)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import numpy as np
import pandas as pd

from common.report import print_frame
from hf_iclr.tour.demo.squeeze_toy import plot_squeeze_panels, squeeze_panels, squeeze_step


def main(args: argparse.Namespace) -> None:
    rows = []
    for panel in squeeze_panels():
        step, others = panel.step, np.arange(len(panel.step.probs)) != panel.target
        rows.append(
            {
                "panel": panel.title,
                "others that lose": f"{(step.ratio[others] < 1).sum()} of {others.sum()}",
                "median of their log ratio": np.median(np.log(step.ratio[others])),
                "target": np.log(step.ratio[panel.target]),
                "most likely other": np.log(step.ratio[others][step.probs_before[others].argmax()]),
            }
        )
    print_frame(pd.DataFrame(rows))

    rng = np.random.default_rng(0)
    fallen = risen = agree = first_order = tokens = 0
    for _ in range(args.cases):
        logits = rng.uniform(0.1, 6) * rng.standard_normal(1000)
        target, h = int(rng.integers(1000)), float(np.exp(rng.uniform(np.log(1e-3), np.log(10))))
        step = squeeze_step(logits, target, h)
        others = np.arange(1000) != target
        gains, probs = step.ratio[others] > 1, step.probs_before[others]
        fallen += step.ratio[target] < 1
        risen += gains[probs.argmax()]
        agree += (gains == (probs > step.threshold)).sum()
        first_order += (gains == (probs > step.first_order_threshold)).sum()
        tokens += len(gains)
    print(f"\n{args.cases} random softmaxes of 1000 tokens, h from 0.001 to 10:")
    print(f"the target fell in {fallen}, the most likely other token gained in {risen}")
    print(f"threshold right for {agree} of {tokens} tokens, to first order for {first_order / tokens:.1%}")
    plot_squeeze_panels().savefig(args.out / "squeeze_toy.png", dpi=130)


if __name__ == "__main__":
    main(ARGUMENTS)
