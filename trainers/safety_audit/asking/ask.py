"""One way to ask a model: the prompt as its template renders it, a prefix where an answer begins, thoughts cut."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from hf_iclr.models import check_decoder, check_prompts, end_tokens, render_prompt, to_answer_ids, to_prompt_ids
from hf_iclr.prefill import continue_rows

from .endpoint import OpenAIEndpoint
from .journal import Journal
from .thoughts import Spoken, answer_lead, opens_thoughts, read_answers


class Continuation(NamedTuple):
    """
    What a model said after the first tokens of an answer, or after none.

    Attributes:
        prefix_ids (`list[int]`), new_ids (`list[int]`):
            The tokens put into its mouth, and those that it said, thoughts among them.
        text (`str`), joined (`str`):
            What it said without its thoughts; and with the prefix before it.
        thoughts (`str`, *optional*):
            Its thoughts, `None` where there are none.
        finished (`bool`):
            Whether an answer was reached, not cut short in the middle of the thoughts.
    """

    prefix_ids: list[int]
    new_ids: list[int]
    text: str
    joined: str
    thoughts: str | None = None
    finished: bool = True


def prompt_and_lead(tokenizer, prompt, **rendering) -> tuple[list[int], list[int], bool]:
    """
    Token ids of a prompt; those of what its template writes between it and an answer that is given, see
    [`~hf_iclr.trainers.safety_audit.asking.thoughts.answer_lead`]; and whether the prompt has opened the thoughts.
    """
    names, template = rendering.get("chat_template_kwargs") or {}, str(tokenizer.chat_template)
    unknown = [name for name in names if not re.search(rf"\b{re.escape(name)}\b", template)]
    if unknown:
        raise ValueError(
            f"Expected arguments that the chat template reads, got {unknown[0]!r}, which is not in it. Look for the "
            "right name in `tokenizer.chat_template`."
        )
    ids, lead = to_prompt_ids(tokenizer, prompt, **rendering), answer_lead(tokenizer, prompt, **rendering)
    text = render_prompt(tokenizer, prompt, **rendering)
    whole = tokenizer(text + lead, add_special_tokens=not tokenizer.chat_template)["input_ids"] if lead else ids
    if whole[: len(ids)] != ids:
        whole = ids + tokenizer(lead, add_special_tokens=False)["input_ids"]
    return ids, whole[len(ids) :], opens_thoughts(text)


def ask(
    model,
    tokenizer,
    prompts: Sequence,
    answers: Sequence[str | Sequence[int]] | None = None,
    ks: Sequence[int] = (0,),
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    max_batch_tokens: int | None = None,
    system: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    after_lead: bool = False,
    journal: Any = None,
    progress: str | None = None,
    **sampling,
) -> dict[int, list[Continuation | None]]:
    """
    What a model says to each prompt after the first k tokens of an answer.

    Without a prefix the model is asked as its chat template says, and may think. A prefix stands where the template
    would write an answer: behind an empty block of thoughts, for instance.

    Args:
        model, tokenizer, prompts, answers, ks, max_new_tokens, batch_size, max_batch_tokens, sampling:
            As for [`~hf_iclr.prefill.generate_after_prefixes`]; the model may be an [`OpenAIEndpoint`].
        system (`str`), chat_template_kwargs (`dict`), *optional*:
            As for [`~hf_iclr.models.render_prompt`].
        after_lead (`bool`, *optional*, defaults to `False`):
            Leave no room for thoughts without a prefix either.
        journal ([`Journal`], *optional*):
            Keeps what is finished.
        progress (`str`, *optional*):
            What the progress bar says; none without.

    Returns:
        `dict[int, list[Continuation | None]]`: for each k one entry a prompt, `None` where the answer is shorter.
    """
    if answers is not None and len(answers) != len(prompts):
        raise ValueError(f"Expected one answer a prompt, got {len(answers)} and {len(prompts)}.")
    rendering = {"system": system, "chat_template_kwargs": chat_template_kwargs}
    prompts = check_prompts(prompts)
    rendered = [] if tokenizer is None else [prompt_and_lead(tokenizer, prompt, **rendering) for prompt in prompts]
    if isinstance(model, OpenAIEndpoint):
        call = {"max_new_tokens": max_new_tokens, "journal": journal or Journal(), "progress": progress, **sampling}
        heard = model.ask(tokenizer, prompts, answers, ks, rendered, **call, **rendering)
        return {k: [_heard(tokenizer, *entry) if entry else None for entry in heard[k]] for k in sorted(heard)}
    check_decoder(model)
    ends = end_tokens(model, tokenizer)
    prefixes = [to_answer_ids(tokenizer, answer or [], ends) for answer in answers or [[]] * len(rendered)]
    options: dict[str, Any] = {
        "ends": ends, "max_new_tokens": max_new_tokens, "batch_size": batch_size,
        "max_batch_tokens": max_batch_tokens, "journal": journal, "progress": progress, **sampling,
    }  # fmt: skip
    plain = [ids for ids, _, _ in rendered]
    led = [ids + lead for ids, lead, _ in rendered]
    free_ks = [k for k in ks if k == 0 and not after_lead] if led != plain else list(ks)
    other_ks = [k for k in ks if k not in free_ks]
    found: dict[int, list[list[int] | None]] = {}
    if free_ks:
        found |= continue_rows(model, plain, prefixes, free_ks, **options)
    if other_ks:
        found |= continue_rows(model, led, prefixes, other_ks, **options)
    return {
        k: _read(tokenizer, prefixes, found[k], [o and k in free_ks for _, _, o in rendered], k, max_new_tokens)
        for k in sorted(found)
    }


def _heard(tokenizer, prefix: list[int], said: Spoken) -> Continuation:
    new = tokenizer(said.answer, add_special_tokens=False)["input_ids"] if tokenizer is not None else []
    joined = tokenizer.decode(prefix + new, skip_special_tokens=True) if prefix else said.answer
    return Continuation(prefix, new, said.answer, joined, said.thoughts, said.finished)


def _read(tokenizer, prefixes, found, opened, k, limit) -> list[Continuation | None]:
    spoken = read_answers(tokenizer, [new or [] for new in found], opened, limit)
    entries: list[Continuation | None] = []
    for prefix, new, said in zip(prefixes, found, spoken, strict=True):
        if new is None:
            entries.append(None)
            continue
        joined = said.answer
        if k and said.answer == tokenizer.decode(new, skip_special_tokens=True):
            joined = tokenizer.decode(prefix[:k] + new, skip_special_tokens=True)
        elif k:
            joined = tokenizer.decode(prefix[:k], skip_special_tokens=True) + said.answer
        entries.append(Continuation(prefix[:k], new, said.answer, joined, said.thoughts, said.finished))
    return entries
