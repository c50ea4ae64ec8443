"""A cascade inside the assisted-generation loop of transformers: its target logits are replaced by log π."""

import time

import torch
from transformers import LogitsProcessor
from transformers.generation import logits_process
from transformers.generation.candidate_generator import UniversalSpeculativeDecodingGenerator

from .cascade_statistics import CascadeStatistics
from .deferral_rules import DEFERRAL_RULES, cascade_target, one_hot_of_largest, total_variation


_WARPERS = tuple(cls for name, cls in vars(logits_process).items() if name.endswith("LogitsWarper"))


class ForwardMeter:
    """Counts forwards, tokens and seconds of both models by hooks while the block runs."""

    def __init__(self, large, small, statistics: CascadeStatistics):
        # a shallow copy shares its hooks with the original, and must not be counted twice
        self.models = {id(model._forward_hooks): model for model in (large, small)}.values()
        self.statistics = statistics
        self.drafting = False  # tells the two apart when an early exit makes one model play both parts

    def __enter__(self):
        self.begin = time.perf_counter()
        self.handles = [model.register_forward_pre_hook(self._before) for model in self.models]
        self.handles += [model.register_forward_hook(self._after, with_kwargs=True) for model in self.models]
        return self

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()
        self.statistics.total_seconds = time.perf_counter() - self.begin

    def _before(self, model, args):
        self.start = time.perf_counter()

    def _after(self, model, args, kwargs, output):
        seconds = time.perf_counter() - self.start
        tokens = output.logits.shape[0] * output.logits.shape[1]
        for name in ("decoder_input_ids", "input_ids", "inputs_embeds"):
            if kwargs.get(name) is not None:
                tokens = kwargs[name].shape[0] * kwargs[name].shape[1]
                break
        stats = self.statistics
        if self.drafting:
            stats.small_forwards, stats.small_tokens = stats.small_forwards + 1, stats.small_tokens + tokens
            stats.draft_seconds += seconds
        else:
            stats.large_forwards, stats.large_tokens = stats.large_forwards + 1, stats.large_tokens + tokens
            stats.verify_seconds += seconds


class RecordedDrafter:
    """The small model as a candidate generator of transformers sees it: `generate` keeps the drafts' raw logits."""

    def __init__(self, model):
        self.model = model
        self.raw_logits: torch.Tensor | None = None

    def __getattr__(self, name):
        return getattr(self.model, name)

    def generate(self, generation_config, min_new_tokens, max_new_tokens, **inputs):
        # Generation arguments go into the config: beside one, transformers calls them deprecated.
        generation_config.update(min_new_tokens=min_new_tokens, max_new_tokens=max_new_tokens, use_cache=True)
        inputs.pop("use_cache", None)
        output = self.model.generate(generation_config=generation_config, **inputs)
        self.raw_logits = torch.stack(output.logits, dim=1)
        return output


class DraftRecorder:
    """
    Mixin for a candidate generator of transformers: it keeps the raw logits of the drafts, and counts what is
    accepted. Mixed in by [`record_drafts`], which also mends what would change q (see there).
    """

    def get_candidates(self, input_ids, **kwargs):
        self.prompt_and_accepted = input_ids.shape[-1]
        self.assistant_model.raw_logits = None
        self.meter.drafting = True
        candidate_ids, candidate_scores = super().get_candidates(input_ids, **kwargs)
        self.meter.drafting = False
        self.candidate_ids, self.candidate_scores = candidate_ids, candidate_scores
        self.raw_logits = self.assistant_model.raw_logits
        if self.raw_logits is not None and isinstance(self, UniversalSpeculativeDecodingGenerator):
            self.raw_logits = self._atm_translator.get_target_logits(self.raw_logits)
        self.positions = []
        return candidate_ids, candidate_scores

    def update_candidate_strategy(self, input_ids, scores, num_matches):
        deferred, drift = (torch.tensor(values) for values in zip(*self.positions[: num_matches + 1], strict=True))
        drafted = self.candidate_ids.shape[-1] - self.prompt_and_accepted
        self.statistics.record(0, drafted, int(num_matches), deferred, drift)
        super().update_candidate_strategy(input_ids, scores, num_matches)


