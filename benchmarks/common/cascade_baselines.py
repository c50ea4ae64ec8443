"""
The cascades that speculative cascades are compared with: token-level, sequence-level and BiLD.

The token cascade takes all prompts in step. The other two take each row on its own, with key-value caches, and count
every forward.
"""

import math
import time

import torch
from transformers import DynamicCache

from hf_iclr.cache_argument import cache_inputs
from hf_iclr.generation.cached_decoder import CachedDecoder, why_not_batched
from hf_iclr.generation.calibration.teacher_forcing import logits_processors, prepare_config, processed_probs
from hf_iclr.generation.cascade_call import CascadeStatistics, end_tokens, padding_token
from hf_iclr.generation.deferral_rules import sample


@torch.no_grad()
def token_cascade(large, small, prompts: torch.Tensor, alpha: float, do_sample: bool, new_tokens: int):
    """
    Token-level cascade by Chow's rule: the large model is asked where max q < 1 - alpha, so that alpha = -1 is the
    large model alone and alpha = 1 the small one. Here both models run everywhere; forwards that aren't needed aren't
    counted. Source: https://huggingface.co/papers/2405.19261, section 2.

    Args:
        large, small ([`~transformers.PreTrainedModel`]):
            Decoders of one vocabulary.
        prompts (`torch.LongTensor` of shape `(batch, prompt_length)`):
            Prompts without padding.
        alpha (`float`):
            Parameter of the rule.
        do_sample (`bool`):
            Whether to sample at temperature 1, or to decode greedily.
        new_tokens (`int`):
            How many tokens to write.

    Returns:
        `tuple`: tokens `(batch, new_tokens)`, and by prompt the large forwards and the mean of log q.
    """
    small_cache, large_cache = DynamicCache(), DynamicCache()
    ids, tokens = prompts, []
    forwards, log_q = torch.zeros(len(prompts)), torch.zeros(len(prompts))
    for _ in range(new_tokens):
        q = small(input_ids=ids, **cache_inputs(small, small_cache)).logits[:, -1].softmax(-1)
        p = large(input_ids=ids, **cache_inputs(large, large_cache)).logits[:, -1].softmax(-1)
        defer = q.amax(-1) < 1 - alpha
        probs = torch.where(defer[:, None], p, q)
        ids = probs.multinomial(1) if do_sample else probs.argmax(-1, keepdim=True)
        tokens.append(ids)
        forwards += defer
        log_q += q.gather(1, ids)[:, 0].log() / new_tokens
    return torch.cat(tokens, 1), forwards.numpy(), log_q


def sequence_cascade_generate(
    large, small, input_ids, attention_mask=None, *, threshold: float = -1.0, **generation_kwargs
) -> tuple[torch.Tensor, CascadeStatistics]:
    """
    Sequence-level cascade: the small model writes the whole answer, and the large one writes it again when the small
    model's mean log-probability `1/n Σ_t log q0(x_t)` is below a threshold. Source:
    https://huggingface.co/papers/2404.10136, with the simplest of its scores.

    Args:
        large, small ([`~transformers.PreTrainedModel`]):
            Decoders of one vocabulary.
        input_ids (`torch.LongTensor` of shape `(batch, prompt_length)`):
            Prompts, padded on the left.
        attention_mask (`torch.LongTensor` of shape `(batch, prompt_length)`, *optional*):
            0 at the padding.
        threshold (`float`, *optional*, defaults to -1.0):
            Nats per token, at temperature 1. `-inf` leaves everything to the small model, `inf` nothing.
        generation_kwargs (*optional*):
            Arguments of `generate` such as `max_new_tokens`, `do_sample`, `temperature`.

    Returns:
        `tuple[torch.LongTensor, CascadeStatistics]`: prompts with their continuations, padded on the right, and the
        counts; alpha holds the threshold. Drift isn't known where the large model wasn't called, and is NaN.

    Raises:
        ValueError: if a model can't be run on its cache, or an argument is none of `generate`.
    """

    def write(row: "_Row") -> None:
        score = 0.0
        while row.unfinished():
            logits = row.read(row.small)
            token = row.choose(logits)
            score += float(logits.log_softmax(-1)[0, token])
            row.emit(token)
        row.drafted = row.produced
        if score / row.produced >= threshold:
            row.accepted = row.produced
            return
        row.truncate(len(row.ids) - row.produced)
        while row.unfinished():
            row.emit(row.choose(row.read(row.large)))
        row.deferred = row.produced

    return _generate(
        "sequence_cascade",
        "mean_log_prob",
        threshold,
        large,
        small,
        input_ids,
        attention_mask,
        generation_kwargs,
        write,
    )


