"""The package's metrics as `evaluate` modules, found by name without a network."""

import importlib
from typing import Any

from hf_iclr.extras import require


_METRICS = {
    "edit_success": "hf_iclr.editors.evaluate_modules:EditSuccess",
    "fluency": "hf_iclr.editors.evaluate_modules:Fluency",
    "j_and_f": "hf_iclr.vision.evaluation.j_and_f:JAndF",
    "perplexity": "hf_iclr.editors.evaluate_modules:Perplexity",
}


def load_metric(name: str, **kwargs: Any) -> Any:
    """
    What `evaluate.load` is for metrics of the Hub, for those of this package.

    Args:
        name (`str`):
            `"edit_success"`, `"fluency"`, `"j_and_f"` or `"perplexity"`.
        kwargs (*optional*):
            Passed to `evaluate.Metric`. Several processes need `num_process`, `process_id` and `experiment_id`; one
            process keeps its numbers in memory unless `keep_in_memory=False`.

    Returns:
        `evaluate.Metric`: with `compute`, `add` and `add_batch`; its `description` says what goes in and comes out.

    Raises:
        ImportError: without `evaluate`.
        ValueError: when there is no such metric.

    Example:

    ```python
    >>> load_metric("fluency").compute(predictions=["The sun rose and the sun set."])
    ```
    """
    if name not in _METRICS:
        raise ValueError(
            f"Expected one of {sorted(_METRICS)}, got {name!r}. Metrics of the Hub: `evaluate.load({name!r})`."
        )
    require("metrics", "load_metric", "evaluate")
    module, class_name = _METRICS[name].split(":")
    kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
    return getattr(importlib.import_module(module), class_name)(**kwargs)
