"""Draft lengths that are chosen as tokens come quickest."""

import pytest
import torch

from hf_iclr import enable_cascade
from hf_iclr.generation.cascade_call import DraftLength
from tests.generation.toy import (
    GREEDY,
    RAGGED_PROMPTS,
    chi_square_z,
    exact_law,
    left_padded,
    perturbed_copy,
    tiny_llama,
)


TRIALS = len(DraftLength.TRIED)


@pytest.fixture
def models():
    large = tiny_llama(1)
    return large, perturbed_copy(large)


def chosen(models, costs, acceptance, rounds=60):
    """Draft lengths of the rounds after the first ones, where a draft of each round is kept with `acceptance`."""
    length, drawn = DraftLength(*models, ("test",)), torch.Generator().manual_seed(0)
    found = []
    for _ in range(rounds):
        gamma = length.next()
        found.append(gamma)
        kept = 0
        while kept < gamma and torch.rand((), generator=drawn) < acceptance:
            kept += 1
        length.record(gamma, kept, int(kept < gamma), costs(gamma))
    assert found[:TRIALS] == list(DraftLength.TRIED)
    return found[TRIALS:]


def test_drafts_that_cost_little_and_are_kept_become_long(models):
    assert set(chosen(models, lambda gamma: 1 + 0.01 * gamma, 1.0)[5:]) == {8}


def test_drafts_that_are_refused_are_given_up_and_tried_again(models):
    """32 tokens of the large model alone, two rounds of drafts, then 64."""
    found = chosen(models, lambda gamma: 1 + 0.3 * gamma, 0.0, rounds=TRIALS + 120)
    assert found[:105] == [0] * 32 + [2, 2] + [0] * 64 + [2, 2] + [0] * 5


def test_length_follows_the_costs(models):
    """At acceptance 1/2, γ drafts give 2 - 2^-γ tokens: 1.5 at cost 1.1, 1.75 at 1.2 (best), 1.94 at 1.6."""
    costs = {0: 1.0, 1: 1.1, 2: 1.2, 4: 1.6}
    found = chosen(models, lambda gamma: costs.get(gamma, 1.4), 0.5, rounds=400)
    assert sorted(found)[len(found) // 2] == 2


def test_costs_are_measured_once(models):
    first = DraftLength(*models, ("batch of one",))
    for seconds in range(TRIALS):
        first.record(first.next(), 0, 1, 10.0 - seconds)
    costs = dict(first.costs)
    assert costs == {1: 5.0 - 1 + 1 - 1, 2: 6.0, 4: 4.0, 0: 2.0} or set(costs) == {0, 1, 2, 4}
    second = DraftLength(*models, ("batch of one",))
    for _ in range(2 * TRIALS):
        second.record(second.next(), 0, 1, 99.0)
    assert second.costs == costs
    assert DraftLength(*models, ("batch of four",)).costs == {}


def test_law_with_chosen_lengths(models):
    """20,000 texts, through short and long drafts and rounds without any: their first four tokens follow the law."""
    large, small = models
    torch.manual_seed(0)
    output = enable_cascade(large, small).generate(
        **left_padded([[1, 2, 3]]),
        do_sample=True,
        top_k=0,
        num_return_sequences=20_000,
        max_new_tokens=12,
        cascade_rule="spec",
        pad_token_id=0,
    )
    law = exact_law(large, small, [1, 2, 3], "spec", 0.0, 4)
    assert abs(chi_square_z([tuple(row) for row in output[:, 3:7].tolist()], law)) < 4.5


@pytest.mark.parametrize("batch", [1, 4])
def test_default_call_chooses_and_says_so(models, batch):
    cascade, inputs = enable_cascade(*models), left_padded(RAGGED_PROMPTS[:batch])
    call = {**GREEDY, "max_new_tokens": 60}
    output = cascade.generate(**inputs, **call, cascade_rule="spec")
    assert torch.equal(output, models[0].generate(**inputs, **call))
    call_statistics = cascade.cascade_statistics.to_dict()
    assert sum(call_statistics["draft_lengths"].values()) == call_statistics["large_forwards"]
    assert set(call_statistics["round_seconds"]) == {0, 1, 2, 4}
    assert min(call_statistics["round_seconds"].values()) > 0


def test_a_seed_gives_the_same_text_again(models):
    cascade = enable_cascade(*models)
    texts = []
    for _ in range(3):
        torch.manual_seed(3)
        texts.append(
            cascade.generate(
                **left_padded(RAGGED_PROMPTS[:1]), do_sample=True, top_k=0, max_new_tokens=80, pad_token_id=0
            )
        )
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[1], texts[2])


@pytest.mark.parametrize("backend", ["batched", "assisted"])
def test_a_length_that_is_named_is_kept(models, backend):
    cascade = enable_cascade(*models)
    call = {**GREEDY, "max_new_tokens": 40, "cascade_rule": "spec", "cascade_backend": backend}
    cascade.generate(**left_padded(RAGGED_PROMPTS[:1]), **call, num_assistant_tokens=3)
    stats = cascade.cascade_statistics
    assert stats.drafted[0] >= 3 * (stats.rounds[0] - 1)
    assert stats.round_seconds == {}
    cascade = enable_cascade(*models, num_assistant_tokens=3)
    cascade.generate(**left_padded(RAGGED_PROMPTS[:1]), **call)
    assert cascade.cascade_statistics.round_seconds == {}


def test_rounds_without_drafts_follow_the_large_model(models, monkeypatch):
    """Where drafts are given up, no rule leaves a token to the small model, whose cache catches up afterwards."""
    monkeypatch.setattr(DraftLength, "TRIED", (1, 0, 0, 0, 2, 2))
    large, small = models[0], tiny_llama(2)
    cascade, inputs = enable_cascade(large, small), left_padded(RAGGED_PROMPTS)
    output = cascade.generate(**inputs, **GREEDY, cascade_rule="spec")
    assert torch.equal(output, large.generate(**inputs, **GREEDY))
    cascade.generate(**inputs, **{**GREEDY, "max_new_tokens": 8}, cascade_rule="token_v3", cascade_alpha=1.0)
    stats = cascade.cascade_statistics
    assert stats.draft_lengths[0] >= 3 and all(deferred >= 3 for deferred in stats.deferred)
