"""`generate` with a speculative cascade: the mixin, and `enable_cascade` for a model object that is already there."""

import copy
import inspect
import threading
import weakref

import torch
from transformers import GenerationMixin, MaxLengthCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from .assisted_cascade import AssistedCall, CascadeScores, DraftRecorder, EveryToken, check_rule_needs_no_q
from .batched_cascade import BatchedCascade
from .cache_argument import NAMES, find_cache
from .cached_decoder import (
    RotarySwitch,
    reads_states,
    same_vocabulary,
    why_no_states,
    why_not_batched,
)
from .cascade_call import (
    CASCADE_DEFAULTS,
    CascadeOptions,
    CascadeStatistics,
    check_assistant,
    check_call,
    check_positions,
    check_text,
    complete_options,
    under_adapters,
)
from .row_processors import why_not_rewindable


_calls = threading.local()  # .statistics: of each model, those of this thread's newest call
# What a decoder-only `generate` prepares for any model; other inputs (images, audio) only the assisted loop passes on.
_PLAIN_INPUTS = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "token_type_ids", *NAMES}


class SpeculativeCascadeGenerationMixin(GenerationMixin):
    """
    [`~transformers.GenerationMixin`] whose `generate` lets a small model draft and a deferral rule decide which drafts
    the large model (`self`) may overrule. Everything else of `generate` is inherited.

    Source: "Faster Cascades via Speculative Decoding", https://huggingface.co/papers/2405.19261.

    After a call `self.cascade_statistics` holds a [`CascadeStatistics`].
    """

    _own_assistant: tuple = ()  # (small model,); in a tuple, so that it is no submodule and isn't saved with self
    _newest_statistics: CascadeStatistics | None = None
    _cascade_call: AssistedCall | None = None  # on the copy that a call in the loop of transformers makes of the model

    @property
    def cascade_statistics(self) -> CascadeStatistics | None:
        """Of the newest call that this thread made; in a thread that made none, of the newest call."""
        own = getattr(_calls, "statistics", {})
        return own.get(self, self._newest_statistics)

    @cascade_statistics.setter
    def cascade_statistics(self, statistics: CascadeStatistics | None) -> None:
        if not hasattr(_calls, "statistics"):
            _calls.statistics = weakref.WeakKeyDictionary()
        _calls.statistics[self] = self._newest_statistics = statistics

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
                Without any, under `"spec"`, drafts are what followed the newest tokens earlier in the text.
            cascade_rule (`str`, *optional*, defaults to `"spec"`):
                One of [`DEFERRAL_RULES`]. By default the text is the large model's own, only quicker.
            cascade_alpha (`float`, *optional*, defaults to 0.3):
                Parameter of the rule: how much is left to the small model.
            num_assistant_tokens (`int`, *optional*):
                Draft length γ. Left out, it is chosen round by round.
            num_assistant_tokens_schedule (`str`, *optional*):
                `"auto"`, the default where no γ is given, takes the draft length at which tokens come quickest, from
                the acceptance so far and what rounds were once measured to cost, and as many other candidates for the
                first draft as pay; where drafts don't pay, none (a rule still has its say). In the loop of
                transformers, γ is 4 then. `"constant"`, the default beside a γ, keeps to it. `"heuristic"` lengthens
                the draft by 2 after a round without rejection and shortens it by 1 otherwise.
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
            logits_processor ([`~transformers.LogitsProcessorList`], *optional*):
                One that keeps a state needs a method `clone()` that returns an independent copy in its present state:
                rejected drafts are taken back, and each row gets a copy of its own.

        With `return_dict_in_generate`, `scores` are the large model's processed scores of the tokens written, whatever
        the rule, `logits` its raw ones, and the cache holds all tokens but the last, so that a chat can go on from it.

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
        assistant_model = under_adapters(assistant_model)
        check_assistant(assistant_model)

        sources = [generation_config, self.generation_config, self.config]
        if assistant_model is not None:
            sources.append(assistant_model.generation_config)

        def setting(name):
            return kwargs[name] if kwargs.get(name) is not None else getattr(config, name, None)

        alone = assistant_model is None and setting("assistant_early_exit") is None  # drafts are looked up
        named = {name: kwargs.pop(name, None) for name in CASCADE_DEFAULTS}
        if alone and named["num_assistant_tokens"] is None:
            named["num_assistant_tokens"] = setting("prompt_lookup_num_tokens")
        defaults: dict = {}
        for source in reversed(sources):  # the first has the last word
            found = {name: getattr(source, name, None) for name in CASCADE_DEFAULTS}
            defaults |= {name: value for name, value in found.items() if value is not None}
        options = complete_options(named, defaults)
        for name, value in options.items():
            if generation_config is not None:
                setattr(generation_config, name, value)
            else:
                # `generate` rejects arguments that no generation config knows
                if not hasattr(self.generation_config, name):
                    setattr(self.generation_config, name, None)
                kwargs[name] = value

        if generation_config is None and kwargs.get("use_cache") is None:
            kwargs["use_cache"] = True  # training turns it off in a model's own defaults
        check_call(self, assistant_model, options["cascade_rule"], inputs, setting, kwargs)
        if alone:
            kwargs["prompt_lookup_num_tokens"] = options["num_assistant_tokens"]  # so that drafts are asked for
        tokenizers = kwargs.get("tokenizer"), kwargs.get("assistant_tokenizer")
        if assistant_model is not None and same_vocabulary(self, assistant_model, tokenizers):
            kwargs.pop("assistant_tokenizer", None)  # transformers refuses it where it isn't needed
        self.cascade_statistics = None
        return super().generate(inputs, generation_config, assistant_model=assistant_model, **kwargs)

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        # Rows are independent in the batched loop, so several sequences for a prompt are no obstacle.
        sequences = generation_config.num_return_sequences
        generation_config.num_return_sequences = 1
        assistant = generation_mode_kwargs.get("assistant_model")
        if (
            assistant is not None
            and not self.config.is_encoder_decoder
            and "assistant_tokenizer" not in (generation_mode_kwargs)
        ):
            # One tokenizer serves both, whatever their embeddings are padded to.
            generation_mode_kwargs = {**generation_mode_kwargs, "assistant_model": None}
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
        options = CascadeOptions(*(getattr(generation_config, name) for name in CASCADE_DEFAULTS))
        # a criterion of the user's takes the place of `generate`'s own; and a length may be 16.0
        limits = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
        generation_config.max_length = int(min(limits, default=generation_config.max_length))
        reason = why_not_rewindable(logits_processor, input_ids)
        if reason is not None:
            raise ValueError(reason)
        pair, batch_size = (self.cascade_pair[0], assistant_model), input_ids.shape[0]
        mask = model_kwargs.get("attention_mask")
        if mask is None:  # `generate` drops one of ones, and keeps its length
            length = max(input_ids.shape[1], getattr(generation_config, "_mask_length", 0))
            mask = input_ids.new_ones(batch_size, length)
        positions = None
        if not self.config.is_encoder_decoder:
            check_text(mask, input_ids, find_cache(model_kwargs))
            positions = (mask.long().cumsum(1) - 1).masked_fill(mask == 0, -1).to(self.device)
            check_positions(
                assistant_model, int(positions.max()) + 1, generation_config.max_length - input_ids.shape[1]
            )
        one_vocabulary = assistant_model is None or assistant_tokenizer is None
        obstacle = self._batched_obstacle(
            pair, input_ids, positions, one_vocabulary, generation_config, synced_gpus, model_kwargs
        )
        if options.backend == "assisted":
            obstacle = obstacle or "it was told to be the loop of transformers"
        alone = assistant_model is None and generation_config.assistant_early_exit is None
        if (alone or reads_states(assistant_model)) and obstacle is not None:
            drafts = "A cascade without a small model" if alone else "A draft that reads the large model's states"
            raise ValueError(
                f"{drafts} needs the batched loop, which can't serve this call: {obstacle}. Leave `cascade_backend` "
                "out, or pass `assistant_model=small`, another small model."
            )
        if obstacle is not None and (options.backend == "batched" or batch_size > 1):
            raise ValueError(
                f"A batch of {batch_size} can't be served by the batched cascade: {obstacle}. Pass one prompt at a "
                'time and `cascade_backend="assisted"` (for a pipeline: `batch_size=1`).'
            )
        if obstacle is None:
            if streamer is not None and batch_size > 1:
                raise ValueError(f"A streamer follows one sequence, got a batch of {batch_size}.")
            loop = BatchedCascade(
                *pair, input_ids, positions, logits_processor, stopping_criteria, generation_config, options,
                find_cache(model_kwargs), model_kwargs.get("token_type_ids"),
            )  # fmt: skip
            self.cascade_statistics = loop.statistics
            sequences = loop.run(streamer)
            return loop.output() if generation_config.return_dict_in_generate else sequences

        for model in pair:
            switch = RotarySwitch.of(model) if model is not None and positions is not None else None
            why = switch and switch.why_not(positions[:, -1] + 1, generation_config.max_length - input_ids.shape[1], 0)
            if why:
                raise ValueError(
                    f"{type(model).__name__} can't be cascaded in the loop of transformers: {why}. Leave "
                    "`cascade_backend` out, or lower `max_new_tokens`."
                )
        call = AssistedCall(
            self, assistant_model, options, logits_processor, input_ids, generation_config.do_sample,
            not one_vocabulary, find_cache(model_kwargs),
        )  # fmt: skip
        self.cascade_statistics = call.statistics
        every_token = EveryToken(call, stopping_criteria, streamer)
        output = super(SpeculativeCascadeGenerationMixin, call.model)._assisted_decoding(
            input_ids, logits_processor, StoppingCriteriaList([every_token]), generation_config, synced_gpus,
            every_token, inputs_tensor, None if assistant_model is None else call.assistant, assistant_tokenizer,
            tokenizer, **model_kwargs,
        )  # fmt: skip
        return call.finish(output)

    def _batched_obstacle(
        self, pair, input_ids, positions, one_vocabulary, generation_config, synced_gpus, model_kwargs
    ) -> str | None:
        """Why the batched loop can't serve a call, as one clause; `None` if it can."""
        if generation_config.assistant_early_exit is not None:
            return "an early exit has no small model of its own"
        if not one_vocabulary:
            return "the two tokenizers have different vocabularies"
        reason = why_not_batched(pair[0])
        if reason is None and pair[1] is not None:
            reason = why_no_states(*pair) if reads_states(pair[1]) else why_not_batched(pair[1])
        if reason is not None:
            return reason
        if synced_gpus:
            return "ranks that hold shards of one model (FSDP, ZeRO-3) must run the same number of forwards"
        others = sorted(
            key for key, value in model_kwargs.items() if value is not None and key not in _PLAIN_INPUTS | {"debug_io"}
        )
        if others:
            return f"it passes on token ids only, not {', '.join(others)}"
        given = model_kwargs.get("position_ids")
        if given is not None and given.dim() == 2:
            ours = positions[:, positions.shape[1] - given.shape[1] :]
            if not torch.equal(torch.where(ours < 0, ours, given.to(ours)), ours):
                return "it counts positions from 0 in each row, unlike the `position_ids` given"
        cache = find_cache(model_kwargs)
        filled = cache is not None and cache.get_seq_length() > 0
        if filled and not all(type(layer) is DynamicLayer for layer in cache.layers):
            return "it goes on from the cache that it returned itself, not from one that forgets what leaves a window"
        if generation_config.output_attentions or generation_config.output_hidden_states:
            return "it keeps no attentions or hidden states"
        for model in pair:
            switch = RotarySwitch.of(model) if model is not None else None
            new_tokens = generation_config.max_length - input_ids.shape[1]
            reason = switch and switch.why_not(positions[:, -1] + 1, new_tokens, len(input_ids))
            if reason:
                return reason
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
        call = self._cascade_call
        if assistant_model is not None:
            if assistant_tokenizer is not None and not generation_config.do_sample:
                check_rule_needs_no_q(call.options.rule)
            accepted = set(inspect.signature(assistant_model.forward).parameters)
            model_kwargs = {
                key: value
                for key, value in model_kwargs.items()
                if key in accepted or key in _PLAIN_INPUTS or key in ("encoder_outputs", "decoder_attention_mask")
            }
            if not self.config.is_encoder_decoder and model_kwargs.get("attention_mask") is None:
                model_kwargs["attention_mask"] = torch.ones_like(input_ids)
        generator = super()._get_candidate_generator(
            generation_config, input_ids, inputs_tensor, call.drafters_processors(), model_kwargs,
            assistant_model, target_tokenizer, assistant_tokenizer,
        )  # fmt: skip
        generator = DraftRecorder(generator, call)
        logits_processor[:] = [CascadeScores(generator, call)]
        return generator


