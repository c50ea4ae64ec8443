"""`generate` with a speculative cascade: the mixin, and `enable_cascade` for a model object that is already there."""

import copy
import inspect

import torch
from transformers import GenerationMixin

from .assisted_cascade import (
    CascadeScores,
    ForwardMeter,
    RawScores,
    check_rule_needs_no_q,
    record_drafts,
    without_warpers,
)
from .batched_cascade import BatchedCascade, CascadeOptions
from .cache_argument import NAMES, find_cache
from .cached_decoder import why_not_batched
from .cascade_statistics import CascadeStatistics
from .deferral_rules import check_rule
from .row_processors import STATEFUL_PROCESSORS


# `generate` arguments that a cascade adds, or whose default differs from transformers' (20 drafts, cut at confidence
# 0.4).
CASCADE_DEFAULTS = {
    "cascade_rule": "token_v3",
    "cascade_alpha": 0.3,
    "strict_prefix": 0,
    "cascade_backend": "auto",
    "num_assistant_tokens": 4,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.0,
}
_BACKENDS = ("auto", "batched", "assisted")
_SCHEDULES = ("constant", "heuristic", "heuristic_transient")
# What a decoder-only `generate` prepares for any model; other inputs (images, audio) only the assisted loop passes on.
_PLAIN_INPUTS = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "token_type_ids", *NAMES}


