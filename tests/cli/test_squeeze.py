"""`hf-iclr squeeze` on logs and models of other makes, and `hf-iclr dpo` that watches."""

import json

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from hf_iclr.cli.app import app
from hf_iclr.runs.dataset_files import load_rows
from tests.cli.test_trl_script import FLAGS, as_flags
from tests.trainers.squeeze.pairs_and_logs import pair_rows
from tests.trainers.tiny import tiny_llama


LOG = [{"step": step, "eval_logps/chosen": -100.0 - 10 * step, "logps/chosen": -99.0} for step in range(5)]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *args: CliRunner().invoke(app, [*map(str, args)])


@pytest.fixture
def model(tmp_path, word_tokenizer):
    tiny_llama().save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def pairs(tmp_path):
    pair_rows(6).to_json(tmp_path / "pairs.jsonl")
    return tmp_path / "pairs.jsonl"


@pytest.fixture
def state(tmp_path):
    """Of a run of TRL's own trainer."""
    path = tmp_path / "checkpoint-9" / "trainer_state.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"log_history": LOG}))
    return path


def test_report(run, state, tmp_path):
    result = run("squeeze", "report", state.parent, "--out", tmp_path / "page", "--title", "Mine")
    assert result.exit_code == 0 and result.output.strip() == str(tmp_path / "page" / "squeeze_report.html")
    assert "<h1>Mine</h1>" in (tmp_path / "page" / "squeeze_report.html").read_text()


def test_replay(run, state):
    """10 nats an answer are .5 a token of 20, and .01 of 1000."""
    result = run("squeeze", "replay", state, "--tokens-per-answer", 20)
    (row,) = [line.split() for line in result.output.splitlines() if str(state) in line]
    assert result.exit_code == 0 and [cell for cell in row if cell not in "│┃"][1:] == ["eval", "5", "0", "1", "2.000"]
    assert " none " in run("squeeze", "replay", state, "--tokens-per-answer", 1000).output


def test_audit(run, model, pairs, tmp_path):
    result = run("squeeze", "audit", model, pairs, "--out", tmp_path / "scores.csv", "--worst", 2)
    assert result.exit_code == 0, result.output
    scores = pd.read_csv(tmp_path / "scores.csv").sort_values("ches_per_token", ascending=False)
    assert len(scores) == 6
    shown = [line for line in result.output.splitlines() if line.startswith("│")]
    assert [line.split("│")[1].strip() for line in shown] == [str(row) for row in scores["row"].head(2)]


def test_influence(run, model, pairs, tmp_path):
    result = run("squeeze", "influence", model, pairs, "--step-size", 1e-4, "--out", tmp_path / "influence.csv")
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "influence.csv")
    assert table["predicted"].to_numpy() == pytest.approx(table["measured"].to_numpy(), rel=0.05, abs=1e-4)
    assert {"chosen", "rejected", "permuted"} <= set(table["kind"]) and "other_train" in result.output


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["report", "nowhere.json"], "Expected a trainer_state.json or a checkpoint at nowhere.json"),
        (["replay", "{pairs}"], "Expected chosen answers that are scored again and again"),
        (["audit", "{model}", "{model}/config.toml"], "config.toml"),
        (["influence", "{model}", "{pairs}", "--step-size", "-1"], "step_size must be positive"),
    ],
)
def test_wrong_input_is_one_sentence(run, model, pairs, command, message):
    result = run("squeeze", *(part.format(pairs=pairs, model=model) for part in command))
    assert result.exit_code == 2 and message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("make", ["jsonl", "csv", "parquet", "folder"])
def test_rows_from_everywhere(tmp_path, make):
    rows = pair_rows(3)
    path = tmp_path / f"rows.{make}"
    {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet, "folder": rows.save_to_disk}[make](path)
    assert load_rows(str(path))["chosen"] == rows["chosen"]


@pytest.fixture
def dpo(model, pairs, tmp_path):
    (tmp_path / "data").mkdir()
    pair_rows().to_json(tmp_path / "data" / "train.jsonl")
    return {
        "model_name_or_path": str(model),
        "dataset_name": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        **FLAGS,
        "save_strategy": "steps",
        "save_steps": 2,
    }


def test_dpo_with_probes_and_stop(run, dpo, pairs, tmp_path):
    flags = [*as_flags({**dpo, "probes": pairs, "probe_every": 1, "probe_budget": 1.0}), "--stop"]
    result = run("dpo", *flags)
    assert result.exception is None, result.output
    log = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "probe/other_train/logp" in entry] == [0, 1, 2]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**dpo, "probes": str(pairs), "max_steps": 1}))
    assert run("dpo", "--config", tmp_path / "run.yaml").exception is None


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--stop"], "there are none. Add `--probes pairs.jsonl`"),
        (["--probe_every", "5"], "--probe_every is about the answers of --probes, but there are none"),
        (["--probes", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_dpo_that_could_never_act_is_refused(run, dpo, tmp_path, extra, message):
    result = run("dpo", *as_flags(dpo), *extra)
    assert result.exit_code == 2 and message in result.stderr and not (tmp_path / "out").exists()