def enable_cascade(model, assistant_model=None, **defaults):
    """
    Gives a model that can `generate` the cascading `generate`, whatever its class: causal, encoder-decoder or
    multimodal.

    The result shares the weights of `model`, which itself stays as it was. Its class is a subclass, of the same name,
    of [`SpeculativeCascadeGenerationMixin`] and the class of `model`; `save_pretrained` saves the large model alone.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The large model. Of one with adapters, `save_pretrained` saves these.
        assistant_model ([`~transformers.PreTrainedModel`], *optional*):
            The small model. Without it, a `generate` call may bring one.
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
    given, model, assistant_model = model, under_adapters(model), under_adapters(assistant_model)
    if not isinstance(model, GenerationMixin):
        raise TypeError(
            f"Expected a model with `generate`, got {type(model).__name__}. Load it with AutoModelForCausalLM."
        )
    unknown = sorted(set(defaults) - set(CASCADE_DEFAULTS))
    if unknown:
        raise TypeError(f"Unknown defaults {unknown}. Choose from {', '.join(CASCADE_DEFAULTS)}.")
    complete_options(defaults)
    check_assistant(assistant_model)
    cls = type(model)
    if not isinstance(model, SpeculativeCascadeGenerationMixin):
        cls = type(cls.__name__, (SpeculativeCascadeGenerationMixin, cls), {"__module__": cls.__module__})
    cascade = cls.__new__(cls)
    vars(cascade).update(vars(model))
    if given is not model:
        cascade.save_pretrained = given.save_pretrained
    cascade.generation_config = copy.deepcopy(model.generation_config)
    for name, value in defaults.items():
        setattr(cascade.generation_config, name, value)
    if assistant_model is not None:
        cascade._own_assistant = (assistant_model,)
    return cascade
