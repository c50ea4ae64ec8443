"""A script of somebody else's, with our callbacks in the trainer it makes, and the page about its folder."""

import asyncio
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import trl
from datasets import load_dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer, Trainer, TrainingArguments
from typer.testing import CliRunner

from hf_iclr import (
    DeepSafetySFTConfig,
    DeepSafetySFTTrainer,
    KeyStatistics,
    SqueezeDPOConfig,
    SqueezeDPOTrainer,
    write_run_report,
)
from hf_iclr.cli.app import app
from hf_iclr.doctor.self_check import TRAINING
from hf_iclr.runs.parts import parts_in_every_trainer
from hf_iclr.runs.report import read_run
from tests.editors.alpha_edit.test_editor import make_editor
from tests.editors.tiny import REQUESTS
from tests.trainers.tiny import tiny_llama, triplet_rows, word_rows
from tests.vision.annotation.chromium import CHROMIUM, open_tab


SCRIPT = """
import sys
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

if __name__ == "__main__":
    folder, out = sys.argv[1:]
    rows = load_dataset("json", data_files=f"{folder}/rows.jsonl", split="train")
    trainer = SFTTrainer(folder, SFTConfig(out, **SETTINGS), train_dataset=rows)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
""".replace(
    "SETTINGS",
    repr({**TRAINING, "per_device_train_batch_size": 4, "max_steps": 6, "model_init_kwargs": {"dtype": "float32"}}),
)
PAIRS = """
import sys
from datasets import load_dataset
from trl import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

rows = load_dataset("json", data_files=f"{sys.argv[1]}/pairs.jsonl", split="train")
trainer = DPOTrainer(sys.argv[1], args=DPOConfig(sys.argv[2], **SETTINGS), train_dataset=rows)
trainer.train()
trainer.save_model()
trainer.save_state()
""".replace(
    "SETTINGS",
    repr({**TRAINING, "per_device_train_batch_size": 4, "max_steps": 2, "model_init_kwargs": {"dtype": "float32"}}),
)


FAILING = """
import sys
from hf_iclr import AlphaEditConfig
if sys.argv[1] == "broken":
    {}["mine"]
if sys.argv[1] == "ours":
    AlphaEditConfig(nullspace_threshold=-1.0)
print(sys.argv[1:])
"""
TRAINER_ARGUMENTS = TrainingArguments(**TRAINING)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, word_tokenizer):
    """A model, rows, pairs, prompts and two scripts."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_llama().save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    word_rows().add_column("source", ["a", "b"] * 12).to_json(folder / "rows.jsonl")
    word_rows(4, seed=5).to_json(folder / "val.jsonl")
    pairs = triplet_rows(12).rename_columns({"harmful": "rejected", "refusal": "chosen"})
    pairs.to_json(folder / "pairs.jsonl")
    (folder / "prompts.txt").write_text("w1 w2\nw3 w4\n")
    (folder / "train.py").write_text(SCRIPT)
    (folder / "dpo.py").write_text(PAIRS)
    return folder


def run(folder, script, out, *parts):
    arguments = ["run", str(folder / script), str(folder), str(folder / out)]
    result = CliRunner().invoke(app, [*arguments, *(word for part in parts for word in ("--with", part))])
    assert result.exit_code == 0, result.output
    return folder / out


@pytest.fixture(scope="module")
def watched(folder):
    """The first script's output folder, after a run with three parts."""
    files = {"shapley": "val.jsonl,adam_warmup=0", "safety": "prompts.txt", "squeeze": "pairs.jsonl"}
    return run(folder, "train.py", "watched", *(f"{name}:{folder / file}" for name, file in files.items()))


def test_a_script_trains_the_same_model_with_our_callbacks(folder, watched):
    before = (Trainer.__init__, sys.argv, [*sys.path])
    plain = run(folder, "train.py", "plain")
    assert (Trainer.__init__, sys.argv, sys.path) == before
    weights, others = load_file(plain / "model.safetensors"), load_file(watched / "model.safetensors")
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    record = read_run(watched)
    logged = {key for entry in record.log for key in entry}
    assert {"safety/refusal_rate", "probe/chosen/logp", "shapley/loss_validation"} <= logged
    assert len(record.values.table()) == 20  # five steps of four rows: Adam has no second moment before the first
    assert not any("/" in key for entry in read_run(plain).log for key in entry)


