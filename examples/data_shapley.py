"""
An ordinary TRL script with one line more: what was each training row worth for held-out answers? Six of the 24 answers
are poor ones. A few steps show the calls, not a result: those are in docs/data_shapley.md.

    python examples/data_shapley.py --max-steps 24
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from hf_iclr import InRunDataShapleyCallback
from hf_iclr.tour.demo.language_model import load_demo_model
from hf_iclr.tour.demo.pairs import demo_pairs


parser = argparse.ArgumentParser()
parser.add_argument("--max-steps", type=int, default=24)
max_steps = parser.parse_args().max_steps

answers = [
    {
        "prompt": pair["prompt"],
        "completion": pair["rejected" if number < 6 else "chosen"],
        "source": "poor" if number < 6 else "good",
    }
    for number, pair in enumerate(demo_pairs())
]
train_dataset, val_dataset = Dataset.from_list(answers[:24]), Dataset.from_list(answers[24:36])

shapley = InRunDataShapleyCallback(val_dataset, refresh_every=4, adam_warmup=3)  # new
model, tokenizer = load_demo_model(torch.float32)
with tempfile.TemporaryDirectory() as folder:
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            folder, max_steps=max_steps, learning_rate=2e-4, per_device_train_batch_size=4, logging_steps=4,
            bf16=False, activation_checkpointing=False, report_to="none", save_strategy="no",
        ),
        train_dataset=train_dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[shapley],  # new
    )  # fmt: skip
    trainer.train()
    result = shapley.result

for title, table in (("Most helpful", result.top(4)), ("Least helpful", result.bottom(8))):
    print(f"\n{title}, nats of validation loss:")
    for index, value in table["value"].items():
        row = train_dataset[index]
        print(f"{value:+.5f} ({row['source']}) {row['prompt'].splitlines()[0]}{row['completion']}")
print("\n", result.by_source("source", train_dataset).totals[["value", "rows", "value_per_token"]].round(5), sep="")
print("\nSum of values / fall of the validation loss:", round(result.explained_ratio(), 2))
kept = result.filter(train_dataset, keep=0.75)
print(f"The best three quarters have {sum(row['source'] == 'poor' for row in kept)} of the 6 poor answers.")
