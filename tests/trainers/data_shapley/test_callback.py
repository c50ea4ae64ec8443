"""The callback in trainers: values, training left untouched, hooks gone, logs, warnings and bad input."""

import gc
import logging
import math
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from trl import GRPOConfig, GRPOTrainer

from hf_iclr.trainers.data_shapley.callback import InRunDataShapleyCallback
from hf_iclr.trainers.data_shapley.directions import EngineSettings
from hf_iclr.trainers.data_shapley.result import DataShapleyResult
from tests.trainers.tiny import QUICK, losses, tiny_llama, word_rows


def token_rows(count, seed=0, length=8):
    rows = torch.randint(1, 49, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])


def lora(model, **settings):
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **settings))


def arguments(folder, **settings):
    quick = {name: value for name, value in QUICK.items() if name != "activation_checkpointing"}
    defaults = {"optim": "sgd", "learning_rate": 1e-2, "lr_scheduler_type": "linear", "max_grad_norm": 0.0}
    return TrainingArguments(str(folder), **{**quick, **defaults, **settings})


def make(folder, model=None, callbacks=(), rows=None, trainer_class=Trainer, **settings):
    return trainer_class(
        lora(tiny_llama()) if model is None else model,
        arguments(folder, **settings),
        train_dataset=token_rows(12) if rows is None else rows,
        data_collator=default_data_collator,
        callbacks=list(callbacks),
    )


def callback(**settings):
    return InRunDataShapleyCallback(token_rows(5, seed=9), **{"refresh_every": 1, "adam_warmup": 0, **settings})


class Recorder(TrainerCallback):
    """Weights before each step."""

    def __init__(self):
        self.before = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before.append([p.detach().clone() for p in model.parameters() if p.requires_grad])


def gradient(model, weights, batch):
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
    return torch.autograd.grad(model(**default_data_collator(list(batch))).loss, parameters)


def test_a_value_is_learning_rate_times_the_product_of_two_gradients(tmp_path):
    shapley, recorder = callback(), Recorder()
    trainer = make(tmp_path, tiny_llama().double(), [recorder, shapley], learning_rate=0.1)
    trainer.train()
    rows, model, val = shapley.result.rows, trainer.model.eval(), token_rows(5, seed=9)
    assert len(rows) == 12 and set(rows["index"]) == set(range(12))
    for line in rows.itertuples():
        weights = recorder.before[line.step - 1]
        mine, theirs = (gradient(model, weights, batch) for batch in (token_rows(12).select([line.index]), val))
        lr = 0.1 * (1 - (line.step - 1) / 3)
        expected = lr * sum((a * b).sum() for a, b in zip(mine, theirs, strict=True)).item() / 4
        assert line.value == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert line.tokens == 8


def test_rows_in_lists_reach_the_collator_as_they_are(tmp_path):
    """One that stacks tensors, as for detection, where a label is a dictionary of them."""

    def rows(count, seed):
        return [
            {"input_ids": torch.tensor(row["input_ids"]), "labels": {"of": torch.tensor(row["labels"])}}
            for row in token_rows(count, seed)
        ]

    def collate(rows):
        ids, labels = ([row["input_ids"] for row in rows], [row["labels"]["of"] for row in rows])
        return {"input_ids": torch.stack(ids), "labels": torch.stack(labels)}

    shapley, plain = InRunDataShapleyCallback(rows(5, 9), 1), InRunDataShapleyCallback(token_rows(5, 9), 1)
    trainer = make(tmp_path / "a", callbacks=[shapley], rows=rows(12, 0))
    trainer.data_collator = collate
    trainer.train()
    make(tmp_path / "b", callbacks=[plain]).train()
    assert shapley.result.values().equals(plain.result.values())