def test_names_of_what_is_logged(folder, watched, word_tokenizer, tmp_path):
    """Each stands in the table of docs/runs.md, whose names are all logged, but for some of rare settings."""
    table = (Path(__file__).parents[2] / "docs" / "runs.md").read_text().partition("## Names of what is logged")[2]
    cells = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    names = [name for cell in cells for name in re.findall("`(.+?)`", cell)]
    ends = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    pairs = load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train")
    log = [*read_run(watched).log]
    for trainer_class, config, rows, more in (
        (SqueezeDPOTrainer, SqueezeDPOConfig, pairs, {"ref_model": tiny_llama(), "probe_dataset": pairs}),
        (DeepSafetySFTTrainer, DeepSafetySFTConfig, word_rows(8), {}),
    ):
        args = config(str(tmp_path), **{**TRAINING, **ends})
        sets = {"train_dataset": rows, "eval_dataset": rows, "processing_class": word_tokenizer}
        trainer = trainer_class(tiny_llama(), args=args, **sets, **more)
        trainer.train()
        log += trainer.state.log_history
    logged = {key.removeprefix("eval_") for entry in log for key in entry if "/" in key or "constrained" in key}
    logged -= {key for key in logged if key.startswith(("rewards/", "logps/", "logits/"))}  # TRL's
    known = {name: re.compile(re.sub("{.+?}", _choice, name.removeprefix("eval_"))) for name in names}
    assert [key for key in sorted(logged) if not any(one.fullmatch(key) for one in known.values())] == []
    never = {name for name, one in known.items() if not any(map(one.fullmatch, logged))}
    assert {name.partition("/")[0] for name in never if not name.startswith("safety/")} == {
        "crosstalk",
        "onpolicy",
        "repeat",
        "shapley",
    }
    assert {name for name in never if name.startswith("shapley/")} == {"shapley/agreement"}
    assert {name for name in never if name.startswith("safety/")} == {"safety/over_refusal_rate", "safety/beta_scale"}


def _choice(braces):
    names = braces[0][1:-1].split(", ")
    return f"({'|'.join(names)})" if len(names) > 1 else r"\w+"


def test_squeeze_alone_logs_what_a_preference_loss_does(folder):
    original = trl.DPOTrainer
    plain, watched = run(folder, "dpo.py", "dpo"), run(folder, "dpo.py", "dpo-watched", "squeeze")
    assert trl.DPOTrainer is trl.trainer.dpo_trainer.DPOTrainer is original
    first, second = read_run(plain).log[0], read_run(watched).log[0]
    assert first["loss"] == second["loss"] and second["squeeze/logp_tok_chosen"] < 0
    assert "squeeze/logp_tok_chosen" not in first


def test_squeeze_alone_says_where_it_adds_nothing(caplog):
    with parts_in_every_trainer(["squeeze"]):
        Trainer(tiny_llama(), TRAINER_ARGUMENTS)
    assert "--with squeeze adds nothing to Trainer" in caplog.text


def test_each_trainer_of_a_script_has_its_own_callbacks(folder):
    with parts_in_every_trainer([f"shapley:{folder / 'val.jsonl'}", f"safety:{folder / 'prompts.txt'}"]):
        first, second = (Trainer(tiny_llama(), TRAINER_ARGUMENTS) for _ in range(2))
    ours = [trainer.callback_handler.callbacks[-2:] for trainer in (first, second)]
    assert [[type(callback).__name__ for callback in callbacks] for callbacks in ours] == [
        ["InRunDataShapleyCallback", "SafetyDriftCallback"]
    ] * 2
    assert ours[0][0] is not ours[1][0] and ours[1][1].trainer is second


