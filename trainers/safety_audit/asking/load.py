"""Models and tokenizers by their names, those of adapters that have none of their own among them."""

from pathlib import Path
from typing import Any

from peft import AutoPeftModelForCausalLM, PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer


def load_model(name: str, *, with_adapter: bool = False, accelerator: Any = None) -> Any:
    """
    A model, also an adapter's, in the type it is stored in, over the devices there are; with an accelerator as a whole
    on this process's. `with_adapter` keeps the adapter apart, so that it can be turned off.
    """
    auto = AutoPeftModelForCausalLM if with_adapter else AutoModelForCausalLM
    return auto.from_pretrained(name, dtype="auto", device_map={"": accelerator.device} if accelerator else "auto")


def load_tokenizer(name: str) -> Any:
    """A model's tokenizer, of an adapter without one that of its base model; `ValueError` if neither is there."""
    own = any(Path(name, file).exists() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
    if own or not Path(name, "adapter_config.json").exists():
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            own_error = error
        try:
            base = PeftConfig.from_pretrained(name).base_model_name_or_path
        except Exception:  # noqa: BLE001  it is no adapter, in whatever way
            raise own_error from None
    else:
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
    try:
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"Expected a tokenizer in the adapter's folder {name} or with its base model {base}, got none: {error} "
            "Save one there: `tokenizer.save_pretrained(...)`."
        ) from error
