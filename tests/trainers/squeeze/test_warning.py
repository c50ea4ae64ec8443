"""The early warning on curves made by hand, on the authors' own, and inside of a training."""

import gzip
import json
import logging
import math
from pathlib import Path

import pytest
from trl import SFTConfig, SFTTrainer

from hf_iclr.trainers.squeeze.config import SqueezeDPOConfig
from hf_iclr.trainers.squeeze.replay import replay
from hf_iclr.trainers.squeeze.trainer import SqueezeDPOTrainer
from hf_iclr.trainers.squeeze.warning import SqueezeMonitor, SqueezeState, SqueezeStoppingCallback
from tests.trainers.squeeze.toy import pair_rows
from tests.trainers.tiny import QUICK, tiny_llama, word_rows


# TRL 1.16 still reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

CURVES = Path(__file__).parents[4] / "shared" / "data" / "preference"
NAMES = ("other_train", "permuted", "random_words", "rejected")


def probe_log(step, chosen, peak, *others, source="probe"):
    named = dict(zip(NAMES, others, strict=True))
    return {
        "step": step,
        f"{source}/chosen/logp": chosen,
        f"{source}/chosen/logp_argmax": peak,
        f"{source}/initial_greedy/logp": -0.5 + 0.1 * step,
        **{f"{source}/{name}/logp": value for name, value in named.items()},
    }


# chosen rises, is overtaken by its peak, and falls while the others fall from the second evaluation on
CURVE = [
    probe_log(0, -2.00, -1.00, -3.0, -7.0, -8.0, -2.0),
    probe_log(1, -1.90, -0.95, -3.0, -7.0, -8.0, -2.1),
    probe_log(2, -1.80, -0.90, -3.1, -7.1, -8.1, -2.2),
    probe_log(3, -1.75, -0.80, -3.2, -7.2, -8.2, -2.5),
    probe_log(4, -1.79, -0.75, -3.3, -7.3, -8.3, -3.0),
    probe_log(5, -1.85, -0.70, -3.4, -7.4, -8.4, -4.0),
]


def states(entries, **rule):
    monitor = SqueezeMonitor(**rule)
    return "".join(monitor.update(entry).name[0] for entry in entries)


def test_states_by_hand():
    """Down at 2 and 3: WATCH at 3 (patience 2). Chosen is .04 below its highest at 4, .10 at 5: SQUEEZE at 5."""
    assert states(CURVE) == "OOOWWS"
    assert states(CURVE, patience=1) == "OOWWWS"
    assert states(CURVE, tolerance=0.03) == "OOOWSS"
    assert states(CURVE, delta=0.15) == "OOOOWS"
    found = replay(CURVE)
    assert (found.signal, found.watch, found.squeeze, found.chosen_peak, found.lead) == ("probes", 3, 5, 3, 0)
    assert found.table["share_down"].tolist() == [0, 0.25, 1, 1, 1, 1]
    assert found.table["state"].tolist() == ["OK"] * 3 + ["WATCH"] * 2 + ["SQUEEZE"]


def test_no_squeeze_without_a_rising_peak():
    assert states([{**entry, "probe/chosen/logp_argmax": -1.0} for entry in CURVE]) == "OOOWWW"
    bare = [{key: value for key, value in entry.items() if "argmax" not in key} for entry in CURVE]
    assert states(bare) == "OOOWWW"


def test_a_state_is_left_again():
    recovered = [*CURVE, probe_log(6, -1.7, -0.7, -2.9, -6.9, -8.4, -4.0)]
    assert states(recovered) == "OOOWWSO"


def test_plain_sft_is_no_squeeze():
    """Cross-talk lifts other_train, shuffled words fall: 2 of 4 are down."""
    curve = [
        probe_log(step, -2 + step / 5, -1 + step / 9, -3 + step / 9, -7 - step, -8 - step, -2) for step in range(5)
    ]
    assert states(curve) == "OOOOO"


