"""How many validation rows a direction needs, and for how many steps it holds.

    python benchmarks/data_shapley_staleness.py
    python benchmarks/data_shapley_staleness.py --model ../shared/data/models/stories260k --lr 2e-3 --at 21 22 26 41

SmolLM2-135M with LoRA on all linear layers is trained by AdamW, 16 rows a step. Before some steps the gradients of all
validation batches and of each training row of the step are taken by backward passes of their own, so that values along
any direction are exact inner products. Printed are Pearson's correlations, over the rows of a step, with values along
the gradient of all validation rows at the present weights: of values along that of fewer rows, and along that of all
rows as it was at an earlier step; the latter also with Adam's second moment of the present step. The cosine is that of
the two directions, and the agreement that of a batch of 8 rows, as `shapley/agreement`.
"""

import argparse
from pathlib import Path

from common.arguments import make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--model", type=Path, help="a folder with a model to train instead of SmolLM2")
    parser.add_argument("--at", type=int, nargs="+", default=[21, 22, 26, 41], help="steps that are looked at")
    parser.add_argument("--tokens", type=int, default=16, help="of a row")
    parser.add_argument("--validation", type=int, default=200, help="rows, of which 8 are a batch")
    parser.add_argument("--lr", type=float, default=2e-4)
    return parse(parser, at=[3, 4], tokens=8, validation=32)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from hf_iclr.tour.demo.draft import docstrings
from hf_iclr.tour.demo.language_model import load_demo_model


ROWS, BATCH = 16, 8


def pearson(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(np.corrcoef(one.numpy(), other.numpy())[0, 1])


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


class Run:
    """A training whose gradients can be looked at."""

    def __init__(self, args: argparse.Namespace) -> None:
        set_seed(0)
        if args.model:
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(args.model)
        else:
            model, tokenizer = load_demo_model(torch.float32)
        self.model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        ids, count = tokenizer("\n\n".join(docstrings()))["input_ids"], args.validation + ROWS * max(args.at)
        starts = np.random.default_rng(0).permutation(len(ids) // args.tokens)[:count] * args.tokens
        rows = torch.tensor([ids[at : at + args.tokens] for at in starts])
        self.validation, self.rows = rows[: args.validation], rows[args.validation :]
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=args.lr, weight_decay=0.0)

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, labels=ids).loss

    def gradient(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.cat([found.flatten() for found in torch.autograd.grad(self.loss(ids), self.parameters)])

    def batch(self, step: int) -> torch.Tensor:
        return self.rows[(step - 1) * ROWS : step * ROWS]

    def look(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of validation batches and of rows; what Adam divides them by, as factors."""
        self.model.eval()
        batches = torch.stack([self.gradient(some) for some in self.validation.split(BATCH)])
        rows = torch.stack([self.gradient(row[None]) for row in self.batch(step)])
        scales = []
        for parameter in self.parameters:
            state = self.optimizer.state[parameter]
            second = state["exp_avg_sq"]
            root = (second / (1 - 0.999 ** float(state["step"]))).sqrt()
            scales.append(((second > 0) / (root + 1e-8)).flatten())
        return batches, rows, torch.cat(scales)

    def step(self, step: int) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        self.loss(self.batch(step)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    run, draw, earlier, found = Run(args), np.random.default_rng(0), {}, []
    for step in range(1, max(args.at) + 1):
        if step in args.at:
            batches, rows, scale = run.look(step)
            whole, count = batches.mean(0), len(batches)
            exact = rows @ (scale * whole)
            others = [cosine(scale * one, scale * (batches.sum(0) - one)) for one in batches[:6]]
            line = {"step": step, "fewer rows": {}, "earlier": {}, "a batch and the others": float(np.mean(others))}
            for few in [few for few in (1, 2, 3, 5, 8, 12) if few < count]:
                some = [rows @ (scale * batches[draw.permutation(count)[:few]].mean(0)) for _ in range(5)]
                line["fewer rows"][few * BATCH] = float(np.mean([pearson(one, exact) for one in some]))
            for then, (gradient, old) in earlier.items():
                line["earlier"][then] = {
                    "Pearson": pearson(rows @ (old * gradient), exact),
                    "with the present moment": pearson(rows @ (scale * gradient), exact),
                    "cosine": cosine(old * gradient, scale * whole),
                    "agreement": cosine(old * gradient, scale * batches[0]),
                }
            print(f"step {step}: of fewer rows", {few: round(of, 3) for few, of in line["fewer rows"].items()})
            print(f"  cosine of a batch and the others: {np.mean(others):.3f}")
            for then, of in line["earlier"].items():
                print(f"  of step {then}:", {name: round(value, 3) for name, value in of.items()}, flush=True)
            earlier[step] = whole, scale
            found.append(line)
            write_json(args.out / "data_shapley_staleness.json", found)
        run.step(step)


if __name__ == "__main__":
    main(ARGUMENTS)
