"""What a user asks an editor to change: requests, and the data sets they are read from."""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_iclr.untrusted import check_field_types


# What only rows of EasyEdit and KnowEdit have, and CounterFact's where they are flat.
_EASY_EDIT = {
    "ground_truth", "rephrase_prompt", "rephrase", "locality", "locality_prompt", "portability",
    "paraphrase_prompts", "neighborhood_prompts",
}  # fmt: skip


@dataclass(frozen=True)
class EditRequest:
    """
    One fact to be written into a model.

    Args:
        prompt (`str`):
            Text with `{}` where the subject stands, to be continued by the target: "The mother tongue of {} is".
        subject (`str`):
            What the fact is about; its last token is where the model is edited. `None` for a prompt without a `{}`,
            which is edited at its last token.
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
        ValueError: when the prompt has no `{}` or several, the subject or the target is empty, or a neighbour is
            neither a prompt nor a pair.
        TypeError: when one of them is not text.
    """

    prompt: str
    subject: str | None
    target_new: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[str | tuple[str, str], ...] = ()
    id: str = ""
    source: str | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        check_field_types(self, EditRequest)
        for name in ("prompt", "subject", "target_new", "target_true", "id", "source", "license"):
            value, asked = getattr(self, name), name in ("prompt", "subject", "target_new")
            if value is not None and (asked and not value.strip() or re.search("[\ud800-\udfff]", value)):
                raise ValueError(f"Expected {name} of an edit to say something, in Unicode, got {value!r}.")
        if self.subject is not None and self.prompt.count("{}") != 1:
            hint = f": {self.prompt.replace(self.subject, '{}', 1)!r}" if self.subject in self.prompt else ""
            raise ValueError(
                f"Expected a prompt with {{}} once, where the subject {self.subject!r} stands, got {self.prompt!r}. "
                f"Write the subject's place as {{}}{hint}, or pass subject=None to edit at the prompt's last token."
            )
        for name in ("paraphrases", "neighborhood"):
            values = getattr(self, name)
            if isinstance(values, str):
                raise TypeError(f"Expected a list of {name}, got one string. Type `{name}=[{values[:30]!r}]`.")
            if not isinstance(values, Iterable | None):
                raise TypeError(f"Expected a list of {name}, got {values!r}.")
            values = [tuple(v) if isinstance(v, Sequence) and not isinstance(v, str) else v for v in values or ()]
            object.__setattr__(self, name, tuple(values))
            pairs = [v for v in values if isinstance(v, tuple) and len(v) == 2 and name == "neighborhood"]
            if wrong := [v for v in values if not isinstance(v, str) and v not in pairs]:
                raise ValueError(f"Expected each of {name} to be a prompt, or a neighbour's pair, got {wrong[0]!r}.")
        if not self.id:
            text = json.dumps([self.prompt, self.subject, self.target_new])
            object.__setattr__(self, "id", hashlib.sha256(text.encode()).hexdigest()[:12])

    @property
    def text(self) -> str:
        """The prompt with its subject."""
        return self.prompt if self.subject is None else self.prompt.replace("{}", self.subject)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the optional ones only when given."""
        values = dataclasses.asdict(self) | {
            "paraphrases": list(self.paraphrases),
            "neighborhood": [one if isinstance(one, str) else list(one) for one in self.neighborhood],
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
            ValueError: when an argument is unknown or prompt or target_new is missing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        missing = {"prompt", "target_new"} - set(values)
        if missing or set(values) - known:
            raise ValueError(
                f"Expected an edit with prompt, subject and target_new and maybe {sorted(known)}, got "
                f"{sorted(values)}."
            )
        return cls(**{"subject": None} | values)


def check_requests(requests: Any) -> list[EditRequest]:
    """The requests as a list; raises `TypeError` where one is something else and `ValueError` where there is none."""
    one = isinstance(requests, EditRequest | str | Mapping) or not isinstance(requests, Iterable)
    requests, example = [requests] if one else list(requests), "editor.edit([EditRequest('{} is in', 'Oslo', 'Peru')])"
    for request in requests:
        if not isinstance(request, EditRequest):
            raise TypeError(
                f"Expected a list of EditRequest, got {type(request).__name__}: {request!r}. Type `{example}`; rows "
                "of a data set are read by `edit_requests(rows)`."
            )
    if not requests:
        raise ValueError(f"Expected at least one request, got none. Type `{example}`.")
    return requests


def edit_requests(rows: Iterable[Mapping[str, Any]], *, limit: int | None = None) -> list[EditRequest]:
    """
    Reads rows of CounterFact or zsRE in the layout of ROME (https://huggingface.co/papers/2202.05262), of EasyEdit and
    KnowEdit (https://huggingface.co/papers/2401.01286), or rows that hold the arguments of [`EditRequest`] by name.
    The layout of each row is recognised by its columns.

    The first answer of a zsRE row is the target. Its neighbour is a question with an answer of its own, so it becomes
    a pair of prompt and answer, as do an EasyEdit row's locality prompts; a CounterFact row's neighbours are prompts
    whose answer is `target_true`. A row of MQuAKE has several rewrites, each of which is a request. An EasyEdit prompt
    that does not name its subject is edited at its last token; the column `portability` is not read.

    Args:
        rows (`datasets.Dataset` or iterable of `dict`):
            What `load_dataset("json", data_files="counterfact.json", split="train")` gives.
        limit (`int`, *optional*):
            Read no more than so many rows, from the first on, as the papers do.

    Returns:
        `list[EditRequest]`: one a rewrite, named `counterfact-{case_id}`, as the row says, or by its content.

    Raises:
        TypeError: when `rows` is a path, or a row is no mapping.
        ValueError: when there is no row, a row has none of the layouts, or a zsRE question lacks its subject.

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
        rewrites = row.get("requested_rewrite")
        parts: list[Mapping[str, Any]] = [row]
        if isinstance(rewrites, list):  # MQuAKE's rows have some each
            parts = [{**row, "requested_rewrite": rewrite, "case_id": None} for rewrite in rewrites]
        try:
            requests += [_read_row(index, part) for part in parts]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            if str(error).startswith("Expected"):
                raise
            raise ValueError(
                f"Expected row {index} to have what its layout has in its columns, got {dict(row)!r:.300} "
                f"({type(error).__name__}: {error}). Leave the row out, or mend it."
            ) from error
    if not requests:
        raise ValueError("Expected at least one row, got none.")
    return requests


def _read_row(index: int, row: Mapping[str, Any]) -> EditRequest:
    values = {name: value for name, value in row.items() if value is not None}  # which a dataset fills columns with
    if "requested_rewrite" in values:
        return _read_counterfact(index, values)
    if {"src", "answers", "subject"} <= set(values):
        return _read_zsre(index, values)
    if {"text", "labels", "concept"} <= set(values):  # KnowEdit's WikiBio
        values |= {"prompt": values["text"], "subject": values["concept"], "target_new": values["labels"]}
        return _read_easy_edit(index, values)
    if {"prompt", "target_new"} <= set(values):
        if _EASY_EDIT & set(values) or "{}" not in values["prompt"] and values.get("subject", "") in values["prompt"]:
            return _read_easy_edit(index, values)
        return EditRequest.from_dict(values)
    raise ValueError(
        f"Expected row {index} to have the columns of CounterFact (requested_rewrite), of zsRE (subject, src, "
        f"answers, rephrase, loc, loc_ans), of EasyEdit (prompt, subject, target_new, ground_truth, rephrase_prompt, "
        f"locality) or of an EditRequest (prompt, subject, target_new), got {sorted(map(str, row))}."
    )


def _read_counterfact(index: int, row: Mapping[str, Any]) -> EditRequest:
    rewrite, name = row["requested_rewrite"], row.get("case_id")
    return EditRequest(
        prompt=rewrite["prompt"],
        subject=rewrite["subject"],
        target_new=_answer(index, rewrite["target_new"]),
        target_true=_answer(index, rewrite["target_true"]) if rewrite.get("target_true") else None,
        paraphrases=_texts(row.get("paraphrase_prompts") or rewrite.get("question")),
        neighborhood=_texts(row.get("neighborhood_prompts")),
        id="" if name is None else f"counterfact-{name}",
        source="CounterFact",
    )


def _read_zsre(index: int, row: dict[str, Any]) -> EditRequest:
    if _subject_in(row["src"], row["subject"])[1] is None:
        raise ValueError(
            f"Expected the question of row {index} to name its subject {row['subject']!r}, got {row['src']!r}. Leave "
            "the row out."
        )
    row = {"rephrase": row.get("rephrases")} | row | {"prompt": row["src"], "target_new": row["answers"], "id": ""}
    if row.get("loc"):
        row |= {"locality_prompt": f"{row['loc'].removesuffix('?')}?", "locality_ground_truth": row["loc_ans"]}
    return _read_easy_edit(index, row | {"source": "zsRE"})


def _read_easy_edit(index: int, row: Mapping[str, Any]) -> EditRequest:
    prompt, subject = row["prompt"], row.get("subject")
    if "{}" not in prompt:
        prompt, subject = _subject_in(prompt, subject)
    paraphrases = ("rephrase_prompt", "rephrase", "paraphrases", "paraphrase_prompts")
    return EditRequest(
        prompt=prompt,
        subject=subject,
        target_new=_answer(index, row["target_new"]),
        target_true=_answer(index, row["ground_truth"]) if row.get("ground_truth") else row.get("target_true"),
        paraphrases=_texts(next((row[name] for name in paraphrases if name in row), None)),
        neighborhood=(*_locality(index, row), *_texts(row.get("neighborhood_prompts"))),
        id="" if (name := str(row.get("id", ""))).isdecimal() else name,  # the row's number in one of several files
        source=row.get("source"),
        license=row.get("license"),
    )


def _subject_in(prompt: str, subject: str | None) -> tuple[str, str | None]:
    """A prompt with `{}` for its subject, as a word of its own where it is one; `None` where it does not stand."""
    if not subject or subject not in prompt:
        return prompt, None
    whole = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt)
    place = whole.start() if whole else prompt.index(subject)
    return prompt[:place] + "{}" + prompt[place + len(subject) :], subject


def _locality(index: int, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Prompts and answers of all kinds of locality: lists of pairs, or a list of prompts and one of answers."""
    locality = row.get("locality", {})
    parts = [*locality.values()] if isinstance(locality, Mapping) else [locality]
    if row.get("locality_prompt"):
        parts.append({"prompt": row["locality_prompt"], "ground_truth": row["locality_ground_truth"]})
    for part in filter(None, parts):
        if isinstance(part, Mapping):
            prompts, answers = part["prompt"], part["ground_truth"]
            pairs = [(prompts, answers)] if isinstance(prompts, str) else zip(prompts, answers, strict=True)
        else:
            pairs = [(entry["prompt"], entry["ground_truth"]) for entry in part]
        yield from ((prompt, _answer(index, answer)) for prompt, answer in pairs if answer and any(answer))


def _texts(value: Any) -> tuple[Any, ...]:
    """One text or a list of them, which [`EditRequest`] checks."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def _answer(index: int, value: Any) -> str:
    """An answer: text, CounterFact's `{"str": text}`, or the first of a list of answers, which may be lists too."""
    value = value.get("str") if isinstance(value, Mapping) else value
    while isinstance(value, Sequence) and not isinstance(value, str) and value:
        value = value[0]
    if not isinstance(value, str):
        raise TypeError(f"Expected an answer of row {index} to be text, got {value!r}. Leave the row out.")
    return value


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The text in a column of a data set; raises `ValueError` without the column, `TypeError` where it has no text."""
    if not isinstance(row, Mapping) or column not in row:
        got = sorted(row) if isinstance(row, Mapping) else f"{row!r:.80}"
        raise ValueError(f"Expected a column {column!r} with text, got {got}. Pass text_column=...")
    if not isinstance(row[column], str):
        raise TypeError(
            f"Expected text in column {column!r}, got {row[column]!r}. Leave such rows out: "
            f"`dataset.filter(lambda row: isinstance(row[{column!r}], str))`."
        )
    return row[column]
