"""Prompts and the text that follows them, as token ids, from datasets, lists and chats."""

from collections.abc import Mapping
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
    if isinstance(dataset, str | Mapping) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"Expected a dataset with a length, or a list of its rows, got a {type(dataset).__name__}. Of several "
            "splits name one, `dataset['train']`; of a stream, `list(dataset.take(500))`."
        )
    if len(dataset) < (2 if two_halves else 1):
        raise ValueError(
            f"Expected at least {2 if two_halves else 1} rows{', half of them held out' if two_halves else ''}, "
            f"got {len(dataset)}."
        )
    order = np.random.default_rng(seed).permutation(len(dataset)).tolist()
    halves = []
    for part in (order[::2], order[1::2]) if two_halves else (order,):
        pieces = [
            _texts_of_row(dataset[i], tokenizer, text_column, prompt_tokens, max_new_tokens) for i in part[:count]
        ]
        # first pieces of all rows, then second pieces, ...
        texts = [text for layer in zip_longest(*pieces) for text in layer if text is not None]
        if not texts:
            raise ValueError("Expected texts of at least two tokens, got only shorter ones.")
        halves.append(texts[:count])
    return halves


def _texts_of_row(row, tokenizer, text_column: str, prompt_tokens: int, max_new_tokens: int) -> list[Text]:
    if isinstance(row, Mapping):
        if text_column not in row and "messages" not in row:
            raise ValueError(
                f"The dataset has no column {text_column!r}, only {', '.join(row)}. Type `text_column=...`."
            )
        row = row[text_column if text_column in row else "messages"]
    if isinstance(row, str):
        ids, whole = tokenizer(row)["input_ids"], prompt_tokens + max_new_tokens
        pieces = [ids[start : start + whole] for start in range(0, len(ids), whole)]
        cuts = [min(prompt_tokens, len(piece) // 2) for piece in pieces]
        return [Text(piece[:cut], piece[cut:]) for piece, cut in zip(pieces, cuts, strict=True) if cut]
    chat = isinstance(row, list) and len(row) > 1 and all(isinstance(message, Mapping) for message in row)
    if not chat or not isinstance(row[-1].get("content"), str):
        raise ValueError(f"Expected each row to be a text, or a chat that ends with an answer, got {row!r:.80}.")
    answer = tokenizer(row[-1]["content"], add_special_tokens=False)["input_ids"][:max_new_tokens]
    return [Text(to_prompt_ids(tokenizer, row[:-1]), answer)] if answer else []