def bild_generate(
    large,
    small,
    input_ids,
    attention_mask=None,
    *,
    fallback_threshold: float = 0.6,
    rollback_threshold: float = 5.0,
    max_draft_tokens: int = 10,
    **generation_kwargs,
) -> tuple[torch.Tensor, CascadeStatistics]:
    """
    Big Little Decoder (https://huggingface.co/papers/2302.07863), greedy decoding only.

    The small model writes until `max q < fallback_threshold` or `max_draft_tokens` tokens are written. The large model
    then reads them in one forward. At the first one with `-log p(x) > rollback_threshold`, if x is not the argmax of
    p, that argmax takes its place and what follows is discarded; otherwise the large model adds its own next token.

    Two details differ from the authors' code: the small model begins, and after a rollback the small model goes on at
    once instead of after one more token of the large model.

    Args:
        large, small, input_ids, attention_mask, generation_kwargs:
            As in [`sequence_cascade_generate`].
        fallback_threshold (`float`, *optional*, defaults to 0.6):
            Probability; the authors' default. 1 calls the large model for every token.
        rollback_threshold (`float`, *optional*, defaults to 5.0):
            Nats; the authors' default. `inf` never rolls back.
        max_draft_tokens (`int`, *optional*, defaults to 10):
            Tokens the small model writes at most in a row; the authors' default.

    Returns:
        `tuple[torch.LongTensor, CascadeStatistics]`: as in [`sequence_cascade_generate`]; alpha holds
        `rollback_threshold`.

    Raises:
        ValueError: if sampling is asked for.
    """

    def write(row: "_Row") -> None:
        if row.config.do_sample:
            raise ValueError("BiLD is defined for greedy decoding, got do_sample=True. Pass `do_sample=False`.")
        drafts = 0
        while row.unfinished():
            if drafts < max_draft_tokens:
                logits = row.read(row.small)
                confidence = float(row.probabilities(logits, greedy=False).max())
                if confidence >= fallback_threshold:
                    row.emit(row.choose(logits))
                    row.drafted += 1
                    row.accepted += 1
                    drafts += 1
                    continue
            logits = row.read(row.large, logits_to_keep=drafts + 1)  # for the drafts and the token after them
            begin = len(row.ids) - drafts
            drafted = torch.tensor(row.ids[begin:], dtype=torch.long, device=row.device)
            surprise = -logits[:-1].log_softmax(-1).gather(1, drafted[:, None])[:, 0]
            token = row.choose(logits[-1:])
            for index in (surprise > rollback_threshold).nonzero()[:1, 0].tolist():
                correction = row.choose(logits[index : index + 1], length=begin + index)
                if correction != row.ids[begin + index]:
                    row.truncate(begin + index)
                    row.accepted -= drafts - index
                    token = correction
            row.emit(token)
            row.deferred += 1
            drafts = 0

    return _generate(
        "bild", f"fallback {fallback_threshold:g}", rollback_threshold, large, small, input_ids, attention_mask,
        generation_kwargs, write,
    )  # fmt: skip


