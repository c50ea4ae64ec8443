"""The early warning on curves made by hand and inside of a training."""

import logging
import math

import pytest
from trl import SFTConfig, SFTTrainer

from hf_iclr.trainers.squeeze.config import SqueezeDPOConfig
from hf_iclr.trainers.squeeze.trainer import SqueezeDPOTrainer
from hf_iclr.trainers.squeeze.warning import SqueezeMonitor, SqueezeState, SqueezeStoppingCallback
from tests.trainers.squeeze.toy import CURVE, pair_rows, probe_log
from tests.trainers.tiny import QUICK, tiny_llama, word_rows


# TRL 1.16 still reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def states(entries, **rule):
    monitor = SqueezeMonitor(**rule)
    return "".join(monitor.update(entry).name[0] for entry in entries)


def test_states_by_hand():
    """Down at 2 and 3: WATCH at 3 (patience 2). Chosen is .04 below its highest at 4, .10 at 5: SQUEEZE at 5."""
    assert states(CURVE) == "OOOWWS"
    assert states(CURVE, patience=1) == "OOWWWS"
    assert states(CURVE, tolerance=0.03) == "OOOWSS"
    assert states(CURVE, delta=0.15) == "OOOOWS"


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
    """DPO hard enough to squeeze the tiny model: what is said live is what the log history says."""
    rows = pair_rows()
    for settings in (
        {"squeeze_metrics": "full", "argmax_every": 1},
        {"probe_dataset": rows, "probe_every": 1, "probe_budget": 1.0},
    ):
        callback = SqueezeStoppingCallback("stop", at="WATCH", batch_window=1)
        trainer = train(callback, rows=rows, per_device_train_batch_size=12, beta=1.0, **settings)
        monitor = SqueezeMonitor(batch_window=1)
        for entry in trainer.state.log_history:
            monitor.update(entry)
        assert monitor.rows == callback.monitor.rows
        assert callback.monitor.source == ("probe" if "probe_dataset" in settings else "")
    assert monitor.state == SqueezeState.WATCH and monitor.rows[-1]["step"] == trainer.state.global_step < 8


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


def test_bad_logs():
    monitor = SqueezeMonitor()
    monitor.update(CURVE[0])
    with pytest.raises(ValueError, match="that of 'permuted' at step 1 is nan"):
        monitor.update({**CURVE[1], "probe/permuted/logp": math.nan})
