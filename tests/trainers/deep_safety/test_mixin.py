"""In front of trainers of others: of TRL's kin, and of a plain `Trainer` as LLaMA-Factory's and axolotl's."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_iclr import DeepSafetyMixin, DeepSafetyOptions, DeepSafetySFTConfig, DeepSafetySFTTrainer
from tests.trainers.tiny import QUICK, losses, tiny_llama, word_rows


PAPERS_ADAM = {"adam_beta1": 0.5, "warmup_steps": 10}
STRONG = {"beta_first": 2.0, "beta_initial": 4.0, "beta_rest": 1.0}


class Named(Seq2SeqTrainer):
    """Its own arguments first, then keywords alone, as in LLaMA-Factory's trainer of SFT."""

    def __init__(self, finetuning_args, processor=None, **kwargs):
        super().__init__(**kwargs)
        self.finetuning_args, self.lengths = finetuning_args, []

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.lengths.append(inputs["labels"].shape[1])
        return super().compute_loss(model, inputs, *args, **kwargs)


def tokenized(tokenizer):
    rows = word_rows()
    trainer = SFTTrainer(tiny_llama(), SFTConfig("none", **QUICK), train_dataset=rows, processing_class=tokenizer)
    return trainer.train_dataset.select_columns(["input_ids", "labels"])


@pytest.fixture
def train(tmp_path, word_tokenizer):
    def run(parent, options=None, model=None, evaluate=False, **settings):
        bases = (parent,) if options is None else (DeepSafetyMixin, parent)
        own = {} if options is None else {"safety_options": DeepSafetyOptions(**options)}
        config = Seq2SeqTrainingArguments if parent is Named else TrainingArguments
        rows = tokenized(word_tokenizer)
        trainer = type("Ours", bases, own)(
            model=model or tiny_llama(),
            args=config(str(tmp_path / "out"), **{**QUICK, "max_steps": 5, **PAPERS_ADAM, **settings}),
            train_dataset=rows,
            eval_dataset=rows if evaluate else None,
            data_collator=DataCollatorForSeq2Seq(word_tokenizer),
            processing_class=word_tokenizer,
            **({"finetuning_args": None} if parent is Named else {}),
        )
        trainer.train()
        return trainer

    return run


def close(first, second, tolerance):
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    return all(torch.allclose(weight, other, atol=tolerance) for weight, other in pairs)


@pytest.mark.parametrize("parent", [Named, Trainer])
def test_neutral_is_the_parent_bit_for_bit(train, parent):
    theirs, ours = train(parent), train(parent, {"constrain": "none"})
    assert close(theirs, ours, 0) and losses(theirs) == losses(ours)


def test_small_betas_are_the_parents_loss(train):
    small = dict.fromkeys(STRONG, 1e-4)
    theirs, ours = train(Named), train(Named, small)
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-3)
    assert close(theirs, ours, 5e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_plain_trainer_learns_what_ours_of_trl_does(train, tmp_path, word_tokenizer, accumulation):
    """Losses and weights, also where the mean is taken over several batches; and both are far from the parent's."""
    steps = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    ours = train(Named, STRONG, **steps)
    trl = DeepSafetySFTTrainer(
        tiny_llama(),
        DeepSafetySFTConfig(str(tmp_path), **{**QUICK, "max_steps": 5, **steps, **STRONG}),
        train_dataset=word_rows(),
        processing_class=word_tokenizer,
    )
    trl.train()
    assert ours.reference == "frozen" and trl.reference == "precompute"
    assert losses(ours) == pytest.approx(losses(trl), abs=1e-4)
    assert losses(ours, "constraint/weight_first") == pytest.approx(losses(trl, "constraint/weight_first"), abs=1e-4)
    assert close(ours, trl, 1e-3) and not close(ours, train(Named, **steps), 1e-2)
    assert len(ours.lengths) == 5 * accumulation


def test_an_adapter_is_turned_off_for_the_reference(train):
    def model():
        torch.manual_seed(0)
        return get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))

    adapter = train(Named, {**STRONG, "reference": "adapter"}, model=model())
    frozen = train(Named, {**STRONG, "reference": "frozen"}, model=model())
    assert losses(adapter) == pytest.approx(losses(frozen), abs=1e-5)
    assert losses(adapter, "constraint/log_ratio_first")[-1] != 0


def test_evaluations_are_the_parents(train):
    theirs, ours = train(Named, evaluate=True, max_steps=1), train(Named, STRONG, evaluate=True, max_steps=1)
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], abs=1e-4)


def test_in_front_of_trls_trainer_it_is_ours(tmp_path, word_tokenizer):
    """All that differs is the configuration, whose Adam is TRL's."""

    class Kin(SFTTrainer):
        pass

    class Ours(DeepSafetyMixin, Kin):
        safety_options = DeepSafetyOptions(**STRONG)

    rows = {"train_dataset": word_rows(), "processing_class": word_tokenizer}
    first = Ours(tiny_llama(), SFTConfig(str(tmp_path), **QUICK), **rows)
    plain_adam = {"adam_beta1": 0.9, "warmup_steps": 0}
    second = DeepSafetySFTTrainer(tiny_llama(), DeepSafetySFTConfig("o", **QUICK, **STRONG, **plain_adam), **rows)
    for trainer in (first, second):
        trainer.train()
    assert losses(first) == losses(second) and close(first, second, 0)


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"constrain": "refused"}, {}, "need the rows of TRL"),
        ({"safety_dataset_name": "triplets.jsonl"}, {}, "need the rows of TRL"),
        ({"reference": "window"}, {}, "reads the data once"),
        ({}, {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_what_it_cannot_do_is_said(train, options, settings, message, monkeypatch):
    monkeypatch.setattr("hf_iclr.trainers.deep_safety.mixin.load_triplets", lambda name: word_rows(2))
    with pytest.raises(ValueError, match=message):
        train(Named, options, **settings)


def test_labels_on_prompts_are_refused(train, word_tokenizer, monkeypatch):
    whole = tokenized(word_tokenizer).map(lambda row: {"labels": row["input_ids"]})
    monkeypatch.setattr("tests.trainers.deep_safety.test_mixin.tokenized", lambda tokenizer: whole)
    with pytest.raises(ValueError, match="loss starts at its first token"):
        train(Named, {})
