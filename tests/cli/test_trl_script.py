"""TRL's installed scripts with the class swapped: from flags and from YAML, in one process and in two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_iclr.cli.app import app
from tests.trainers.distributed import run_in_two
from tests.trainers.tiny import tiny_llama, triplet_rows, word_rows


FLAGS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 2,
    "per_device_train_batch_size": 5,
    "dtype": "float32",
}


@pytest.fixture
def files(tmp_path, word_tokenizer):
    """A model folder, a dataset folder and a file of triplets."""
    tiny_llama().save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    word_rows().to_json(tmp_path / "data" / "train.jsonl")
    triplet_rows().to_json(tmp_path / "triplets.jsonl")
    return {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        **FLAGS,
    }


@pytest.fixture
def pairs(files, tmp_path):
    """The same with a dataset of preference pairs."""
    (tmp_path / "pairs").mkdir()
    rows = triplet_rows(12).rename_columns({"harmful": "rejected", "refusal": "chosen"})
    rows.to_json(tmp_path / "pairs" / "train.jsonl")
    return {**files, "dataset_name": str(tmp_path / "pairs")}


def as_flags(settings):
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def history(folder):
    return json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]


def test_sft_from_flags(files, tmp_path):
    extra = {"safety_dataset_name": tmp_path / "triplets.jsonl", "beta_first": 1.5, "reference": "window"}
    result = CliRunner().invoke(app, ["sft", *as_flags({**files, **extra, "save_strategy": "steps", "save_steps": 2})])
    assert result.exception is None, result.output
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    logged = history(tmp_path / "out" / "checkpoint-2")
    assert "constraint/weight_first" in logged[0] and "constraint/weight_rest" not in logged[0]
    assert "Safety Alignment" in (tmp_path / "out" / "README.md").read_text()


def test_sft_from_yaml_with_lora(files, tmp_path):
    settings = {
        **files,
        "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_r": 2,
        "beta_first": 1.0,
        "beta_initial": 0.5,
        "beta_rest": 0.1,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    result = CliRunner().invoke(app, ["sft", "--config", str(tmp_path / "run.yaml")])
    assert result.exception is None, result.output
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**settings, "beta_frist": 1.0}))
    result = CliRunner().invoke(app, ["sft", "--config", str(tmp_path / "run.yaml")])
    assert result.exit_code == 2 and "beta_frist" in result.stderr


def test_dpo_from_flags_and_from_yaml(pairs, tmp_path):
    extra = {"squeeze_metrics": "full", "argmax_every": 1, "save_strategy": "steps", "save_steps": 2}
    result = CliRunner().invoke(app, ["dpo", *as_flags({**pairs, **extra})])
    assert result.exception is None, result.output
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    logged = history(tmp_path / "out" / "checkpoint-2")[0]
    assert {"squeeze/pressure_rejected", "squeeze/logp_argmax_chosen"} < logged.keys()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**pairs, "squeeze_metrics": "off"}))
    result = CliRunner().invoke(app, ["dpo", "--config", str(tmp_path / "run.yaml")])
    assert result.exception is None, result.output


def test_trl_is_left_as_found(files):
    import trl

    from hf_iclr.cli.trl_script import run_trl_script

    del files["dataset_name"]  # which the script itself finds out
    with pytest.raises(ValueError, match="dataset_name"):
        run_trl_script("sft", as_flags(files))
    assert trl.SFTTrainer.__module__.startswith("trl.")


def test_a_file_in_the_place_of_a_dataset_is_told(files):
    file = next(Path(files["dataset_name"]).iterdir())
    result = CliRunner().invoke(app, ["sft", *as_flags({**files, "dataset_name": str(file)})])
    assert result.exit_code == 2 and f"got the file {file}. Put it into a folder" in result.stderr


def test_with_parts_by_yaml(files, tmp_path):
    (tmp_path / "prompts.txt").write_text("w1 w2\nw3 w4\n")
    settings = {
        **files,
        "with_parts": [f"safety:{tmp_path / 'prompts.txt'},every=1"],
        "save_strategy": "steps",
        "save_steps": 2,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    result = CliRunner().invoke(app, ["sft", "--config", str(tmp_path / "run.yaml")])
    assert result.exception is None, result.output
    entries = history(tmp_path / "out" / "checkpoint-2")
    assert [entry["step"] for entry in entries if "safety/refusal_rate" in entry] == [0, 1, 2]


@pytest.mark.parametrize("where", ["flags", "yaml"])
def test_launch_flags_start_processes(where, files, tmp_path, monkeypatch):
    """Flags of accelerate launch are taken out; what is started has the rest."""
    started = []
    monkeypatch.setattr("torch.distributed.run.main", started.append)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("os.environ", {**os.environ})
    command = as_flags(files)
    if where == "flags":
        result = CliRunner().invoke(app, ["sft", *command[:4], "--num_processes", "2", *command[4:]])
    else:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({**files, "num_processes": 2}))
        command = ["--config", str(tmp_path / "run.yaml")]
        result = CliRunner().invoke(app, ["sft", *command])
    assert result.exception is None, result.output
    assert started == [["--nproc_per_node", "2", "-m", "hf_iclr", "sft", *command]]


@pytest.mark.slow
def test_two_processes_by_a_launch_flag(files, tmp_path):
    command = [sys.executable, "-m", "hf_iclr", "sft", "--num_processes", "2", *as_flags(files)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def launch(launcher, script, settings):
    command = [sys.executable, "-m", *launcher, str(Path(sys.executable).parent / "hf-iclr"), script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    settings = {**settings, "save_strategy": "steps", "save_steps": 2}
    done = subprocess.run(
        command + as_flags(settings), check=False, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    AutoModelForCausalLM.from_pretrained(settings["output_dir"])
    return history(Path(settings["output_dir"]) / "checkpoint-2")


def invoke(script, settings):
    return repr(CliRunner().invoke(app, [script, *as_flags(settings)]).exception)


@pytest.mark.parametrize("launcher", ["fork", pytest.param("torch.distributed.run", marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_scripts_in_two_processes(script, launcher, files, pairs, tmp_path):
    """
    An epoch of 24 rows is 3 steps of twice 5, one of 12 rows is 2; in one process it would be 5 and 3. Forked
    processes find in their environment what a launcher puts there, and need not import torch and TRL twice more.
    """
    settings, epoch = (files, 2 / 3) if script == "sft" else (pairs, 1.0)
    if launcher == "fork":
        settings = {**settings, "save_strategy": "steps", "save_steps": 2}
        assert run_in_two(invoke, tmp_path, script, settings) == ["None", "None"]
        AutoModelForCausalLM.from_pretrained(settings["output_dir"])
        logged = history(Path(settings["output_dir"]) / "checkpoint-2")
    else:
        logged = launch([launcher, "--nproc_per_node", "2"], script, settings)
    assert logged[-1]["epoch"] == pytest.approx(epoch, abs=1e-3)


@pytest.mark.slow
def test_sft_under_accelerate_launch(files):
    """`accelerate launch --cpu --num_processes 2` of accelerate 1.15 starts one process unless mpirun is installed."""
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    assert "constraint/weight_first" in launch(launcher, "sft", files)[0]
