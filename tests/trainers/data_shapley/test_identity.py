"""Rows keep their identity through loaders, collators, resuming, TRL's pairs and packing."""

import itertools
import pickle
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainerCallback, default_data_collator
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_iclr.saving import contiguous_clone
from hf_iclr.trainers.data_shapley.callback import InRunDataShapleyCallback
from hf_iclr.trainers.data_shapley.gradients import schedule
from hf_iclr.trainers.data_shapley.gradients.direction import pack_directions
from hf_iclr.trainers.data_shapley.identity import (
    RowKeys,
    _NumberedDataset,
    _RowCollator,
    content_id,
    take_rows,
    watched_loop,
)
from tests.trainers.data_shapley.test_callback import callback, make, token_rows
from tests.trainers.tiny import QUICK, tiny_llama, word_rows


TOKENS = ["input_ids", "labels"]
LORA = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)


def values(shapley):
    rows = shapley.result.rows
    return rows.groupby(["step", "id" if "id" in rows else "index"])["value"].sum()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("last", [False, True])
def test_every_row_is_known_whoever_loads_it(workers, last, tmp_path):
    """Rows of one repeated token: which row was in a batch can be read off its tokens."""
    seen = []

    class Seeing(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            if model.training:
                seen.extend(inputs["input_ids"][:, 0].tolist())
            return super().compute_loss(model, inputs, **kwargs)

    rows = Dataset.from_list([{"input_ids": [index + 1] * 6, "labels": [index + 1] * 6} for index in range(11)])
    shapley = InRunDataShapleyCallback(token_rows(3), 1)
    settings = {"num_train_epochs": 2, "max_steps": -1, "dataloader_drop_last": last}
    make(tmp_path, None, [shapley], rows, Seeing, dataloader_num_workers=workers, **settings).train()
    found = [index + 1 for index in shapley.result.rows["index"]]
    assert found == seen and len(found) == (16 if last else 22)


class Layouts(TrainerCallback):
    """Strides and alignment of the direction that step 3 has used."""

    def __init__(self, shapley):
        self.shapley = shapley

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            tensors = pack_directions(self.shapley._engine.targets.found)
            self.found = {name: (tensor.stride(), tensor.data_ptr() % 64) for name, tensor in tensors.items()}


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Bit for bit, on any processor: the same products of factors that lie in memory in the same way."""
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "logging_strategy": "no"}
    runs = []
    for folder in ("whole", "resumed"):
        shapley = callback(refresh_every=3, rank=2, id_column=None)
        layouts = Layouts(shapley)
        make(tmp_path / folder, tiny_llama(), [shapley, layouts], **settings).train()
        runs.append(values(shapley))
    assert runs[0].equals(runs[1])
    again = callback(refresh_every=3, rank=2)
    layouts_again = Layouts(again)
    trainer = make(tmp_path / "resumed", tiny_llama(seed=1), [again, layouts_again], **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-2"))
    assert layouts_again.found == layouts.found
    assert values(again).equals(runs[0])
    assert again.result.explained_ratio() == pytest.approx(shapley.result.explained_ratio(), rel=1e-6)


def test_a_run_within_a_budget_resumes_with_the_refreshes_it_had_chosen(tmp_path, monkeypatch):
    """By a clock that gives a second to each step, so that no other process has a say in the choice."""
    monkeypatch.setattr(schedule, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    settings = {"max_steps": 16, "save_strategy": "steps", "save_steps": 9, "logging_strategy": "no"}
    options = {"refresh_every": None, "cost": 1.0, "batch_size": 1, "rank": 2}
    whole, again = callback(**options), callback(**options)
    make(tmp_path, tiny_llama(), [whole], **settings).train()
    steps = whole.result.steps.set_index("step")
    refreshed = steps["energy_validation"].dropna().index
    assert len(refreshed) > 3 and list(steps["loss_validation"].dropna().index) == [1, 17]
    trainer = make(tmp_path, tiny_llama(seed=1), [again], **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert list(again.result.steps.set_index("step")["energy_validation"].dropna().index) == list(refreshed)
    assert values(again).equals(values(whole))


def test_a_direction_lies_in_memory_in_one_way_whatever_it_is_made_of():
    """Transposed, of one column with the strides of several, and beginning anywhere in a file."""
    transposed, column, amid = torch.randn(3, 16).T, torch.randn(3, 16).T[:, :1], torch.randn(49)[1:].view(16, 3)
    for tensor in (transposed, column, amid):
        found = contiguous_clone(tensor)
        assert torch.equal(found, tensor) and found.data_ptr() % 64 == 0
        assert found.stride() == torch.empty(tensor.shape).stride()


class KilledAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("settings", [{}, {"optim": "adamw_torch", "gradient_accumulation_steps": 2}])
def test_a_run_that_was_killed_and_resumed_is_the_uninterrupted_one(settings, tmp_path):
    settings = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        **settings,
    }
    options = {"refresh_every": 3, "rank": 2, "adam_warmup": 1}
    whole, killed, resumed = callback(**options), callback(**options), callback(**options)
    make(tmp_path / "whole", tiny_llama(), [whole], **settings).train()
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "killed", tiny_llama(), [killed, KilledAt(5)], **settings).train()
    assert killed.result.rows["step"].max() == 6  # two steps after the checkpoint
    make(tmp_path / "killed", tiny_llama(seed=1), [resumed], **settings).train(
        resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-4")
    )
    assert values(resumed).equals(values(whole))
    assert resumed.result.steps["loss_validation"].equals(whole.result.steps["loss_validation"])


def test_an_id_column_of_the_users_own(tmp_path):
    rows = token_rows(12).add_column("uid", [f"row {index}" for index in range(12)])
    shapley, by_index = callback(id_column="uid"), callback()
    make(tmp_path / "a", callbacks=[shapley], rows=rows, remove_unused_columns=False).train()
    make(tmp_path / "b", callbacks=[by_index]).train()
    named = {f"row {index}": value for (_, index), value in values(by_index).items()}
    assert {name: value for (_, name), value in values(shapley).items()} == named


@pytest.mark.parametrize("size", [1, 2])
def test_ids_of_256_bytes_come_through_and_longer_ones_are_refused(size):
    """Also of a batch of one row."""
    collate = _RowCollator(default_data_collator, False, "uid")
    rows = [{"uid": f"é{row}" * 85 + "x", "labels": row} for row in range(size)]
    assert len(rows[0]["uid"].encode()) == 256
    batch, found = take_rows(collate(rows))
    assert found == [row["uid"] for row in rows] and batch["labels"].tolist() == list(range(size))
    with pytest.raises(ValueError, match="at most 256 bytes, got 257"):
        collate([{"uid": rows[0]["uid"] + "x"}])
    for without in ({"labels": 1}, ("uid", 1)):
        with pytest.raises(ValueError, match="Expected rows with the column 'uid', the id_column, got"):
            collate([without])


def test_a_dataset_that_gives_fewer_rows_than_asked_for_is_an_error():
    class Losing(list):
        def __getitems__(self, indices):
            return [self[index] for index in indices[1:]]

    with pytest.raises(ValueError, match="shorter"):
        _NumberedDataset(Losing([{"labels": 1}] * 3)).__getitems__([0, 1])


def test_rows_of_a_stream_are_known_by_their_content(tmp_path):
    rows = token_rows(12)
    stream = IterableDataset.from_generator(lambda: iter(rows.to_list()))
    shapley = callback()
    make(tmp_path, callbacks=[shapley], rows=stream).train()
    assert set(shapley.result.rows["id"]) == {content_id(row) for row in rows}


def test_ids_of_contents_do_not_depend_on_how_numbers_are_kept():
    assert content_id([1, 2]) == content_id(torch.tensor([1, 2])) != content_id([2, 1])
    assert content_id([[1, 2], [3, 4]]) == content_id(torch.tensor([[1, 2], [3, 4]])) != content_id([1, 2, 3, 4])
    assert content_id({"a": "x", "b": [1.5]}) == content_id({"b": torch.tensor([1.5]), "a": "x"})


def test_a_numbered_dataset_is_the_dataset_but_for_its_rows():
    rows = _NumberedDataset(token_rows(3))
    assert rows.column_names == token_rows(3).column_names and len(rows) == 3
    assert pickle.loads(pickle.dumps(rows))[2] == (2, token_rows(3)[2]) == rows.__getitems__([0, 2])[1]
    with pytest.raises(AttributeError):
        _NumberedDataset.__new__(_NumberedDataset).dataset  # noqa: B018


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1.25], [1.5]),
        ([2**53], [2**53 + 1]),
        ({"input_ids": [1, 2], "labels": 0}, {"input_ids": [1, 2], "labels": 1}),
        ({"a": "bc"}, {"ab": "c"}),
        ([[1], [2, 3]], [[1, 2], [3]]),
        ({"a": None}, {"a": "None "}),
    ],
)
def test_all_of_a_row_counts(one, other):
    assert content_id(one) != content_id(other)


def test_a_watched_loop_over_tuples_sees_what_it_did():
    loader, seen = DataLoader(TensorDataset(torch.arange(5), torch.arange(5) * 2), batch_size=2, shuffle=True), []
    keys = RowKeys(loader)
    with watched_loop(loader, lambda rows, batch: seen.append(rows)):
        for left, right in loader:
            assert torch.equal(right, 2 * left) and seen[-1] == left.tolist()
    assert all(take_rows(batch)[1] is not None for batch in loader)
    keys.close()
    assert type(loader) is DataLoader and isinstance(loader.dataset, TensorDataset)
    assert len(list(loader)) == 3 and len(seen) == 3 and all(take_rows(batch)[1] is None for batch in loader)


def sft(folder, tokenizer, shapley, rows=None, model=None, peft=LORA, **settings):
    settings = {**QUICK, "optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.0, **settings}
    return SFTTrainer(
        model or tiny_llama(),
        args=SFTConfig(str(folder), **settings),
        train_dataset=word_rows(12) if rows is None else rows,
        processing_class=tokenizer,
        peft_config=peft,
        callbacks=[shapley],
    )


def raw_callback(**settings):
    return InRunDataShapleyCallback(word_rows(5, seed=3), **{"refresh_every": 1, "adam_warmup": 0, **settings})


def test_raw_text_in_an_sft_trainer(word_tokenizer, tmp_path):
    shapley = raw_callback(targets={"more": word_rows(3, seed=4)})
    trainer = sft(tmp_path, word_tokenizer, shapley, learning_rate=1e-4)
    trainer.train()
    assert set(shapley.result.rows["index"]) == set(range(12))
    assert shapley.result.explained_ratio() == pytest.approx(1, abs=0.1)
    rows = trainer.train_dataset
    for index, tokens in shapley.result.rows.groupby("index")["tokens"].first().items():
        assert tokens == sum(label != -100 for label in rows[index]["labels"])
    assert not any(key.startswith("eval_") for entry in trainer.state.log_history for key in entry)


def test_flattened_rows_have_the_values_of_padded_ones(word_tokenizer, tmp_path):
    found = []
    for settings in ({}, {"padding_free": True, "max_length": None}):
        shapley = raw_callback()
        model = tiny_llama()
        sft(tmp_path / str(len(found)), word_tokenizer, shapley, model=model, **settings).train()
        found.append(shapley.result.rows[["step", "index", "value"]])
    assert found[0]["index"].equals(found[1]["index"])
    assert found[1]["value"].tolist() == pytest.approx(found[0]["value"].tolist(), rel=1e-3, abs=1e-6)


def test_packed_rows_are_divided_into_their_sources(word_tokenizer, tmp_path):
    """With one step on everything, packing changes neither gradients nor values."""
    found = []
    for packing in (False, True):
        shapley, settings = raw_callback(), {"max_steps": 1, "per_device_train_batch_size": 12}
        trainer = sft(tmp_path / str(packing), word_tokenizer, shapley, packing=packing, max_length=24, **settings)
        if not packing:
            sources = {content_id(row, TOKENS): index for index, row in enumerate(trainer.train_dataset)}
        trainer.train()
        rows = shapley.result.rows
        keys = rows["id"].map(sources) if packing else rows["index"]
        found.append(dict(zip(keys, rows["value"], strict=True)))
    assert len(sources) == 12 and len(trainer.train_dataset) < 12
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-6)


def test_values_of_packed_texts_join_the_texts_before_packing(word_tokenizer, tmp_path):
    """Some are longer than `max_length`: both ways of preparing them cut them alike."""
    texts = [{"prompt": f"w{index + 1} ", "completion": "w40 " * (index + 1)} for index in range(12)]
    texts = Dataset.from_list(texts).add_column("source", ["a", "b", "c"] * 4)
    settings = {"max_length": 9, "max_steps": -1, "num_train_epochs": 1}
    single = sft(tmp_path / "single", word_tokenizer, raw_callback(), texts, **settings).train_dataset
    key = content_id(single[5], TOKENS)
    shapley = raw_callback(token_values_for=[key])
    trainer = sft(tmp_path / "packed", word_tokenizer, shapley, texts, packing=True, **settings)
    trainer.train()
    result = shapley.result
    known = result.values()
    assert len(known) == 12 > len(trainer.train_dataset)
    joined = result.to_dataset(single)
    assert joined["shapley_value"][:] == [known[content_id(row, TOKENS)] for row in single]
    kept = result.filter(single, within="source", keep=0.5)
    assert sorted(kept["source"][:]) == ["a"] * 2 + ["b"] * 2 + ["c"] * 2
    by_source = result.by_source("source", single).totals
    assert by_source["rows"].tolist() == [4] * 3 and by_source["value"].sum() == pytest.approx(known.sum())
    assert f"Row {key}" in result.token_heatmap([key], word_tokenizer, single)

    packed = trainer.train_dataset
    for join in (result.to_dataset, result.filter):
        for rows in (packed, packed.to_iterable_dataset()):
            with pytest.raises(ValueError, match="before packing: `SFTTrainer.*packing=False"):
                join(rows)
        with pytest.raises(ValueError, match="rows with input_ids, labels.*`SFTTrainer.*packing=False"):
            join(texts)
    with pytest.raises(ValueError, match="rows with input_ids, labels.*`SFTTrainer.*packing=False"):
        result.by_source("source", texts)
    with pytest.raises(ValueError, match="before packing: `SFTTrainer.*packing=False"):
        result.token_heatmap([key], word_tokenizer, packed)


@pytest.mark.parametrize("settings", [{"packing_strategy": "wrapped"}, {"id": "uid"}])
def test_packing_that_loses_rows_or_their_ids_is_refused(settings, word_tokenizer, tmp_path):
    settings = dict(settings)
    shapley = raw_callback(id_column=settings.pop("id", None))
    rows = word_rows(12).add_column("uid", list(range(12)))
    trainer = sft(tmp_path, word_tokenizer, shapley, rows, packing=True, max_length=24, **settings)
    message = "cuts texts into pieces. Use `packing_strategy='bfd'`" if settings else "Packing drops it"
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize("settings", [{}, {"padding_free": True, "max_length": None}])
@pytest.mark.parametrize("tied", [False, True])
def test_the_fused_output_layer_of_trl_is_scored(tied, settings, word_tokenizer, tmp_path, caplog):
    """Values are those of a plain Trainer, which calls the layer."""
    fused, called = raw_callback(exact=True, token_values_for=[3]), callback(exact=True)
    model = tiny_llama(tie_word_embeddings=tied)
    sft(tmp_path / "fused", word_tokenizer, fused, model=model, peft=None, **settings).train()
    called.datasets["validation"] = sft(tmp_path, word_tokenizer, called, word_rows(5, seed=3)).train_dataset
    plain = sft(tmp_path, word_tokenizer, called, peft=None)
    again = make(tmp_path / "called", tiny_llama(tie_word_embeddings=tied), [called], plain.train_dataset)
    again.data_collator = plain.data_collator
    again.train()
    assert "leave out" not in caplog.text
    assert fused.result.steps["scored_share"].iloc[0] == pytest.approx(1)
    expected = called.result.rows.set_index(["step", "index"])["value"]
    found = fused.result.rows.set_index(["step", "index"])
    assert found["value"].to_dict() == pytest.approx(expected.to_dict(), rel=1e-3, abs=1e-7)
    of_tokens = found.dropna(subset="token_values")
    assert of_tokens["token_values"].map(sum).tolist() == pytest.approx(of_tokens["value"].tolist(), rel=1e-3)


@pytest.mark.parametrize("full", [False, True])
def test_a_pair_of_dpo_is_a_row(full, word_tokenizer, tmp_path):
    def pairs(count, seed):
        rows = word_rows(count, seed=seed).to_list()
        others = word_rows(count, seed=seed + 50)["completion"]
        return Dataset.from_list(
            [
                {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other}
                for row, other in zip(rows, others, strict=True)
            ]
        )

    shapley = InRunDataShapleyCallback(pairs(5, 3), 1, adam_warmup=0)
    settings = {**QUICK, "optim": "sgd", "learning_rate": 1e-4, "max_grad_norm": 0.0, "gradient_accumulation_steps": 2}
    trainer = DPOTrainer(
        tiny_llama(tie_word_embeddings=False),
        args=DPOConfig(str(tmp_path), **{**settings, "per_device_train_batch_size": 2}),
        train_dataset=pairs(12, 1),
        processing_class=word_tokenizer,
        peft_config=None if full else LORA,
        ref_model=tiny_llama(tie_word_embeddings=False) if full else None,
        callbacks=[shapley],
    )
    trainer.train()
    assert sorted(shapley.result.rows["index"]) == list(range(12))
    if not full:
        assert shapley.result.explained_ratio() == pytest.approx(1, abs=0.1)
