"""A cascade inside the assisted-generation loop of transformers: its target logits are replaced by log π."""

import copy
import time

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.candidate_generator import UniversalSpeculativeDecodingGenerator

from .cache_argument import find_cache
from .cached_decoder import align_vocabulary, vocabulary_size
from .cascade_call import CascadeStatistics
from .deferral_rules import DEFERRAL_RULES, Distributions, decide, mixed_probs
from .row_processors import WARPERS, Rewindable, process, rewindable, unscaled_probs


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


class AssistedCall:
    """
    One `generate` call in the loop of transformers. What it needs lives here and on copies of the models that share
    their weights, so that other calls on the same models see none of it.
    """

    def __init__(
        self, model, assistant_model, options, processors, input_ids, do_sample: bool, other_vocabulary: bool, cache
    ):
        self.options, self.do_sample, self.other_vocabulary = options, do_sample, other_vocabulary
        self.statistics = CascadeStatistics.for_rows("assisted", options.rule, options.alpha, 1)
        self.prompt_length = self.length = input_ids.shape[-1]  # the latter up to where the criteria were asked
        self.processors = rewindable(processors, self.prompt_length)
        self.model = own_copy(model)
        self.model._cascade_call = self
        if cache is None:
            raise ValueError(
                f"{type(model).__name__} makes a cache of its own, which can't take rejected drafts back. Call "
                "`generate` of the model itself."
            )
        if not model.config.is_encoder_decoder and cache.get_seq_length():
            self._read_rest(cache.get_seq_length())
        # an early exit makes one model play both parts
        self.assistant = _early_exit_copy(model) if assistant_model is None else own_copy(assistant_model)
        if assistant_model is not None:  # its other defaults are of texts of its own
            own = assistant_model.generation_config.to_dict()
            names = [f"{kind}_token_id" for kind in ("bos", "eos", "pad", "decoder_start")]
            self.assistant.generation_config = GenerationConfig(**{name: own.get(name) for name in names})
        self.large_meter, self.small_meter = ForwardMeter(self.model), ForwardMeter(self.assistant)
        self.scores: list[torch.Tensor] = []  # the large model's, of each new token
        self.begin = time.perf_counter()

    def _read_rest(self, cached: int) -> None:
        """Lets the loop begin after the `cached` tokens of a cache; it would read the whole text on top of them."""
        prepare = self.model.prepare_inputs_for_generation

        def rest(input_ids, next_sequence_length=None, **inputs):
            length = input_ids.shape[1] - cached if next_sequence_length is None else next_sequence_length
            return prepare(input_ids, next_sequence_length=length, **inputs)

        self.model.prepare_inputs_for_generation = rest

    def finish(self, output):
        """Fills in the statistics, and returns `output` without what was written after the criteria had stopped it."""
        stats, large, small = self.statistics, self.large_meter, self.small_meter
        stats.large_forwards, stats.large_tokens, stats.verify_seconds = large.forwards, large.tokens, large.seconds
        stats.small_forwards, stats.small_tokens, stats.draft_seconds = small.forwards, small.tokens, small.seconds
        stats.total_seconds = time.perf_counter() - self.begin
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        surplus, steps = sequences.shape[1] - self.length, sequences.shape[1] - self.prompt_length
        stats.new_tokens[0] -= surplus
        if output is sequences:
            return sequences[:, : self.length]
        output.sequences = sequences[:, : self.length]
        if output.get("scores") is not None:
            output.scores = tuple(self.scores)
        for name, value in list(output.items()):
            if surplus and isinstance(value, tuple) and len(value) == steps and not name.startswith("encoder"):
                output[name] = value[:-surplus]
        cache = find_cache(output)
        if surplus and cache is not None:
            cache.crop(-surplus)
        return output

    def drafters_processors(self) -> LogitsProcessorList:
        """
        The processors the drafter must be given. Its own `generate` appends temperature, top-k and the like again:
        with the whole list drafts would be sampled at the square of the temperature. What keeps a state reads the
        large model's vocabulary only.
        """
        left_out = (*WARPERS, Rewindable) if self.other_vocabulary else WARPERS
        return LogitsProcessorList(p for p in self.processors if not isinstance(p, left_out))


