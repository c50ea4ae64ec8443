"""Intervals, paired tests and depths against numbers worked out by hand."""

import math

import pytest
import torch

from hf_iclr.trainers.safety_audit.statistics import (
    alignment_depth,
    mcnemar_exact,
    token_kl,
    wilson_rate,
)


def test_wilson():
    """
    Wilson, 1927: centre (p + z^2/2n) / (1 + z^2/n), half width z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n). For 8 of 10
    and z = 1.959964: centre .7166, half width .2262.
    """
    found = wilson_rate([True] * 8 + [False] * 2 + [None])
    assert (found.successes, found.n, found.rate) == (8, 10, 0.8)
    z, p, n = 1.959963984540054, 0.8, 10
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    assert found.low == pytest.approx(centre - half, abs=1e-9) == pytest.approx(0.4902, abs=1e-4)
    assert found.high == pytest.approx(centre + half, abs=1e-9) == pytest.approx(0.9433, abs=1e-4)


def test_wilson_at_the_ends():
    none, nothing = wilson_rate([False] * 20), wilson_rate([None])
    assert none.rate == 0 and none.low == 0 and none.high == pytest.approx(1.959964**2 / (20 + 1.959964**2), abs=1e-6)
    assert math.isnan(nothing.rate) and (nothing.n, nothing.low, nothing.high) == (0, 0.0, 1.0)


def test_mcnemar():
    """Five lost, one gained: p = 2 (C(6,0) + C(6,1)) / 2^6 = 14/64."""
    before = [True] * 5 + [False] + [True, False, None, True]
    after = [False] * 5 + [True] + [True, False, True, None]
    found = mcnemar_exact(before, after)
    assert (found.n, found.lost, found.gained) == (8, 5, 1)
    assert found.p_value == pytest.approx(14 / 64)
    assert (found.before, found.after) == (6 / 8, 2 / 8)


def test_mcnemar_of_no_change_and_of_nothing():
    assert mcnemar_exact([True, False], [True, False]).p_value == 1.0
    nothing = mcnemar_exact([None], [True])
    assert nothing.n == 0 and nothing.p_value == 1.0 and math.isnan(nothing.before)
    with pytest.raises(ValueError, match="same prompts, got 1 and 2"):
        mcnemar_exact([True], [True, False])


def test_token_kl():
    """KL((.5, .5) || (.9, .1)) = .5 ln(.5/.9) + .5 ln(.5/.1) = .5108 nats; the other way round .3681."""
    half, tilted = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log() + 3
    assert token_kl(half, tilted).item() == pytest.approx(0.5108, abs=1e-4)
    assert token_kl(tilted, half).item() == pytest.approx(0.3681, abs=1e-4)
    assert token_kl(half, half).item() == 0
    assert token_kl(torch.randn(2, 3, 5), torch.randn(2, 3, 5)).shape == (2, 3)


@pytest.mark.parametrize(
    ("kl", "share", "depth"),
    [
        ([9.0, 0.5, 0.5], 0.9, 1),
        ([1.0] * 10, 0.9, 9),
        ([1.0] * 10, 1.0, 10),
        ([0.0, 0.0], 0.9, 0),
        ([], 0.9, 0),
        ([0.0, 2.0], 0.5, 2),
    ],
)
def test_alignment_depth(kl, share, depth):
    assert alignment_depth(kl, share) == depth


def test_alignment_depth_bad_share():
    with pytest.raises(ValueError, match="share in"):
        alignment_depth([1.0], 1.5)
