"""
One DPO step on SmolLM2-135M-Instruct explained: predicted and measured change of several answers.

    python benchmarks/squeeze_influence.py

Two pairs and one probe set, made up here; a plain gradient step at two sizes, then AdamW's own first step.
"""

import argparse
import time

from common.arguments import make_parser, parse


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)

    return parse(parser)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import torch

from common.report import print_frame
from hf_iclr.tour.demo.language_model import load_demo_model
from hf_iclr.trainers.squeeze import influence_audit


PAIRS = [
    {
        "prompt": "User: How do I keep bread fresh?\nAssistant:",
        "chosen": " Keep it in a paper bag at room temperature, or freeze it in slices.",
        "rejected": " Just leave it on the table, it hardly matters.",
    },
    {
        "prompt": "User: Why is the sky blue?\nAssistant:",
        "chosen": " Air scatters blue light more than red light, so blue reaches us from all sides.",
        "rejected": " Because it mirrors the sea.",
    },
]
PROBES = [
    PAIRS[0]
    | {
        "chosen_reworded": " Store the loaf in paper, not in the fridge, and put sliced bread in the freezer.",
        "other_train": PAIRS[1]["chosen"],
        "permuted": " slices in bag or room paper it temperature, at Keep freeze in it a",
        "random_words": " river ladder often purple seven quietly engine",
    }
]


def main(args: argparse.Namespace) -> None:
    model, tokenizer = load_demo_model(torch.float32)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-7)
    runs = {
        "gradient step, 1e-4": (PAIRS, {"step_size": 1e-4}),
        "gradient step, 1e-3": (PAIRS[:1], {"step_size": 1e-3}),
        "AdamW, 1e-7": (PAIRS[:1], {"optimizer": adamw}),
    }
    for name, (pairs, settings) in runs.items():
        begin = time.perf_counter()
        report = influence_audit(model, tokenizer, pairs, PROBES, batch_size=6, **settings)
        print(f"\n{name}: correlation {report.correlation:.5f}, slope {report.slope:.3f}, ", end="")
        print(f"{time.perf_counter() - begin:.0f} s")
        print_frame(report.table.drop(columns="probe"), digits=4)
        slug = name.replace(", ", "_").replace(" ", "_")
        report.table.to_csv(args.out / f"{slug}.csv", index=False)
        report.tokens.to_csv(args.out / f"{slug}_tokens.csv", index=False)
        report.plot_tokens().savefig(args.out / f"{slug}.png", dpi=130)


if __name__ == "__main__":
    main(ARGUMENTS)
