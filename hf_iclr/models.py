"""Generation after the first k tokens of given answers: one prefill serves every k."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import DynamicCache
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_iclr.cache_argument import cache_argument, cache_inputs, forward_parameters


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
            Its tokenizer; not changed. A string is put in the chat template when there is one.
        prompts (`list` of `str` or of chats):
            What to answer.
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
    prompt_ids = [to_prompt_ids(tokenizer, prompt) for prompt in check_prompts(prompts)]
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
        self.accepts = forward_parameters(model)
        self.ks = [k for k in ks if any(len(prefix) >= k for prefix in prefixes)]
        self.prompt_width = max(map(len, prompts))
        shape = (len(prompts), self.prompt_width + self.ks[0])
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for row, (prompt, prefix) in enumerate(zip(prompts, prefixes, strict=True)):
            tokens = prompt + prefix[: self.ks[0]]
            first = self.prompt_width - len(prompt)
            ids[row, first : first + len(tokens)] = torch.tensor(tokens)
            mask[row, first : first + len(tokens)] = 1
        self.ids, self.mask = ids.to(model.device), mask.to(model.device)

    def each_k(self, max_new_tokens: int) -> Iterator[tuple[int, torch.Tensor, DynamicCache]]:
        """From the longest prefix down: k, the next token's logits `(batch, vocab)` and the cache up to there."""
        ends = [self.prompt_width + k for k in self.ks]
        cache = self._new_cache()
        logits = self._forward(self.ids, self.mask, cache, [end - 1 for end in ends])
        can_crop = _can_crop(cache, ends[0] + max_new_tokens)
        for index, (k, end) in enumerate(zip(self.ks, ends, strict=True)):
            if can_crop:
                cache.crop(end - cache.get_seq_length())
                yield k, logits[:, index], cache
            elif index == 0:
                yield k, logits[:, 0], cache
            else:
                cache = self._new_cache()
                yield k, self._forward(self.ids[:, :end], self.mask[:, :end], cache, [end - 1])[:, 0], cache

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
                logits = self._forward(tokens[:, None], mask, cache, [0])[:, 0]
        table = torch.stack(steps, 1).tolist() if steps else [[] for _ in rows]
        return [[token for token in row if token >= 0] for row in table]

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))

    def _forward(self, ids, mask, cache, columns: list[int]) -> torch.Tensor:
        """Logits `(batch, len(columns), vocab)` of the columns of `ids`, float32."""
        options = {}
        if "position_ids" in self.accepts:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        keep = torch.tensor(columns, device=ids.device)
        if "logits_to_keep" in self.accepts:
            options["logits_to_keep"] = keep
        logits = self.model(
            input_ids=ids, attention_mask=mask, use_cache=True, **cache_inputs(self.model, cache), **options
        ).logits.to(ids.device)
        return (logits if "logits_to_keep" in self.accepts else logits[:, keep]).float()


def answer_logits(
    model, prompts: list[list[int]], answers: list[list[int]], batch_size: int = 16
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """
    Teacher-forced logits of answer tokens.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A decoder; read in eval mode without gradients, and left as found.
        prompts (`list[list[int]]`), answers (`list[list[int]]`):
            Token ids; rows with an empty answer are passed over.
        batch_size (`int`, *optional*, defaults to 16):
            Rows in one forward.

    Yields:
        `tuple`: indices of the batch's rows, and float32 logits of shape `(rows, longest answer, vocab)`. Entry t
        predicts answer token t; entries beyond a row's answer mean nothing.
    """
    order = sorted((row for row in range(len(prompts)) if answers[row]), key=lambda row: len(prompts[row]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        length = max(len(answers[row]) for row in rows)
        # the answer's last token predicts nothing that is wanted
        batch = _PrefixBatch(
            model, [prompts[row] for row in rows], [answers[row][: length - 1] for row in rows], [length - 1]
        )
        with evaluation_mode(model):
            columns = list(range(batch.prompt_width - 1, batch.prompt_width + length - 1))
            logits = batch._forward(batch.ids, batch.mask, batch._new_cache(), columns)
        yield rows, logits  # outside, so that the caller's gradients and modes are its own


def check_decoder(model) -> None:
    """Raises `ValueError` unless the model is a decoder with a key-value cache."""
    if model.config.is_encoder_decoder:
        raise ValueError(f"Expected a decoder-only model, got the encoder-decoder {type(model).__name__}.")
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"Expected adapters inside the model, got {model.active_peft_config.peft_type.value}, which puts virtual "
            "tokens before the prompt. Use LoRA, or merge what was learned into a plain model."
        )
    if cache_argument(model) is None:
        raise ValueError(
            f"Expected a model that takes a key-value cache, got {type(model).__name__}, which takes none."
        )


def check_prompts(prompts) -> list:
    """The prompts as a list; raises `ValueError` where there are none, `TypeError` where they are one string."""
    if isinstance(prompts, str):
        raise TypeError(f"Expected a list of prompts, got one string. Type `prompts=[{prompts[:30]!r}]`.")
    prompts = list(prompts)
    if not prompts:
        raise ValueError("Expected at least one prompt, got none.")
    return prompts


def to_prompt_ids(tokenizer, prompt: str | list[dict]) -> list[int]:
    """Token ids of a prompt up to where the answer begins; a string is one user turn of the chat template."""
    if isinstance(prompt, str) and tokenizer.chat_template is None:
        ids = tokenizer(prompt)["input_ids"]
    elif tokenizer.chat_template is None:
        raise ValueError("Expected prompts as strings, since the tokenizer has no chat template; got a chat.")
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    if not ids:
        raise ValueError(f"Expected prompts of at least one token, but {prompt!r} has none.")
    return ids


def to_answer_ids(tokenizer, answer: str | Sequence[int], eos: Sequence[int]) -> list[int]:
    """Token ids of an answer up to its first end-of-sequence token."""
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"] if isinstance(answer, str) else list(answer)
    return ids[: next((index for index, token in enumerate(ids) if token in eos), len(ids))]


def end_tokens(model, tokenizer) -> list[int]:
    """End-of-sequence tokens of the model's generation config, or of the tokenizer where it names none."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


@contextmanager
def evaluation_mode(model) -> Iterator[None]:
    """No gradients and eval mode; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


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
