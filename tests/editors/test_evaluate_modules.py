"""The metrics of edits as `evaluate` modules."""

import evaluate
import pytest

from hf_iclr.editors.alpha_edit.scoring import edit_success, ngram_entropy
from hf_iclr.metrics import load_metric
from tests.editors.alpha_edit.test_metrics import ROWS, columns


def test_the_modules_say_what_the_functions_say():
    metric = load_metric("edit_success")
    assert (
        isinstance(metric, evaluate.Metric) and metric.name == "edit_success" and "specificity" in metric.description
    )
    assert metric.compute(**columns(ROWS)) == edit_success(**columns(ROWS))
    for row in ROWS:
        metric.add_batch(**columns([row]))
    assert metric.compute() == edit_success(**columns(ROWS))
    texts = ["one two three", "a b c d e"]
    fluency = load_metric("fluency").compute(predictions=texts)["fluency"]
    assert fluency == pytest.approx(sum(map(ngram_entropy, texts)) / 2)


def test_an_unknown_metric_gets_a_sentence():
    with pytest.raises(ValueError, match=r"Expected one of \[.*'edit_success'.*got 'bleu'.*evaluate.load\('bleu'\)"):
        load_metric("bleu")