def test_a_trainer_without_what_a_part_needs_is_refused_in_a_sentence(folder):
    rows = {"train_dataset": [{"input_ids": [1, 2], "labels": [1, 2]}]}
    with parts_in_every_trainer([f"safety:{folder / 'prompts.txt'}"]):
        drift = Trainer(tiny_llama(), TRAINER_ARGUMENTS, **rows)
        another = Trainer(
            torch.nn.Linear(2, 2), TRAINER_ARGUMENTS, processing_class=AutoTokenizer.from_pretrained(folder), **rows
        )
    with parts_in_every_trainer([f"squeeze:{folder / 'pairs.jsonl'}"]):
        probes = Trainer(tiny_llama(), TRAINER_ARGUMENTS, **rows)
    for trainer, said in (
        (drift, "SafetyDriftCallback asks prompts, but the trainer has no tokenizer"),
        (probes, "SqueezeProbeCallback scores texts, but the trainer has no tokenizer"),
        (another, "Expected a model of transformers or PEFT, got Linear"),
    ):
        with pytest.raises((ValueError, TypeError), match=said):
            trainer.train()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            ["broken"],
            1,
            r"^Traceback \(most recent call last\):\n  File \"[^\n]*script.py\", line 5.*KeyError: 'mine'\n$",
        ),
        (["ours"], 2, r"^hf-iclr run: Expected nullspace_threshold between [^\n]*\n$"),
        (["--help", "--debug", "-o", "x"], 0, r"^\['--help', '--debug', '-o', 'x'\]\n$"),
    ],
)
def test_what_follows_a_script_is_the_scripts_and_so_are_its_errors(tmp_path, arguments, code, said):
    (tmp_path / "script.py").write_text(FAILING)
    result = CliRunner().invoke(app, ["run", str(tmp_path / "script.py"), *arguments])
    assert result.exit_code == code, result.output
    assert re.search(said, result.output, re.DOTALL), result.output
    assert "Usage: " in CliRunner().invoke(app, ["run", "--help"]).output


def test_statistics_keep_a_null_space(folder, word_tokenizer):
    statistics = KeyStatistics.from_dataset(tiny_llama(), word_tokenizer, [{"text": "w1 w2 w3 w4 w5"}] * 4, layers=[0])
    statistics.save_pretrained(folder / "statistics")
    with parts_in_every_trainer([f"null_space:{folder / 'statistics'}"]):
        trainer = Trainer(tiny_llama())
    assert "NullSpaceCallback" in str(trainer.callback_handler.callback_list)
    assert "NullSpaceCallback" not in str(Trainer(tiny_llama()).callback_handler.callback_list)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("influence:x", "Expected one of shapley, squeeze, safety, null_space after --with, got 'influence'"),
        ("shapley", "Expected a file after shapley"),
        ("safety:nowhere.txt", "nowhere.txt"),
        ("squeeze:nowhere.jsonl", "Expected rows in nowhere.jsonl, got no such file"),
        ("shapley:{folder}/val.jsonl,ranks=8", "Expected options of InRunDataShapleyCallback, got ranks"),
        ("shapley:{folder}/val.jsonl,trainer=8", "Expected options of InRunDataShapleyCallback, got trainer"),
        ("shapley:{folder}/val.jsonl,cost=2", "cost"),
        ("safety:{folder}/prompts.txt,every=soon", "Expected options of SafetyDriftCallback, got every='soon'"),
    ],
)
def test_a_wrong_part_is_refused_before_the_script_runs(folder, tmp_path, part, words):
    (tmp_path / "train.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    result = CliRunner().invoke(app, ["run", str(tmp_path / "train.py"), "--with", part.format(folder=folder)])
    assert result.exit_code == 2 and words in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "ran").exists()


def test_the_page_tells_what_the_folder_holds(folder, watched, tmp_path):
    (watched / "cascade.jsonl").write_text(json.dumps({"new_tokens": 12, "call": {"rule": "token_v3"}}) + "\n")
    rows = word_rows().add_column("source", ["a", "b"] * 12)
    page = write_run_report(watched, tmp_path / "page" / "run.html", rows, "source").read_text()
    values = read_run(watched).values
    worst = values.bottom(1)
    assert f"{worst['value'].iloc[0]:.4g}" in page and rows[int(worst.index[0])]["prompt"].strip() in page
    totals = values.by_source("source", rows).totals["value"]
    assert all(f"{total:.4g}" in page for total in totals)
    assert "token_v3" in page and "Refusals went from 0% to 0%" in page
    panels = [
        page.index(f"<h3>{title}</h3>") for title in ("Loss", "Refusals", "Watched answers", "Values of the rows")
    ]
    assert panels == sorted(panels) and "<h3>Rewards of the loss</h3>" not in page
    assert page.count("<svg") == page.count("<figure>") and "src=" not in page and 'href="http' not in page


