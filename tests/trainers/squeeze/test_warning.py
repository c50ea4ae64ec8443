"""The warning on curves made by hand and inside of a training."""

import logging
import math

import pytest
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_iclr.trainers.squeeze.config import SqueezeDPOConfig
from hf_iclr.trainers.squeeze.probes import SqueezeProbeCallback, build_probe_set
from hf_iclr.trainers.squeeze.trainer import SqueezeDPOTrainer, SqueezeMixin
from hf_iclr.trainers.squeeze.warning import SqueezeMonitor, SqueezeStoppingCallback
from tests.trainers.squeeze.pairs_and_logs import pair_rows
from tests.trainers.tiny import QUICK, tiny_llama, word_rows


# TRL 1.16 still reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

HARD = {"per_device_train_batch_size": 12, "beta": 1.0, "learning_rate": 3e-2, "lr_scheduler_type": "constant"}
RULE = {"delta": 0.2, "patience": 2}
FALLS = [-2.0, -1.9, -2.05, -2.2, -2.3, -2.4]  # .2 below the highest, -1.9, from the fourth on


def entries(values, key="probe/chosen/logp"):
    return [{"step": 10 * index, key: value} for index, value in enumerate(values)]


def alarm(values, key="probe/chosen/logp", **rule):
    """Where the warning comes: the position in `values`, `None` if it does not."""
    monitor = SqueezeMonitor(**{**RULE, **rule})
    lost = [bool(monitor.update(entry)) for entry in entries(values, key)]
    assert sum(lost) == len(monitor.alarms) <= 1  # it comes once
    return lost.index(True) if any(lost) else None


@pytest.mark.parametrize(
    ("values", "rule", "expected"),
    [
        (FALLS, {}, 4),
        (FALLS, {"patience": 1}, 3),
        ([-2.0, -1.95, -2.14, -2.16], {"patience": 1}, 3),  # of the highest, not of the start
        (FALLS, {"patience": 3}, 5),
        (FALLS, {"delta": 0.1}, 3),
        (FALLS, {"delta": 0.45}, None),
        ([-2.0, -3.0, -1.9, -3.0, -1.8], {}, None),  # never twice in a row
        ([-1.0, -1.0, -1.0], {}, None),  # nothing is learnt
        ([-2.0, -3.0, -2.5], {}, 2),  # on its way back, but far below
        ([-2.0], {"patience": 1}, None),
        ([-1.0, -1.5], {"patience": 1, "delta": 0.5}, 1),  # as far as delta is far enough
    ],
)
def test_by_hand(values, rule, expected):
    assert alarm(values, **rule) == expected


@pytest.mark.parametrize(
    "key",
    [
        "probe/chosen/logp",
        "held_out_probe/chosen/logp",
        "eval_squeeze/logp_tok_chosen",
        "eval_a_b_squeeze/logp_tok_chosen",
    ],
)
def test_every_set_that_is_scored_again(key):
    assert alarm(FALLS, key) == 4


@pytest.mark.parametrize(
    "key", ["squeeze/logp_tok_chosen", "logps/chosen", "probe/rejected/logp", "probe/other_test/logp"]
)
def test_batches_and_other_answers_say_nothing(key):
    assert alarm([-1.0, -9.0, -20.0], key) is None


def test_sets_are_judged_alone():
    monitor = SqueezeMonitor(**RULE)
    for step, (own, held_out) in enumerate(zip([-2.0, -1.5, -1.0, -0.5], FALLS[1:], strict=False)):
        lost = monitor.update({"step": step, "probe/chosen/logp": own, "test_probe/chosen/logp": held_out})
        assert lost == (["test_probe"] if step == 3 else [])
    assert monitor.alarms == {"test_probe": 3} and monitor.sets["probe"] == {0: -2.0, 1: -1.5, 2: -1.0, 3: -0.5}


def test_a_resumed_run_replaces_what_it_repeats():
    whole, resumed = SqueezeMonitor(**RULE), SqueezeMonitor(**RULE)
    log = entries(FALLS)
    for entry in log:
        whole.update(entry)
    for entry in [*log[:5], *log[2:]]:
        resumed.update(entry)
    assert resumed == whole and whole.alarms == {"probe": 40}
    resumed.update({"step": 20, "probe/chosen/logp": -1.8})
    assert resumed.alarms == {}


