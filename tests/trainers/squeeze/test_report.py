"""The report of a real run, of TRL's own keys, and of nothing."""

import base64
import json
import re
from itertools import pairwise

import matplotlib.figure
import pytest
from trl import DPOConfig, DPOTrainer

from hf_iclr.trainers.squeeze.config import SqueezeDPOConfig
from hf_iclr.trainers.squeeze.probes import build_probe_set
from hf_iclr.trainers.squeeze.report import write_squeeze_report
from hf_iclr.trainers.squeeze.trainer import SqueezeDPOTrainer
from tests.trainers.squeeze.pairs_and_logs import pair_rows
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


def test_warnings_are_those_of_the_monitor(tmp_path):
    """The chosen answers fall from step 3 on; each source has its figure, the training batches no say."""
    history = [
        {
            "step": step,
            "probe/chosen/logp": chosen,
            "probe/chosen/delta0": chosen + 2,
            "squeeze/logp_tok_chosen": -step,
        }
        for step, chosen in enumerate([-2.0, -1.9, -1.8, -2.3, -2.5])
    ]
    page = write_squeeze_report(history, tmp_path).read_text()
    warnings = json.loads((tmp_path / "squeeze_report.json").read_text())["warnings"]
    assert warnings == [{"source": "probe", "step": 3}]
    assert "<strong>Warning</strong> at step 3: the chosen answers of &ldquo;Probes&rdquo;" in page
    assert page.count("data:image/png") == 2 and (tmp_path / "squeeze_report_2.png").exists()
    assert "No warning" in write_squeeze_report(history[:3], tmp_path / "calm").read_text()
    only_batches = [{"step": step, "squeeze/logp_tok_chosen": -step} for step in range(9)]
    assert "Nothing was scored again" in write_squeeze_report(only_batches, tmp_path / "batches").read_text()


def test_pages_and_panels(monkeypatch, tmp_path):
    """A page a source, changes since the start, one colour a kind, labels apart, no more than eight panels."""
    figures = []

    def keep(what, size):
        figures.append(matplotlib.figure.Figure(size, layout="constrained"))
        return figures[-1]

    monkeypatch.setattr("hf_iclr.trainers.squeeze.report.new_figure", keep)
    kinds = ("chosen", "rejected", "chosen_reworded", "other_train", "other_test", "permuted", "random_words")
    history = []
    for step in range(3):
        entry = {"step": step, "squeeze/logp_tok_chosen": -3.0 - step, "eval_squeeze/logp_tok_chosen": -4.0 - step}
        for prefix in ("", "test_"):
            entry |= {f"{prefix}probe/{kind}/delta0": -0.01 * step for kind in kinds}
            entry |= {f"{prefix}probe/{kind}/logp_argmax": -1 + 0.1 * step for kind in ("chosen", "rejected")}
            entry |= {f"{prefix}repeat/{name}": 0.2 for name in ("rep_4", "distinct_2", "eos_rate")}
        history.append(entry | {"rewards/chosen": 0.1, "logps/chosen": -30.0, "squeeze/both_down": 0.5})
    history[0] |= {"squeeze/logp_argmax_chosen": -1.0}  # once, which is no curve
    history[1] |= {"squeeze/index": 0.5, "test_squeeze/index": 0.6}
    history[2] |= {"squeeze/index": 0.7, "test_squeeze/index": 0.8}
    page = write_squeeze_report(history, tmp_path).read_text()
    assert re.findall("<h2>(.+)</h2>", page) == ["Probes", "Probes: test", "Evaluation", "Training batches"]
    titles = [[axes.get_title("left") for axes in figure.axes] for figure in figures]
    probed = ["Answers", "Most likely token of their contexts", "Index and cross-talk", "Greedy answers"]
    batches = ["Answers", "Share of tokens in a valley, of pairs down", "Rewards of the loss", "Whole answers"]
    assert titles == [probed, probed, ["Answers"], batches]
    colours = {}
    for figure in figures:
        figure.canvas.draw()
        for axes in figure.axes:
            texts = [text for text in axes.texts if text.get_text()]
            curves = [line for line in axes.lines if line.get_marker() == "."]  # not those at zero and at the warning
            assert len(texts) == len(curves) and all(line.get_ydata()[0] == 0 for line in curves)
            for text in texts:
                assert colours.setdefault(text.get_text(), text.get_color()) == text.get_color()
            boxes = sorted((text.get_window_extent() for text in texts), key=lambda box: box.y0)
            assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(boxes))
    assert len({colours[kind] for kind in kinds}) == len(kinds)


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
    assert set(series) == {f"{kind}/{side}" for kind in ("logps", "rewards") for side in ("chosen", "rejected")} | {
        "rewards/accuracies", "rewards/margins"
    }  # fmt: skip
    assert series["logps/chosen"]["step"] == [1, 2, 3] and series["logps/chosen"]["value"][1] == -99.0


@pytest.mark.parametrize(
    "history",
    [[], [{"loss": 0.7, "step": 1}], [{"probe/chosen/logp": -1.0, "step": 1}]],  # the last without a change
)
def test_nothing_to_report(tmp_path, history):
    with pytest.raises(ValueError, match=f"got {len(history)} entries without one. Train first"):
        write_squeeze_report(history, tmp_path / "none")
    assert not (tmp_path / "none").exists()
