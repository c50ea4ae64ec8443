"""Rows of a dataset, wherever it is kept."""

from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk


_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(source: str, split: str = "train") -> Dataset:
    """
    Load a dataset from a file, a folder or the Hub.

    Args:
        source (`str`):
            A `.jsonl`, `.json`, `.csv` or `.parquet` file, also gzipped; a folder of `save_to_disk`; or what
            `load_dataset` takes.
        split (`str`, *optional*, defaults to `"train"`):
            Where there are several.

    Returns:
        [`~datasets.Dataset`]

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file is of another kind, or there is no such split.
    """
    path = Path(source)
    kind = _FORMATS.get(Path(path.name.removesuffix(".gz")).suffix)
    if kind is not None and not path.exists():
        raise FileNotFoundError(f"Expected rows in {source}, got no such file.")
    if path.is_file():
        if kind is None:
            raise ValueError(f"Expected rows in a {', '.join(_FORMATS)} file, got {path.name}.")
        return load_dataset(kind, data_files=str(path), split="train")
    if not (path / "state.json").exists() and not (path / "dataset_dict.json").exists():
        return load_dataset(source, split=split)
    rows = load_from_disk(source)
    if not isinstance(rows, DatasetDict):
        return rows
    if split not in rows:
        raise ValueError(
            f"Expected a split {split!r} in {source}, got {', '.join(rows)}. Add `--split {next(iter(rows))}`."
        )
    return rows[split]
