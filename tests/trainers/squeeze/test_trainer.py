"""The trainer against TRL's: the same bits for every loss, metrics of the full softmax, keys where one looks."""

import logging
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import HfArgumentParser, TrainerCallback
from trl import DPOConfig, DPOTrainer

from hf_iclr.trainers.squeeze.config import SqueezeDPOConfig
from hf_iclr.trainers.squeeze.metrics import NUM_SUMS, batch_sums, metrics_from_sums
from hf_iclr.trainers.squeeze.probes import build_probe_set
from hf_iclr.trainers.squeeze.trainer import SqueezeDPOTrainer
from tests.trainers.squeeze.pairs_and_logs import fused_outputs, pair_rows
from tests.trainers.tiny import QUICK, tiny_llama


# TRL 1.16 still reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

LOSSES = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
VARIANTS = {
    "lora": {"peft_config": LORA, "disable_dropout": False},
    "precomputed": {"precompute_ref_log_probs": True},
    "lora precomputed": {"peft_config": LORA, "precompute_ref_log_probs": True},
    "accumulated": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "dropout": {"attention_dropout": 0.3, "disable_dropout": False},
    "checkpointed": {"activation_checkpointing": True},
    "bf16": {"bf16": True},
    "two losses": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    "wpo": {"use_weighting": True},
    "ld": {"ld_alpha": 0.5},
    "divergence": {"f_divergence_type": "js_divergence"},
}
NOT_IN_ARGS = ("peft_config", "eval_dataset", "callbacks", "probe_dataset", "compute_metrics", "ref_model")
OURS = ("squeeze_metrics", "argmax_every", "probe_every", "probe_budget")


@pytest.fixture
def make(tmp_path, word_tokenizer):
    """Make a trainer, `SqueezeDPOTrainer` unless told otherwise; the reference is a copy of the tiny model."""

    def build(trainer_class=SqueezeDPOTrainer, config=SqueezeDPOConfig, **settings):
        kwargs = {
            name: settings.pop(name)
            for name in (
                "peft_config",
                "eval_dataset",
                "callbacks",
                "probe_dataset",
                "compute_metrics",
                "model",
                "ref_model",
            )
            if name in settings
        }
        dropout = {"attention_dropout": settings.pop("attention_dropout", 0.0)}
        if "peft_config" not in kwargs and not settings.get("precompute_ref_log_probs"):
            kwargs.setdefault("ref_model", tiny_llama(**dropout))
        rows = settings.pop("train_dataset", None)
        args = config(str(tmp_path / "out"), **{**QUICK, **settings})
        return trainer_class(
            tiny_llama(**dropout),
            args=args,
            train_dataset=pair_rows() if rows is None else rows,
            processing_class=word_tokenizer,
            **kwargs,
        )

    return build


