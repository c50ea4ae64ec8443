"""Sums over the steps of a run: one line a training row, and values against the change of the loss."""

import math

import numpy as np
import pandas as pd


def value_table(rows: pd.DataFrame, key: str) -> pd.DataFrame:
    """
    Sum what each row was worth.

    Args:
        rows (`pandas.DataFrame`):
            Of one target: `step`, `value` (nats), `tokens` and the column `key`.
        key (`str`):
            `"index"` or `"id"`.

    Returns:
        `pandas.DataFrame` by `key`: `value`, `exposures`, `tokens`, `value_per_exposure`, `value_per_token` and
        `step_share`, the sum over steps of value / sum of absolute values of the step.
    """
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
    """
    Compare sums of values with the change of the loss they are about.

    Args:
        rows (`pandas.DataFrame`):
            Of one target: `step` and `value` (nats).
        losses (`pandas.Series`):
            Loss (nats) before a step, by step, where it was measured.

    Returns:
        `pandas.DataFrame`: one line from each measurement to the next: `first_step`, `last_step`, `value`, `loss_drop`
        and `ratio` of the two, NaN if the loss did not change.
    """
    first, end = losses.index[:-1], losses.index[1:]
    interval = np.searchsorted(losses.index, rows["step"], side="right") - 1
    value = rows["value"].groupby(interval).sum().reindex(range(len(first)), fill_value=0.0)
    drop = -np.diff(losses)
    ratio = value / np.where(drop, drop, math.nan)
    return pd.DataFrame({"first_step": first, "last_step": end - 1, "value": value, "loss_drop": drop, "ratio": ratio})


def _divide(values: pd.Series, by: pd.Series) -> pd.Series:
    """Zero where there is nothing to divide by."""
    return values / by.where(by != 0, np.inf)
