"""How many prompts and passes fit into the share of a run's time, who may watch beside whom, and runs that go on."""

import json
import logging
import shutil

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_iclr.trainers.squeeze import probe_metrics
from hf_iclr.trainers.squeeze import probes as probes_module
from hf_iclr.trainers.squeeze.config import SqueezeDPOConfig
from hf_iclr.trainers.squeeze.probe_scoring import choose_interval
from hf_iclr.trainers.squeeze.probes import SqueezeProbeCallback, build_probe_set
from hf_iclr.trainers.squeeze.trainer import SqueezeDPOTrainer
from tests.trainers.squeeze.pairs_and_logs import pair_rows
from tests.trainers.tiny import QUICK, tiny_llama


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def make(folder, tokenizer, probe_dataset, callbacks=(), **settings):
    return SqueezeDPOTrainer(
        tiny_llama(),
        tiny_llama(),
        SqueezeDPOConfig(str(folder), **{**QUICK, "probe_every": 2, "max_steps": 4, **settings}),
        train_dataset=pair_rows(),
        eval_dataset=pair_rows(6, seed=5),
        processing_class=tokenizer,
        probe_dataset=probe_dataset,
        callbacks=list(callbacks),
    )


def records(trainer):
    return [entry for entry in trainer.state.log_history if "probe/chosen/logp" in entry]


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only in steps (1 s), by scored answers (10 ms each) and by decoded tokens (1 ms a row)."""

    class Clock:
        now = 0.0
        scored: list = []  # noqa: RUF012
        decoded: list = []  # noqa: RUF012

    clock = Clock()
    clock.scored, clock.decoded = [], []
    score, decode = probe_metrics.score_answers, probe_metrics.decode_answers

    def timed_score(trainer, answers, *args, **kwargs):
        clock.now += 0.01 * len(answers)
        clock.scored.append(list(answers))
        return score(trainer, answers, *args, **kwargs)

    def timed_decode(trainer, tokenizer, prompts, max_new_tokens, *args, **kwargs):
        clock.now += 0.001 * len(prompts) * max_new_tokens
        clock.decoded.append(len(prompts))
        return decode(trainer, tokenizer, prompts, max_new_tokens, *args, **kwargs)

    monkeypatch.setattr(probe_metrics, "score_answers", timed_score)
    monkeypatch.setattr(probe_metrics, "decode_answers", timed_decode)
    for module in (probe_metrics, probes_module):
        monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
    return clock


def probes_of(trainer):
    (probing,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, SqueezeProbeCallback)]
    return probing


class Ends(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class Step(TrainerCallback):
    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def on_step_begin(self, args, state, control, **kwargs):
        self.clock.now += self.seconds


@pytest.mark.parametrize(
    ("numbers", "interval"),
    [
        ((25, 1000, 0.05, 1.0, 10.0, 1.0), 25),  # 52.6 s less 10: 42 passes between, 39 are asked for
        ((25, 1000, 0.05, 1.0, 40.0, 3.0), 200),  # four fit: five parts of 200 steps
        ((25, 1000, 0.05, 1.0, 40.0, 13.0), 0),  # none
        ((25, 1000, 0.05, 1.0, 60.0, 1.0), 0),  # the ends alone are too much
        ((25, 1000, 0.50, 1.0, 60.0, 1.0), 25),
    ],
)
def test_interval_by_hand(numbers, interval):
    assert choose_interval(*numbers) == interval


@pytest.mark.parametrize(("max_steps", "batch", "fits"), [(25, 4, 1), (40, 4, 3), (30, 24, 11)])
def test_all_passes_together_keep_to_the_budget(tmp_path, word_tokenizer, clock, caplog, max_steps, batch, fits):
    """A step takes what it is taken for at least: three forwards of a batch of pairs, .01 s an answer."""
    a_step = 3 * 2 * batch * 0.01
    trainer = make(
        tmp_path, word_tokenizer, build_probe_set(pair_rows(40)), [Step(clock, a_step)], max_steps=max_steps,
        per_device_train_batch_size=batch, probe_every=25, logging_steps=1000,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert 0 < clock.now - a_step * max_steps <= 0.05 * clock.now
    steps_probed = [entry["step"] for entry in records(trainer)]
    assert steps_probed[0] == 0 and steps_probed[-1] == max_steps
    assert f"{fits} of 40 prompts are probed, taken at random" in caplog.text
    assert ("Fewer than 12" in caplog.text) == (fits < 12)
    passes = {str(answers) for answers in clock.scored[2:] if len(answers) >= 5 * fits}
    assert len(passes) == 1  # always the same


def test_prompts_come_before_passes_and_decoding(tmp_path, word_tokenizer, clock):
    """Two sets have as many prompts each; the smaller one all it has."""
    sets = {"many": build_probe_set(pair_rows(40)), "few": build_probe_set(pair_rows(4))}
    found = {}
    for max_steps in (40, 500):
        trainer = make(tmp_path, word_tokenizer, sets, [Step(clock, 0.24), Ends(2)], max_steps=max_steps)
        trainer.train()
        many, few = probes_of(trainer)._sets
        found[max_steps] = (many.count, few.count, len(many.prompts))
        clock.scored.clear()
    assert found == {40: (1, 4, 0), 500: (13, 4, 1)}


def test_all_is_probed_where_there_is_time(tmp_path, word_tokenizer, clock, caplog):
    trainer = make(tmp_path, word_tokenizer, build_probe_set(pair_rows(4)), [Step(clock, 90.0)], max_steps=400)
    trainer.add_callback(Ends(10))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "prompts are probed" not in caplog.text
    assert [entry["step"] for entry in records(trainer)] == [0, 6, 8, 10]  # from 6 on, when steps have been timed
    assert "probe/initial_greedy/logp" in records(trainer)[0]


def test_a_resumed_run_probes_the_same_prompts(tmp_path, word_tokenizer, clock):
    settings = {"max_steps": 20, "save_strategy": "steps", "save_steps": 10}
    probes = build_probe_set(pair_rows(20))
    whole = make(tmp_path, word_tokenizer, probes, [Step(clock, 0.24)], **settings)
    whole.train()
    saved = json.loads((tmp_path / "checkpoint-10" / "squeeze_probes.json").read_text())["sets"][""]
    assert 1 <= saved["taken"][0] < 12
    clock.scored.clear()
    again = make(tmp_path, word_tokenizer, probes, [Step(clock, 99.0)], **settings)  # on a slower machine
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert records(again)[-1]["probe/chosen/delta0"] == pytest.approx(records(whole)[-1]["probe/chosen/delta0"])
    assert {len(answers) for answers in clock.scored if len(answers) > 4} == {
        5 * saved["taken"][0] + saved["taken"][1]
    }
    assert [e["step"] for e in records(again)] == [e["step"] for e in records(whole)]


def test_other_probes_are_refused(tmp_path, word_tokenizer):
    """Of the same number and length; the same after a detour are taken."""
    settings = {"probe_budget": 1.0, "save_strategy": "steps", "save_steps": 2}
    rows = pair_rows()
    make(tmp_path, word_tokenizer, build_probe_set(rows, num_probes=4), **settings).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    other = make(tmp_path, word_tokenizer, build_probe_set(rows, num_probes=4, seed=1), **settings)
    with pytest.raises(
        ValueError, match=r"Expected the probe set '' that .* got other answers .*`probe_dataset={'new'"
    ):
        other.train(resume_from_checkpoint=checkpoint)
    shorter = make(tmp_path, word_tokenizer, build_probe_set(rows, num_probes=4), max_length=5, **settings)
    with pytest.raises(ValueError, match="tokenized otherwise"):
        shorter.train(resume_from_checkpoint=checkpoint)
    named = make(tmp_path, word_tokenizer, {"new": build_probe_set(rows, num_probes=4, seed=1)}, **settings)
    named.train(resume_from_checkpoint=checkpoint)
    first = next(entry for entry in named.state.log_history if "new_probe/chosen/logp" in entry)
    assert (first["step"], first["new_probe/chosen/delta0"]) == (2, 0)
    moved = tmp_path / "elsewhere"
    shutil.copytree(checkpoint, moved / "checkpoint-2")
    same = make(moved, word_tokenizer, build_probe_set(rows, num_probes=4), **settings)
    same.train(resume_from_checkpoint=str(moved / "checkpoint-2"))
    assert records(same)[-1]["probe/chosen/delta0"] != 0


@pytest.mark.parametrize(
    "damage", [{"logps": [[0.0, 0.0]]}, {"taken": ["a", 1]}, {"greedy": 3}, {"fingerprint": None}, None]
)
def test_damaged_states_are_one_sentence(tmp_path, word_tokenizer, damage):
    settings = {"probe_budget": 1.0, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    probes = build_probe_set(pair_rows(), num_probes=3)
    make(tmp_path, word_tokenizer, probes, **settings).train()
    path = tmp_path / "checkpoint-2" / "squeeze_probes.json"
    state = json.loads(path.read_text())
    state["sets"][""] = {**state["sets"][""], **damage} if damage else []
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="squeeze_probes.json"):
        make(tmp_path, word_tokenizer, probes, **{**settings, "max_steps": 4}).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_two_callbacks_need_two_names(tmp_path, word_tokenizer):
    probes = build_probe_set(pair_rows(), num_probes=3)
    trainer = make(tmp_path, word_tokenizer, probes)
    trainer.add_callback(SqueezeProbeCallback(probes, trainer=trainer))
    with pytest.raises(ValueError, match="under different names, got '' twice"):
        trainer.train()


def test_every_record_is_of_the_weights_of_its_step(tmp_path, word_tokenizer):
    """Early stopping, and the best weights are loaded after the last step."""
    truth = {}
    rows = build_probe_set(pair_rows(4))

    class Truth(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            truth[state.global_step] = probing._sets[0].measure(trainer, 8, False, False)["probe/chosen/logp"]

    trainer = make(
        tmp_path, word_tokenizer, rows, max_steps=12, probe_every=7, probe_budget=1.0, learning_rate=3e-2,
        lr_scheduler_type="constant", eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    probing = probes_of(trainer)
    trainer.add_callback(Truth())
    trainer.add_callback(EarlyStoppingCallback(2))
    trainer.train()
    assert int(trainer.state.best_model_checkpoint.split("-")[-1]) < trainer.state.global_step
    for entry in records(trainer)[1:]:
        assert entry["probe/chosen/logp"] == pytest.approx(truth[entry["step"]], abs=1e-6)
    assert records(trainer)[-1]["step"] == trainer.state.global_step


def test_a_run_has_forty_keys_at_most(tmp_path, word_tokenizer):
    probes = build_probe_set(pair_rows(), num_probes=3, test_pairs=pair_rows(6, seed=5))
    trainer = make(tmp_path, word_tokenizer, probes, probe_budget=1.0, max_steps=2)
    trainer.train()
    trainer.evaluate()
    keys = {key for entry in trainer.state.log_history for key in entry}
    ours = {
        key for key in keys if any(name in key for name in ("squeeze", "probe", "repeat", "onpolicy", "crosstalk"))
    }
    assert 30 < len(ours) <= 40
    kinds = ("chosen", "rejected", "other_train", "other_test", "permuted", "random_words", "initial_greedy")
    assert {f"probe/{kind}/{name}" for kind in kinds for name in ("logp", "delta0")} <= ours
    assert {"probe/chosen/logp_argmax", "squeeze/logp_tok_chosen", "eval_squeeze/logp_tok_chosen"} <= ours
    full = make(tmp_path, word_tokenizer, None, squeeze_metrics="full", argmax_every=1, max_steps=1)
    full.train()
    assert {"squeeze/logp_argmax_chosen", "squeeze/entropy_rejected"} <= set(full.state.log_history[0])


def test_choosing_the_prompts_disturbs_nothing(tmp_path, word_tokenizer, clock):
    outcomes = []
    for probes in (None, build_probe_set(pair_rows())):
        trainer = make(tmp_path, word_tokenizer, probes, [Step(clock, 0.24)], max_steps=3, disable_dropout=False)
        trainer.model.config.attention_dropout = 0.2
        trainer.train()
        outcomes.append(([p.detach().clone() for p in trainer.model.parameters()], torch.get_rng_state()))
    (plain, state), (probed, probed_state) = outcomes
    assert len(clock.scored) == 4  # two to measure by, the first pass and the last
    assert all(torch.equal(a, b) for a, b in zip(plain, probed, strict=True)) and torch.equal(state, probed_state)


@pytest.mark.parametrize(("given", "taken"), [(14, 1), (12, 12)])
def test_a_prompt_is_always_probed_and_a_small_set_as_a_whole(tmp_path, word_tokenizer, given, taken):
    trainer = make(tmp_path, word_tokenizer, build_probe_set(pair_rows(given)), max_steps=1, probe_budget=1e-6)
    trainer.train()
    (probes,) = probes_of(trainer)._sets
    assert (probes.count, probes.prompts) == (taken, [])
    assert [entry["step"] for entry in records(trainer)] == [0, 1]
