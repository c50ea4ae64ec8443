"""The loss against numbers worked out by hand, and the window against small examples."""

import math

import pytest
import torch

from hf_iclr.trainers.deep_safety.constrained_loss import (
    BEYOND_WINDOW,
    answer_positions,
    constrained_sft_loss,
    constraint_means,
    constraint_sums,
    constraint_weights,
    schedule_betas,
    window_positions,
)


def test_loss_worked_out_by_hand():
    """
    β = 2, log π = -0.5, log π_ref = -3: z = 2.5, σ(5) = 1 / (1 + e^-5) = 0.9933071, so the loss is
    3 - (log 0.9933071 + log 2) = 3 + 0.0067153 - 0.6931472 = 2.3135681. At z = 0 it is -log π; with β = 0 it is -log
    π.
    """
    logps = torch.tensor([[-0.5, -3.0, -0.5]], dtype=torch.float64)
    reference = torch.tensor([[-3.0, -3.0, -3.0]], dtype=torch.float64)
    loss = constrained_sft_loss(logps, reference, torch.tensor([[2.0, 2.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(loss, torch.tensor([[2.3135681, 3.0, 0.5]], dtype=torch.float64), atol=1e-7, rtol=0)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_gradient_is_that_of_equation_3_and_of_weighted_cross_entropy(beta):
    logps = (-3 * torch.rand(4, 7, dtype=torch.float64)).requires_grad_()
    reference, betas = -3 * torch.rand(4, 7, dtype=torch.float64), torch.full((4, 7), beta, dtype=torch.float64)
    (ours,) = torch.autograd.grad(constrained_sft_loss(logps, reference, betas).sum(), logps)
    equation_3 = -2 / betas * torch.log(1 / (1 + torch.exp(-betas * (logps - reference))))
    (papers,) = torch.autograd.grad(equation_3.sum(), logps)
    torch.testing.assert_close(ours, papers)
    torch.testing.assert_close(ours, -constraint_weights(logps.detach(), reference, betas))
    assert (ours < 0).all() and (ours > -2).all()


def test_small_beta_is_cross_entropy_and_large_beta_stops_at_the_reference():
    """For β → ∞ the gradient weight is 2 below the reference and 0 above it."""
    logps = torch.tensor([-2.0, -1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -1.5], dtype=torch.float64)
    tiny = constrained_sft_loss(logps, reference, torch.full((2,), 1e-6, dtype=torch.float64))
    torch.testing.assert_close(tiny, -logps, atol=1e-6, rtol=0)
    large = constrained_sft_loss(logps, reference, torch.full((2,), 200.0, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(large.sum(), logps)
    torch.testing.assert_close(gradient, torch.tensor([-2.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("beta", [1e-8, 1e-6, 1e-3, 0.1, 2.0, 1e4])
def test_the_loss_in_single_precision_is_that_in_double_precision_for_any_beta(beta):
    """2/β multiplies what rounding leaves of log σ(β z) + log 2: 0.04 nats at β = 1e-6, as the formula is written."""
    z = torch.tensor([-30.0, -3.0, -1e-3, 0.0, 1e-4, 0.5, 7.0], dtype=torch.float64)
    logps = torch.full_like(z, -31.0) + z.clamp(max=0)
    exact = -(logps - z + 2 / beta * (-torch.log1p(torch.expm1(-(beta * z).clamp(min=-700)) / 2)))
    exact = torch.where(beta * z < -700, -(logps - z + 2 / beta * (beta * z + math.log(2))), exact)
    single = constrained_sft_loss(logps.float(), (logps - z).float(), torch.full_like(z, beta).float())
    torch.testing.assert_close(single.double(), exact, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("beta", "weights"), [(1e-42, [1.0, 1.0]), (1e38, [0.0, 2.0])])
def test_the_ends_of_single_precision(beta, weights):
    """A strength that float32 can't divide by is cross-entropy; one that it can't multiply stops at the reference."""
    logps = torch.tensor([-0.5, -3.0], requires_grad=True)
    reference, betas = torch.tensor([-3.0, -0.5]), torch.full((2,), beta)
    (gradient,) = torch.autograd.grad(constrained_sft_loss(logps, reference, betas).sum(), logps)
    assert constraint_weights(logps, reference, betas).tolist() == weights == (-gradient).tolist()


def test_an_unread_reference_may_be_anything():
    logps = torch.tensor([-1.0], requires_grad=True)
    loss = constrained_sft_loss(logps, torch.tensor([math.nan]), torch.zeros(1))
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    assert loss.item() == 1.0 and gradient.item() == -1.0
    assert constraint_weights(logps, torch.tensor([math.nan]), torch.zeros(1)).item() == 1.0


def test_positions_start_again_with_every_run():
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1, 1, 0, 0]], dtype=torch.bool)
    assert answer_positions(mask).tolist() == [[0, 1, 2, 0, 0, 1, 2, 3], [1, 0, 1, 0, 1, 2, 0, 0]]


# 7 ends the thinking, 8 is a special token, 9 a blank one.
LABELS = torch.tensor([[-100, 8, 9, 1, 2, 7, 9, 3, 4, -100, 9, 5, 9, 6]])


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("completion", [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3, 4]),
        ("after_template", [0, -1, -1, 1, 2, 3, 4, 5, 6, 0, -1, 1, 2, 3]),
        ("answer", [0, -1, -1, -1, -1, -1, -1, 1, 2, 0, -1, 1, 2, 3]),
        ("thinking_and_answer", [0, -1, -1, 1, 2, -1, -1, 1, 2, 0, -1, 1, 2, 3]),
    ],
)
def test_where_the_window_starts(start, expected):
    got = window_positions(LABELS, start, frozenset({8, 9}), 7)
    assert got.tolist() == [[BEYOND_WINDOW if position == -1 else position for position in expected]]


def test_schedule_of_the_paper():
    """β = 0.5 for the first token, 2 for tokens 2 to 5, 0.1 after."""
    betas = schedule_betas(torch.tensor([0, 1, 2, 5, 6, BEYOND_WINDOW]), 0.5, 2.0, 0.1, 5)
    torch.testing.assert_close(betas, torch.tensor([0.0, 0.5, 2.0, 2.0, 0.1, 0.1]))


def test_metrics_worked_out_by_hand():
    """
    Six tokens at log π_ref = -3 and β = 2: one outside of answers, the first, two in the window of 3, one behind it,
    and one in the window whose β is 0. Weights 2 / (1 + e^(2 (log π + 3))): 1 at log π = -3, .2384058 at -2,
    1.7615942 at -4.
    """
    logps = torch.tensor([[-9.0, -2.0, -3.0, -4.0, -3.0, -1.0]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 2]])
    betas = torch.tensor([[0.0, 2.0, 2.0, 2.0, 2.0, 0.0]])
    losses, mask = torch.tensor([[0.0, 1.0, 2.0, 4.0, 8.0, 16.0]]), positions > 0
    sums = constraint_sums(logps, torch.full_like(logps, -3.0), betas, positions, losses, mask, window_tokens=3)
    expected = [31.0, 5.0, 1.0, 0.2384058, 1.0, 2.0, 2.7615942, -1.0, 1.0, 1.0, 0.0]
    assert sums.tolist() == pytest.approx(expected, abs=1e-6)
    means = constraint_means([1.0, 3.0, 6.0, 2.0, 5.0, -4.0, 0.0, 0.0, 0.0])
    assert means == {
        "constraint/weight_first": 3.0, "constraint/log_ratio_first": 6.0, "constraint/weight_initial": 2.5,
        "constraint/log_ratio_initial": -2.0,
    }  # fmt: skip
