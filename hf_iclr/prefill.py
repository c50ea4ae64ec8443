"""Generation after the first k tokens of given answers: one prefill serves every k."""

import math
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

from hf_iclr.cache_argument import forward_parameters
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


def context_of(model) -> float:
    """How many tokens a model can read, by its config; infinity where that names no limit."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else math.inf


def check_context(model, lengths: Sequence[int], more: int, what: str = "prompt") -> None:
    """
    Raises `ValueError` where a sequence would be longer than the model can read.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model; one whose config names no limit has none.
        lengths (`Sequence[int]`):
            Tokens of each prompt.
        more (`int`):
            Tokens that follow a prompt at most.
        what (`str`, *optional*, defaults to `"prompt"`):
            What the error calls them.
    """
    limit = context_of(model)
    longest = max(range(len(lengths)), key=lengths.__getitem__, default=None)
    if longest is not None and lengths[longest] + more > limit:
        raise ValueError(
            f"Expected {what}s that fit the model's context of {limit} tokens with the {more} that follow, but {what} "
            f"{longest} (from 0) has {lengths[longest]}. Shorten it, or generate fewer tokens."
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
    max_batch_tokens: int | None = None,
    system: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    progress: bool = True,
) -> dict[int, list[list[int] | None]]:
    """
    Continue each prompt after the first k tokens of its answer, for several k.

    The prompt and the longest prefix are read once, and all k decoded together over copies of that key-value cache, in
    which what follows a shorter prefix is masked. Where that can't be (recurrent layers, a sliding window that is
    already full, positions that aren't given) each k gets its own prefill, with the same results. Token ids are
    appended to token ids: k tokens stay k tokens.

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
            Prompts in one forward; in decoding, times the number of `ks`.
        do_sample (`bool`, *optional*, defaults to `False`):
            Whether to sample, else decoding is greedy. Penalties of the generation config are left out either way.
        temperature (`float`), top_k (`int`), top_p (`float`), *optional*:
            Sampling options; left out they change nothing.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws. A prompt's draws depend on nothing else, and the global random state isn't touched.
        max_batch_tokens (`int`, *optional*):
            Fewer prompts in one forward where their tokens, with padding and what is generated, would be more.
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
    if answers is None and max(ks, default=0) > 0:
        raise ValueError(f"Expected answers for prefixes of up to {max(ks)} tokens, got none. Type `answers=[...]`.")
    if answers is not None and len(answers) != len(prompts):
        raise ValueError(f"Expected one answer a prompt, got {len(answers)} and {len(prompts)}.")
    check_decoder(model)
    eos = end_tokens(model, tokenizer)
    rendering: dict[str, Any] = {"system": system, "chat_template_kwargs": chat_template_kwargs}
    return continue_rows(
        model,
        [to_prompt_ids(tokenizer, prompt, **rendering) for prompt in check_prompts(prompts)],
        [to_answer_ids(tokenizer, answer, eos) for answer in answers or [[]] * len(prompts)],
        ks,
        ends=eos,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        max_batch_tokens=max_batch_tokens,
        progress="generate" if progress else None,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )


def continue_rows(
    model,
    rows: Sequence[Sequence[int]],
    prefixes: Sequence[Sequence[int]] | None = None,
    ks: Sequence[int] = (0,),
    *,
    ends: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    max_batch_tokens: int | None = None,
    journal: Any = None,
    progress: str | None = None,
    with_end: bool = False,
    **sampling,
) -> dict[int, list[list[int] | None]]:
    """
    [`generate_after_prefixes`] over token ids: the one loop that generates wherever the library asks a model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A decoder.
        rows (`Sequence[Sequence[int]]`), prefixes (`Sequence[Sequence[int]]`, *optional*):
            Token ids of prompts, and of what they are continued with.
        ends (`Sequence[int]`):
            End-of-sequence tokens, see [`~hf_iclr.models.end_tokens`].
        journal (*optional*):
            Keeps each batch once it is done, and shares batches among processes; see
            [`~hf_iclr.trainers.safety_audit.journal.Journal`].
        progress (`str`, *optional*):
            What the progress bar says; none without.
        with_end (`bool`, *optional*, defaults to `False`):
            Keep the end-of-sequence token of each answer that ended.
        ks, max_new_tokens, batch_size, max_batch_tokens, sampling:
            As for [`generate_after_prefixes`].

    Returns:
        `dict[int, list]`: as [`generate_after_prefixes`].

    Raises:
        ValueError: if an option is out of range, or a row with prefix and answer is longer than the context.
    """
    ks = sorted(set(ks), reverse=True)
    if not ks or ks[-1] < 0:
        raise ValueError(f"Expected prefix lengths of 0 or more tokens, got {ks}. For example `ks=(0, 5, 10)`.")
    if min(max_new_tokens, batch_size, 1 if max_batch_tokens is None else max_batch_tokens) < 1:
        raise ValueError(
            f"Expected sizes of at least 1, got {max_new_tokens=}, {batch_size=} and {max_batch_tokens=}."
        )
    cut = [list(prefix[: ks[0]]) for prefix in prefixes or [()] * len(rows)]
    lengths = [len(row) + len(prefix) for row, prefix in zip(rows, cut, strict=True)]
    check_context(model, lengths, max_new_tokens)
    budget = max_batch_tokens and max(max_batch_tokens // len(ks), 1)
    batches = plan_batches([length + max_new_tokens for length in lengths], batch_size, budget)
    stage = journal and journal.stage([list(row) for row in rows], cut, ks, max_new_tokens, batches, sampling)
    todo = stage.share(batches) if stage else batches

    choose = _chooser(shape=(len(rows), max_new_tokens), **sampling)
    found: dict[int, list[list[int] | None]] = {}
    total = sum(map(len, todo))
    with evaluation_mode(model), tqdm(total=total, desc=progress, disable=not progress, leave=False) as bar:
        for batch in todo:
            done = _PrefixBatch(model, [rows[row] for row in batch], [cut[row] for row in batch], ks)
            part: dict[int, list[list[int] | None]] = {row: [None] * len(ks) for row in batch}
            for index, new in done.continue_each(choose, batch, ends, max_new_tokens, with_end):
                for row, tokens in zip(batch, new, strict=True):
                    part[row][index] = tokens
            found.update(part)
            if stage:
                stage.add(part)
            bar.update(len(batch))
    if stage:
        found = stage.collect()
    return {k: [found[row][index] for row in range(len(rows))] for index, k in enumerate(ks)}


def plan_batches(lengths: Sequence[int], batch_size: int, max_batch_tokens: int | None = None) -> list[list[int]]:
    """Rows of like lengths in batches of at most `batch_size`, padded to at most `max_batch_tokens` or of one row."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        size = len(batches[-1]) if batches else batch_size
        if size >= batch_size or (max_batch_tokens and (size + 1) * lengths[row] > max_batch_tokens):
            batches.append([])
        batches[-1].append(row)
    return batches


def generate_answers(model, tokenizer, prompts: Sequence, **generation) -> list[list[int]]:
    """Answers to prompts without any prefix: [`generate_after_prefixes`] at k = 0 alone, with its options."""
    return [new or [] for new in generate_after_prefixes(model, tokenizer, prompts, **generation)[0]]


class _PrefixBatch:
    """Prompts padded on the left, each followed by up to `max(ks)` answer tokens, and the forwards over them."""

    def __init__(self, model, prompts: Sequence[Sequence[int]], prefixes: list[list[int]], ks: list[int]):
        self.model, self.lengths = model, [len(prefix) for prefix in prefixes]
        # index and k of those that a prefix reaches, from the longest down
        self.ks = [(index, k) for index, k in enumerate(ks) if max(self.lengths) >= k]
        self.prompt_width = max(map(len, prompts))
        longest = self.ks[0][1] if self.ks else 0
        batch = pad_around(prompts, [prefix[:longest] for prefix in prefixes], model.device)
        self.ids, self.mask = batch["input_ids"], batch["attention_mask"]

    def continue_each(
        self, choose, rows: list[int], ends: Sequence[int], max_new_tokens: int, with_end: bool
    ) -> Iterator[tuple[int, list[list[int] | None]]]:
        """For each k that a prefix reaches: its index, and each row's new tokens or `None`."""
        if not self.ks:
            return
        columns = [self.prompt_width + k - 1 for _, k in self.ks]
        cache = self._new_cache()
        logits = logits_at(self.model, self.ids, self.mask, columns, cache)
        if not self._serves_every_k(cache, self.ids.shape[1] + max_new_tokens):
            for place, ((index, k), column) in enumerate(zip(self.ks, columns, strict=True)):
                mask = self.mask[:, : column + 1]
                if place:
                    cache = self._new_cache()
                    logits = logits_at(self.model, self.ids[:, : column + 1], mask, [column], cache)
                call = mask, logits[:, 0], cache, choose, rows, ends, max_new_tokens, with_end
                new = self._decode(*call, may_shrink=False)
                yield index, [part if length >= k else None for part, length in zip(new, self.lengths, strict=True)]
            return
        # All k are decoded in one batch over copies of that cache, in which what follows a shorter prefix is masked.
        pairs = [(row, place) for place, (_, k) in enumerate(self.ks) for row, n in enumerate(self.lengths) if n >= k]
        copies, places = (torch.tensor(part, device=self.ids.device) for part in zip(*pairs, strict=True))
        last = torch.tensor(columns, device=self.ids.device)[places]
        mask = self.mask[copies] * (torch.arange(self.ids.shape[1], device=self.ids.device) <= last[:, None])
        cache.batch_select_indices(copies)
        numbers = [rows[row] for row, _ in pairs]
        call = mask, logits[copies, places], cache, choose, numbers, ends, max_new_tokens, with_end
        new = self._decode(*call, may_shrink=True)
        found: dict[int, list[list[int] | None]] = {index: [None] * len(rows) for index, _ in self.ks}
        for (row, place), tokens in zip(pairs, new, strict=True):
            found[self.ks[place][0]][row] = tokens
        yield from found.items()

    def _decode(
        self, mask, logits, cache, choose, rows: list[int], ends, max_new_tokens: int, with_end: bool, *, may_shrink
    ) -> list[list[int]]:
        """New tokens of each row up to its end-of-sequence token; rows that have ended leave the batch."""
        stop = torch.tensor(list(ends), dtype=torch.long, device=logits.device)
        new: list[list[int]] = [[] for _ in rows]
        left, running = list(range(len(rows))), torch.ones(len(rows), dtype=torch.bool, device=logits.device)
        for step in range(max_new_tokens):
            tokens = choose(logits, [rows[row] for row in left], step)
            going_on = running & ~torch.isin(tokens, stop)
            taken, flags = (running if with_end else going_on).tolist(), going_on.tolist()
            running = going_on
            for row, takes, token in zip(left, taken, tokens.tolist(), strict=True):
                if takes:
                    new[row].append(token)
            if not any(flags) or step + 1 == max_new_tokens:
                break
            if may_shrink and 2 * sum(flags) <= len(flags):  # a copy of the cache, so not at every end
                kept = running.nonzero()[:, 0]
                cache.batch_select_indices(kept)
                mask, tokens, running = mask[kept], tokens[kept], running[kept]
                left = [row for row, goes_on in zip(left, flags, strict=True) if goes_on]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            logits = logits_at(self.model, tokens[:, None], mask, [0], cache)[:, 0]
        return new

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))

    def _serves_every_k(self, cache: DynamicCache, length: int) -> bool:
        """Whether parts of the cache can be masked: full attention, by positions that are given."""
        layers = zip(cache.layers, cache.is_sliding, strict=True)
        windows = [layer.sliding_window for layer, sliding in layers if sliding]
        attends = cache.is_croppable and not any(cache.is_linear) and all(length < window for window in windows)
        return attends and "position_ids" in forward_parameters(self.model)


def _chooser(
    *, shape, do_sample=False, temperature=1.0, top_k=None, top_p=None, seed=0
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