def test_the_page_tells_of_edits_in_force(word_tokenizer, tmp_path):
    editor = make_editor(word_tokenizer, folder=tmp_path / "edits", num_steps=1)
    editor.edit(REQUESTS[:2], batch_size=1, progress=False)
    editor.undo()
    page = write_run_report(tmp_path).read_text()
    assert "1 in force" in page and REQUESTS[0].prompt in page and REQUESTS[1].prompt not in page
    assert f"{editor.batches[0].edits[0]['p_after']:.4g}" in page


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected what a trainer or a part of hf_iclr writes"):
        write_run_report(tmp_path)
    assert not any(tmp_path.iterdir())
    with pytest.raises(NotADirectoryError, match="Expected the output folder of a run"):
        write_run_report(tmp_path / "gone")
    with pytest.raises(TypeError, match="as a path, got \\[\\]"):
        write_run_report([])
    with pytest.raises(TypeError, match="got list. Type `train_dataset="):
        write_run_report(tmp_path, train_dataset=[])
    with pytest.raises(ValueError, match="Expected training rows with a column 'source'"):
        write_run_report(tmp_path, source_column="source")


def states(folder, **logs):
    """A run's folder with a trainer_state.json in each of these checkpoints, the newest last."""
    for age, (name, losses) in enumerate(logs.items()):
        path = folder / name.replace("_", "-") / "trainer_state.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
        path.write_text(json.dumps({"log_history": entries}))
        os.utime(path, (age, age))
    return folder


def test_of_two_runs_in_a_folder_the_last_one_is_told(tmp_path):
    states(tmp_path, checkpoint_2=[3.0, 2.0], checkpoint_3=[3.0, 2.0, 1.0], checkpoint_1=[9.0])
    assert [entry["loss"] for entry in read_run(tmp_path).log] == [9.0]


def test_a_copied_folder_tells_the_whole_run_whatever_its_times(tmp_path):
    states(tmp_path, checkpoint_3=[3.0, float("nan"), 1.0], checkpoint_2=[3.0, float("nan")], checkpoint_1=[3.0])
    assert [entry["step"] for entry in read_run(tmp_path).log] == [1, 2, 3]


def test_a_page_is_written_of_what_a_crash_has_left(watched, tmp_path, caplog):
    """States cut short are passed over; what else can't be read is told on the page, beside what can."""
    run = states(tmp_path / "run", checkpoint_1=[3.0], checkpoint_2=[3.0, 2.0])
    with (run / "checkpoint-2" / "trainer_state.json").open("r+") as file:
        file.truncate(40)
    assert [entry["loss"] for entry in read_run(run).log] == [3.0] and "Passed over: " in caplog.text
    shutil.copytree(watched / "shapley", run / "shapley")
    assert "seem to be of another run in this folder" in write_run_report(run).read_text()
    assert "of another run" not in write_run_report(watched, tmp_path / "page.html").read_text()
    next((run / "shapley").rglob("*.parquet")).write_bytes(b"PAR1")
    (run / "audit").mkdir()
    (run / "audit" / "report.json").write_text('{"report": 3')
    (run / "cascade.jsonl").write_text('{"new_tokens": 12}\n{"new_')
    (run / "checkpoint-1" / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 1, "loss": 3.0, "probe/chosen/logp": float("nan"), "note": [1]}]})
    )
    unread = read_run(run).unread
    names = ("parquet", "report.json", "cascade.jsonl")
    assert [name in text for name, text in zip(names, unread, strict=True)] == [True] * 3
    page = write_run_report(run).read_text()
    assert page.count('<li class="bad">') == 4 and "`probe/chosen/logp` at step 1 is nan" in page
    assert "<h3>Loss</h3>" in page


def test_a_folder_above_runs_names_them(tmp_path):
    states(tmp_path / "sft", checkpoint_1=[3.0])
    with pytest.raises(ValueError, match=f"There are runs in {tmp_path}/sft: name one of these"):
        read_run(tmp_path)
    states(tmp_path, checkpoint_1=[])
    with pytest.raises(ValueError, match="got none: nothing was logged. Set `logging_steps`"):
        read_run(tmp_path)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_in_a_browser(watched, tmp_path):
    page = write_run_report(watched, tmp_path / "run.html")

    async def look():
        async with open_tab(page.as_uri(), tmp_path / "profile") as tab:
            for width in (1200, 390):
                await tab.call(
                    "Emulation.setDeviceMetricsOverride",
                    width=width,
                    height=800,
                    deviceScaleFactor=1,
                    mobile=width < 500,
                )
                assert await tab.run("document.documentElement.scrollWidth") <= width
                columns = "getComputedStyle(document.querySelector('.panels')).gridTemplateColumns.split(' ').length"
                assert await tab.run(columns) == (1 if width == 390 else 3)
            await tab.run("document.querySelector('details').scrollIntoView()")
            await tab.press("details summary")
            await tab.until("document.querySelector('details').open")
            assert tab.errors == []

    asyncio.run(look())
