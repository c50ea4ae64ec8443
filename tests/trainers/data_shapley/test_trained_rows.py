"""Values land on the rows that were trained on, also where a trainer dropped, shuffled or changed some, or nowhere."""

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from hf_iclr.trainers.data_shapley.result import DataShapleyResult
from hf_iclr.trainers.data_shapley.trained_rows import TrainedRows
from tests.trainers.data_shapley.test_identity import raw_callback, sft


DROPPED = (0, 3)
TEXTS = Dataset.from_list([{"prompt": f"p{row}", "answer": f"answer number {row}", "source": "s"} for row in range(6)])


def all_of(count):
    return pd.RangeIndex(count, name="index")


def positions(trained, dataset):
    return list(TrainedRows.of(trained).keys(dataset, all_of(len(trained))))


def prepared(rows, dropped=()):
    """As TRL leaves them: a token at the end of answers, columns of its own, some rows gone."""
    rows = rows.select([row for row in range(len(rows)) if row not in dropped])
    return rows.map(lambda row: {"answer": row["answer"] + "</s>", "input_ids": [ord(row["answer"][-1])]})


def test_rows_that_trl_drops_get_no_value_and_shift_none(word_tokenizer, tmp_path):
    """Those whose answer `max_length` cuts off."""
    rows = Dataset.from_list(
        [{"prompt": "w1 " * (30 if i in DROPPED else 3), "completion": f"w{i + 2} w{i + 3} "} for i in range(12)]
    ).add_column("source", ["a", "b"] * 6)
    kept = [i for i in range(12) if i not in DROPPED]
    settings = {"max_length": 16, "per_device_train_batch_size": 2, "max_steps": 5}
    shapley, alone = raw_callback(), raw_callback()
    trainer = sft(tmp_path / "a", word_tokenizer, shapley, rows, **settings)
    trainer.train()
    single = sft(tmp_path / "b", word_tokenizer, alone, rows.select(kept), **settings)
    single.train()
    truth = dict(zip(kept, alone.result.to_dataset(rows.select(kept))["shapley_value"], strict=True))
    result = shapley.result
    assert result.to_dataset(rows)["shapley_value"][:] == pytest.approx([truth.get(i) for i in range(12)])
    best = [i for i in kept if truth[i] > 0]
    answers = rows["completion"][:]
    assert result.filter(rows, keep_unseen=False)["completion"][:] == [answers[i] for i in best]
    totals = result.by_source("source", rows).totals["value"]
    assert totals["a"] == pytest.approx(sum(truth[i] for i in kept if i % 2 == 0))
    stored = DataShapleyResult.from_store(tmp_path / "a")  # knows no more than the number of rows and some contents
    assert np.allclose(stored.to_dataset(trainer.train_dataset)["shapley_value"][:], [truth[i] for i in kept])
    with pytest.raises(ValueError, match="the 10 rows that were trained on, .*got 12 rows.*Give trainer"):
        stored.to_dataset(rows)
    with pytest.raises(ValueError, match="each of the 10 trained rows, got 12 labels"):
        result.by_source(["a"] * 12)


@pytest.mark.parametrize("dropped", [(), (0,), (2, 5), (0, 1, 4)])
@pytest.mark.parametrize("order", [range(6), (3, 0, 5, 1, 4, 2)])
def test_rows_are_found_by_what_the_trainer_left_as_it_was(dropped, order):
    kept = [row for row in range(6) if row not in dropped]
    expected = [kept.index(row) if row in kept else -1 for row in order]
    assert positions(prepared(TEXTS, dropped), TEXTS.select(order)) == expected


def test_a_part_of_the_rows_is_found(caplog):
    assert positions(prepared(TEXTS), TEXTS.select([1, 4])) == [1, 4]
    assert "4 of 6 rows with a value are not among these" in caplog.text


def test_equal_rows_share_their_fate():
    twice = TEXTS.select([0, 1, 1, 2, 2])
    assert positions(prepared(twice, (3, 4)), twice) == [0, 1, 2, -1, -1]


@pytest.mark.parametrize(
    ("columns", "order", "dropped"),
    [
        (["answer"], (1, 0, 2, 3, 4, 5), ()),  # whose end the trainer has changed: only in their order
        (["source", "answer"], (1, 0, 2, 3, 4, 5), ()),
        (["source"], range(6), (2,)),  # all alike: which is gone?
        (["answer"], range(6), (2,)),
    ],
)
def test_what_cannot_be_told_is_refused(columns, order, dropped):
    rows = TEXTS.select_columns(columns)
    trained = prepared(TEXTS, dropped).select_columns([*columns, "input_ids"])
    with pytest.raises(ValueError, match="can't be told which those are.*Give trainer.train_dataset"):
        positions(trained, rows.select(order))


def test_texts_in_their_order_with_a_token_at_the_end_are_the_same_rows():
    rows = TEXTS.select_columns(["answer"])
    assert positions(prepared(rows), rows) == list(range(6))


