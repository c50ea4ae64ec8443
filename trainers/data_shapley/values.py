"""Sums of values over the steps of a run, and the rows of a dataset that they belong to, by position or by id."""

import math
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, IterableDataset

from .trained_rows import TrainedRows


def value_table(rows: pd.DataFrame, key: str) -> pd.DataFrame:
    """As [`DataShapleyResult.table`] has it, from the lines of one target, by `"index"` or `"id"`."""
    of_step = rows["value"].abs().groupby(rows["step"]).transform("sum")
    table = (
        rows.assign(step_share=_divide(rows["value"], of_step))
        .groupby(key)
        .agg(
            value=("value", "sum"),
            exposures=("value", "size"),
            tokens=("tokens", "sum"),
            step_share=("step_share", "sum"),
        )
    )
    table.insert(3, "value_per_exposure", table["value"] / table["exposures"])
    table.insert(4, "value_per_token", _divide(table["value"], table["tokens"]))
    return table


def summarise(result: Any, target: str) -> dict[str, Any]:
    """A line of [`DataShapleyResult.summary`]."""
    values, losses = result.values(target), result.recorded("loss", target)
    return {
        "target": target,
        "rows": len(values),
        "value": values.sum(),
        "harmful": (values < 0).mean(),
        "loss_first": losses.iloc[0] if len(losses) else math.nan,
        "loss_last": losses.iloc[-1] if len(losses) else math.nan,
        "explained": result.explained_ratio(target),
        "energy": result.recorded("energy", target).mean(),
        "scored_share": result.steps.get("scored_share", pd.Series(dtype=float)).mean(),
        "agreement": result.recorded("agreement", target).mean(),
    }


def explain(rows: pd.DataFrame, losses: pd.Series) -> pd.DataFrame:
    """As [`DataShapleyResult.explained`] has it, from the lines of one target and its losses by step, in nats."""
    first, end = losses.index[:-1], losses.index[1:]
    interval = np.searchsorted(losses.index, rows["step"], side="right") - 1
    value = rows["value"].groupby(interval).sum().reindex(range(len(first)), fill_value=0.0)
    drop = -np.diff(losses)
    ratio = value / np.where(drop, drop, math.nan)
    return pd.DataFrame({"first_step": first, "last_step": end - 1, "value": value, "loss_drop": drop, "ratio": ratio})


def _divide(values: pd.Series, by: pd.Series) -> pd.Series:
    """Zero where there is nothing to divide by."""
    return values / by.where(by != 0, np.inf)


def add_columns(
    dataset: Dataset | IterableDataset, columns: dict[str, pd.Series], trained: TrainedRows
) -> Dataset | IterableDataset:
    """Add to each row what `columns` have under its key, None where there is nothing."""
    if isinstance(dataset, IterableDataset):
        trained.check_stream(dataset, next(iter(columns.values())).index)
        return dataset.map(
            lambda row: {name: _plain(column.get(trained.row_id(row))) for name, column in columns.items()}
        )
    keys: pd.Index | None = None  # alike for all columns
    for name, column in columns.items():
        if name in dataset.column_names:  # of an earlier result
            dataset = dataset.remove_columns(name)
        keys = trained.keys(dataset, column.index) if keys is None else keys
        dataset = dataset.add_column(name, [_plain(value) for value in column.reindex(keys)])
    return dataset


def select_rows(
    dataset: Dataset | IterableDataset,
    values: pd.Series,
    keep: str | float,
    within: str | None,
    keep_unseen: bool,
    trained: TrainedRows,
) -> Dataset | IterableDataset:
    """See [`DataShapleyResult.filter`]."""
    if keep != "positive" and (isinstance(keep, bool) or not (isinstance(keep, int | float) and 0 < keep <= 1)):
        raise ValueError(f"Expected keep='positive' or a share in (0, 1] such as 0.8, got {keep!r}.")
    if isinstance(dataset, IterableDataset):
        if within is not None:
            raise ValueError(f"A share within each {within!r} needs a Dataset, got a stream.")
        trained.check_stream(dataset, values.index)
        seen, kept = set(values.index), set(values.index[_is_kept(values, keep)])
        return dataset.filter(lambda row: (key := trained.row_id(row)) in kept or (keep_unseen and key not in seen))
    aligned = values.reindex(trained.keys(dataset, values.index)).reset_index(drop=True)
    if within is not None and within not in dataset.column_names:
        raise ValueError(f"Expected a column of the rows as `within`, one of {dataset.column_names}, got {within!r}.")
    groups = [0] * len(aligned) if within is None else dataset[within][:]
    kept_rows = aligned.groupby(groups, dropna=False).transform(_is_kept, keep).astype(bool)
    return dataset.select(np.flatnonzero(kept_rows | (aligned.isna() & keep_unseen)))


def _is_kept(values: pd.Series, keep: str | float) -> pd.Series:
    """Which rows are positive, or the best share of those with a value; of equal rows the first."""
    if isinstance(keep, str):
        return values > 0
    return values.rank(method="first", ascending=False) <= round(keep * values.count())


def _plain(value: Any) -> float | int | None:
    """Of numpy and pandas, what Arrow takes; counts whole."""
    if value is None or np.isnan(value):
        return None
    return int(value) if isinstance(value, np.integer) else float(value)
