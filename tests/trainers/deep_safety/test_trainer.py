"""The trainer against TRL's: equal at its neutral setting, the same reference from every source, refusals of what it "
"cannot do."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from hf_iclr import DeepSafetySFTConfig, DeepSafetySFTTrainer, make_safety_recovery_dataset
from hf_iclr.trainers.deep_safety.arguments import choose_reference
from hf_iclr.trainers.deep_safety.constrained_loss import constraint_weights, schedule_betas
from hf_iclr.trainers.deep_safety.reference_log_probs import POSITIONS, REF_LOGPS
from tests.trainers.tiny import QUICK, losses, tiny_llama, triplet_rows, word_rows


LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
PLAIN_ADAM = {"adam_beta1": 0.9, "warmup_steps": 0}


@pytest.fixture
def train(tmp_path, word_tokenizer):
    """Make a trainer and train it, `DeepSafetySFTTrainer` unless told otherwise."""

    def run(trainer_class=DeepSafetySFTTrainer, config=DeepSafetySFTConfig, model=None, start=True, **settings):
        kwargs = {
            name: settings.pop(name)
            for name in ("peft_config", "safety_dataset", "ref_model", "beta_schedule", "callbacks", "eval_dataset")
            if name in settings
        }
        rows = settings.pop("train_dataset", None)
        trainer = trainer_class(
            model if model is not None else tiny_llama(),
            args=config(str(tmp_path / "out"), **{**QUICK, **settings}),
            train_dataset=rows if rows is not None else word_rows(),
            processing_class=word_tokenizer,
            **kwargs,
        )
        if start:
            trainer.train()
        return trainer

    return run


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_same(first, second, **tolerance):
    for name, parameter in weights(first).items():
        torch.testing.assert_close(parameter, weights(second)[name], **{"atol": 0, "rtol": 0, **tolerance})


@pytest.mark.parametrize("lora", [False, True])
def test_left_out_both_methods_it_is_trl_bit_for_bit(train, lora):
    peft = {"peft_config": LORA} if lora else {}
    ours = train(constrain="none", **PLAIN_ADAM, **peft)
    theirs = train(SFTTrainer, SFTConfig, **peft)
    assert_same(ours, theirs)
    assert losses(ours) == losses(theirs)


def test_small_betas_give_trls_loss_and_weights(train):
    ours = train(beta_first=1e-4, beta_initial=1e-4, beta_rest=1e-4, **PLAIN_ADAM)
    theirs = train(SFTTrainer, SFTConfig)
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-3)
    assert_same(ours, theirs, atol=2e-4)


def test_the_defaults_are_the_papers():
    config = DeepSafetySFTConfig("out", **QUICK)
    assert (config.beta_first, config.beta_initial, config.beta_rest, config.num_initial_tokens) == (0.5, 2.0, 0.1, 5)
    assert (config.adam_beta1, config.warmup_steps) == (0.5, 10)
    assert (config.safety_ratio, config.recovery_probability, config.max_prefix_tokens) == (0.2, 0.5, 100)


def test_first_loss_is_plain_cross_entropy_and_the_second_is_not(train):
    ours, theirs = train(**PLAIN_ADAM, max_steps=4), train(SFTTrainer, SFTConfig, max_steps=4)
    assert losses(ours)[0] == pytest.approx(losses(theirs)[0], abs=1e-6)
    assert losses(ours)[-1] != pytest.approx(losses(theirs)[-1], abs=1e-3)
    assert losses(ours, "constraint/weight_initial")[0] == pytest.approx(1, abs=1e-5)
    assert losses(ours, "constraint/log_ratio_rest")[0] == pytest.approx(0, abs=1e-5)


def test_gradient_is_cross_entropy_weighted_by_the_papers_weights(train):
    trainer = train(max_steps=8, reference="frozen", train_dataset=word_rows(4))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    inputs = {key: value for key, value in batch.items() if key != POSITIONS}
    outputs = trainer.model(**inputs, use_cache=False, fused_lm_head=True)
    with torch.no_grad():
        reference = tiny_llama()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    targets = inputs["labels"][:, 1:].clamp(min=0)
    reference = reference[:, :-1].log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    betas = schedule_betas(batch[POSITIONS][:, 1:], 0.5, 2.0, 0.1, 5)
    weighting = constraint_weights(outputs.log_probs.detach(), reference, betas)
    by_hand = -(weighting * outputs.log_probs).sum() / outputs.label_mask.sum()
    parameters = list(trainer.model.parameters())
    expected = torch.autograd.grad(by_hand, parameters)
    got = torch.autograd.grad(trainer.compute_loss(trainer.model, dict(batch)), parameters)
    assert weighting.min() < 0.9
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_one_batch_of_8_equals_four_of_2(train):
    whole = train(per_device_train_batch_size=8, max_steps=3)
    parts = train(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=3)
    assert losses(whole) == pytest.approx(losses(parts), abs=1e-5)
    assert_same(whole, parts, atol=1e-4)
    assert losses(whole, "constraint/weight_first") == pytest.approx(
        losses(parts, "constraint/weight_first"), abs=1e-4
    )


def test_every_reference_gives_the_same_run(train):
    runs = {reference: train(reference=reference, max_steps=4) for reference in ("frozen", "precompute", "auto")}
    assert runs["auto"].reference == "precompute"
    assert losses(runs["frozen"]) == pytest.approx(losses(runs["precompute"]), abs=1e-5)
    assert_same(runs["frozen"], runs["precompute"], atol=1e-4)


def test_adapter_off_equals_a_frozen_copy(train):
    adapter = train(peft_config=LORA, max_steps=4)
    frozen = train(peft_config=LORA, reference="frozen", max_steps=4)
    assert adapter.reference == "adapter"
    assert losses(adapter) == pytest.approx(losses(frozen), abs=1e-6)
    assert abs(losses(adapter, "constraint/log_ratio_initial")[-1]) > 1e-4


def test_weights_below_the_adapter_that_are_trained_are_no_reference(train):
    """PiSSA takes its adapters out of the base: what is left with them off is not where the training starts."""
    pissa = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    trainer = train(peft_config=pissa)
    assert trainer.reference == "frozen"
    assert losses(trainer, "constraint/weight_first")[0] == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="init_lora_weights='pissa' changes the weights under it"):
        train(peft_config=pissa, reference="adapter")


def test_window_reference_is_the_rest_left_free(train):
    """20 bytes a row: five float32 numbers; the tokens behind the window get plain cross-entropy."""
    window = train(reference="window", max_steps=4)
    assert all(len(row) <= 5 for row in window.train_dataset[REF_LOGPS])
    assert window.train_dataset.features[REF_LOGPS].feature.dtype == "float32"
    free = train(
        reference="frozen",
        beta_schedule=lambda positions: torch.where(
            positions <= 5, schedule_betas(positions, 0.5, 2.0, 0.1, 5), torch.zeros(())
        ),
        max_steps=4,
    )
    assert losses(window) == pytest.approx(losses(free), abs=1e-5)
    assert "constraint/weight_rest" not in window.state.log_history[0]


def test_reference_is_computed_once_and_then_read(train, monkeypatch, tmp_path):
    word_rows().save_to_disk(tmp_path / "rows")
    rows = Dataset.load_from_disk(tmp_path / "rows")
    first = train(reference="precompute", train_dataset=rows, start=False)
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *args, **kwargs: pytest.fail("the reference ran again"))
    second = train(reference="precompute", train_dataset=rows, start=False)
    assert first.train_dataset[REF_LOGPS] == second.train_dataset[REF_LOGPS]


def test_another_start_is_another_reference(train):
    rows = word_rows()
    first = train(reference="precompute", train_dataset=rows, start=False)
    second = train(reference="precompute", train_dataset=rows, model=tiny_llama(seed=1), start=False)
    assert list(first.train_dataset[REF_LOGPS]) != list(second.train_dataset[REF_LOGPS])


@pytest.mark.parametrize("settings", [{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 64}])
@pytest.mark.parametrize("reference", ["frozen", "precompute", "window"])
def test_rows_one_after_the_other_equal_rows_below_each_other(train, settings, reference):
    """One step over all rows: packed, the batch holds the same documents in fewer rows."""
    rows = word_rows(8)
    plain = train(reference=reference, train_dataset=rows, start=False)
    flat = train(reference=reference, train_dataset=rows, start=False, **settings)
    values = []
    for trainer in (plain, flat):
        if trainer._ref_model is not None:
            trainer._ref_model.load_state_dict(tiny_llama(seed=3).state_dict())
        else:
            trainer.model.load_state_dict(tiny_llama(seed=3).state_dict())
        trainer.model.train()
        dataset = trainer.train_dataset.select_columns(
            [
                name
                for name in ("input_ids", "labels", "seq_lengths", REF_LOGPS)
                if name in trainer.train_dataset.column_names
            ]
        )
        batch = trainer.data_collator([dataset[index] for index in range(len(dataset))])
        values.append(trainer.compute_loss(trainer.model, batch).item())
        values.append(trainer.sums["train"])
    assert values[0] == pytest.approx(values[2], abs=1e-5)
    torch.testing.assert_close(values[1], values[3], atol=1e-4, rtol=1e-5)


def test_positions_start_again_at_every_turn(train, word_tokenizer):
    """w1 opens a turn of the user, w2 one of the assistant; only the assistant's words have a loss."""
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}w1 {{ message['content'] }} {% else %}w2 "
        "{% generation %}{{ message['content'] }} w49{% endgeneration %} {% endif %}{% endfor %}"
    )
    chat = [
        {"role": "user", "content": "w5 w6"},
        {"role": "assistant", "content": "w7 w8"},
        {"role": "user", "content": "w5"},
        {"role": "assistant", "content": "w9"},
    ]
    word_tokenizer.chat_template = template
    try:
        trainer = train(
            assistant_only_loss=True, train_dataset=Dataset.from_list([{"messages": chat}] * 4), start=False
        )
    finally:
        word_tokenizer.chat_template = None
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch[POSITIONS][0].tolist() == [0, 0, 0, 0, 1, 2, 3, 0, 0, 0, 1, 2]