@pytest.mark.parametrize("prefix", ["eval_", "eval_held_out_", ""])
@pytest.mark.parametrize("peak", ["logp_argmax", "renyi2"])
def test_without_probes_the_peak_tells(prefix, peak):
    """The gap is .9, 1.0, 1.1, 1.3: up from the second evaluation on, so WATCH at the third; chosen then falls."""
    entries = []
    for step, (chosen, top) in enumerate([(-2.0, -1.1), (-1.9, -0.9), (-1.8, -0.7), (-1.9, -0.6)]):
        key, sign = f"{prefix}squeeze/{peak}_chosen", 1 if peak == "logp_argmax" else -1
        entries.append({"step": step, f"{prefix}squeeze/logp_tok_chosen": chosen, key: sign * top})
    assert states(entries, batch_window=1) == "OOWS"
    assert replay(entries, batch_window=1).signal == "peak"
    keeping_up = [{**entry, key: sign * (entry[f"{prefix}squeeze/logp_tok_chosen"] + 0.9)} for entry in entries]
    assert states(keeping_up, batch_window=1) == "OOOO"


def test_training_batches_are_averaged_and_give_way_to_better_sources():
    noisy = [
        {"step": step, "squeeze/logp_tok_chosen": -2 + 0.3 * (-1) ** step, "squeeze/logp_argmax_chosen": -1.0}
        for step in range(8)
    ]
    monitor = SqueezeMonitor(batch_window=2)
    assert [monitor.update(entry) for entry in noisy] == [None, SqueezeState.OK] * 4
    assert [row["chosen"] for row in monitor.rows] == pytest.approx([-2.0] * 4)
    assert monitor.source == ""
    evaluation = {"step": 8, "eval_squeeze/logp_tok_chosen": -2.0, "eval_squeeze/renyi2_chosen": 1.0}
    assert monitor.update(evaluation) == SqueezeState.OK and monitor.source == "eval_"
    assert monitor.update({**noisy[0], "step": 9}) is None
    assert monitor.update(probe_log(9, -2.0, -1.0, -3.0, -7.0, -8.0, -2.0, source="a_probe")) == SqueezeState.OK
    assert monitor.source == "a_probe" and len(monitor.rows) == 1


def test_steps_without_the_argmax_are_let_pass():
    entries = [
        {"step": step, "eval_squeeze/logp_tok_chosen": -2.0}
        | ({"eval_squeeze/logp_argmax_chosen": -1.0} if step % 2 == 0 else {"eval_squeeze/renyi2_chosen": 2.0})
        for step in range(4)
    ]
    monitor = SqueezeMonitor()
    assert [monitor.update(entry) for entry in entries] == [SqueezeState.OK, None] * 2


def test_a_resumed_run_replaces_what_it_repeats():
    whole = replay(CURVE)
    resumed = replay([*CURVE[:5], *CURVE[3:]])
    assert resumed.table.equals(whole.table)


def official(rows, kinds=("chosen", *NAMES)):
    """The authors' rows: sums over 50 tokens."""
    return [
        {f"logps_eval_prob_train/{kind}": 50 * entry[f"probe/{kind}/logp"] for kind in kinds}
        | {"argmax_prob_logits": 50 * entry["probe/chosen/logp_argmax"], "except_argmax_prob_logits": math.nan}
        for entry in rows
    ]


def test_every_form_of_file_says_the_same(tmp_path):
    whole = replay(CURVE)
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"global_step": 5, "log_history": CURVE}, indent=2))
    lines = "".join(json.dumps(row) + "\n" for row in official(CURVE))
    (plain := tmp_path / "metrics.json").write_text(lines)
    (packed := tmp_path / "metrics.json.gz").write_bytes(gzip.compress(lines.encode()))
    history = tmp_path / "history.json"
    history.write_text(json.dumps(CURVE))
    for source in (state, str(plain), packed, history):
        found = replay(source)
        assert (found.watch, found.squeeze, found.chosen_peak) == (whole.watch, whole.squeeze, whole.chosen_peak)
        assert found.table["chosen"].tolist() == pytest.approx(whole.table["chosen"].tolist())
    assert replay(plain, tokens_per_answer=5000).watch is None  # a hundredth of the change per token


