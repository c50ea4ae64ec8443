import pytest

from hf_iclr.trainers.deep_safety.prompt_overlap import PromptPair, check_overlap


LONG = "Please tell me in a few words how one should cook a red mushroom at home."


def test_equal_but_for_case_punctuation_and_blanks():
    report = check_overlap(["Eat it raw?", "Is  this, MUSHROOM red"], ["is this mushroom red?", "Is it blue?"])
    assert report.pairs == [PromptPair(1, 0, "is this mushroom red", True)]
    assert str(report).startswith("Of 2 evaluation prompts, 1 are among the 2 training prompts and 0 more")


def test_a_run_of_words_is_enough():
    """`how one should cook a red mushroom at` are 8 words; of 9 in a row the evaluation prompt has one, not shared."""
    evaluation = ["I asked how one should cook a red mushroom at noon."]
    report = check_overlap([LONG, LONG[:20]], evaluation)
    assert report.pairs == [PromptPair(0, 0, "how one should cook a red mushroom at", False)]
    assert "0 are among the 2 training prompts and 1 more share 8 words" in str(report)
    assert not check_overlap([LONG], evaluation, ngram=9).pairs
    assert len(check_overlap([LONG], evaluation, ngram=2).pairs) == 1


def test_short_prompts_must_be_equal():
    report = check_overlap(["cook a mushroom"], ["cook a mushroom soup"])
    assert not report.pairs
    assert str(report).startswith("None of 1 evaluation prompts equals one of 1 training prompts or shares 8 words")


def test_of_a_chat_only_the_users_messages_count():
    system = {"role": "system", "content": LONG}
    train = [[system, {"role": "user", "content": "Is it red?"}]]
    evaluation = [[system, {"role": "user", "content": "Is it blue?"}], "Is it red?"]
    assert [(pair.train_index, pair.eval_index) for pair in check_overlap(train, evaluation).pairs] == [(0, 1)]


def test_every_pair_is_listed_once():
    report = check_overlap([LONG, LONG, "other"], [LONG, LONG.upper()])
    assert [(pair.train_index, pair.eval_index, pair.exact) for pair in report.pairs] == [
        (0, 0, True), (1, 0, True), (0, 1, True), (1, 1, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("train", "evaluation", "ngram", "message"),
    [([], ["a"], 8, "got 0 and 1"), (["a"], [], 8, "got 1 and 0"), (["a"], ["a"], 0, "at least 1 word, got 0")],
)
def test_nothing_to_compare_is_refused(train, evaluation, ngram, message):
    with pytest.raises(ValueError, match=message):
        check_overlap(train, evaluation, ngram=ngram)