def test_rows_marked_otherwise_get_plain_cross_entropy(train):
    rows = word_rows(8)
    off = train(
        train_dataset=rows.add_column("constrain", [False] * 8), per_device_train_batch_size=8, reference="frozen"
    )
    theirs = train(
        SFTTrainer, SFTConfig, train_dataset=rows, per_device_train_batch_size=8, adam_beta1=0.5, warmup_steps=10
    )
    assert losses(off) == losses(theirs)
    flags = [True, None, None, False, False, False, True, False]  # none where another data set was concatenated
    half = train(train_dataset=rows.add_column("constrain", flags), per_device_train_batch_size=8, start=False)
    batch = next(iter(half.get_train_dataloader()))
    assert (batch[POSITIONS].sum(1) > 0).sum() == 4
    assert half.compute_loss(half.model, batch) > 0


@pytest.mark.parametrize("reference", ["frozen", "precompute", "window"])
@pytest.mark.parametrize("settings", [{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 64}])
def test_marks_survive_packing(train, reference, settings):
    rows = word_rows(8).add_column("constrain", [True, False] * 4)
    values = []
    for layout in ({}, settings):
        trainer = train(
            train_dataset=rows,
            reference=reference,
            start=False,
            per_device_train_batch_size=8,
            **layout,
        )
        start = trainer.model if trainer._ref_model is None else trainer._ref_model
        start.load_state_dict(tiny_llama(seed=3).state_dict())
        batch = next(iter(trainer.get_train_dataloader()))
        values.append(trainer.compute_loss(trainer.model, dict(batch)).item())
        assert 0 < (batch[POSITIONS] > 0).sum() < (batch["labels"] != -100).sum()
    assert values[0] == pytest.approx(values[1], abs=1e-5)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("given", ["ids", "texts", "stream"])
