"""
What the squeezing metrics and probes cost: a step of `SqueezeDPOTrainer` against one of TRL's `DPOTrainer`, and whole
runs with probes against runs without.

    python benchmarks/squeeze_overhead.py --repeats 20
    python benchmarks/squeeze_overhead.py --repeats 0 --runs 5 --tiny --prompt 8 --answer 12
    python benchmarks/squeeze_overhead.py --repeats 0 --runs 1 --steps 50 200 --lora --dtype bfloat16 --prompt 8 \\
        --answer 12

Each repeat takes one step (forward, reference, backward, log) with each trainer in one process and in random order, on
the same batch, and the medians of the ratios within a repeat are reported, and the ratio of the fastest steps, which
other work on the machine disturbs least. A "full" step measures the exact argmax mass; with `argmax_every=10` one step
of ten does, and "full, every 10" is what those ten cost together. The optimiser is left out and every step is logged:
both count against us. Memory is what a step adds to the resident set at its peak.

Runs are `SqueezeDPOTrainer.train()` of `--steps` steps with 2 and 8 pairs a batch, with `--probes` prompts at the
default `probe_every` and `probe_budget`, and right after it the same run without. CPU time is compared: of the whole
runs, and in the run with probes the whole against what was spent outside of the callback. The latter is nearly free of
what else the machine does. Both leave out that the probes are tokenized, which is shown by itself.
"""

import argparse
import copy
import ctypes
import gc
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common.arguments import make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--runs", type=int, default=0, help="whole runs of each kind")
    parser.add_argument("--steps", type=int, nargs="+", default=[25, 50, 200, 1000], help="of the runs")
    parser.add_argument("--probes", type=int, default=500, help="prompts to probe in a run")
    parser.add_argument("--tiny", action="store_true", help="a random Llama of 16 dimensions instead of SmolLM2")
    parser.add_argument("--pairs", type=int, default=2, help="pairs in a batch")
    parser.add_argument("--prompt", type=int, default=64, help="words in a prompt")
    parser.add_argument("--answer", type=int, default=128, help="most words in an answer; half of it at least")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--lora", action="store_true", help="train an adapter: a shorter step")
    return parse(parser, repeats=2, pairs=1, prompt=8, answer=8, runs=2, steps=[8], probes=4, tiny=True)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tqdm import tqdm
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from common.report import print_table
from hf_iclr.tiny_models import tiny_llama, word_tokenizer
from hf_iclr.tour.demo.language_model import load_demo_model
from hf_iclr.trainers.squeeze import SqueezeDPOConfig, SqueezeDPOTrainer, SqueezeProbeCallback, build_probe_set
from hf_iclr.trainers.squeeze.probe_metrics import ProbeSet


WORDS = ("the", "model", "answers", "a", "question", "about", "rain", "tea", "maps", "birds", "often", "people")
ARGMAX_EVERY = 10


def text(rng: random.Random, length: int) -> str:
    return " " + " ".join(rng.choice(WORDS) for _ in range(length))


