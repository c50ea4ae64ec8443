"""The Data Shapley section of `hf-iclr tour`: a few steps on good and poor answers, and what each was worth."""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from peft import LoraConfig
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from hf_iclr.trainers.data_shapley import DataShapleyResult, InRunDataShapleyCallback
from hf_iclr.upstream import checkpointing_argument

from .demo.pairs import demo_pairs


def section(out_dir: Path, quick: bool, progress):
    """
    Trains a LoRA adapter on short answers, a quarter of them poor, and tables the best and the worst by their value
    for held-out good answers.

    Args:
        out_dir (`pathlib.Path`):
            Where the figure and the values go.
        quick (`bool`):
            Fewer rows and steps.
        progress (`Callable`):
            A tqdm.

    Returns:
        [`~hf_iclr.tour.TourSection`]
    """
    from .demo.language_model import load_demo_model
    from .pages import TourSection

    count, held_out, steps = (12, 6, 6) if quick else (20, 12, 15)
    pairs = demo_pairs()
    poor = np.arange(count) % 4 == 0
    rows = Dataset.from_list(
        [
            {"prompt": pair["prompt"], "completion": pair["rejected" if is_poor else "chosen"]}
            for pair, is_poor in zip(pairs.select(range(count)), poor, strict=True)
        ]
    )
    good = pairs.select(range(len(pairs) - held_out, len(pairs))).rename_column("chosen", "completion")
    shapley = InRunDataShapleyCallback(
        good.select_columns(["prompt", "completion"]),
        refresh_every=3,
        adam_warmup=2,
        token_values_for=range(count),
    )
    model, tokenizer = load_demo_model(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder,
            max_steps=steps,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            per_device_train_batch_size=4,
            per_device_eval_batch_size=8,
            logging_steps=steps,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **{checkpointing_argument(): False},
        )
        trainer = SFTTrainer(
            model,
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[shapley],
        )
        trainer.remove_callback(PrinterCallback)
        with progress(total=1, desc="data shapley") as bar:
            trainer.train()
            bar.update()
        result = shapley.result
        page = out_dir / "data_shapley_tokens.html"
        result.token_heatmap(result.bottom(3).index, tokenizer, trainer.train_dataset, path=page)
    result.to_csv(out_dir / "data_shapley.csv")
    values = result.values().reindex(range(count), fill_value=0.0)
    against = np.sign(values.to_numpy()[~poor] - values.to_numpy()[poor][:, None])  # each good row and each poor one
    summary = result.summary().loc["validation"]
    about = (
        f"SmolLM2 with LoRA was trained for {steps} steps on {count} short answers, of which {poor.sum()} are poor; "
        f"each row's value is by how many nats its steps lowered the loss of {held_out} good answers it never saw."
    )
    found = (
        f"AUROC of low values for the poor answers: {(1 + against.mean()) / 2:.2f}. The loss of the good answers "
        f"went from {summary['loss_first']:.3f} to {summary['loss_last']:.3f}; the values add up to "
        f"{summary['explained']:.2f} times its fall. {summary['harmful']:.0%} of the rows were harmful."
    )
    where = (
        f"All values are in data_shapley.csv, those of single tokens of the three lowest rows in {page.name}. "
        "benchmarks/data_shapley.py measures over seeds and beside baselines."
    )
    return TourSection(
        title="What each training row was worth",
        headline=f"Low values point to the poor answers with an AUROC of {(1 + against.mean()) / 2:.2f}.",
        command="hf-iclr run train.py --with shapley:val.jsonl",
        summary=[about, found, where],
        table=_table(result, rows, poor),
        figures=[_figure(values, poor, out_dir / "data_shapley.png")],
        data={"values": values.tolist(), "poor": poor.tolist()},
    )


def _table(result: DataShapleyResult, rows: Dataset, poor: np.ndarray) -> pd.DataFrame:
    lines = []
    for part in (result.top(3), result.bottom(3).iloc[::-1]):
        for index, value in zip(part.index.tolist(), part["value"], strict=True):
            answer = rows[index]["completion"].strip()
            lines.append(
                {
                    "question": rows[index]["prompt"].splitlines()[0].removeprefix("Question: "),
                    "answer": answer if len(answer) <= 60 else f"{answer[:57]}...",
                    "poor": "yes" if poor[index] else "",
                    "value, 1e-3 nats": 1000 * value,
                }
            )
    return pd.DataFrame(lines)


def _figure(values: pd.Series, poor: np.ndarray, path: Path) -> Path:
    order = np.argsort(values.to_numpy())
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    for is_poor, colour, label in ((False, "C0", "good answers"), (True, "C3", "poor answers")):
        places = np.flatnonzero(poor[order] == is_poor)
        axes.bar(places, 1000 * values.to_numpy()[order][places], color=colour, label=label)
    axes.axhline(0, color="0.6", lw=0.8)
    axes.set_xlabel("training rows, sorted")
    axes.set_ylabel("value, thousandths of a nat")
    axes.legend()
    figure.savefig(path, dpi=130)
    return path
