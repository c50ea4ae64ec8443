"""The trainers with adapters against their parents in TRL, and the audit of models that are not plain."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_iclr import (
    DeepSafetySFTConfig,
    DeepSafetySFTTrainer,
    InRunDataShapleyCallback,
    SqueezeDPOConfig,
    SqueezeDPOTrainer,
    audit_safety,
)
from hf_iclr.doctor.self_check import TRAINING, expect_same_run
from hf_iclr.tiny_models import tiny_llama, word_tokenizer
from tests.contract.test_cascades import NOT_PLAIN


ANSWERED = [{"prompt": f"w{i} w{i + 1} ", "completion": f"w{i + 2} w{i + 9} w{i + 20} "} for i in range(1, 7)]
PREFERRED = [{"prompt": f"w{i} ", "chosen": f"w{i + 1} w{i + 7} ", "rejected": f"w{i + 20} "} for i in range(1, 7)]


def train(trainer_class, config, rows, folder, **settings):
    """Three steps with adapters and dropout."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.2, init_lora_weights=False, task_type="CAUSAL_LM")
    callbacks = settings.pop("callbacks", [])
    trainer = trainer_class(
        tiny_llama(), args=config(str(folder), **TRAINING, **settings), train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(), peft_config=lora, callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("ours", "theirs", "rows"),
    [
        ((DeepSafetySFTTrainer, DeepSafetySFTConfig), (SFTTrainer, SFTConfig), ANSWERED),
        ((SqueezeDPOTrainer, SqueezeDPOConfig), (DPOTrainer, DPOConfig), PREFERRED),
    ],
    ids=["deep safety", "squeeze"],
)
def test_trainers_with_adapters_are_trls_bit_for_bit(ours, theirs, rows, tmp_path):
    own = {"constrain": "none", "adam_beta1": 0.9, "warmup_steps": 0} if ours[0] is DeepSafetySFTTrainer else {}
    runs = [train(*theirs, rows, tmp_path / "theirs"), train(*ours, rows, tmp_path / "ours", **own)]
    expect_same_run(runs[1], runs[0], "ours", "theirs")


def test_values_of_rows_leave_a_trl_run_as_it_was(tmp_path):
    shapley = InRunDataShapleyCallback(Dataset.from_list(ANSWERED[:2]), refresh_every=1, adam_warmup=0)
    plain = train(SFTTrainer, SFTConfig, ANSWERED, tmp_path / "plain")
    valued = train(SFTTrainer, SFTConfig, ANSWERED, tmp_path / "valued", callbacks=[shapley])
    expect_same_run(valued, plain, "a valued run", "a plain one")
    values = shapley.result.rows["value"]
    assert len(values) >= 4 and values.abs().min() > 0


def peft_model():
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(tiny_llama(), config)


@pytest.mark.parametrize("kind", [*NOT_PLAIN, "a PEFT model"])
def test_models_that_are_not_plain_are_audited(kind):
    model, tokenizer = peft_model() if kind == "a PEFT model" else NOT_PLAIN[kind](), word_tokenizer()
    report = audit_safety(
        model, tokenizer, ["w1 w2 w3", "w4"], answers=["w20 w21", "w22 w23"], ks=(0, 1), max_new_tokens=4,
        attacks=("prefill", "decoding", "rap", "gcg"), gcg_steps=2, judge=lambda texts: [True for _ in texts],
    )  # fmt: skip
    for measure, prefix in ((report.find("none"), []), (report.find("prefill", "1"), [20])):
        row = torch.tensor([[1, 2, 3, *prefix]])
        mask = torch.ones_like(row)
        decoded = model.generate(
            input_ids=row, attention_mask=mask, do_sample=False, max_new_tokens=4, use_cache=False
        )
        assert measure.texts[0] == tokenizer.decode(decoded[0, row.shape[1] :], skip_special_tokens=True)
    for attack, judged in (("rap", "joined"), ("gcg", "continuation")):
        assert report.find(attack, judged=judged).refused == [True, True]
