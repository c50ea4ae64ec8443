"""What a cascading `generate` call is asked for, and what it did: per prompt, and for the whole call."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from .cached_decoder import position_limit, same_vocabulary, vocabulary_size
from .deferral_rules import check_rule


# `generate` arguments that a cascade adds, or whose default differs from transformers' (20 drafts, cut at confidence
# 0.4).
CASCADE_DEFAULTS = {
    "cascade_rule": "token_v3",
    "cascade_alpha": 0.3,
    "strict_prefix": 0,
    "cascade_backend": "auto",
    "num_assistant_tokens": 4,
    "num_assistant_tokens_schedule": "auto",  # "constant" for a call that names `num_assistant_tokens`
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


def check_options(options: dict[str, Any]) -> None:
    """Raises `ValueError` for values of `CASCADE_DEFAULTS` that can't be meant."""
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


_COUNTS = ("rounds", "drafted", "accepted", "new_tokens", "deferred", "drift")  # of each row
_COSTS = (
    *("large_forwards", "small_forwards", "large_tokens", "small_tokens"),
    *("draft_seconds", "verify_seconds", "overhead_seconds", "total_seconds"),
)


def check_call(model, assistant_model, inputs, setting, kwargs) -> None:
    """Raises `ValueError` for a call that can't be served, before any work is done."""
    if assistant_model is None and setting("assistant_early_exit") is None:
        raise ValueError(
            "A cascade needs a small model, got none. Pass `assistant_model=small`, or build the model with "
            "`enable_cascade(large, small)`."
        )
    if setting("num_beams") not in (None, 1):
        raise ValueError(
            f"A cascade samples or decodes greedily, got num_beams={setting('num_beams')}. Pass `num_beams=1`."
        )
    if setting("cache_implementation") not in (None, "dynamic", "dynamic_full"):
        raise ValueError(
            f"A cascade rolls its cache back after rejected drafts, a {setting('cache_implementation')!r} one "
            "can't. Leave `cache_implementation` out."
        )
    if setting("use_cache") is False:
        raise ValueError("A cascade needs the key-value cache, got use_cache=False. Leave it out.")
    if setting("guidance_scale") not in (None, 1):
        raise ValueError(
            f"guidance_scale={setting('guidance_scale')} makes the large model read a second text, token by token, "
            "whose cache can't take rejected tokens back. Leave it out, or call `generate` of the large model."
        )
    if kwargs.get("inputs_embeds") is not None and not model.config.is_encoder_decoder:
        raise ValueError(
            "A cascade reads token ids with both models, got `inputs_embeds`, which only the large one could read. "
            "Pass `input_ids`."
        )
    for name in _OTHER_DRAFTERS:
        if assistant_model is not None and setting(name) not in (None, False):
            raise ValueError(
                f"{name}={setting(name)!r} asks for other drafts or another target than those of the small model. "
                f"Leave {name} out, or call `generate` of the large model."
            )
    for input_ids in (inputs, kwargs.get("input_ids")):
        if input_ids is not None and input_ids.shape[-1] == 0:
            raise ValueError("Expected a prompt of at least one token, got an empty one.")
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.dim() == 2 and not model.config.is_encoder_decoder and not mask.any(1).all():
        raise ValueError(
            f"Row {int((~mask.bool().any(1)).nonzero()[0])} of `attention_mask` is all zero: expected a prompt of "
            "at least one token in each row."
        )
    if assistant_model is None:
        return
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