def make_rows(args: argparse.Namespace, count: int) -> Dataset:
    rng = random.Random(0)
    lengths = [
        (rng.randint(args.answer // 2, args.answer), rng.randint(args.answer // 2, args.answer)) for _ in range(count)
    ]
    return Dataset.from_list(
        [{"prompt": text(rng, args.prompt), "chosen": text(rng, c), "rejected": text(rng, r)} for c, r in lengths]
    )


def load(args: argparse.Namespace) -> tuple:
    return (tiny_llama(), word_tokenizer()) if args.tiny else load_demo_model(getattr(torch, args.dtype))


def make_trainers(args: argparse.Namespace, folder: str) -> dict[str, DPOTrainer]:
    model, tokenizer = load(args)
    rows = make_rows(args, 16)
    kwargs = {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "per_device_train_batch_size": args.pairs,
        "disable_tqdm": True,
    }
    lora = LoraConfig(r=16, target_modules=["q_proj", "v_proj"]) if args.lora else None
    classes = {
        "DPOTrainer": (DPOTrainer, DPOConfig, {}),
        "default": (SqueezeDPOTrainer, SqueezeDPOConfig, {}),
        "full": (SqueezeDPOTrainer, SqueezeDPOConfig, {"squeeze_metrics": "full", "argmax_every": 1}),
    }
    trainers = {}
    for name, (trainer_class, config, settings) in classes.items():
        trainers[name] = trainer_class(
            copy.deepcopy(model),
            None if args.lora else model,
            config(**kwargs, **settings),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=lora,
        )
    return trainers


def step(trainer: DPOTrainer, rows: list[dict]) -> None:
    trainer.model.train()
    trainer.compute_loss(trainer.model, trainer.data_collator([dict(row) for row in rows])).backward()
    trainer.log({})
    trainer.model.zero_grad()


def resident_peak() -> int:
    """Bytes; the kernel's own record since it was last cleared."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def step_memory(trainer: DPOTrainer, rows: list[dict]) -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_peak()
    step(trainer, rows)
    return resident_peak() - before


class TimedProbes(SqueezeProbeCallback):
    """Knows the CPU seconds it has taken, and those of them for tokenizing."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.spent, self.tokenizing, self.inside = 0.0, 0.0, False


def timed(event: str) -> Callable:
    def run(self, *args, **kwargs):
        if self.inside:  # it logs, which is an event as well
            return getattr(SqueezeProbeCallback, event)(self, *args, **kwargs)
        self.inside, begin = True, time.process_time()
        getattr(SqueezeProbeCallback, event)(self, *args, **kwargs)
        self.spent += time.process_time() - begin
        self.inside = False

    return run


for name in ("on_train_begin", "on_step_end", "on_epoch_end", "on_log"):
    setattr(TimedProbes, name, timed(name))


def measure_runs(args: argparse.Namespace) -> None:
    disable_progress_bars()
    model, tokenizer = load(args)
    rows = make_rows(args, max(args.probes, 64))
    probes = build_probe_set(rows, num_probes=args.probes)
    lora = LoraConfig(r=16, target_modules=["q_proj", "v_proj"]) if args.lora else None

    def seconds(steps: int, pairs: int, with_probes: bool) -> tuple[float, TimedProbes | None, list[int]]:
        """CPU seconds of a run, its probes and when they were scored."""
        with tempfile.TemporaryDirectory() as folder:
            config = SqueezeDPOConfig(
                folder, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
                max_steps=steps, per_device_train_batch_size=pairs, learning_rate=1e-5, activation_checkpointing=False,
            )  # fmt: skip
            trainer = SqueezeDPOTrainer(
                copy.deepcopy(model), None if args.lora else copy.deepcopy(model), config, train_dataset=rows,
                processing_class=tokenizer, peft_config=lora,
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            watching = None
            if with_probes:
                watching = TimedProbes(probes, trainer=trainer, every=config.probe_every)
                trainer.add_callback(watching)
            begin = time.process_time()
            trainer.train()
            spent = time.process_time() - begin
        return spent, watching, [entry["step"] for entry in trainer.state.log_history if "probe/chosen/logp" in entry]

    tokenize = ProbeSet.__init__

    def timed_tokenize(self, name, dataset, trainer, *rest):
        begin = time.process_time()
        tokenize(self, name, dataset, trainer, *rest)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TimedProbes):
                callback.tokenizing += time.process_time() - begin

    ProbeSet.__init__ = timed_tokenize
    seconds(min(args.steps), 2, True)  # to warm up
    report, table = [], []
    for pairs, steps in [(pairs, steps) for pairs in (2, 8) for steps in args.steps]:
        runs = []
        for _ in tqdm(range(args.runs)):
            whole, watching, passes = seconds(steps, pairs, True)
            plain, *_ = seconds(steps, pairs, False)
            whole -= watching.tokenizing
            inside = whole / (whole - watching.spent + watching.tokenizing)
            runs.append(
                {"pairs": pairs, "steps": steps, "seconds without": plain, "in the run": inside,
                 "to a run": whole / plain, "tokenizing": watching.tokenizing,
                 "prompts": watching._sets[0].count, "passes": passes}
            )  # fmt: skip
        report += runs
        columns = {name: [run[name] for run in runs] for name in runs[0]}
        cells = [f"{statistics.median(columns[n]):.3f} ({min(columns[n]):.3f} .. {max(columns[n]):.3f})" for n in
                 ("in the run", "to a run")]  # fmt: skip
        prompts = f"{min(columns['prompts'])} .. {max(columns['prompts'])}"
        passes = f"{min(map(len, columns['passes']))} .. {max(map(len, columns['passes']))}"
        plain, tokenizing = (statistics.median(columns[name]) for name in ("seconds without", "tokenizing"))
        table.append([pairs, steps, plain, *cells, passes, prompts, tokenizing])
    print_table(
        [
            "pairs",
            "steps",
            "s without",
            "times, in the run",
            "times a run without",
            "passes",
            "prompts",
            "s tokenizing",
        ],
        table,
    )
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    write_json(args.out / "squeeze_overhead_runs.json", {"arguments": vars(args), "runs": report})


def measure_steps(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainers = make_trainers(args, folder)
        for trainer in trainers.values():
            trainer.callback_handler.callbacks.clear()  # nothing is printed
        rng = random.Random(1)
        seconds: dict[str, dict[str, list[float]]] = {
            kind: {name: [] for name in trainers} for kind in ("wall", "cpu")
        }
        rows = [trainers["DPOTrainer"].train_dataset[index] for index in range(args.pairs)]
        for repeat in tqdm(range(-1, args.repeats)):  # the first to warm up
            for name in rng.sample(list(trainers), len(trainers)):
                wall, cpu = time.perf_counter(), time.process_time()
                step(trainers[name], rows)
                if repeat >= 0:
                    seconds["wall"][name].append(time.perf_counter() - wall)
                    seconds["cpu"][name].append(time.process_time() - cpu)
        # Blocks from 1 MB on go back to the system when freed, so that the resident set follows the live tensors.
        ctypes.CDLL("libc.so.6").mallopt(-3, 2**20)
        memory = {name: [step_memory(trainer, rows) for _ in range(4)][1:] for name, trainer in trainers.items()}

    model_bytes = sum(p.numel() * p.element_size() for p in trainers["DPOTrainer"].model.parameters())
    base_bytes = model_bytes * (1 if args.lora else 2) + statistics.median(memory["DPOTrainer"])
    report: dict = {"arguments": vars(args), "seconds": seconds, "memory": memory}
    table = []
    for kind, times in seconds.items():
        every = f"full, every {ARGMAX_EVERY}"
        times[every] = [
            ((ARGMAX_EVERY - 1) * default + full) / ARGMAX_EVERY
            for default, full in zip(times["default"], times["full"], strict=True)
        ]
        for name, values in times.items():
            ratios = [own / trl for own, trl in zip(values, times["DPOTrainer"], strict=True)]
            low, median, high = statistics.quantiles(ratios, n=4)
            fastest = min(values) / min(times["DPOTrainer"])
            table.append([kind, name, statistics.median(values), median, f"{low:.3f} .. {high:.3f}", fastest])
            report[f"{kind} {name}"] = {"median": median, "quartiles": [low, high], "fastest": fastest}
    print_table(["time", "trainer", "s a step", "times DPOTrainer's", "quartiles", "fastest to fastest"], table)
    table = []
    for name, values in memory.items():
        more = (statistics.median(values) - statistics.median(memory["DPOTrainer"])) / base_bytes
        table.append([name, f"{statistics.median(values) / 1e6:.0f}", f"{more:+.1%}"])
        report[f"memory {name}"] = more
    print_table(["trainer", "MB in a step", "more, of the whole"], table)
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    write_json(args.out / "squeeze_overhead.json", report)


if __name__ == "__main__":
    if ARGUMENTS.repeats:
        measure_steps(ARGUMENTS)
    if ARGUMENTS.runs:
        measure_runs(ARGUMENTS)