@pytest.mark.parametrize("packed", [False, True])
def test_a_half_written_last_line_loses_only_itself(tmp_path, caplog, packed):
    lines = "".join(json.dumps(row) + "\n" for row in official(CURVE))
    data = lines.encode()[:-20]
    if packed:
        compressor = gzip.compress(lines.encode(), 0)
        data = compressor[:-60]  # stored blocks: cuts the last line and the checksum
    (path := tmp_path / "cut").write_bytes(data)
    with caplog.at_level(logging.WARNING):
        found = replay(path)
    assert "Line 6 of" in caplog.text and len(found.table) == 5 and found.watch == 3


def test_restarts_in_one_file(tmp_path, caplog):
    """The first run was cut within its second line, and the next one went on there."""
    lines = [json.dumps(row) for row in official(CURVE)]
    path = tmp_path / "restarted.json"
    path.write_text(lines[0] + "\n" + lines[1][:40] + lines[0] + "\n" + "\n".join(lines[1:]) + "\n" + lines[0])
    with caplog.at_level(logging.WARNING):
        found = replay(path)
    assert "Line 2 of" in caplog.text and "3 runs one after the other, of 1, 6, 1 evaluations" in caplog.text
    assert (len(found.table), found.watch, found.squeeze) == (6, 3, 5)


def test_the_authors_curves():
    """Evaluations from WATCH to the peak of the chosen answer; see benchmarks/squeeze_replay.py."""
    if not CURVES.exists():
        pytest.skip(f"The authors' curves are not in {CURVES}.")
    for name in ("pythia410", "pythia410m", "qwen05"):
        found = replay(CURVES / f"refcurve_{name}_baseline_dpo_checkbug_5e7.json.gz")
        assert found.signal == "peak" and found.watch < found.chosen_peak, name
        assert found.squeeze is None or found.squeeze > found.chosen_peak
    short = replay(CURVES / "refcurve_baseline_sft_qwen05_ep8.json.gz")  # four times the first evaluation
    assert len(short.table) == 1 and short.watch is None


