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


def read_prompts(path: str | Path) -> tuple[list[Any], list[str | None] | None]:
    """
    Read prompts from a file.

    Args:
        path (`str` or `Path`):
            `.txt`: one prompt a line. `.jsonl` or `.csv`: a column `prompt` (a string, or in JSON Lines a chat), and a
            column `answer` if there are answers.

    Returns:
        `tuple`: the prompts; and the answers, `None` where one is missing, or `None` if there are none at all.

    Raises:
        ValueError: if the file is of another kind, is empty, or lacks the column `prompt`.
    """
    path = Path(path)
    if path.suffix == ".txt":
        prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        table = pd.DataFrame({"prompt": prompts})
    elif path.suffix == ".jsonl":
        table = pd.DataFrame(read_json_lines(path))
    elif path.suffix == ".csv":
        try:
            table = pd.read_csv(path, dtype=str)
        except ValueError as error:
            raise ValueError(f"Expected a table in {path}. {error}") from error
    else:
        raise ValueError(f"Expected prompts in a .txt, .jsonl or .csv file, got {path.name}.")
    if "prompt" not in table and len(table.columns):
        raise ValueError(f"Expected a column `prompt` in {path.name}, got {', '.join(map(str, table.columns))}.")
    if table.empty or table["prompt"].isna().any():
        raise ValueError(f"Expected a prompt in every row of {path.name}, got {len(table)} rows with a gap or none.")
    answers = None
    if "answer" in table and table["answer"].notna().any():
        answers = [answer if isinstance(answer, str) else None for answer in table["answer"]]
    return table["prompt"].tolist(), answers
