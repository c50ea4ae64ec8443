"""Statistics of a safety audit: intervals, paired tests, and the depth of an alignment."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch


class Rate(NamedTuple):
    """A share `successes / n` and its Wilson interval."""

    successes: int
    n: int
    rate: float
    low: float
    high: float


class PairedChange(NamedTuple):
    """Verdicts on the same prompts before and after: pairs, those that turned false or true, and McNemar's p-value."""

    n: int
    before: float
    after: float
    lost: int
    gained: int
    p_value: float


def wilson_rate(verdicts: Sequence[bool | None], confidence: float = 0.95) -> Rate:
    """
    Share of true verdicts with its Wilson score interval.

    Args:
        verdicts (`Sequence[bool | None]`):
            `None` is a prompt that wasn't measured and doesn't count.
        confidence (`float`, *optional*, defaults to 0.95):
            Coverage of the interval.

    Returns:
        [`Rate`]; with nothing measured the rate is NaN and the interval [0, 1].
    """
    known = [bool(verdict) for verdict in verdicts if verdict is not None]
    if not known:
        return Rate(0, 0, math.nan, 0.0, 1.0)
    n, rate, z = len(known), sum(known) / len(known), NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return Rate(sum(known), n, rate, middle - half if rate else 0.0, middle + half if rate < 1 else 1.0)


def mcnemar_exact(before: Sequence[bool | None], after: Sequence[bool | None]) -> PairedChange:
    """
    Exact two-sided McNemar test: among pairs that changed, is either direction more frequent than chance?

    Args:
        before (`Sequence[bool | None]`), after (`Sequence[bool | None]`):
            Verdicts on the same prompts in the same order; a pair with a `None` doesn't count.

    Returns:
        [`PairedChange`]; p is 1 when no pair changed.

    Raises:
        ValueError: if the lengths differ.
    """
    if len(before) != len(after):
        raise ValueError(f"Expected verdicts on the same prompts, got {len(before)} and {len(after)}.")
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
    lost, gained = sum(b and not a for b, a in pairs), sum(a and not b for b, a in pairs)
    p_value = _two_sided_sign_test(min(lost, gained), lost + gained)
    shares = [
        sum(side) / len(pairs) if pairs else math.nan for side in (zip(*pairs, strict=True) if pairs else ((), ()))
    ]
    return PairedChange(len(pairs), shares[0], shares[1], lost, gained, p_value)


def _two_sided_sign_test(fewer: int, n: int) -> float:
    """Chance that of `n` fair coins one side shows `fewer` times at most, in whole numbers up to the last division."""
    term, tail = 1, 0
    for k in range(fewer + 1):
        tail += term
        term = term * (n - k) // (k + 1)  # the binomial coefficient of n and k + 1
    return min(1.0, 2 * tail / 2**n)


def token_kl(logits: torch.Tensor, reference_logits: torch.Tensor) -> torch.Tensor:
    """
    KL(model || reference) of the next-token distributions, the quantity of figure 1 of
    https://huggingface.co/papers/2406.05946.

    Args:
        logits (`torch.Tensor` of shape `(..., vocab)`), reference_logits (`torch.Tensor` of the same shape):
            Logits of both models.

    Returns:
        `torch.Tensor` of shape `(...)`, nats.
    """
    log_probs, reference = logits.float().log_softmax(-1), reference_logits.float().log_softmax(-1)
    return torch.nn.functional.kl_div(reference, log_probs, reduction="none", log_target=True).sum(-1).clamp(min=0)


def alignment_depth(kl: Sequence[float], share: float = 0.9) -> int:
    """
    d_q: how many answer tokens hold the share q of the divergence from the base model. Small is shallow.

    Args:
        kl (`Sequence[float]`):
            Mean KL at answer token 1, 2, ..., nats.
        share (`float`, *optional*, defaults to 0.9):
            q, in (0, 1].

    Returns:
        `int`: the least m with KL_1 + ... + KL_m >= q times the whole; 0 when the models don't differ.
    """
    if not 0 < share <= 1:
        raise ValueError(f"Expected a share in (0, 1], got {share!r}. For example 0.9.")
    total = np.cumsum(np.asarray(kl, dtype=float))
    if len(total) == 0 or total[-1] <= 0:
        return 0
    return int(np.searchsorted(total, share * total[-1] * (1 - 1e-12)) + 1)
