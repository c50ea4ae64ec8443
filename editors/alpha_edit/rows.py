"""Requests as rows of tokens: where subject and target stand in them, the contexts around, and what cannot be done."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_iclr.models import render_prompt

from .config import AlphaEditConfig
from .requests import EditRequest


# What the reference's contexts start with; the model continues them.
_OPENINGS = ("The", "Therefore", "Because", "I", "You")

_ANSWER = "An answer."  # to see where a chat template puts one

# Names of characters after which no space is written: Chinese and Japanese with their marks, Thai and its neighbours.
_WITHOUT_SPACES = (
    *("CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "IDEOGRAPHIC", "FULLWIDTH", "BOPOMOFO", "YI SYLLABLE"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE", "BALINESE", "TAI ", "NEW TAI"),
)


@dataclass(frozen=True)
class EditRow:
    """One prompt with the target behind it."""

    ids: list[int]  # tokens of context, prompt and target
    subject: int  # position of the subject's last token
    start: int  # position of the target's first token; len(ids) when there is no target
    later: tuple[int, ...] = ()  # positions of the tokens before the target's further chunks

    @property
    def places(self) -> tuple[int, ...]:
        """Where the model is edited."""
        return (self.subject, *self.later)


def encode_request(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    subject: str | None,
    target: str = "",
    context: str = "{}",
    rendered: bool = False,
) -> EditRow:
    """
    Token row of a prompt, with `{}` for its subject, and its target, see [`encode_answer`]. `context` is a template
    with `{}` for the prompt. The tokens up to the subject's last one are those of the prompt alone; without a subject
    the whole prompt stands for it.

    Raises:
        ValueError: when the tokenizer gives no offsets or the subject or the target no token of its own.
    """
    if subject is None:
        prompt, subject = "{}", prompt
    place, (lead, tail) = prompt.index("{}"), context.split("{}")
    turn = prompt[:place] + subject + prompt[place + 2 :]
    shown = _as_shown(tokenizer, turn) if rendered else turn
    text = lead + shown + tail
    begin = len(lead) + place - turn.index(shown)
    end = begin + len(subject.rstrip())
    ids, spans = _ids_and_spans(tokenizer, text, not rendered)
    at = max((i for i, (first, last) in enumerate(spans) if first < end and last > begin), default=-1)
    if at < 0:
        raise ValueError(f"Expected a subject with a token of its own, got {subject!r} in {text!r}.")
    start = len(ids)
    if target:
        ids, start = encode_answer(tokenizer, text, target, at + 1, rendered)
    return EditRow(ids=ids, subject=at, start=start)


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, text: str, answer: str, kept: int = 1, rendered: bool = False
) -> tuple[list[int], int]:
    """
    Token ids of a prompt and its answer, tokenised as one text, and the position of the first token in which the
    answer's characters begin. Between the two stands a space, unless one of them has white space there or the prompt
    ends in a script that writes without spaces. A `rendered` chat has all that stands before its answer, special
    tokens too.

    Where the first `kept` tokens are not those of the prompt alone, because a token spans its end, prompt and answer
    are tokenised each by itself.

    Raises:
        ValueError: when the tokenizer gives no offsets, or prompt or answer have no token of their own.
    """
    spaced = not (rendered or text[-1:].isspace() or answer[:1].isspace() or _ends_without_space(text))
    answer = _as_shown(tokenizer, answer) if rendered else " " * spaced + answer
    alone, _ = _ids_and_spans(tokenizer, text, not rendered)
    ids, spans = _ids_and_spans(tokenizer, text + answer, not rendered)
    # A tokenizer of bytes gives each byte of a character the whole character's span.
    start = next((i for i, (_, last) in enumerate(spans) if last > len(text)), len(ids))
    if start < kept or ids[:kept] != alone[:kept]:
        start, ids = len(alone), alone + _ids_and_spans(tokenizer, answer, special=False)[0]
    if not 0 < start < len(ids):
        raise ValueError(
            f"Expected a prompt and a target with a token of its own each, got {answer.strip()!r} after {text!r}."
        )
    return ids, start


def split_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: EditRequest | str, answer: str | None, context: str, rendered: bool
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Token ids of a prompt and of the answer after it: of an edit's prompt the very row that is edited."""
    if answer is None:
        return None
    if isinstance(prompt, EditRequest):
        row = encode_request(tokenizer, prompt.prompt, prompt.subject, answer, context, rendered)
        ids, start = row.ids, row.start
    else:
        shown = _as_shown(tokenizer, prompt) if rendered else prompt
        ids, start = encode_answer(tokenizer, context.replace("{}", shown), answer, rendered=rendered)
    return tuple(ids[:start]), tuple(ids[start:])


