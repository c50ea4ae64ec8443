"""The special tokens of a generation config, in the forms that `generate` takes them."""

import torch


def end_tokens(config) -> list[int]:
    """The tokens that end a text; none where the config ([`~transformers.GenerationConfig`]) names none."""
    return [] if config.eos_token_id is None else torch.as_tensor(config.eos_token_id).flatten().tolist()


def padding_token(config) -> int | None:
    """What finished rows are filled with: the padding token, else the first that ends a text, as in `generate`."""
    return int(config.pad_token_id) if config.pad_token_id is not None else next(iter(end_tokens(config)), None)
