"""Which training prompts the reference refuses, by one short greedy answer each."""

import dataclasses
import logging
import statistics
from itertools import chain
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel

from hf_iclr.models import end_tokens
from hf_iclr.prefill import context_of, continue_rows

from ..safety_audit.asking.thoughts import opens_thoughts, read_answers
from ..safety_audit.judge import find_refusal_cue
from .reference_log_probs import CONSTRAIN, REF_LOGPS


logger = logging.getLogger(__name__)

SHORT, WITH_THOUGHTS = 24, 512  # tokens of an answer: refusals show in their first words, where there are no thoughts
# β₁ times the negative log-probability (nats) of a compliant first token at which refusals stayed in
# benchmarks/deep_safety.py; see docs/deep_safety.md.
STRONG_CONSTRAINT = 20.0


def prompts_of(rows: Dataset) -> list[list[tuple[int, ...]]]:
    """For each row the token ids in front of each of its answers, the runs of tokens with a label."""
    return [
        [
            tuple(ids[:index])
            for index, label in enumerate(labels)
            if label != -100 and (index == 0 or labels[index - 1] == -100)
        ]
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)
    ]


def mark_answers(
    rows: Dataset, refusals: dict[tuple[int, ...], list[int]]
) -> tuple[list[list[bool]], dict[tuple[int, ...], list[int]]]:
    """
    For each token of each row whether it belongs to an answer to a refused prompt and no column `constrain`
    says that it must not, and the refusals of the prompts so marked.
    """
    before = rows["constrain"] if "constrain" in rows.column_names else [None] * len(rows)
    every: list[list[bool]] = []
    found: dict[tuple[int, ...], list[int]] = {}
    for prompts, own, ids in zip(prompts_of(rows), before, rows["input_ids"], strict=True):
        allowed = own if isinstance(own, list) else [own is not False] * len(ids)
        marked = {len(prompt): prompt in refusals and allowed[len(prompt)] for prompt in prompts}
        found |= {prompt: refusals[prompt] for prompt in prompts if marked[len(prompt)]}
        flags: list[bool] = []
        for place in range(len(ids)):
            flags.append(marked.get(place, bool(flags) and flags[-1]))
        every.append(flags)
    return every, found


def find_refusals(
    rows: Dataset,
    model: PreTrainedModel,
    tokenizer: Any,
    accelerator: Accelerator,
    name: str,
) -> dict[tuple[int, ...], list[int]]:
    """
    Answer every turn's prompt once, greedily, and keep the answers that refuse by the cues of [`RefusalJudge`].
    Thoughts are cut before an answer is judged; one that was not reached is no refusal. Processes share the prompts.

    Returns:
        `dict[tuple[int], list[int]]`: token ids of each refused prompt, what comes before a run of labels -> those of
        the refusal, with thoughts if there are any, up to and with its end of turn, or as far as it came.
    """
    unique = sorted(set(chain.from_iterable(prompts_of(rows))), key=lambda prompt: (len(prompt), prompt))
    title = f"Answers of the reference to {name}" if accelerator.is_main_process else None

    prompts = unique[accelerator.process_index :: accelerator.num_processes]
    found: dict[tuple[int, ...], list[int]] = {}
    context, unanswered = context_of(model), 0
    for limit in (SHORT, WITH_THOUGHTS):
        fitting = [prompt for prompt in prompts if len(prompt) + limit <= context]
        unanswered, prompts = unanswered + len(prompts) - len(fitting), fitting
        options: dict[str, Any] = {"max_new_tokens": limit, "batch_size": 16, "progress": title}
        said = continue_rows(model, prompts, ends=end_tokens(model, tokenizer), with_end=True, **options)[0]
        opened = [opens_thoughts(tokenizer.decode(prompt[-20:])) for prompt in prompts]
        spoken = read_answers(tokenizer, [ids or [] for ids in said], opened, limit)
        for prompt, ids, answer in zip(prompts, said, spoken, strict=True):
            if ids and answer.finished and find_refusal_cue(answer.answer) is not None:
                found[prompt] = ids
        prompts = [prompt for prompt, answer in zip(prompts, spoken, strict=True) if not answer.finished]
    if unanswered := unanswered + len(prompts):
        logger.warning(
            "%d of %d answers of the reference ended in the middle of their thoughts, after %d tokens, or had no room "
            "in its context: these prompts count as not refused. Train on prompts that turn thinking off, or mark "
            "rows in a column `constrain`.",
            unanswered,
            len(unique),
            WITH_THOUGHTS,
        )
    return {prompt: refusal for part in gather_object([found]) for prompt, refusal in part.items()}


def warn_of_a_weak_constraint(trainer: Any) -> None:
    """Say so where the reference finds the answers to prompts that it refuses not unlikely enough to be held back."""
    rows = trainer.train_dataset.select([i for i, marks in enumerate(trainer.train_dataset[CONSTRAIN]) if any(marks)])
    if not len(rows):
        logger.warning(
            "The reference refuses no prompt of the %d training rows, by the English cues of `RefusalJudge`: "
            "nothing is constrained, this is plain SFT. Mark rows in a boolean column `constrain` and set "
            "`constrain='all'`.",
            len(trainer.train_dataset),
        )
        return
    rows = rows.map(
        lambda row: {"labels": [t if mark else -100 for t, mark in zip(row["labels"], row[CONSTRAIN], strict=True)]}
    )
    first_token = dataclasses.replace(trainer.data_collator.window, stored_tokens=1)
    scored = trainer._score(rows, "refused rows' first tokens", window=first_token, keep=False)[REF_LOGPS]
    loss = -statistics.mean(value for values in scored for value in values)
    logger.info("The reference refuses the prompts of %d of %d training rows.", len(rows), len(trainer.train_dataset))
    if trainer.args.beta_first * loss < STRONG_CONSTRAINT:
        logger.warning(
            "On the %d prompts it refuses, the reference finds the first token of the training answers only %.1f "
            "nats unlikely. `beta_first=%s` gives way by ln(1 + 2 β r t) / β nats, so refusals may be lost; set "
            "`beta_first=%.1f`.",
            len(rows),
            loss,
            trainer.args.beta_first,
            STRONG_CONSTRAINT / max(loss, 0.1),
        )
