"""
A model is edited, then trained on other facts. Does it keep its edits, and does `NullSpaceCallback` help?

    python examples/edits_kept_in_training.py --seeds 2 3

SmolLM2-135M gets eight capitals by `AlphaEditor`; then the down-projections that were edited are trained on twelve
others. The callback's statistics are of ordinary text, or of that and of the edits' prompts:
edits lie where ordinary text does not reach, so statistics of text alone leave their place open. Capitals are false by
design.
"""

import argparse
import random
import tempfile

import pandas as pd
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

from hf_iclr import AlphaEditConfig, AlphaEditor, EditRequest, KeyStatistics, NullSpaceCallback
from hf_iclr.editors.alpha_edit import evaluate_edits, perplexity
from hf_iclr.tour.demo.facts import demo_requests, demo_text
from hf_iclr.tour.demo.language_model import load_demo_model


parser = argparse.ArgumentParser()
parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3])
parser.add_argument("--steps", type=int, default=60, help="of training, on 6 facts each")
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--tokens", type=int, default=6000, help="of text, for the statistics")
parser.add_argument("--repeats", type=int, default=10, help="how often the edits' prompts are read for them")
args = parser.parse_args()


def train(model, facts: list[EditRequest], seed: int, callbacks: list) -> None:
    rows = []
    for fact in facts:
        prompt, answer = (tokenizer(text)["input_ids"] for text in (fact.text, f" {fact.target_new}"))
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=args.steps, per_device_train_batch_size=6, learning_rate=args.lr,
            lr_scheduler_type="constant", seed=seed, use_cpu=True, report_to="none", save_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            model, settings, train_dataset=Dataset.from_list(rows), data_collator=DataCollatorForSeq2Seq(tokenizer),
            callbacks=callbacks,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def measure(model, edited: list[EditRequest], learnt: list[EditRequest]) -> dict[str, float]:
    edits, facts = (evaluate_edits(model, tokenizer, side, progress=False) for side in (edited, learnt))
    return {
        "edits said %": 100 * edits["efficacy_argmax"],
        "in other words %": 100 * edits["generalisation"],
        "new facts said %": 100 * facts["efficacy_argmax"],
        "perplexity of other text": perplexity(model, tokenizer, held_out, max_length=48, progress=False),
    }


torch.set_num_threads(1)
text, found = demo_text(), []
held_out = text["text"][-30:]
text = text.select(range(len(text) - 30))
original, tokenizer = load_demo_model(torch.float32)
statistics = KeyStatistics.from_dataset(original, tokenizer, text, max_tokens=args.tokens)
for seed in args.seeds:
    facts = random.Random(seed).sample(demo_requests(), 20)
    facts = [EditRequest(**{**vars(fact), "neighborhood": ()}) for fact in facts]
    edited, learnt = facts[:8], facts[8:]
    model, _ = load_demo_model(torch.float32)
    editor = AlphaEditor(model, tokenizer, AlphaEditConfig(num_contexts=2, kl_factor=0.0, num_steps=20), statistics)
    editor.edit(edited)
    model = editor.merge().requires_grad_(False)

    # The callback wants statistics of the model as it is when training begins
    of_text = KeyStatistics.from_dataset(model, tokenizer, text, max_tokens=args.tokens)
    prompts = Dataset.from_dict({"text": [f"{fact.text} {fact.target_new}" for fact in edited] * args.repeats})
    of_both = of_text + KeyStatistics.from_dataset(model, tokenizer, prompts)
    weights = [model.get_submodule(of_text.module_names[layer]).weight.requires_grad_() for layer in of_text.layers]
    after_edits = [weight.detach().clone() for weight in weights]

    found.append({"": "edited", **measure(model, edited, learnt)})
    ways = {
        "trained on": [],
        "with the callback, statistics of text": [NullSpaceCallback(of_text)],
        "with the callback, of text and edits": [NullSpaceCallback(of_both)],
    }
    for name, callbacks in ways.items():
        train(model, learnt, seed, callbacks)
        found.append({"": name, **measure(model, edited, learnt)})
        with torch.no_grad():
            for weight, before in zip(weights, after_edits, strict=True):
                weight.copy_(before)

table = pd.DataFrame(found)
print(f"Seeds {args.seeds}; means, and the edits said by seed\n")
print(f"| {' | '.join(table.columns)} | by seed |\n" + "| --- " * (len(table.columns) + 1) + "|")
for name, group in table.groupby("", sort=False):
    means = " | ".join(f"{value:.1f}" for value in group.drop(columns="").mean())
    print(f"| {name} | {means} | {', '.join(f'{value:.0f}' for value in group['edits said %'])} |")
