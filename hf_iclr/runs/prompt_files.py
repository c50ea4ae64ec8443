"""Prompts, answers and facts from text, JSON Lines and CSV files."""

import json
from pathlib import Path
from typing import Any

import pandas as pd


def read_json_lines(path: Path) -> list[Any]:
    """The value of each line that is not blank; raises `ValueError` where one is no JSON."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):  # U+2028 is no new line
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"Expected JSON in line {number} of {path}, got {line!r:.80}. {error}") from error
    return rows


def read_prompts(
    source: str | Path, split: str = "train", column: str = "prompt"
) -> tuple[list[Any], list[str | None] | None]:
    """
    Read prompts from a file, from a data set of the Hub, or take those that come with the library.

    Args:
        source (`str` or `Path`):
            `.txt`: one prompt a line. `.jsonl` or `.csv`: a column of prompts (a string, or in JSON Lines a chat), and
            a column `answer` if there are answers. `harmless_orders`: sixty orders that sound bad and must be
            answered. Anything else: a folder or repository that `datasets` loads, `name:config` for a configuration.
        split (`str`, *optional*, defaults to `"train"`):
            The split of a data set.
        column (`str`, *optional*, defaults to `"prompt"`):
            The column of the prompts.

    Returns:
        `tuple`: the prompts; and the answers, `None` where one is missing, or `None` if there are none at all.

    Raises:
        ValueError: if the file is of another kind, is empty, or lacks the column.
    """
    path = Path(source)
    if not str(source):
        raise ValueError("Expected a file or a data set of prompts, got an empty name.")
    if str(source) == "harmless_orders":
        from hf_iclr.trainers.safety_audit.asking.prompt_sets import HARMLESS_ORDERS

        return list(HARMLESS_ORDERS), None
    try:
        table = _read_table(path, str(source), split, column)
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected text in UTF-8 in {path}, got something else: {error}") from error
    if column not in table and len(table.columns):
        raise ValueError(f"Expected a column `{column}` in {path.name}, got {', '.join(map(str, table.columns))}.")
    if table.empty or table[column].isna().any():
        raise ValueError(f"Expected a prompt in every row of {path.name}, got {len(table)} rows with a gap or none.")
    answers = None
    if "answer" in table and table["answer"].notna().any():
        answers = [
            None if pd.api.types.is_scalar(answer) and pd.isna(answer) else answer for answer in table["answer"]
        ]
        wrong = [row for row, answer in enumerate(answers) if not isinstance(answer, str | None)]
        if wrong and path.is_file():
            raise ValueError(
                f"Expected text as the answer in row {wrong[0]} of {path.name}, got {answers[wrong[0]]!r}."
            )
    return table[column].tolist(), answers


def _read_table(path: Path, source: str, split: str, column: str) -> pd.DataFrame:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        lines = path.read_text(encoding="utf-8").splitlines()
        return pd.DataFrame({column: [line.strip() for line in lines if line.strip()]})
    if suffix == ".jsonl":
        return pd.DataFrame(read_json_lines(path))
    if suffix == ".csv":
        try:
            return pd.read_csv(path, dtype=str)
        except UnicodeDecodeError:
            raise
        except ValueError as error:
            raise ValueError(f"Expected a table in {path}. {error}") from error
    if path.is_file() or suffix in (".xml", ".json", ".tsv", ".md"):
        raise ValueError(f"Expected prompts in a .txt, .jsonl or .csv file, got {path.name}.")
    from datasets import load_dataset

    name, _, config = source.partition(":")
    rows = load_dataset(name, config or None, split=split)
    kept = [c for c in (column, "answer") if c in rows.column_names]
    return pd.DataFrame(rows.select_columns(kept or rows.column_names)[:])
