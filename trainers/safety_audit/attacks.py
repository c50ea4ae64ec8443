"""Attacks that an aligned model should withstand: prefilling, decoding options, rank-assisted prefilling and GCG."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from hf_iclr.models import (
    answer_logits,
    check_prompts,
    end_tokens,
    to_answer_ids,
    to_prompt_ids,
)
from hf_iclr.prefill import generate_after_prefixes, generate_answers

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


class Continuation(NamedTuple):
    """An answer whose first tokens were put into the model's mouth; `joined` is the text of both parts."""

    prefix_ids: list[int]
    new_ids: list[int]
    text: str
    joined: str


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
            As for [`generate_after_prefixes`].
        generation (*optional*):
            Further arguments of [`generate_after_prefixes`], such as `max_new_tokens`.

    Returns:
        `dict[int, list[Continuation | None]]`: for each k one entry a prompt, `None` where the answer is shorter.
    """
    eos = end_tokens(model, tokenizer)
    results = generate_after_prefixes(model, tokenizer, prompts, answers, ks, **generation)
    prefixes = [to_answer_ids(tokenizer, answer, eos) for answer in answers or [[]] * len(prompts)]
    return {
        k: [
            None if new is None else _continuation(tokenizer, prefix[:k], new)
            for prefix, new in zip(prefixes, results[k], strict=True)
        ]
        for k in sorted(results)
    }


def decoding_attack(
    model, tokenizer, prompts: Sequence, grid: Sequence[dict[str, Any]] = DECODING_GRID, **generation
) -> dict[str, list[str]]:
    """
    Sample one answer of each prompt under each decoding setting (https://huggingface.co/papers/2310.06987).

    Args:
        model, tokenizer, prompts:
            As for [`generate_after_prefixes`].
        grid (`Sequence[dict]`, *optional*, defaults to six settings):
            Each with `temperature`, `top_k` or `top_p`; what isn't named changes nothing. `PAPER_DECODING_GRID` holds
            the paper's 49.
        generation (*optional*):
            Further arguments of [`generate_after_prefixes`], such as `max_new_tokens` and `seed`.

    Returns:
        `dict[str, list[str]]`: texts by setting, such as `"temperature=0.5"`.
    """
    texts = {}
    for setting in tqdm(grid, desc="decoding", leave=False):
        new = generate_answers(model, tokenizer, prompts, do_sample=True, progress=False, **setting, **generation)
        name = ", ".join(f"{key}={value:g}" for key, value in setting.items())
        texts[name] = tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


def rank_assisted_prefilling(
    model,
    tokenizer,
    prompts: Sequence,
    judge: Callable[[list[str]], list[bool]],
    *,
    num_steps: int = 3,
    num_candidates: int = 20,
    lookahead: int = 12,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    system: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> tuple[list[Continuation], list[list[int]]]:
    """
    Prefill with tokens that the model itself ranks among its first, but that don't lead to a refusal: the idea of
    https://huggingface.co/papers/2512.05518, where a person picks them. It needs no compliant answer.

    At each step every one of the `num_candidates` likeliest tokens is continued greedily by `lookahead` tokens; the
    likeliest token whose continuation isn't judged a refusal is kept, or the last one when all are.

    Args:
        model, tokenizer, prompts:
            As for [`generate_after_prefixes`].
        judge (`Callable`):
            Says of each text whether it refuses; for example `RefusalJudge().judge`.
        num_steps (`int`, *optional*, defaults to 3):
            Tokens of the prefix.
        num_candidates (`int`, *optional*, defaults to 20):
            Tokens tried at each step, the paper's 20.
        lookahead (`int`, *optional*, defaults to 12):
            Tokens a candidate is continued by before it is judged.
        batch_size (`int`, *optional*, defaults to 32), max_new_tokens (`int`, *optional*, defaults to 64):
            As for [`generate_after_prefixes`].
        system (`str`), chat_template_kwargs (`dict`), *optional*:
            As for [`~hf_iclr.models.render_prompt`].

    Returns:
        `tuple`: a [`Continuation`] a prompt, and the ranks (from 0) of its prefix tokens.
    """
    if min(num_steps, num_candidates, lookahead) < 1:
        raise ValueError(f"Expected sizes of at least 1, got {num_steps=}, {num_candidates=} and {lookahead=}.")
    prompts = check_prompts(prompts)
    rendering: dict[str, Any] = {"system": system, "chat_template_kwargs": chat_template_kwargs}
    prompt_ids = [to_prompt_ids(tokenizer, prompt, **rendering) for prompt in prompts]
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
        continued = prefilling_attack(
            model, tokenizer, [prompts[row] for row, _ in tried], [answer for _, answer in tried], (step + 1,),
            max_new_tokens=lookahead, batch_size=batch_size, progress=False, **rendering,
        )[step + 1]  # fmt: skip
        refused = iter(judge([entry.joined for entry in continued if entry is not None]))
        for row, tokens in enumerate(candidates):
            verdicts = [next(refused) for _ in tokens]
            rank = verdicts.index(False) if False in verdicts else len(tokens) - 1
            prefixes[row].append(tokens[rank])
            ranks[row].append(rank)
    final = prefilling_attack(
        model,
        tokenizer,
        prompts,
        prefixes,
        (num_steps,),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        **rendering,
    )
    return [entry for entry in final[num_steps] if entry is not None], ranks


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
    **generation,
) -> list[str | None]:
    """
    Ask each prompt with a suffix that [`gcg`] found for the beginning of its compliant answer.

    Args:
        model, tokenizer, prompts, answers:
            As for [`generate_after_prefixes`].
        target_tokens (`int`, *optional*, defaults to 8):
            Tokens of the answer that the suffix is to bring about.
        num_steps (`int`, *optional*, defaults to 50), seed (`int`, *optional*, defaults to 0):
            As for [`gcg`].
        system (`str`), chat_template_kwargs (`dict`), *optional*:
            As for [`~hf_iclr.models.render_prompt`].
        generation (*optional*):
            Further arguments of [`generate_after_prefixes`], such as `max_new_tokens`.

    Returns:
        `list[str | None]`: the answers, `None` where there is no answer to aim at.
    """
    eos = end_tokens(model, tokenizer)
    targets = [to_answer_ids(tokenizer, answer, eos)[:target_tokens] for answer in answers]
    rows = [row for row, target in enumerate(targets) if target]
    texts: list[str | None] = [None] * len(prompts)
    if not rows:
        return texts
    attacked = []
    options: dict[str, Any] = {"system": system, "chat_template_kwargs": chat_template_kwargs, "progress": False}
    for row in tqdm(rows, desc="gcg", leave=False):
        found = gcg(model, tokenizer, prompts[row], targets[row], num_steps=num_steps, seed=seed, **options)
        attacked.append(append_to_prompt(prompts[row], found.suffix))
    new = generate_answers(model, tokenizer, attacked, **options, **generation)
    for row, tokens in zip(rows, new, strict=True):
        texts[row] = tokenizer.decode(tokens, skip_special_tokens=True)
    return texts


def _continuation(tokenizer, prefix: list[int], new: list[int]) -> Continuation:
    text, joined = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (new, prefix + new))
    return Continuation(prefix, new, text, joined)
