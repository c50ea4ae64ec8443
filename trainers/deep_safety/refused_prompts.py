"""Which training prompts the reference refuses, by one short greedy answer each."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_iclr.models import end_tokens, generate_rows

from ..safety_audit.judge import find_refusal_cue


def prompts_of(rows: Dataset) -> list[tuple[int, ...]]:
    """Token ids of each row up to its first label."""
    return [
        tuple(ids[: next((index for index, label in enumerate(labels) if label != -100), len(labels))])
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)
    ]


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
    Answer every prompt once, greedily, and keep the answers that refuse by the cues of [`RefusalJudge`].

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
        `dict[tuple[int], list[int]]`: token ids of each refused prompt -> those of the refusal, up to and with its end
        of turn, or the first `max_new_tokens`.
    """
    unique = sorted(set(prompts_of(rows)), key=lambda prompt: (len(prompt), prompt))
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
    for prompt, answer in zip(
        tqdm(share, f"Answers of the reference to {name}", disable=not accelerator.is_main_process),
        answers,
        strict=True,
    ):
        if find_refusal_cue(tokenizer.decode(answer, skip_special_tokens=True)) is not None:
            refusals[prompt] = answer
    return {prompt: refusal for part in gather_object([refusals]) for prompt, refusal in part.items()}
