"""Draft lengths that are chosen as tokens come quickest."""

import time

import pytest
import torch

from hf_iclr import enable_cascade
from hf_iclr.generation import batched_cascade
from hf_iclr.generation.proposals import DraftLength, Plan, RoundCosts, measure_rounds
from tests.generation.toy import (
    GREEDY,
    RAGGED_PROMPTS,
    chi_square_z,
    exact_law,
    left_padded,
    perturbed_copy,
    tiny_llama,
)


@pytest.fixture
def models():
    large = tiny_llama(1)
    return large, perturbed_copy(large)


def chosen(models, costs, acceptance, rounds=60):
    """Draft lengths of rounds where each draft is kept with probability `acceptance`."""
    length, drawn = (
        DraftLength(*models, ("test",), lambda: RoundCosts(costs, 1.0, 0.0)),
        torch.Generator().manual_seed(0),
    )
    found = []
    for _ in range(rounds):
        plan = length.next()
        gamma = plan.gamma
        assert plan.siblings == 0  # at the cost of a round each
        found.append(gamma)
        kept = 0
        while kept < gamma and torch.rand((), generator=drawn) < acceptance:
            kept += 1
        if gamma:
            length.record(plan, [0], [kept], [kept], [int(kept == gamma)])
    return found


def test_drafts_that_cost_little_and_are_kept_become_long(models):
    assert set(chosen(models, {0: 1, 1: 1.01, 2: 1.02, 4: 1.04}, 1.0)[5:]) == {16}


def test_drafts_that_are_refused_are_given_up_and_tried_again(models):
    """
    Two refused rounds move the acceptance from 3/5 to (4 0.6 0.95²) / (4 0.95² + 1.95) < 0.5, where a draft at cost
    1.5 gives less than 1.5 tokens. Then 32 tokens of the large model alone, a round of drafts, and 64.
    """
    found = chosen(models, {0: 1.0, 1: 1.5, 2: 2.0, 4: 3.0}, 0.0, rounds=120)
    first = found.index(0)
    assert 0 < first <= 3
    assert found[first : first + 32] == [0] * 32 and found[first + 32] > 0
    assert found[first + 33 :].count(0) >= 64


def test_drafts_that_never_pay_are_never_made(models):
    """At an acceptance of 0.95 four drafts give 4.5 tokens; a round of them costs 5."""
    found = chosen(models, {0: 1.0, 1: 2.0, 2: 3.0, 4: 5.0}, 1.0, rounds=500)
    assert found[0] == 4 and set(found[1:]) == {0}  # with the prompt, which is read anyway, drafts are nearly free


@pytest.mark.parametrize("cost, length", [(1.94, 0), (1.86, 1)])
def test_drafts_must_promise_a_gain_that_timings_can_tell(models, cost, length):
    """All that are drafted are kept: one draft is 3 % quicker than none at a cost of 1.94, and 7 % at 1.86."""
    models[1].config.expected_acceptance = 1 / 0.6
    assert set(chosen(models, {0: 1.0, 1: cost, 2: 3.0, 4: 5.0}, 1.0)[1:]) == {length}


def test_one_row_of_eight_that_copies_is_no_reason_to_draft(models):
    """One row gets 3.4 tokens a round at 1.6 of the cost; seven others go on as before, and a call waits for them."""
    for others, copies in ((0, True), (7, False)):
        length = DraftLength(*models, (others,), lambda: RoundCosts({0: 1.0, 1: 1.3, 4: 1.6}, 1.0, 0.0))
        length._small = False
        length.next([8] + [0] * others)
        assert (length.next([8] + [0] * others).gamma > 0) == copies


