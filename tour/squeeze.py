"""The squeezing section of `hf-iclr tour`: a few steps of DPO on SmolLM2, and where its probability mass goes."""

import tempfile
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from peft import LoraConfig
from transformers import PrinterCallback

from hf_iclr.trainers.squeeze import (
    SqueezeDPOConfig,
    SqueezeDPOTrainer,
    SqueezeProbeCallback,
    build_probe_set,
    write_squeeze_report,
)
from hf_iclr.upstream import checkpointing_argument

from .demo.pairs import demo_pairs


def section(out_dir: Path, quick: bool, progress):
    """
    Trains a LoRA adapter by DPO on a few pairs and tables every kind of probe before and after.

    Args:
        out_dir (`pathlib.Path`):
            Where the figure and the report go.
        quick (`bool`):
            Fewer steps, pairs and probes.
        progress (`Callable`):
            A tqdm.

    Returns:
        [`~hf_iclr.tour.TourSection`]
    """
    from .demo.language_model import fastest_dtype, load_demo_model
    from .pages import TourSection

    steps, num_pairs, num_probes = (5, 6, 2) if quick else (10, 8, 3)
    model, tokenizer = load_demo_model(fastest_dtype(64))
    rows = demo_pairs()
    pairs, others = rows.select(range(num_pairs)), rows.select(range(num_pairs, len(rows)))
    probes = build_probe_set(pairs, num_probes=num_probes, test_pairs=others, rephrases=["chosen_rephrased"])
    with tempfile.TemporaryDirectory() as folder:
        args = SqueezeDPOConfig(
            folder,
            max_steps=steps,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            optim="rmsprop",
            per_device_train_batch_size=2,
            per_device_eval_batch_size=16,
            squeeze_metrics="full",
            argmax_every=5,
            logging_steps=1,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **{checkpointing_argument(): False},
        )
        trainer = SqueezeDPOTrainer(
            model,
            args=args,
            train_dataset=pairs.select_columns(["prompt", "chosen", "rejected"]),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(
            SqueezeProbeCallback(
                probes,
                trainer=trainer,
                every=max(steps // 2, 2),
                probe_budget=1.0,
                decode_every=steps,
                max_new_tokens=12,
            )
        )
        with progress(total=1, desc="squeezing") as bar:
            trainer.train()
            bar.update()
    history = trainer.state.log_history
    report = write_squeeze_report(history, out_dir / "squeeze")
    passes = [entry for entry in history if "probe/chosen/logp" in entry]
    table = pd.DataFrame(
        [
            {
                "answer": kind.replace("_", " "),
                "before": passes[0][f"probe/{kind}/logp"],
                "after": passes[-1][f"probe/{kind}/logp"],
                "change": passes[-1][f"probe/{kind}/delta0"],
            }
            for kind in (*probes.column_names[1:], "initial_greedy")
        ]
    )
    for kind in ("chosen", "rejected"):
        before, after = (entry[f"probe/{kind}/logp_argmax"] for entry in (passes[0], passes[-1]))
        table.loc[len(table)] = [f"argmax given {kind}", before, after, after - before]
    first, last = passes[0], passes[-1]
    about = (
        f"{steps} steps of DPO (LoRA, two pairs a step) on {num_pairs} pairs about everyday things; answers to "
        f"{num_probes} of their prompts are scored before, during and after. Log-probabilities in nats per token."
    )
    found = (
        f"The rejected answers changed by {last['probe/rejected/delta0']:+.2f}, the chosen ones by "
        f"{last['probe/chosen/delta0']:+.2f}. The squeeze index, rise of the argmax less mean change of the answers "
        f"nobody trained on, is {last['squeeze/index']:+.2f}."
    )
    pressure = (
        f"Squeeze pressure on the rejected answers went from {first['probe/rejected/pressure']:+.3f} to "
        f"{last['probe/rejected/pressure']:+.3f}; of the model's own samples, where theory says zero, it was "
        f"{first['onpolicy/pressure_own']:+.3f} to begin with. All curves are in {report.relative_to(out_dir)}; "
        "benchmarks/squeeze.py measures the effect over seeds and against its controls."
    )
    return TourSection(
        title="Squeezing in DPO",
        headline=f"{steps} steps of DPO moved chosen answers by {last['probe/chosen/delta0']:+.2f} nats a "
        f"token, rejected ones by {last['probe/rejected/delta0']:+.2f}.",
        command="hf-iclr run train_dpo.py --with squeeze:held_out_pairs.jsonl",
        summary=[about, found, pressure],
        table=table,
        figures=[_figure(passes, list(probes.column_names[1:]), out_dir / "squeeze.png")],
        data={"log_history": history},
    )


def _figure(passes: list[dict], kinds: list[str], path: Path) -> Path:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [entry["step"] for entry in passes]
    for kind in kinds:
        left.plot(steps, [entry[f"probe/{kind}/delta0"] for entry in passes], marker=".", label=kind.replace("_", " "))
    left.set_ylabel("change of log-probability, nats per token")
    for kind, colour in (("chosen", "C0"), ("rejected", "C1")):
        start = passes[0][f"probe/{kind}/logp_argmax"]
        values = [entry[f"probe/{kind}/logp_argmax"] - start for entry in passes]
        right.plot(steps, values, marker=".", color=colour, label=f"argmax given {kind}")
    values = [entry["probe/rejected/pressure"] for entry in passes]
    right.plot(steps, values, marker=".", color="C3", label="pressure on rejected")
    right.set_ylabel("nats per token; probability")
    for axes in (left, right):
        axes.axhline(0, color="0.8", lw=0.8)
        axes.set_xlabel("DPO step")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    return path