def test_concatenated_recovery_rows_are_not_constrained(train, word_tokenizer, packing, given):
    """As many tokens are constrained as without them, whether the other rows are token ids or texts."""
    plain = train(constrain="none", start=False).train_dataset.select_columns(["input_ids", "labels"])
    recovery = make_safety_recovery_dataset(triplet_rows(), word_tokenizer, copies=2)
    rows = concatenate_datasets([word_rows() if given == "texts" else plain, recovery])
    trainer = train(
        train_dataset=rows.to_iterable_dataset() if given == "stream" else rows, packing=packing, max_length=64,
        start=False, per_device_train_batch_size=48,
    )  # fmt: skip
    if given == "texts":
        off = train(train_dataset=rows, packing=packing, max_length=64, start=False, constrain="none")
        assert sum(map(len, off.train_dataset["input_ids"])) == sum(map(len, trainer.train_dataset["input_ids"]))
    batch = next(iter(trainer.get_train_dataloader()))
    labelled = [sum(label != -100 for label in row) for rows in (plain, recovery) for row in rows["labels"]]
    assert (batch[POSITIONS] > 0).sum() == sum(labelled[:24])
    assert (batch["labels"] != -100).sum() == sum(labelled)


@pytest.mark.parametrize("constrain", ["all", "none"])
def test_both_methods_with_packing(train, constrain):
    """One recovery row in five: 6 beside 24 rows, none of them constrained."""
    settings = {"packing": True, "max_length": 40, "constrain": constrain, "recovery_probability": 1.0}
    trainer = train(safety_dataset=triplet_rows(), eval_dataset={"train": word_rows(4)}, **settings)
    alone = train(start=False, **settings)
    documents = [sum(map(len, dataset["seq_lengths"])) for dataset in (trainer.train_dataset, alone.train_dataset)]
    assert documents == [30, 24] and len(losses(trainer)) == 3
    if constrain == "all":
        assert sum(not any(row) for row in flags_of_documents(trainer.train_dataset)) == 6
    with pytest.raises(ValueError, match="got IterableDataset"):
        train(train_dataset=word_rows().to_iterable_dataset(), safety_dataset=triplet_rows(), **settings)


