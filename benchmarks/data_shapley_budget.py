"""What the default `cost=0.05` costs all in, and how close its direction stays to the exact one.

    python benchmarks/data_shapley_budget.py --kinds LoRA full

SmolLM2-135M in a Trainer with AdamW, 16 rows a step, 200 validation rows. Two equal runs, one with the callback's
defaults, take turns step by step in one process, so that what else the machine does meets both; each run's CPU time is
that of its own thread, from before `train()` until it returns: first direction, refreshes, scores, checks and last
losses are in it. Printed apart is what scoring adds to a step, the median over steps with values, and how many steps'
worth passes over validation rows and checks take in all. A third run, whose weights are the same bit for bit, measures
the exact direction of all validation rows every few steps, without a sketch; Pearson's correlation is of its values
with those of the default run in these steps: within each step, and over all of them. `--exact-every 0` measures the
cost alone.
"""

import argparse
import threading
import time
from types import SimpleNamespace

from common.adapters import ADAPTERS
from common.arguments import make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--kinds", nargs="+", choices=tuple(ADAPTERS), default=("LoRA", "full"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=32, help="of a row")
    parser.add_argument("--rows", type=int, default=16, help="of a step")
    parser.add_argument("--validation", type=int, default=200, help="rows")
    parser.add_argument("--exact-every", type=int, default=10, help="steps between two exact directions; 0 for none")
    parser.add_argument("--adam-warmup", type=int, default=20, help="steps without values")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    return parse(parser, steps=26, tokens=8, rows=4, validation=12)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_iclr import InRunDataShapleyCallback
from hf_iclr.tour.demo.draft import docstrings
from hf_iclr.tour.demo.language_model import load_demo_model
from hf_iclr.trainers.data_shapley import callback, directions
from hf_iclr.trainers.data_shapley.gradients import meter, schedule


COST_BAR, PEARSON_BAR = 1.05, 0.95
# What the callback goes by, as if there were no other run: its own thread's time, for waiting is no step's
for _module in (directions, callback, meter, schedule):
    vars(_module)["time"] = SimpleNamespace(perf_counter=time.thread_time)


class Turns(TrainerCallback):
    """Lets two runs make a step each, one after the other."""

    def __init__(self, mine: threading.Semaphore, other: threading.Semaphore) -> None:
        self.mine, self.other = mine, other
        self.seconds: list[float] = []  # of steps, without what other callbacks do before them

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.mine.acquire()
        self.began = time.thread_time()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds.append(time.thread_time() - self.began)
        self.other.release()


def blocks(count: int, tokens: int, tokenizer, seed: int) -> Dataset:
    """Docstrings of the standard library, cut."""
    ids = tokenizer("\n\n".join(docstrings()))["input_ids"]
    starts = np.random.default_rng(seed).permutation(len(ids) // tokens)[:count] * tokens
    return Dataset.from_list([{"input_ids": ids[at : at + tokens], "labels": ids[at : at + tokens]} for at in starts])


def make_trainer(kind: str, rows: Dataset, callbacks: list[TrainerCallback], args: argparse.Namespace) -> Trainer:
    set_seed(args.seed)
    model, _ = load_demo_model(torch.float32)
    if (adapter := ADAPTERS[kind]) is not None:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **adapter))
    settings = TrainingArguments(
        str(args.out / "run"), max_steps=args.steps, per_device_train_batch_size=args.rows, learning_rate=args.lr,
        optim="adamw_torch", lr_scheduler_type="constant", seed=args.seed, use_cpu=True, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=rows, data_collator=default_data_collator, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    return trainer


def in_turns(trainers: list[Trainer]) -> list[tuple[float, np.ndarray]]:
    """CPU seconds of each run, and of its steps."""
    first, second = threading.Semaphore(1), threading.Semaphore(0)
    seconds = [0.0] * len(trainers)

    def run(which: int) -> None:
        torch.set_num_threads(1)
        began = time.thread_time()
        trainers[which].train()
        seconds[which] = time.thread_time() - began

    turns = Turns(first, second), Turns(second, first)
    for trainer, turn in zip(trainers, turns, strict=True):
        trainer.add_callback(turn)
    threads = [threading.Thread(target=run, args=(which,)) for which in range(len(trainers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [(whole, np.array(turn.seconds)) for whole, turn in zip(seconds, turns, strict=True)]


def pearsons(found, exact) -> tuple[list[float], float]:
    """Of values at the steps whose direction is exact: of each step, and of all."""
    steps = exact.steps.loc[exact.steps["energy_validation"].notna(), "step"]
    both = found.rows.merge(exact.rows[exact.rows["step"].isin(steps)], on=["step", "index"], suffixes=("", "_exact"))
    of_steps = [float(np.corrcoef(part["value"], part["value_exact"])[0, 1]) for _, part in both.groupby("step")]
    return of_steps, float(np.corrcoef(both["value"], both["value_exact"])[0, 1])


def measure(kind: str, args: argparse.Namespace) -> dict:
    _, tokenizer = load_demo_model(torch.float32)
    rows = blocks(args.rows * args.steps + args.validation, args.tokens, tokenizer, args.seed)
    validation, rows = rows.select(range(args.validation)), rows.select(range(args.validation, len(rows)))
    default = InRunDataShapleyCallback(validation, adam_warmup=args.adam_warmup)
    runs = in_turns([make_trainer(kind, rows, [], args), make_trainer(kind, rows, [default], args)])
    (plain, steps), (scored, scored_steps) = runs
    refreshes = int(default.result.steps["energy_validation"].notna().sum())
    found = {"trained": kind, "plain (s)": plain, "with values (s)": scored, "cost": scored / plain}
    found["scoring"] = scoring = float(np.median((scored_steps / steps)[args.adam_warmup :])) - 1
    passes = scored - plain - scoring * steps[args.adam_warmup :].sum()
    found["passes and checks (steps)"] = float(passes / np.median(steps))
    found |= {"refreshes": refreshes, "agreement": float(default.result.summary().loc["validation", "agreement"])}
    bars = {f"cost {scored / plain:.4f}, bar {COST_BAR}": scored / plain <= COST_BAR}
    if args.exact_every:
        settings = {"refresh_every": args.exact_every, "exact": True, "adam_warmup": args.adam_warmup}
        reference = InRunDataShapleyCallback(validation, **settings)
        make_trainer(kind, rows, [reference], args).train()
        of_steps, of_all = pearsons(default.result, reference.result)
        found |= {"Pearson of steps": of_steps, "mean": float(np.mean(of_steps)), "of all": of_all}
        bars[f"Pearson {np.mean(of_steps):.3f}, bar {PEARSON_BAR}"] = np.mean(of_steps) >= PEARSON_BAR
    print("\n".join(f"{name}: {value}" for name, value in found.items()))
    for name, good in bars.items():
        print(f"{kind}: {name}: {'reached' if good else 'NOT reached'}", flush=True)
    return found


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    write_json(args.out / "data_shapley_budget.json", [measure(kind, args) for kind in args.kinds])


if __name__ == "__main__":
    main(ARGUMENTS)
