"""What a cascading `generate` call is asked for, and what it did: per prompt, and for the whole call."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .cache_argument import cache_argument
from .cached_decoder import position_limit, reads_states, same_vocabulary, vocabulary_size
from .deferral_rules import check_rule


# `generate` arguments that a cascade adds, or whose default differs from transformers' (20 drafts, cut at confidence
# 0.4).
CASCADE_DEFAULTS = {
    "cascade_rule": "spec",
    "cascade_alpha": 0.3,
    "strict_prefix": 0,
    "cascade_backend": "auto",
    "num_assistant_tokens": 4,
    "num_assistant_tokens_schedule": "auto",  # "constant" beside a `num_assistant_tokens`
    "assistant_confidence_threshold": 0.0,
}
# Settings by which `generate` drafts in another way than with the small model, or mixes it in itself.
_OTHER_DRAFTERS = (
    *("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "speculation_type", "assistant_ensemble_weight"),
)
_CHOICES = {
    "cascade_backend": ("auto", "batched", "assisted"),
    "num_assistant_tokens_schedule": ("auto", "constant", "heuristic", "heuristic_transient"),
}


class CascadeOptions(NamedTuple):
    """What a cascade needs beyond a generation config, in the order of `CASCADE_DEFAULTS`."""

    rule: str
    alpha: float
    strict_prefix: int
    backend: str
    num_assistant_tokens: int  # the draft length γ
    schedule: str
    confidence_threshold: float


def complete_options(named: dict[str, Any], defaults: dict[str, Any] | None = None) -> dict[str, Any]:
    """
    The arguments of a cascade that are named, then those of its models (`defaults`), then `CASCADE_DEFAULTS`. Raises
    `ValueError` for values that can't be meant.
    """
    given = {name: value for name, value in named.items() if value is not None}
    options: dict[str, Any] = (defaults or {}) | given
    if "num_assistant_tokens" in options:  # a draft length that is named is kept
        options.setdefault("num_assistant_tokens_schedule", "constant")
    options = {**CASCADE_DEFAULTS, **options}
    if options["cascade_rule"] == "spec" and "cascade_alpha" in given and "cascade_rule" not in given:
        raise ValueError(
            f"cascade_alpha={options['cascade_alpha']!r} is a rule's parameter, and rule 'spec' has none: the text is "
            'the large model\'s own. Name a rule, for example `cascade_rule="token_v3"`, or leave `cascade_alpha` out.'
        )
    check_rule(options["cascade_rule"], options["cascade_alpha"])
    gamma, prefix = options["num_assistant_tokens"], options["strict_prefix"]
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or gamma != int(gamma) or gamma < 1:
        raise ValueError(f"num_assistant_tokens must be a whole number of at least 1, got {gamma!r}.")
    if isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 0:
        raise ValueError(f"strict_prefix must be a whole number of at least 0, got {prefix!r}.")
    for name, choices in _CHOICES.items():
        if options[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {options[name]!r}.")
    threshold = options["assistant_confidence_threshold"]
    if not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise ValueError(f"assistant_confidence_threshold is a probability in [0, 1], got {threshold!r}.")
    return options


_COUNTS = ("rounds", "drafted", "accepted", "new_tokens", "deferred", "drift")  # of each row
_COSTS = (
    *("large_forwards", "small_forwards", "large_tokens", "small_tokens"),
    *("draft_seconds", "verify_seconds", "overhead_seconds", "total_seconds"),
)


def check_call(model, assistant_model, rule, inputs, setting, kwargs) -> None:
    """Raises `ValueError` for a call that can't be served, before any work is done."""
    if assistant_model is None and setting("assistant_early_exit") is None and rule != "spec":
        raise ValueError(
            f"Rule {rule!r} mixes in a small model, got none. Pass `assistant_model=small`, build the model with "
            "`enable_cascade(large, small)`, or leave `cascade_rule` out."
        )
    if setting("num_beams") not in (None, 1):
        raise ValueError(
            f"A cascade samples or decodes greedily, got num_beams={setting('num_beams')}. Pass `num_beams=1`."
        )
    # "hybrid" as a model's default means nothing to transformers, either
    usable = (None, "dynamic", "dynamic_full", *(["hybrid"] if kwargs.get("cache_implementation") is None else []))
    if setting("cache_implementation") not in usable:
        raise ValueError(
            f"A cascade rolls its cache back after rejected drafts, a {setting('cache_implementation')!r} one "
            "can't. Leave `cache_implementation` out, of the generation config, too."
        )
    if setting("use_cache") is False:
        raise ValueError("A cascade needs the key-value cache, got use_cache=False. Leave it out.")
    if setting("guidance_scale") not in (None, 1):
        raise ValueError(
            f"guidance_scale={setting('guidance_scale')} makes the large model read a second text, token by token, "
            "whose cache can't take rejected tokens back. Leave it out, or call `generate` of the large model."
        )
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError(
            "A cascade reads token ids with both models, got `inputs_embeds`, which only the large one could read. "
            "Pass `input_ids`."
        )
    for name in ("dola_layers", *(_OTHER_DRAFTERS if assistant_model is not None else ())):
        if setting(name) not in (None, False):
            raise ValueError(
                f"{name}={setting(name)!r} asks for other drafts or another target than those of the cascade. "
                f"Leave {name} out, or call `generate` of the large model."
            )
    for input_ids in (inputs, kwargs.get("input_ids")):
        tensor = isinstance(input_ids, torch.Tensor)
        if input_ids is not None and not (tensor and (input_ids.dim() == 2 or input_ids.is_floating_point())):
            raise TypeError(
                "Expected token ids as a tensor of shape (prompts, length), got "
                + (f"one of shape {tuple(input_ids.shape)}" if tensor else f"{type(input_ids).__name__}")
                + ". Type `tokenizer(prompts, padding=True, return_tensors='pt')['input_ids']`."
            )
        if input_ids is not None and input_ids.shape[-1] == 0:
            raise ValueError("Expected a prompt of at least one token, got an empty one.")
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    if setting("output_attentions") and attention != "eager":
        raise ValueError(
            f'output_attentions=True needs attention "eager", got {attention!r}, which returns none. Load the large '
            'model with `attn_implementation="eager"`.'
        )
    halves = model.cascade_pair[0], assistant_model
    for half in halves:
        if half is not None and not reads_states(half) and cache_argument(half) is None:
            raise ValueError(
                f"A cascade takes rejected drafts out of a key-value cache, got a {type(half).__name__}, which keeps "
                "none. Choose a model with one."
            )
    if assistant_model is None:
        return
    given = [inputs, *(kwargs.get(name) for name in ("input_ids", "assistant_encoder_outputs"))]
    if kwargs.get("encoder_outputs") is not None and all(value is None for value in given):
        raise ValueError(
            "Expected `input_ids`, which the small model's own encoder reads, got `encoder_outputs` of the large one "
            "alone."
        )
    if assistant_model.config.is_encoder_decoder != model.config.is_encoder_decoder:
        kinds = ["an encoder-decoder" if one.config.is_encoder_decoder else "a decoder" for one in halves]
        raise ValueError(
            f"Both models must be of one kind, got {kinds[0]} (large) and {kinds[1]} (small). Choose a small model of "
            "the family of the large one."
        )
    if assistant_model.device != model.device:
        raise ValueError(
            f"Both models must be on one device, got {model.device} (large) and {assistant_model.device} (small). "
            f"Type `assistant_model.to({str(model.device)!r})`."
        )
    if assistant_model._is_stateful:
        raise ValueError(
            f"{type(assistant_model).__name__} keeps a recurrent state that can't be rolled back to an earlier "
            "token, so it can't draft. Choose a small model with attention layers."
        )
    tokenizers = kwargs.get("tokenizer"), kwargs.get("assistant_tokenizer")
    if None in tokenizers and not same_vocabulary(model, assistant_model, tokenizers):
        raise ValueError(
            f"The vocabularies differ: {vocabulary_size(model)} entries (large) and "
            f"{vocabulary_size(assistant_model)} (small). Pass `tokenizer=` and `assistant_tokenizer=` to bridge "
            "them."
        )


