"""What people give by mistake works, or is a sentence that names the argument before any step."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from hf_iclr.trainers.data_shapley.callback import InRunDataShapleyCallback
from hf_iclr.trainers.data_shapley.result import DataShapleyResult
from tests.trainers.data_shapley.test_attach import attached
from tests.trainers.data_shapley.test_callback import leftovers, lora, make, token_rows
from tests.trainers.data_shapley.test_identity import raw_callback, sft
from tests.trainers.tiny import tiny_llama, word_rows


BLANK = {"input_ids": [1, 2, 3, 4, 5, 6, 7, 8], "labels": [-100] * 8}


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ("rows.json", "validation set 'validation', got str .*load_dataset"),
        (DatasetDict(test=token_rows(2)), "one of its splits, test: `val_dataset=found..test..`"),
        ({"a": 1}, "validation set 'validation', got dict"),
        (3, "validation set 'validation', got int"),
        (Dataset, "validation set 'validation', got type"),
        (TensorDataset(torch.ones(3, 8)), "validation set 'validation', for its collator, got TensorDataset"),
        (DataLoader(token_rows(3)), "validation set 'validation', for its collator, got DataLoader"),
        (["a", "b"], "validation set 'validation', for its collator, got list"),
        (torch.ones(3, 8, dtype=torch.long), "validation set 'validation', got some whose loss can't be computed"),
        (Dataset.from_list([{"input_ids": "abc", "labels": "abc"}]), "validation set 'validation', got some whose"),
        (Dataset.from_list([{**BLANK, "labels": [800] * 8}]), "got some whose loss can't be computed .*800"),
        (Dataset.from_list([{"input_ids": [-1] * 8, "labels": [1] * 8}]), "set 'validation', got -1. Tokenise"),
        (Dataset.from_list([BLANK]), "rows with labels in the validation set 'validation', got none"),
    ],
)
def test_a_validation_set_of_another_kind_is_a_sentence(validation, message, tmp_path):
    trainer = make(tmp_path, callbacks=[InRunDataShapleyCallback(validation, 1)])
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0 and not leftovers(trainer.model)


def test_a_list_of_rows_is_a_validation_set(word_tokenizer, tmp_path):
    values = []
    for rows in (word_rows(5, seed=3), word_rows(5, seed=3).to_list()):
        shapley = InRunDataShapleyCallback(rows, 1)
        sft(tmp_path / str(len(values)), word_tokenizer, shapley).train()
        values.append(shapley.result.values())
    assert values[0].equals(values[1])


def test_validation_rows_without_a_label_are_left_out(tmp_path, caplog):
    values = []
    for rows in (token_rows(2, seed=5), Dataset.from_list([BLANK, *token_rows(2, seed=5)])):
        shapley = InRunDataShapleyCallback(rows, 1, batch_size=1)
        make(tmp_path / str(len(values)), callbacks=[shapley]).train()
        values.append(shapley.result.values())
    assert values[0].equals(values[1]) and "1 of 3 batches of the validation set 'validation'" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refresh_every": "20"}, "refresh_every, such as 20, got '20'"),
        ({"refresh_every": 2.5}, "refresh_every, such as 20, got 2.5"),
        ({"adam_warmup": True}, "adam_warmup.*got True"),
        ({"adam_warmup": None}, "adam_warmup.*got None"),
        ({"rank": "8"}, "rank.*got '8'"),
        ({"token_values_for": 3}, r"`token_values_for=\[3\]`"),
        ({"token_values_for": "abc"}, r"`token_values_for=\['abc'\]`"),
        ({"token_values_for": 2.5}, r"`token_values_for=\[2.5\]`"),
        ({"token_values_for": None}, "list of rows in token_values_for, got None"),
        ({"token_values_for": [[1]]}, r"positions or ids of rows in token_values_for.*got \[\[1\]\]"),
        ({"targets": [1]}, r"by name in targets.*got \[1\]"),
        ({"targets": {3: token_rows(2)}}, "by name in targets"),
        ({"batch_size": "8"}, "batch_size.*got '8'"),
        ({"exact": "yes"}, "exact=True or exact=False, got 'yes'"),
        ({"compute_loss": "mean"}, "function as compute_loss.*got 'mean'"),
        ({"id_column": 3}, "name of a column as id_column.*got 3"),
    ],
)
def test_options_of_another_kind_are_a_sentence(settings, message):
    with pytest.raises(TypeError, match=message):
        InRunDataShapleyCallback(token_rows(2), **settings)


WRONG = {"batch_size": 0, "adam_warmup": -1, "rank": -2, "min_scored_share": "0.8", "cost": "0.05"}


@pytest.mark.parametrize("settings", [{name: value} for name, value in (*WRONG.items(), ("cost", 0), ("cost", 1.5))])
def test_options_out_of_range_are_a_sentence(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}.*got"):
        InRunDataShapleyCallback(token_rows(2), **settings)


def square(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize("label", [float, lambda row: torch.tensor([float(row)])])
def test_a_loop_takes_a_list_of_rows_and_a_list_of_batches(label):
    rows = [(torch.randn(3, generator=torch.Generator().manual_seed(row)), label(row)) for row in range(6)]
    found = []
    for validation in (rows[:4], [next(iter(DataLoader(rows[:4], batch_size=4)))]):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer, loader = torch.optim.SGD(model.parameters(), lr=0.01), DataLoader(rows, batch_size=4)
        with InRunDataShapleyCallback.attach(
            model, optimizer, loader, validation, compute_loss=square, exact=True
        ) as shapley:
            for batch in loader:
                square(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
        found.append(shapley.result.values().tolist())
    assert found[0] == pytest.approx(found[1]) and len(found[0]) == 6


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(12.0).view(4, 3) / 12)


@pytest.mark.parametrize("validation", [torch.ones(2, 3), [torch.ones(2, 3)]])
def test_a_loop_over_a_stream_has_values(validation):
    model = nn.Linear(3, 1)
    optimizer, loader = torch.optim.SGD(model.parameters(), lr=0.01), DataLoader(Stream(), batch_size=2)
    options = {"compute_loss": lambda m, b: m(b).square().mean()}
    with InRunDataShapleyCallback.attach(model, optimizer, loader, validation, **options) as shapley:
        for batch in loader:
            options["compute_loss"](model, batch).backward()
            optimizer.step()
    assert len(shapley.result.values()) == 4 and shapley.result.key == "id"


def test_a_loop_over_or_of_something_else_is_refused(tmp_path):
    model = nn.Linear(3, 1)
    optimizer, rows = torch.optim.SGD(model.parameters(), lr=0.01), torch.ones(2, 3)
    loader, file = DataLoader(rows, batch_size=2), tmp_path / "file"
    file.write_text("")
    for arguments, options, message in (
        ((model, optimizer, [rows]), {}, "the loop's torch.utils.data.DataLoader, got list"),
        ((model, None, loader), {}, "got Linear and NoneType"),
        ((model.forward, optimizer, loader), {}, "got method and SGD"),
        ((model, optimizer, loader), {"output_dir": 3}, "folder as output_dir, got 3"),
        ((model, optimizer, loader), {"output_dir": file}, "folder as output_dir, got the file"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            attached(*arguments, rows, compute_loss=lambda m, b: m(b).mean(), **options)
    apart = InRunDataShapleyCallback.attach(model, optimizer, loader, rows, compute_loss=lambda m, b: b.mean())
    with pytest.raises(ValueError, match="validation loss that depends on what is trained"), apart:
        next(iter(loader))


def test_a_loop_with_nan_or_dora_is_refused():
    model = nn.Linear(3, 1)
    optimizer, loader = torch.optim.SGD(model.parameters(), lr=0.01), DataLoader(torch.randn(4, 3), batch_size=2)
    with pytest.raises(ValueError, match="numbers in the validation set 'validation', got NaN"):
        attached(model, optimizer, loader, torch.full((2, 3), torch.nan), compute_loss=lambda m, b: m(b).mean())
    with pytest.raises(ValueError, match="finite loss of the validation set 'validation', got nan"):
        attached(model, optimizer, loader, torch.ones(2, 3), compute_loss=lambda m, b: m(b).mean() * torch.nan)
    model = lora(tiny_llama(), use_dora=True)
    loader = DataLoader(token_rows(4).with_format("torch"), batch_size=2)
    with pytest.raises(ValueError, match="DoRA, whose magnitudes"):
        attached(model, torch.optim.SGD(model.parameters(), lr=0.01), loader, loader)


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"a folder {tmp_path}/nothing.*no such folder"):
        DataShapleyResult.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=f"values of a run in {tmp_path}/nothing, found none"):
        DataShapleyResult.from_store(tmp_path / "nothing")


def test_a_stored_result_remembers_the_id_column(tmp_path):
    rows = token_rows(12).add_column("uid", [f"row {index}" for index in range(12)])
    shapley = InRunDataShapleyCallback(token_rows(5, seed=9), 1, id_column="uid")
    make(tmp_path, callbacks=[shapley], rows=rows, remove_unused_columns=False).train()
    stored = DataShapleyResult.from_store(str(tmp_path))
    expected = shapley.result.to_dataset(rows)["shapley_value"][:]
    assert stored.to_dataset(rows.select(range(11, -1, -1)))["shapley_value"][:] == expected[::-1]


def test_raw_rows_are_not_needed_twice(word_tokenizer, tmp_path):
    """The callback is used again, with the same validation set."""
    shapley = raw_callback()
    for run in range(2):
        sft(tmp_path / str(run), word_tokenizer, shapley).train()
        assert len(shapley.result.values()) == 12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda result: result.top("10"), "number of rows such as 10, got '10'"),
        (lambda result: result.bottom(-1), "number of rows such as 10, got -1"),
        (lambda result: result.values(normalize=["token"]), "'step', got .'token'."),
        (lambda result: result.filter(token_rows(12), True), "a share in .0, 1. such as 0.8, got True"),
        (lambda result: result.filter(token_rows(12), 0.5, within="no"), "`within`, one of .*got 'no'"),
        (lambda result: result.filter(token_rows(12).to_list()), "got list. Give .*`Dataset.from_list"),
        (lambda result: result.by_source(3), "one label for each row, got 3"),
        (lambda result: result.from_store(None), "output folder of a run, got None"),
    ],
)
def test_what_a_result_is_asked_by_mistake_is_a_sentence(call, message, tmp_path):
    shapley = InRunDataShapleyCallback(token_rows(5, seed=9), 1)
    make(tmp_path, callbacks=[shapley]).train()
    with pytest.raises((TypeError, ValueError), match=message):
        call(shapley.result)


def test_values_can_be_added_again_and_read_from_the_folder_of_runs(tmp_path):
    shapley = InRunDataShapleyCallback(token_rows(5, seed=9), 1)
    make(tmp_path, callbacks=[shapley]).train()
    once = shapley.result.to_dataset(token_rows(12))
    again = DataShapleyResult.from_store(tmp_path / "shapley").to_dataset(once)
    assert again["shapley_value"][:] == once["shapley_value"][:]
