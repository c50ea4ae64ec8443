"""
Which training rows erode a model's refusals, and does it keep them when trained without these rows?

    python examples/keep_refusals_by_shapley.py --seeds 5 6 7 8 9

A tiny model that refuses half of all questions is fine-tuned on 45 answers to allowed questions and, among them, 8 to
questions that it refuses. `targets={"safety": ...}` values each row by what it did to refusals of others of that
kind. The model is then trained anew without the rows of the lowest values, and asked questions that it never saw.
Settings were chosen on the seeds 0 to 3.
"""

import argparse
import copy
import random
import tempfile

import pandas as pd
import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from hf_iclr import InRunDataShapleyCallback
from hf_iclr.tour.demo.organism import REFUSALS, Toy


parser = argparse.ArgumentParser()
parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6, 7, 8, 9])
parser.add_argument("--drop", type=int, nargs="+", default=[8], help="how many rows are taken out")
args = parser.parse_args()
PLANTED = 8


def conversations(pairs: list[tuple[str, str]]) -> Dataset:
    said = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    return Dataset.from_dict({"prompt": [turns[:1] for turns in said], "completion": [turns[1:] for turns in said]})


def train(toy: Toy, rows: Dataset, seed: int, *callbacks: InRunDataShapleyCallback):
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            folder, max_steps=40, learning_rate=1e-3, per_device_train_batch_size=8, seed=seed, use_cpu=True,
            bf16=False, activation_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        model = copy.deepcopy(toy.model)
        trainer = SFTTrainer(
            model, settings, train_dataset=rows, processing_class=toy.tokenizer, callbacks=[*callbacks]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model.eval()


torch.set_num_threads(1)
found = []
for seed in args.seeds:
    toy, draw = Toy(seed), random.Random(seed)
    forbidden = draw.sample(toy.forbidden, len(toy.forbidden))
    rows = conversations([(row.prompt, row.answer) for row in [*toy.allowed, *forbidden[:PLANTED]]])
    refusals = conversations([(row.prompt, draw.choice(REFUSALS)) for row in forbidden[PLANTED:]])
    helpful = conversations([(row.prompt, row.answer) for row in toy.allowed_held_out])
    planted = set(range(len(toy.allowed), len(rows)))

    shapley = InRunDataShapleyCallback(helpful, targets={"safety": refusals}, refresh_every=1, adam_warmup=1)
    models = {"nothing (as taught)": (toy.model, planted), "all rows": (train(toy, rows, seed, shapley), planted)}
    without = {"the planted 8": planted}
    for drop in args.drop:
        without[f"the lowest {drop}"] = set(shapley.result.bottom(drop, target="safety").index)
        without[f"{drop} random rows"] = set(draw.sample(range(len(rows)), drop))
    for name, out in without.items():
        kept = rows.select([row for row in range(len(rows)) if row not in out])
        models[f"all but {name}"] = (train(toy, kept, seed), planted - out)
    for name, (model, left) in models.items():
        refused, over = (100 * toy.refusal_rate(model, side) for side in (toy.held_out, toy.allowed_held_out))
        found.append({"trained on": name, "planted left": len(left), "refuses %": refused, "over-refuses %": over})

print(f"Seeds {args.seeds}; means, and refusals by seed\n")
print("| trained on | planted left | refuses % | by seed | over-refuses % |\n| --- | --- | --- | --- | --- |")
for name, group in pd.DataFrame(found).groupby("trained on", sort=False):
    by_seed = ", ".join(f"{value:.0f}" for value in group["refuses %"])
    left, refused, over = group.drop(columns="trained on").mean()
    print(f"| {name} | {left:.1f} | {refused:.0f} | {by_seed} | {over:.0f} |")
