"""Preference rows: checked, tokenized as TRL does it, and made into the rows of the paper's remedy."""

import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import maybe_extract_prompt

from hf_iclr.models import render_prompt, split_answer


logger = logging.getLogger(__name__)

CHOSEN, REJECTED, INITIAL_GREEDY = "chosen", "rejected", "initial_greedy"
KINDS = (CHOSEN, REJECTED, "other_train", "other_test", "permuted", "random_words", INITIAL_GREEDY)
REPHRASE_PREFIXES = ("chosen_", "rejected_", "other_")
IMAGES = ("image", "images")
# Columns that TRL reads beside the prompt; whoever scores an answer needs them too.
CONTEXT = ("tools", "chat_template_kwargs", *IMAGES)


def preference_rows(rows: Any, name: str, answers: Sequence[str] = (CHOSEN, REJECTED)) -> Dataset:
    """
    What somebody gave as preference rows, a `Dataset` or an iterable of rows, as a `Dataset` with a prompt (the common
    start of both answers, if there is none) and these answers, text or messages. Others' columns are kept. What is
    something else is refused in a sentence that calls it `name`.
    """
    if not isinstance(rows, Dataset):
        rows = _to_dataset(rows, name)
    if "prompt" not in rows.column_names and len(rows) and {CHOSEN, REJECTED} <= set(rows.column_names):
        rows = rows.map(maybe_extract_prompt)
    wanted = ["prompt", *answers]
    missing = [column for column in wanted if column not in rows.column_names]
    if missing or not len(rows):
        raise ValueError(
            f"{name} should hold the columns {', '.join(wanted)} and a row, got "
            f"{', '.join(rows.column_names) or 'no column'} and {len(rows)} rows. Rename with `rename_column`."
        )
    kinds = {column: _kind(rows.features[column]) for column in wanted}
    if not set(kinds.values()) - {None} <= {"text"} and not set(kinds.values()) - {None} <= {"messages"}:
        raise ValueError(
            f"{name} should hold texts in all of {', '.join(wanted)} or lists of messages in all of them, got "
            f"{', '.join(f'{kind} in {column}' for column, kind in kinds.items())}."
        )
    return rows


def _to_dataset(rows: Any, name: str) -> Dataset:
    expected = f"Expected {name} as a `datasets.Dataset` or a list of rows"
    if isinstance(rows, IterableDataset):
        raise TypeError(f"{expected}, got a stream. Take some of it: `Dataset.from_list(list({name}.take(1000)))`.")
    if isinstance(rows, Mapping):  # a DatasetDict among others
        first = next(iter(rows), "train")
        raise TypeError(f"{expected}, got a dictionary of {', '.join(map(str, rows))}. Type `{name}[{first!r}]`.")
    if isinstance(rows, str) or not isinstance(rows, Iterable):
        raise TypeError(f"{expected}, got {rows!r:.60}. For example `load_dataset(path, split='train')`.")
    rows = list(rows)
    if not all(isinstance(row, Mapping) for row in rows):
        raise TypeError(
            f"{expected}, each a dictionary, got {next(r for r in rows if not isinstance(r, Mapping))!r:.60}."
        )
    try:
        return Dataset.from_list([dict(row) for row in rows])
    except (TypeError, ValueError) as error:  # pyarrow's are such
        raise ValueError(f"{expected} of one form, each column of one type, got a mixture: {error}") from error


def _kind(feature: Any) -> str | None:
    """What a column holds: `None` where it holds nothing at all."""
    dtype = getattr(feature, "dtype", None)
    if dtype in ("string", "large_string", "null"):
        return None if dtype == "null" else "text"
    return "messages" if dtype in (None, "list") or "json" in str(dtype).lower() else str(dtype)


def check_kinds(columns: Sequence[str]) -> None:
    """Refuse columns that are no response kind, naming them and what would be one."""
    unknown = [name for name in columns if name not in KINDS and not name.startswith(REPHRASE_PREFIXES)]
    if unknown:
        raise ValueError(
            f"A probe set holds `prompt` and the answers {', '.join(KINDS)}, or others whose names begin with "
            f"{', '.join(REPHRASE_PREFIXES)}; got {', '.join(unknown)}. Rename what is an answer, for example to "
            f"`chosen_{unknown[0]}`, and drop the rest with `remove_columns({unknown})`."
        )


