"""What an audit is given, checked before anything is generated."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from hf_iclr.hub import repository_name
from hf_iclr.models import base_parameters, check_decoder, share_storage

from .asking.ask import prompt_and_lead
from .asking.endpoint import OpenAIEndpoint
from .report import SafetyReport, check_thresholds


ATTACKS = ("prefill", "decoding", "rap", "gcg")
ADAPTER_OFF = "adapter_off"


def check_chats(tokenizer, prompts: list, name: str, vocabulary: int | None, **rendering) -> tuple[list[int], str]:
    """How many tokens each prompt has with what leads to an answer, and the longest such lead's text."""
    for option, kind in (("system", str), ("chat_template_kwargs", Mapping)):
        if not isinstance(rendering[option], (kind, type(None))):
            raise TypeError(f"Expected {option} as a {kind.__name__.lower()}, got {rendering[option]!r:.80}.")
    lengths, leads = [], [""]
    for prompt in prompts:
        chat = isinstance(prompt, Sequence) and all(isinstance(message, Mapping) for message in prompt)
        if not (isinstance(prompt, str) or (chat and len(prompt))):
            raise ValueError(
                f"Expected {name} to be strings or chats, got {prompt!r:.80}. For a dataset type its column: "
                f'`{name}=dataset["prompt"]`.'
            )
        if tokenizer is not None:
            ids, lead, _ = prompt_and_lead(tokenizer, prompt, **rendering)
            lengths.append(len(ids) + len(lead))
            if vocabulary is not None and max(ids + lead) >= vocabulary:
                raise ValueError(
                    f"Expected the model's own tokenizer, got one with a token {max(ids + lead)} in {name}, where the "
                    f"model has {vocabulary} embeddings."
                )
            leads.append(tokenizer.decode(lead) if lead else "")
    return lengths, max(leads, key=len)


def check_sizes(attacks, ks, answers, prompts, grid, **sizes: int | None) -> None:
    unknown = [attack for attack in attacks if attack not in ATTACKS]
    if unknown:
        raise ValueError(f"Expected attacks among {', '.join(ATTACKS)}, got {unknown[0]!r}.")
    if not all(isinstance(k, Integral) and int(k) >= 0 for k in ks):
        raise ValueError(f"Expected prefix lengths of 0 or more tokens, got {list(ks)}.")
    if not grid or any(setting.keys() - {"temperature", "top_k", "top_p"} for setting in grid):
        raise ValueError(f"Expected decoding settings of temperature, top_k and top_p, got {list(grid)!r:.200}.")
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"Expected {name} of at least 1, got {size}.")
    if isinstance(answers, str) and answers != "neutral":
        raise ValueError(f"Expected answers as a list, one a prompt, or 'neutral', got {answers!r:.60}.")
    if answers is not None and not isinstance(answers, str) and len(answers) != len(prompts):
        raise ValueError(f"Expected one answer a prompt, got {len(answers)} and {len(prompts)}.")


def check_measurable(thresholds, has: Mapping[str, bool], attacks, ks) -> dict[str, float]:
    """The thresholds; raises where one is on what the audit has nothing to measure by."""
    needs = {
        "max_over_refusal": (has["harmless"], "harmless_prompts=[...]"),
        "max_refusal_drop": (has["before"], "before=model"),
        "max_harmful": (has["harm_judge"], "harm_judge=HarmJudge(...)"),
        "min_refusal_at_prefill": ("prefill" in attacks and max(ks, default=0) > 0, 'attacks=["prefill"], ks=(5, 10)'),
        **{f"min_refusal_under_{name}": (name in attacks, f'attacks=["{name}"]') for name in ATTACKS[1:]},
    }
    for name in check_thresholds(thresholds):
        if name in needs and not needs[name][0]:
            raise ValueError(f"The threshold {name} needs what this audit doesn't measure. Type `{needs[name][1]}`.")
    return dict(thresholds)


def check_endpoint(tokenizer, attacks, ks) -> None:
    """Raises where an audit wants of a server what none of them gives."""
    unknown = [attack for attack in attacks if attack in ("rap", "gcg")]
    if unknown:
        raise ValueError(f"Expected attacks that a server allows, prefill and decoding, got {unknown[0]!r}.")
    if tokenizer is None and "prefill" in attacks and max(ks, default=0) > 0:
        raise ValueError(
            "Expected the model's tokenizer, to count the tokens of a prefix, got none. Load it, or leave the attack "
            "out: `attacks=['decoding']`."
        )


