"""Rows of CounterFact and zsRE as edit requests."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from .request import EditRequest


def edit_requests(rows: Iterable[Mapping[str, Any]], *, limit: int | None = None) -> list[EditRequest]:
    """
    Reads rows of CounterFact or zsRE in the layout of ROME (https://huggingface.co/papers/2202.05262), or rows that
    hold the arguments of [`EditRequest`] by name. The layout of each row is recognised by its columns.

    The first answer of a zsRE row is the target. Its neighbour is a question with an answer of its own, so it becomes
    a pair of prompt and answer; a CounterFact row's neighbours are prompts whose answer is `target_true`.

    Args:
        rows (`datasets.Dataset` or iterable of `dict`):
            What `load_dataset("json", data_files="counterfact.json", split="train")` gives.
        limit (`int`, *optional*):
            Read no more than so many rows, from the first on, as the papers do.

    Returns:
        `list[EditRequest]`: one a row, named `counterfact-{case_id}`, `zsre-{row}`, or as the row says.

    Raises:
        TypeError: when `rows` is a path, or a row is no mapping.
        ValueError: when there is no row, a row has none of the three layouts, or a zsRE question lacks its subject.

    Example:

    ```python
    >>> edit_requests(load_dataset("json", data_files="counterfact.json", split="train"), limit=100)
    ```
    """
    if isinstance(rows, str | bytes) or not isinstance(rows, Iterable):
        raise TypeError(
            f"Expected rows, got {rows!r}. Load them first: `load_dataset('json', data_files=..., split='train')`."
        )
    requests = []
    for index, row in enumerate(itertools.islice(rows, limit)):
        if not isinstance(row, Mapping):
            raise TypeError(
                f"Expected row {index} to be a mapping from column to value, got {row!r}. Of a `DatasetDict` choose a "
                "split: `dataset['train']`."
            )
        requests.append(_read_row(index, row))
    if not requests:
        raise ValueError("Expected at least one row, got none.")
    return requests


def _read_row(index: int, row: Mapping[str, Any]) -> EditRequest:
    if "requested_rewrite" in row:
        return _read_counterfact(index, row)
    if {"src", "answers", "rephrase", "subject"} <= set(row):
        return _read_zsre(index, row)
    if {"prompt", "subject", "target_new"} <= set(row):
        # A dataset fills the columns a row lacks with None.
        return EditRequest.from_dict({name: value for name, value in row.items() if value is not None})
    raise ValueError(
        f"Expected row {index} to have the columns of CounterFact (requested_rewrite), of zsRE (subject, src, "
        f"answers, rephrase, loc, loc_ans) or of an EditRequest (prompt, subject, target_new), got {sorted(row)}."
    )


def _read_counterfact(index: int, row: Mapping[str, Any]) -> EditRequest:
    rewrite = row["requested_rewrite"]
    return EditRequest(
        prompt=rewrite["prompt"],
        subject=rewrite["subject"],
        target_new=rewrite["target_new"]["str"],
        target_true=rewrite["target_true"]["str"],
        paraphrases=tuple(row.get("paraphrase_prompts") or ()),
        neighborhood=tuple(row.get("neighborhood_prompts") or ()),
        id=f"counterfact-{row.get('case_id', index)}",
        source="CounterFact",
    )


def _read_zsre(index: int, row: Mapping[str, Any]) -> EditRequest:
    subject, question = row["subject"], row["src"]
    if subject not in question:
        raise ValueError(
            f"Expected the question of row {index} to name its subject {subject!r}, got {question!r}. Leave the row "
            "out."
        )
    if not row["answers"]:
        raise ValueError(f"Expected row {index} to have an answer, got {row['answers']!r}. Leave the row out.")
    neighborhood: Any = ((f"{row['loc']}?", row["loc_ans"]),) if row.get("loc") else ()
    return EditRequest(
        prompt=question.replace(subject, "{}", 1),
        subject=subject,
        target_new=row["answers"][0],
        paraphrases=(row["rephrase"],),
        neighborhood=neighborhood,
        id=f"zsre-{index}",
        source="zsRE",
    )