class SpeculativeCascadeGenerationMixin(GenerationMixin):
    """
    [`~transformers.GenerationMixin`] whose `generate` lets a small model draft and a deferral rule decide which drafts
    the large model (`self`) may overrule. Everything else of `generate` is inherited.

    Source: "Faster Cascades via Speculative Decoding", https://huggingface.co/papers/2405.19261.

    After a call `self.cascade_statistics` holds a [`CascadeStatistics`].
    """

    cascade_statistics: CascadeStatistics | None = None
    _own_assistant: tuple = ()  # (small model,); in a tuple, so that it is no submodule and isn't saved with self

    @property
    def cascade_pair(self) -> tuple:
        """The large and the small model; the latter is `None` when each `generate` call must bring it."""
        return self, self._own_assistant[0] if self._own_assistant else None

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, *, assistant_model=None, **kwargs):
        """
        Same as [`~transformers.GenerationMixin.generate`], with the arguments below.

        Args:
            assistant_model ([`~transformers.PreTrainedModel`], *optional*):
                The small model. Defaults to the one given to [`enable_cascade`] or stored in a composite model.
            cascade_rule (`str`, *optional*, defaults to `"token_v3"`):
                One of [`DEFERRAL_RULES`].
            cascade_alpha (`float`, *optional*, defaults to 0.3):
                Parameter of the rule: how much is left to the small model.
            num_assistant_tokens (`int`, *optional*, defaults to 4):
                Draft length γ.
            num_assistant_tokens_schedule (`str`, *optional*, defaults to `"constant"`):
                `"heuristic"` lengthens the draft by 2 after a round without rejection and shortens it by 1 otherwise.
            assistant_confidence_threshold (`float`, *optional*, defaults to 0.0):
                Drafting stops after a token whose probability under the small model is lower. The law stays exact.
            strict_prefix (`int`, *optional*, defaults to 0):
                The first that many new tokens follow the large model's own law.
            cascade_backend (`str`, *optional*, defaults to `"auto"`):
                `"batched"`: this library's loop (decoder-only models of one vocabulary; any batch). `"assisted"`: the
                loop of transformers (batch of 1; encoder-decoders, images, other tokenizers, early exit), in which the
                token after a fully accepted draft follows the large model. `"auto"` takes the first that can serve.
            tokenizer, assistant_tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
                Both, when the two models have different vocabularies.

        Raises:
            ValueError: before anything is generated, if a rule, its alpha, the draft length, a cache or the pair of
            models does not fit; and when a model gives NaN logits.
        """
        config = generation_config if generation_config is not None else self.generation_config
        if getattr(config, "is_assistant", False):  # an early exit drafts with the model itself
            return super().generate(inputs, generation_config, **kwargs)
        if generation_config is not None:
            generation_config = copy.deepcopy(generation_config)
        if assistant_model is None:
            _, assistant_model = self.cascade_pair

        _check_assistant(assistant_model)

        sources = [generation_config, self.generation_config, self.config]
        if assistant_model is not None:
            sources.append(assistant_model.generation_config)
        for name, default in CASCADE_DEFAULTS.items():
            value = kwargs.pop(name, None)
            for source in sources:
                if value is None:
                    value = getattr(source, name, None)
            value = default if value is None else value
            if generation_config is not None:
                setattr(generation_config, name, value)
            else:
                # `generate` rejects arguments that no generation config knows
                if not hasattr(self.generation_config, name):
                    setattr(self.generation_config, name, None)
                kwargs[name] = value

        def setting(name):
            return kwargs[name] if kwargs.get(name) is not None else getattr(config, name, None)

        options = {name: kwargs.get(name, getattr(generation_config, name, None)) for name in CASCADE_DEFAULTS}
        _check_options(options)
        self._check_call(inputs, assistant_model, setting, kwargs)
        if assistant_model is not None and _vocab_size(assistant_model) == _vocab_size(self):
            kwargs.pop("assistant_tokenizer", None)  # transformers refuses it where it isn't needed
        self.cascade_statistics = None
        return super().generate(inputs, generation_config, assistant_model=assistant_model, **kwargs)

    def _check_call(self, inputs, assistant_model, setting, kwargs) -> None:
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
        for input_ids in (inputs, kwargs.get("input_ids")):
            if input_ids is not None and input_ids.shape[-1] == 0:
                raise ValueError("Expected a prompt of at least one token, got an empty one.")
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and not self.config.is_encoder_decoder and not mask.any(1).all():
            raise ValueError(
                f"Row {int((~mask.bool().any(1)).nonzero()[0])} of `attention_mask` is all zero: expected a prompt of "
                "at least one token in each row."
            )
        if assistant_model is None:
            return
        if assistant_model.device != self.device:
            raise ValueError(
                f"Both models must be on one device, got {self.device} (large) and {assistant_model.device} (small). "
                f"Type `assistant_model.to({str(self.device)!r})`."
            )
        if assistant_model._is_stateful:
            raise ValueError(
                f"{type(assistant_model).__name__} keeps a recurrent state that can't be rolled back to an earlier "
                "token, so it can't draft. Choose a small model with attention layers."
            )
        tokenizers = kwargs.get("tokenizer"), kwargs.get("assistant_tokenizer")
        if _vocab_size(self) != _vocab_size(assistant_model) and None in tokenizers:
            raise ValueError(
                f"The vocabularies differ: {_vocab_size(self)} entries (large) and {_vocab_size(assistant_model)} "
                "(small). Pass `tokenizer=` and `assistant_tokenizer=` to bridge them."
            )

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        # Rows are independent in the batched loop, so several sequences for a prompt are no obstacle.
        sequences = generation_config.num_return_sequences
        generation_config.num_return_sequences = 1
        try:
            super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        finally:
            generation_config.num_return_sequences = sequences

    def _assisted_decoding(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        inputs_tensor=None,
        assistant_model=None,
        assistant_tokenizer=None,
        tokenizer=None,
        **model_kwargs,
    ):
        options = CascadeOptions(
            rule=generation_config.cascade_rule,
            alpha=generation_config.cascade_alpha,
            strict_prefix=generation_config.strict_prefix,
            num_assistant_tokens=generation_config.num_assistant_tokens,
            schedule=generation_config.num_assistant_tokens_schedule,
            confidence_threshold=generation_config.assistant_confidence_threshold,
        )
        obstacle = self._batched_obstacle(
            assistant_model,
            (tokenizer, assistant_tokenizer),
            logits_processor,
            generation_config,
            synced_gpus,
            model_kwargs,
        )
        backend, batch_size = generation_config.cascade_backend, input_ids.shape[0]
        if obstacle is not None and (backend == "batched" or batch_size > 1):
            raise ValueError(
                f"A batch of {batch_size} can't be served by the batched cascade: {obstacle}. Pass one prompt at a "
                'time and `cascade_backend="assisted"` (for a pipeline: `batch_size=1`).'
            )
        if backend == "assisted" and batch_size > 1:
            raise ValueError(
                f'`cascade_backend="assisted"` serves one prompt at a time, got a batch of {batch_size}. Leave '
                "`cascade_backend` out."
            )
        if obstacle is None and backend != "assisted":
            if streamer is not None and batch_size > 1:
                raise ValueError(f"A streamer follows one sequence, got a batch of {batch_size}.")
            loop = BatchedCascade(
                self.cascade_pair[0], assistant_model, input_ids, model_kwargs.get("attention_mask"), logits_processor,
                stopping_criteria, generation_config, options,
            )  # fmt: skip
            self.cascade_statistics = loop.statistics
            sequences = loop.run(streamer)
            return loop.output() if generation_config.return_dict_in_generate else sequences

        statistics = CascadeStatistics.for_rows("assisted", options.rule, options.alpha, 1)
        self.cascade_statistics = statistics
        with ForwardMeter(self, assistant_model if assistant_model is not None else self, statistics) as meter:
            self._cascade_call = (options, statistics, meter)
            try:
                return super()._assisted_decoding(
                    input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer,
                    inputs_tensor, assistant_model, assistant_tokenizer, tokenizer, **model_kwargs,
                )  # fmt: skip
            finally:
                del self._cascade_call

    def _batched_obstacle(
        self, assistant_model, tokenizers, logits_processor, generation_config, synced_gpus, model_kwargs
    ) -> str | None:
        """Why the batched loop can't serve a call, as one clause; `None` if it can."""
        if assistant_model is None:
            return "an early exit has no small model of its own"
        if _vocab_size(self) != _vocab_size(assistant_model):
            target, assistant = (tokenizer.get_vocab() for tokenizer in tokenizers)
            if target != assistant:
                return "the two tokenizers have different vocabularies"
        reason = why_not_batched(self.cascade_pair[0]) or why_not_batched(assistant_model)
        if reason is not None:
            return reason
        if synced_gpus:
            return "ranks that hold shards of one model (FSDP, ZeRO-3) must run the same number of forwards"
        others = sorted(
            key for key, value in model_kwargs.items() if value is not None and key not in _PLAIN_INPUTS | {"debug_io"}
        )
        if others:
            return f"it passes on token ids only, not {', '.join(others)}"
        cache = find_cache(model_kwargs)
        if cache is not None and cache.get_seq_length() > 0:
            return "it starts from an empty cache, not from the key-value cache given"
        if generation_config.output_attentions or generation_config.output_hidden_states:
            return "it keeps no attentions or hidden states"
        stateful = [
            type(processor).__name__ for processor in logits_processor if isinstance(processor, STATEFUL_PROCESSORS)
        ]
        if stateful:
            return f"{stateful[0]} keeps a state that can't follow rows which roll back"
        return None

    def _get_candidate_generator(
        self,
        generation_config,
        input_ids,
        inputs_tensor,
        logits_processor,
        model_kwargs,
        assistant_model=None,
        target_tokenizer=None,
        assistant_tokenizer=None,
    ):
        options, statistics, meter = self._cascade_call
        if assistant_model is not None:
            if assistant_tokenizer is not None and not generation_config.do_sample:
                check_rule_needs_no_q(options.rule)
            accepted = set(inspect.signature(assistant_model.forward).parameters)
            model_kwargs = {
                key: value
                for key, value in model_kwargs.items()
                if key in accepted or key in _PLAIN_INPUTS or key in ("encoder_outputs", "decoder_attention_mask")
            }
            if not self.config.is_encoder_decoder and model_kwargs.get("attention_mask") is None:
                model_kwargs["attention_mask"] = torch.ones_like(input_ids)
        generator = super()._get_candidate_generator(
            generation_config, input_ids, inputs_tensor, without_warpers(logits_processor), model_kwargs,
            assistant_model, target_tokenizer, assistant_tokenizer,
        )  # fmt: skip
        generator = record_drafts(generator, options, statistics, meter)
        raw = RawScores()
        logits_processor.insert(0, raw)
        logits_processor.append(
            CascadeScores(generator, raw, options, generation_config.do_sample, prompt_length=input_ids.shape[-1])
        )
        return generator