def flags_of_documents(packed):
    for row in packed:
        start = 0
        for length in row["seq_lengths"]:
            yield row["constrain"][start : start + length]
            start += length


def test_evaluation_reports_plain_cross_entropy_and_the_constrained_loss_beside_it(train):
    rows = word_rows(10, seed=5)
    ours = train(eval_dataset={"a": rows, "b": rows.select(range(4))}, max_steps=4, **PLAIN_ADAM)
    got = ours.evaluate()
    theirs = train(SFTTrainer, SFTConfig, eval_dataset=rows, start=False, max_steps=4)
    theirs.model.load_state_dict(ours.model.state_dict())
    assert got["eval_a_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], abs=1e-5)
    assert got["eval_a_constrained_loss"] > got["eval_a_loss"] + 1e-3
    assert got["eval_b_constrained_loss"] != pytest.approx(got["eval_a_constrained_loss"], abs=1e-4)
    assert 0 < got["eval_a_constraint/weight_first"] < 2
    fresh = ours.evaluate(word_rows(4, seed=6))  # the reference is gone: no figure rather than a wrong one
    assert "eval_constrained_loss" not in fresh and math.isfinite(fresh["eval_loss"])


def test_a_trained_adapter_is_the_reference_not_the_base(train):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    start = {name: value.clone() for name, value in model.named_parameters() if ".default." in name}
    trainer = train(model=model, max_steps=4)
    assert losses(trainer, "constraint/log_ratio_first")[0] == pytest.approx(0, abs=1e-5)
    for name, value in trainer.model.named_parameters():
        if ".ref." in name:
            assert not value.requires_grad
            torch.testing.assert_close(value, start[name.replace(".ref.", ".default.")], atol=0, rtol=0)
        elif ".default." in name:
            assert not torch.equal(value, start[name])


def test_a_second_run_is_held_to_where_it_starts(train):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    first = train(model=model, max_steps=4, learning_rate=0.1, warmup_steps=0)
    assert abs(losses(first, "constraint/log_ratio_initial")[-1]) > 0.1
    second = train(model=first.model, max_steps=1)
    assert losses(second, "constraint/log_ratio_initial")[0] == pytest.approx(0, abs=1e-5)
    theirs = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    theirs.add_adapter("ref", theirs.peft_config["default"])
    with pytest.raises(ValueError, match="without an adapter named"):
        train(model=theirs)


def test_checkpointing_changes_nothing(train):
    settings = {"peft_config": LORA, "max_steps": 4, "warmup_steps": 0, "learning_rate": 0.05}
    plain = train(**settings)
    saved = train(activation_checkpointing=True, **settings)
    assert losses(plain) == pytest.approx(losses(saved), abs=1e-5)
    assert losses(plain, "constraint/weight_initial")[-1] != pytest.approx(1, abs=1e-2)
    assert losses(plain) != pytest.approx(losses(train(constrain="none", **settings)), abs=1e-3)


def test_lora_in_float32_over_a_base_in_bfloat16(train):
    """The shape of QLoRA: what is frozen can't be trained or copied, the adapter is in full precision."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    settings = {"peft_config": lora, "max_steps": 4, "warmup_steps": 0, "learning_rate": 0.05, "bf16": True}
    runs = [
        train(model=tiny_llama().to(torch.bfloat16), reference=reference, **settings)
        for reference in ("adapter", "precompute")
    ]
    for run in runs:
        kept = dict(run.model.named_parameters())
        assert {value.dtype for name, value in kept.items() if "lora_" not in name} == {torch.bfloat16}
        assert {value.dtype for name, value in kept.items() if "lora_" in name} == {torch.float32}
        assert losses(run, "constraint/log_ratio_first")[0] == pytest.approx(0, abs=0.02)
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=0.02)
    assert losses(runs[0]) != pytest.approx(
        losses(train(model=tiny_llama().to(torch.bfloat16), constrain="none", **settings)), abs=0.02
    )


@pytest.mark.parametrize("settings", [{"reference": "precompute"}, {"reference": "frozen"}, {"peft_config": LORA}])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_resumed_run_ends_where_the_whole_one_did(train, settings, mixed, tmp_path):
    extra = {"safety_dataset": triplet_rows()} if mixed else {}
    common = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "num_train_epochs": 1, **settings, **extra}
    whole = train(**common)
    resumed = train(start=False, **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert losses(whole)[-3:] == pytest.approx(losses(resumed)[-3:], abs=1e-5)
    assert_same(whole, resumed, atol=1e-5)


def test_saved_model_loads_in_plain_transformers(train, tmp_path):
    trainer = train(reference="frozen")
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, value in loaded.named_parameters():
        torch.testing.assert_close(value, weights(trainer)[name], atol=0, rtol=0)
    assert "Deep" in trainer._paper["title"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_recovery_rows_are_one_in_five_of_every_step(train, accumulation, monkeypatch):
    trainer = train(
        safety_dataset=triplet_rows(),
        per_device_train_batch_size=10,
        gradient_accumulation_steps=accumulation,
        train_dataset=word_rows(80),
        num_train_epochs=2,
        max_steps=-1,
        start=False,
    )
    seen, compute_loss = [], trainer.compute_loss

    def count(model, inputs, *args, **kwargs):
        seen.extend((inputs[POSITIONS].sum(dim=1) == 0).tolist())
        return compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", count)
    trainer.train()
    size = 10 * accumulation
    assert trainer.state.global_step == len(seen) / size == 20 / accumulation
    assert {sum(seen[start : start + size]) for start in range(0, len(seen), size)} == {size // 5}


def test_recovery_rows_alone_are_plain_cross_entropy_on_the_refusal(train):
    trainer = train(safety_dataset=triplet_rows(), start=False, constrain="none")
    row = trainer.train_dataset[24]
    batch = trainer.data_collator([row])
    assert POSITIONS not in batch
    loss = trainer.compute_loss(trainer.model, dict(batch))
    logits = trainer.model(batch["input_ids"]).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "dft"}, "loss_type"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"packing": True, "packing_strategy": "wrapped"}, "packing_strategy"),
        ({"packing": True, "packing_strategy": "bfd_split"}, "packing_strategy"),
        ({"packing": True, "constrain": "refused"}, "packed rows have none"),
        ({"beta_first": 0.0}, "every beta to be positive and finite, got beta_first=0.0"),
        ({"beta_initial": math.nan}, "beta_initial=nan"),
        ({"beta_rest": math.inf}, "beta_rest=inf"),
        ({"beta_rest": 1e39}, "beta_rest=1e.39"),  # infinite in float32
        ({"beta_first": "0.5"}, "beta_first=0.5"),
        ({"num_initial_tokens": 0}, "num_initial_tokens"),
        ({"reference": "base"}, "reference"),
        ({"window_start": "middle"}, "window_start"),
        ({"constrain": "some"}, "constrain"),
        ({"safety_ratio": 1.0}, "safety_ratio"),
        ({"recovery_probability": 2.0}, "recovery_probability"),
        ({"max_prefix_tokens": 0}, "max_prefix_tokens"),
        ({"max_length": -3}, "max_length"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DeepSafetySFTConfig("out", **{**QUICK, **settings})
    if settings.keys() & {"loss_type", "label_smoothing_factor", "packing"}:
        DeepSafetySFTConfig("out", **{**QUICK, **settings, "constrain": "none"})


def test_inputs_that_cannot_be_right_are_refused(train, word_tokenizer):
    with pytest.raises(ValueError, match="has none"):
        train(reference="adapter")
    with pytest.raises(ValueError, match="vocabulary"):
        train(ref_model=tiny_llama(vocab_size=60))
    with pytest.raises(ValueError, match="answers only"):
        train(train_dataset=Dataset.from_list([{"text": "w1 w2 w3"}] * 4))
    with pytest.raises(ValueError, match="all labels are masked"):
        train(train_dataset=Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [-100] * 3}] * 4), max_length=None)
    with pytest.raises(ValueError, match="one token"):
        train(window_start="answer", end_of_thinking="w1 w2")
    with pytest.raises(ValueError, match="reads the data once"):
        train(reference="window", train_dataset=word_rows().to_iterable_dataset())
    with pytest.raises(ValueError, match="in random order"):
        train(safety_dataset=triplet_rows(), train_sampling_strategy="sequential")
    with pytest.raises(ValueError, match="at position 4 it gives nan"):
        train(beta_schedule=lambda positions: torch.where(positions > 3, math.nan, 1.0))
    for schedule in (lambda positions: 1.0, lambda positions: torch.ones(3)):
        with pytest.raises(ValueError, match="one strength a position"):
            train(beta_schedule=schedule)
    with pytest.raises(TypeError, match="as a function of positions, got 2.0"):
        train(beta_schedule=2.0)
    with pytest.raises(TypeError, match="`args` as a `DeepSafetySFTConfig`"):
        DeepSafetySFTTrainer(tiny_llama(), {"max_steps": 1}, train_dataset=word_rows())
    ask, say = [{"role": "user", "content": "w1"}], {"role": "assistant", "content": "w2"}
    texts, flags = {"prompt": ["w1", "w2"], "completion": ["w3", "w4"]}, {"constrain": ["yes", "no"]}
    for columns, message in (
        ({**texts, "completion": ["w3", None]}, "'completion', row 1 has none"),
        ({**texts, "completion": [3, 4]}, "'completion', got .*int64"),
        ({**texts, "prompt": [["w1"], ["w2"]]}, "'prompt', got .*string"),
        ({**texts, **flags}, "true or false in the column 'constrain', got .*string"),
        ({"prompt": [ask], "completion": [[say, *ask, say]]}, "row 0 has a user's turn"),
    ):
        with pytest.raises(ValueError, match=message):
            train(train_dataset=Dataset.from_dict(columns))
    recovery = make_safety_recovery_dataset(triplet_rows(), word_tokenizer)
    with pytest.raises(ValueError, match="a stream .* that mixes them"):
        train(train_dataset=concatenate_datasets([word_rows(), recovery]).to_iterable_dataset())
    with pytest.raises(ValueError, match="column"):
        train(safety_dataset=Dataset.from_dict({"prompt": ["w1"], "harmful": ["w2"]}))
    with pytest.raises(ValueError, match="compute_loss_func"):
        DeepSafetySFTTrainer(
            tiny_llama(),
            args=DeepSafetySFTConfig("out", **QUICK),
            train_dataset=word_rows(),
            processing_class=word_tokenizer,
            compute_loss_func=lambda *args, **kwargs: None,
        )


def test_a_missing_reference_is_an_error_not_plain_sft(train):
    trainer = train(reference="precompute", start=False)
    trainer.train_dataset = trainer.train_dataset.remove_columns(REF_LOGPS)
    with pytest.raises(ValueError, match=REF_LOGPS):
        trainer.train()
    trainer = train(start=False)
    trainer.data_collator = trainer.data_collator.collator
    with pytest.raises(ValueError, match="data_collator"):
        trainer.train()


def test_another_reference_model(train, monkeypatch):
    trainer = train(ref_model=tiny_llama(seed=7), max_steps=1)
    assert trainer.reference == "frozen"
    assert abs(losses(trainer, "constraint/log_ratio_initial")[0]) > 0.01
    model = tiny_llama()
    with pytest.raises(ValueError, match="it would be frozen"):
        train(model=model, ref_model=model)
    half = tiny_llama(seed=7)
    half.model = model.model
    with pytest.raises(ValueError, match="it would be frozen"):
        train(model=model, ref_model=half)
    with pytest.raises(ValueError, match="found by turning that off"):  # into which adapters were put
        train(model=get_peft_model(model, LORA), ref_model=model)
    with pytest.raises(TypeError, match="from_pretrained"):
        train(ref_model="org/aligned")
    with pytest.raises(ValueError, match="Leave one of them out"):
        train(ref_model=tiny_llama(seed=7), reference="window")

    asked = []

    def refusals(rows, model, *args):
        asked.append(model.model.embed_tokens.weight.clone())
        return {}

    monkeypatch.setattr("hf_iclr.trainers.deep_safety.mixin.find_refusals", refusals)
    train(ref_model=tiny_llama(seed=7), constrain="refused", start=False)
    assert torch.equal(asked[0], tiny_llama(seed=7).model.embed_tokens.weight)


def test_plain_sft_arguments_are_taken_over(train, caplog):
    trainer = train(config=SFTConfig, max_steps=2, learning_rate=3e-3)
    assert isinstance(trainer.args, DeepSafetySFTConfig)
    assert (trainer.args.learning_rate, trainer.args.adam_beta1, trainer.args.beta_initial) == (3e-3, 0.9, 2.0)
    assert "0.5 and 10 steps" in caplog.text


@dataclasses.dataclass
class ProjectConfig(SFTConfig):
    """A user's own arguments."""

    project_name: str = "none"


@pytest.mark.parametrize("config", [ProjectConfig, Seq2SeqTrainingArguments])
def test_arguments_of_a_subclass_are_taken_over_with_what_it_adds(train, config):
    own = {"project_name": "mine"} if config is ProjectConfig else {"generation_max_length": 7}
    settings = {name: value for name, value in QUICK.items() if config is ProjectConfig or "checkpointing" not in name}
    trainer = train(config=lambda folder, **_: config(folder, **settings, **own), start=False)
    assert isinstance(trainer.args, DeepSafetySFTConfig) and trainer.args.learning_rate == 1e-2
    assert {name: getattr(trainer.args, name) for name in own} == own


def with_dropout(kind):
    """GPT-2 has modules for its dropout, OPT passes rates to functions, Falcon reads them from its config."""
    set_seed(0)
    if kind == "falcon":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.4}
        rates = {"attention_dropout": 0.3, "hidden_dropout": 0.3}
        return FalconForCausalLM(FalconConfig(vocab_size=50, bos_token_id=None, eos_token_id=49, **sizes, **rates))
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.4}
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, bos_token_id=None, eos_token_id=49, **sizes))
    config = OPTConfig(
        vocab_size=50, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2, dropout=0.3,
        num_attention_heads=2, max_position_embeddings=64, init_std=0.4, attention_dropout=0.3, eos_token_id=49,
    )  # fmt: skip
    return OPTForCausalLM(config)


