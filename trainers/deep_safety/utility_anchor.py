"""Self-distillation: ordinary prompts with the answers of the aligned model, which keep it useful while it learns."""

import logging
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_iclr.models import to_messages

from ..safety_audit.asking.ask import ask


logger = logging.getLogger(__name__)


def distill_utility_anchor(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    max_new_tokens: int = 256,
    chat_template_kwargs: dict[str, Any] | None = None,
    **generation: Any,
) -> Dataset:
    """
    Ordinary prompts with the answers of the aligned model itself, which keep it useful while it learns from
    safety-recovery rows ("responses distilled from the initial aligned model",
    [paper](https://huggingface.co/papers/2406.05946), section 3).

    Args:
        model ([`~transformers.PreTrainedModel`]), tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The aligned model, before any training, and its tokenizer.
        prompts (`list` of `str` or of chats):
            Instructions, or messages that end with the user's.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest answer, thoughts included, which are cut from it. A prompt whose answer does not end by then is
            left out, as an answer cut short would teach to stop in mid-sentence.
        chat_template_kwargs (`dict`, *optional*):
            More arguments of the chat template, which the rows get too.
        generation (*optional*):
            Further arguments of [`~hf_iclr.trainers.safety_audit.asking.ask.ask`], such as `batch_size`, `do_sample`
            and `seed`. Answers are greedy by default.

    Returns:
        [`~datasets.Dataset`]: columns `prompt` and `completion`, messages if the tokenizer has a chat template, else
        text; what TRL's trainers take.

    Raises:
        ValueError: if there is no prompt, or no answer ended.
    """
    options: dict[str, Any] = {"chat_template_kwargs": chat_template_kwargs, "progress": "utility anchor"}
    entries = ask(model, tokenizer, prompts, max_new_tokens=max_new_tokens, **options, **generation)[0]
    templated, rows = bool(tokenizer.chat_template), []
    for prompt, entry in zip(prompts, entries, strict=True):
        if entry and entry.text and len(entry.new_ids) < max_new_tokens:  # neither empty nor cut short
            answer = [{"role": "assistant", "content": entry.text}] if templated else entry.text
            row: dict[str, Any] = {"prompt": to_messages(prompt) if templated else prompt, "completion": answer}
            rows.append({**row, "chat_template_kwargs": chat_template_kwargs} if chat_template_kwargs else row)
    if not rows:
        raise ValueError(
            f"Expected answers of at most {max_new_tokens} tokens, none of {len(prompts)} ended. "
            "Type a larger `max_new_tokens`."
        )
    if len(rows) < len(prompts):
        logger.warning(
            "%d of %d prompts are left out, their answers did not end within %d tokens.",
            len(prompts) - len(rows),
            len(prompts),
            max_new_tokens,
        )
    return Dataset.from_list(rows)
