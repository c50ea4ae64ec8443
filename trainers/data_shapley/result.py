"""What the rows of a run were worth: totals by row, source, step and token, and what one does with them."""

import math
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jinja2
import pandas as pd
from datasets import Dataset, IterableDataset
from huggingface_hub import DatasetCard

import hf_iclr
from hf_iclr.hub import HubMixin, pretrained_folder
from hf_iclr.untrusted import as_written_by, check_links, inside

from .plots import SourceValues, label_rows, target_rows_figure, token_page
from .store import VALIDATION, check_columns, column_of, read_parquet, read_run
from .trained_rows import TrainedRows
from .values import add_columns, explain, select_rows, summarise, value_table


if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

_COLUMNS = {None: "value", "exposure": "value_per_exposure", "token": "value_per_token", "step": "step_share"}
Normalize = Literal["exposure", "token", "step"] | None


class DataShapleyResult(HubMixin):
    """
    What [`InRunDataShapleyCallback`] measured: values in nats of a target's loss, positive where the row lowered it.

    They belong to one run, with its order of rows and learning rates, and are no forecast of what retraining without a
    row would do. Rows that were never trained on have no value. Positions (`index`) refer to `trainer.train_dataset`,
    which may differ from the dataset given to the trainer, for example after packing.

    Source: "Data Shapley in One Training Run" (https://huggingface.co/papers/2406.11011).

    Args:
        rows (`pandas.DataFrame`):
            One line for each step and row: `step`, `index` or `id`, `tokens`, `value` (nats of the validation loss),
            `value_<target>` of each other target, and perhaps `token_values` and `token_values_<target>`.
        steps (`pandas.DataFrame`):
            One line a step: `step`, `lr`, and for each target `loss_<target>` (where it was measured),
            `sum_<target>`, `energy_<target>` and `agreement_<target>`.
        train_dataset ([`~datasets.Dataset`], *optional*):
            The rows themselves, for [`~DataShapleyResult.by_source`]; [`~DataShapleyResult.to_dataset`] and
            [`~DataShapleyResult.filter`] set it.
        trained ([`TrainedRows`], *optional*):
            By which the rows of a dataset are found; without it only their number counts.
    """

    _repo_type = "dataset"

    def __init__(
        self,
        rows: pd.DataFrame,
        steps: pd.DataFrame,
        train_dataset: Dataset | IterableDataset | None = None,
        trained: TrainedRows | None = None,
    ) -> None:
        self.rows, self.steps, self.train_dataset = rows, steps, train_dataset
        self.trained = trained or TrainedRows()
        self.key = "id" if "id" in rows else "index"

    @classmethod
    def from_store(
        cls, folder: str | Path, train_dataset: Dataset | IterableDataset | None = None
    ) -> "DataShapleyResult":
        """
        Reads what a run has stored so far, whether it goes on, has ended or was killed.

        Args:
            folder (`str` or `Path`):
                The output folder, of whose runs the one written last is read; or a run's own, in its `shapley/`.
            train_dataset (*optional*):
                As above.

        Raises:
            FileNotFoundError: when there are no values.
            ValueError: when a file is damaged, or something else.
        """
        rows, steps, trained = read_run(folder)
        return cls(rows, steps, train_dataset, trained)

    @property
    def targets(self) -> list[str]:
        """Names of what values were measured for."""
        names = [name for name in self.rows if name == "value" or str(name).startswith("value_")]
        return [VALIDATION if name == "value" else name.removeprefix("value_") for name in names]

    def table(self, target: str = VALIDATION) -> pd.DataFrame:
        """
        All about each row that was trained on.

        Args:
            target (`str`, *optional*, defaults to `"validation"`):
                Whose loss.

        Returns:
            `pandas.DataFrame` by `index` (or `id`): `value` (nats, the sum over steps), `exposures` (times seen),
            `tokens` (over all of them), `value_per_exposure`, `value_per_token`, and `step_share`: the row's share of
            the absolute values of its step, summed over steps, in which early steps with their large losses count no
            more than late ones.
        """
        return value_table(self._of_target(target), self.key)

    def values(self, target: str = VALIDATION, normalize: Normalize = None) -> pd.Series:
        """
        One value a row.

        Args:
            target (`str`, *optional*, defaults to `"validation"`):
                Whose loss.
            normalize (`str`, *optional*):
                `"exposure"`, `"token"` or `"step"`: the other columns of [`~DataShapleyResult.table`]. Sums grow with
                epochs, duplicates and length; these do not.

        Returns:
            `pandas.Series` by `index` (or `id`), nats unless normalised by step.
        """
        if not isinstance(normalize, str | None) or normalize not in _COLUMNS:
            raise ValueError(f"Expected normalize=None, 'exposure', 'token' or 'step', got {normalize!r}.")
        return self.table(target)[_COLUMNS[normalize]]

    def top(self, k: int = 10, target: str = VALIDATION, normalize: Normalize = None) -> pd.DataFrame:
        """The `k` most helpful rows, best first, as in [`~DataShapleyResult.table`]."""
        return self._sorted(target, normalize).head(_count(k))

    def bottom(self, k: int = 10, target: str = VALIDATION, normalize: Normalize = None) -> pd.DataFrame:
        """The `k` least helpful rows, worst first, as in [`~DataShapleyResult.table`]."""
        return self._sorted(target, normalize).iloc[::-1].head(_count(k))

    def _sorted(self, target: str, normalize: Normalize) -> pd.DataFrame:
        order = self.values(target, normalize).sort_values(ascending=False, kind="stable").index
        return self.table(target).loc[order]

    def summary(self) -> pd.DataFrame:
        """
        All about each target.

        Returns:
            `pandas.DataFrame` by `target`: `rows` with a value, `value` (nats, the sum), `harmful` (share of rows with
            a negative value), `loss_first` and `loss_last` (nats, as measured), `explained` (see
            [`~DataShapleyResult.explained_ratio`]), `energy` (mean share of the direction's squared norm that was
            kept), `scored_share` (mean share of what a step gains that values cover, see `min_scored_share` of
            [`InRunDataShapleyCallback`]) and `agreement` (mean cosine of each newly measured direction with the one
            before).
        """
        return pd.DataFrame([summarise(self, target) for target in self.targets]).set_index("target")

    def target_rows(self) -> pd.DataFrame:
        """
        Which training row taught which answer: values for each row of `val_dataset`, of which those of
        [`~DataShapleyResult.values`] are the mean where directions are exact and equally fresh.

        Returns:
            `pandas.DataFrame` by `index` (or `id`), with the position of the validation row as its columns, nats.

        Raises:
            ValueError: if the callback was not given `per_target_rows=True`.
        """
        columns = {name: int(name.rpartition("_")[2]) for name in self.rows if str(name).startswith("row_value_")}
        if not columns:
            raise ValueError("Expected values for each validation row, got none. Give `per_target_rows=True`.")
        return self.rows.groupby(self.key)[list(columns)].sum().rename(columns=columns)

    def plot_target_rows(self, path: str | Path | None = None, k: int = 30) -> "Figure":
        """A heat map of [`~DataShapleyResult.target_rows`] for the `k` rows with the largest values."""
        return target_rows_figure(self.target_rows(), _count(k), path)

    def explained(self, target: str = VALIDATION) -> pd.DataFrame:
        """
        Sums of values against what the loss really did, between the steps at which it was measured.

        Args:
            target (`str`, *optional*, defaults to `"validation"`):
                Whose loss.

        Returns:
            `pandas.DataFrame`: `first_step`, `last_step`, `value` (nats, of the steps in between), `loss_drop` (nats)
            and `ratio`, which is 1 where values add up to the change of loss and far from it where steps are too
            large for their sizes to mean anything (ranks last longer).
        """
        return explain(self._of_target(target), self.recorded("loss", target))

    def explained_ratio(self, target: str = VALIDATION) -> float:
        """Sum of values over the fall of loss between its first and last measurement; NaN if measured once."""
        intervals = self.explained(target)
        drop = intervals["loss_drop"].sum()
        return float(intervals["value"].sum() / drop) if drop else math.nan

    def to_dataset(self, train_dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """
        Adds the values as columns.

        Args:
            train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                `trainer.train_dataset`, or the rows that were given to the trainer: which of them it has dropped is
                told by the columns that it left as they were, or the dataset is refused. Rows known by their id or
                contents are found in any order; packed rows are not, but the tokenised texts from before the packing,
                as `SFTTrainer(..., packing=False).train_dataset` has them.

        Returns:
            The dataset with `shapley_value` (of the validation loss), `shapley_value_<target>` of the other targets,
            and `shapley_exposures`. Rows that were never trained on have None.

        Raises:
            ValueError: if these are not the rows that were trained on.
        """
        columns: dict[str, pd.Series] = {}
        for target in self.targets:
            table = self.table(target)
            columns[column_of(target, "shapley_value")] = table["value"]
            columns["shapley_exposures"] = table["exposures"]
        with_values = add_columns(train_dataset, columns, self.trained)
        self.train_dataset = train_dataset
        return with_values

    def filter(
        self,
        train_dataset: Dataset | IterableDataset,
        keep: str | float = "positive",
        target: str = VALIDATION,
        normalize: Normalize = None,
        within: str | None = None,
        keep_unseen: bool = True,
    ) -> Dataset | IterableDataset:
        """
        Keeps the helpful rows, in their order. Whether training on them does better than on as many random rows is to
        be measured, and not on the validation data, which has been used here.

        Args:
            train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                As in [`~DataShapleyResult.to_dataset`].
            keep (`str` or `float`, *optional*, defaults to `"positive"`):
                `"positive"` for the rows with a value above zero, or a share in (0, 1] of the rows that have a value:
                0.8 keeps the best four fifths.
            target (`str`, *optional*, defaults to `"validation"`):
                Whose loss.
            normalize (`str`, *optional*):
                As in [`~DataShapleyResult.values`].
            within (`str`, *optional*):
                Column of the dataset; the share is taken within each of its values, so that every source keeps its
                part.
            keep_unseen (`bool`, *optional*, defaults to `True`):
                Whether to keep rows that were never trained on.

        Raises:
            ValueError: if `keep` is neither, or these are not the rows that were trained on.
        """
        values = self.values(target, normalize)
        filtered = select_rows(train_dataset, values, keep, within, keep_unseen, self.trained)
        self.train_dataset = train_dataset
        return filtered

    def by_source(
        self,
        source: str | Sequence[Hashable],
        train_dataset: Dataset | None = None,
        target: str = VALIDATION,
    ) -> "SourceValues":
        """
        Values summed by where rows come from, with `totals`, a `timeline` and `plot()`.

        Args:
            source (`str` or `Sequence`):
                Column of the training data, or one label for each of its rows.
            train_dataset ([`~datasets.Dataset`], *optional*):
                The rows with that column. Defaults to those known already; the Trainer drops columns that the model
                does not read, so the callback may not have seen it.
            target (`str`, *optional*, defaults to `"validation"`):
                Whose loss.

        Raises:
            ValueError: if nothing says where rows come from.
        """
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        rows = self._of_target(target)
        return SourceValues.of(rows, label_rows(rows[self.key], source, train_dataset, self.trained), target)

    def token_heatmap(
        self,
        rows: int | str | Iterable[Hashable],
        tokenizer: "PreTrainedTokenizerBase",
        train_dataset: Dataset | None = None,
        target: str = VALIDATION,
        path: str | Path | None = None,
    ) -> str:
        """
        Shows on a page of HTML what each token of some rows was worth. The callback has to store the values of tokens.

        Args:
            rows (`int`, `str` or `Iterable`):
                Their `index` (or `id`), for example `result.bottom(5).index`.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                To write the tokens.
            train_dataset ([`~datasets.Dataset`], *optional*):
                Rows with `input_ids`. Defaults to those known already.
            target (`str`, *optional*, defaults to `"validation"`):
                Whose loss.
            path (`str` or `Path`, *optional*):
                Where to write the page.

        Raises:
            ValueError: if the values or the ids of tokens are not known.
        """
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        keys: Iterable[Hashable] = [rows] if isinstance(rows, int | str) else rows
        page = token_page(self._of_target(target), self.key, keys, tokenizer, train_dataset, self.trained, target)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def to_frame(self) -> pd.DataFrame:
        """[`~DataShapleyResult.table`] of every target, one below the other, with `target` as a column."""
        tables = [self.table(target).reset_index() for target in self.targets]
        frame = pd.concat(tables, keys=self.targets, names=["target"])
        return frame.reset_index("target").reset_index(drop=True)

    def to_csv(self, path: str | Path) -> None:
        """Writes [`~DataShapleyResult.to_frame`]."""
        self.to_frame().to_csv(path, index=False)

    def to_parquet(self, path: str | Path) -> None:
        """Writes [`~DataShapleyResult.to_frame`]."""
        self.to_frame().to_parquet(path, index=False)

    def save_pretrained(self, folder: str | Path) -> None:
        """
        Writes `values.parquet` (as [`~DataShapleyResult.to_frame`]), `rows.parquet` and `steps.parquet` (as they came)
        and a dataset card, `README.md`. No text of the training data is in them.

        Args:
            folder (`str` or `Path`):
                Made if it does not exist.
        """
        folder = check_links(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.to_parquet(folder / "values.parquet")
        self.rows.attrs["trained"] = self.trained.facts()
        self.rows.to_parquet(folder / "rows.parquet", index=False)
        self.steps.to_parquet(folder / "steps.parquet", index=False)
        self.save_card(folder)

    def _card(self, repo_id: str) -> DatasetCard:
        text = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
        card = jinja2.Template(text, trim_blocks=True, lstrip_blocks=True).render(
            name=repo_id,
            summary=self.summary().reset_index().to_dict("records"),
            steps=len(self.steps),
            key=self.key,
            version=hf_iclr.__version__,
        )
        return DatasetCard(card)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, revision: str | None = None, token: str | bool | None = None
    ) -> "DataShapleyResult":
        """
        Reads what [`~DataShapleyResult.save_pretrained`] wrote, from a folder or a dataset repository.

        Args:
            name_or_path (`str` or `Path`):
                The folder, or for example `"me/values"`.
            revision (`str`, *optional*):
                Branch, tag or commit on the Hub.
            token (`str` or `bool`, *optional*):
                As in [`~huggingface_hub.snapshot_download`].

        Raises:
            ValueError: when there are no such files, or with other contents.
        """
        files = ["rows.parquet", "steps.parquet"]
        folder = pretrained_folder(name_or_path, files, repo_type="dataset", revision=revision, token=token)
        rows, steps = (read_parquet(inside(folder, f"{name}.parquet")) for name in ("rows", "steps"))
        with as_written_by("DataShapleyResult.save_pretrained", folder):
            check_columns(rows, steps)
            return cls(rows, steps, trained=TrainedRows.from_facts(rows.attrs["trained"]))

    def _of_target(self, target: str) -> pd.DataFrame:
        if target not in self.targets:
            raise ValueError(f"Expected a target among {self.targets}, got {target!r}.")
        columns = {column_of(target, name): name for name in ("value", "token_values")}
        kept = [name for name in ("step", self.key, "tokens", *columns) if name in self.rows]
        return self.rows[kept].rename(columns=columns)

    def recorded(self, name: str, target: str) -> pd.Series:
        """What was recorded of a target, by step; empty if nothing was."""
        return self.steps.set_index("step").get(f"{name}_{target}", pd.Series(dtype=float)).dropna()


def _count(k: int) -> int:
    if isinstance(k, bool) or not hasattr(k, "__index__") or k < 0:
        raise ValueError(f"Expected a number of rows such as 10, got {k!r}.")
    return int(k)
