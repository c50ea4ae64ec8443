"""What a model in training thinks of given answers, and what it answers itself, without disturbing the training."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl.trainer import add_fused_lm_head

from hf_iclr.models import end_tokens, evaluation_mode, generate_rows, pad_answers

from .argmax import HiddenStateTap, exact_argmax
from .metrics import TOKEN_METRICS, token_quantities


# Columns of `score_answers`: the number of tokens, then sums over the tokens of an answer.
COLUMNS = ("tokens", *TOKEN_METRICS, "logp_argmax")


def score_answers(
    trainer: Trainer,
    answers: Sequence[tuple[Any, Any]],
    with_argmax: Sequence[bool],
    batch_size: int,
    progress: bool = False,
    collate: Callable[[list], dict[str, torch.Tensor]] = pad_answers,
) -> torch.Tensor:
    """
    Teacher-forced token metrics of answers. Each process scores its share; none holds (batch, length, vocabulary)
    logits, and whether the trainer gave the model a fused head does not matter: it has one while this runs.

    Args:
        trainer ([`~transformers.Trainer`]):
            Its model is run in evaluation mode, without gradients, in the trainer's mixed precision.
        answers (`Sequence[tuple]`):
            Token ids of prompts and answers, or what else `collate` takes.
        with_argmax (`Sequence[bool]`):
            Which answers get a `logp_argmax`; zero for the others.
        batch_size (`int`):
            Answers in one forward.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.
        collate (`Callable`, *optional*, defaults to [`~hf_iclr.models.pad_answers`]):
            Makes inputs of the model of some answers, `labels` among them.

    Returns:
        `torch.Tensor` of shape `(len(answers), len(COLUMNS))`, float64, on the CPU.
    """
    accelerator = trainer.accelerator
    model, base = trainer.model_wrapped, base_model(trainer)
    vocab_size = base.config.get_text_config().vocab_size
    order = list(range(len(answers)))
    if answers and isinstance(answers[0][0], list):
        order.sort(key=lambda index: sum(map(len, answers[index])))
    # Where the model is sharded every forward is met by all processes, so all get as many answers.
    order += order[:1] * (-len(order) % accelerator.num_processes)
    shares = [order[rank :: accelerator.num_processes] for rank in range(accelerator.num_processes)]
    mine, rows = shares[accelerator.process_index], []
    with evaluation_mode(model), fused_head(base), accelerator.autocast():
        for start in tqdm(range(0, len(mine), batch_size), desc="probes", disable=not progress, leave=False):
            batch = mine[start : start + batch_size]
            inputs = collate([answers[index] for index in batch])
            inputs = {name: tensor.to(accelerator.device) for name, tensor in inputs.items()}
            tap, labels = HiddenStateTap(base), inputs["labels"]
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
            length = labels.size(1) - 1  # prompt-learning adapters prepend virtual tokens
            tokens = token_quantities(
                outputs.log_probs[:, -length:],
                outputs.entropy[:, -length:],
                outputs.log_sum_sq_probs[:, -length:],
                outputs.is_top1[:, -length:],
                vocab_size,
            )
            wanted = torch.tensor([with_argmax[index] for index in batch], device=labels.device)
            asked = labels[:, 1:].masked_fill(~wanted[:, None], -100)
            argmax = exact_argmax(base, tap.pop()[:, :-1][:, -length:], asked).logp_argmax
            tokens = torch.cat([torch.ones_like(tokens[:1]), tokens, argmax[None].to(tokens)])
            rows.append(tokens.masked_fill(labels[:, 1:] == -100, 0).sum(-1).t())
    gathered = accelerator.gather(torch.cat(rows)).cpu().double()
    table = gathered.new_empty(len(answers), len(COLUMNS))
    table[[index for share in shares for index in share]] = gathered
    return table


def decode_answers(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
    do_sample: bool = False,
) -> list[list[int]]:
    """
    Greedy answers of the model as it is now, or samples from its own distribution at temperature 1. What the model's
    generation config says about sampling and repetition is left out.

    Args:
        trainer ([`~transformers.Trainer`]):
            Its model generates in evaluation mode, each process its share.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            For the end-of-text token where the generation config names none.
        prompts (`Sequence[list[int]]`):
            Token ids.
        max_new_tokens (`int`):
            At most so many.
        batch_size (`int`):
            Prompts in one call of `generate`.
        do_sample (`bool`, *optional*, defaults to `False`):
            Draws from torch's random state.

    Returns:
        `list[list[int]]`: token ids; the last one is the end-of-text token unless `max_new_tokens` came first.
    """
    accelerator = trainer.accelerator
    model = accelerator.unwrap_model(trainer.model_wrapped)
    ends = end_tokens(model, tokenizer)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    sampling: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {}
    rank, world = accelerator.process_index, accelerator.num_processes
    share = [*prompts, *prompts[:1] * (-len(prompts) % world)][rank::world]
    with evaluation_mode(model), accelerator.autocast():
        answers = list(
            generate_rows(
                model,
                share,
                ends,
                batch_size=batch_size,
                padding=padding,
                do_sample=do_sample,
                max_new_tokens=max_new_tokens,
                eos_token_id=ends or None,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                num_beams=1,
                use_cache=True,
                **sampling,
            )
        )
    if world > 1:
        gathered = gather_object(answers)
        answers = [gathered[rank * len(share) + index] for index in range(len(share)) for rank in range(world)]
    return answers[: len(prompts)]


def repetition_metrics(answers: Sequence[Sequence[int]], ends: Sequence[int]) -> dict[str, float]:
    """
    How much decoded answers repeat: themselves (the "repeater" of section 3.3 of
    https://huggingface.co/papers/2407.10490) and each other.

    Args:
        answers (`Sequence[Sequence[int]]`):
            Token ids, with the end-of-text token where the model ended.
        ends (`Sequence[int]`):
            End-of-text tokens; not counted as text.

    Returns:
        `dict[str, float]`: `rep_4`, the share of the 4-grams of an answer seen in it before; `distinct_2`, different
        2-grams over all 2-grams; `dup_across_prompts`, the share of an answer's different 4-grams that also stand in
        the answer to another prompt; `eos_rate`, the share that ended. Means over answers, those too short for an
        n-gram left out.
    """
    texts = [answer[:-1] if answer and answer[-1] in ends else answer for answer in answers]
    fours = [_ngrams(text, 4) for text in texts]
    twos = [gram for answer in texts for gram in _ngrams(answer, 2)]
    holders = Counter(gram for grams in fours for gram in set(grams))
    long = [grams for grams in fours if grams]
    return {
        "rep_4": _mean([1 - len(set(grams)) / len(grams) for grams in long]),
        "distinct_2": len(set(twos)) / len(twos) if twos else 1.0,
        "dup_across_prompts": _mean([_mean([holders[gram] > 1 for gram in set(grams)]) for grams in long]),
        "eos_rate": _mean([len(text) < len(answer) for text, answer in zip(texts, answers, strict=True)]),
    }


def choose_interval(every: int, max_steps: int, budget: float, step: float, ends: float, between: float) -> int:
    """
    The shortest multiple of `every` with which all passes of a run take the share `budget` of it: with n of them in
    between, `ends + n between <= budget / (1 - budget) * max_steps * step`.

    Args:
        every (`int`):
            Least steps between two passes.
        max_steps (`int`):
            Of the run.
        budget (`float`):
            In (0, 1).
        step, ends, between (`float`):
            Seconds of a step, of the first and last pass together, and of one in between, which decodes less often.

    Returns:
        `int`: steps; 0 where none in between fits.
    """
    left = max_steps * step * budget / (1 - budget) - ends
    passes = min(math.floor(max(left, 0.0) / between), max_steps // every)
    return every * math.ceil(max_steps / (passes + 1) / every) if passes else 0


def base_model(trainer: Trainer) -> PreTrainedModel:
    """The model that has the head, inside of wrappers for distributed training and adapters."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.get_base_model() if is_peft_model(model) else model


@contextmanager
def fused_head(
    base: PreTrainedModel, outputs: Sequence[str] = ("log_probs", "entropy", "is_top1", "log_sum_sq_probs")
) -> Iterator[None]:
    """TRL's fused head with these outputs of each token, for a while; then the forward that was there before."""
    patched = vars(base).get("forward")
    add_fused_lm_head(base, outputs=tuple(outputs))
    try:
        yield
    finally:
        if patched is None:
            del base.forward
        else:
            base.forward = patched


def _ngrams(answer: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(answer[start : start + n]) for start in range(len(answer) - n + 1)]


def _mean(values: list) -> float:
    return sum(values) / max(len(values), 1)