def check_text(mask: torch.Tensor, input_ids: torch.Tensor, cache) -> None:
    """Raises `ValueError` where the ids are not the whole text by its mask or cache, or a row ends with padding."""
    cached = 0 if cache is None else cache.get_seq_length()
    if cached >= input_ids.shape[1]:
        raise ValueError(
            f"The cache given holds {cached} tokens and the ids only {input_ids.shape[1]}: pass all of them, and a "
            "new one."
        )
    layers = [layer for layer in getattr(cache, "layers", ()) if getattr(layer, "keys", None) is not None]
    if cached and layers and len(layers[0].keys) != len(input_ids):
        raise ValueError(
            f"The cache given holds {len(layers[0].keys)} rows, and there are {len(input_ids)} texts. Expected as "
            "many; for several sequences of a prompt, `cache.batch_repeat_interleave(n)`."
        )
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"Expected an `attention_mask` of the shape of the token ids, {tuple(input_ids.shape)}, got "
            f"{tuple(mask.shape)}. Beside a cache, too, pass all ids of the text: the drafts come from all of it."
        )
    for row in (mask[:, -1] == 0).nonzero()[:1, 0].tolist():
        raise ValueError(
            f"Row {row} of `attention_mask` ends with padding, but a text goes on from its last token. Expected at "
            'least one token in each row, and padding on the left: `tokenizer.padding_side = "left"`.'
        )


