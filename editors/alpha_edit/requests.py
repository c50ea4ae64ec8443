"""What a user asks an editor to change, and the rows of CounterFact and zsRE that ask for it."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EditRequest:
    """
    One fact to be written into a model.

    Args:
        prompt (`str`):
            Text with `{}` where the subject stands, to be continued by the target: "The mother tongue of {} is".
        subject (`str`):
            What the fact is about; its last token is where the model is edited.
        target_new (`str`):
            What the model shall answer.
        target_true (`str`, *optional*):
            What it answered before; only measured.
        paraphrases (`tuple[str]`, *optional*):
            Other prompts that should get the new answer; only measured.
        neighborhood (`tuple`, *optional*):
            Prompts about other subjects whose answer should stay `target_true`, or pairs of a prompt and its own
            answer; only measured.
        id (`str`, *optional*):
            Name in the journal. Left out: derived from prompt, subject and target.
        source (`str`, *optional*):
            Where the fact comes from, for the journal and the model card.
        license (`str`, *optional*):
            Licence of the source.

    Raises:
        ValueError: when the prompt has no `{}` or several, or the subject or the target is empty.
        TypeError: when one of them is not text.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[str | tuple[str, str], ...] = ()
    id: str = ""
    source: str | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target_new"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"Expected {name} to be text, got {type(value).__name__}: {value!r}.")
            if not value.strip():
                raise ValueError(f"Expected {name} of an edit to say something, got {value!r}.")
        if self.prompt.count("{}") != 1:
            hint = f": {self.prompt.replace(self.subject, '{}', 1)!r}" if self.subject in self.prompt else ""
            raise ValueError(
                f"Expected a prompt with {{}} once, where the subject {self.subject!r} stands, got {self.prompt!r}. "
                f"Write the subject's place as {{}}{hint}."
            )
        object.__setattr__(self, "paraphrases", tuple(self.paraphrases))
        object.__setattr__(self, "neighborhood", tuple(self.neighborhood))
        if not self.id:
            text = json.dumps([self.prompt, self.subject, self.target_new])
            object.__setattr__(self, "id", hashlib.sha256(text.encode()).hexdigest()[:12])

    @property
    def text(self) -> str:
        """The prompt with its subject."""
        return self.prompt.replace("{}", self.subject)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the optional ones only when given."""
        values = dataclasses.asdict(self) | {
            "paraphrases": list(self.paraphrases),
            "neighborhood": list(self.neighborhood),
        }
        return {name: value for name, value in values.items() if value not in (None, [])}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EditRequest":
        """
        The request that [`~EditRequest.to_dict`] gave; also one line of a `.jsonl` file.

        Args:
            values (`dict`):
                Arguments of [`EditRequest`] by name.

        Returns:
            [`EditRequest`]

        Raises:
            ValueError: when an argument is unknown or one of prompt, subject and target_new is missing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        missing = {"prompt", "subject", "target_new"} - set(values)
        if missing or set(values) - known:
            raise ValueError(
                f"Expected an edit with prompt, subject and target_new and maybe {sorted(known)}, got "
                f"{sorted(values)}."
            )
        return cls(**values)


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
