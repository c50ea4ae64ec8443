"""Lets the identity of each training row travel with its batch through any data loader, and leaves the data alone."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset


ROW_KEY = "_shapley_rows"
_BATCH_KEY = "_shapley_batch"
_ID_BYTES = 256  # of an id in UTF-8; fixed, so that batches of several processes can be joined
LENGTHS = "seq_lengths"  # of the texts that TRL has packed into a row


class RowKeys:
    """
    Puts the identity of its rows into each batch of a data loader, where [`take_rows`] finds it, until it is closed.

    Rows are positions in the loader's dataset; for packed rows, each source text is one row and its id a hash of its
    tokens and labels; every row of an iterable dataset is known by a hash of its columns. Works with worker processes
    and with the loaders that `accelerate.skip_first_batches` makes of this one.
    """

    def __init__(self, loader: Any, id_column: str | None = None) -> None:
        self._base: DataLoader = getattr(loader, "base_dataloader", loader)
        dataset, collate = self._before = self._base.dataset, self._base.collate_fn
        counted = not isinstance(dataset, IterableDataset)
        self._set(_NumberedDataset(dataset) if counted else dataset, _RowCollator(collate, counted, id_column))

    def close(self) -> None:
        """Make the loader what it was."""
        self._set(*self._before)

    def _set(self, dataset: Any, collate: Any) -> None:
        vars(self._base)["dataset"] = dataset  # which DataLoader.__setattr__ allows only in its constructor
        self._base.collate_fn = collate
        self._base._iterator = None  # of persistent workers, who have copies of what was there before


def take_rows(batch: Any) -> tuple[Any, list[int] | list[str] | None]:
    """The batch as the loader would make it, and its rows; `None` where it doesn't say which they are."""
    encoded = batch.pop(ROW_KEY, None) if isinstance(batch, MutableMapping) else None
    if encoded is None:
        return batch, None
    if encoded.dim() == 1:
        rows = encoded.tolist()
    else:
        rows = [bytes(row).rstrip(b"\0").decode() for row in encoded.cpu().numpy()]
    return batch.get(_BATCH_KEY, batch), rows


@contextmanager
def watched_loop(loader: Any, on_rows: Callable[[Any, Any], None]) -> Iterator[None]:
    """
    A loop of the caller's own over `loader` gets batches without [`RowKeys`], and `on_rows` their rows and themselves
    right before.

    A loop offers nothing to put this into but the loader's class: `for` looks for `__iter__` nowhere else.
    """
    loader_class = type(loader)

    def iterate(self: Any) -> Iterator[Any]:
        for batch in loader_class.__iter__(self):
            batch, rows = take_rows(batch)
            on_rows(rows, batch)
            yield batch

    # Not `loader.__class__ =`: accelerate's loaders make it a property
    set_class = object.__dict__["__class__"].__set__
    set_class(loader, type(loader_class.__name__, (loader_class,), {"__iter__": iterate}))
    try:
        yield
    finally:
        set_class(loader, loader_class)


def check_loader(loader: Any, id_column: str | None) -> DataLoader:
    """PyTorch's data loader, of that or accelerate's; `TypeError` or `ValueError` if rows could not be known."""
    base = getattr(loader, "base_dataloader", loader)
    if not isinstance(base, DataLoader):
        raise TypeError(
            f"Expected the loop's torch.utils.data.DataLoader, got {type(base).__name__}, of which rows are unknown. "
            "Give `DataLoader(rows, batch_size=8)`, and iterate over it."
        )
    if base.batch_sampler is None:
        raise ValueError(
            "Expected a data loader that puts rows into batches, got one with batch_size=None, whose dataset yields "
            "whole batches: which rows they hold is unknown. Give `DataLoader(rows, batch_size=8)`, say."
        )
    columns = getattr(base.dataset, "column_names", None)
    if id_column is not None and columns and id_column not in columns:
        raise _no_id_column(id_column, columns)
    return base


