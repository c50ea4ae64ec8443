"""The metrics of edits as `evaluate` modules, for [`~hf_iclr.metrics.load_metric`]."""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate

from .alpha_edit.scoring import edit_success, fluency, ngram_entropy, perplexity


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
