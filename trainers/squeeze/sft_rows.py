"""The paper's remedy for squeezing: supervised finetuning on both answers before DPO."""

import logging

import numpy as np
from datasets import Dataset
from trl import maybe_extract_prompt


logger = logging.getLogger(__name__)


def extend_for_sft(
    pairs: Dataset, *, rejected_ratio: float = 1.0, match_compute: bool = True, seed: int = 0
) -> Dataset:
    """
    Rows for SFT on chosen and on rejected answers, the "extend" of section 4 of
    https://huggingface.co/papers/2407.10490: DPO then pushes the rejected answers down from where the model finds
    them likely rather than further into a valley.

    <Tip warning={true}>

    The extended model is a stage on the way to DPO and is not to be shipped: it has learned to give the rejected
    answers, too.

    </Tip>

    Args:
        pairs (`Dataset`):
            Preference rows, text or messages; columns other than `prompt`, `chosen` and `rejected` are dropped.
        rejected_ratio (`float`, *optional*, defaults to `1.0`):
            Rejected rows per chosen row, in [0, 1]; 1 in the paper, 0 is SFT on the chosen answers.
        match_compute (`bool`, *optional*, defaults to `True`):
            Return as many rows as `pairs` has, each prompt with one of its answers, so that an epoch costs what an
            epoch over the chosen answers costs. `False`: all rows. For several epochs take `False` and fewer of them,
            then every answer is seen; the paper runs 4 epochs over both answers against 8 over the chosen ones.
        seed (`int`, *optional*, defaults to `0`):
            Of which answers are taken and of the order.

    Returns:
        `Dataset`: columns `prompt` and `completion`, shuffled, for [`~trl.SFTTrainer`].

    Raises:
        `ValueError`: when columns are missing, `rejected_ratio` lies outside of its range, or an answer is empty.
    """
    if not 0 <= rejected_ratio <= 1:
        raise ValueError(
            f"rejected_ratio must lie in [0, 1], got {rejected_ratio}. The paper has `rejected_ratio=1.0`."
        )
    if "prompt" not in pairs.column_names and len(pairs):
        pairs = pairs.map(maybe_extract_prompt)
    missing = [column for column in ("prompt", "chosen", "rejected") if column not in pairs.column_names]
    if missing:
        raise ValueError(
            f"pairs should have the columns prompt, chosen and rejected, got {', '.join(pairs.column_names)}. "
            "Rename them, for example with `pairs.rename_column('answer', 'chosen')`."
        )
    for column in ("chosen", "rejected"):
        empty = [row for row, answer in enumerate(pairs[column]) if not answer]
        if empty:
            raise ValueError(
                f"Every pair needs two answers, but {len(empty)} of the {column} ones are empty, the first in row "
                f"{empty[0]}. Drop them: `pairs.filter(lambda row: row['chosen'] and row['rejected'])`."
            )
    generator = np.random.default_rng(seed)
    share = rejected_ratio / (1 + rejected_ratio) if match_compute else rejected_ratio
    rejected = generator.permutation(len(pairs))[: round(share * len(pairs))]
    chosen = np.setdiff1d(np.arange(len(pairs)), rejected) if match_compute else np.arange(len(pairs))
    rows = [(index, "chosen") for index in chosen.tolist()] + [(index, "rejected") for index in rejected.tolist()]
    if len(rejected):
        logger.warning(
            f"{len(chosen)} chosen and {len(rejected)} rejected answers. The model that SFT on them makes is for DPO "
            "to start from; do not ship it, it has learned to give rejected answers."
        )
    return Dataset.from_dict(
        {
            "prompt": [pairs[index]["prompt"] for index, _ in rows],
            "completion": [pairs[index][column] for index, column in rows],
        }
    ).shuffle(seed=seed)
