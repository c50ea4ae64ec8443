"""Sums of values over the steps of a run, and the rows of a dataset that they belong to, by position or by id."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, IterableDataset

from .identity import content_id


logger = logging.getLogger(__name__)

_TOKENISE = "`SFTTrainer(model, SFTConfig(..., packing=False), train_dataset=texts).train_dataset`"


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


def row_keys(train_dataset: Dataset, known: pd.Series | pd.Index, id_column: str | None = None) -> pd.Index:
    """
    The key of each row, as in the index of values.

    Args:
        train_dataset ([`~datasets.Dataset`]):
            The rows.
        known (`pandas.Series` or `pandas.Index`):
            Keys of the rows with a value, named `"index"` or `"id"`.
        id_column (`str`, *optional*):
            Column of ids. Without one, ids are hashes of `input_ids`, see [`content_id`].

    Returns:
        `pandas.Index`: positions, or ids.

    Raises:
        TypeError: if this is no [`~datasets.Dataset`].
        ValueError: if these are not the rows that were trained on.
    """
    if not isinstance(train_dataset, Dataset):
        raise TypeError(f"Expected a datasets.Dataset, got {type(train_dataset).__name__}.")
    if known.name == "index":
        if known.max() >= len(train_dataset):
            raise ValueError(
                f"Expected the dataset that was trained on, with row {known.max()}, got {len(train_dataset)} rows. "
                "Give trainer.train_dataset."
            )
        return pd.RangeIndex(len(train_dataset))
    column = id_column or "input_ids"
    _check_unpacked(train_dataset, id_column)
    if column not in train_dataset.column_names:
        instead = "those that have it" if id_column else f"them as they were tokenised, with TRL {_TOKENISE}"
        raise ValueError(
            f"Expected rows with {column}, by which they are known, got {train_dataset.column_names}. Give {instead}."
        )
    keys = [_row_id({column: value}, id_column) for value in train_dataset[column]]
    if not set(keys) & set(known):
        raise ValueError(f"Expected the rows that were trained on, but none of these has a value by {column}.")
    if lost := set(known) - set(keys):
        logger.warning("%d of %d rows with a value are not among these.", len(lost), known.nunique())
    return pd.Index(keys)


def add_columns(
    train_dataset: Dataset | IterableDataset, columns: dict[str, pd.Series], id_column: str | None
) -> Dataset | IterableDataset:
    """Add to each row what `columns` have under its key, None where there is nothing."""
    if isinstance(train_dataset, IterableDataset):
        _check_unpacked(train_dataset, id_column)
        return train_dataset.map(
            lambda row: {name: _plain(column.get(_row_id(row, id_column))) for name, column in columns.items()}
        )
    keys: pd.Index | None = None  # alike for all columns
    for name, column in columns.items():
        keys = row_keys(train_dataset, column.index, id_column) if keys is None else keys
        train_dataset = train_dataset.add_column(name, [_plain(value) for value in column.reindex(keys)])
    return train_dataset


def select_rows(
    train_dataset: Dataset | IterableDataset,
    values: pd.Series,
    keep: str | float,
    within: str | None,
    keep_unseen: bool,
    id_column: str | None,
) -> Dataset | IterableDataset:
    """See [`DataShapleyResult.filter`]."""
    if keep != "positive" and not (isinstance(keep, int | float) and 0 < keep <= 1):
        raise ValueError(f"Expected keep='positive' or a share in (0, 1] such as 0.8, got {keep!r}.")
    if isinstance(train_dataset, IterableDataset):
        if within is not None:
            raise ValueError(f"A share within each {within!r} needs a Dataset, got a stream.")
        _check_unpacked(train_dataset, id_column)
        seen, kept = set(values.index), set(values.index[_is_kept(values, keep)])
        return train_dataset.filter(
            lambda row: (key := _row_id(row, id_column)) in kept or (keep_unseen and key not in seen)
        )
    aligned = values.reindex(row_keys(train_dataset, values.index, id_column)).reset_index(drop=True)
    groups = [0] * len(aligned) if within is None else train_dataset[within][:]
    kept_rows = aligned.groupby(groups, dropna=False).transform(_is_kept, keep).astype(bool)
    return train_dataset.select(np.flatnonzero(kept_rows | (aligned.isna() & keep_unseen)))


def _check_unpacked(train_dataset: Dataset | IterableDataset, id_column: str | None) -> None:
    if id_column is None and "seq_lengths" in (train_dataset.column_names or []):
        raise ValueError(
            "Expected single texts, for those of packed rows have a value each, got packed rows (with seq_lengths). "
            f"Give the texts as they were before packing: {_TOKENISE}."
        )


def _row_id(row: Mapping[str, Any], id_column: str | None) -> str:
    return content_id(row) if id_column is None else str(row[id_column])


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
