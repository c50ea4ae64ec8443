"""Which training prompts the reference refuses, by one short greedy answer each."""

from itertools import chain
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_iclr.models import end_tokens, generate_rows

from ..safety_audit.judge import find_refusal_cue


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
    batch_size: int = 16,
    max_new_tokens: int = 24,
) -> dict[tuple[int, ...], list[int]]:
    """
    Answer every turn's prompt once, greedily, and keep the answers that refuse by the cues of [`RefusalJudge`].

    Args:
        rows ([`~datasets.Dataset`]):
            Rows with `input_ids` and `labels`; the prompt is what comes before each run of labels.
        model ([`~transformers.PreTrainedModel`]):
            The reference, in evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decodes the answers.
        accelerator ([`~accelerate.Accelerator`]):
            Every process answers its share.
        name (`str`):
            What the progress bar calls the dataset.
        batch_size (`int`, *optional*, defaults to 16):
            Prompts answered at once.
        max_new_tokens (`int`, *optional*, defaults to 24):
            Length of an answer; refusals show in their first words.

    Returns:
        `dict[tuple[int], list[int]]`: token ids of each refused prompt -> those of the refusal, up to and with its end
        of turn, or the first `max_new_tokens`.
    """
    unique = sorted(set(chain.from_iterable(prompts_of(rows))), key=lambda prompt: (len(prompt), prompt))
    share = unique[accelerator.process_index :: accelerator.num_processes]
    refusals: dict[tuple[int, ...], list[int]] = {}
    answers = generate_rows(
        model,
        share,
        end_tokens(model, tokenizer),
        batch_size=batch_size,
        padding=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    title = f"Answers of the reference to {name}"
    for prompt, answer in zip(tqdm(share, title, disable=not accelerator.is_main_process), answers, strict=True):
        if find_refusal_cue(tokenizer.decode(answer, skip_special_tokens=True)) is not None:
            refusals[prompt] = answer
    return {prompt: refusal for part in gather_object([refusals]) for prompt, refusal in part.items()}