def check_positions(assistant_model, prompt_length: int, new_tokens: int) -> None:
    """Raises `ValueError` where the text would leave the small model's table of positions."""
    limit = position_limit(assistant_model) if assistant_model is not None else None
    needed = prompt_length + new_tokens - 1  # the last token is not read
    if limit is not None and needed > limit:
        raise ValueError(
            f"The small model has {limit} positions; a prompt of {prompt_length} tokens and {new_tokens} new ones "
            f"need {needed}. Lower `max_new_tokens`, shorten the prompt, or choose a small model with more."
        )


def check_numbers(broken: int, written: list[int]) -> None:
    """Raises `ValueError` if the large model's logits of a round are `broken`."""
    if broken:
        raise ValueError(
            f"The large model gave NaN logits after {max(written)} new tokens. Expected finite numbers: "
            "check its weights, or load it with `dtype=torch.bfloat16` instead of float16."
        )


def under_adapters(model):
    """The model that a [`~peft.PeftModel`] put its adapters into; any other model itself."""
    if not (hasattr(model, "peft_config") and hasattr(model, "get_base_model")):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise TypeError(
            f"A cascade serves adapters that stand in the layers, got a {type(model).__name__} that learned a prompt "
            f"({model.active_peft_config.peft_type.value}). Pass the model with LoRA or another of them."
        )
    return model.get_base_model()


def check_assistant(assistant_model) -> None:
    if assistant_model is not None and not hasattr(assistant_model, "generate"):  # a PEFT model has it, too
        raise TypeError(
            f"Expected a small model that can `generate`, got {assistant_model!r}. Load it first: "
            '`AutoModelForCausalLM.from_pretrained("small")`.'
        )


def end_tokens(config) -> list[int]:
    """The tokens that end a text; none where the config ([`~transformers.GenerationConfig`]) names none."""
    return [] if config.eos_token_id is None else torch.as_tensor(config.eos_token_id).flatten().tolist()


def padding_token(config) -> int | None:
    """What finished rows are filled with: the padding token, else the first that ends a text, as in `generate`."""
    return int(config.pad_token_id) if config.pad_token_id is not None else next(iter(end_tokens(config)), None)