def test_values_add_up_to_the_fall_of_the_validation_loss(tmp_path):
    shapley = callback(targets={"other": token_rows(3, seed=4)})
    trainer = make(tmp_path, lora(tiny_llama()).double(), [shapley], max_steps=10, learning_rate=1e-5)
    trainer.train()
    for target in ("validation", "other"):
        assert shapley.result.explained_ratio(target) == pytest.approx(1, abs=0.02)
    assert losses(trainer, "shapley/explained_ratio")[-1] == pytest.approx(1, abs=0.02)
    assert len(losses(trainer, "shapley/loss_other")) == 10
    assert all(0 <= share <= 1 for share in losses(trainer, "shapley/harmful_share"))
    steps = shapley.result.steps
    sums = shapley.result.rows.groupby("step")["value_other"].sum()
    assert steps["sum_other"][:10].tolist() == pytest.approx(sums.tolist())
    assert steps["loss_other"].iloc[-1] == pytest.approx(losses(trainer, "shapley/loss_other")[-1])


def test_logs_reach_the_trackers(tmp_path):
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.extend(key for key in logs if key.startswith("shapley/"))

    make(tmp_path, callbacks=[Tracker(), callback()]).train()
    ratios = {"shapley/explained_ratio", "shapley/harmful_share", "shapley/energy", "shapley/scored_share"}
    assert ratios | {"shapley/loss_validation", "shapley/agreement"} == set(seen)