@pytest.mark.parametrize(
    ("kind", "reference"), [("gpt2", "frozen"), ("opt", "frozen"), ("gpt2", "precompute"), ("falcon", "precompute")]
)
def test_there_is_no_dropout_where_the_reference_has_none(train, kind, reference):
    model = with_dropout(kind)
    trainer = train(model=model, reference=reference, max_steps=1)
    assert losses(trainer, "constraint/weight_first")[0] == pytest.approx(1, abs=1e-4)
    kept = train(model=with_dropout(kind), reference=reference, disable_dropout=False, max_steps=1)
    assert losses(kept, "constraint/weight_first")[0] != pytest.approx(1, abs=1e-2)
    rate = {"gpt2": "resid_pdrop", "opt": "dropout", "falcon": "hidden_dropout"}[kind]
    assert getattr(trainer.model.config, rate) > 0  # what is saved keeps its rates
    plain = train(model=with_dropout(kind), constrain="none", max_steps=1, **PLAIN_ADAM)
    assert losses(plain) == losses(train(SFTTrainer, SFTConfig, model=with_dropout(kind), max_steps=1))


def test_betas_changed_on_the_way(train):
    class Raise(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            args.beta_first, args.beta_initial, args.beta_rest = 50.0, 50.0, 50.0

    fast = {"max_steps": 3, "learning_rate": 0.1, "warmup_steps": 0}
    plain, raised = train(**fast), train(callbacks=[Raise()], **fast)
    key = "constraint/weight_initial"
    assert losses(raised, key)[0] == losses(plain, key)[0]
    assert abs(losses(raised, key)[1] - losses(plain, key)[1]) > 0.01


def test_streamed_rows_train_against_a_frozen_copy(train):
    trainer = train(train_dataset=word_rows().to_iterable_dataset())
    assert trainer.reference == "frozen" and len(losses(trainer)) == 3
    with pytest.raises(ValueError, match="answers only"):
        train(train_dataset=Dataset.from_list([{"text": "w1 w2 w3"}] * 9).to_iterable_dataset())
    trainer = train(eval_dataset=word_rows(4).to_iterable_dataset(), start=False)
    assert trainer.reference == "frozen" and trainer.evaluate()["eval_constrained_loss"] > 0


def test_rows_made_on_the_fly_train_against_a_frozen_copy(train):
    ready = train(start=False, constrain="none").train_dataset.select_columns(["input_ids", "labels"])
    rows = ready.with_transform(lambda batch: batch)
    settings = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    trainer = train(train_dataset=rows, **settings)
    assert trainer.reference == "frozen" and losses(trainer) == pytest.approx(losses(train()), abs=1e-5)
    with pytest.raises(ValueError, match="with_transform"):
        train(train_dataset=rows, reference="precompute", **settings)


def test_triplets_are_looked_at_before_the_reference_is_computed(train, monkeypatch):
    monkeypatch.setattr(DeepSafetySFTTrainer, "_score", lambda *args, **kwargs: pytest.fail("computed already"))
    with pytest.raises(ValueError, match="column 'refusal' is empty"):
        train(safety_dataset=triplet_rows().map(lambda row: {"refusal": ""}))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="at least 4 utility rows"):
        train(train_dataset=word_rows(3), safety_dataset=triplet_rows(), start=False)