def test_length_follows_the_costs(models):
    """At acceptance 1/2, γ drafts give 2 - 2^-γ tokens: 1.5 at cost 1.1, 1.75 at 1.2 (best), 1.94 at 1.6."""
    found = chosen(models, {0: 1.0, 1: 1.1, 2: 1.2, 4: 1.6}, 0.5, rounds=400)
    assert sorted(found)[len(found) // 2] == 2


def test_a_draft_says_what_acceptance_to_expect(models):
    costs = {0: 1.0, 1: 1.5, 2: 2.0, 4: 3.0}
    for expected, drafts in ((1.0, True), (0.2, False)):
        models[1].config.expected_acceptance = expected
        length = DraftLength(*models, ("test",), lambda: RoundCosts(costs, 1.0, 0.0))
        assert length.next() == Plan(4)  # the prompt's round
        assert (length.next().gamma > 0) == drafts


def test_costs_are_measured_once(models):
    calls = []

    def measure():
        calls.append(1)
        return RoundCosts({0: 1.0, 1: 1.1, 2: 1.2, 4: 1.4}, 0.1, 0.0)

    for kind in ("one row", "one row", "four rows"):
        length = DraftLength(*models, (kind,), measure)
        made = len(calls)
        length.next()
        assert len(calls) == made  # a call that ends in its first round pays nothing
        length.next()
    assert len(calls) == 2


def test_costs_are_those_of_a_machine_that_is_not_busy(models, monkeypatch):
    """
    On a clock that forwards alone move: a draft takes 1 ms, verifying one token 10 ms, several 12. Something else runs
    in the first two rounds without drafts, for 50 and 80 ms: the others would seem to take less.
    """
    small = models[1]
    now, forwards = [0.0], [-99]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def tick(module, _, kwargs, __):
        forwards[0] += module is not small
        busy = {2: 0.05, 6: 0.08}.get(forwards[0], 0.0) if module is not small else 0.0  # the first reads the text
        now[0] += busy + (0.001 if module is small else 0.010 if kwargs["input_ids"].shape[1] == 1 else 0.012)

    def measure(*args):
        forwards[0] = 0
        return measure_rounds(*args)

    monkeypatch.setattr(batched_cascade, "measure_rounds", measure)
    cascade = enable_cascade(*models)
    for model in (cascade, small):
        model.register_forward_hook(tick, with_kwargs=True)
    cascade.generate(torch.tensor([[1, 2, 3]]), do_sample=True, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    assert forwards[0] >= 1 + 3 * 4
    costs = cascade.cascade_statistics.round_seconds
    assert [costs[0], costs[4]] == pytest.approx([0.010, 0.016], abs=1e-9)
    assert costs[1] == pytest.approx(0.013, abs=1e-9)


def test_measuring_uses_up_no_random_number(models):
    cascade, inputs = enable_cascade(*models), left_padded(RAGGED_PROMPTS[:2])
    torch.manual_seed(0)
    cascade.generate(**inputs, do_sample=True, max_new_tokens=12, pad_token_id=0, cascade_rule="spec")
    after = torch.rand(1)
    torch.manual_seed(0)
    cascade.generate(**inputs, do_sample=True, max_new_tokens=12, pad_token_id=0, cascade_rule="spec")
    assert torch.equal(after, torch.rand(1))


def test_law_with_chosen_lengths(models, monkeypatch):
    """20,000 texts: the first four tokens follow the law, whatever lengths and siblings are chosen."""
    costs = RoundCosts({0: 1.0, 1: 1.2, 2: 1.5, 4: 2.2}, 0.05, 0.0)
    monkeypatch.setattr(batched_cascade, "measure_rounds", lambda *_: costs)
    large, small = models
    torch.manual_seed(0)
    output = enable_cascade(large, small).generate(
        **left_padded([[1, 2, 3]]),
        do_sample=True,
        top_k=0,
        num_return_sequences=20_000,
        max_new_tokens=6,
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
    assert set(call_statistics["round_seconds"]) == {0, 1, 4}
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


def test_rounds_without_drafts_keep_to_the_rule(models, monkeypatch):
    """Plain speculative decoding is the large model throughout, alpha = 1 the small one, also without drafts."""
    lengths = [1, 0, 0, 0, 2, 2] + [1] * 20
    monkeypatch.setattr(DraftLength, "next", lambda self, *_: Plan(lengths[next(self.asked)]))
    monkeypatch.setattr(DraftLength, "_forget", lambda self, weight: setattr(self, "asked", iter(range(99))))
    monkeypatch.setattr(DraftLength, "record", lambda *_: None)
    large, small = models[0], tiny_llama(2)
    cascade, inputs = enable_cascade(large, small), left_padded(RAGGED_PROMPTS)
    for rule, model in (("spec", large), ("token_v3", small)):
        output = cascade.generate(**inputs, **GREEDY, cascade_rule=rule, cascade_alpha=1.0)
        assert torch.equal(output, model.generate(**inputs, **GREEDY))
        assert cascade.cascade_statistics.draft_lengths[0] >= 3


def test_draft_reads_what_it_missed(models, monkeypatch):
    """After rounds without drafts, q is still the small model's own: a copy of the large model accepts everything."""
    lengths = [1, 0, 0, 0, 2, 2, 0, 0] + [3] * 20
    monkeypatch.setattr(DraftLength, "next", lambda self, *_: Plan(lengths[next(self.asked)]))
    monkeypatch.setattr(DraftLength, "_forget", lambda self, weight: setattr(self, "asked", iter(range(99))))
    monkeypatch.setattr(DraftLength, "record", lambda *_: None)
    cascade = enable_cascade(models[0], models[0])
    cascade.generate(**left_padded(RAGGED_PROMPTS), **{**GREEDY, "max_new_tokens": 40}, cascade_rule="spec")
    stats = cascade.cascade_statistics
    assert stats.accepted == stats.drafted and sum(stats.drafted) > 40