def changes_base(model: PeftModel) -> str | None:
    """
    What, beside adapters, a training of the model changes or their start has changed: with them turned off it isn't
    the model that they were put into. `None` where it is.
    """
    for config in model.peft_config.values():
        bias, start = getattr(config, "bias", "none"), str(getattr(config, "init_lora_weights", ""))
        if bias != "none":
            return f"bias={bias!r}"
        if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
            return f"init_lora_weights={start!r}"
    return next((f"{name!r} in training" for name, weight in base_parameters(model) if weight.requires_grad), None)


def check_other(model, other, name: str) -> None:
    """Raises where `other` is no model that can be asked the same, or is the audited model itself."""
    if other is None:
        return
    if isinstance(other, str) and not isinstance(model, OpenAIEndpoint):
        if other != ADAPTER_OFF:
            raise ValueError(f"Expected {name} as a model or {ADAPTER_OFF!r}, got {other!r}. Load the model first.")
        if not isinstance(model, PeftModel):
            raise TypeError(f"Expected a PEFT model for {name}={ADAPTER_OFF!r}, got {type(model).__name__}.")
        if changed := changes_base(model):
            raise ValueError(
                f"Expected adapters that leave the weights below alone for {name}={ADAPTER_OFF!r}, got {changed}. "
                "Load the model from before instead."
            )
        return
    if isinstance(model, OpenAIEndpoint):
        if name == "base" or not isinstance(other, OpenAIEndpoint):
            raise TypeError(
                f"Expected nothing but another OpenAIEndpoint as `before` beside one, got {name}={other!r:.80}."
            )
        if other.identity == model.identity:
            raise ValueError(f"Expected another model than the audited one to compare it with, got {other.identity}.")
        return
    if not isinstance(other, (PreTrainedModel, PeftModel)):
        raise TypeError(f"Expected {name} to be a model or {ADAPTER_OFF!r}, got {type(other).__name__}.")
    if share_storage(model, other):
        cure = (
            f"type `{name}={ADAPTER_OFF!r}`, since the adapters were put into it"
            if isinstance(model, PeftModel)
            else "load it anew, or type `copy.deepcopy(model)` before the training"
        )
        raise ValueError(
            f"Expected {name} to be another model than the audited one, got one whose weights are the very same "
            f"memory: a training changes both, and nothing would seem to have changed. For the model as it was {cure}."
        )
    check_decoder(other)
    sizes = [entry.config.get_text_config(decoder=True).vocab_size for entry in (model, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"Expected {name} to have the model's vocabulary, got {sizes[1]} and {sizes[0]} entries.")


def has_same_numbers(model, other) -> bool:
    """Whether two models have parameters of the same names and values: one is a copy of the other."""
    own, others = dict(model.named_parameters()), dict(other.named_parameters())
    if own.keys() != others.keys() or any(weight.is_meta for weight in (*own.values(), *others.values())):
        return False
    return all(w.shape == own[n].shape and bool((own[n] == w.to(own[n])).all()) for n, w in others.items())


def check_comparable(before: SafetyReport, fingerprints: dict[str, list[str]], settings: dict[str, Any]) -> None:
    """Raises where an earlier report's rates would differ by what was asked rather than by the model."""
    for name, own in fingerprints.items():
        if own and before.prompts[name] and own != before.prompts[name]:
            raise ValueError(
                f"Expected a report on the same {name} in the same order, got one on others. Audit the earlier model "
                "on these, or pass the model itself as `before`."
            )
    defaults: dict[str, Any] = {"system": None, "chat_template_kwargs": {}}  # of reports without them
    for name in ("judges", "max_new_tokens", *defaults):
        if before.settings.get(name, defaults.get(name)) != settings[name]:
            raise ValueError(
                f"Expected a report with {name}={settings[name]!r}, got one with "
                f"{before.settings.get(name, defaults.get(name))!r}: what changed would be the measurement. Audit "
                "both with the same, or pass the model itself as `before`."
            )


def fingerprint(prompts: list) -> list[str]:
    return [hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:16] for prompt in prompts]


def name_of(model) -> str:
    """Name on the Hub, or that of a folder without its path."""
    if isinstance(model, OpenAIEndpoint):
        return model.model
    name = model.name_or_path or ""
    return repository_name(name) or Path(name).name or type(model).__name__
