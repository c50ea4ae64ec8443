"""The target distributions against numbers worked out by hand, and their limits."""

import math

import pytest
import torch

from hf_iclr import DEFERRAL_RULES, target_distribution
from hf_iclr.generation.deferral_rules import accept_drafts, cascade_target, draw_siblings, sample, total_variation


Q = torch.tensor([0.5, 0.3, 0.2])
P = torch.tensor([0.2, 0.7, 0.1])
# max q = .5, max p = .7, TV = .5 (only the second token: .7 - .3 = .4, so TV = .4)


def close(actual, expected):
    return torch.allclose(actual, torch.tensor(expected), atol=1e-6)


def test_total_variation():
    assert total_variation(P, Q).item() == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("rule", "alpha", "expected"),
    [
        ("spec", 0.0, [0.2, 0.7, 0.1]),
        # max q = .5 >= 1 - alpha from alpha = .5 on
        ("chow", 0.49, [0.2, 0.7, 0.1]),
        ("chow", 0.5, [0.5, 0.3, 0.2]),
        # H(q) = .5 ln 2 + .3 ln(1/.3) + .2 ln 5 = 1.0297 nats
        ("chow_log", 1.02, [0.2, 0.7, 0.1]),
        ("chow_log", 1.04, [0.5, 0.3, 0.2]),
        # .5 >= .7 - alpha from alpha = .2 on
        ("diff", 0.19, [0.2, 0.7, 0.1]),
        ("diff", 0.21, [0.5, 0.3, 0.2]),
        # .5 >= .7 - .4 alpha from alpha = .5 on
        ("opt", 0.49, [0.2, 0.7, 0.1]),
        ("opt", 0.51, [0.5, 0.3, 0.2]),
        # H(p) = .2 ln 5 + .7 ln(1/.7) + .1 ln 10 = .8018; 1.0297 <= .8018 + .4 alpha from alpha = .5697 on
        ("opt_log", 0.56, [0.2, 0.7, 0.1]),
        ("opt_log", 0.58, [0.5, 0.3, 0.2]),
        # q >= .7 - .2 = .5: the first token; pi = q 1[first] + .5 p
        ("token_v1", 0.2, [0.6, 0.35, 0.05]),
        # p >= .7 - .5 = .2: the first two; pi = q 1[first two] + .2 p
        ("token_v2", 0.51, [0.54, 0.44, 0.02]),
        # p >= .7 * .5 = .35: the second; pi = q 1[second] + .7 p
        ("token_v3", 0.5, [0.14, 0.79, 0.07]),
        # min(q, p / .5) = [.4, .3, .2], mass .9; t p with t = 4/7 lifts the second token to .4
        ("lossy", 0.5, [0.4, 0.4, 0.2]),
        ("ensemble", 0.25, [0.275, 0.6, 0.125]),
    ],
)
def test_by_hand(rule, alpha, expected):
    assert close(target_distribution(rule, alpha, Q, P), expected)


@pytest.mark.parametrize(
    ("rule", "alpha", "expected"),
    [
        ("spec", 0.0, 1.0),
        ("chow", 0.49, 1.0),
        ("chow", 0.5, 0.0),
        ("token_v1", 0.2, 0.5),
        ("token_v2", 0.51, 0.2),
        ("token_v3", 0.5, 0.7),
        ("lossy", 0.5, 0.1),  # 1 - Σ min(q, π) = 1 - (.4 + .3 + .2)
        ("ensemble", 0.25, 0.75),
    ],
)
def test_deferred_mass_by_hand(rule, alpha, expected):
    assert cascade_target(rule, alpha, Q, P)[1].item() == pytest.approx(expected, abs=1e-6)


