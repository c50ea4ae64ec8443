"""Values by source, as tables and a figure, and by token, as a page."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np
import pandas as pd
from datasets import Dataset, IterableDataset

from hf_iclr.extras import new_figure

from .trained_rows import TrainedRows


if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase


@dataclass
class SourceValues:
    """
    What the sources of a dataset were worth.

    Attributes:
        totals (`pandas.DataFrame`):
            By source: `value` (nats), `rows`, `exposures`, `tokens`, `value_per_exposure`, `value_per_token` and
            `harmful` (share of exposures with a negative value).
        timeline (`pandas.DataFrame`):
            Value (nats) of each source (columns) in each step.
        target (`str`):
            Whose loss.
    """

    totals: pd.DataFrame
    timeline: pd.DataFrame
    target: str

    @classmethod
    def of(cls, rows: pd.DataFrame, labels: pd.Series, target: str) -> "SourceValues":
        """Sums the rows of one target by their labels."""
        rows = rows.assign(source=labels)
        key = "id" if "id" in rows else "index"
        totals = rows.groupby("source").agg(
            value=("value", "sum"), rows=(key, "nunique"), exposures=("value", "size"), tokens=("tokens", "sum")
        )
        totals["value_per_exposure"] = totals["value"] / totals["exposures"]
        totals["value_per_token"] = totals["value"] / totals["tokens"]
        totals["harmful"] = (rows["value"] < 0).groupby(rows["source"]).mean()
        timeline = rows.pivot_table(index="step", columns="source", values="value", aggfunc="sum")
        return cls(totals, timeline, target)

    def plot(self, path: str | Path | None = None, bins: int = 20) -> "Figure":
        """
        Draws the totals, and the mean value of a step over the run.

        Args:
            path (`str` or `Path`, *optional*):
                Where to save the figure.
            bins (`int`, *optional*, defaults to 20):
                Parts of the run, over whose steps the timeline is averaged.

        Returns:
            `matplotlib.figure.Figure`
        """
        figure = new_figure("SourceValues.plot", (10, 3.8))
        left, right = figure.subplots(1, 2)
        left.barh([str(source) for source in self.totals.index], self.totals["value"])
        left.axvline(0, color="0.6", lw=0.8)
        left.set_xlabel(f"value for {self.target}, nats")
        steps = self.timeline.fillna(0.0)
        parts = np.array_split(np.arange(len(steps)), min(bins, len(steps)))
        middle = [steps.index[part].to_numpy().mean() for part in parts]
        for source in steps:
            right.plot(middle, [steps[source].iloc[part].mean() for part in parts], marker=".", label=str(source))
        right.axhline(0, color="0.6", lw=0.8)
        right.set_xlabel("step")
        right.set_ylabel("value of a step, nats")
        right.legend(fontsize=8)
        if path is not None:
            figure.savefig(path, dpi=130)
        return figure


def target_rows_figure(table: pd.DataFrame, k: int, path: str | Path | None) -> "Figure":
    """See [`DataShapleyResult.plot_target_rows`]."""
    table = table.loc[table.abs().max(axis=1).sort_values(ascending=False, kind="stable").index[:k]]
    table = table.iloc[table.to_numpy().argmax(axis=1).argsort(kind="stable")]  # by the answer they taught most
    figure = new_figure("DataShapleyResult.plot_target_rows", (2 + 0.3 * table.shape[1], 1 + 0.25 * len(table)))
    axes = figure.subplots()
    largest = np.abs(table.to_numpy()).max() or 1.0
    image = axes.imshow(table, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
    axes.set_xticks(range(table.shape[1]), table.columns)
    axes.set_yticks(range(len(table)), table.index)
    axes.set_xlabel("validation row")
    axes.set_ylabel("training row")
    figure.colorbar(image, label="value, nats")
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


def label_rows(
    keys: pd.Series,
    source: str | Sequence[Hashable],
    train_dataset: Dataset | IterableDataset | None,
    trained: TrainedRows,
) -> pd.Series:
    """
    The source of each stored line, see [`DataShapleyResult.by_source`]; `ValueError` if nothing says where rows come
    from.
    """
    if isinstance(source, str):
        if not isinstance(train_dataset, Dataset) or source not in train_dataset.column_names:
            seen = train_dataset.column_names if isinstance(train_dataset, Dataset) else type(train_dataset).__name__
            raise ValueError(
                f"Expected training data with a column {source!r}, got {seen}. Give it: "
                f"result.by_source({source!r}, train_dataset)."
            )
        labels = train_dataset[source][:]
    else:
        if not isinstance(source, Iterable):
            raise TypeError(f"Expected a column of the training data or one label for each row, got {source!r}.")
        labels = list(source)
        if keys.name == "index":
            length = keys.max() + 1 if trained.length is None else trained.length
            if len(labels) < length or trained.length is not None and len(labels) > length:
                raise ValueError(f"Expected a label for each of the {length} trained rows, got {len(labels)} labels.")
            return keys.map(dict(enumerate(labels)))
    return keys.map(dict(zip(trained.keys(train_dataset, keys), labels, strict=True)))


def token_page(
    rows: pd.DataFrame,
    key: str,
    chosen: Iterable[Hashable],
    tokenizer: "PreTrainedTokenizerBase",
    train_dataset: Dataset | IterableDataset | None,
    trained: TrainedRows,
    target: str,
) -> str:
    """A page with the tokens of some rows, coloured by their value; see [`DataShapleyResult.token_heatmap`]."""
    if "token_values" not in rows:
        raise ValueError("Expected values of tokens, but those of whole rows were kept. Give token_values_for=[...].")
    if not isinstance(train_dataset, Dataset) or "input_ids" not in train_dataset.column_names:
        raise ValueError("Expected rows with input_ids, as trainer.train_dataset has: give train_dataset=...")
    places = {name: place for place, name in enumerate(trained.keys(train_dataset, rows[key]))}
    texts = []
    for name in chosen:
        stored = rows.loc[rows[key] == name, "token_values"].dropna().to_list()
        if not stored:
            raise ValueError(f"Expected rows of token_values_for that were trained on, got {name!r}.")
        values = np.sum(stored, axis=0)
        largest = np.abs(values).max() or 1.0
        ids = train_dataset[places[name]]["input_ids"]
        texts.append(
            {
                "name": name,
                "value": values.sum(),
                "tokens": [
                    {"text": tokenizer.decode([token]), "value": value, "strength": value / largest}
                    for token, value in zip(ids, values, strict=False)
                ],
            }
        )
    page = jinja2.Template(
        (Path(__file__).parent / "tokens.html").read_text(encoding="utf-8"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return page.render(rows=texts, target=target)
