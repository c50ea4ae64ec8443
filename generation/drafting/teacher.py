"""What a large model says about texts, kept for the making of its draft."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hf_iclr.models import end_tokens, generate_rows, render_prompt, to_prompt_ids


@dataclass
class TeacherRow:
    """One text with what the large model makes of it."""

    input_ids: torch.Tensor  # (seq_len,)
    hidden_states: torch.Tensor  # (seq_len, hidden_size), the large model's last; filled by `read_teacher`
    mask: torch.Tensor  # (seq_len,), positions whose next token the draft has to predict


@torch.no_grad()
def read_teacher(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | dict[str, str]],
    *,
    max_length: int = 256,
    batch_size: int = 8,
) -> list[TeacherRow]:
    """
    Run the large model once over texts, or records with `"prompt"` and `"completion"`, cut into pieces of `max_length`
    tokens, and keep its last hidden states, from which its logits can be had again; sorted by length.

    Raises:
        ValueError: if there is no text, or the model does more to its logits than apply its head.
    """
    rows = sorted(tokenize(tokenizer, texts, max_length), key=lambda row: len(row.input_ids))
    if not rows:
        raise ValueError("Expected texts for the draft to learn from, got none of two tokens or more.")
    head = model.get_output_embeddings()
    probe = rows[0].input_ids[None].to(model.device)
    if not torch.allclose(model(probe).logits.float(), head(model.base_model(probe)[0]).float(), atol=1e-3, rtol=1e-3):
        raise ValueError(
            f"Expected logits that are the head applied to the last hidden state, {type(model).__name__} changes them "
            "afterwards (a scale or a soft cap). Such models are not supported."
        )
    for start in tqdm(range(0, len(rows), batch_size), desc="Large model reads"):
        chunk = rows[start : start + batch_size]
        batch = collate(chunk)
        states = model.base_model(
            input_ids=batch["input_ids"].to(model.device), attention_mask=batch["attention_mask"].to(model.device)
        )[0]
        for row, row_states in zip(chunk, states.float().cpu(), strict=True):
            row.hidden_states = row_states[: len(row.input_ids)].clone()
    return rows


@torch.no_grad()
def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    max_new_tokens: int = 96,
    temperature: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
) -> list[dict[str, str]]:
    """
    Let the model answer prompts: the texts on which its draft will work.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The large model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. If it has a chat template, each prompt becomes a user's message.
        prompts (`list[str]`):
            What to answer.
        max_new_tokens (`int`, *optional*, defaults to 96):
            Length of an answer.
        temperature (`float`, *optional*, defaults to 1.0):
            Temperature of the sampling.
        batch_size (`int`, *optional*, defaults to 32):
            Prompts at a time.
        seed (`int`, *optional*, defaults to 0):
            Seed of the sampling.

    Returns:
        `list[dict[str, str]]`: records with `"prompt"` (in the chat template) and `"completion"`.
    """
    set_seed(seed)
    answers = generate_rows(
        model,
        [to_prompt_ids(tokenizer, prompt) for prompt in prompts],
        end_tokens(model, tokenizer),
        batch_size=batch_size,
        padding=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
    )
    return [
        {"prompt": render_prompt(tokenizer, prompt), "completion": tokenizer.decode(answer)}
        for prompt, answer in zip(prompts, tqdm(answers, "Large model writes", len(prompts)), strict=True)
    ]


def collate(rows: list[TeacherRow]) -> dict[str, torch.Tensor]:
    """Pads rows on the right to one batch of `input_ids`, `attention_mask`, `hidden_states` and `mask`."""
    columns: dict[str, list[torch.Tensor]] = {
        "input_ids": [row.input_ids for row in rows],
        "attention_mask": [torch.ones_like(row.input_ids) for row in rows],
        "hidden_states": [row.hidden_states for row in rows],
        "mask": [row.mask for row in rows],
    }
    return {name: torch.nn.utils.rnn.pad_sequence(column, batch_first=True) for name, column in columns.items()}


def tokenize(tokenizer, texts, max_length: int) -> Iterator[TeacherRow]:
    """Texts as rows without states, in pieces of at most `max_length` tokens."""
    for text in [texts] if isinstance(texts, str | Mapping) else texts:
        record = {"prompt": "", "completion": text} if isinstance(text, str) else text
        known = isinstance(record, Mapping) and all(
            isinstance(record.get(key), str) for key in ("prompt", "completion")
        )
        if not known or text is texts:
            raise ValueError(
                "Expected a list of texts, or of records with the texts `prompt` and `completion`, got "
                + (f"one: type `[{text!r:.40}]`." if known else f"{text!r:.80}.")
            )
        prompt, completion = record["prompt"], record["completion"]
        # A rendered prompt holds its special tokens already.
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
        ids = prompt_ids + tokenizer(completion, add_special_tokens=not prompt)["input_ids"]
        mask = [position >= len(prompt_ids) - 1 for position in range(len(ids))]
        for start in range(0, len(ids) - 1, max_length):
            piece = torch.tensor(ids[start : start + max_length])
            yield TeacherRow(piece, torch.empty(0), torch.tensor(mask[start : start + max_length]))
