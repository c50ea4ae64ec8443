"""Safety-recovery data: rows that begin a forbidden answer and learn only the refusal that follows."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_iclr.models import render_prompt, to_messages

from ..safety_audit.asking.thoughts import answer_lead, opens_thoughts


_COLUMNS = ("prompt", "harmful", "refusal")


def make_safety_recovery_dataset(
    triplets: Dataset | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefix_probability: float = 0.5,
    max_prefix_tokens: int = 100,
    copies: int = 1,
    seed: int = 0,
    max_length: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Dataset:
    """
    Rows that teach a model to refuse even after its answer has begun: the safety-recovery examples of [Safety
    Alignment Should Be Made More Than Just a Few Tokens Deep](https://huggingface.co/papers/2406.05946), equation 2. A
    row is the prompt, the first k tokens of the harmful answer, and the refusal; only the refusal and its end of turn
    have a loss. k is 0 with probability `1 - prefix_probability`, else uniform on 1 .. `max_prefix_tokens`, or on 1 ..
    the length of the harmful answer where that is shorter.

    The rows are token ids which any trainer of TRL takes as they are, packed or not. Concatenate them with four times
    as many rows of ordinary data, prepared the same way: alone they teach a model to refuse everything.
    `DeepSafetySFTTrainer` does the mixing itself and draws k anew every time a row is seen; of rows that are
    concatenated it knows by their column `constrain` that they get plain cross-entropy.

    Args:
        triplets ([`~datasets.Dataset`] or `list[dict]`):
            Columns `prompt` (`str`, or messages that do not end with the assistant's), `harmful` (`str`) and `refusal`
            (`str`); `chat_template_kwargs` (`dict`) where there is one, as in TRL's datasets.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model. If it has a chat template, the prompt is rendered with it.
        prefix_probability (`float`, *optional*, defaults to `0.5`):
            Share of rows that begin the harmful answer, "p = 0.5" in the paper.
        max_prefix_tokens (`int`, *optional*, defaults to `100`):
            Longest prefix in tokens, "C = 100" in the paper.
        copies (`int`, *optional*, defaults to `1`):
            Rows made of each triplet, with k drawn for each. As many as epochs give every epoch fresh prefixes.
        seed (`int`, *optional*, defaults to `0`):
            k depends on the seed, the copy and the triplet's index alone.
        max_length (`int`, *optional*):
            Longest row in tokens. The prefix is drawn so that the row fits; prompt and refusal are never cut.
        chat_template_kwargs (`dict`, *optional*):
            More arguments of the chat template, for instance `{"enable_thinking": False}`.

    Returns:
        [`~datasets.Dataset`]: columns `input_ids`, `labels` and `constrain`, which is `False`; row
        `copy * len(triplets) + index`.

    Raises:
        TypeError: if the triplets are neither a dataset nor a list.
        ValueError: for an argument out of range, a triplet without prompt, harmful answer or refusal, one that is too
            long, or a chat template that changes what it renders.
    """
    check_prefix_arguments(prefix_probability, max_prefix_tokens, seed, copies)
    rows = list(
        tokenize_triplets(triplets, tokenizer, max_length=max_length, chat_template_kwargs=chat_template_kwargs)
    )
    draw: dict[str, Any] = {"prefix_probability": prefix_probability, "max_prefix_tokens": max_prefix_tokens}
    draw |= {"seed": seed, "max_length": max_length}
    drawn = [
        draw_recovery_row(row, copy=copy, index=index, **draw)
        for copy in range(copies)
        for index, row in enumerate(rows)
    ]
    return Dataset.from_list([{**row, "constrain": False} for row in drawn])


def tokenize_triplets(
    triplets: Dataset | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Dataset:
    """
    Token ids of triplets, so that a row is put together by appending lists and no text is ever tokenized twice.

    With a chat template the prompt ends where the model begins to answer. What a template of a reasoning model puts
    before an answer (an empty block of thoughts) counts as prompt, so a prefix always begins at the answer. The
    refusal ends with what the template puts after an assistant's turn; where that holds no special token, with the EOS
    token.

    Args:
        triplets, tokenizer, chat_template_kwargs:
            As in [`make_safety_recovery_dataset`].
        max_length (`int`, *optional*):
            Most tokens that prompt and refusal may take together.

    Returns:
        [`~datasets.Dataset`]: columns `prompt_ids`, `harmful_ids` (up to its first special token), the refusal at the
        start of an answer (`refusal_ids`), after a word (`spaced_ids`) and after a blank (`bare_ids`); `blank_ends` is
        1 at each token of the harmful answer that ends with a blank.

    Raises:
        TypeError: if the triplets are neither a dataset nor a list.
        ValueError: see [`make_safety_recovery_dataset`].
    """
    rows = []
    special = _special_ids(tokenizer)
    for index, triplet in enumerate(tqdm(_checked(triplets), desc="Tokenizing triplets", leave=False)):
        text = _render(triplet, tokenizer, chat_template_kwargs or {}, index)
        prompt_ids = _ids(tokenizer, text.prompt)
        harmful_ids = _continuation(tokenizer, text.prompt, prompt_ids, text.lead + triplet["harmful"])
        end = next((place for place, token in enumerate(harmful_ids) if token in special), len(harmful_ids))
        if end == 0:
            raise ValueError(
                f"Triplet {index}: expected a harmful answer, {triplet['harmful']!r} begins with its end."
            )
        if special & set(tokenizer(triplet["refusal"], add_special_tokens=False)["input_ids"]):
            raise ValueError(
                f"Triplet {index}: expected a refusal without special tokens, got {triplet['refusal']!r}. "
                "The end of the turn is added here."
            )
        refusal_ids = _continuation(tokenizer, text.prompt, prompt_ids, text.lead + triplet["refusal"] + text.tail)
        if not special & set(refusal_ids):
            if tokenizer.eos_token_id is None:
                raise ValueError(
                    "Expected a token that ends an answer, the tokenizer has none. Type `tokenizer.eos_token = ...`."
                )
            refusal_ids.append(tokenizer.eos_token_id)
        if max_length is not None and len(prompt_ids) + len(refusal_ids) > max_length:
            raise ValueError(
                f"Triplet {index}: its prompt and refusal take {len(prompt_ids)} + {len(refusal_ids)} tokens, more "
                f"than `max_length={max_length}`. They are not cut: type a larger `max_length` or leave it out."
            )
        later = {}
        for name, blank in (("spaced_ids", ""), ("bare_ids", "\n")):
            begun = text.prompt + text.lead + triplet["harmful"].rstrip() + blank
            answer = _space(begun, triplet["refusal"]) + triplet["refusal"] + text.tail
            later[name] = _continuation(tokenizer, begun, _ids(tokenizer, begun), answer)
            later[name] += [] if special & set(later[name]) else [tokenizer.eos_token_id]
        begun_ids = [*prompt_ids, *harmful_ids]  # a first token decoded alone may lose its blank
        ends = [
            tokenizer.decode(begun_ids[max(0, n - 8) : n + 1])[-1:] for n in range(len(prompt_ids), len(begun_ids))
        ]
        rows.append(
            {
                "prompt_ids": prompt_ids,
                "harmful_ids": harmful_ids[:end],
                "refusal_ids": refusal_ids,
                **later,
                "blank_ends": [int(last.isspace()) for last in ends[:end]],
            }
        )
    return Dataset.from_list(rows)


def draw_recovery_row(
    row: Mapping[str, list[int]],
    *,
    seed: int,
    copy: int,
    index: int,
    prefix_probability: float = 0.5,
    max_prefix_tokens: int = 100,
    max_length: int | None = None,
) -> dict[str, list[int]]:
    """
    One row of equation 2: prompt, k harmful tokens, refusal. Depends on its arguments only, so workers, processes and
    order of reading make no difference.

    Args:
        row (`dict[str, list[int]]`):
            A row of [`tokenize_triplets`].
        seed, copy, index (`int`):
            Together the seed of the draw.
        prefix_probability, max_prefix_tokens, max_length:
            As in [`make_safety_recovery_dataset`].

    Returns:
        `dict[str, list[int]]`: `input_ids`, and `labels` that are -100 before the refusal.
    """
    prompt, harmful, refusal = row["prompt_ids"], row["harmful_ids"], row["refusal_ids"]
    longest = min(max_prefix_tokens, len(harmful))
    if max_length is not None:
        longest = min(longest, max_length - len(prompt) - max(len(refusal), len(row["spaced_ids"])))
    generator = np.random.default_rng([seed, copy, index])
    k = 0
    if generator.random() < prefix_probability and longest > 0:
        k = int(generator.integers(1, longest, endpoint=True))
        refusal = row["bare_ids"] if row["blank_ends"][k - 1] else row["spaced_ids"]
    masked = [*prompt, *harmful[:k]]
    return {"input_ids": [*masked, *refusal], "labels": [-100] * len(masked) + [*refusal]}


def make_recovery_preference_dataset(
    triplets: Dataset | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefix_probability: float = 0.5,
    max_prefix_tokens: int = 100,
    copies: int = 1,
    seed: int = 0,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Dataset:
    """
    Safety recovery as pairs for [`~trl.DPOTrainer`] (not in the paper): after the prompt and the first k tokens of the
    harmful answer, the refusal is chosen and the rest of the harmful answer rejected.

    `DPOTrainer` tokenizes text itself, so the columns are text, the prompt already rendered. Not every prefix can be
    told by text: where its tokens would come out differently, k is lowered to the nearest cut that `DPOTrainer` makes
    exactly (in practice, the last end of a word), or to 0. After a prefix the refusal begins with a space.

    Args:
        triplets, tokenizer, prefix_probability, max_prefix_tokens, copies, seed, chat_template_kwargs:
            As in [`make_safety_recovery_dataset`], with the same draws.

    Returns:
        [`~datasets.Dataset`]: columns `prompt`, `chosen` and `rejected` (`str`).

    Raises:
        TypeError: if the triplets are neither a dataset nor a list.
        ValueError: see [`make_safety_recovery_dataset`].
    """
    check_prefix_arguments(prefix_probability, max_prefix_tokens, seed, copies)
    rows = tokenize_triplets(triplets, tokenizer, chat_template_kwargs=chat_template_kwargs)
    pairs = []
    for copy in range(copies):
        for index, (triplet, row) in enumerate(zip(_checked(triplets), rows, strict=True)):
            # At least one token of the harmful answer is left to reject.
            shorter = {**row, "harmful_ids": row["harmful_ids"][:-1]}
            draw: dict[str, Any] = {"prefix_probability": prefix_probability, "max_prefix_tokens": max_prefix_tokens}
            drawn = draw_recovery_row(shorter, seed=seed, copy=copy, index=index, **draw)
            k = drawn["labels"].count(-100) - len(row["prompt_ids"])
            text = _render(triplet, tokenizer, chat_template_kwargs or {}, index)
            pairs.append(_preference_pair(text, triplet, row["harmful_ids"], k, tokenizer))
    return Dataset.from_list(pairs)


def check_prefix_arguments(prefix_probability: float, max_prefix_tokens: int, seed: int, copies: int = 1) -> None:
    """Raises `ValueError` for what [`draw_recovery_row`] cannot draw from."""
    if not 0 <= prefix_probability <= 1:
        raise ValueError(f"Expected `prefix_probability` between 0 and 1, got {prefix_probability}.")
    if max_prefix_tokens < 1:
        raise ValueError(
            f"Expected `max_prefix_tokens` to be at least 1, got {max_prefix_tokens}. For rows without a prefix type "
            "`prefix_probability=0`."
        )
    if seed < 0:
        raise ValueError(f"Expected a seed that is not negative, got {seed}.")
    if copies < 1:
        raise ValueError(f"Expected `copies` to be at least 1, got {copies}.")


class _Rendered(NamedTuple):
    """Text of a prompt up to where the answer begins, and what the template puts around an answer."""

    prompt: str
    lead: str  # blanks, which may become part of the answer's first token
    tail: str


def _checked(triplets) -> Dataset:
    """The triplets as a dataset in which no text is missing."""
    if isinstance(triplets, Sequence) and not isinstance(triplets, str):
        triplets = Dataset.from_list(list(triplets))
    if not isinstance(triplets, Dataset):
        raise TypeError(
            f"Expected triplets in a `datasets.Dataset` or a list, got {type(triplets).__name__}. Of a stream type "
            "`list(dataset.take(256))`, of a `DatasetDict` one split."
        )
    missing = [column for column in _COLUMNS if column not in triplets.column_names]
    if missing:
        raise ValueError(
            f"Expected triplets with columns {', '.join(_COLUMNS)}; {', '.join(missing)} missing, got "
            f"{', '.join(triplets.column_names) or 'none'}. Type `dataset.rename_column(...)`."
        )
    if not len(triplets):
        raise ValueError("Expected triplets, got an empty dataset.")
    for index, row in enumerate(triplets):
        for column in _COLUMNS:
            value = row[column]
            if not (value.strip() if isinstance(value, str) else value):
                raise ValueError(f"Triplet {index}: column {column!r} is empty. Fill it or leave the triplet out.")
            if not isinstance(value, str) and (column != "prompt" or not isinstance(value, list)):
                raise ValueError(f"Triplet {index}: expected text in column {column!r}, got {type(value).__name__}.")
    return triplets


def _render(triplet, tokenizer, template_kwargs, index) -> _Rendered:
    prompt, refusal = triplet["prompt"], triplet["refusal"]
    if not tokenizer.chat_template:
        if not isinstance(prompt, str):
            raise ValueError(
                f"Triplet {index}: its prompt is a list of messages, and the tokenizer has no chat template. Type "
                "`tokenizer.chat_template = ...` or give the prompt as text."
            )
        return _Rendered(prompt, "", "")
    template_kwargs = {**template_kwargs, **(triplet.get("chat_template_kwargs") or {})}
    if to_messages(prompt)[-1]["role"] == "assistant":
        raise ValueError(f"Triplet {index}: expected a prompt that ends with the user's message, not the assistant's.")
    start = render_prompt(tokenizer, prompt, chat_template_kwargs=template_kwargs)
    whole = render_prompt(tokenizer, prompt, answer=refusal, chat_template_kwargs=template_kwargs)
    if not whole.startswith(start) and opens_thoughts(start):
        # As DeepSeek-R1's: asked, the model is to think; an answer that is given has no thoughts. They are closed.
        lead = answer_lead(tokenizer, prompt, chat_template_kwargs=template_kwargs)
        _, found, tail = whole.rpartition(refusal)
        if lead and found:
            return _Rendered(start + lead, "", tail)
    if not whole.startswith(start):
        raise ValueError(
            f"Triplet {index}: the chat template renders the prompt differently when an answer follows, so the model "
            f"would learn from a prompt that it never sees. Alone it ends with {start[-40:]!r}. Type "
            '`chat_template_kwargs=...` (for instance {"enable_thinking": False}), give the triplets such a column, '
            "or mend the template."
        )
    lead, found, tail = whole[len(start) :].partition(refusal)
    if not found:
        raise ValueError(
            f"Triplet {index}: the chat template trims or rewrites the refusal {refusal!r}: {whole[len(start) :]!r}. "
            "Strip the blanks around the refusal, or mend the template."
        )
    return _Rendered(start + lead, "", tail) if lead.strip() else _Rendered(start, lead, tail)


def _special_ids(tokenizer) -> set[int]:
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    return special - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}  # one token may be both, as in GPT-2


def _ids(tokenizer, text) -> list[int]:
    """A rendered text holds its special tokens already; of a plain one, an EOS token that is added is taken off."""
    if tokenizer.chat_template:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token) else ids


def _continuation(tokenizer, prompt, prompt_ids, answer) -> list[int]:
    """Ids of an answer as they follow the prompt; alone where the two would share a token."""
    joined = _ids(tokenizer, prompt + answer)
    if joined[: len(prompt_ids)] == prompt_ids:
        return joined[len(prompt_ids) :]
    return tokenizer(answer, add_special_tokens=False)["input_ids"]


def _space(before: str, text: str) -> str:
    """What stands between two texts: nothing after a blank, nor in a script that separates no words."""
    names = (unicodedata.name(character, "") for character in (before[-1:], text[:1]) if character)
    joined = any(name.startswith(("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")) for name in names)
    return "" if before[-1:].isspace() or joined else " "


def _preference_pair(text, triplet, harmful_ids, k, tokenizer) -> dict[str, str]:
    prompt, harmful = text.prompt, text.lead + triplet["harmful"]
    begin = tokenizer("")["input_ids"][:1]
    if tokenizer.bos_token and begin == [tokenizer.bos_token_id]:
        prompt = prompt.removeprefix(tokenizer.bos_token)  # the trainer tokenizes text with its special tokens
    eos = tokenizer.eos_token
    tail = text.tail[: text.tail.index(eos) + len(eos)] if eos and eos in text.tail else text.tail
    prompt_ids = tokenizer(prompt)["input_ids"]
    for length in range(k, 0, -1):
        prefix = text.lead + tokenizer.decode(harmful_ids[:length]).removeprefix(text.lead)
        rest = harmful.removeprefix(prefix)
        refusal = _space(prefix, triplet["refusal"]) + triplet["refusal"].lstrip()
        expected = [*prompt_ids, *harmful_ids[:length]]
        texts = [prompt + prefix, prompt + prefix + refusal, prompt + harmful]
        if rest != harmful and all(ids[: len(expected)] == expected for ids in tokenizer(texts)["input_ids"]):
            return {"prompt": prompt + prefix, "chosen": refusal + tail, "rejected": rest + tail}
    return {"prompt": prompt, "chosen": text.lead + triplet["refusal"] + tail, "rejected": harmful + tail}