def check_positions(assistant_model, prompt_length: int, new_tokens: int) -> None:
    """Raises `ValueError` where the text would leave the small model's table of positions."""
    limit = position_limit(assistant_model) if assistant_model is not None else None
    needed = prompt_length + new_tokens - 1  # the last token is not read
    if limit is not None and needed > limit:
        raise ValueError(
            f"The small model has {limit} positions; a prompt of {prompt_length} tokens and {new_tokens} new ones "
            f"need {needed}. Lower `max_new_tokens`, shorten the prompt, or choose a small model with more."
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


# Of a large model, a small one and the kind of call: seconds of a round by its draft length, and of a sibling.
_round_costs: "weakref.WeakKeyDictionary[object, weakref.WeakKeyDictionary]" = weakref.WeakKeyDictionary()


class DraftLength:
    """
    Chooses the draft length of each round, and how many siblings its first draft has, so that tokens come quickest:
    none at all where drafts don't pay. (A rule still has its say about such a token.)

    A round with γ drafts of which each is accepted with probability a gives (1 - a^(γ+1)) / (1 - a) tokens; with n
    siblings of the first, of which each is accepted with probability b when its turn comes, (1 - a) (1 - (1 - b)^n)
    more. Both are those of the call so far, old rounds counting less and less. Where drafts are given up they are
    tried again after a while, as the text may have become an easier one. What rounds cost is measured once for two
    models and that many rows, and kept: the choice then depends on the tokens alone, and a seed gives the same text
    again.

    Args:
        large, small ([`~transformers.PreTrainedModel`]):
            The models; the acceptance that is expected at first is the small one's `config.expected_acceptance`, or
            0.6.
        kind (`tuple`):
            What else costs depend on.
        measure (`Callable`):
            Seconds of a round by its draft length, of `MEASURED`, and of a sibling; called once, when the first choice
            is made.
    """

    MEASURED = (0, 1, 2, 4)
    LONGEST, MOST_SIBLINGS = 8, 4
    MEMORY, WEIGHT, PAUSE = 0.95, 4.0, 32

    def __init__(self, large, small, kind: tuple, measure: Callable[[], tuple[dict[int, float], float]]):
        known = _round_costs.setdefault(large, weakref.WeakKeyDictionary()).setdefault(small, {})
        self.costs: dict[int, float]
        self.costs, self._sibling = known.setdefault(kind, ({}, []))
        self._measure = measure
        self._expected = getattr(small.config, "expected_acceptance", None) or 0.6
        self._planned = [(4, 0)]  # nearly free: the large model reads the prompt in that round
        self._pause = self.PAUSE
        self._forget(self.WEIGHT)

    def _forget(self, weight: float) -> None:
        self._accepted, self._rejected = weight * self._expected, weight * (1 - self._expected)
        # a candidate that is not the first is about half as often right
        self._hits, self._misses = weight * self._expected / 2, weight * (1 - self._expected / 2)

    def next(self) -> tuple[int, int]:
        """The draft length of the next round, and how many siblings its first draft has."""
        if not self._planned:
            best = self._quickest(self._accepted / (self._accepted + self._rejected))
            self._planned = [best]
            if best[0] == 0:
                self._planned = [best] * self._pause
                self._pause *= 2
                if self._quickest(0.95)[0]:
                    self._planned.append((max(1, self._quickest(0.8)[0]), 0))
                    self._forget(1.0)
        return self._planned.pop(0)

    def _quickest(self, acceptance: float) -> tuple[int, int]:
        if not self.costs:  # not before: a call may end in its first round
            measured, sibling = self._measure()
            self.costs.update(measured)
            self._sibling.append(sibling)
        lengths, known = np.arange(self.LONGEST + 1), sorted(self.costs)
        costs = np.interp(lengths, known, [self.costs[length] for length in known])
        slope = (self.costs[known[-1]] - self.costs[known[-2]]) / (known[-1] - known[-2])
        costs += np.maximum(lengths - known[-1], 0) * max(slope, 0.0)
        siblings, drafts = np.arange(self.MOST_SIBLINGS + 1), np.minimum(lengths, 1)[:, None]
        hit = 1 - (self._misses / (self._hits + self._misses)) ** siblings
        tokens = ((1 - acceptance ** (lengths + 1)) / (1 - acceptance))[:, None] + drafts * (1 - acceptance) * hit
        seconds = costs[:, None] + drafts * self._sibling[0] * siblings
        length, others = np.unravel_index((tokens / seconds).argmax(), tokens.shape)
        return int(length), int(others)

    def record(self, gamma: int, siblings: int, kept: list[int], nodes: list[int], bonus: list[int]) -> None:
        """
        Takes what a round with drafts gave: of each row how many were kept, the column of the logits after the last
        one (beyond γ a sibling's), and whether nothing was refused.
        """
        tries = [node - gamma for node in nodes if node > gamma]
        hits = len(tries)
        refused = sum(node == 0 and not whole for node, whole in zip(nodes, bonus, strict=True))
        self._accepted = self.MEMORY * self._accepted + sum(kept) - hits
        self._rejected = self.MEMORY * self._rejected + len(bonus) - sum(bonus) + hits
        if siblings and refused + hits:
            self._hits = self.MEMORY * self._hits + hits
            self._misses = self.MEMORY * self._misses + sum(tries) - hits + refused * siblings


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
