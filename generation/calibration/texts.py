"""Prompts and the text that follows them, as token ids, from datasets, lists and chats."""

from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from hf_iclr.models import to_prompt_ids


class Text(NamedTuple):
    """Token ids of a prompt and of what follows it, which is the part that is measured."""

    prompt: list[int]
    continuation: list[int]


def split_texts(
    dataset, tokenizer, text_column, prompt_tokens, max_new_tokens, count, seed, two_halves
) -> list[list[Text]]:
    """Up to `count` texts from half of the rows and as many from the other half, in an order that `seed` gives."""
    if len(dataset) < (2 if two_halves else 1):
        raise ValueError(
            f"Expected at least {2 if two_halves else 1} rows{', half of them held out' if two_halves else ''}, "
            f"got {len(dataset)}."
        )
    columns = list(dataset[0]) if isinstance(dataset[0], dict) else None
    column = text_column
    if columns is not None and text_column not in columns:
        if "messages" not in columns:
            raise ValueError(
                f"The dataset has no column {text_column!r}, only {', '.join(columns)}. Type `text_column=...`."
            )
        column = "messages"
    order = np.random.default_rng(seed).permutation(len(dataset)).tolist()
    halves = []
    for part in (order[::2], order[1::2]) if two_halves else (order,):
        pieces: list[list[Text]] = []
        for index in part[:count]:
            row = dataset[index]
            row = row if columns is None else row[column]
            pieces.append(_texts_of_row(row, tokenizer, prompt_tokens, max_new_tokens))
        # first pieces of all rows, then second pieces, ...
        texts = [text for layer in zip_longest(*pieces) for text in layer if text is not None]
        if not texts:
            raise ValueError("Expected texts of at least two tokens, got only shorter ones.")
        halves.append(texts[:count])
    return halves


def _texts_of_row(row, tokenizer, prompt_tokens: int, max_new_tokens: int) -> list[Text]:
    if not isinstance(row, str):  # a chat
        answer = tokenizer(row[-1]["content"], add_special_tokens=False)["input_ids"][:max_new_tokens]
        return [Text(to_prompt_ids(tokenizer, row[:-1]), answer)] if answer else []
    ids = tokenizer(row)["input_ids"]
    pieces = [
        ids[start : start + prompt_tokens + max_new_tokens]
        for start in range(0, len(ids), prompt_tokens + max_new_tokens)
    ]
    texts = []
    for piece in pieces:
        cut = min(prompt_tokens, len(piece) // 2)
        if cut:
            texts.append(Text(piece[:cut], piece[cut:]))
    return texts
