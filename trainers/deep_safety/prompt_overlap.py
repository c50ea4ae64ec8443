"""Whether prompts that a model is trained on come again in its evaluation."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class PromptPair(NamedTuple):
    """A training prompt and an evaluation prompt that share text, by their places in the two lists."""

    train_index: int
    eval_index: int
    shared: str  # in lower case and without punctuation
    exact: bool


@dataclass(frozen=True)
class OverlapReport:
    """
    What [`check_overlap`] found; its `str` is a sentence.

    Args:
        pairs (`list[PromptPair]`):
            Pairs that share text, in the order of the evaluation prompts.
        num_train (`int`):
            Training prompts looked at.
        num_eval (`int`):
            Evaluation prompts looked at.
        ngram (`int`):
            Words in a row that count as shared text.
    """

    pairs: list[PromptPair]
    num_train: int
    num_eval: int
    ngram: int

    def __str__(self) -> str:
        exact = {pair.eval_index for pair in self.pairs if pair.exact}
        similar = {pair.eval_index for pair in self.pairs} - exact
        if not self.pairs:
            return (
                f"None of {self.num_eval} evaluation prompts equals one of {self.num_train} training prompts or "
                f"shares {self.ngram} words in a row with it."
            )
        return (
            f"Of {self.num_eval} evaluation prompts, {len(exact)} are among the {self.num_train} training prompts and "
            f"{len(similar)} more share {self.ngram} words in a row with one: leave them out of one side."
        )


def check_overlap(
    train_prompts: Sequence[str | list[Mapping[str, Any]]],
    eval_prompts: Sequence[str | list[Mapping[str, Any]]],
    *,
    ngram: int = 8,
) -> OverlapReport:
    """
    Find evaluation prompts that equal a training prompt or share a run of words with it. Case, punctuation and blanks
    make no difference; of a chat only the user's messages count, so that a common system prompt is no overlap. The
    [paper](https://huggingface.co/papers/2406.05946) leaves prompts of its benchmarks out of the recovery data.

    Args:
        train_prompts (`list[str]` or `list[list[dict]]`):
            Prompts or messages that the model learns from.
        eval_prompts (`list[str]` or `list[list[dict]]`):
            Prompts or messages that it is measured on.
        ngram (`int`, *optional*, defaults to `8`):
            Words in a row that count as shared. Prompts of fewer words must be equal. Templates of prompts may share
            more words than that by design: type a larger number then.

    Returns:
        [`OverlapReport`]

    Raises:
        ValueError: if one of the lists is empty or `ngram` is below 1.
    """
    if not len(train_prompts) or not len(eval_prompts):
        raise ValueError(f"Expected prompts on both sides, got {len(train_prompts)} and {len(eval_prompts)}.")
    if ngram < 1:
        raise ValueError(f"Expected `ngram` to be at least 1 word, got {ngram}.")
    whole: dict[tuple[str, ...], list[int]] = defaultdict(list)
    runs: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, prompt in enumerate(train_prompts):
        words = _words(prompt)
        whole[words].append(index)
        for run in set(_runs(words, ngram)):
            runs[run].append(index)
    pairs = []
    for index, prompt in enumerate(eval_prompts):
        words = _words(prompt)
        found = {other: PromptPair(other, index, " ".join(words), True) for other in whole.get(words, ())}
        for run in _runs(words, ngram):
            for other in runs.get(run, ()):
                found.setdefault(other, PromptPair(other, index, " ".join(run), False))
        pairs += sorted(found.values())
    return OverlapReport(pairs, len(train_prompts), len(eval_prompts), ngram)


def _words(prompt) -> tuple[str, ...]:
    if not isinstance(prompt, str):
        prompt = " ".join(message["content"] for message in prompt if message["role"] == "user")
    return tuple(re.findall(r"\w+", unicodedata.normalize("NFKC", prompt).casefold()))


def _runs(words, ngram) -> list[tuple[str, ...]]:
    return [words[start : start + ngram] for start in range(len(words) - ngram + 1)]
