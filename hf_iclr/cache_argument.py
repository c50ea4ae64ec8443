"""How a model wants its key-value cache: transformers 5.24 renamed the argument `past_key_values` to `cache`."""

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache

from transformers.generation import GenerateDecoderOnlyOutput


# This file also stands in generation/, as a link, since what is copied to the Hub may import its siblings only.

NAMES = ("cache", "past_key_values")
# What the installed transformers calls it, https://github.com/huggingface/transformers: `cache` from 5.24 on.
UPSTREAM_NAME = next(name for name in NAMES if name in GenerateDecoderOnlyOutput.__dataclass_fields__)


def forward_parameters(model) -> set[str]:
    """Names of the arguments that a model's forward takes, under its adapters."""
    return set(_parameters(model))


def cache_argument(model) -> str | None:
    """
    Name under which a model's forward takes its key-value cache.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A model of transformers, remote code written for either name, or such a model under adapters.

    Returns:
        `str`, *optional*: `"cache"` or `"past_key_values"`, whichever its forward names. One of `*args, **kwargs`
        alone is taken to hand them on to a model of the installed transformers. `None` where it takes no cache.
    """
    parameters = _parameters(model)
    for name in (UPSTREAM_NAME, *NAMES):
        if name in parameters:
            return name
    kinds = {parameter.kind for name, parameter in parameters.items() if name != "self"}
    hands_on = inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.POSITIONAL_OR_KEYWORD not in kinds
    return UPSTREAM_NAME if hands_on else None


def cache_inputs(model, cache) -> dict:
    """
    A key-value cache as keyword arguments of a model's forward.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model that is called.
        cache ([`~transformers.Cache`], *optional*):
            `None` stands for none.

    Returns:
        `dict`: for `model(ids, **cache_inputs(model, cache))`; empty where there is neither a cache nor a name.

    Raises:
        ValueError: if there is a cache and the model takes none.
    """
    name = cache_argument(model)
    if name is None and cache is None:
        return {}
    if name is None:
        raise ValueError(
            f"Expected a model that takes a key-value cache, got {type(model).__name__}, which takes none."
        )
    return {name: cache}


def find_cache(arguments):
    """The key-value cache among a model's outputs, or among arguments of `generate`; `None` where there is none."""
    names = [name for name in arguments if name in NAMES]
    return arguments[names[0]] if names else None


def _parameters(model) -> Mapping[str, inspect.Parameter]:
    unwrap = getattr(model, "get_base_model", None)  # of a PeftModel, whose own forward takes anything
    model = unwrap() if unwrap is not None else model
    # A forward of the object itself (accelerate's hooks) may be a closure over the model: not kept.
    return inspect.signature(model.forward).parameters if "forward" in vars(model) else _read(type(model).forward)


@lru_cache(maxsize=64)  # reading a signature takes a fifth of a millisecond, and a draft's forward asks each time
def _read(forward: Callable) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(forward).parameters
