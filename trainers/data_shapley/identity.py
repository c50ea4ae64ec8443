"""Lets the identity of each training row travel with its batch through any data loader, and leaves the data alone."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset


ROW_KEY = "_shapley_rows"
_BATCH_KEY = "_shapley_batch"
_ID_BYTES = 256  # of an id in UTF-8; fixed, so that batches of several processes can be joined


class RowWatch:
    """
    Makes one data loader tell which rows each batch holds, in `queue`, in the order of its batches.

    Rows are positions in the loader's dataset; for packed rows, each source text is one row and its id a hash of its
    tokens; so it is for every row of an iterable dataset. Works with worker processes and with
    `accelerate.skip_first_batches`: the loader that makes yields batches with the key `ROW_KEY`.

    Args:
        loader ([`~torch.utils.data.DataLoader`] or accelerate's):
            Changed until [`~RowWatch.close`] is called; its dataset isn't.
        id_column (`str`, *optional*):
            Column of the rows that holds their id.
        on_batch (`Callable`, *optional*):
            Called before the loop gets a batch.
        on_break (`Callable`, *optional*):
            Called when the loop ends, also by an exception.
    """

    def __init__(
        self,
        loader: Any,
        id_column: str | None = None,
        on_batch: Callable[[], None] | None = None,
        on_break: Callable[[], None] | None = None,
    ) -> None:
        self.queue: deque[list[int] | list[str]] = deque()
        self._loader = loader
        self._base: DataLoader = getattr(loader, "base_dataloader", loader)
        self._class, self._dataset, self._collate = type(loader), self._base.dataset, self._base.collate_fn
        counted = not isinstance(self._dataset, IterableDataset)
        if counted:
            _set_dataset(self._base, _NumberedDataset(self._dataset))
        self._base.collate_fn = _RowCollator(self._collate, counted, id_column)
        _set_class(loader, _watched(self._class, self.queue, on_batch, on_break))

    def close(self) -> None:
        """Make the loader what it was."""
        _set_class(self._loader, self._class)
        self._base.collate_fn = self._collate
        _set_dataset(self._base, self._dataset)


def check_loader(loader: Any, id_column: str | None) -> None:
    """
    Raise a `ValueError` if rows of a data loader could not be known.

    Args:
        loader ([`~torch.utils.data.DataLoader`] or accelerate's):
            That of the training.
        id_column (`str`, *optional*):
            Column of the rows that holds their id.
    """
    base = getattr(loader, "base_dataloader", loader)
    if base.batch_sampler is None:
        raise ValueError(
            "Expected a data loader that puts rows into batches, got one with batch_size=None, whose dataset yields "
            "whole batches: which rows they hold is unknown. Give `DataLoader(rows, batch_size=8)`, say."
        )
    columns = getattr(base.dataset, "column_names", None)
    if id_column is not None and columns and id_column not in columns:
        raise _no_id_column(id_column, columns)


def content_id(row: Any) -> str:
    """
    The id of a row without a number: 16 hexadecimal digits of the SHA-256 of its `input_ids`, or of all its values.

    Args:
        row (`dict`, or any nested sequence of numbers, tensors and strings):
            A row as the data collator gets it, before padding.
    """
    if isinstance(row, Mapping) and "input_ids" in row:
        row = row["input_ids"]
    digest = hashlib.sha256()
    _hash(row, digest)
    return digest.hexdigest()[:16]


def take_rows(batch: MutableMapping[str, Any]) -> list[int] | list[str] | None:
    """Remove the rows' identity from a batch and return it, or `None` if the batch has none."""
    encoded = batch.pop(ROW_KEY, None)
    if encoded is None:
        return None
    if encoded.dim() == 1:
        return encoded.tolist()
    return [bytes(row).rstrip(b"\0").decode() for row in encoded.cpu().numpy()]


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
        if isinstance(first, Mapping) and "seq_lengths" in first:
            return rows, _encode([content_id(piece) for row in rows for piece in _pieces(row)])
        if numbers:
            return rows, torch.tensor(numbers)
        return rows, _encode([content_id(row) for row in rows])


def _no_id_column(id_column: str, found: Any) -> ValueError:
    columns = found if isinstance(found, list) else type(found).__name__
    instead = "The Trainer drops columns that the model doesn't take: type `remove_unused_columns=False`."
    if "seq_lengths" in columns:
        instead = "Packing drops it: leave id_column out, and texts are known by a hash of their tokens."
    return ValueError(f"Expected rows with the column {id_column!r}, the id_column, got {columns}. {instead}")


def _pieces(row: Mapping[str, Any]) -> Iterator[Any]:
    start = 0
    for length in row["seq_lengths"]:
        yield row["input_ids"][start : start + length]
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
            digest.update(name.encode())
            _hash(value[name], digest)
    elif isinstance(value, str):
        digest.update(value.encode())
    elif isinstance(value, bytes):
        digest.update(value)
    elif isinstance(value, Sequence) and not all(isinstance(item, (bool, int, float)) for item in value):
        for item in value:
            _hash(item, digest)
    else:  # integers alike whether they come as a list, an array or a tensor
        array = np.asarray(value)
        digest.update(array.astype(np.int64 if array.dtype.kind in "biu" else np.float64).tobytes())


def _watched(
    loader_class: type, queue: deque, on_batch: Callable[[], None] | None, on_break: Callable[[], None] | None
) -> type:
    def iterate(self: Any) -> Iterator[Any]:
        queue.clear()
        try:
            for batch in loader_class.__iter__(self):  # type: ignore[attr-defined]
                rows = take_rows(batch) if isinstance(batch, MutableMapping) else None
                if rows is not None:
                    queue.append(rows)
                    batch = batch.get(_BATCH_KEY, batch)
                if on_batch is not None:
                    on_batch()
                yield batch
        finally:
            if on_break is not None:
                on_break()

    return type(loader_class.__name__, (loader_class,), {"__iter__": iterate})


def _set_class(loader: Any, loader_class: type) -> None:
    # Not `loader.__class__ =`: accelerate's loaders make it a property
    object.__dict__["__class__"].__set__(loader, loader_class)


def _set_dataset(loader: DataLoader, dataset: Any) -> None:
    loader.__dict__["dataset"] = dataset  # which DataLoader.__setattr__ allows only in its constructor