class EveryToken(StoppingCriteria):
    """
    Asks criteria after every token, as plain `generate` does, with the scores that the call returns. It is asked
    itself once a round, and also stands where the streamer is expected, which gets no token before they are asked.
    """

    def __init__(self, call: AssistedCall, criteria: StoppingCriteriaList, streamer):
        self.call, self.criteria, self.streamer = call, criteria, streamer

    def __call__(self, input_ids, scores, **kwargs):
        call, first = self.call, self.call.length
        while call.length < input_ids.shape[1]:
            call.length += 1
            so_far = scores and tuple(call.scores[: call.length - call.prompt_length])
            done = self.criteria(input_ids[:, : call.length], so_far, **kwargs)
            if done.all():
                break
        if self.streamer is not None:
            self.streamer.put(input_ids[:, first : call.length].cpu())
        return done

    def put(self, value):
        """Nothing yet."""

    def end(self):
        if self.streamer is not None:
            self.streamer.end()


def own_copy(model):
    """A shallow copy of a model: it shares all weights, and neither hooks nor defaults of generation."""
    own = copy.copy(model)
    for name in _HOOKS:
        setattr(own, name, copy.copy(getattr(model, name)))
    own.generation_config = copy.deepcopy(model.generation_config)
    return own


def _early_exit_copy(model):
    """A copy whose number of layers can be changed for it alone."""
    own = own_copy(model)
    own._modules = dict(model._modules)
    body = copy.copy(getattr(model, model.base_model_prefix))
    own.config = body.config = copy.deepcopy(body.config)
    setattr(own, model.base_model_prefix, body)
    return own


class ForwardMeter:
    """Counts forwards, tokens and seconds of a model by hooks."""

    def __init__(self, model):
        self.forwards, self.tokens, self.seconds = 0, 0, 0.0
        model.register_forward_pre_hook(self._before)
        model.register_forward_hook(self._after, with_kwargs=True)

    def _before(self, model, args):
        self.start = time.perf_counter()

    def _after(self, model, args, kwargs, output):
        self.forwards, self.seconds = self.forwards + 1, self.seconds + time.perf_counter() - self.start
        tokens = output.logits
        for name in ("decoder_input_ids", "input_ids", "inputs_embeds"):
            if kwargs.get(name) is not None:
                tokens = kwargs[name]
                break
        self.tokens += tokens.shape[0] * tokens.shape[1]


class RecordedDrafter:
    """
    The small model as a candidate generator of transformers sees it: `generate` keeps the drafts' raw logits, and
    where the embeddings of one tokenizer are padded to two sizes, its ids and scores are of the large model's.
    """

    def __init__(self, model, vocab_size: int):
        self.model, self.vocab_size, self.own_size = model, vocab_size, vocabulary_size(model)
        self.raw_logits: torch.Tensor | None = None

    def __getattr__(self, name):
        return getattr(self.model, name)

    def generate(self, generation_config, min_new_tokens, max_new_tokens, **inputs):
        # Generation arguments go into the config: beside one, transformers calls them deprecated.
        generation_config.update(min_new_tokens=min_new_tokens, max_new_tokens=max_new_tokens, use_cache=True)
        inputs.pop("use_cache", None)
        ids = inputs.get("input_ids")
        if self.own_size != self.vocab_size:
            processors = LogitsProcessorList(inputs["logits_processor"])
            inputs["logits_processor"] = LogitsProcessorList([_InAnotherSize(processors, self.vocab_size)])
            inputs["input_ids"] = ids.clamp(max=self.own_size - 1)
        output = self.model.generate(generation_config=generation_config, **inputs)
        self.raw_logits = torch.stack(output.logits, dim=1)
        if self.own_size != self.vocab_size:
            self.raw_logits = align_vocabulary(self.raw_logits, self.vocab_size)
            output.scores = tuple(align_vocabulary(scores, self.vocab_size) for scores in output.scores)
            output.sequences = torch.cat([ids, output.sequences[:, ids.shape[1] :]], 1)
        return output


class _InAnotherSize(LogitsProcessor):
    """Runs processors on scores of another width; ids beyond either width are none."""

    def __init__(self, processors: LogitsProcessorList, size: int):
        self.processors, self.size = processors, size

    def __call__(self, input_ids, scores):
        return align_vocabulary(self.processors(input_ids, align_vocabulary(scores, self.size)), scores.shape[-1])


