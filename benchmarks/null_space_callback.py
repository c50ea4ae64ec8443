"""
What `NullSpaceCallback` keeps: SmolLM2 learns facts by fine-tuning, with and without it.

    python benchmarks/null_space_callback.py --data DIR

DIR holds the files that alphaedit.py tells of; without it the facts are the package's own capitals, the sentences
docstrings, and there are fewer facts a seed. The down-projections of the layers that AlphaEdit
would edit are trained on the facts' new answers, which are false by design; everything else is frozen. Each
seed has facts of its own, in an order of its own, for both rows. Training ends when the facts are learnt: at the first
epoch with a mean loss below `--until-loss`. Measured before and after: efficacy and generalisation on these facts,
perplexity, and how far the outputs of the preserved directions moved, ‖(W - W_old) U‖ / ‖W_old U‖.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from common.arguments import make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--data", type=Path, help="folder with the three files (default: the package's own)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--facts", type=int, default=24, help="facts a seed")
    parser.add_argument("--until-loss", type=float, default=0.2, help="nats per token")
    parser.add_argument("--steps", type=int, default=60, help="at most")
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threshold", type=float, default=2e-2, help="smallest preserved eigenvalue")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens of the statistics")
    parser.add_argument("--texts", type=int, default=80, help="sentences of perplexity; half as many of wikitext")
    return parse(parser, seeds=1, facts=6, steps=4, tokens=2000, texts=8)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import pandas as pd
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from common.edit_data import load_edit_data
from common.report import print_frame
from hf_iclr.editors import NullSpaceCallback
from hf_iclr.editors.alpha_edit import EditRequest, KeyStatistics, evaluate_edits, perplexity
from hf_iclr.tour.demo.language_model import load_demo_model


def fact_rows(tokenizer: Any, requests: list[EditRequest]) -> Dataset:
    """Prompt and new answer as tokens, the answer alone as labels."""
    rows = []
    for request in requests:
        prompt = tokenizer(request.text)["input_ids"]
        answer = tokenizer(f" {request.target_new}", add_special_tokens=False)["input_ids"]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return Dataset.from_list(rows)


class StopWhenLearnt(TrainerCallback):
    """Ends a training whose logged loss is low enough."""

    def __init__(self, loss: float):
        self.loss = loss

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and logs.get("loss", self.loss) < self.loss:
            control.should_training_stop = True


def fine_tune(model: Any, tokenizer: Any, facts: list[EditRequest], callbacks: list, seed: int, args: Any) -> int:
    """Trains the model and returns the number of steps."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="constant",
            seed=seed,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="epoch",
        )
        collator = DataCollatorForSeq2Seq(tokenizer)
        rows = fact_rows(tokenizer, facts)
        callbacks = [*callbacks, StopWhenLearnt(args.until_loss)]
        trainer = Trainer(model, settings, train_dataset=rows, data_collator=collator, callbacks=callbacks)
        return trainer.train().global_step


def main(args: argparse.Namespace) -> None:
    model, tokenizer = load_demo_model(torch.float32)
    data = load_edit_data(args.data)
    texts = {"same source": data.sentences[-args.texts :], "other source": data.other_texts[: args.texts // 2]}
    count = min(args.facts, len(data.facts) // args.seeds)
    requests = [EditRequest(**{**vars(request), "neighborhood": ()}) for request in data.facts[: args.seeds * count]]

    began = time.process_time()
    general = Dataset.from_dict({"text": data.sentences[: -args.texts]})
    statistics = KeyStatistics.from_dataset(model, tokenizer, general, max_tokens=args.tokens, batch_size=64)
    preserved = {layer: statistics.preserved(layer, threshold=args.threshold).float() for layer in statistics.layers}
    weights = {layer: model.get_submodule(statistics.module_names[layer]).weight for layer in statistics.layers}
    before = {layer: weight.detach().clone() for layer, weight in weights.items()}
    model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)

    def measure(seed: int, method: str, facts: list[EditRequest], steps: int, ppl: dict[str, float]) -> dict[str, Any]:
        scores = evaluate_edits(model, tokenizer, facts, progress=False)
        drift = [
            ((weight.detach() - before[layer]) @ preserved[layer]).norm() / (before[layer] @ preserved[layer]).norm()
            for layer, weight in weights.items()
        ]
        named = {name: scores[name] for name in ("efficacy", "efficacy_argmax", "generalisation")}
        drift_mean = torch.stack(drift).mean().item()
        return {"seed": seed, "method": method, **named, **ppl, "preserved drift": drift_mean, "steps": steps}

    def perplexities() -> dict[str, float]:
        return {
            name: perplexity(model, tokenizer, part, max_length=48, progress=False) for name, part in texts.items()
        }

    untouched, rows = perplexities(), []
    for seed in tqdm(range(args.seeds), desc="Seeds"):
        facts = requests[seed * count : (seed + 1) * count]
        rows.append(measure(seed, "unedited", facts, 0, untouched))
        for method in ("fine-tuning", "null space"):
            callbacks = [NullSpaceCallback(statistics, nullspace_threshold=args.threshold)]
            steps = fine_tune(model, tokenizer, facts, callbacks if method == "null space" else [], seed, args)
            rows.append(measure(seed, method, facts, steps, perplexities()))
            with torch.no_grad():
                for layer, weight in weights.items():
                    weight.copy_(before[layer])

    table = pd.DataFrame(rows)
    for name in texts:
        table[f"{name}, change %"] = 100 * (table[name] / untouched[name] - 1)
    summary = table.drop(columns="seed").groupby("method", sort=False).agg(["mean", "std"])
    ranks = {layer: basis.shape[1] for layer, basis in preserved.items()}
    print(f"preserved directions of 1536 by layer: {ranks}")
    print(f"{statistics.tokens:,} tokens of statistics, {count} facts a seed, {args.seeds} seeds")
    print_frame(summary.T.reset_index(names=["measured", ""]), digits=4)
    seconds = time.process_time() - began
    print(f"{seconds:.0f} CPU-seconds")
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("data", "out")}
    result = {"settings": settings, "preserved": ranks, "cpu_seconds": seconds, "rows": table.to_dict("records")}
    write_json(args.out / "null_space_callback.json", result)


if __name__ == "__main__":
    main(ARGUMENTS)
