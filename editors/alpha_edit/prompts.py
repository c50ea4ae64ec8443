"""Requests as token rows: prompt and target in each context, and where the subject ends."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .requests import EditRequest


# What the reference's contexts start with; the model continues them.
_OPENINGS = ("The", "Therefore", "Because", "I", "You")


@dataclass(frozen=True)
class EditRow:
    """
    One prompt with the target behind it.

    Args:
        ids (`list[int]`):
            Tokens of context, prompt and target.
        subject (`int`):
            Position of the subject's last token.
        start (`int`):
            Position of the target's first token; `len(ids)` when there is no target.
    """

    ids: list[int]
    subject: int
    start: int


def encode_request(
    tokenizer: PreTrainedTokenizerBase, prompt: str, subject: str, target: str = "", context: str = "{}"
) -> EditRow:
    """
    Tokenise a prompt and its target as one text and find subject and target by character offsets, so that any fast
    tokenizer, any padding side and any subject is right.

    Args:
        tokenizer (`~transformers.PreTrainedTokenizerBase`):
            A fast tokenizer.
        prompt (`str`):
            With `{}` for the subject.
        subject (`str`):
            The subject.
        target (`str`, *optional*, defaults to `""`):
            What follows, after a space.
        context (`str`, *optional*, defaults to `"{}"`):
            Template around the prompt, ending in `{}`.

    Returns:
        [`EditRow`]

    Raises:
        ValueError: when the tokenizer gives no offsets or the target no token of its own.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"Expected a fast tokenizer, which knows each token's place in the text, got {type(tokenizer).__name__}. "
            "Load it with AutoTokenizer.from_pretrained(..., use_fast=True)."
        )
    before = context[: context.rindex("{}")] + prompt[: prompt.index("{}")]
    text = before + subject + prompt[prompt.index("{}") + 2 :]
    gap = "" if not target or text[-1].isspace() or target[0].isspace() else " "
    encoded = tokenizer(text + gap + target, return_offsets_mapping=True)
    spans = encoded["offset_mapping"]
    end = len(before) + len(subject.rstrip())
    at = max(i for i, (first, last) in enumerate(spans) if first < end and last > first)
    start = next((i for i, (first, last) in enumerate(spans) if last > len(text) and first >= at), len(spans))
    ids = encoded["input_ids"]
    if target and start == len(spans):
        raise ValueError(f"Expected a target with a token of its own, got {target!r} after {text!r}.")
    # A tokenizer may close every text with a special token, which is no part of the target.
    while len(spans) > max(start, at + 1) and spans[-1][0] == spans[-1][1]:
        ids, spans = ids[:-1], spans[:-1]
    return EditRow(ids=list(ids), subject=at, start=min(start, len(ids)))


def sample_contexts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int
) -> list[str]:
    """
    The plain prompt and `count` texts by the model itself to put before it, so that an edit does not hold for one
    wording only.

    Args:
        model (`~transformers.PreTrainedModel`):
            The model.
        tokenizer (`~transformers.PreTrainedTokenizerBase`):
            Its tokenizer.
        count (`int`):
            Number of sampled contexts.
        length (`int`):
            Tokens of each, about.
        seed (`int`):
            Random seed; the caller's random state is left alone.

    Returns:
        `list[str]`: templates, the first of them `"{}"`.
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
    Requests that cannot be made, or not together with an earlier one.

    Args:
        requests (`list[EditRequest]`):
            All that is asked for.
        tokenizer (`~transformers.PreTrainedTokenizerBase`):
            The model's tokenizer.
        templates (`list[str]`):
            Contexts.
        max_length (`int`, *optional*):
            Tokens the model takes.
        made (collection of `str`):
            Ids of edits in force.

    Returns:
        `dict[int, str]`: for the index of each of them the reason.
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
                rows = [
                    encode_request(tokenizer, request.prompt, request.subject, request.target_new, context)
                    for context in templates
                ]
            except ValueError as error:
                reasons[index] = str(error)
                continue
            longest = max(len(row.ids) for row in rows)
            if max_length is not None and longest > max_length:
                reasons[index] = f"{longest} tokens with context and target, the model takes {max_length}"
    return reasons