def _as_shown(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A turn's text as the chat template shows it: many leave out the white space around it."""
    probe = "\n\tturn\t\n"
    try:
        keeps = probe in render_prompt(tokenizer, probe)
    except ValueError:  # a template of chats with a system prompt, say
        keeps = True
    return text if keeps else text.strip()


def _ids_and_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, special: bool
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
    """Whether its last character that is seen opens a quotation or bracket, or is of a script without spaces."""
    last = next((c for c in reversed(text) if unicodedata.category(c)[0] not in "CM"), " ")
    name, opens = unicodedata.name(last, ""), unicodedata.category(last) in ("Ps", "Pi")
    return opens or name.startswith(_WITHOUT_SPACES) or "\u3000" <= last <= "\u303f"  # the last are marks of Chinese


def encode_in_contexts(
    tokenizer: PreTrainedTokenizerBase, request: EditRequest, config: AlphaEditConfig
) -> list[EditRow]:
    """A request in each context of which the plain prompt is the first and, by default, the only one."""
    rows = [
        encode_request(tokenizer, request.prompt, request.subject, request.target_new, context, config.chat_template)
        for context in config.context_templates or ["{}"]
    ]
    length = len(rows[0].ids) - rows[0].start
    count = -(-length // config.chunk_length)  # chunks, of like length
    chunks = [(len(row.ids) - row.start, row) for row in rows]
    return [
        replace(row, later=tuple(row.start + own * k // count - 1 for k in range(1, count))) for own, row in chunks
    ]


def chat_context(tokenizer: PreTrainedTokenizerBase, context: str = "{}") -> str:
    """
    A context as the one turn of a chat up to where the answer begins, by the tokenizer's chat template.

    Raises:
        ValueError: when there is no chat template, or one that does not show a turn's text once.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"Expected a tokenizer with a chat template for chat_template=True, got {type(tokenizer).__name__} "
            "without one. Load the chat model's tokenizer, or set chat_template=False."
        )
    text, whole = render_prompt(tokenizer, context), render_prompt(tokenizer, context, answer=_ANSWER)
    if whole.startswith(text):  # the template may put a space, or an empty thought, before an answer
        text = whole.partition(_ANSWER)[0]
    if text.count("{}") != 1:
        raise ValueError(
            f"Expected a chat template that shows a turn's text once, got {text!r}. Pass context_templates."
        )
    return text


def sample_contexts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: AlphaEditConfig) -> list[str]:
    """
    Templates: the plain prompt `"{}"`, and `num_contexts` texts of about `context_length` tokens by the model itself
    to put before it, so that an edit does not hold for one wording only; with `chat_template` each as a turn. The
    caller's random state is left alone.

    Raises:
        ValueError: when the tokenizer has no token for an English word, or no chat template for a chat.
    """
    templates = ["{}"]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(config.seed)
        for index in range(config.num_contexts):
            opening = _OPENINGS[index % len(_OPENINGS)]
            ids = torch.tensor([tokenizer(opening)["input_ids"]], dtype=torch.long, device=model.device)
            if not ids.numel():
                raise ValueError(
                    f"Expected a tokenizer with a token for {opening!r}, where contexts begin, got none. Pass "
                    "`AlphaEditConfig(context_templates=['{}', ...])`, or num_contexts=0."
                )
            for _ in range(config.context_length - 1):
                logits = model(input_ids=ids, use_cache=False).logits[0, -1].float()
                values, tokens = logits.topk(min(5, len(logits)))
                ids = torch.cat([ids, tokens[torch.multinomial(values.softmax(-1), 1)][None]], 1)
            text = tokenizer.decode(ids[0], skip_special_tokens=True)
            templates.append(" ".join(text.replace("{", " ").replace("}", " ").split()) + ". {}")
    return [chat_context(tokenizer, text) for text in templates] if config.chat_template else templates


def reasons_against(
    requests: Sequence[EditRequest],
    tokenizer: PreTrainedTokenizerBase,
    config: AlphaEditConfig,
    max_length: int | None,
    made: Mapping[str, EditRequest],
) -> dict[int, str]:
    """
    For each request that cannot be made, or not together with an earlier one, its index and the reason. `max_length`
    is the number of tokens that the model takes, `made` the edits in force by
    their ids.
    """
    seen: dict[str, int] = {}
    names: dict[str, int] = {}
    reasons: dict[int, str] = {}
    for index, request in enumerate(requests):
        other = seen.setdefault(request.text, index)
        named = names.setdefault(request.id, index)
        force = made.get(request.id, request)
        if force.text != request.text:
            reasons[index] = f"an edit of {force.text!r} with its id {request.id} is in force"
        elif request.id in made and force.target_new == request.target_new:
            reasons[index] = "this edit is in force already"
        elif other != index and requests[other].target_new.strip() == request.target_new.strip():
            reasons[index] = f"the same edit as request {other}"
        elif other != index:
            set_to = f"{request.text!r} to {requests[other].target_new!r}"
            reasons[index] = f"contradicts request {other}, which sets {set_to}"
        elif named != index:
            reasons[index] = f"has the id of request {named}"
        else:
            try:
                rows = encode_in_contexts(tokenizer, request, config)
            except ValueError as error:
                reasons[index] = str(error)
                continue
            if tokenizer.unk_token_id in rows[0].ids[rows[0].start :]:
                reasons[index] = f"the tokenizer has no token for a part of the target {request.target_new!r}"
                continue
            longest = max(len(row.ids) for row in rows)
            if max_length is not None and longest > max_length:
                reasons[index] = f"{longest} tokens with context and target, the model takes {max_length}"
    return reasons
