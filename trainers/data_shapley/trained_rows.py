"""Finds the rows that were trained on in a dataset that may not be the trainer's own, or refuses it."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, IterableDataset, concatenate_datasets
from torch.utils.data import ConcatDataset, Subset

from .identity import LENGTHS, content_id


logger = logging.getLogger(__name__)

_UNKNOWN = ""  # no column's name: of rows that can't be compared with others
_SAMPLED = 256  # rows whose contents are remembered with stored values
_BEGINNING = re.compile(r"\[:(\d+)\]$")
_TOKENISE = "`SFTTrainer(model, SFTConfig(..., packing=False), train_dataset=texts).train_dataset`"


@dataclass
class TrainedRows:
    """
    What is known of the rows of a run. Trainers drop rows that are too long, shuffle and pack them, so a position
    counts only in a dataset of which it is shown that it holds the same rows in the same order.

    Rows that have neither a position nor an id are known by a hash of `columns`, or of all. `digests` has, by column,
    a hash of some of its values, and by `"column[:n]"` of the first n characters of its texts, to whose ends trainers
    add a token. `dataset` is `trainer.train_dataset` itself, of `length` rows, while it is in memory.
    """

    id_column: str | None = None
    columns: list[str] | None = None
    length: int | None = None
    digests: dict[str, str] = field(default_factory=dict)
    dataset: Any = None

    @classmethod
    def of(cls, dataset: Any, loaded: Any = None, id_column: str | None = None) -> "TrainedRows":
        """
        Of the rows that a trainer is about to train on: `trainer.train_dataset`, and what the data loader reads,
        without columns that the model does not take.
        """
        dataset = _unwrap(getattr(dataset, "utility", dataset))  # of DeepSafetySFTTrainer: its recovery rows come last
        names = getattr(loaded, "column_names", None)
        columns = sorted(set(names) - {LENGTHS}) if names else None
        if isinstance(dataset, Dataset):
            return cls(id_column, columns, len(dataset), _digests(dataset), dataset)
        length = len(dataset) if hasattr(dataset, "__len__") else None
        return cls(id_column, columns, length, _digests_of_list(dataset) or {_UNKNOWN: ""}, dataset)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "TrainedRows":
        """What [`~TrainedRows.facts`] gave; raises `TypeError` where it is something else."""
        found = cls(**facts)
        texts = [*(found.columns or []), *found.digests, *found.digests.values()]
        if not all(isinstance(text, str) for text in texts) or not isinstance(found.id_column, str | None):
            raise TypeError("columns of the trained rows that are no text")
        if not isinstance(found.length, int | None):
            raise TypeError("a number of trained rows that is no count")
        return found

    def facts(self) -> dict[str, Any]:
        """All but the rows themselves, as JSON takes it."""
        names = ("id_column", "columns", "length", "digests")
        return {name: getattr(self, name) for name in names}

    def may_be(self, other: "TrainedRows") -> bool:
        """Whether both can be of the same rows in the same order."""
        alike = all(self.digests[name] == other.digests[name] for name in self.digests.keys() & other.digests)
        return self.length == other.length and alike

    def row_id(self, row: Mapping[str, Any]) -> str:
        """The id of a row that has no position."""
        return content_id(row, self.columns) if self.id_column is None else str(row[self.id_column])

    def keys(self, dataset: Any, known: pd.Series | pd.Index) -> pd.Index:
        """
        The key of each row of a dataset, as in the index of values; -1 or another id where it was not trained on.
        `known` are keys of the rows with a value, named `"index"` or `"id"`.

        Raises `TypeError` if this is no [`~datasets.Dataset`], `ValueError` if it can't be told which rows were
        trained on.
        """
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"Expected a datasets.Dataset, got {type(dataset).__name__}. Give trainer.train_dataset, one split of "
                "a DatasetDict, or `Dataset.from_list(rows)`."
            )
        keys: Sequence[Any]
        if known.name == "index":
            keys = self._positions(dataset, int(known.max()) + 1)
        else:
            keys = self._ids(dataset, known)
        if lost := set(known) - set(keys):
            if len(lost) == known.nunique():
                raise ValueError("Expected the rows that were trained on, but none of these has a value.")
            logger.warning("%d of %d rows with a value are not among these.", len(lost), known.nunique())
        return pd.Index(keys)

    def check_stream(self, dataset: IterableDataset, known: pd.Index) -> None:
        """Raise a `ValueError` where the rows of a stream could not be found by an id."""
        if known.name == "index":
            raise ValueError(
                "Expected a Dataset, for values are known by position in trainer.train_dataset, got a stream. Give "
                "trainer.train_dataset."
            )
        self._check_columns(dataset.column_names)

    def _ids(self, dataset: Dataset, known: pd.Series | pd.Index) -> list[str]:
        self._check_columns(dataset.column_names)
        names = [self.id_column] if self.id_column else self.columns or dataset.column_names
        return [self.row_id(row) for row in dataset.select_columns(names)]

    def _check_columns(self, found: Sequence[str] | None) -> None:
        if found is None:
            return
        if self.id_column is None and LENGTHS in found:
            raise ValueError(
                "Expected single texts, for those of packed rows have a value each, got packed rows (with "
                f"{LENGTHS}). Give the texts as they were before packing: {_TOKENISE}."
            )
        wanted = [self.id_column] if self.id_column else self.columns or []
        if missing := [name for name in wanted if name not in found]:
            instead = "those that have it" if self.id_column else f"them as they were tokenised, with TRL {_TOKENISE}"
            raise ValueError(
                f"Expected rows with {', '.join(missing)}, by which they are known, got {list(found)}. Give {instead}."
            )

    def _positions(self, dataset: Dataset, least: int) -> Sequence[int]:
        if dataset is self.dataset:
            return range(len(dataset))
        length = least if self.length is None else self.length
        fits = len(dataset) >= length if self.length is None else len(dataset) == length
        if isinstance(self.dataset, Dataset):
            if (found := _match(self.dataset, dataset)) is not None:
                return found
        elif fits and self._looks_the_same(dataset):
            return range(len(dataset))
        raise ValueError(
            f"Expected the {length} rows that were trained on, in their order, got {len(dataset)} rows of which it "
            "can't be told which those are: the trainer may have dropped, shuffled or changed some. Give "
            "trainer.train_dataset."
        )

    def _looks_the_same(self, dataset: Dataset) -> bool:
        """Whether every column that both have agrees, texts perhaps but for their ends."""
        known: dict[str, list[str]] = {}
        for name in self.digests:
            known.setdefault(_BEGINNING.sub("", name), []).append(name)
        common = [names for column, names in known.items() if column in dataset.column_names]
        agree = all(any(_digest(dataset, name) == self.digests[name] for name in names) for names in common)
        return agree and bool(common or not known)


def _unwrap(dataset: Any) -> Any:
    """What PyTorch has selected or joined of [`~datasets.Dataset`]s as one of them; anything else as it is."""
    if isinstance(dataset, Subset) and isinstance(inner := _unwrap(dataset.dataset), Dataset):
        return inner.select(dataset.indices)
    if isinstance(dataset, ConcatDataset):
        parts = [_unwrap(part) for part in dataset.datasets]
        if all(isinstance(part, Dataset) and part.features == parts[0].features for part in parts):
            return concatenate_datasets(parts)
    return dataset


def _digests_of_list(rows: Any) -> dict[str, str]:
    """As [`_digests`] has them, of a list of rows by column."""
    if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) for row in rows):
        return {}
    some = [rows[place] for place in _places(len(rows))]
    plain = lambda value: value.tolist() if hasattr(value, "tolist") else value  # noqa: E731
    columns = {name: [plain(row.get(name)) for row in some] for name in (some[0] if some else ())}
    return {name: content_id(values) for name, values in columns.items() if len({*map(content_id, values)}) > 1}


def _digests(dataset: Dataset) -> dict[str, str]:
    names = []
    for name in dataset.column_names:
        if not _varies(dataset, name):  # which tells nothing of the order
            continue
        names.append(name)
        if getattr(dataset.features[name], "dtype", "") == "string" and len(dataset):
            shortest = min(len(value or "") for value in _values(_sample(dataset), name))
            names += [f"{name}[:{min(32, shortest // 2)}]"] * (shortest >= 8)
    return {name: _digest(dataset, name) for name in names}


def _digest(dataset: Dataset, name: str) -> str:
    """Hash of some of a column's values, or of the beginnings of its texts, `"column[:n]"`."""
    found = _BEGINNING.search(name)
    values = _values(_sample(dataset), _BEGINNING.sub("", name))
    return content_id([value if found is None else str(value)[: int(found[1])] for value in values])


