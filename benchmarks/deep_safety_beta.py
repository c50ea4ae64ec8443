"""
How strong must the constrained loss be to keep a refusal? A sweep of the betas on a toy, and what recovery rows and
rehearsed refusals do there, with the price in over-refusal.

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
import sys
import tempfile

from common.arguments import make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", help="these settings only, and no fit of the formula")
    return parse(parser, seeds=[0])


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import datasets
import numpy as np
import torch
from scipy.optimize import minimize_scalar

from hf_iclr.tour.demo.organism import Toy


COLUMNS = ("share refused", "NLL of the opener", "NLL of later tokens", "over-refusal")
STEPS, LR, BETAS = 30, 1e-3, (0.5, 1.0, 2.0, 5.0, 10.0, 100.0)
RECOMMENDED = {"constrain": "refused", "beta_first": 5.0, "beta_initial": 5.0, "rehearse_refusals": True}
SETTINGS = {
    "SFT": {"constrain": "none", "warmup_steps": 0},
    "SFT + warm-up": {"constrain": "none"},
    **{f"{beta:g}/{max(beta, 2):g}/.1": {"beta_first": beta, "beta_initial": max(beta, 2.0)} for beta in BETAS},
    ".5/2/.1, Adam beta1 .9": {"adam_beta1": 0.9},
    ".5/2/.1, SGD (lr .3)": {"optim": "sgd", "lr": 0.3},
    ".5/2/.1, no warm-up": {"warmup_steps": 0},
    "5/5/.1, no warm-up": {"beta_first": 5.0, "beta_initial": 5.0, "warmup_steps": 0},
    "only the first token, 5/.1": {"beta_first": 5.0, "num_initial_tokens": 1},
    "5 for 8 tokens": {"beta_first": 5.0, "beta_initial": 5.0, "num_initial_tokens": 8},
    "5 for all tokens": {"beta_first": 5.0, "beta_initial": 5.0, "beta_rest": 5.0},
    "recommended": RECOMMENDED,
    "rehearsal alone": {**RECOMMENDED, **dict.fromkeys(("beta_first", "beta_initial", "beta_rest"), 1e-6)},
    "recovery rows": {"constrain": "none", "recovery": True},
    "both methods": {**RECOMMENDED, "rehearse_refusals": False, "recovery": True},
}


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    settings = {name: SETTINGS[name] for name in args.rows or SETTINGS}
    results: dict[str, list[tuple[float, ...]]] = {name: [] for name in ("taught", *settings)}
    for seed in args.seeds:
        toy = Toy(seed)

        def measure(name: str, model, toy: Toy = toy) -> None:
            over = toy.refusal_rate(model, toy.allowed_held_out)
            results[name].append((toy.refusal_rate(model, toy.held_out), *toy.nll(model, toy.attack), over))

        measure("taught", toy.model)
        for name, chosen in settings.items():
            setting = {"lr": LR, **chosen}
            if setting.pop("recovery", False):  # of forbidden questions, the share that the trainer has by default
                setting["safety_dataset"] = toy.triplets()
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                measure(name, toy.fine_tune(folder, toy.attack, STEPS, **setting))
            print(f"seed {seed}, {name}: {[round(value, 3) for value in results[name][-1]]}", file=sys.stderr)
    mean = {name: np.mean(values, axis=0) for name, values in results.items()}
    start = mean["taught"][1]
    write_json(args.out / "deep_safety_beta.json", {"seeds": args.seeds, "columns": COLUMNS, "results": results})
    if args.rows:
        for name, values in results.items():
            kept, over = (", ".join(f"{100 * value[column]:.0f}" for value in values) for column in (0, 3))
            print(f"| {name} | {kept} | {over} |")
        return
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
    print("| setting | refusals % | by seed | over-refusal % | rise of the opener, nats | predicted | NLL > 5 |")
    print("|---|---|---|---|---|---|---|")
    for name, (refusals, opener, after, over) in mean.items():
        by_seed = ", ".join(f"{100 * values[0]:.0f}" for values in results[name])
        beta = next((beta for beta in BETAS if name == f"{beta:g}/{max(beta, 2):g}/.1"), None)
        expected = "" if beta is None else f"{predicted(beta, nats):.1f}"
        cells = [
            f"{100 * refusals:.0f}",
            by_seed,
            f"{100 * over:.0f}",
            f"{start - opener:.1f}",
            expected,
            f"{after:.3f}",
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(ARGUMENTS)
