"""Metrics of edits as functions of numbers and texts; `evaluate_modules.py` has the same for `evaluate`."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch


# What each kind of prompt measures.
KINDS = {"rewrite": "efficacy", "paraphrase": "generalisation", "neighborhood": "specificity"}


def edit_success(
    request: Sequence[str],
    kind: Sequence[str],
    nll_new: Sequence[float],
    nll_true: Sequence[float],
    accuracy: Sequence[float],
) -> dict[str, float]:
    """
    Efficacy, generalisation and specificity of edits as in https://huggingface.co/papers/2410.02355, and their
    harmonic mean. Each argument has one value a prompt; prompts are averaged within their request, then requests.

    On the edited prompt and its paraphrases the new answer should win, on prompts of the neighbourhood the true one
    (as the code has it: the paper's equation 21 prints the sign the other way).

    Args:
        request (`Sequence[str]`):
            Which request the prompt belongs to.
        kind (`Sequence[str]`):
            `"rewrite"`, `"paraphrase"` or `"neighborhood"`.
        nll_new, nll_true (`Sequence[float]`):
            Negative log-likelihood of both answers after the prompt, in nats per token; NaN where there is no such
            answer, and then the prompt does not count in the comparison.
        accuracy (`Sequence[float]`):
            Share of the tokens of the wanted answer that are the most likely ones, given those before them.

    Returns:
        `dict[str, float]`: between 0 and 1, NaN where nothing was measured. `efficacy`, `generalisation`,
        `specificity`, `score`: the wanted answer is the likelier of the two. With `_argmax`: every token of the wanted
        answer is the most likely of all. With `_tokens`: share of such tokens, which is zsRE's measure.

    Raises:
        ValueError: when a kind is unknown or there is no prompt.
    """
    table = pd.DataFrame(
        {"request": request, "kind": kind, "new": nll_new, "true": nll_true, "tokens": accuracy}
    ).astype({"new": float, "true": float, "tokens": float})
    if table.empty:
        raise ValueError("Expected at least one prompt to measure, got none.")
    if unknown := sorted(set(table["kind"]) - set(KINDS)):
        raise ValueError(f"Expected kinds among {list(KINDS)}, got {unknown}.")
    margin = table["true"] - table["new"]
    margin = margin.where(table["kind"] != "neighborhood", -margin)
    table["wins"] = (margin > 0).astype(float).where(margin.notna())
    table["argmax"] = (table["tokens"] == 1).astype(float).where(table["tokens"].notna())
    means = table.groupby(["kind", "request"])[["wins", "argmax", "tokens"]].mean().groupby("kind").mean()
    means = means.reindex(list(KINDS))
    scores: dict[str, float] = {}
    for column, suffix in (("wins", ""), ("argmax", "_argmax"), ("tokens", "_tokens")):
        values = means[column]
        scores |= {f"{name}{suffix}": float(values[kind]) for kind, name in KINDS.items()}
        scores[f"score{suffix}"] = harmonic_mean(values.tolist())
    return scores


def harmonic_mean(values: Sequence[float]) -> float:
    """The harmonic mean of numbers that are not negative: 0 when one of them is 0, NaN when one of them is NaN."""
    numbers = np.asarray(values, dtype=float)
    if np.isnan(numbers).any():
        return float("nan")
    return 0.0 if (numbers == 0).any() else float(len(numbers) / (1 / numbers).sum())


def ngram_entropy(text: str) -> float:
    """
    Fluency of one text: word n-gram entropy, 2/3 of the bigrams' and 4/3 of the trigrams' averaged, as the code of
    https://huggingface.co/papers/2410.02355 has it (its equation 22 omits the sign and the mean). Text that repeats
    itself is near 0. Words and marks are split by a regular expression, where the papers use NLTK's tokenizer.

    Args:
        text (`str`):
            Generated text.

    Returns:
        `float`: in bits; the papers print a hundred times this.
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    return (2 / 3 * _entropy_bits(words, 2) + 4 / 3 * _entropy_bits(words, 3)) / 2


def fluency(texts: Sequence[str]) -> float:
    """The mean [`ngram_entropy`] of texts."""
    return float(np.mean([ngram_entropy(text) for text in texts]))


def _entropy_bits(words: list[str], n: int) -> float:
    counts = np.array(list(Counter(zip(*(words[start:] for start in range(n)), strict=False)).values()))
    shares = counts / counts.sum()
    return float((shares * np.log2(1 / shares)).sum())


def hidden_drift(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """
    How far hidden states moved: in numbers what https://huggingface.co/papers/2410.02355 shows as clouds of points.

    Args:
        before, after (`torch.Tensor` of shape `(prompts, hidden)`):
            States of the same prompts, see [`~hf_iclr.editors.alpha_edit.last_hidden_states`].

    Returns:
        `dict[str, float]`: means over prompts of `relative_shift` ‖after - before‖ / ‖before‖ and `cosine_distance`
        1 - cos, and `mean_shift`, the distance of the two means over the root mean square norm before.

    Raises:
        ValueError: when the shapes differ or are not two-dimensional.
    """
    before, after = torch.as_tensor(before, dtype=torch.float64), torch.as_tensor(after, dtype=torch.float64)
    if before.ndim != 2 or before.shape != after.shape or not len(before):
        raise ValueError(
            f"Expected states of the same prompts, (prompts, hidden), got {tuple(before.shape)} before and "
            f"{tuple(after.shape)} after."
        )
    norms = before.norm(dim=1)
    return {
        "relative_shift": ((after - before).norm(dim=1) / norms).mean().item(),
        "cosine_distance": (1 - torch.cosine_similarity(before, after)).mean().item(),
        "mean_shift": ((after.mean(0) - before.mean(0)).norm() / norms.square().mean().sqrt()).item(),
    }