def assert_same_as_trl(make, **settings):
    settings = {"max_steps": 2, **settings}
    both = []
    for trainer_class, config in ((DPOTrainer, DPOConfig), (SqueezeDPOTrainer, SqueezeDPOConfig)):
        ours = {name: value for name, value in settings.items() if name not in OURS}
        own = {"squeeze_metrics": "full", "argmax_every": 1, **settings} if config is SqueezeDPOConfig else ours
        trainer = make(trainer_class, config, eval_dataset=pair_rows(5, seed=2), **own)
        trainer.train()
        trainer.evaluate()
        both.append(trainer)
    trl, squeeze = both
    for (name, parameter), other in zip(trl.model.named_parameters(), squeeze.model.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    for entry, other in zip(trl.state.log_history, squeeze.state.log_history, strict=True):
        timings = [key for key in entry if "runtime" in key or "per_second" in key]
        assert {**entry, **dict.fromkeys(timings)} == {k: None if k in timings else other[k] for k in entry}
        assert ("train_runtime" in entry) or any("squeeze/force" in key for key in other)
    return squeeze


@pytest.mark.parametrize("loss_type", LOSSES)
def test_same_bits_as_trl_for_every_loss(make, loss_type):
    assert_same_as_trl(make, loss_type=[loss_type], label_smoothing=0.1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_bits_as_trl_however_it_is_trained(make, variant):
    assert_same_as_trl(make, **VARIANTS[variant])


def full_softmax_metrics(trainer, rows):
    """One batch of all rows, all its logits."""
    inputs = trainer.data_collator([dict(row) for row in rows])
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    with torch.no_grad():
        logits = trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    metrics = metrics_from_sums(batch_sums(fused_outputs(logits.double(), labels), labels, 50))
    mask = labels[:, 1:] != -100
    log_p = logits[:, :-1].double().log_softmax(-1)
    for side, rows_of in (("chosen", slice(None, len(labels) // 2)), ("rejected", slice(len(labels) // 2, None))):
        own = log_p[rows_of][mask[rows_of]]
        metrics[f"squeeze/logp_argmax_{side}"] = own.amax(-1).mean().item()
        metrics[f"squeeze/rest_logmass_{side}"] = (1 - own.amax(-1).exp()).log().mean().item()
    return metrics


def test_metrics_are_those_of_the_full_softmax(make):
    """Evaluated in three batches of 2, 2 and 1 pairs, in training mode in one step of two accumulated batches."""
    rows = pair_rows(5, seed=2)
    trainer = make(
        eval_dataset=rows,
        train_dataset=rows.select(range(4)),
        squeeze_metrics="full",
        per_device_eval_batch_size=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
    )
    expected = {
        f"eval_{key}": value for key, value in full_softmax_metrics(trainer, list(trainer.eval_dataset)).items()
    }
    measured = trainer.evaluate()

    assert {key: measured[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    expected = full_softmax_metrics(trainer, list(trainer.train_dataset))

    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {key: logged[key] for key in expected} == pytest.approx(expected, rel=1e-5)


# ∂L/∂log π(y⁻) where policy and reference agree, by differentiating the losses; β = .1.
FORCES = {
    "sigmoid": 0.05,
    "hinge": 0.1,
    "nca_pair": 0.025,
    "bco_pair": 0.05,
    "sppo_hard": 10.0,
    "apo_zero": 0.025,
    "sft": 0.0,
}


@pytest.mark.parametrize("loss_type", FORCES)
def test_force_of_each_loss_by_hand(make, loss_type):
    trainer = make(loss_type=[loss_type], eval_dataset=pair_rows(5))
    inputs = trainer.data_collator([dict(row) for row in trainer.eval_dataset])
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)[5:]
    with torch.no_grad():
        logits = trainer.model(
            input_ids=inputs["input_ids"][5:], attention_mask=inputs["attention_mask"][5:], use_cache=False
        ).logits
    outputs = fused_outputs(logits, labels)
    pressure = (outputs.log_sum_sq_probs.exp() - outputs.log_probs.exp()).clamp(min=0)
    per_pair = (pressure * (labels[:, 1:] != -100)).sum(1).mean().item()
    assert trainer.evaluate()["eval_squeeze/force"] == pytest.approx(FORCES[loss_type] * per_pair, rel=1e-4)


@pytest.mark.parametrize("variant", ["full", "lora", "precomputed"])
def test_down_is_the_sign_of_the_reward(make, variant):
    """With one pair a step, TRL's mean rewards are those of the pair."""
    trainer = make(per_device_train_batch_size=1, max_steps=6, squeeze_metrics="full", **VARIANTS.get(variant, {}))
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    downs = [(entry["squeeze/chosen_down"], entry["squeeze/rejected_down"]) for entry in entries]
    assert downs == [(entry["rewards/chosen"] < 0, entry["rewards/rejected"] < 0) for entry in entries]
    assert [entry["squeeze/both_down"] for entry in entries] == [chosen * rejected for chosen, rejected in downs]
    assert len(set(downs)) > 1


def test_argmax_is_sampled_and_the_mean_since_the_last_log_is_logged(make):
    trainer = make(squeeze_metrics="full", argmax_every=2, max_steps=5)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries if "squeeze/logp_argmax_chosen" in entry] == [1, 3, 5]
    per_step = [entry["squeeze/logp_tok_chosen"] for entry in entries]
    rare = make(logging_steps=5, max_steps=5)
    rare.train()
    entry = rare.state.log_history[0]
    assert min(per_step) < entry["squeeze/logp_tok_chosen"] < max(per_step)
    assert "squeeze/logp_argmax_chosen" not in entry


def test_every_split_has_its_keys_and_they_choose_the_best_model(make):
    splits = {"a": pair_rows(3, seed=3), "b": pair_rows(4, seed=4)}
    seen = set()

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            seen.update(logs)

    trainer = make(
        eval_dataset=splits,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        metric_for_best_model="eval_b_squeeze/logp_tok_chosen",
        greater_is_better=True,
        callbacks=[Tracker()],
    )
    trainer.train()
    values = [e["eval_b_squeeze/logp_tok_chosen"] for e in trainer.state.log_history if "eval_b_loss" in e]
    assert len(values) == 3 and trainer.state.best_metric == max(values)
    assert {"squeeze/valley_frac", "eval_a_squeeze/valley_frac", "eval_b_squeeze/valley_frac"} <= seen
    given = trainer.evaluate(splits)
    by_name = trainer.evaluate()
    assert given["eval_a_squeeze/logp_tok_chosen"] == by_name["eval_a_squeeze/logp_tok_chosen"]
    assert given["eval_a_squeeze/logp_tok_chosen"] != given["eval_b_squeeze/logp_tok_chosen"]
    assert not trainer.model._forward_hooks and not trainer.ref_model._forward_hooks


def test_off_measures_nothing(make):
    trainer = make(squeeze_metrics="off", eval_dataset=pair_rows(3))
    trainer.train()
    trainer.evaluate()
    assert not [key for entry in trainer.state.log_history for key in entry if "squeeze" in key]


def test_plain_config_gets_the_defaults(make):
    trainer = make(config=DPOConfig, max_steps=1)
    trainer.train()
    assert "squeeze/pressure_rejected" in trainer.state.log_history[0]


def test_options_from_the_command_line():
    flags = ["--squeeze_metrics", "full", "--argmax_every", "5", "--bf16", "False"]
    (args,) = HfArgumentParser(SqueezeDPOConfig).parse_args_into_dataclasses([*flags, "--use_cpu", "True"])
    assert (args.squeeze_metrics, args.argmax_every) == ("full", 5)


def test_probe_dataset_goes_to_the_callback_and_the_log_to_the_report(make, monkeypatch, tmp_path):
    report = types.ModuleType("squeeze_report")
    report.write_squeeze_report = lambda log_history, directory: (log_history, directory)
    monkeypatch.setitem(sys.modules, "hf_iclr.trainers.squeeze.report", report)
    trainer = make(probe_dataset=build_probe_set(pair_rows(4)), probe_every=2, probe_budget=1.0, max_steps=4)
    trainer.train()
    probed = [entry["step"] for entry in trainer.state.log_history if "probe/chosen/logp" in entry]
    assert probed == [0, 2, 4]
    assert trainer.squeeze_report(tmp_path) == (trainer.state.log_history, tmp_path)


def test_model_card_names_the_paper(make):
    trainer = make(max_steps=1)
    trainer.create_model_card(model_name="squeezed")
    with open(f"{trainer.args.output_dir}/README.md") as card:
        text = card.read()
    assert "https://huggingface.co/papers/2407.10490" in text and "squeeze-dpo" in text


def test_streamed_pairs(make):
    trainer = make(train_dataset=pair_rows().to_iterable_dataset(), max_steps=2)
    trainer.train()
    assert "squeeze/force" in trainer.state.log_history[0]


def test_saved_tensors_that_may_be_read_once(make):
    """As TRL's activation offloading, which needs an accelerator, hands them out."""
    left = {}

    def pack(tensor):
        left[len(left)] = tensor
        return len(left) - 1

    def unpack(index):
        tensor, left[index] = left[index], None
        assert tensor is not None, "read twice"
        return tensor

    trainer = make(squeeze_metrics="full")
    inputs = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        trainer.compute_loss(trainer.model, inputs).backward()
    assert sum(tensor is None for tensor in left.values()) > 20


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_compute_metrics_gets_the_logits(make):
    given = []
    trainer = make(eval_dataset=pair_rows(4), compute_metrics=lambda prediction: given.append(prediction) or {})
    metrics = trainer.evaluate()
    assert given[0].predictions.shape[-1] == 50 and metrics["eval_squeeze/force"] > 0


def test_one_collective_per_log_and_no_wait_in_a_step(make, monkeypatch):
    """What a step adds stays a tensor on its device: the numbers are read once, when they are logged."""
    trainer = make(squeeze_metrics="full", logging_steps=2, max_steps=4, eval_dataset=pair_rows(6))
    shapes, reduce = [], trainer.accelerator.reduce

    def count(tensor, *args, **kwargs):
        shapes.append(tensor.shape)
        return reduce(tensor, *args, **kwargs)

    trainer.accelerator.reduce = count
    trainer.train()
    assert shapes == [(NUM_SUMS,)] * 2
    trainer.evaluate()
    assert shapes == [(NUM_SUMS,)] * 3
    trainer.model.train()
    inputs = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    readers, item = [], torch.Tensor.item
    caller = lambda self: readers.append(Path(sys._getframe(1).f_code.co_filename).name) or item(self)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "item", caller)
    trainer.compute_loss(trainer.model, inputs)
    assert set(readers) == {"dpo_trainer.py"}  # TRL's own metrics


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "w1", "chosen": "w2", "rejected": ""}], "`rejected` in row 0"),
        (
            [
                {
                    "prompt": [{"role": "user", "content": "w1"}],
                    "chosen": [{"role": "assistant", "content": ""}],
                    "rejected": [{"role": "assistant", "content": "w2"}],
                }
            ],
            "`chosen` in row 0",
        ),
    ],
)
def test_an_empty_answer_is_refused(make, rows, message):
    with pytest.raises(ValueError, match=f"1 of the train dataset are empty, the first being {message}"):
        make(train_dataset=Dataset.from_list(rows))