class DraftRecorder:
    """
    A candidate generator of transformers that keeps the raw logits of the drafts and counts what is accepted. It also
    makes q the small model's own:

    - stop strings are left to the main loop (the drafter has no tokenizer to check them with);
    - the attention mask is explicit (transformers would infer one from pad tokens, which may be generated ones);
    - draft length, schedule and confidence threshold are the cascade's, not the drafter's defaults.
    """

    def __init__(self, generator, call: AssistedCall):
        self.generator, self.call = generator, call
        size = vocabulary_size(call.assistant) if call.other_vocabulary else vocabulary_size(call.model)
        generator.assistant_model = RecordedDrafter(call.assistant, size)
        generator.generation_config.output_logits = True
        generator.generation_config.stop_strings = None
        generator.num_assistant_tokens = call.options.num_assistant_tokens
        for config in (generator.generation_config, generator.assistant_generation_config):
            config.assistant_confidence_threshold = call.options.confidence_threshold
            auto = call.options.schedule == "auto"
            config.num_assistant_tokens_schedule = "constant" if auto else call.options.schedule

    def __getattr__(self, name):
        return getattr(self.generator, name)

    def get_candidates(self, input_ids, **kwargs):
        self.prompt_and_accepted = input_ids.shape[-1]
        drafter = self.generator.assistant_model
        drafter.raw_logits = None
        candidate_ids, candidate_scores = self.generator.get_candidates(input_ids, **kwargs)
        self.candidate_ids, self.candidate_scores, self.raw_logits = (
            candidate_ids,
            candidate_scores,
            drafter.raw_logits,
        )
        if self.raw_logits is not None and isinstance(self.generator, UniversalSpeculativeDecodingGenerator):
            self.raw_logits = self.generator._atm_translator.get_target_logits(self.raw_logits)
        self.positions, self.scores = [], []
        return candidate_ids, candidate_scores

    def update_candidate_strategy(self, input_ids, scores, num_matches):
        kept = slice(int(num_matches) + 1)
        deferred, drift = (torch.tensor(values) for values in zip(*self.positions[kept], strict=True))
        drafted = self.candidate_ids.shape[-1] - self.prompt_and_accepted
        self.call.statistics.record(0, drafted, int(num_matches), deferred, drift)
        self.call.scores += self.scores[kept]
        for processor in self.call.processors:
            if isinstance(processor, Rewindable):
                processor.accept(input_ids.shape[-1])
        self.generator.update_candidate_strategy(input_ids, scores, num_matches)


class CascadeScores(LogitsProcessor):
    """
    Stands for the whole list of processors: runs them, and turns the large model's scores at a drafted position into
    log π. The position after the last draft has no q here and stays the large model's, as in transformers.
    """

    def __init__(self, generator: DraftRecorder, call: AssistedCall):
        self.generator, self.call = generator, call

    def __call__(self, input_ids, scores):
        call, generator = self.call, self.generator
        raw = scores
        scores, banned = process(call.processors, input_ids, raw.clone())
        generator.scores.append(scores)
        index = input_ids.shape[-1] - generator.prompt_and_accepted
        drafted = generator.candidate_ids.shape[-1] - generator.prompt_and_accepted
        if index >= drafted or input_ids.shape[-1] - call.prompt_length < call.options.strict_prefix:
            generator.positions.append((1.0, 0.0))
            return scores
        rule, greedy = call.options.rule, not call.do_sample
        p = Distributions(mixed_probs(rule, scores, greedy), unscaled_probs(raw, banned))
        if generator.candidate_scores is None:  # drafted greedily in another vocabulary: a token and no q
            q = Distributions.one_hot(generator.candidate_ids[:, input_ids.shape[-1]], scores.shape[-1])
        else:
            q_scores = generator.candidate_scores[:, index].to(scores)
            q_unscaled = unscaled_probs(generator.raw_logits[:, index].to(scores), banned)
            q = Distributions(mixed_probs(rule, q_scores, greedy), q_unscaled)
        pi, deferred, drift = decide(rule, call.options.alpha, q, p, greedy)
        generator.positions.append((float(deferred), float(drift)))
        return pi.log()


def check_rule_needs_no_q(rule: str) -> None:
    """Raises `ValueError` when a rule needs q but the drafter gives tokens only."""
    if DEFERRAL_RULES[rule].reads_draft:
        able = ", ".join(name for name, entry in DEFERRAL_RULES.items() if not entry.reads_draft)
        raise ValueError(
            f"Rule {rule!r} reads the small model's probabilities, which greedy drafting in another vocabulary "
            f"doesn't give. Choose one of {able}, or pass `do_sample=True`."
        )