def _check_options(options: dict) -> None:
    check_rule(options["cascade_rule"], options["cascade_alpha"])
    gamma, prefix = options["num_assistant_tokens"], options["strict_prefix"]
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or gamma != int(gamma) or gamma < 1:
        raise ValueError(f"num_assistant_tokens must be a whole number of at least 1, got {gamma!r}.")
    if isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 0:
        raise ValueError(f"strict_prefix must be a whole number of at least 0, got {prefix!r}.")
    if options["cascade_backend"] not in _BACKENDS:
        raise ValueError(f"cascade_backend must be one of {', '.join(_BACKENDS)}, got {options['cascade_backend']!r}.")
    if options["num_assistant_tokens_schedule"] not in _SCHEDULES:
        raise ValueError(
            f"num_assistant_tokens_schedule must be one of {', '.join(_SCHEDULES)}, "
            f"got {options['num_assistant_tokens_schedule']!r}."
        )
    threshold = options["assistant_confidence_threshold"]
    if not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise ValueError(f"assistant_confidence_threshold is a probability in [0, 1], got {threshold!r}.")


def _check_assistant(assistant_model) -> None:
    if assistant_model is not None and not hasattr(assistant_model, "generate"):  # a PEFT model has it, too
        raise TypeError(
            f"Expected a small model that can `generate`, got {assistant_model!r}. Load it first: "
            '`AutoModelForCausalLM.from_pretrained("small")`.'
        )


