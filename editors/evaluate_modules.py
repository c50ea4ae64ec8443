"""The metrics of edits as `evaluate` modules, for [`~hf_iclr.metrics.load_metric`]."""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import torch

from .alpha_edit.metrics import edit_success, fluency, hidden_drift, ngram_entropy
from .alpha_edit.scoring import perplexity


CITATION = "AlphaEdit: Null-Space Constrained Knowledge Editing, https://huggingface.co/papers/2410.02355"


class EditSuccess(evaluate.Metric):
    """[`edit_success`] as an `evaluate` module: `load_metric("edit_success").compute(request=..., kind=..., ...)`."""

    def _info(self) -> evaluate.MetricInfo:
        columns = {name: datasets.Value("float64") for name in ("nll_new", "nll_true", "accuracy")}
        return _info(edit_success, {"request": datasets.Value("string"), "kind": datasets.Value("string"), **columns})

    def _compute(self, **columns: Any) -> dict[str, float]:
        return edit_success(**columns)


class Fluency(evaluate.Metric):
    """The mean [`ngram_entropy`] of texts: `load_metric("fluency").compute(predictions=texts)`."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(ngram_entropy, {"predictions": datasets.Value("string")})

    def _compute(self, predictions: Sequence[str]) -> dict[str, float]:
        return {"fluency": fluency(predictions)}


class HiddenDrift(evaluate.Metric):
    """[`hidden_drift`]: `load_metric("hidden_drift").compute(predictions=after, references=before)`."""

    def _info(self) -> evaluate.MetricInfo:
        states = datasets.List(datasets.Value("float64"))
        return _info(hidden_drift, {"predictions": states, "references": states})

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        return hidden_drift(torch.tensor(list(references)), torch.tensor(list(predictions)))


class Perplexity(evaluate.Metric):
    """[`perplexity`]: `load_metric("perplexity").compute(predictions=texts, model=model, tokenizer=tokenizer)`."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(perplexity, {"predictions": datasets.Value("string")}, citation="")

    def _compute(self, predictions: Sequence[str], model: Any, tokenizer: Any, **options: Any) -> dict[str, float]:
        return {"perplexity": perplexity(model, tokenizer, list(predictions), **options)}


def _info(function: Callable[..., Any], columns: dict[str, Any], citation: str = CITATION) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=function.__doc__ or "",
        citation=citation,
        inputs_description=function.__doc__ or "",
        features=datasets.Features(columns),
    )