class ThenSqueeze(SqueezeStoppingCallback):
    """Sees what `CURVE` says, whatever was logged."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        step = state.global_step
        super().on_log(args, state, control, logs=CURVE[min(step, 5)] if "loss" in logs else {}, **kwargs)


@pytest.fixture
def train(tmp_path, word_tokenizer):
    def run(callback, trainer_class=SqueezeDPOTrainer, config=SqueezeDPOConfig, rows=None, **settings):
        quick = {**QUICK, "max_steps": 8, "lr_scheduler_type": "constant", **settings}
        extra = {"probe_dataset": quick.pop("probe_dataset")} if "probe_dataset" in quick else {}
        if trainer_class is SqueezeDPOTrainer:
            extra["ref_model"] = tiny_llama()
        trainer = trainer_class(
            tiny_llama(),
            args=config(str(tmp_path / "out"), **quick),
            train_dataset=pair_rows() if rows is None else rows,
            processing_class=word_tokenizer,
            callbacks=[callback],
            **extra,
        )
        trainer.train()
        return trainer

    return run


def test_warns(train, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_iclr"):
        trainer = train(ThenSqueeze())
    assert trainer.state.global_step == 8
    assert "WATCH at step 3: 100% of what else was watched has lost probability" in caplog.text
    assert caplog.text.count("SQUEEZE at step 5") == 1


@pytest.mark.parametrize(("at", "last"), [("WATCH", 3), ("SQUEEZE", 5)])
def test_stops(train, at, last):
    assert train(ThenSqueeze("stop", at=at)).state.global_step == last


def test_lowers_the_learning_rate_for_good(train):
    rates = {"warn": [], "lower_lr": []}

    class Record(ThenSqueeze):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates[self.action].append(optimizer.param_groups[0]["lr"])

    for action in rates:
        train(Record(action, lr_factor=0.25), lr_scheduler_type="linear")
    expected = [rate * (1 if step <= 5 else 0.25) for step, rate in enumerate(rates["warn"], 1)]
    assert rates["lower_lr"] == pytest.approx(expected)


def test_closes_the_gate(train):
    trainer = train(ThenSqueeze("gate", gate=math.inf))
    forces = [entry["squeeze/force"] for entry in trainer.state.log_history if "loss" in entry]
    assert min(forces[:5]) > 0 and forces[5:] == [0] * 3


def test_in_a_run_of_its_own(train):
    """DPO hard enough to squeeze the tiny model: what is said live is what a replay says."""
    rows = pair_rows()
    for settings in ({"squeeze_metrics": "full", "argmax_every": 1}, {"probe_dataset": rows, "probe_every": 1}):
        callback = SqueezeStoppingCallback("stop", at="WATCH", batch_window=1)
        trainer = train(callback, rows=rows, per_device_train_batch_size=12, beta=1.0, **settings)
        found = replay(trainer.state.log_history, batch_window=1)
        assert found.table["step"].tolist() == [row["step"] for row in callback.monitor.rows]
        assert found.table["state"].tolist() == [row["state"].name for row in callback.monitor.rows]
        assert callback.monitor.source == ("probe" if "probe_dataset" in settings else "")
    assert found.signal == "probes" and found.table["step"][found.watch] == trainer.state.global_step < 8


def test_a_run_that_is_resumed_knows_its_past(train):
    callback = ThenSqueeze("gate", gate=3.0)
    trainer = train(callback, max_steps=1)
    trainer.args.pressure_gate, trainer.state.log_history = None, CURVE
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert callback.monitor.state == SqueezeState.SQUEEZE and trainer.args.pressure_gate == 3.0


def test_no_gate_elsewhere(train):
    with pytest.raises(ValueError, match="action='gate' needs the gate of `SqueezeDPOTrainer`"):
        train(SqueezeStoppingCallback("gate"), SFTTrainer, SFTConfig, word_rows())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"action": "pray"}, "action must be one of warn, stop, lower_lr, gate, got 'pray'"),
        ({"at": "OK"}, "at must be 'WATCH' or 'SQUEEZE', got 'OK'"),
        ({"lr_factor": 2}, r"lr_factor must be in \(0, 1\), got 2"),
        ({"gate": 0}, "gate must be positive, got 0"),
        ({"share": 0}, r"share must be in \(0, 1\], got 0"),
        ({"delta": math.nan}, "delta must be at least 0 nats per token, got nan"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
    ],
)
def test_bad_options(option, message):
    with pytest.raises(ValueError, match=message):
        SqueezeStoppingCallback(**option)


def test_bad_logs(tmp_path):
    with pytest.raises(ValueError, match="that of 'permuted' at step 1 is nan"):
        replay([CURVE[0], {**CURVE[1], "probe/permuted/logp": math.nan}])
    with pytest.raises(ValueError, match="in 1 log entries, found none"):
        replay([{"loss": 1.0, "step": 1}])
    with pytest.raises(ValueError, match="tokens_per_answer must be positive, got 0"):
        replay(CURVE, tokens_per_answer=0)
    (path := tmp_path / "notes.txt").write_text("no\njson\n")
    with pytest.raises(ValueError, match="Expected a JSON object on line 1 of .*notes.txt, got 'no'"):
        replay(path)
    path.write_text("")
    with pytest.raises(ValueError, match="in 0 log entries, found none"):
        replay(path)
