"""Self-distillation: ordinary prompts with the answers of the aligned model, which keep it useful while it learns."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_iclr.models import end_tokens, evaluation_mode, generate_rows, to_messages, to_prompt_ids


logger = logging.getLogger(__name__)


def distill_utility_anchor(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    do_sample: bool = False,
    seed: int = 0,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Dataset:
    """
    Ordinary prompts with the answers of the aligned model itself, which keep it useful while it learns from
    safety-recovery rows ("responses distilled from the initial aligned model",
    [paper](https://huggingface.co/papers/2406.05946), section 3).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The aligned model, before any training.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a padding token.
        prompts (`list[str]` or `list[list[dict]]`):
            Instructions, or messages that end with the user's.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest answer. A prompt whose answer does not end by then is left out, as an answer cut short would teach
            to stop in mid-sentence.
        batch_size (`int`, *optional*, defaults to `8`):
            Prompts at a time.
        do_sample (`bool`, *optional*, defaults to `False`):
            Sample as the model's generation config says, instead of taking the most probable token.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.
        chat_template_kwargs (`dict`, *optional*):
            More arguments of the chat template.

    Returns:
        [`~datasets.Dataset`]: columns `prompt` and `completion`, messages if the tokenizer has a chat template, else
        text; what TRL's trainers take.

    Raises:
        ValueError: if there is no prompt, no padding token, or no answer ended.
    """
    if not prompts:
        raise ValueError("Expected prompts to answer, got none.")
    if tokenizer.pad_token_id is None:
        raise ValueError("Expected a tokenizer that can pad. Type `tokenizer.pad_token = tokenizer.eos_token`.")
    stops, templated = end_tokens(model, tokenizer), bool(tokenizer.chat_template)
    rows = []
    with evaluation_mode(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        answers = generate_rows(
            model,
            [to_prompt_ids(tokenizer, prompt, chat_template_kwargs=chat_template_kwargs) for prompt in prompts],
            stops,
            batch_size=batch_size,
            padding=tokenizer.pad_token_id,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
        )
        for prompt, ids in zip(tqdm(prompts, "Distilling the utility anchor"), answers, strict=True):
            if len(ids) > 1 and ids[-1] in stops:  # neither empty nor cut short
                answer = tokenizer.decode(ids[:-1], skip_special_tokens=True)
                completion = [{"role": "assistant", "content": answer}] if templated else answer
                rows.append({"prompt": to_messages(prompt) if templated else prompt, "completion": completion})
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