def test_rules_read_unscaled_probabilities():
    """At temperature 0 q and p are one-hot while the rule still compares .5 with .7 - alpha."""
    one_hot_q, one_hot_p = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
    assert close(target_distribution("diff", 0.1, one_hot_q, one_hot_p, Q, P), [0.0, 1.0, 0.0])
    assert close(target_distribution("diff", 0.3, one_hot_q, one_hot_p, Q, P), [1.0, 0.0, 0.0])
    # greedy token_v3 is lenient acceptance: keep the draft iff p0(draft) = .2 >= (1 - alpha) .7
    assert close(target_distribution("token_v3", 0.7, one_hot_q, one_hot_p, Q, P), [0.0, 1.0, 0.0])
    assert close(target_distribution("token_v3", 0.72, one_hot_q, one_hot_p, Q, P), [1.0, 0.0, 0.0])


def random_pairs(count=500, vocab=11):
    q, p = (torch.randn(count, vocab).mul(3).softmax(-1) for _ in range(2))
    q[:3], p[:3] = torch.eye(vocab)[:3], torch.eye(vocab)[3:6]  # disjoint one-hots
    q[3], p[4] = p[3], q[4]  # equal
    return q, p


@pytest.mark.parametrize("rule", DEFERRAL_RULES)
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_is_a_distribution_between_q_and_p(rule, alpha):
    q, p = random_pairs()
    pi, deferred = cascade_target(rule, alpha, q, p)
    assert torch.allclose(pi.sum(-1), torch.ones(len(pi)), atol=1e-5)
    assert (pi >= 0).all() and (deferred > -1e-6).all() and (deferred < 1 + 1e-6).all()
    if not rule.startswith("token"):  # a token rule may move mass even where p = q
        assert (
            total_variation(pi, q) <= total_variation(p, q) + 1e-5
        ).all()  # rejects no more than speculative decoding


@pytest.mark.parametrize(
    ("rule", "large", "small"),
    [
        ("chow", -0.01, 1.0),
        ("chow_log", -0.01, math.inf),
        ("diff", -1.0, 1.0),
        ("opt", -math.inf, math.inf),
        ("opt_log", -math.inf, math.inf),
        ("token_v1", -1.0, 1.0),
        ("token_v2", -1.0, 1.0),
        ("lossy", 0.0, 1 - 1e-6),
        ("ensemble", 0.0, 1.0),
    ],
)
def test_limits(rule, large, small):
    q, p = (torch.randn(200, 11).mul(2).softmax(-1) for _ in range(2))
    assert torch.allclose(target_distribution(rule, large, q, p), p, atol=1e-5)
    assert torch.allclose(target_distribution(rule, small, q, p), q, atol=1e-4)


def test_token_v3_at_zero_keeps_the_top_token():
    """alpha = 0 is not the large model unless decoding is greedy: the drafted argmax of p stays."""
    pi = target_distribution("token_v3", 0.0, Q, P)
    assert close(pi, [0.7 * 0.2, 0.3 + 0.7 * 0.7, 0.7 * 0.1])
    assert torch.allclose(target_distribution("token_v3", 1.0, Q, P), Q)


@pytest.mark.parametrize("rule", ["chow", "diff", "opt", "token_v1", "token_v2", "token_v3", "lossy", "ensemble"])
def test_acceptance_grows_with_alpha(rule):
    q, p = random_pairs()
    acceptance = [
        torch.minimum(q, target_distribution(rule, alpha, q, p)).sum(-1).mean().item()
        for alpha in (0.0, 0.2, 0.4, 0.6, 0.8, 0.99)
    ]
    assert acceptance == sorted(acceptance)


def test_lossy_is_the_law_of_lenient_acceptance():
    """max(min(q, p/(1-α)), p/β) accepts q's tokens with probability min(1, p/((1-α) q)) at least."""
    q, p = random_pairs()
    pi = target_distribution("lossy", 0.3, q, p)
    assert (torch.minimum(q, pi) >= torch.minimum(q, p / 0.7) - 1e-6).all()


@pytest.mark.parametrize(
    ("rule", "alpha", "words"),
    [
        ("nonsense", 0.1, "Choose one of spec, chow"),
        ("chow", 1.5, r"\[-1, 1\], got 1.5"),
        ("token_v3", -0.1, r"\[0, 1\]"),
        ("lossy", 1.0, r"\[0, 1\)"),
        ("opt", float("nan"), "must be a number"),
        ("opt", "much", "must be a number"),
    ],
)
def test_bad_input_is_a_sentence(rule, alpha, words):
    with pytest.raises(ValueError, match=words):
        target_distribution(rule, alpha, Q, P)


