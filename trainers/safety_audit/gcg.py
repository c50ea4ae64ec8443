"""Greedy coordinate gradient: an adversarial suffix that makes an answer begin as wanted."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from hf_iclr.cache_argument import forward_parameters
from hf_iclr.models import check_decoder, evaluation_mode, render_prompt
from hf_iclr.prefill import check_context

from .asking.ask import prompt_and_lead


logger = logging.getLogger(__name__)

INITIAL_SUFFIX = " !" * 16
_MARK = "\ue000"  # a private-use character, to find the suffix in a rendered chat


class GCGResult(NamedTuple):
    """
    What [`gcg`] found.

    Attributes:
        suffix (`str`):
            Text to append to the prompt, separating space included.
        suffix_ids (`list[int]`):
            Its token ids, which the appended text is tokenised to again.
        loss (`float`):
            Its loss: mean negative log-probability of the target's tokens, nats.
        losses (`list[float]`):
            Loss of the initial suffix and of each step's.
        success (`bool`):
            Whether greedy decoding begins with the target.
    """

    suffix: str
    suffix_ids: list[int]
    loss: float
    losses: list[float]
    success: bool


def gcg(
    model,
    tokenizer,
    prompt: str | list[dict],
    target: str | list[int],
    *,
    initial_suffix: str = INITIAL_SUFFIX,
    num_steps: int = 50,
    num_candidates: int = 64,
    num_swaps: int = 64,
    batch_size: int = 32,
    seed: int = 0,
    system: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    progress: bool = True,
) -> GCGResult:
    """
    Search a suffix of the prompt under which the model's answer begins with `target`: algorithm 1 of
    https://huggingface.co/papers/2307.15043 for one prompt.

    In each step the gradient of the loss at the suffix's one-hot tokens names the most promising replacements, some of
    them are tried, one position at a time, and the best is kept. Only suffixes that survive being written as text and
    tokenised again are tried. The budget is small: 50 steps of 64 trials, where the paper takes 500 of 512; what
    resists it may fall to a larger one.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A decoder; left as found.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompt (`str` or a chat):
            What is asked; in a chat the suffix goes to the end of the last message.
        target (`str` or `list[int]`):
            How the answer should begin.
        initial_suffix (`str`, *optional*, defaults to sixteen exclamation marks):
            Start of the search; its number of tokens stays.
        num_steps (`int`, *optional*, defaults to 50):
            Steps at most; the search ends when greedy decoding begins with the target.
        num_candidates (`int`, *optional*, defaults to 64):
            Replacements considered at each position.
        num_swaps (`int`, *optional*, defaults to 64):
            Replacements tried in each step.
        batch_size (`int`, *optional*, defaults to 32):
            Suffixes in one forward.
        seed (`int`, *optional*, defaults to 0):
            Seed of the trials; the global random state isn't touched.
        system (`str`), chat_template_kwargs (`dict`), *optional*:
            As for [`~hf_iclr.models.render_prompt`].
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`GCGResult`]: the best suffix of all steps.

    Raises:
        ValueError: if the target is empty, a size is below 1, or the tokenizer merges the initial suffix with what
            stands around it.
    """
    check_decoder(model)
    if min(num_steps, num_candidates, num_swaps, batch_size) < 1:
        raise ValueError(
            f"Expected sizes of at least 1, got {num_steps=}, {num_candidates=}, {num_swaps=} and {batch_size=}."
        )
    target_ids = tokenizer(target, add_special_tokens=False)["input_ids"] if isinstance(target, str) else target
    if not target_ids:
        raise ValueError(f"Expected a target of at least one token, got {target!r}.")
    rendering: dict[str, Any] = {"system": system, "chat_template_kwargs": chat_template_kwargs}
    encode, before, suffix_ids, after = _locate_suffix(tokenizer, prompt, initial_suffix, **rendering)
    lead = prompt_and_lead(tokenizer, prompt, **rendering)[1]  # where a template that thinks would answer
    check_context(model, [len(before + suffix_ids + after + lead)], len(target_ids))

    device, generator = model.device, torch.Generator().manual_seed(seed)
    ids = torch.tensor(before + suffix_ids + after + lead + target_ids, device=device)
    place = slice(len(before), len(before) + len(suffix_ids))
    loss_of = _TargetLoss(model, len(target_ids))
    allowed = torch.ones(model.get_input_embeddings().weight.shape[0], dtype=torch.bool, device=device)
    allowed[len(tokenizer) :] = False
    allowed[[token for token in tokenizer.all_special_ids if token < len(allowed)]] = False

    with evaluation_mode(model), tqdm(range(num_steps), desc="gcg", disable=not progress, leave=False) as steps:
        loss, hit = (value[0] for value in loss_of(ids[None]))
        losses, best = [loss.item()], (loss.item(), bool(hit), ids[place].tolist())
        for _ in steps:
            if best[1]:
                break
            gradient = loss_of.gradient(ids, place).masked_fill(~allowed, torch.inf)
            promising = gradient.topk(min(num_candidates, int(allowed.sum())), largest=False).indices
            trials = _swap_one(ids, place, promising, num_swaps, generator)
            faithful = [encode(tokenizer.decode(row)) == before + row + after for row in trials[:, place].tolist()]
            trials = trials[torch.tensor(faithful, device=device)]
            if len(trials) == 0:
                losses.append(losses[-1])
                continue
            parts = [loss_of(part) for part in trials.split(batch_size)]
            trial_losses, hits = (torch.cat(values) for values in zip(*parts, strict=True))
            index = int(trial_losses.argmin())
            ids = trials[index]
            losses.append(trial_losses[index].item())
            best = min(best, (losses[-1], bool(hits[index]), ids[place].tolist()), key=lambda entry: entry[0])
            steps.set_postfix(loss=f"{best[0]:.3f}")
    text = tokenizer.decode(best[2])
    return GCGResult(_separator(text) + text, best[2], best[0], losses, best[1])


def append_to_prompt(prompt: str | list[dict], text: str) -> str | list[dict]:
    """The prompt, or the last message of a chat, with `text` at its end."""
    if isinstance(prompt, str):
        return prompt + text
    content = prompt[-1]["content"]
    if not isinstance(content, str):  # parts, the last of text
        content = [*content[:-1], {**content[-1], "text": content[-1]["text"] + text}]
        return [*prompt[:-1], {**prompt[-1], "content": content}]
    return [*prompt[:-1], {**prompt[-1], "content": content + text}]


class _TargetLoss:
    """Mean negative log-probability of the last `length` tokens of sequences, nats."""

    def __init__(self, model, length: int):
        self.model, self.length = model, length
        self.options = {"logits_to_keep": length + 1} if "logits_to_keep" in forward_parameters(model) else {}

    def __call__(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and whether every target token is the most likely one, each of shape `(batch,)`."""
        logits = self._target_logits(input_ids=ids)
        target = ids[:, -self.length :]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(1)
        return losses, (logits.argmax(-1) == target).all(1)

    def gradient(self, ids: torch.Tensor, place: slice) -> torch.Tensor:
        """Gradient at the one-hot tokens of `place`, shape `(len(place), vocab)`, up to the embedding's scale."""
        embedding = self.model.get_input_embeddings()
        embedded = embedding(ids[None])
        with torch.enable_grad():
            part = embedded[:, place].clone().requires_grad_()
            joined = torch.cat([embedded[:, : place.start], part, embedded[:, place.stop :]], 1)
            logits = self._target_logits(inputs_embeds=joined)
            loss = torch.nn.functional.cross_entropy(logits[0], ids[-self.length :])
            (gradient,) = torch.autograd.grad(loss, part)
        return (gradient[0] @ embedding.weight.T.to(gradient.dtype)).float()

    def _target_logits(self, **inputs) -> torch.Tensor:
        logits = self.model(**inputs, use_cache=False, **self.options).logits
        return logits[:, -self.length - 1 : -1].float()