def check_probe_sets(probe_dataset: Any) -> dict[str, Dataset]:
    """Probe sets by name, the empty one for a set without; what is none is refused."""
    named = dict(probe_dataset) if isinstance(probe_dataset, dict) else {"": probe_dataset}
    if not named or not all(isinstance(name, str) for name in named):
        raise ValueError(
            f"Expected probe sets by name, got {named!r:.60}. Type `{{'train': build_probe_set(pairs)}}`."
        )
    sets = {}
    for name, rows in named.items():
        called = f"probe_dataset[{name!r}]" if name else "probe_dataset"
        sets[name] = preference_rows(rows, called, [CHOSEN])
        columns = [column for column in sets[name].column_names if column != "prompt" and column not in CONTEXT]
        check_kinds(columns)
        preference_rows(sets[name], called, columns)
    return sets


def text_of(answer: str | list[dict] | None) -> str:
    """The text of an answer: of its last message, and of the text parts where its content is in parts."""
    if answer is None or isinstance(answer, str):
        return answer or ""
    content = (answer[-1].get("content") or "") if answer else ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def with_text(answer: str | list[dict], text: str) -> str | list[dict]:
    """`answer` saying something else, after the same white space."""
    if not answer or not text.strip():
        return "" if isinstance(answer, str) else []
    before = text_of(answer)
    text = before[: len(before) - len(before.lstrip())] + text.lstrip()
    if isinstance(answer, str):
        return text
    content = answer[-1]["content"]
    if not isinstance(content, str):  # one part in the place of all
        (part, *_) = [part for part in content if part.get("text")]
        return [*answer[:-1], {**answer[-1], "content": [{**part, "text": text}]}]
    return [*answer[:-1], {**answer[-1], "content": text}]


def other_row(rows: Dataset, row: dict[str, Any], generator: random.Random) -> dict[str, Any]:
    """A row with another prompt, if the first tries bring none the first there is: prompts seldom repeat."""
    for _ in range(20):
        other = rows[generator.randrange(len(rows))]
        if other["prompt"] != row["prompt"]:
            return other
    for other in rows:
        if other["prompt"] != row["prompt"]:
            return other
    raise ValueError("Probes need answers to other prompts, but all rows have the same prompt. Give more pairs.")


def shuffled(text: str, generator: random.Random) -> str:
    """The words in another order, if there is one."""
    words = text.split()
    shuffled = words[:]
    while shuffled == words and len(set(words)) > 1:
        generator.shuffle(shuffled)
    return " ".join(shuffled)


def check_answers(dataset: Dataset, name: str) -> None:
    """Refuse pairs with nothing to compare, naming the first row with an empty answer and how many there are."""
    columns = [column for column in (CHOSEN, REJECTED) if column in dataset.column_names]
    empty = [
        (index, column)
        for index, row in enumerate(dataset.select_columns(columns))
        for column in columns
        if not text_of(row[column]) and not calls_tools(row[column])
    ]
    if empty:
        index, column = empty[0]
        raise ValueError(
            f"Every pair needs two answers, but {len(empty)} of the {name} dataset are empty, the first being "
            f"`{column}` in row {index}. Drop such rows, for example with `dataset.filter(lambda row: row['chosen'] "
            "and row['rejected'])`."
        )


def calls_tools(answer: Any) -> bool:
    """Whether a chat's answer is a call without text."""
    return isinstance(answer, list) and bool(answer) and bool(answer[-1].get("tool_calls"))


@dataclass
class EncodedAnswer:
    """Token ids of the answer `kind` in row `row`, and of its prompt."""

    row: int
    kind: str
    prompt_ids: list[int]
    ids: list[int]


def encode_answer(
    tokenizer: PreTrainedTokenizerBase,
    row: Mapping[str, Any],
    kind: str,
    max_length: int | None,
    keep_end: bool = False,
    template: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[int]]:
    """
    Token ids of a row's prompt and of one of its answers, as TRL makes them: a plain answer ends with the end-of-text
    token, a chat goes through the template with the row's `tools` and `chat_template_kwargs` (or what `template` says
    where the row has none), and what exceeds `max_length` is cut off, with `keep_end` at the start. There is no answer
    left where the prompt fills `max_length`.
    """
    prompt, answer = row["prompt"], row[kind]
    if isinstance(prompt, str) != isinstance(answer, str) or not isinstance(answer, str | list):
        raise ValueError(
            f"Expected `prompt` and `{kind}` as two texts or two lists of messages, got {type(prompt).__name__} and "
            f"{type(answer).__name__}."
        )
    if isinstance(prompt, str) and isinstance(answer, str):
        end = tokenizer.eos_token or ""
        prompt_ids = tokenizer(prompt)["input_ids"]
        ids = tokenizer(prompt + (answer if answer.endswith(end) else answer + end))["input_ids"]
    else:
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        kwargs = {**(template or {}), "tools": tools, **(row.get("chat_template_kwargs") or {})}
        texts = (
            render_prompt(tokenizer, prompt, chat_template_kwargs=kwargs),
            render_prompt(tokenizer, prompt, answer=answer, chat_template_kwargs=kwargs),
        )
        prompt_ids, ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    start = len(split_answer(prompt_ids, ids)[0])
    if max_length is not None:
        cut = max(len(ids) - max_length, 0) if keep_end else 0
        ids, start = ids[cut : cut + max_length], max(start - cut, 0)
    return ids[:start], ids[start:]


def encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    kinds: tuple[str, ...] | None,
    max_length: int | None,
    name: str = "pairs",
) -> list[EncodedAnswer]:
    """Token ids of answers that must be there and fit, see [`encode_answer`]; of all columns if `kinds` is none."""
    dataset = preference_rows(list(rows) if isinstance(rows, IterableDataset) else rows, name, kinds or ())
    columns = kinds or [column for column in dataset.column_names if column != "prompt" and column not in CONTEXT]
    if images := [column for column in IMAGES if column in dataset.column_names]:
        raise ValueError(f"Expected {name} of text, got the column {images[0]!r}. Drop it where it says nothing.")
    if not columns:
        raise ValueError(
            f"Expected {name} with an answer in each row, got the columns {', '.join(dataset.column_names)}."
        )
    answers = []
    for index, row in enumerate(dataset):
        for kind in columns:
            prompt_ids, ids = encode_answer(tokenizer, row, kind, max_length) if row[kind] else ([], [])
            if not ids or not prompt_ids:
                raise ValueError(
                    f"Expected a prompt and an answer within max_length={max_length} tokens, got {len(prompt_ids)} "
                    f"and {len(ids)} tokens of {kind!r} in row {index}. Drop empty answers, or raise `max_length`."
                )
            answers.append(EncodedAnswer(index, kind, prompt_ids, ids))
    return answers


def extend_for_sft(
    pairs: Dataset, *, rejected_ratio: float = 1.0, match_compute: bool = True, seed: int = 0
) -> Dataset:
    """
    Rows for SFT on chosen and on rejected answers, the "extend" of section 4 of
    https://huggingface.co/papers/2407.10490: DPO then pushes the rejected answers down from where the model finds
    them likely rather than further into a valley.

    <Tip warning={true}>

    The extended model is a stage on the way to DPO and is not to be shipped: it has learned to give the rejected
    answers, too.

    </Tip>

    Args:
        pairs (`Dataset`):
            Preference rows, text or messages. Besides `prompt`, `chosen` and `rejected` those columns are kept which
            TRL reads: `tools`, `chat_template_kwargs`, `image`, `images`.
        rejected_ratio (`float`, *optional*, defaults to `1.0`):
            Rejected rows per chosen row, in [0, 1]; 1 in the paper, 0 is SFT on the chosen answers.
        match_compute (`bool`, *optional*, defaults to `True`):
            Return as many rows as `pairs` has, each prompt with one of its answers, so that an epoch costs what an
            epoch over the chosen answers costs. `False`: all rows. For several epochs take `False` and fewer of them,
            then every answer is seen; the paper runs 4 epochs over both answers against 8 over the chosen ones.
        seed (`int`, *optional*, defaults to `0`):
            Of which answers are taken and of the order.

    Returns:
        `Dataset`: columns `prompt` and `completion`, and those kept, shuffled, for [`~trl.SFTTrainer`].

    Raises:
        `ValueError`: when columns are missing, `rejected_ratio` lies outside of its range, or an answer is empty.
    """
    if not 0 <= rejected_ratio <= 1:
        raise ValueError(
            f"rejected_ratio must lie in [0, 1], got {rejected_ratio}. The paper has `rejected_ratio=1.0`."
        )
    pairs = preference_rows(pairs, "pairs")
    check_answers(pairs, "pairs")
    generator = np.random.default_rng(seed)
    share = rejected_ratio / (1 + rejected_ratio) if match_compute else rejected_ratio
    rejected = generator.permutation(len(pairs))[: round(share * len(pairs))]
    chosen = np.setdiff1d(np.arange(len(pairs)), rejected) if match_compute else np.arange(len(pairs))
    rows = [(index, "chosen") for index in chosen.tolist()] + [(index, "rejected") for index in rejected.tolist()]
    if len(rejected):
        logger.warning(
            f"{len(chosen)} chosen and {len(rejected)} rejected answers. The model that SFT on them makes is for DPO "
            "to start from; do not ship it, it has learned to give rejected answers."
        )
    context = [column for column in CONTEXT if column in pairs.column_names]
    answers = {CHOSEN: list(pairs[CHOSEN]), REJECTED: list(pairs[REJECTED])}
    taken = pairs.select([index for index, _ in rows]).select_columns(["prompt", *context])
    taken = taken.add_column("completion", [answers[column][index] for index, column in rows])
    return taken.select_columns(["prompt", "completion", *context]).shuffle(seed=seed)
