"""
A training run with values of rows, probes and safety drift that is killed again and again, and resumed from its last
whole checkpoint: does it leave what one leaves that runs through?

    python benchmarks/run_kills.py --kills 40

A tiny model is trained by DPO for 24 steps with a checkpoint every two, when values are written, too. Each life ends
by SIGKILL at a random moment. The next one goes on from the last checkpoint that has all files and loads; others, as
they are written file by file, are removed and counted. At the end these are compared with the run that was not
killed: weights, values of rows in the Parquet store, the loss and all that our parts have logged at each step.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from common.arguments import add_kills, make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    add_kills(parser, 40)
    return parse(parser, kills=3)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tiny model is that of the tests

import pandas as pd
import torch
from safetensors.torch import load_file

from common.report import print_table
from hf_iclr import (
    DataShapleyResult,
    InRunDataShapleyCallback,
    SafetyDriftCallback,
    SqueezeDPOConfig,
    SqueezeDPOTrainer,
    SqueezeProbeCallback,
    build_probe_set,
)
from hf_iclr.doctor.self_check import TRAINING
from hf_iclr.tiny_models import tiny_llama, word_tokenizer
from tests.trainers.tiny import triplet_rows


STEPS = 24
FILES = ("trainer_state.json", "shapley_direction.safetensors", "squeeze_probes.json", "safety_drift.safetensors")
OURS = ("loss", "squeeze/", "probe/", "shapley/", "safety/")


def train(out: Path, checkpoint: Path | None) -> None:
    """The run, or the rest of it, in a process of its own."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        os.dup2(nowhere.fileno(), 1)
    rows = triplet_rows(24).rename_columns({"harmful": "rejected", "refusal": "chosen"})
    settings = {**TRAINING, "max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 1}
    args = SqueezeDPOConfig(str(out), **{**settings, "save_strategy": "steps", "save_steps": 2})
    trainer = SqueezeDPOTrainer(
        tiny_llama(), tiny_llama(), args, train_dataset=rows, processing_class=word_tokenizer(),
        callbacks=[InRunDataShapleyCallback(rows.select(range(2)), refresh_every=1, adam_warmup=0)],
    )  # fmt: skip
    probes = build_probe_set(rows.select(range(4)))
    trainer.add_callback(SqueezeProbeCallback(probes, trainer=trainer, every=3, probe_budget=1.0))
    trainer.add_callback(SafetyDriftCallback(["w1 w2", "w3"], trainer=trainer, every=4, max_new_tokens=2))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model()
    trainer.save_state()


def begin(out: Path, checkpoint: Path | None = None) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=train, args=(out, checkpoint))
    process.start()
    return process


def checkpoints(out: Path, counts: Counter) -> list[Path]:
    """Those with the file of each part, which come last; newest first."""
    for path in out.glob("checkpoint-*"):
        if not all((path / name).exists() for name in FILES):
            shutil.rmtree(path)
            counts["checkpoints without all files"] += 1
    return sorted(out.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2]))


def left(out: Path) -> tuple[dict, pd.DataFrame, dict]:
    """Weights and values of a run, and what was logged by step and name."""
    entries = json.loads((out / "trainer_state.json").read_text())["log_history"]
    log = {(one["step"], name): one[name] for one in entries for name in one if name.startswith(OURS)}
    return load_file(out / "model.safetensors"), DataShapleyResult.from_store(out).rows, log


def main(args: argparse.Namespace) -> int:
    draw, counts = random.Random(args.seed), Counter(kills=0)
    whole, killed = (args.out / "work" / name for name in ("whole", "killed"))
    shutil.rmtree(whole.parent, ignore_errors=True)
    began, process = time.perf_counter(), begin(whole)
    process.join()
    assert process.exitcode == 0, "the run that isn't killed must end"
    seconds = time.perf_counter() - began
    while True:
        last = counts["kills"] >= args.kills
        found = checkpoints(killed, counts)
        process = begin(killed, found[0] if found else None)
        process.join(None if last else draw.uniform(0, seconds))
        if process.exitcode is None:
            process.kill()
            process.join()
            counts["kills"] += 1
        elif process.exitcode:
            assert found, "a run without a checkpoint must begin"
            shutil.rmtree(found[0])
            counts["checkpoints that did not load"] += 1
        elif last:
            break
        else:  # it ended before its kill
            for path in found[: draw.randrange(1, len(found))]:
                shutil.rmtree(path)
    (weights, values, log), (other, others, entries) = left(whole), left(killed)
    same = {
        "weights": all(torch.equal(weights[name], other[name]) for name in weights),
        "values of rows": values.equals(others),
        "log": all(entries.get(key) == value for key, value in log.items()),  # drift is also looked at on resuming
    }
    print_table(["", "count"], [[name, count] for name, count in counts.items()])
    print(f"\nas the run that was not killed: {', '.join(f'{name} {said}' for name, said in same.items())}")
    write_json(args.out / "run_kills.json", {"seed": args.seed, "seconds": seconds, **counts, "same": same})
    return not all(same.values())


if __name__ == "__main__":
    raise SystemExit(main(ARGUMENTS))