def content_id(row: Any, columns: Sequence[str] | None = None) -> str:
    """
    The id of a row without a number, as the data collator gets it, before padding: 16 hexadecimal digits of the
    SHA-256 of its values, or of those in `columns`.
    """
    digest = hashlib.sha256()
    _hash(row if columns is None else {name: row[name] for name in columns}, digest)
    return digest.hexdigest()[:16]


class _NumberedDataset(Dataset):
    """Pairs of position and row; everything else is the dataset's."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return int(index), self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        if callable(getattr(self.dataset, "__getitems__", None)):
            rows = self.dataset.__getitems__(indices)
        else:
            rows = [self.dataset[index] for index in indices]
        return [(int(index), row) for index, row in zip(indices, rows, strict=True)]

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)  # while unpickled in a worker
        return getattr(self.dataset, name)


class _RowCollator:
    """The loader's collator, which adds the identity of the rows to the batch."""

    def __init__(self, collate: Any, counted: bool, id_column: str | None) -> None:
        self.collate, self.counted, self.id_column = collate, counted, id_column

    def __call__(self, features: list[Any]) -> Any:
        numbers = [number for number, _ in features] if self.counted else []
        rows = [row for _, row in features] if self.counted else features
        rows, identity = self._identify(rows, numbers)
        batch = self.collate(rows)
        if isinstance(batch, MutableMapping):
            batch[ROW_KEY] = identity
            return batch
        return {_BATCH_KEY: batch, ROW_KEY: identity}

    def _identify(self, rows: list[Any], numbers: list[int]) -> tuple[list[Any], torch.Tensor]:
        first = rows[0]
        if self.id_column is not None:
            if not isinstance(first, Mapping) or self.id_column not in first:
                raise _no_id_column(self.id_column, sorted(first) if isinstance(first, Mapping) else first)
            ids = [str(row[self.id_column]) for row in rows]
            rows = [{name: value for name, value in row.items() if name != self.id_column} for row in rows]
            return rows, _encode(ids)
        if isinstance(first, Mapping) and LENGTHS in first:
            return rows, _encode([content_id(piece) for row in rows for piece in _pieces(row)])
        if numbers:
            return rows, torch.tensor(numbers)
        return rows, _encode([content_id(row) for row in rows])


def _no_id_column(id_column: str, found: Any) -> ValueError:
    columns = found if isinstance(found, list) else type(found).__name__
    instead = "The Trainer drops columns that the model doesn't take: type `remove_unused_columns=False`."
    if LENGTHS in columns:
        instead = "Packing drops it: leave id_column out, and texts are known by their contents."
    return ValueError(f"Expected rows with the column {id_column!r}, the id_column, got {columns}. {instead}")


def _pieces(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    start = 0
    for length in row[LENGTHS]:
        yield {name: values[start : start + length] for name, values in row.items() if name != LENGTHS}
        start += length


def _encode(ids: list[str]) -> torch.Tensor:
    encoded = np.zeros((len(ids), _ID_BYTES), dtype=np.uint8)
    for row, text in enumerate(ids):
        data = text.encode()
        if len(data) > _ID_BYTES:
            raise ValueError(f"Expected ids of at most {_ID_BYTES} bytes, got {len(data)}: {text[:40]!r}...")
        encoded[row, : len(data)] = np.frombuffer(data, dtype=np.uint8)
    return torch.from_numpy(encoded)


def _hash(value: Any, digest: Any) -> None:
    if isinstance(value, Mapping):
        for name in sorted(value):
            digest.update(f"{name}=".encode())
            _hash(value[name], digest)
        return
    if isinstance(value, str | bytes):
        data = value if isinstance(value, bytes) else value.encode()
        digest.update(b"%d:%s" % (len(data), data))
        return
    try:  # integers alike whether they come as a list, an array or a tensor
        array = np.asarray(value)
    except ValueError:  # lists of several lengths
        array = np.empty(0, dtype=object)
    if array.dtype.kind in "biuf":
        digest.update(f"{array.shape}".encode())
        digest.update(array.astype(np.float64 if array.dtype.kind == "f" else np.int64).tobytes())
    elif isinstance(value, Sequence):
        digest.update(b"%d[" % len(value))
        for item in value:
            _hash(item, digest)
    else:
        _hash(repr(value), digest)
