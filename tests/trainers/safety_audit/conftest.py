"""Shared by the audit's tests."""

from functools import partial

import pytest

from hf_iclr.trainers.safety_audit import run
from hf_iclr.trainers.safety_audit.attacks import rank_assisted_prefilling


@pytest.fixture
def few_candidates(monkeypatch):
    """An audit with a tenth of the forwards, most of which are those of rank-assisted prefilling."""
    few = partial(rank_assisted_prefilling, num_steps=1, num_candidates=3, lookahead=2)
    monkeypatch.setattr(run, "rank_assisted_prefilling", few)