def test_other_rows_of_the_same_number_are_refused():
    other = Dataset.from_list([{"prompt": f"q{row}", "answer": f"b{row}", "source": "s"} for row in range(6)])
    for trained in (TrainedRows.of(prepared(TEXTS)), TrainedRows.from_facts(TrainedRows.of(prepared(TEXTS)).facts())):
        with pytest.raises(ValueError, match="can't be told"):
            trained.keys(other, all_of(6))


def test_stored_facts_are_enough_for_the_same_rows_in_their_order():
    trained = TrainedRows.from_facts(TrainedRows.of(prepared(TEXTS)).facts())
    assert list(trained.keys(TEXTS, all_of(6))) == list(range(6))
    texts = TEXTS.select_columns(["answer"])
    assert list(TrainedRows(length=6, digests=trained.digests).keys(texts, all_of(6))) == list(range(6))
    for wrong in (TEXTS.select([1, 0, 2, 3, 4, 5]), TEXTS.select(range(5)), TEXTS.shuffle(seed=1)):
        with pytest.raises(ValueError, match="can't be told"):
            trained.keys(wrong, all_of(6))


@pytest.mark.parametrize("order", [[0], [0, 1, 0]])
def test_rows_in_their_order_are_found_be_it_one_or_one_twice(order):
    rows = TEXTS.select(order)
    assert positions(prepared(rows), rows) == list(range(len(order)))


@pytest.mark.parametrize("facts", [{"columns": [3]}, {"digests": {"answer": 3}}, {"id_column": 3}, {"length": "6"}])
def test_facts_of_another_kind_are_refused(facts):
    with pytest.raises(TypeError, match="of the trained rows that are no text|that is no count"):
        TrainedRows.from_facts({**TrainedRows.of(TEXTS).facts(), **facts})


def test_joined_rows_of_other_columns_are_not_taken_for_one_dataset():
    with pytest.raises(ValueError, match="can't be told"):
        TrainedRows.of(ConcatDataset([TEXTS, TEXTS.select_columns(["prompt"])])).keys(TEXTS, all_of(6))


def test_what_pytorch_has_selected_or_joined_is_followed():
    halves = ConcatDataset([Subset(TEXTS, [5, 3, 0]), Subset(Subset(TEXTS, [4, 2, 1]), [2, 0])])
    assert list(TrainedRows.of(halves).keys(TEXTS, all_of(5))) == [2, 3, -1, 1, 4, 0]


def test_rows_of_another_kind_are_compared_or_refused():
    rows = [{"prompt": row["prompt"], "ids": torch.tensor([place, 1])} for place, row in enumerate(TEXTS)]
    listed = TrainedRows.of(rows)
    for trained in (listed, TrainedRows.from_facts(listed.facts())):
        assert list(trained.keys(TEXTS, all_of(6))) == list(range(6))
        ids = Dataset.from_list([{"ids": [place, 1]} for place in range(6)])
        assert list(trained.keys(ids, all_of(6))) == list(range(6))
        with pytest.raises(ValueError, match="can't be told"):
            trained.keys(TEXTS.select([1, 0, 2, 3, 4, 5]), all_of(6))
    for unknown in (TensorDataset(torch.arange(6)), [(row,) for row in range(6)]):
        with pytest.raises(ValueError, match="can't be told"):
            TrainedRows.of(unknown).keys(TEXTS, all_of(6))


def test_a_stream_has_no_positions():
    with pytest.raises(ValueError, match="by position in trainer.train_dataset, got a stream"):
        TrainedRows.of(TEXTS).check_stream(TEXTS.to_iterable_dataset(), all_of(6))


@pytest.mark.parametrize("columns", [[], ["source"]])
def test_rows_that_share_no_column_that_tells_them_apart_are_refused(columns):
    """They may have been shuffled before they were tokenised; only the trainer's own are known."""
    trained = prepared(TEXTS).select_columns([*columns, "input_ids"])
    stored = TrainedRows.from_facts(TrainedRows.of(trained).facts())
    for known in (TrainedRows.of(trained), stored):
        with pytest.raises(ValueError, match="can't be told which those are.*Give trainer.train_dataset"):
            known.keys(TEXTS.select_columns(["answer", *columns]), all_of(6))
        assert list(known.keys(trained, all_of(6))) == list(range(6))


def test_texts_are_also_known_by_their_beginnings_if_they_are_long_enough():
    rows = Dataset.from_dict({"seven": ["abcdefg", "bcdefgh"], "eight": ["abcdefgh", "bcdefghi"], "n": [1, 2]})
    rows = rows.add_column("long", ["a" * 90, "b" * 80]).add_column("same", ["c" * 20] * 2)
    assert set(TrainedRows.of(rows).digests) == {"seven", "eight", "eight[:4]", "n", "long", "long[:32]"}


def test_rows_of_which_nothing_is_known_are_taken_as_they_come():
    """Enough of them must be there."""
    assert list(TrainedRows().keys(TEXTS, all_of(4))) == list(TrainedRows().keys(TEXTS, all_of(6))) == list(range(6))
    with pytest.raises(ValueError, match="the 7 rows that were trained on, .*got 6 rows"):
        TrainedRows().keys(TEXTS, all_of(7))
