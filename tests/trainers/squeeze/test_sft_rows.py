"""Rows, their number and their share; the warning; bad input."""

import logging
from collections import Counter

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from hf_iclr.trainers.squeeze.sft_rows import extend_for_sft
from tests.trainers.squeeze.toy import pair_rows
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
        ([{"prompt": "a", "good": "b", "rejected": "c"}], {}, "columns prompt, chosen and rejected, got prompt, good"),
        ([{"prompt": "a", "chosen": "b", "rejected": ""}], {}, "1 of the rejected ones are empty, the first in row 0"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], {"rejected_ratio": 1.5}, r"lie in \[0, 1\], got 1.5"),
    ],
)
def test_bad_input(rows, options, message):
    with pytest.raises(ValueError, match=message):
        extend_for_sft(Dataset.from_list(rows), **options)
