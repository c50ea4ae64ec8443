"""
What the constrained loss costs a step: each reference of DeepSafetySFTTrainer against TRL's SFTTrainer, one process.

    python benchmarks/deep_safety_overhead.py --steps 12 --batch-size 4 --tokens 96

Steps of all trainers take turns, so that a change of the machine's speed meets all of them. Printed: median step time,
its ratio to SFTTrainer's and the ratio of floating-point operations. On SmolLM2-135M in float32, one thread.
"""

import argparse
import statistics
import time
from pathlib import Path

from common.arguments import make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96)
    return parse(parser, steps=2, batch_size=1, tokens=16)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from trl import SFTConfig, SFTTrainer

from hf_iclr import DeepSafetySFTConfig, DeepSafetySFTTrainer
from hf_iclr.tour.demo.language_model import load_demo_model


BARS = {"window": 1.02, "adapter": 1.55, "frozen": 1.40}


def rows(count: int, tokens: int, tokenizer) -> Dataset:
    """Rows of `tokens` tokens, one quarter of each a prompt."""
    text = Path(__file__).read_text() * (1 + count * tokens // 400)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = tokens // 4
    pieces = [ids[start * tokens : (start + 1) * tokens] for start in range(count)]
    return Dataset.from_list([{"input_ids": piece, "labels": [-100] * prompt + piece[prompt:]} for piece in pieces])


def make(trainer_class, config_class, data, lora, args: argparse.Namespace, **settings):
    model, tokenizer = load_demo_model(torch.float32)
    config = config_class(
        str(args.out / "trainer"),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
        save_strategy="no",
        per_device_train_batch_size=args.batch_size,
        max_steps=10_000,
        logging_steps=10_000,
        disable_tqdm=True,
        learning_rate=1e-5,
        **settings,
    )
    peft = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    trainer = trainer_class(model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=peft)
    trainer.create_optimizer_and_scheduler(10_000)
    trainer.model.train()
    return trainer


def step(trainer, batch) -> float:
    """One optimiser step, in seconds."""
    begin = time.perf_counter()
    tokens = (batch["labels"][:, 1:] != -100).sum()
    trainer.training_step(trainer.model, dict(batch), num_items_in_batch=tokens)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return time.perf_counter() - begin


def flops(trainer, batch) -> int:
    with FlopCounterMode(display=False) as counter:
        step(trainer, batch)
    return counter.get_total_flops()


def reference_bytes(trainer) -> int:
    frozen = getattr(trainer, "_ref_model", None)
    return sum(weight.numel() * weight.element_size() for weight in frozen.parameters()) if frozen is not None else 0


def stored_bytes(trainer) -> float:
    if "ref_logps" not in trainer.train_dataset.column_names:
        return 0
    return 4 * sum(map(len, trainer.train_dataset["ref_logps"])) / len(trainer.train_dataset)


def measure(lora: bool, args: argparse.Namespace) -> pd.DataFrame:
    _, tokenizer = load_demo_model(torch.float32)
    data = rows(args.batch_size, args.tokens, tokenizer)
    references = ("window", "adapter") if lora else ("window", "precompute", "frozen")
    trainers = {"SFTTrainer": make(SFTTrainer, SFTConfig, data, lora, args)}
    for reference in references:
        trainers[reference] = make(DeepSafetySFTTrainer, DeepSafetySFTConfig, data, lora, args, reference=reference)
    batches = {name: next(iter(trainer.get_train_dataloader())) for name, trainer in trainers.items()}
    work = {name: flops(trainer, batches[name]) for name, trainer in trainers.items()}  # also warms up
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(args.steps):
        for name, trainer in trainers.items():
            seconds[name].append(step(trainer, batches[name]))
    base = seconds["SFTTrainer"]
    table = []
    for name, times in seconds.items():
        ratios = [ours / theirs for ours, theirs in zip(times, base, strict=True)]
        table.append(
            {
                "adapter": "LoRA" if lora else "full",
                "reference": name,
                "step (s)": statistics.median(times),
                "ratio": statistics.median(ratios),
                "ratio of fastest": min(times) / min(base),
                "FLOP ratio": work[name] / work["SFTTrainer"],
                "weights (MB)": reference_bytes(trainers[name]) / 1e6,
                "stored (bytes a row)": stored_bytes(trainers[name]),
                "bar": BARS.get(name),
            }
        )
    return pd.DataFrame(table)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    table = pd.concat([measure(False, args), measure(True, args)], ignore_index=True)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}", na_rep=""))
    for row in table.dropna(subset=["bar"]).itertuples(index=False):
        verdict = "reached" if row.ratio <= row.bar else "NOT reached"
        print(f"{row.adapter} {row.reference}: {row.ratio:.3f} x, bar {row.bar:.2f} x: {verdict}")
    write_json(args.out / "deep_safety_overhead.json", table.to_dict("records"))


if __name__ == "__main__":
    main(ARGUMENTS)