class Fake(SqueezeStoppingCallback):
    """Sees what `FALLS` says, one value a step, whatever was logged."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        step = state.global_step
        super().on_log(args, state, control, entries(FALLS)[min(step, 5)] if "loss" in logs else {}, **kwargs)

    def on_step_begin(self, args, state, control, **kwargs):
        pass


@pytest.fixture
def train(tmp_path, word_tokenizer):
    def run(callback, trainer_class=SqueezeDPOTrainer, config=SqueezeDPOConfig, rows=None, **settings):
        quick = {**QUICK, "max_steps": 8, "lr_scheduler_type": "constant", **settings}
        extra = {name: quick.pop(name) for name in ("probe_dataset", "eval_dataset") if name in quick}
        if issubclass(trainer_class, DPOTrainer):
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
        trainer = train(Fake(**RULE))
    assert trainer.state.global_step == 8
    assert "Squeezing at step 4: the chosen answers of 'probe' are at -2.300 nats a token, 0.400 below" in caplog.text
    assert caplog.text.count("Squeezing at step") == 1


def test_stops(train):
    assert train(Fake("stop", **RULE)).state.global_step == 4


@pytest.mark.parametrize("source", ["probes", "evaluation"])
def test_in_a_run_of_its_own(train, source):
    """DPO hard enough to lose the tiny model's answers is stopped, and what is said live is what the log says."""
    rows = pair_rows()
    settings = {"probe_dataset": rows, "probe_every": 1, "probe_budget": 1.0}
    if source == "evaluation":
        settings = {"eval_dataset": rows, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    callback = SqueezeStoppingCallback("stop")
    trainer = train(callback, rows=rows, **HARD, **settings)
    monitor = SqueezeMonitor()
    for entry in trainer.state.log_history:
        monitor.update(entry)
    assert monitor == callback.monitor and set(monitor.sets) == {"probe" if source == "probes" else "eval"}
    assert [*monitor.alarms.values()] == [trainer.state.global_step] and trainer.state.global_step < 8


@pytest.mark.parametrize("seed", range(2))
def test_no_alarm_where_nothing_is_learnt(train, seed):
    settings = {
        "probe_dataset": build_probe_set(pair_rows()),
        "probe_every": 1,
        "probe_budget": 1.0,
        "seed": seed,
        "learning_rate": 0.0,
        "max_steps": 4,
    }
    callback = SqueezeStoppingCallback("stop", delta=1e-4)
    assert train(callback, **settings).state.global_step == 4 and len(callback.monitor.sets["probe"]) == 5


@pytest.mark.parametrize("settings", [{}, {"squeeze_metrics": "off", "eval_strategy": "steps", "eval_steps": 1}])
def test_refused_before_the_first_step_where_nothing_is_scored_again(train, settings):
    if settings:
        settings["eval_dataset"] = pair_rows()
    with pytest.raises(ValueError, match="there are none. Add `SqueezeProbeCallback"):
        train(SqueezeStoppingCallback("stop"), **settings)
    with pytest.raises(ValueError, match="there are none. Add `SqueezeProbeCallback"):
        train(SqueezeStoppingCallback(), DPOTrainer, DPOConfig)
    with pytest.raises(ValueError, match="there are none. Add `SqueezeProbeCallback"):
        train(SqueezeStoppingCallback(), SFTTrainer, SFTConfig, word_rows())


def test_an_evaluation_without_chosen_answers_is_named(train, caplog):
    class Evaluating(SqueezeMixin, SFTTrainer): ...

    settings = {"eval_dataset": word_rows(4, seed=2), "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    with caplog.at_level(logging.WARNING, logger="hf_iclr"):
        train(SqueezeStoppingCallback(), Evaluating, SFTConfig, word_rows(), **settings)
    assert caplog.text.count("can never act") == 1


def test_probes_added_after_it_to_a_trainer_of_trl(word_tokenizer, tmp_path):
    callback = SqueezeStoppingCallback("stop")
    trainer = DPOTrainer(
        tiny_llama(),
        tiny_llama(),
        DPOConfig(str(tmp_path), **{**QUICK, **HARD, "max_steps": 8}),
        train_dataset=pair_rows(),
        processing_class=word_tokenizer,
        callbacks=[callback],
    )
    trainer.add_callback(SqueezeProbeCallback(pair_rows(), trainer=trainer, every=1, probe_budget=1.0, decode_every=0))
    trainer.train()
    assert trainer.state.global_step == callback.monitor.alarms["probe"] < 8


def test_a_run_that_is_resumed_knows_its_past(train):
    callback = Fake("stop", **RULE)
    trainer = train(callback, max_steps=1)
    trainer.state.log_history = entries(FALLS)
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert callback.monitor.alarms == {"probe": 40}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"action": "pray"}, "action must be one of warn, stop, got 'pray'"),
        ({"action": "gate"}, "action must be one of warn, stop, got 'gate'"),
        ({"delta": 0}, "delta must be above 0 nats per token, got 0"),
        ({"delta": math.nan}, "delta must be above 0 nats per token, got nan"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
    ],
)
def test_bad_options(option, message):
    with pytest.raises(ValueError, match=message):
        SqueezeStoppingCallback(**option)


@pytest.mark.parametrize("value", [math.nan, None, "low"])
def test_bad_logs(value):
    with pytest.raises(ValueError, match=f"should be finite, `probe/chosen/logp` at step 1 is {value}"):
        SqueezeMonitor().update({"step": 1, "probe/chosen/logp": value})