@dataclass
class CascadeStatistics:
    """
    Counts and times of one `generate` call of a speculative cascade, kept as `model.cascade_statistics`.

    Attributes:
        backend (`str`):
            `"batched"` (this library's loop) or `"assisted"` (the loop of transformers with replaced target logits).
        rule (`str`), alpha (`float`):
            The deferral rule and its parameter.
        rounds, drafted, accepted, new_tokens (`list[int]`, one entry a row):
            Draft-and-verify rounds the row took part in, tokens drafted for it (each candidate counts), drafted tokens
            kept, tokens emitted.
        deferred (`list[float]`, one entry a row):
            Expected number of emitted positions that the large model decided, Σ r (or Σ_u r(u) q(u) for token rules).
            Deferral is not rejection: a deferred draft is still accepted with probability 1 - TV(π, q).
        drift (`list[float]`, one entry a row):
            Σ TV(π, p) over the emitted positions: 0 is the large model's own law.
        large_forwards, small_forwards, large_tokens, small_tokens (`int`):
            Forward passes of each model and the tokens (batch x length) they processed.
        draft_lengths (`dict[int, int]`):
            How many rounds had drafts of up to that many tokens; 0 is a token of the large model alone.
        candidates (`dict[int, int]`):
            How many of the rounds with drafts had that many candidates for their first token.
        looked_up, looked_up_accepted (`int`):
            Drafted tokens that were copied from the row's own text, and how many of them were kept.
        round_seconds (`dict[int, float]`):
            Where draft lengths are chosen: what a round of each costs, as it was once measured.
        draft_seconds, verify_seconds, total_seconds (`float`):
            Wall time inside the small model's forwards, the large model's, and of the whole loop. On a GPU, which runs
            behind the host, the split shows where the host waited.
    """

    backend: str
    rule: str
    alpha: float
    rounds: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    deferred: list[float] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    large_forwards: int = 0
    small_forwards: int = 0
    large_tokens: int = 0
    small_tokens: int = 0
    draft_lengths: dict[int, int] = field(default_factory=dict)
    candidates: dict[int, int] = field(default_factory=dict)
    round_seconds: dict[int, float] = field(default_factory=dict)
    looked_up: int = 0
    looked_up_accepted: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    total_seconds: float = 0.0

    @classmethod
    def for_rows(cls, backend: str, rule: str, alpha: float, rows: int) -> "CascadeStatistics":
        counts: dict[str, Any] = {name: [0] * rows for name in ("rounds", "drafted", "accepted", "new_tokens")}
        return cls(backend, rule, alpha, **counts, deferred=[0.0] * rows, drift=[0.0] * rows)

    def count(self, gamma: int, siblings: int) -> None:
        """Adds a round of all rows."""
        self.draft_lengths[gamma] = self.draft_lengths.get(gamma, 0) + 1
        if gamma:
            self.candidates[siblings + 1] = self.candidates.get(siblings + 1, 0) + 1

    def record(self, row: int, drafted: int, accepted: int, deferred: torch.Tensor, drift: torch.Tensor) -> None:
        """Adds one round of a row; `deferred` and `drift` hold one value an emitted token."""
        self.rounds[row] += 1
        self.drafted[row] += drafted
        self.accepted[row] += accepted
        self.new_tokens[row] += len(deferred)
        self.deferred[row] += float(deferred.sum())
        self.drift[row] += float(drift.sum())

    @property
    def overhead_seconds(self) -> float:
        """Wall time outside both models' forwards, in seconds."""
        return self.total_seconds - self.draft_seconds - self.verify_seconds

    def row(self, row: int) -> dict[str, Any]:
        """One prompt's share: counts and rates of that row, and the whole call under `"call"`."""
        counts = {name: getattr(self, name)[row] for name in _COUNTS}
        return {**counts, **_rates(counts, counts["rounds"]), "call": self.to_dict()}

    def to_dict(self) -> dict[str, Any]:
        """The whole call: totals over rows, forwards, tokens and seconds."""
        counts = {name: sum(getattr(self, name)) for name in _COUNTS} | {"rounds": max(self.rounds, default=0)}
        return {
            "backend": self.backend,
            "rule": self.rule,
            "alpha": self.alpha,
            "rows": len(self.rounds),
            **counts,
            **_rates(counts, self.large_forwards),
            "draft_lengths": dict(sorted(self.draft_lengths.items())),
            "looked_up": self.looked_up,
            "looked_up_accepted": self.looked_up_accepted,
            "candidates": dict(sorted(self.candidates.items())),
            "round_seconds": dict(sorted(self.round_seconds.items())),
            **{name: getattr(self, name) for name in _COSTS},
        }


def _rates(counts: dict[str, Any], large_forwards: int) -> dict[str, float | None]:
    drafted, tokens = counts["drafted"], counts["new_tokens"]
    return {
        "acceptance_rate": counts["accepted"] / drafted if drafted else None,
        "deferral_rate": counts["deferred"] / tokens if tokens else None,
        "tokens_per_large_forward": tokens / large_forwards if large_forwards else None,
    }
