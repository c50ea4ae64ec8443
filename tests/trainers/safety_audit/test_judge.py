"""The refusal judge on styles it hasn't seen, its plugs, and what it says about agreement."""

import sys

import pandas as pd
import pytest
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, pipeline

from hf_iclr.trainers.safety_audit.judge import RefusalJudge, find_refusal_cue, judge_agreement
from hf_iclr.trainers.safety_audit.judge_texts import ANSWERS as ANSWER_FAMILIES
from hf_iclr.trainers.safety_audit.judge_texts import REFUSALS as REFUSAL_FAMILIES
from hf_iclr.trainers.safety_audit.judge_texts import make_refusal_texts
from tests.trainers.safety_audit.refusal_examples import ANSWERS, REFUSALS


@pytest.fixture(scope="module")
def judge():
    return RefusalJudge()


def test_unseen_styles(judge):
    """As first measured on these 25 + 25 texts: 22 refusals found, 2 false alarms; either judge alone finds fewer."""
    votes = judge.votes(REFUSALS + ANSWERS)
    found, alarms = votes[:25].sum(), votes[25:].sum()
    assert (found["refusal"], alarms["refusal"]) == (22, 2)
    assert found["cues"] == 18 and found["classifier"] == 17 and alarms["classifier"] == 0


def test_only_the_opening_counts(judge):
    answer = "Mushrooms grow from spores in damp soil under old trees. " * 8
    assert judge.judge([answer + "I'm sorry, but I can't help with that.", "I can't help with that. " + answer]) == [
        False,
        True,
    ]


@pytest.mark.parametrize("apostrophe", ["'", "\u2019", "\u2018", "`", "\u00b4"])
def test_apostrophes(apostrophe):
    text = f"Well. I{apostrophe}m sorry, I can{apostrophe}t help with that."
    assert find_refusal_cue(text) == 6
    assert find_refusal_cue(f"I don{apostrophe}t mind at all.") is None


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_an_empty_text_is_no_refusal(judge, text):
    assert judge.judge([text]) == [False]
    assert RefusalJudge([lambda texts: [True] * len(texts)]).judge([text]) == [False]


@pytest.mark.parametrize(
    "text", ["I", "I I I I I I I I", "the the the", "I am I am I am", "\ufffd\ufffdi", "No no no no"]
)
def test_babble_is_no_refusal(judge, text):
    assert judge.judge([text]) == [False]


def test_nothing_to_judge(judge):
    assert judge.judge([]) == [] and list(judge.votes([])) == ["cues", "classifier", "refusal"]


def test_texts_are_reproducible_and_balanced():
    texts, labels = make_refusal_texts(copies=10)
    assert (texts, labels) == make_refusal_texts(copies=10) and texts != make_refusal_texts(copies=10, seed=1)[0]
    assert sum(labels) == 10 * len(REFUSAL_FAMILIES) and len(labels) == sum(labels) + 10 * len(ANSWER_FAMILIES)
    assert not any("{" in text for text in texts)
    without = make_refusal_texts(copies=10, leave_out="policy")[0]
    assert len(without) == len(texts) - 10 and not any(
        text.startswith("My guidelines do not allow") for text in without
    )


def test_classifier_is_fitted_once(judge, monkeypatch):
    judge.judge(["No."])
    monkeypatch.setattr("hf_iclr.trainers.safety_audit.judge.fit_refusal_classifier", None)
    assert judge.judge(["No.", "I can't help with mushrooms."])[1]


def test_functions_as_judges():
    def short(texts):
        return [len(text) < 5 for text in texts]

    def asked(texts, prompts):
        return [prompt == "forbidden" for prompt in prompts]

    votes = RefusalJudge([short, asked]).votes(["No.", "Yes, of course"], prompts=["allowed", "forbidden"])
    assert votes.to_dict("list") == {"short": [True, False], "asked": [False, True], "refusal": [True, True]}
    assert list(RefusalJudge({"mine": short, "his": short}).votes(["No."])) == ["mine", "his", "refusal"]


@pytest.fixture
def classifier_folder(tmp_path):
    """A sequence classifier that calls everything `rejection`."""
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nno\nyes")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=6, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        id2label={0: "fine", 1: "rejection"}, label2id={"fine": 0, "rejection": 1},
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    model.classifier.weight.data.zero_()
    model.classifier.bias.data.copy_(model.classifier.bias.new_tensor([0.0, 3.0]))
    model.save_pretrained(tmp_path)
    return str(tmp_path)


def test_text_classification_models(classifier_folder):
    pipe = pipeline("text-classification", model=classifier_folder)
    for judge in (pipe, classifier_folder):
        assert RefusalJudge([judge], refusal_label="rejection").judge(["no", "yes"]) == [True, True]
        assert RefusalJudge([judge], refusal_label="fine").judge(["no"]) == [False]
        with pytest.raises(ValueError, match="one of fine, rejection; got None"):
            RefusalJudge([judge])


def test_agreement():
    """
    Of 10 texts the judges agree on 7 (4 refused, 3 not). Shares .5 and .6: agreement by chance .5 x .6 + .5 x .4 = .5,
    kappa = (.7 - .5) / (1 - .5) = .4.
    """
    votes = pd.DataFrame({"a": [True] * 5 + [False] * 5, "b": [True] * 4 + [False] + [True] * 2 + [False] * 3})
    row = judge_agreement(votes).iloc[0]
    assert (row["first"], row["second"], row["n"]) == ("a", "b", 10)
    assert row["agreement"] == pytest.approx(0.7) and row["kappa"] == pytest.approx(0.4)


def test_agreement_of_one_and_of_equal_judges(judge):
    assert judge_agreement(pd.DataFrame({"a": [True]})).empty
    assert judge_agreement(pd.DataFrame({"a": [True, True], "b": [True, True]}))["kappa"].item() == 1.0
    assert judge.agreement(REFUSALS + ANSWERS)["agreement"].item() > 0.7


@pytest.mark.parametrize(
    ("judges", "error", "words"),
    [
        ([], ValueError, "at least one judge"),
        (["cues", "cues"], ValueError, "different names"),
        ([3], TypeError, "got int"),
    ],
)
def test_bad_judges(judges, error, words):
    with pytest.raises(error, match=words):
        RefusalJudge(judges)


def test_bad_texts(judge):
    with pytest.raises(TypeError, match="got one string"):
        judge.judge("No.")
    with pytest.raises(ValueError, match="one prompt a text, got 2 and 1"):
        judge.judge(["No."], prompts=["a", "b"])
    with pytest.raises(ValueError, match="Expected 2 verdicts of the judge 'lazy', got 1"):
        RefusalJudge({"lazy": lambda texts: [True]}).judge(["a", "b"])


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert RefusalJudge(["cues"]).judge(["I can't help with that."]) == [True]
    with pytest.raises(ImportError, match=r"pip install 'hf_iclr\[metrics\]'`. Or leave that judge out"):
        RefusalJudge()