def test_a_model_that_is_only_peft_wrapped_keeps_its_class(train):
    trainer = train(peft_config=LORA)
    assert isinstance(trainer.model, PeftModel) and list(trainer.model.peft_config) == ["default"]


@pytest.mark.parametrize("settings", [{"reference": "precompute"}, {"reference": "window"}, {"peft_config": LORA}])
def test_only_refused_prompts_are_constrained_and_a_weak_constraint_is_named(train, monkeypatch, caplog, settings):
    seen = []

    def find_cue(text):
        seen.append(text)
        return 0 if len(seen) % 2 else None

    monkeypatch.setattr("hf_iclr.trainers.deep_safety.refused_prompts.find_refusal_cue", find_cue)
    with caplog.at_level("INFO", "hf_iclr"):
        trainer = train(constrain="refused", start=False, beta_first=0.1, **settings)
    marked = [any(marks) for marks in trainer.train_dataset["constrain"]]
    assert sum(marked) == len(seen) / 2 == 12
    assert "12 of 24" in caplog.text and "may be lost" in caplog.text
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(24)])
    assert (batch[POSITIONS].sum(1) > 0).tolist() == marked
    caplog.clear()
    train(constrain="refused", start=False, beta_first=30.0, **settings)
    assert "may be lost" not in caplog.text
    monkeypatch.setattr("hf_iclr.trainers.deep_safety.refused_prompts.find_refusal_cue", lambda text: None)
    train(constrain="refused", start=False, **settings)
    assert "nothing is constrained" in caplog.text


