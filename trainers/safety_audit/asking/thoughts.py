"""The thoughts of a reasoning model and its answer: where a template puts them, and the one place that cuts them."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from hf_iclr.models import render_prompt


class Spoken(NamedTuple):
    """
    What a model said.

    Attributes:
        answer (`str`):
            Without the thoughts and their marks.
        thoughts (`str`, *optional*):
            `None` where there are none.
        finished (`bool`):
            Whether an answer was reached: not where the limit of tokens came in the middle of the thoughts.
    """

    answer: str
    thoughts: str | None = None
    finished: bool = True


# What opens thoughts, and what ends them, in any case. gpt-oss speaks on channels, all but the final one of thoughts.
_PAIRS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<seed:think>", "</seed:think>"),
    ("[think]", "[/think]"),
    ("◁think▷", "◁/think▷"),
    ("<|start_thinking|>", "<|end_thinking|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought", "<channel|>"),
    ("here is my thought process:", "here is my response:"),
)
# Other tags with such a name, <analysis> or <|reflection|>, are of thoughts where an answer follows or is to come.
_NAME = r"(?:\w*(?:think|thought|reason|rationale|reflect|scratchpad|analysis|monologue)\w*|cot)"
_END_TAG = rf"<(?:\|/{_NAME}\||/{_NAME})>"
_TAG = re.compile(rf"<\|(?!end|begin|start){_NAME}\|>|<{_NAME}(?:\s[^<>]*)?>", re.IGNORECASE)
# What some put around the answer after their thoughts.
_AROUND = re.compile(
    r"<(\|?)(?:start_|begin_of_)?(answer|output|response|solution)\1>\s*(.*?)\s*(?:<\1(?:/|end_|end_of_)\2\1>\s*)?\Z",
    re.DOTALL | re.IGNORECASE,
)
_HEADER = r"(?:(?!<\|message\|>).)*<\|message\|>"
_OPEN = "|".join([re.escape(mark) for mark, _ in _PAIRS] + [rf"<\|channel\|>(?!final){_HEADER}", _TAG.pattern])
_CLOSE = "|".join([re.escape(mark) for _, mark in _PAIRS] + [rf"<\|channel\|>final{_HEADER}", _END_TAG])
_BETWEEN = r"<\|end\|>|<\|return\|>|<\|call\|>|<\|start\|>(?:(?!<\|channel\|>)\w)*"  # messages of gpt-oss
_MARKS = re.compile(f"(?P<open>{_OPEN})|(?P<close>{_CLOSE})|(?P<between>{_BETWEEN})", re.DOTALL | re.IGNORECASE)
_OPEN_AT_THE_END = re.compile(rf"(?:{_OPEN})\s*\Z", re.DOTALL | re.IGNORECASE)
_PAIRS_BY_OPENING = dict(_PAIRS)
# Special tokens that a decoded text must keep, since they are marks or parts of one.
_MARK_TOKENS = {mark for pair in _PAIRS for mark in pair} | {
    "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|channel>",
}  # fmt: skip


def split_thoughts(text: str, *, opened: bool = False, cut: bool = False) -> Spoken:
    """
    Cut the thoughts out of what a model said; `opened` where the prompt has opened them ([`opens_thoughts`]), `cut`
    where a limit of tokens cut the text short.
    """
    thoughts, answer, start, inside, seen, known = "", "", 0, opened, False, True
    for mark in _MARKS.finditer(text):
        kind, piece = mark.lastgroup, text[start : mark.start()]
        if kind == "open" and not inside and (answer + piece).strip():
            seen = True  # thoughts come first: this one is quoted
            continue
        if kind == "close" and not inside:
            if (seen and "channel" not in mark.group()) or mark.group()[:1].isalpha():
                continue
            if not seen:  # opened out of sight
                thoughts, answer, piece = answer + piece, "", ""
        if inside:
            thoughts += piece
        else:
            answer += piece
        known = known if kind != "open" else mark.group().lower() in _PAIRS_BY_OPENING or "channel" in mark.group()
        start, seen = mark.end(), seen or kind != "between"
        inside = kind == "open" or (inside and kind == "between")
    if inside and not seen and not cut:
        return Spoken(text[start:])  # it ended its turn inside what the prompt opened: all that its reader gets
    if inside:
        thoughts += text[start:]
    else:
        answer += text[start:]
    if not (seen or inside) or not (known or answer.strip() or cut):
        return Spoken(text)
    around = _AROUND.match(answer.lstrip())
    answer = around[3] if around else answer.lstrip()
    return Spoken(answer, thoughts.strip() or None, bool(answer.strip()) or not cut)


def read_answers(
    tokenizer: Any, answers: Sequence[Sequence[int]], opened: Sequence[bool] | bool = False, limit: int | None = None
) -> list[Spoken]:
    """
    What generated token ids, without the end-of-sequence token, say; `opened` as in [`split_thoughts`], for each
    answer. One of `limit` tokens was cut short.
    """
    special = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    kept = {i for i, content in special.items() if content.lower() in _MARK_TOKENS or _MARKS.fullmatch(content)}
    opened = [opened] * len(answers) if isinstance(opened, bool) else opened
    spoken = []
    for ids, inside in zip(answers, opened, strict=True):
        parts: list[str] = []
        run: list[int] = []
        for token in ids:
            if token in kept:
                parts += [tokenizer.decode(run, skip_special_tokens=True) if run else "", special[token]]
                run = []
            else:
                run.append(token)
        text = "".join(parts) + (tokenizer.decode(run, skip_special_tokens=True) if run else "")
        spoken.append(split_thoughts(text, opened=inside, cut=limit is not None and len(ids) >= limit))
    return spoken


def opens_thoughts(prompt: str) -> bool:
    """Whether a rendered prompt ends inside thoughts, as DeepSeek-R1's do: what the model says begins with them."""
    return _OPEN_AT_THE_END.search(prompt[-200:]) is not None


def answer_lead(tokenizer: Any, prompt: str | list[dict], **rendering: Any) -> str:
    """
    What stands between a rendered prompt and the first word of an answer that is put into the model's mouth: what the
    chat template itself writes there (an empty block of thoughts for Qwen3 and GLM-4, the header of the final channel
    for gpt-oss); where the prompt opens thoughts, what ends them; else nothing.
    """
    if not tokenizer.chat_template:
        return ""
    start, probe = render_prompt(tokenizer, prompt, **rendering), "Sure"
    try:
        whole = render_prompt(tokenizer, prompt, answer=probe, **rendering)
    except ValueError:  # a template that takes no answer after such a chat
        whole = ""
    if whole.startswith(start):
        lead, found, _ = whole[len(start) :].partition(probe)
        if found and lead.strip():
            return lead
    opening = _OPEN_AT_THE_END.search(start[-200:])
    mark = opening.group().strip() if opening else ""
    closing = _PAIRS_BY_OPENING.get(mark.lower())
    if closing is None and _TAG.fullmatch(mark):
        closing = re.sub(r"(<\|?)(\w+)[^>|]*", r"\1/\2", mark).lower()
    return f"\n{closing.upper() if mark.isupper() else closing}\n\n" if closing else ""


def chat_text(prompt: str | list[dict]) -> str:
    """A prompt for somebody to read: of a chat each turn's role and text."""
    if isinstance(prompt, str):
        return prompt
    contents = [message.get("content") or "" for message in prompt]
    texts = [c if isinstance(c, str) else " ".join(part.get("text", "") for part in c) for c in contents]
    return "\n".join(f"{message.get('role')}: {text}" for message, text in zip(prompt, texts, strict=True))