def _sample(dataset: Dataset) -> Dataset:
    return dataset.select(_places(len(dataset)))


def _places(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, _SAMPLED if count else 0).astype(int))


def _varies(dataset: Dataset, name: str) -> bool:
    """Whether not all values of a column are alike; of a single row there is no other order."""
    values = _values(dataset, name)
    first = next(values, None)
    return len(dataset) == 1 or any(value != first for value in values)


def _values(dataset: Dataset, name: str) -> Iterator[Any]:
    """Those of a column as they are stored: images and sounds stay bytes."""
    stored = dataset.with_format("arrow").select_columns([name])
    for start in range(0, len(dataset), 1000):
        yield from stored[start : start + 1000][name].to_pylist()


def _match(trained: Dataset, dataset: Dataset) -> Sequence[int] | None:
    """
    Position in `trained` of each row of `dataset`, -1 where the trainer has dropped the row; `None` where it can't be
    told by the columns that both have.
    """
    common = [name for name in trained.column_names if name in dataset.column_names]
    in_order = range(len(dataset))
    if len(trained) == len(dataset) and _agree(trained, dataset, common, in_order):
        # Without a column that both have and that tells rows apart, they may be in another order
        return in_order if any(_varies(trained, name) for name in common) else None
    ours, theirs = [""] * len(trained), [""] * len(dataset)
    for name in common:
        mine, others = ([content_id(value) for value in _values(rows, name)] for rows in (trained, dataset))
        if set(mine) <= set(others) or set(others) <= set(mine):  # the trainer left it as it was
            ours = [known + value for known, value in zip(ours, mine, strict=True)]
            theirs = [known + value for known, value in zip(theirs, others, strict=True)]
    places: dict[str, list[int]] = {}
    for place, key in enumerate(ours):
        places.setdefault(key, []).append(place)
    counts = Counter(theirs)
    if not any(ours) or any(counts[key] not in (0, len(found)) for key, found in places.items()):
        return None
    left = {key: iter(found) for key, found in places.items()}  # equal rows keep their order
    found = [next(left[key]) if key in left else -1 for key in theirs]
    return found if _agree(trained, dataset, common, found) else None


def _agree(trained: Dataset, dataset: Dataset, common: Sequence[str], places: Sequence[int]) -> bool:
    """Whether rows are equal where they can be compared, but for what trainers add to the end of texts."""
    for name in common:
        of_place: Iterable[Any] = _values(trained, name)
        if not isinstance(places, range):
            mine = list(of_place)
            of_place = (None if place < 0 else mine[place] for place in places)
        for place, own, other in zip(places, of_place, _values(dataset, name), strict=True):
            texts = isinstance(own, str) and isinstance(other, str)
            if place >= 0 and own != other and not (texts and own.startswith(other)):
                return False
    return True