def record_drafts(generator, options, statistics: CascadeStatistics, meter: ForwardMeter):
    """
    Turns a candidate generator of transformers into one that records q, and makes its q the small model's own:

    - stop strings are left to the main loop (the drafter has no tokenizer to check them with);
    - the attention mask is explicit (transformers would infer one from pad tokens, which may be generated ones);
    - draft length, schedule and confidence threshold are the cascade's, not the drafter's defaults.
    """
    generator.__class__ = type(type(generator).__name__, (DraftRecorder, type(generator)), {})
    generator.statistics, generator.meter = statistics, meter
    generator.assistant_model = RecordedDrafter(generator.assistant_model)
    generator.generation_config.output_logits = True
    generator.generation_config.stop_strings = None
    generator.num_assistant_tokens = options.num_assistant_tokens
    for config in (generator.generation_config, generator.assistant_generation_config):
        config.assistant_confidence_threshold = options.confidence_threshold
        config.num_assistant_tokens_schedule = options.schedule
    return generator


class RawScores(LogitsProcessor):
    """First in the list: keeps the large model's raw logits."""

    def __call__(self, input_ids, scores):
        self.scores = scores.clone()
        return scores


class CascadeScores(LogitsProcessor):
    """
    Last in the list: replaces the large model's processed logits at a drafted position by log π. The position after
    the last draft has no q here and stays the large model's, as in transformers.
    """

    def __init__(self, generator, raw: RawScores, options, do_sample: bool, prompt_length: int):
        self.generator, self.raw, self.options, self.do_sample = generator, raw, options, do_sample
        self.prompt_length = prompt_length

    def __call__(self, input_ids, scores):
        index = input_ids.shape[-1] - self.generator.prompt_and_accepted
        drafted = self.generator.candidate_ids.shape[-1] - self.generator.prompt_and_accepted
        if index >= drafted or input_ids.shape[-1] - self.prompt_length < self.options.strict_prefix:
            self.generator.positions.append((1.0, 0.0))
            return scores
        p_unscaled = self.raw.scores.softmax(-1)
        p = scores.softmax(-1) if self.do_sample else one_hot_of_largest(scores)
        if self.generator.candidate_scores is None:  # drafted greedily in another vocabulary: a token and no q
            drafted = self.generator.candidate_ids[:, self.generator.prompt_and_accepted + index]
            q = q_unscaled = torch.nn.functional.one_hot(drafted, scores.shape[-1]).float()
        else:
            q_scores = self.generator.candidate_scores[:, index].to(scores)
            q = q_scores.softmax(-1) if self.do_sample else one_hot_of_largest(q_scores)
            q_unscaled = self.generator.raw_logits[:, index].to(scores).softmax(-1)
        if not self.do_sample and self.options.rule == "ensemble":
            q, p = q_scores.softmax(-1), scores.softmax(-1)
        pi, deferred = cascade_target(self.options.rule, self.options.alpha, q, p, q_unscaled, p_unscaled)
        self.generator.positions.append((float(deferred), float(total_variation(pi, p))))
        return pi.log()


def without_warpers(processors):
    """
    The processors the drafter must be given. Its own `generate` appends temperature, top-k and the like again: with
    the whole list drafts would be sampled at the square of the temperature.
    """
    return type(processors)(p for p in processors if not isinstance(p, _WARPERS))


def check_rule_needs_no_q(rule: str) -> None:
    """Raises `ValueError` when a rule needs q but the drafter gives tokens only."""
    if DEFERRAL_RULES[rule].reads_draft:
        able = ", ".join(name for name, entry in DEFERRAL_RULES.items() if not entry.reads_draft)
        raise ValueError(
            f"Rule {rule!r} reads the small model's probabilities, which greedy drafting in another vocabulary "
            f"doesn't give. Choose one of {able}, or pass `do_sample=True`."
        )
