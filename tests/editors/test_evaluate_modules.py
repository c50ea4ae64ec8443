"""The metrics of edits as `evaluate` modules."""

import evaluate
import pytest
import torch

from hf_iclr.editors.alpha_edit.metrics import edit_success, hidden_drift, ngram_entropy
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
    before, after = torch.tensor([[3.0, 4.0], [0.0, 5.0]]), torch.tensor([[3.0, 4.0], [5.0, 0.0]])
    drift = load_metric("hidden_drift").compute(predictions=after.tolist(), references=before.tolist())
    assert drift == hidden_drift(before, after)


def test_an_unknown_metric_gets_a_sentence():
    with pytest.raises(ValueError, match=r"Expected one of \[.*'edit_success'.*got 'bleu'.*evaluate.load\('bleu'\)"):
        load_metric("bleu")
