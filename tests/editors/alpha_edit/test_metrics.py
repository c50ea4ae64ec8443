"""Metrics of edits against numbers by hand."""

import math

import pandas as pd
import pytest

from hf_iclr.editors.alpha_edit.scoring import edit_success, harmonic_mean, ngram_entropy


NAN = float("nan")
COLUMNS = ["request", "kind", "nll_new", "nll_true", "accuracy"]
# Two requests; the second has two paraphrases and no neighbourhood.
ROWS = [
    ("a", "rewrite", 1.0, 2.0, 1.0),
    ("a", "paraphrase", 3.0, 2.0, 0.5),
    ("a", "neighborhood", 3.0, 2.0, 1.0),
    ("a", "neighborhood", 2.0, 2.0, 0.0),
    ("b", "rewrite", 2.0, 1.0, 0.25),
    ("b", "paraphrase", 1.0, 2.0, 1.0),
    ("b", "paraphrase", 1.0, NAN, 0.0),
]


def columns(rows):
    return dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))


def test_scores_by_hand():
    """
    Efficacy: a wins, b does not: 1/2. Generalisation: a 0, b 1 (the prompt without a true answer is left out): 1/2.
    Specificity, of a alone: the true answer wins once and draws once: 1/2. Their harmonic mean is 1/2.
    Tokens: (1 + 1/4) / 2, (1/2 + (1 + 0) / 2) / 2 and (1 + 0) / 2.
    """
    scores = edit_success(**columns(ROWS))
    assert [scores[name] for name in ("efficacy", "generalisation", "specificity", "score")] == [0.5] * 4
    assert [scores[f"{name}_argmax"] for name in ("efficacy", "generalisation", "specificity")] == [0.5, 0.25, 0.5]
    assert [scores[f"{name}_tokens"] for name in ("efficacy", "generalisation", "specificity")] == [0.625, 0.5, 0.5]
    assert scores["score_argmax"] == pytest.approx(3 / (2 + 4 + 2))
    assert scores["score_tokens"] == pytest.approx(3 / (1.6 + 2 + 2))


def test_what_was_not_measured_is_nan_and_zero_stays_zero():
    scores = edit_success(**columns(ROWS[4:5]))
    assert scores["efficacy"] == 0 and math.isnan(scores["specificity"]) and math.isnan(scores["score"])
    assert harmonic_mean([0.0, 1.0]) == 0


def test_entropy_of_words_by_hand():
    """
    "a b a b a b": bigrams ab ab ab ba ba, trigrams aba aba bab bab (1 bit). Five different words: 4 bigrams (2 bits)
    and 3 trigrams (log2 3 bits). The full stop is a word.
    """
    bigrams = -(0.6 * math.log2(0.6) + 0.4 * math.log2(0.4))
    assert ngram_entropy("a b a b a b") == pytest.approx((2 / 3 * bigrams + 4 / 3) / 2)
    assert ngram_entropy("one two three four.") == pytest.approx((2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2)
    assert ngram_entropy("no no no no") == ngram_entropy("") == 0


def test_bad_columns_get_a_sentence():
    with pytest.raises(ValueError, match="got \\['edited'\\]"):
        edit_success(**pd.DataFrame([("a", "edited", 1, 2, 1)], columns=COLUMNS).to_dict("list"))
    with pytest.raises(ValueError, match="at least one prompt"):
        edit_success(**dict.fromkeys(COLUMNS, ()))
