"""The report of a real run, of TRL's own keys, and of nothing."""

import base64
import json
import re

import pytest
from trl import DPOConfig, DPOTrainer

from hf_iclr.trainers.squeeze.config import SqueezeDPOConfig
from hf_iclr.trainers.squeeze.probes import build_probe_set
from hf_iclr.trainers.squeeze.report import write_squeeze_report
from hf_iclr.trainers.squeeze.trainer import SqueezeDPOTrainer
from tests.trainers.squeeze.toy import pair_rows
from tests.trainers.tiny import QUICK, tiny_llama


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def test_report_of_a_run(tmp_path, word_tokenizer):
    args = SqueezeDPOConfig(
        str(tmp_path),
        squeeze_metrics="full",
        argmax_every=1,
        probe_every=1,
        probe_budget=1.0,
        **{**QUICK, "max_steps": 2},
    )
    pairs = pair_rows(4)
    trainer = SqueezeDPOTrainer(
        tiny_llama(),
        tiny_llama(),
        args,
        train_dataset=pairs,
        processing_class=word_tokenizer,
        probe_dataset={"held_out": build_probe_set(pairs, num_probes=2)},
    )
    trainer.train()
    path = trainer.squeeze_report(tmp_path / "report", title="A <run>")
    assert path == tmp_path / "report" / "squeeze_report.html"
    page = path.read_text()
    image = base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])
    assert image == (tmp_path / "report" / "squeeze_report.png").read_bytes() and image.startswith(b"\x89PNG")
    assert (
        "A &lt;run&gt;" in page and "<script" not in page and "http" not in page.replace("https://huggingface.co", "")
    )
    report = json.loads((tmp_path / "report" / "squeeze_report.json").read_text())
    history = trainer.state.log_history
    for key in ("squeeze/logp_tok_chosen", "held_out_probe/permuted/delta0", "held_out_repeat/rep_4"):
        expected = {entry["step"]: entry[key] for entry in history if key in entry}
        assert dict(zip(*report["series"][key].values(), strict=True)) == expected
        (row,) = (row for row in report["summary"] if row["key"] == key)
        values = list(expected.values())
        assert (row["first"], row["last"], row["change"]) == (values[0], values[-1], values[-1] - values[0])
        assert f"<td>{key}</td>" in page
    assert {"loss", "epoch", "step"}.isdisjoint(report["series"])


def test_states_are_those_of_the_monitor(tmp_path):
    """Others fall from step 1 on, the argmax gains, the chosen answer falls from step 3 on."""
    history = [
        {
            "step": step,
            "probe/chosen/logp": chosen,
            "probe/permuted/logp": -4 - 0.5 * step,
            "probe/chosen/logp_argmax": -1 + 0.1 * step,
        }
        for step, chosen in enumerate([-2.0, -1.9, -1.8, -2.0, -2.2])
    ]
    page = write_squeeze_report(history, tmp_path).read_text()
    states = json.loads((tmp_path / "squeeze_report.json").read_text())["states"]
    assert [(change["step"], change["state"]) for change in states] == [(2, "WATCH"), (3, "SQUEEZE")]
    assert "<strong>SQUEEZE</strong> at step\n    3" in page
    assert "No warning" in write_squeeze_report(history[:2], tmp_path / "calm").read_text()


def test_plain_trl_logs_and_resumed_steps(tmp_path, word_tokenizer):
    args = DPOConfig(str(tmp_path), **QUICK)
    trainer = DPOTrainer(tiny_llama(), tiny_llama(), args, train_dataset=pair_rows(), processing_class=word_tokenizer)
    trainer.train()
    history = [
        *trainer.state.log_history,
        {"step": 2, "logps/chosen": -99.0},
        {"step": 3, "squeeze/force": float("nan")},
    ]
    write_squeeze_report(history, tmp_path)
    series = json.loads((tmp_path / "squeeze_report.json").read_text())["series"]
    assert set(series) == {"logps/chosen", "logps/rejected"}
    assert series["logps/chosen"]["step"] == [1, 2, 3] and series["logps/chosen"]["value"][1] == -99.0


@pytest.mark.parametrize("history", [[], [{"loss": 0.7, "step": 1}]])
def test_nothing_to_report(tmp_path, history):
    with pytest.raises(ValueError, match=f"got {len(history)} entries without one. Train first"):
        write_squeeze_report(history, tmp_path / "none")
    assert not (tmp_path / "none").exists()
