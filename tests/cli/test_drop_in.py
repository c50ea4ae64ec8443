"""
Somebody's own scripts with one class swapped, as they are started: TRL's two, and one in the shape of transformers'
examples. Each way of starting, flags, YAML, adapters and whole models come up once.
"""

import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl.scripts
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from tests.cli.test_trl_script import as_flags, files, history, pairs
from tests.trainers.tiny import tiny_llama


__all__ = ["files", "pairs"]  # fixtures

EXAMPLE = """
import sys
from dataclasses import dataclass

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)


@dataclass
class ModelArguments:
    model_name_or_path: str
    dtype: str = "auto"


@dataclass
class DataArguments:
    dataset_name: str


def main():
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".yaml"):
        model_args, data_args, training_args = parser.parse_yaml_file(sys.argv[1])
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, dtype=model_args.dtype)

    def preprocess(row):
        prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    rows = load_dataset(data_args.dataset_name, split="train").map(preprocess)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
"""
MIXED = """    Trainer as TheirTrainer,
    TrainingArguments,
)
from hf_iclr import DeepSafetyMixin


class Trainer(DeepSafetyMixin, TheirTrainer): ...
"""


def of_trl(name, theirs, ours, folder):
    """TRL's script with the class swapped where it is imported, and nothing else."""
    source = (Path(trl.scripts.__path__[0]) / f"{name}.py").read_text(encoding="utf-8")
    swapped = f"from hf_iclr import {ours} as {theirs}\n    from trl import "
    source, count = re.subn(rf"from trl import {theirs}, ", swapped, source)
    assert count == 1
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    return str(folder / f"{name}.py")


def start(script, arguments, launcher=None):
    """
    As from a shell. A launcher, the module and its flags, is called in a fork of this process rather than imported
    again; what it starts are processes of their own.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    if launcher is None:
        command = [sys.executable, script, *arguments]
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return
    errors, main = Path(script).with_suffix(".log"), importlib.import_module(launcher[0]).main
    given = ([*launcher, script, *arguments], environment, errors)
    process = multiprocessing.get_context("fork").Process(target=launch, args=(main, *given))
    process.start()
    process.join(300)
    process.kill()
    process.join()
    assert process.exitcode == 0, errors.read_text(encoding="utf-8")[-3000:]


def launch(main, command, environment, errors):
    os.environ.update(environment)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.argv = command
    main()


def moved(model):
    before = dict(tiny_llama().named_parameters())
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def test_trls_sft_by_python_with_flags_and_an_adapter(files, tmp_path):
    script = of_trl("sft", "SFTTrainer", "DeepSafetySFTTrainer", tmp_path)
    more = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    adapter = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"]
    start(script, [*as_flags({**files, **more}), *adapter])
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert moved(adapted.merge_and_unload()) == {
        f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "qv"
    }
    first = history(tmp_path / "out" / "checkpoint-2")[0]
    assert first["constraint/weight_first"] == pytest.approx(1, abs=1e-5)  # the model still is the reference


def test_trls_dpo_by_torchrun_in_two_processes_with_yaml(pairs, tmp_path):
    script = of_trl("dpo", "DPOTrainer", "SqueezeDPOTrainer", tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**pairs, "save_strategy": "steps", "save_steps": 2}))
    start(script, ["--config", str(tmp_path / "run.yaml")], ["torch.distributed.run", "--nproc_per_node", "2"])
    assert len(moved(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))) == 21
    logged = history(tmp_path / "out" / "checkpoint-2")
    assert logged[-1]["epoch"] == pytest.approx(1)  # of 12 pairs in batches of twice 5; in one process it would be 2/3
    assert logged[0]["squeeze/pressure_rejected"] != 0


@pytest.mark.parametrize("how", ["flags", "yaml"])
def test_an_example_of_transformers(how, files, tmp_path, monkeypatch):
    """Flags by `accelerate launch`; YAML in this process, which tells that the weights move less than the parent's."""
    names = ("model_name_or_path", "dataset_name", "output_dir", "use_cpu", "report_to", "max_steps", "dtype")
    settings = {name: files[name] for name in names}
    settings |= {"save_strategy": "no", "learning_rate": 1e-2, "logging_steps": 1}
    script, theirs = tmp_path / "train.py", tmp_path / "theirs.py"
    theirs.write_text(EXAMPLE, encoding="utf-8")
    script.write_text(EXAMPLE.replace("    Trainer,\n    TrainingArguments,\n)\n", MIXED), encoding="utf-8")
    if how == "flags":
        launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "1"]
        start(str(script), as_flags(settings), launcher)
        logged = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
        assert logged[0]["constraint/weight_first"] == pytest.approx(1, abs=1e-5)
        assert len(moved(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))) == 21
        return
    import runpy

    losses = []
    for path in (theirs, script):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
        monkeypatch.setattr(sys, "argv", [str(path), str(tmp_path / "run.yaml")])
        runpy.run_path(str(path), run_name="__main__")
        logged = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in logged if "loss" in entry])
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-4) and losses[0][1] < losses[1][1]
