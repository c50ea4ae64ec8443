"""Generation after the first k tokens of given answers: one prefill serves every k."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_iclr.models import (
    check_decoder,
    check_prompts,
    end_tokens,
    evaluation_mode,
    logits_at,
    pad_around,
    to_answer_ids,
    to_prompt_ids,
)


def generate_after_prefixes(
    model,
    tokenizer,
    prompts: Sequence,
    answers: Sequence[str | Sequence[int]] | None = None,
    ks: Sequence[int] = (0,),
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    system: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    progress: bool = True,
) -> dict[int, list[list[int] | None]]:
    """
    Continue each prompt after the first k tokens of its answer, for several k.

    The prompt and the longest prefix are read once; for a smaller k the key-value cache is cut back. Where a cache
    can't be cut back (recurrent layers, a sliding window that is already full) each k gets its own prefill, with the
    same results. Token ids are appended to token ids: k tokens stay k tokens.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A decoder. Its train or eval mode is left as found.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer; not changed.
        prompts (`list` of `str` or of chats):
            What to answer, put in the chat template when there is one.
        answers (`list` of `str` or of token ids, *optional*):
            Where the prefixes come from, one for each prompt. Needed for k > 0. An end-of-sequence token ends it.
        ks (`Sequence[int]`, *optional*, defaults to `(0,)`):
            Lengths of the prefixes, in tokens.
        max_new_tokens (`int`, *optional*, defaults to 64):
            Tokens to generate after the prefix.
        batch_size (`int`, *optional*, defaults to 16):
            Prompts in one forward.
        do_sample (`bool`, *optional*, defaults to `False`):
            Whether to sample, else decoding is greedy. Penalties of the generation config are left out either way.
        temperature (`float`), top_k (`int`), top_p (`float`), *optional*:
            Sampling options; left out they change nothing.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws. A prompt's draws depend on nothing else, and the global random state isn't touched.
        system (`str`), chat_template_kwargs (`dict`), *optional*:
            As for [`~hf_iclr.models.render_prompt`].
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `dict[int, list]`: for each k, one list of new token ids a prompt, without the end-of-sequence token; `None`
        where the answer is shorter than k tokens.

    Raises:
        ValueError: if there are no prompts, the answers don't fit them, an option is out of range, or the model is an
            encoder-decoder or keeps no key-value cache.

    Example:

    ```python
    >>> generate_after_prefixes(model, tokenizer, ["How do mushrooms grow?"], ["They grow from spores."], ks=(0, 3))
    ```
    """
    ks = sorted(set(ks), reverse=True)
    if not ks or ks[-1] < 0:
        raise ValueError(f"Expected prefix lengths of 0 or more tokens, got {ks}. For example `ks=(0, 5, 10)`.")
    if answers is None and ks[0] > 0:
        raise ValueError(f"Expected answers for prefixes of up to {ks[0]} tokens, got none. Type `answers=[...]`.")
    if answers is not None and len(answers) != len(prompts):
        raise ValueError(f"Expected one answer a prompt, got {len(answers)} and {len(prompts)}.")
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"Expected sizes of at least 1, got {max_new_tokens=} and {batch_size=}.")
    check_decoder(model)
    eos = end_tokens(model, tokenizer)
    rendering: dict[str, Any] = {"system": system, "chat_template_kwargs": chat_template_kwargs}
    prompt_ids = [to_prompt_ids(tokenizer, prompt, **rendering) for prompt in check_prompts(prompts)]
    prefixes = [to_answer_ids(tokenizer, answer, eos)[: ks[0]] for answer in answers or [[]] * len(prompts)]

    choose = _chooser(do_sample, temperature, top_k, top_p, seed, (len(prompts), max_new_tokens))
    results: dict[int, list[list[int] | None]] = {k: [None] * len(prompts) for k in ks}
    # alike lengths in one batch, so that little is padding
    order = sorted(range(len(prompts)), key=lambda row: len(prompt_ids[row]))
    with evaluation_mode(model), tqdm(total=len(order), desc="generate", disable=not progress, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = _PrefixBatch(model, [prompt_ids[row] for row in rows], [prefixes[row] for row in rows], ks)
            for k, logits, cache in batch.each_k(max_new_tokens):
                lengths = [len(prefixes[row]) for row in rows]
                wanted = torch.tensor([length >= k for length in lengths], device=logits.device)
                tokens = batch.decode(k, logits, cache, wanted, choose, rows, eos, max_new_tokens)
                for row, new, length in zip(rows, tokens, lengths, strict=True):
                    if length >= k:
                        results[k][row] = new
            bar.update(len(rows))
    return results


def generate_answers(model, tokenizer, prompts: Sequence, **generation) -> list[list[int]]:
    """Answers to prompts without any prefix: [`generate_after_prefixes`] at k = 0 alone, with its options."""
    return [new or [] for new in generate_after_prefixes(model, tokenizer, prompts, **generation)[0]]


class _PrefixBatch:
    """Prompts padded on the left, each followed by up to `max(ks)` answer tokens, and the forwards over them."""

    def __init__(self, model, prompts: list[list[int]], prefixes: list[list[int]], ks: list[int]):
        self.model = model
        self.ks = [k for k in ks if any(len(prefix) >= k for prefix in prefixes)]
        self.prompt_width = max(map(len, prompts))
        longest = self.ks[0] if self.ks else 0
        batch = pad_around(prompts, [prefix[:longest] for prefix in prefixes], model.device)
        self.ids, self.mask = batch["input_ids"], batch["attention_mask"]

    def each_k(self, max_new_tokens: int) -> Iterator[tuple[int, torch.Tensor, DynamicCache]]:
        """From the longest prefix down: k, the next token's logits `(batch, vocab)` and the cache up to there."""
        if not self.ks:  # no answer is long enough
            return
        ends = [self.prompt_width + k for k in self.ks]
        cache = self._new_cache()
        logits = logits_at(self.model, self.ids, self.mask, [end - 1 for end in ends], cache)
        can_crop = _can_crop(cache, ends[0] + max_new_tokens)
        for index, (k, end) in enumerate(zip(self.ks, ends, strict=True)):
            if can_crop:
                cache.crop(end - cache.get_seq_length())
                yield k, logits[:, index], cache
            elif index == 0:
                yield k, logits[:, 0], cache
            else:
                cache = self._new_cache()
                yield k, logits_at(self.model, self.ids[:, :end], self.mask[:, :end], [end - 1], cache)[:, 0], cache

    def decode(self, k, logits, cache, wanted, choose, rows, eos, max_new_tokens) -> list[list[int]]:
        """New tokens of each row up to its end-of-sequence token; rows that aren't `wanted` get none."""
        mask = self.mask[:, : self.prompt_width + k]
        ends = torch.tensor(eos, dtype=torch.long, device=logits.device)
        running, steps = wanted, []
        for step in range(max_new_tokens):
            tokens = choose(logits, rows, step)
            running = running & ~torch.isin(tokens, ends)
            if not bool(running.any()):
                break
            steps.append(torch.where(running, tokens, -1))
            if step + 1 < max_new_tokens:
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                logits = logits_at(self.model, tokens[:, None], mask, [0], cache)[:, 0]
        table = torch.stack(steps, 1).tolist() if steps else [[] for _ in rows]
        return [[token for token in row if token >= 0] for row in table]

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))


def _chooser(
    do_sample, temperature, top_k, top_p, seed, shape
) -> Callable[[torch.Tensor, list[int], int], torch.Tensor]:
    """A function of logits `(batch, vocab)`, the rows they belong to and the step, that gives token ids `(batch,)`."""
    if not do_sample:
        return lambda logits, rows, step: logits.argmax(-1)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))
    # One number a row and step, so that batches, padding and other prefixes don't change a row's draws.
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def choose(logits: torch.Tensor, rows: list[int], step: int) -> torch.Tensor:
        cumulative = warpers(None, logits).softmax(-1).cumsum(-1, dtype=torch.float64)
        draw = uniform[rows, step, None].to(logits.device) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, draw, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)

    return choose


def _can_crop(cache: DynamicCache, length: int) -> bool:
    """Whether the cache can be cut back after it has held `length` tokens."""
    windows = [layer.sliding_window for layer, sliding in zip(cache.layers, cache.is_sliding, strict=True) if sliding]
    return cache.is_croppable and not any(cache.is_linear) and all(length < window for window in windows)
