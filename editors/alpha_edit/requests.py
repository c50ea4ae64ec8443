"""What a user asks an editor to change: requests, the data sets they are read from, the token rows they become."""

import dataclasses
import hashlib
import itertools
import json
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


# What the reference's contexts start with; the model continues them.
_OPENINGS = ("The", "Therefore", "Because", "I", "You")

# Names of characters after which no space is written: Chinese and Japanese with their marks, Thai and its neighbours.
_WITHOUT_SPACES = (
    *("CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "IDEOGRAPHIC", "FULLWIDTH", "LEFT CORNER", "RIGHT CORNER"),
    *("BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE", "YI SYLLABLE"),
)


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


@dataclass(frozen=True)
class EditRow:
    """One prompt with the target behind it."""

    ids: list[int]  # tokens of context, prompt and target
    subject: int  # position of the subject's last token
    start: int  # position of the target's first token; len(ids) when there is no target


def encode_request(
    tokenizer: PreTrainedTokenizerBase, prompt: str, subject: str, target: str = "", context: str = "{}"
) -> EditRow:
    """
    Token row of a prompt, with `{}` for its subject, and its target, see [`encode_answer`]. `context` is a template
    around the prompt that ends in `{}`. The tokens up to the subject's last one are those of the prompt alone.

    Raises:
        ValueError: when the tokenizer gives no offsets or the subject or the target no token of its own.
    """
    before = context[: context.rindex("{}")] + prompt[: prompt.index("{}")]
    text = before + subject + prompt[prompt.index("{}") + 2 :]
    end = len(before) + len(subject.rstrip())
    ids, spans = _ids_and_spans(tokenizer, text)
    at = max((i for i, (first, last) in enumerate(spans) if first < end and last > len(before)), default=-1)
    if at < 0:
        raise ValueError(f"Expected a subject with a token of its own, got {subject!r} in {text!r}.")
    start = len(ids)
    if target:
        ids, start = encode_answer(tokenizer, text, target, at + 1)
    return EditRow(ids=ids, subject=at, start=start)


def encode_answer(tokenizer: PreTrainedTokenizerBase, text: str, answer: str, kept: int = 1) -> tuple[list[int], int]:
    """
    Token ids of a prompt and its answer, tokenised as one text, and the position of the first token in which the
    answer's characters begin. Between the two stands a space, unless one of them has white space there or the prompt
    ends in a script that writes without spaces.

    Where the first `kept` tokens are not those of the prompt alone, because a token spans its end, prompt and answer
    are tokenised each by itself.

    Raises:
        ValueError: when the tokenizer gives no offsets, or prompt or answer have no token of their own.
    """
    spaced = not (text[-1:].isspace() or answer[:1].isspace() or _ends_without_space(text))
    answer = " " * spaced + answer
    alone, _ = _ids_and_spans(tokenizer, text)
    ids, spans = _ids_and_spans(tokenizer, text + answer)
    # A tokenizer of bytes gives each byte of a character the whole character's span.
    start = next((i for i, (_, last) in enumerate(spans) if last > len(text)), len(ids))
    if start < kept or ids[:kept] != alone[:kept]:
        start, ids = len(alone), alone + _ids_and_spans(tokenizer, answer, special=False)[0]
    if not 0 < start < len(ids):
        raise ValueError(
            f"Expected a prompt and a target with a token of its own each, got {answer.strip()!r} after {text!r}."
        )
    return ids, start


def _ids_and_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text and their characters, without special tokens that the tokenizer closes it with."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"Expected a fast tokenizer, which knows each token's place in the text, got {type(tokenizer).__name__}. "
            "Load it with AutoTokenizer.from_pretrained(..., use_fast=True)."
        )
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, return_special_tokens_mask=True)
    count = len(encoded["input_ids"])
    while count and encoded["special_tokens_mask"][count - 1]:
        count -= 1
    return list(encoded["input_ids"][:count]), encoded["offset_mapping"][:count]


def _ends_without_space(text: str) -> bool:
    return unicodedata.name(text[-1:] or " ", "").startswith(_WITHOUT_SPACES)


def encode_in_contexts(
    tokenizer: PreTrainedTokenizerBase, request: EditRequest, templates: Sequence[str] | None, target: str
) -> list[EditRow]:
    """[`encode_request`] in each context, of which the plain prompt is the first and, by default, the only one."""
    return [
        encode_request(tokenizer, request.prompt, request.subject, target, context) for context in templates or ["{}"]
    ]


def sample_contexts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int
) -> list[str]:
    """
    Templates: the plain prompt `"{}"`, and `count` texts of about `length` tokens by the model itself to put before
    it, so that an edit does not hold for one wording only. The caller's random state is left alone.
    """
    templates = ["{}"]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for index in range(count):
            encoded = tokenizer(_OPENINGS[index % len(_OPENINGS)], return_tensors="pt").to(model.device)
            ids = encoded["input_ids"]
            for _ in range(length - 1):
                logits = model(input_ids=ids, use_cache=False).logits[0, -1].float()
                values, tokens = logits.topk(5)
                ids = torch.cat([ids, tokens[torch.multinomial(values.softmax(-1), 1)][None]], 1)
            text = tokenizer.decode(ids[0], skip_special_tokens=True)
            templates.append(" ".join(text.replace("{", " ").replace("}", " ").split()) + ". {}")
    return templates


def reasons_against(
    requests: Sequence[EditRequest],
    tokenizer: PreTrainedTokenizerBase,
    templates: Sequence[str],
    max_length: int | None,
    made: Collection[str],
) -> dict[int, str]:
    """
    For each request that cannot be made, or not together with an earlier one, its index and the reason. `max_length`
    is the number of tokens that the model takes, `made` the ids of edits in force.
    """
    seen: dict[tuple[str, str], int] = {}
    reasons: dict[int, str] = {}
    for index, request in enumerate(requests):
        other = seen.setdefault((request.prompt, request.subject), index)
        if request.id in made:
            reasons[index] = "this edit is in force already"
        elif other != index and requests[other].target_new.strip() == request.target_new.strip():
            reasons[index] = f"the same edit as request {other}"
        elif other != index:
            set_to = f"{request.text!r} to {requests[other].target_new!r}"
            reasons[index] = f"contradicts request {other}, which sets {set_to}"
        else:
            try:
                rows = encode_in_contexts(tokenizer, request, templates, request.target_new)
            except ValueError as error:
                reasons[index] = str(error)
                continue
            longest = max(len(row.ids) for row in rows)
            if max_length is not None and longest > max_length:
                reasons[index] = f"{longest} tokens with context and target, the model takes {max_length}"
    return reasons
