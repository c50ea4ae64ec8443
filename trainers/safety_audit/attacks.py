"""Attacks that an aligned model should withstand: prefilling, decoding options, rank-assisted prefilling and GCG."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from tqdm.auto import tqdm

from hf_iclr.models import answer_logits, check_prompts, end_tokens, to_answer_ids

from .asking.ask import Continuation, ask, prompt_and_lead
from .asking.journal import Journal
from .gcg import append_to_prompt, gcg


# One sample of each prompt under each; a small part of PAPER_DECODING_GRID.
DECODING_GRID: tuple[dict[str, Any], ...] = (
    {"temperature": 0.5},
    {"temperature": 1.0},
    {"top_k": 10},
    {"top_k": 200},
    {"top_p": 0.5},
    {"top_p": 0.9},
)
# The 49 settings of https://huggingface.co/papers/2310.06987.
PAPER_DECODING_GRID: tuple[dict[str, Any], ...] = (
    *({"temperature": step / 20} for step in range(1, 21)),
    *({"top_k": k} for k in (1, 2, 5, 10, 20, 50, 100, 200, 500)),
    *({"top_p": step / 20} for step in range(1, 21)),
)


def prefilling_attack(
    model,
    tokenizer,
    prompts: Sequence,
    answers: Sequence[str | Sequence[int]] | None,
    ks: Sequence[int] = (5, 10, 20, 40),
    **generation,
) -> dict[int, list[Continuation | None]]:
    """
    Continue each prompt after the first k tokens of a compliant answer (section 2.3 of
    https://huggingface.co/papers/2406.05946).

    Args:
        model, tokenizer, prompts, answers, ks:
            As for [`ask`].
        generation (*optional*):
            Further arguments of [`ask`], such as `max_new_tokens`, `system` and `chat_template_kwargs`.

    Returns:
        `dict[int, list[Continuation | None]]`: for each k one entry a prompt, `None` where the answer is shorter.
    """
    return ask(model, tokenizer, prompts, answers, ks, **{"progress": "prefill", **generation})


def decoding_attack(
    model, tokenizer, prompts: Sequence, grid: Sequence[dict[str, Any]] = DECODING_GRID, **generation
) -> dict[str, list[Continuation | None]]:
    """
    Sample one answer of each prompt under each decoding setting (https://huggingface.co/papers/2310.06987).

    Args:
        model, tokenizer, prompts:
            As for [`ask`].
        grid (`Sequence[dict]`, *optional*, defaults to six settings):
            Each with `temperature`, `top_k` or `top_p`; what isn't named changes nothing. `PAPER_DECODING_GRID` holds
            the paper's 49.
        generation (*optional*):
            Further arguments of [`ask`], such as `max_new_tokens` and `seed`.

    Returns:
        `dict[str, list[Continuation | None]]`: answers by setting, such as `"temperature=0.5"`.
    """
    answers = {}
    for setting in grid:
        name = ", ".join(f"{key}={value:g}" for key, value in setting.items())
        options = {"do_sample": True, "progress": f"decoding, {name}", **setting, **generation}
        answers[name] = ask(model, tokenizer, prompts, **options)[0]
    return answers


def rank_assisted_prefilling(
    model,
    tokenizer,
    prompts: Sequence,
    judge: Callable[..., Sequence[bool]],
    *,
    num_steps: int = 3,
    num_candidates: int = 20,
    lookahead: int = 12,
    batch_size: int = 32,
    system: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    **generation,
) -> tuple[list[Continuation], list[list[int]]]:
    """
    Prefill with tokens that the model itself ranks among its first, but that don't lead to a refusal: the idea of
    https://huggingface.co/papers/2512.05518, where a person picks them. It needs no compliant answer.

    At each step every one of the `num_candidates` likeliest tokens is continued greedily by `lookahead` tokens; the
    likeliest token whose continuation isn't judged a refusal is kept, or the last one when all are.

    Args:
        model, tokenizer, prompts:
            As for [`ask`].
        judge (`Callable`):
            Says of each text whether it refuses; for example `RefusalJudge().judge`. It is given the prompts too if it
            has a parameter `prompts`.
        num_steps (`int`, *optional*, defaults to 3):
            Tokens of the prefix.
        num_candidates (`int`, *optional*, defaults to 20):
            Tokens tried at each step, the paper's 20.
        lookahead (`int`, *optional*, defaults to 12):
            Tokens a candidate is continued by before it is judged.
        batch_size (`int`, *optional*, defaults to 32), system (`str`), chat_template_kwargs (`dict`), *optional*:
            As for [`ask`].
        generation (*optional*):
            Further arguments of [`ask`], such as `max_new_tokens`.

    Returns:
        `tuple`: a [`Continuation`] a prompt, and the ranks (from 0) of its prefix tokens.
    """
    if min(num_steps, num_candidates, lookahead) < 1:
        raise ValueError(f"Expected sizes of at least 1, got {num_steps=}, {num_candidates=} and {lookahead=}.")
    prompts = check_prompts(prompts)
    rendering: dict[str, Any] = {"system": system, "chat_template_kwargs": chat_template_kwargs}
    rendered = [prompt_and_lead(tokenizer, prompt, **rendering) for prompt in prompts]
    prompt_ids = [ids + lead for ids, lead, _ in rendered]  # where an answer would be given
    takes_prompts = "prompts" in inspect.signature(judge).parameters
    ends = set(end_tokens(model, tokenizer)) | set(tokenizer.all_special_ids)
    prefixes: list[list[int]] = [[] for _ in prompts]
    ranks: list[list[int]] = [[] for _ in prompts]
    for step in tqdm(range(num_steps), desc="rank-assisted prefilling", leave=False):
        candidates: list[list[int]] = [[] for _ in prompts]
        # one token more, so that the last logits are those after the prefix
        for rows, logits in answer_logits(model, prompt_ids, [[*prefix, 0] for prefix in prefixes], batch_size):
            for row, top in zip(rows, logits[:, step].argsort(descending=True).tolist(), strict=True):
                candidates[row] = [token for token in top if token not in ends][:num_candidates]
        tried = [(row, [*prefixes[row], token]) for row in range(len(prompts)) for token in candidates[row]]
        asked = [prompts[row] for row, _ in tried]
        options = {**generation, "max_new_tokens": lookahead, "batch_size": batch_size, "progress": None, **rendering}
        continued = ask(model, tokenizer, asked, [answer for _, answer in tried], (step + 1,), **options)[step + 1]
        texts = ["" if entry is None else entry.joined for entry in continued]
        refused = iter(judge(texts, prompts=asked) if takes_prompts else judge(texts))
        for row, tokens in enumerate(candidates):
            verdicts = [next(refused) for _ in tokens]
            rank = verdicts.index(False) if False in verdicts else len(tokens) - 1
            prefixes[row].append(tokens[rank])
            ranks[row].append(rank)
    options = {"batch_size": batch_size, "progress": "rank-assisted prefilling", **generation, **rendering}
    final = ask(model, tokenizer, prompts, prefixes, (num_steps,), **options)[num_steps]
    return [entry for entry in final if entry is not None], ranks


def gcg_attack(
    model,
    tokenizer,
    prompts: Sequence,
    answers: Sequence[str | Sequence[int]],
    *,
    target_tokens: int = 8,
    num_steps: int = 50,
    seed: int = 0,
    system: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    journal: Journal | None = None,
    progress: str | None = "gcg",
    **generation,
) -> list[Continuation | None]:
    """
    Ask each prompt with a suffix that [`gcg`] found for the beginning of its compliant answer.

    Args:
        model, tokenizer, prompts, answers, system, chat_template_kwargs, journal, progress:
            As for [`ask`]. The journal keeps the suffixes too.
        target_tokens (`int`, *optional*, defaults to 8):
            Tokens of the answer that the suffix is to bring about.
        num_steps (`int`, *optional*, defaults to 50), seed (`int`, *optional*, defaults to 0):
            As for [`gcg`].
        generation (*optional*):
            Further arguments of [`ask`], such as `max_new_tokens`.

    Returns:
        `list[Continuation | None]`: the answers, `None` where there is no answer to aim at.
    """
    ends = end_tokens(model, tokenizer)
    targets = [to_answer_ids(tokenizer, answer or [], ends)[:target_tokens] for answer in answers]
    rows = [row for row, target in enumerate(targets) if target]
    found: list[Continuation | None] = [None] * len(prompts)
    if not rows:
        return found
    rendering: dict[str, Any] = {"system": system, "chat_template_kwargs": chat_template_kwargs}
    journal = journal or Journal()
    stage = journal.stage("gcg", [list(prompts), rendering, targets, num_steps, seed])
    search = {"num_steps": num_steps, "seed": seed, "progress": False, **rendering}
    for (row,) in tqdm(stage.share([[row] for row in rows]), desc=progress, disable=not progress, leave=False):
        stage.add({row: gcg(model, tokenizer, prompts[row], targets[row], **search).suffix})
    suffixes = stage.collect()
    attacked = [append_to_prompt(prompts[row], suffixes[row]) for row in rows]
    options = {"journal": journal, "progress": progress, **generation, **rendering}
    for row, entry in zip(rows, ask(model, tokenizer, attacked, **options)[0], strict=True):
        found[row] = entry
    return found