class _Row:
    """One prompt in generation: its tokens, both models with their caches, and what was counted."""

    def __init__(self, large, small, prompt: list[int], config):
        self.ids = list(prompt)
        self.prompt_length = len(prompt)
        self.config = config
        nothing = torch.empty(1, 0, dtype=torch.long, device=large.device)
        self.large, self.small = (CachedDecoder(model, nothing, nothing) for model in (large, small))
        self.processors = logits_processors(large, config, len(prompt))
        self.eos = set(end_tokens(config))
        self.device = large.device
        self.drafted = self.accepted = self.deferred = 0

    @property
    def produced(self) -> int:
        return len(self.ids) - self.prompt_length

    def unfinished(self) -> bool:
        return self.produced < self.config.max_new_tokens and not (self.produced and self.ids[-1] in self.eos)

    def read(self, decoder: CachedDecoder, logits_to_keep: int = 1) -> torch.Tensor:
        """Lets a model read what it hasn't yet; logits of the last positions, `(logits_to_keep, vocab_size)`."""
        begin = decoder.positions.shape[1]
        ids = torch.tensor([self.ids[begin:]], device=self.device)
        return decoder(ids, torch.arange(begin, len(self.ids), device=self.device)[None], logits_to_keep)[0]

    def probabilities(self, logits: torch.Tensor, greedy: bool, length: int | None = None) -> torch.Tensor:
        """
        Processed probabilities of the token after the first `length` ones, from logits of shape `(1, vocab_size)`.
        """
        length = len(self.ids) if length is None else length
        ids = torch.tensor(self.ids, device=self.device)
        return processed_probs(logits, ids, length, self.processors, greedy).probs

    def choose(self, logits: torch.Tensor, length: int | None = None) -> int:
        return int(sample(self.probabilities(logits, greedy=not self.config.do_sample, length=length)))

    def emit(self, token: int) -> None:
        self.ids.append(token)

    def truncate(self, length: int) -> None:
        """Takes tokens back, out of both caches too."""
        del self.ids[length:]
        for decoder in (self.large, self.small):
            surplus = decoder.positions.shape[1] - length
            if surplus > 0:
                decoder.keep(torch.zeros(1, surplus, dtype=torch.bool, device=self.device), 0)


@torch.no_grad()
def _generate(name, rule, alpha, large, small, input_ids, attention_mask, generation_kwargs, write):
    """Runs `write` on each row and puts the rows together."""
    config = prepare_config(large, **{"max_new_tokens": 20, **generation_kwargs})
    for model in (large, small):
        reason = why_not_batched(model)
        if reason is not None:
            raise ValueError(f"The baselines need models that run on an explicit cache: {reason}.")
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    statistics = CascadeStatistics.for_rows(name, rule, alpha, len(input_ids))
    start = time.perf_counter()
    rows = []
    for index, (ids, mask) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
        row = _Row(large, small, ids[mask].tolist(), config)
        write(row)
        rows.append(row)
        statistics.rounds[index] = row.large.forwards
        statistics.drafted[index], statistics.accepted[index] = row.drafted, row.accepted
        statistics.new_tokens[index], statistics.deferred[index] = row.produced, float(row.deferred)
        statistics.drift[index] = math.nan
        statistics.large_forwards += row.large.forwards
        statistics.small_forwards += row.small.forwards
        statistics.large_tokens += row.large.tokens
        statistics.small_tokens += row.small.tokens
        statistics.verify_seconds += row.large.seconds
        statistics.draft_seconds += row.small.seconds
    statistics.total_seconds = time.perf_counter() - start

    pad = padding_token(config) or 0
    width = input_ids.shape[1]
    sequences = input_ids.new_full((len(rows), width + max(row.produced for row in rows)), pad)
    sequences[:, :width] = input_ids
    for index, row in enumerate(rows):
        sequences[index, width : width + row.produced] = input_ids.new_tensor(row.ids[row.prompt_length :])
    return sequences, statistics