def test_own_refusals_are_rehearsed_beside_the_rows_they_answer(train, monkeypatch, caplog):
    monkeypatch.setattr("hf_iclr.trainers.deep_safety.refused_prompts.find_refusal_cue", lambda text: 0)
    trainer = train(
        constrain="refused", rehearse_refusals=True, start=False, per_device_train_batch_size=10,
        eval_dataset={"train": word_rows(4, seed=9)},
    )  # fmt: skip
    assert len(trainer.train_dataset.triplets) == 24  # not those of the evaluation set of that name
    some = word_rows().add_column("constrain", [index < 20 for index in range(24)])
    kept = train(constrain="refused", rehearse_refusals=True, start=False, train_dataset=some)
    assert len(kept.train_dataset.triplets) == 20
    reference = tiny_llama()
    order = list(trainer._get_train_sampler())
    assert sum(index >= 24 for index in order[:10]) == 2
    row = trainer.train_dataset[max(order)]
    answer = [label for label in row["labels"] if label != -100]
    prompt = torch.tensor([row["input_ids"][: -len(answer)]])
    greedy = reference.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
    assert row["constrain"] is False and answer == greedy[0, prompt.shape[1] :].tolist()
    trainer.train()
    assert len(losses(trainer)) == 3

    monkeypatch.setattr("hf_iclr.trainers.deep_safety.refused_prompts.find_refusal_cue", lambda text: None)
    trainer = train(constrain="refused", rehearse_refusals=True, start=False)
    assert "nothing to rehearse" in caplog.text and isinstance(trainer.train_dataset, Dataset)
    with pytest.raises(ValueError, match="constrain='refused'"):
        DeepSafetySFTConfig("out", **QUICK, rehearse_refusals=True)


def test_virtual_tokens_in_front_do_not_shift_the_window(train):
    peft = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    stored = train(peft_config=peft, reference="precompute", max_steps=3)
    off = train(peft_config=peft, reference="adapter", max_steps=3)
    assert losses(stored) == pytest.approx(losses(off), abs=1e-5)
    assert stored.state.log_history[0]["constraint/weight_first"] != pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kind", ["cp_enabled", "sp_enabled"])
def test_sequences_cut_across_devices_are_refused(train, monkeypatch, kind):
    trainer = train(start=False)
    parallelism = SimpleNamespace(**{"cp_enabled": False, "sp_enabled": False, kind: True})
    monkeypatch.setattr(type(trainer.accelerator), "parallelism_config", parallelism)
    with pytest.raises(ValueError, match="sequence parallelism"):
        choose_reference(trainer, None)