def test_steps_too_large_for_their_sizes_to_mean_anything_are_said_to_be(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        make(tmp_path, callbacks=[callback()], learning_rate=30.0).train()
    assert "times the fall of the validation loss" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make(tmp_path, callbacks=[callback()], learning_rate=1e-3).train()
    assert "times the fall" not in caplog.text


class Last(TrainerCallback):
    """What training leaves behind, before the model is let go."""

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.weights = [p.detach().clone() for p in model.parameters()]
        states = optimizer.state_dict()["state"]
        self.state = [value for entry in states.values() for value in entry.values() if torch.is_tensor(value)]
        self.random = torch.get_rng_state()


SETTINGS = {
    "SGD": {},
    "SGD with momentum": {"optim_args": "momentum=0.9"},
    "AdamW, clipped": {"optim": "adamw_torch", "max_grad_norm": 0.1, "weight_decay": 0.1},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "bfloat16": {"bf16": True},
}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_training_is_bit_for_bit_that_without_the_callback(name, full, tmp_path, caplog):
    after = []
    for shapley in (None, callback(rank=2)):
        last, model = Last(), tiny_llama(attention_dropout=0.2)
        model = model if full else lora(model, lora_dropout=0.3)
        make(tmp_path, model, [last, *([shapley] if shapley else [])], **SETTINGS[name]).train()
        after.append(last)
    assert len(shapley.result.rows) == (8 if "Adam" in name else 12)  # Adam's second moment is 0 at first
    assert shapley.result.rows["value"].abs().max() > 0
    for part in ("weights", "state"):
        assert all(torch.equal(a, b) for a, b in zip(*(getattr(last, part) for last in after), strict=True))
    assert torch.equal(after[0].random, after[1].random)
    assert "leave out" not in caplog.text


def leftovers(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]


class Broken(TrainerCallback):
    def __init__(self, event, step=1):
        self.step = step
        setattr(self, event, self.fail)

    def fail(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("event", ["on_substep_end", "on_pre_optimizer_step", "on_step_end"])
def test_hooks_are_gone_after_an_exception_and_a_second_training_works(event, tmp_path):
    shapley, broken, rows = callback(), Broken(event), token_rows(12)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = make(tmp_path, callbacks=[broken, shapley], rows=rows, **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not leftovers(trainer.model)
    trainer.remove_callback(broken)
    trainer.train()
    assert not leftovers(trainer.model) and "__getitems__" not in vars(rows)
    again = callback()
    make(tmp_path / "again", trainer.model, callbacks=[again], rows=rows, **settings).train()
    assert len(shapley.result.rows) == len(again.result.rows) == 12


@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_step_end"])
def test_after_an_interruption_whose_traceback_is_kept_the_model_is_any_other(event, tmp_path):
    """As in a notebook, where all that the traceback reaches stays alive."""
    rows, shapley = token_rows(12), callback()
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = make(tmp_path, callbacks=[Broken(event), shapley], rows=rows, **settings)
    with pytest.raises(KeyboardInterrupt) as kept:
        trainer.train()
    assert kept.tb is not None and not leftovers(trainer.model)
    trainer.remove_callback(shapley)
    trainer.pop_callback(Broken)
    fresh = make(tmp_path, rows=rows, per_device_train_batch_size=3)
    fresh.model.load_state_dict(trainer.model.state_dict())
    fresh.train()
    make(tmp_path, trainer.model, rows=rows, per_device_train_batch_size=3).train()
    assert all(map(torch.equal, trainer.model.parameters(), fresh.model.parameters()))
    known = len(shapley.result.rows)
    trainer.train()  # by the same trainer, without the callback
    assert len(shapley.result.rows) == known and not leftovers(trainer.model)


def test_a_trainer_is_given_back_when_its_callback_goes(tmp_path):
    class Own(Trainer):
        pass

    trainer = make(tmp_path, callbacks=[Broken("on_step_end"), callback()], trainer_class=Own)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "training_step" in vars(trainer)
    trainer.pop_callback(InRunDataShapleyCallback)
    gc.collect()
    assert "training_step" not in vars(trainer)


def test_an_exception_in_the_forward_pass_leaves_no_hook(tmp_path):
    class Fails(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            if model.training and self.state.global_step == 1:
                raise RuntimeError("on purpose")
            return loss

    trainer = make(tmp_path, callbacks=[callback()], trainer_class=Fails)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    assert not leftovers(trainer.model)


def test_a_loss_that_hands_the_model_only_some_inputs_keeps_identities(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss

    shapley = callback()
    make(tmp_path, callbacks=[shapley], trainer_class=Own).train()
    assert set(shapley.result.rows["index"]) == set(range(12))


def test_adam_waits_for_its_second_moment_and_a_direction_that_turns_is_told(tmp_path):
    agreement = {}
    for lr in (1e-7, 0.3):
        shapley = callback(adam_warmup=4)
        settings = {"optim": "adamw_torch", "learning_rate": lr, "lr_scheduler_type": "constant"}
        trainer = make(tmp_path, lora(tiny_llama()).double(), [shapley], max_steps=7, **settings)
        trainer.train()
        steps = shapley.result.steps.set_index("step")
        assert shapley.result.rows["step"].min() == 5 and math.isnan(steps["agreement_validation"][5])
        agreement[lr] = steps.loc[6:7, "agreement_validation"]
        assert sum("shapley/agreement" in logged for logged in trainer.state.log_history) >= 2
    assert agreement[1e-7].min() > 0.97 and agreement[0.3].max() < 0.9  # Adam's second moment goes on


def test_values_of_tokens_are_kept_for_the_rows_asked_for(tmp_path):
    shapley = callback(token_values_for=[3])
    make(tmp_path, callbacks=[shapley]).train()
    rows = shapley.result.rows.set_index("index")
    assert rows["token_values"].notna().sum() == 1
    assert sum(rows.loc[3, "token_values"]) == pytest.approx(rows.loc[3, "value"], rel=1e-4)
    assert len(rows.loc[3, "token_values"]) == 8


def test_a_sketch_of_more_ranks_keeps_more_and_comes_nearer_to_exact_values(tmp_path):
    kept, found = [], []
    for settings in ({"rank": 1}, {"rank": 6}, {"exact": True}):
        shapley = callback(**settings)
        make(tmp_path, tiny_llama(), [shapley], max_steps=2).train()
        kept.append(shapley.result.steps["energy_validation"][0])
        found.append(shapley.result.values().sort_index())
    assert kept[0] < kept[1] < kept[2] == 1
    assert found[0].corr(found[2]) < found[1].corr(found[2]) > 0.95


def test_a_layer_used_without_being_called_is_named_and_left_out(tmp_path, caplog):
    shapley = callback(exact=True)
    with caplog.at_level(logging.WARNING):
        make(tmp_path, Called(tiny_llama(tie_word_embeddings=False)), [shapley]).train()
    assert "lm_head.weight" in caplog.text and "fused" in caplog.text
    assert len(shapley.result.rows) == 12


class Called(nn.Module):
    """A model with a fused output layer."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids, labels):
        hidden = self.inner.model(input_ids).last_hidden_state[:, :-1]
        logits = hidden @ self.inner.lm_head.weight.T
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())}


def test_scores_that_miss_every_parameter_are_refused(tmp_path):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 1)

        def forward(self, input_ids, labels):
            return {"loss": (input_ids.float() @ self.layer.weight.T).square().mean() * 1e-4}

    with pytest.raises(ValueError, match="gradient of no parameter.*layer.weight"):
        make(tmp_path, Bare(), [callback(exact=True)]).train()


class Summed(Trainer):
    def compute_loss(self, model, inputs, **kwargs):
        return super().compute_loss(model, inputs, **kwargs) * len(inputs["input_ids"])


BAD = {
    "got none": ({"val": token_rows(1).select([])}, {}),
    "columns the trainer trains on": ({"val": Dataset.from_list([{"text": "a"}])}, {}),
    "vocabulary": ({"val": Dataset.from_list([{"input_ids": [400, 1], "labels": [400, 1]}])}, {}),
    "mean over rows": ({}, {"trainer_class": Summed}),
    "that the optimizer trains, got none": ({}, {"model": "frozen"}),
    "adam_warmup=20": ({"adam_warmup": 20}, {"optim": "adamw_torch"}),
    "with a length": ({"val": iter([])}, {}),
    "DoRA": ({}, {"model": "dora"}),
    "'uid', the id_column": ({"id_column": "uid"}, {}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_an_error_before_the_first_step(message, tmp_path):
    settings, trainer_settings = (dict(part) for part in BAD[message])
    val = settings.pop("val", token_rows(5, seed=9))
    kind = trainer_settings.pop("model", None)
    model = lora(tiny_llama(), use_dora=kind == "dora") if kind in (None, "dora") else tiny_llama()
    if kind == "frozen":
        model = lora(tiny_llama())
        model.requires_grad_(False)
    shapley = InRunDataShapleyCallback(val, **{"refresh_every": 1, "adam_warmup": 0, **settings})
    trainer = make(tmp_path, model, [shapley], **trainer_settings)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0 and not leftovers(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"refresh_every": 0},
        {"rank": 0},
        {"targets": {"validation": 1}},
    ],
)
def test_options_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="Expected|needs"):
        InRunDataShapleyCallback(token_rows(2), **settings)


def test_a_result_before_a_training_is_refused():
    with pytest.raises(ValueError, match="trainer.train"):
        callback().result  # noqa: B018


def test_sources_are_looked_up_in_the_trainers_own_rows(tmp_path):
    """`result.by_source("source")` needs nothing more when the training set has the column."""
    rows = token_rows(12)
    rows = rows.add_column("source", ["even", "odd"] * 6)
    shapley = callback()
    make(tmp_path, callbacks=[shapley], rows=rows).train()
    totals = shapley.result.by_source("source").totals
    assert sorted(totals.index) == ["even", "odd"]


def test_values_are_there_while_the_run_goes_on_and_after_it_was_interrupted(tmp_path):
    shapley, seen = callback(), []

    class Looking(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(len(shapley.result.rows))
            if state.global_step == 2:
                raise KeyboardInterrupt

    with pytest.raises(ValueError, match="trainer.train"):
        shapley.result  # noqa: B018
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, callbacks=[shapley, Looking()]).train()
    assert seen == [4, 8] and len(shapley.result.rows) == len(DataShapleyResult.from_store(tmp_path).rows) == 8


def test_an_interrupted_run_without_a_flush_keeps_its_values(tmp_path):
    shapley = callback()
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, callbacks=[shapley, Broken("on_step_end")]).train()
    assert len(shapley.result.rows) == 4


def test_a_result_before_the_first_value_says_why_there_is_none(tmp_path):
    shapley = callback(adam_warmup=2)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, callbacks=[shapley, Broken("on_step_end")], optim="adamw_torch").train()
    with pytest.raises(ValueError, match="a step with values.*adam_warmup=2"):
        shapley.result  # noqa: B018


def linear_loss(model, batch):
    return model(batch).square().mean()


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
def test_an_interrupted_loop_keeps_its_values(stored, steps, tmp_path):
    model, data = nn.Linear(3, 1), torch.randn(6, 3)
    optimizer, loader = torch.optim.SGD(model.parameters(), lr=0.01), DataLoader(data, batch_size=2)
    folder = tmp_path if stored else None
    with (
        pytest.raises(KeyboardInterrupt),
        InRunDataShapleyCallback.attach(
            model, optimizer, loader, data, compute_loss=linear_loss, output_dir=folder
        ) as shapley,
    ):
        for step, batch in enumerate(loader):
            if step == steps:
                raise KeyboardInterrupt
            linear_loss(model, batch).backward()
            optimizer.step()
    assert not leftovers(model)
    if steps:
        assert len(shapley.result.rows) == 4
    else:
        with pytest.raises(ValueError, match="a step with values"):
            shapley.result  # noqa: B018


def test_a_run_stopped_by_an_evaluation_is_measured_at_its_last_weights(tmp_path):
    """Those of the best checkpoint, here the first, are loaded before `on_train_end`."""

    class Stop(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    found = []
    settings = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 1}
    evaluating = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    }
    for stopping in (False, True):
        shapley = callback(refresh_every=5)
        trainer = Trainer(
            lora(tiny_llama()),
            arguments(tmp_path / str(stopping), **settings, **(evaluating | {"max_steps": 6} if stopping else {})),
            train_dataset=token_rows(12),
            eval_dataset=token_rows(4, seed=2),
            data_collator=default_data_collator,
            callbacks=[shapley, *([Stop()] if stopping else [])],
        )
        trainer.train()
        assert trainer.state.global_step == 3
        found.append((shapley.result.steps, losses(trainer, "shapley/explained_ratio")))
    assert found[1][0].equals(found[0][0]) and found[1][1] == found[0][1] and len(found[1][1]) == 1
    assert found[1][0]["loss_validation"].notna().tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("settings", "trainer_settings", "message"),
    [
        ({"settings": EngineSettings(adam_warmup=20)}, {"optim": "adamw_torch"}, "adam_warmup=20"),
        ({"id_column": "uid"}, {}, "'uid', the id_column"),
        ({}, {"trainer_class": Summed}, "mean over rows"),
    ],
)
def test_a_start_that_is_refused_leaves_earlier_values(settings, trainer_settings, message, tmp_path):
    shapley = callback()
    make(tmp_path, callbacks=[shapley]).train()
    before = shapley.result.rows
    for name, value in settings.items():
        setattr(shapley, name, value)
    with pytest.raises(ValueError, match=message):
        make(tmp_path, callbacks=[shapley], **trainer_settings).train()
    assert shapley.result.rows.equals(before) and DataShapleyResult.from_store(tmp_path).rows.equals(before)


class PicksInputs(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss


def test_an_epoch_resumed_in_its_middle_is_scored_whatever_the_loss_hands_the_model(tmp_path):
    settings = {"trainer_class": PicksInputs, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = callback(), callback()
    make(tmp_path, callbacks=[whole], **settings).train()
    make(tmp_path, callbacks=[resumed], **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.result.values().equals(whole.result.values())


def test_a_fresh_run_leaves_the_values_of_an_earlier_one(tmp_path):
    first, second = callback(), callback()
    make(tmp_path, callbacks=[first]).train()
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, callbacks=[second, Broken("on_step_begin")]).train()
    assert second.result.rows["step"].tolist() == [1] * 4  # which are written now
    runs = [DataShapleyResult.from_store(run).rows for run in (tmp_path / "shapley").iterdir()]
    assert sorted(map(len, runs)) == [4, 12]
    assert max(runs, key=len).equals(first.result.rows)
    assert len(DataShapleyResult.from_store(tmp_path).rows) == 4  # the last


@pytest.mark.parametrize("begun_anew", [False, True])
def test_a_run_resumed_into_another_folder_is_the_whole_run(begun_anew, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole, resumed = callback(), callback()
    make(tmp_path / "a", callbacks=[whole], **settings).train()
    if begun_anew:  # in the first folder; its checkpoint stays
        make(tmp_path / "a", callbacks=[callback()], rows=token_rows(12, 5), max_steps=1).train()
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    make(tmp_path / "b", callbacks=[resumed], **settings).train(resume_from_checkpoint=checkpoint)
    assert resumed.result.rows.equals(whole.result.rows)
    assert DataShapleyResult.from_store(tmp_path / "b").rows.equals(whole.result.rows)
    assert resumed.result.explained_ratio() == whole.result.explained_ratio()


@pytest.mark.parametrize("rows", [token_rows(12, 5), token_rows(12).select(range(11)), token_rows(12).shuffle(1)])
def test_a_run_resumed_with_other_rows_is_refused(rows, tmp_path):
    """Positions would be those of two datasets."""
    settings = {"save_strategy": "steps", "save_steps": 1}
    make(tmp_path, callbacks=[callback()], max_steps=1, **settings).train()
    resumed = make(tmp_path, callbacks=[callback()], rows=rows, max_steps=2, **settings)
    with pytest.raises(ValueError, match="its values would belong to other rows"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 1 and len(DataShapleyResult.from_store(tmp_path).values()) == 4


def test_checkpoints_hold_no_copy_of_the_values(tmp_path):
    """So what a run writes grows with its steps, not with their square."""
    make(tmp_path, callbacks=[callback()], max_steps=6, save_strategy="steps", save_steps=2).train()
    checkpoints = [tmp_path / f"checkpoint-{step}" for step in (2, 4, 6)]
    assert not any(path for checkpoint in checkpoints for path in checkpoint.rglob("*.parquet"))
    assert len({(checkpoint / "shapley_direction.safetensors").stat().st_size for checkpoint in checkpoints}) == 1


def test_values_outlive_their_folder(tmp_path):
    shapley = callback()
    make(tmp_path / "gone", callbacks=[shapley]).train()
    shutil.rmtree(tmp_path / "gone")
    assert len(shapley.result.values()) == 12


def test_an_empty_result_speaks_of_what_the_run_has(tmp_path):
    shapley = callback(adam_warmup=2)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, callbacks=[Broken("on_step_begin", 0), shapley]).train()
    with pytest.raises(ValueError, match="found none yet.$"):
        shapley.result  # noqa: B018


def test_a_loss_that_divides_by_the_number_of_labels_is_given_it(tmp_path):
    def mean_of_tokens(outputs, labels, num_items_in_batch):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    found = []
    for settings in ({}, {"compute_loss_func": mean_of_tokens}):
        shapley = callback()
        Trainer(
            lora(tiny_llama()),
            arguments(tmp_path / str(len(found))),
            train_dataset=token_rows(12),
            data_collator=default_data_collator,
            callbacks=[shapley],
            **settings,
        ).train()
        found.append(shapley.result)
    assert found[1].values().tolist() == pytest.approx(found[0].values().tolist(), rel=1e-3, abs=1e-7)
    assert found[1].steps["loss_validation"].tolist() == pytest.approx(found[0].steps["loss_validation"].tolist())


def test_two_callbacks_in_one_trainer_are_refused(tmp_path):
    trainer = make(tmp_path, callbacks=[callback(), callback()])
    with pytest.raises(ValueError, match="Expected one InRunDataShapleyCallback in a trainer, got 2.*targets="):
        trainer.train()


@pytest.mark.parametrize("targets", [{"other": 3, "more": 4}, {}, {"more": 4}])
def test_resuming_with_other_targets_is_refused(targets, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    shapley = callback(targets={"other": token_rows(3)})
    make(tmp_path, callbacks=[shapley], **settings).train()
    before = shapley.result.rows
    others = {name: token_rows(3, seed=seed) for name, seed in targets.items()}
    with pytest.raises(ValueError, match=r"checkpoint, \['validation', 'other'\], got.*`targets`"):
        make(tmp_path, callbacks=[callback(targets=others)], **settings).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )
    assert DataShapleyResult.from_store(tmp_path).rows.equals(before)


def test_a_trainer_that_writes_its_own_rows_is_refused(word_tokenizer, tmp_path):
    quick = {name: value for name, value in QUICK.items() if name != "activation_checkpointing"}
    trainer = GRPOTrainer(
        tiny_llama(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(str(tmp_path), num_generations=2, max_completion_length=2, **quick),
        train_dataset=word_rows(4).select_columns(["prompt"]),
        processing_class=word_tokenizer,
        callbacks=[InRunDataShapleyCallback(word_rows(2))],
    )
    with pytest.raises(ValueError, match="GRPOTrainer, which writes its rows as it trains. Use SFTTrainer"):
        trainer.train()


def test_batches_without_names_are_refused(tmp_path):
    trainer = make(tmp_path, callbacks=[callback()])
    trainer.data_collator = list
    with pytest.raises(TypeError, match="name the model's inputs, got list.*data_collator"):
        trainer.train()


def test_a_loader_of_whole_batches_is_refused():
    model = nn.Linear(3, 1)
    optimizer, loader = torch.optim.SGD(model.parameters(), lr=0.01), DataLoader(torch.randn(4, 2, 3), batch_size=None)
    with (
        pytest.raises(ValueError, match="batch_size=None.*batch_size=8"),
        InRunDataShapleyCallback.attach(model, optimizer, loader, torch.randn(3, 3), compute_loss=linear_loss),
    ):
        raise AssertionError("the loop has begun")


def test_values_for_each_validation_row_tell_which_row_taught_which_answer(tmp_path):
    """Every validation row is a copy of a training row, whose gradient is most like its own."""
    rows, model = token_rows(4), lora(tiny_llama())
    shapley = callback(per_target_rows=True, exact=True)
    shapley.datasets["validation"] = rows.select([2, 0])
    make(tmp_path, model, [shapley], rows=rows, max_steps=1).train()
    table, alone = shapley.result.target_rows(), callback(exact=True)
    assert list(table.columns) == [0, 1] and list(table.idxmax()) == [2, 0]
    assert table.mean(axis=1).tolist() == pytest.approx(shapley.result.values().sort_index().tolist(), rel=1e-4)
    alone.datasets["validation"] = rows.select([0])
    make(tmp_path / "b", lora(tiny_llama()), [alone], rows=rows, max_steps=1).train()
    assert table[1].tolist() == pytest.approx(alone.result.values().sort_index().tolist(), rel=1e-4)
    stored = DataShapleyResult.from_store(tmp_path)
    assert stored.target_rows().equals(table) and stored.targets == ["validation"]
    shapley.result.plot_target_rows(tmp_path / "map.png", 3)
    assert (tmp_path / "map.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="got none. Give `per_target_rows=True`"):
        alone.result.target_rows()


def test_validation_rows_that_cannot_be_told_apart_have_no_values_of_their_own(tmp_path):
    blank = {"input_ids": [1] * 8, "labels": [-100] * 8}
    shapley = InRunDataShapleyCallback([blank, *token_rows(2)], 1, per_target_rows=True)
    with pytest.raises(ValueError, match="one by one, for per_target_rows, got 2 batches of the 3"):
        make(tmp_path, callbacks=[shapley]).train()


def test_a_direction_of_each_validation_row_is_sketched_and_resumed(tmp_path):
    options, settings = {"per_target_rows": True, "rank": 2}, {"save_strategy": "steps", "save_steps": 2}
    whole, resumed = callback(**options), callback(**options)
    make(tmp_path, tiny_llama(), [whole], **settings).train()
    again = make(tmp_path, tiny_llama(seed=1), [resumed], **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    table = whole.result.target_rows()
    assert resumed.result.target_rows().equals(table) and table.shape == (12, 5)