def _vocab_size(model) -> int:
    return model.config.get_text_config().vocab_size


def enable_cascade(model, assistant_model=None, **defaults):
    """
    Gives a model that can `generate` the cascading `generate`, whatever its class: causal, encoder-decoder or
    multimodal.

    The result shares the weights of `model`, which itself stays as it was. Its class is a subclass, of the same name,
    of [`SpeculativeCascadeGenerationMixin`] and the class of `model`; `save_pretrained` saves the large model alone.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The large model.
        assistant_model ([`~transformers.PreTrainedModel`], *optional*):
            The small model. Without it, each `generate` call must bring one.
        defaults (*optional*):
            Defaults of `generate` such as `cascade_rule="opt", cascade_alpha=0.2`.

    Returns:
        A model whose `generate` cascades.

    Raises:
        TypeError: if either model can't generate or a default is not an argument of the cascade.
        ValueError: if the rule, alpha or draft length does not fit.

    Example:

    ```python
    >>> large, small = (AutoModelForSeq2SeqLM.from_pretrained(name) for name in ("large", "small"))
    >>> model = enable_cascade(large, small)
    >>> model.generate(**inputs, cascade_rule="opt", cascade_alpha=0.2)
    ```
    """
    if not isinstance(model, GenerationMixin):
        raise TypeError(
            f"Expected a model with `generate`, got {type(model).__name__}. Load it with AutoModelForCausalLM."
        )
    unknown = sorted(set(defaults) - set(CASCADE_DEFAULTS))
    if unknown:
        raise TypeError(f"Unknown defaults {unknown}. Choose from {', '.join(CASCADE_DEFAULTS)}.")
    _check_options({**CASCADE_DEFAULTS, **defaults})
    _check_assistant(assistant_model)
    cascade = copy.copy(model)
    if not isinstance(model, SpeculativeCascadeGenerationMixin):
        cascade.__class__ = type(type(model).__name__, (SpeculativeCascadeGenerationMixin, type(model)), {})
        cascade.__class__.__module__ = type(model).__module__
    cascade.generation_config = copy.deepcopy(model.generation_config)
    for name, value in defaults.items():
        setattr(cascade.generation_config, name, value)
    if assistant_model is not None:
        cascade._own_assistant = (assistant_model,)
    return cascade