def _locate_suffix(
    tokenizer, prompt: str | list[dict], suffix: str, **rendering
) -> tuple[Callable[[str], list[int]], list[int], list[int], list[int]]:
    """How a suffix's text is tokenised where it stands, and the ids before it, its own, and those after it."""
    special = not tokenizer.chat_template
    marked = render_prompt(tokenizer, append_to_prompt(prompt, _MARK), **rendering)
    if marked.count(_MARK) != 1:
        raise ValueError(
            f"Expected a chat template that shows the end of the last message once, got one that shows it "
            f"{marked.count(_MARK)} times. A suffix has no place in it."
        )

    def render(text: str) -> str:
        return render_prompt(tokenizer, append_to_prompt(prompt, _separator(text) + text), **rendering)

    def encode(text: str) -> list[int]:
        return tokenizer(render(text), add_special_tokens=special)["input_ids"]

    # Tokens are found by where they stand in the whole: alone, what follows the suffix may be tokenised otherwise.
    head, tail = marked.split(_MARK)
    whole = render(suffix)
    if tokenizer.is_fast:
        encoded = tokenizer(whole, add_special_tokens=special, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        inside = [i for i, (start, end) in enumerate(spans) if start < len(whole) - len(tail) and end > len(head)]
        first, last = (inside[0], inside[-1] + 1) if inside else (0, 0)
    else:
        ids, first = encode(suffix), len(tokenizer(head, add_special_tokens=special)["input_ids"])
        last = len(ids) - len(tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else [])
    before, own, after = ids[:first], ids[first:last], ids[last:]
    if not own or encode(tokenizer.decode(own)) != ids:
        raise ValueError(
            f"Expected an initial suffix that keeps its own tokens, but {suffix!r} is tokenised together with the "
            "text around it. Type another one, for example `initial_suffix=' x x x x'`."
        )
    return encode, before, own, after


def _separator(text: str) -> str:
    return "" if text[:1].isspace() else " "


def _swap_one(ids, place: slice, promising: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Different copies of `ids`, at most `count`, each with one token of `place` replaced by a promising one."""
    length, width = promising.shape
    chosen = torch.randperm(length * width, generator=generator)[:count].to(ids.device)
    position, rank = chosen // width, chosen % width
    trials = ids.repeat(len(chosen), 1)
    trials[torch.arange(len(chosen), device=ids.device), place.start + position] = promising[position, rank]
    return trials[(trials != ids).any(1)]