def test_prompts_that_do_not_fit(make, caplog):
    long = {"prompt": " ".join(["w1"] * 9) + " ", "chosen": "w2 ", "rejected": "w3 "}
    with pytest.raises(
        ValueError, match="2 of 2 rows of the train dataset have a prompt that alone fills max_length=8"
    ):
        make(train_dataset=Dataset.from_list([long, long]), max_length=8)
    short = {"prompt": "w1 ", "chosen": "w2 ", "rejected": "w3 "}
    with caplog.at_level(logging.WARNING):
        trainer = make(train_dataset=Dataset.from_list([long, short]), max_length=8)
    assert "1 of 2 rows of the train dataset have a prompt that alone fills max_length=8 tokens" in caplog.text
    assert len(trainer.train_dataset) == 1


def test_diverged_weights_are_an_error_at_the_next_log(make):
    class Diverge(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            model.lm_head.weight.data.fill_(math.nan)

    with pytest.raises(ValueError, match="log-probabilities of the chosen answers should be finite"):
        make(callbacks=[Diverge()]).train()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"squeeze_metrics": "all"}, "squeeze_metrics must be one of off, default, full, got 'all'"),
        ({"argmax_every": 0}, "argmax_every must be at least 1, got 0"),
    ],
)
def test_bad_options(tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        SqueezeDPOConfig(str(tmp_path), use_cpu=True, bf16=False, **option)
