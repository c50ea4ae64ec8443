"""Which training prompts the reference refuses, by one short greedy answer each."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

from .refusal_judge import find_refusal_cue


def mark_refused_prompts(
    rows: Dataset,
    model: PreTrainedModel,
    tokenizer: Any,
    accelerator: Accelerator,
    name: str,
    batch_size: int = 16,
    max_new_tokens: int = 24,
) -> Dataset:
    """
    Set the column `constrain` to whether the model refuses the prompt of a row, read off its greedy answer by
    the cues of [`RefusalJudge`]. A row that said `False` before stays `False`.

    Args:
        rows ([`~datasets.Dataset`]):
            Rows with `input_ids` and `labels`; the prompt is what comes before the first label.
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
        [`~datasets.Dataset`]: the same rows with the column `constrain`.
    """
    prompts = [
        tuple(ids[: _first_label(labels)]) for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)
    ]
    unique = sorted(set(prompts), key=lambda prompt: (len(prompt), prompt))
    share = unique[accelerator.process_index :: accelerator.num_processes]
    answers: list[tuple[tuple[int, ...], str]] = []
    for start in tqdm(
        range(0, len(share), batch_size),
        desc=f"Answers of the reference to {name}",
        disable=not accelerator.is_main_process,
    ):
        batch = share[start : start + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        output = model.generate(
            input_ids=ids.to(accelerator.device),
            attention_mask=mask.to(accelerator.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        answers += zip(batch, tokenizer.batch_decode(output[:, width:], skip_special_tokens=True), strict=True)
    refusals = {prompt: find_refusal_cue(text) is not None for prompt, text in answers}
    refused = {prompt: verdict for part in gather_object([refusals]) for prompt, verdict in part.items()}
    before = rows["constrain"] if "constrain" in rows.column_names else [True] * len(rows)
    marks = [keep and refused[prompt] for keep, prompt in zip(before, prompts, strict=True)]
    if "constrain" in rows.column_names:
        rows = rows.remove_columns("constrain")
    return rows.add_column("constrain", marks)


def _first_label(labels: list[int]) -> int:
    return next((index for index, label in enumerate(labels) if label != -100), len(labels))