@pytest.mark.parametrize("size", [1, 3, 255, 256, 257, 600])
def test_a_certain_token_is_drawn_from_any_vocabulary(size):
    tokens = torch.tensor([[0, size // 2], [size - 1, size // 3]])
    probs = torch.nn.functional.one_hot(tokens, size).float()
    assert torch.equal(sample(probs * 7), tokens) and torch.equal(sample(probs[0, 1]), tokens[0, 1])


def test_tokens_are_drawn_by_their_shares():
    """Shares of 1/8, 3/8 and 1/2, in two blocks of 256: 4,000 draws are within .03, four standard deviations."""
    torch.manual_seed(0)
    probs = torch.zeros(300)
    probs[[5, 255, 256]] = torch.tensor([1.0, 3.0, 4.0])
    drawn = sample(probs.expand(4000, -1))
    shares = [(drawn == token).float().mean().item() for token in (5, 255, 256)]
    assert shares == pytest.approx([0.125, 0.375, 0.5], abs=0.03)


def test_greedy_siblings_come_next_in_the_scores():
    scores = torch.tensor([[0.1, 0.5, 0.3, 0.2], [4.0, 1.0, 2.0, 3.0]])
    assert draw_siblings(scores, torch.tensor([1, 0]), 2, True).tolist() == [[2, 3], [3, 2]]
    drawn = draw_siblings(scores, torch.tensor([1, 0]), 3, False)
    assert [sorted(row) for row in drawn.tolist()] == [[0, 2, 3], [1, 2, 3]]
    assert draw_siblings(scores, torch.tensor([1, 0]), 9, True).shape == (2, 3)


def accepted(kept, lengths, siblings=None, greedy=False):
    """Rounds of three drafts, token 0 each, of a vocabulary of 4; those kept are certain in π, others impossible."""
    kept = torch.tensor(kept, dtype=torch.float32)
    pi = torch.zeros(*kept.shape, 4)
    pi[..., 0], pi[..., 2] = kept, 1 - kept
    q = torch.tensor([0.5, 0.25, 0.25, 0.0]).expand_as(pi)
    q = torch.nn.functional.one_hot(torch.zeros(kept.shape, dtype=torch.long), 4).float() if greedy else q
    siblings = torch.zeros(len(kept), 0, dtype=torch.long) if siblings is None else torch.tensor(siblings)
    drafts = torch.zeros(kept.shape, dtype=torch.long)
    return accept_drafts(drafts, siblings, pi, q, torch.tensor(lengths), greedy)


@pytest.mark.parametrize("greedy", [False, True])
def test_drafts_are_kept_up_to_the_first_that_is_refused(greedy):
    """Of rows with three drafts, with three, with one that is kept, with none."""
    found = accepted([[1, 0, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]], [3, 3, 1, 0], greedy=greedy)
    assert found.counts.tolist() == found.node.tolist() == [1, 3, 1, 0]
    assert found.bonus.tolist() == [False, True, True, True] and found.ends.tolist() == [False, True, False, False]


@pytest.mark.parametrize("greedy", [False, True])
def test_a_sibling_stands_in_for_the_first_draft(greedy):
    """Token 2 alone is left of π: the second sibling has it, or none; a row without drafts has no siblings."""
    rows = [[0, 1, 1], [0, 1, 1], [1, 1, 1], [0, 1, 1]]
    found = accepted(rows, [3, 3, 3, 0], [[1, 2], [1, 3], [1, 2], [1, 2]], greedy)
    assert found.drafts.tolist() == [[2, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert found.counts.tolist() == [1, 0, 3, 0] and found.node.tolist() == [5, 0, 3, 0]
    assert found.bonus.tolist() == [True, False, True, True] and found.ends.tolist() == [True, False, True, False]
