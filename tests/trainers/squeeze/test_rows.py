"""Rows, their number and their share; the warning; bad input."""

import logging
from collections import Counter

import pytest
from datasets import Dataset, DatasetDict
from trl import SFTConfig, SFTTrainer

from hf_iclr.trainers.squeeze.rows import encode_answer, extend_for_sft, preference_rows, text_of, with_text
from tests.trainers.squeeze.pairs_and_logs import pair_rows
from tests.trainers.tiny import QUICK, tiny_llama


def answers(pairs, rows):
    """How many rows are chosen and rejected answers of their own prompt."""
    expected = {row["prompt"]: row for row in pairs}
    kinds = Counter()
    for row in rows:
        pair = expected[row["prompt"]]
        kinds["chosen" if row["completion"] == pair["chosen"] else "rejected"] += 1
        assert row["completion"] in (pair["chosen"], pair["rejected"])
    return kinds["chosen"], kinds["rejected"]


@pytest.mark.parametrize(
    ("ratio", "match", "expected"),
    [(1.0, False, (20, 20)), (0.5, False, (20, 10)), (0.0, False, (20, 0)), (1.0, True, (10, 10)),
     (0.25, True, (16, 4)), (0.0, True, (20, 0))],
)  # fmt: skip
def test_rows(ratio, match, expected):
    pairs = pair_rows(20)
    rows = extend_for_sft(pairs, rejected_ratio=ratio, match_compute=match)
    assert answers(pairs, rows) == expected
    assert rows.column_names == ["prompt", "completion"]
    if match:  # an epoch of as many rows, every prompt once
        assert sorted(rows["prompt"]) == sorted(pairs["prompt"])


def test_order_and_choice_come_from_the_seed():
    pairs = pair_rows(20)
    assert extend_for_sft(pairs, seed=3).to_list() == extend_for_sft(pairs, seed=3).to_list()
    assert extend_for_sft(pairs, seed=3).to_list() != extend_for_sft(pairs, seed=4).to_list()
    assert extend_for_sft(pairs, match_compute=False)["completion"][:20] != pairs["chosen"]


def test_warns_against_shipping(caplog):
    with caplog.at_level(logging.WARNING):
        extend_for_sft(pair_rows(4), rejected_ratio=0.0)
        assert not caplog.records
        extend_for_sft(pair_rows(4))
    assert "do not ship it" in caplog.text
    assert "not to be shipped" in extend_for_sft.__doc__


def test_chats_with_implicit_prompts_train(tmp_path, word_tokenizer):
    def chat(*texts):
        return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=False)]

    pairs = Dataset.from_list([{"chosen": chat(f"w{i}", "w1 w2"), "rejected": chat(f"w{i}", "w3")} for i in range(4)])
    rows = extend_for_sft(pairs, match_compute=False)
    assert (
        len(rows) == 8 and rows[0]["prompt"][0]["role"] == "user" and rows[0]["completion"][0]["role"] == "assistant"
    )
    trainer = SFTTrainer(
        tiny_llama(),
        SFTConfig(str(tmp_path), **{**QUICK, "max_steps": 1}),
        train_dataset=extend_for_sft(pair_rows(4)),
        processing_class=word_tokenizer,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"prompt": "a", "good": "b", "rejected": "c"}],
            {},
            "prompt, chosen, rejected and a row, got prompt, good",
        ),
        (
            [{"prompt": "a", "chosen": "b", "rejected": ""}],
            {},
            "are empty, the first being `rejected` in row 0",
        ),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], {"rejected_ratio": 1.5}, r"lie in \[0, 1\], got 1.5"),
    ],
)
def test_bad_input(rows, options, message):
    with pytest.raises(ValueError, match=message):
        extend_for_sft(Dataset.from_list(rows), **options)


# --- what may be given as rows


def chat(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=False)]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (None, TypeError, "Expected pairs as a `datasets.Dataset` or a list of rows, got None. For example"),
        ("pairs.jsonl", TypeError, r"got 'pairs.jsonl'. For example `load_dataset\(path"),
        (
            pair_rows(2).to_iterable_dataset(),
            TypeError,
            r"got a stream. .*Dataset.from_list\(list\(pairs.take\(1000\)\)",
        ),
        (
            DatasetDict({"train": pair_rows(2), "test": pair_rows(2)}),
            TypeError,
            r"dictionary of train, test. Type `pairs",
        ),
        (["a", "b"], TypeError, "each a dictionary, got 'a'"),
        ([], ValueError, "got no column and 0 rows"),
        ([{"prompt": "a", "chosen": 1, "rejected": 2}], ValueError, "got text in prompt, int64 in chosen"),
        ([{"prompt": chat("a"), "chosen": "b", "rejected": "c"}], ValueError, "messages in prompt, text in chosen"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": 3}], ValueError, "a mixture"),
    ],
)
def test_no_rows_are_one_sentence(rows, error, message):
    with pytest.raises(error, match=message):
        preference_rows(rows, "pairs")


def test_a_list_and_an_iterator_are_rows():
    rows = pair_rows(3)
    assert preference_rows(list(rows), "pairs").to_list() == rows.to_list()
    assert preference_rows(iter(list(rows)), "pairs").to_list() == rows.to_list()
    assert preference_rows(rows, "pairs") is rows
    implicit = [{"chosen": chat("q", "a b"), "rejected": chat("q", "c")}]
    assert preference_rows(implicit, "pairs")[0]["prompt"] == chat("q")


def test_texts_in_parts():
    parts = [{"type": "image"}, {"type": "text", "text": " a b"}, {"type": "text", "text": "c"}]
    answer = [{"role": "assistant", "content": parts}]
    assert text_of(answer) == " a bc" and text_of(chat("q", "a")) == "a" and text_of([]) == text_of(None) == ""
    said = with_text(answer, "x y")
    assert said == [{"role": "assistant", "content": [{"type": "text", "text": " x y"}]}]
    assert with_text(" a", "b") == " b" and with_text("a", " ") == "" and with_text(answer, "") == []


def test_truncation_keeps_the_end_that_is_asked_for(word_tokenizer):
    row = {"prompt": "w1 w2 w3 ", "chosen": "w4 w5 "}
    assert encode_answer(word_tokenizer, row, "chosen", None) == ([1, 2, 3], [4, 5, 49])
    assert encode_answer(word_tokenizer, row, "chosen", 4) == ([1, 2, 3], [4])
    assert encode_answer(word_tokenizer, row, "chosen", 4, keep_end=True) == ([3], [4, 5, 49])
    assert encode_answer(word_tokenizer, row, "chosen", 2, keep_end=True) == ([], [5, 49])
    assert encode_answer(word_tokenizer, row, "chosen", 3) == ([1, 2, 3], [])


def test_what_the_template_is_told_goes_with_the_rows_for_sft():
    pairs = Dataset.from_list(
        [{**row, "chat_template_kwargs": {"thinking": index % 2 == 0}} for index, row in enumerate(pair_rows(6))]
    )
    rows = extend_for_sft(pairs, match_compute=False)
    told = dict(zip(pairs["prompt"], pairs["chat_template_kwargs"], strict=True))
    assert all(told[row["prompt"]] == row["chat_template_kwargs"] for row in rows) and len(rows) == 12
