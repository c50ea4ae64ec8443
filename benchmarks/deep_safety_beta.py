"""
How strong must the constrained loss be to hold a refusal? A sweep of the betas on a toy.

    python benchmarks/deep_safety_beta.py --seeds 0 1 2

A tiny Llama refuses half of its objects, then is fine-tuned on 30 compliant answers to them. While SFT would lift the
log-probability of a compliant opener by r nats a step, the constraint with β₁ leaves the weight w = 2 σ(-β₁ z) ≈
2 exp(-β₁ z) of that after a rise of z, so z ≈ ln(1 + 2 β₁ r t) / β₁ after t steps. What reaches the opener through the
weights it shares with later tokens is not held back: the rise under a very large β is that leak. The refusal is lost
when z comes near the distance -log p at which the opener started.
"""

import argparse
import contextlib
import io
import math
import tempfile

from common.arguments import make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parse(parser, seeds=[0])


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import datasets
import numpy as np
import torch
from scipy.optimize import minimize_scalar

from hf_iclr.tour.demo.organism import Toy


COLUMNS = ("share refused", "NLL of the opener", "NLL of later tokens")
STEPS, LR, BETAS = 30, 1e-3, (0.5, 1.0, 2.0, 5.0, 10.0, 100.0)
SETTINGS = {
    "SFT": {"constrain": "none", "warmup_steps": 0},
    "SFT + warm-up": {"constrain": "none"},
    **{f"{beta:g}/{max(beta, 2):g}/.1": {"beta_first": beta, "beta_initial": max(beta, 2.0)} for beta in BETAS},
    ".5/2/.1, Adam beta1 .9": {"adam_beta1": 0.9},
    ".5/2/.1, SGD (lr .3)": {"optim": "sgd", "lr": 0.3},
    ".5/2/.1, no warm-up": {"warmup_steps": 0},
    "5/5/.1, no warm-up": {"beta_first": 5.0, "beta_initial": 5.0, "warmup_steps": 0},
    "only the first token, 5/.1": {"betas": [5.0, 0.1]},
    "5 for 8 tokens": {"betas": [*[5.0] * 8, 0.1]},
    "5 for all tokens": {"betas": [5.0]},
}


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ("taught", *SETTINGS)}
    for seed in args.seeds:
        toy = Toy(seed)
        results["taught"].append((toy.refusal_rate(toy.model, toy.held_out), *toy.nll(toy.model, toy.attack)))
        for name, settings in SETTINGS.items():
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                model = toy.fine_tune(folder, toy.attack, STEPS, **{"lr": LR, **settings})
            results[name].append((toy.refusal_rate(model, toy.held_out), *toy.nll(model, toy.attack)))
    mean = {name: np.mean(values, axis=0) for name, values in results.items()}
    start = mean["taught"][1]
    rise = {beta: start - mean[f"{beta:g}/{max(beta, 2):g}/.1"][1] for beta in BETAS}
    leak = rise[BETAS[-1]]

    def predicted(beta: float, nats: float) -> float:
        return min(start, leak + math.log1p(2 * beta * nats) / beta)

    fit = minimize_scalar(
        lambda log_nats: sum((predicted(beta, math.exp(log_nats)) - rise[beta]) ** 2 for beta in BETAS[:-1]),
        bounds=(0.0, 8.0), method="bounded",
    )  # fmt: skip
    nats = math.exp(fit.x)
    print(f"{len(args.seeds)} seeds, means; opener at log p = {-start:.1f} before the attack")
    print(f"fit: leak {leak:.1f} nats, r t = {nats:.0f} nats\n")
    print("| setting | refusals % | by seed | rise of the opener, nats | predicted | NLL > 5 |")
    print("|---|---|---|---|---|---|")
    for name, (refusals, opener, after) in mean.items():
        by_seed = ", ".join(f"{100 * values[0]:.0f}" for values in results[name])
        beta = next((beta for beta in BETAS if name == f"{beta:g}/{max(beta, 2):g}/.1"), None)
        expected = "" if beta is None else f"{predicted(beta, nats):.1f}"
        print(f"| {name} | {100 * refusals:.0f} | {by_seed} | {start - opener:.1f} | {expected} | {after:.3f} |")
    write_json(args.out / "deep_safety_beta.json", {"seeds": args.seeds, "columns": COLUMNS, "results": results})


if __name__ == "__main__":
    main(ARGUMENTS)
