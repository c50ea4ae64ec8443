"""The paper's five claims over thousands of random softmaxes, and the exact threshold of who gains and who loses."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from hf_iclr.tour.demo.squeeze_toy import plot_squeeze_panels, squeeze_panels, squeeze_step


def random_cases(count=3000, vocab=200, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        logits = rng.uniform(0.1, 6) * rng.standard_normal(vocab)
        yield logits, int(rng.integers(vocab)), float(np.exp(rng.uniform(np.log(1e-3), np.log(10))))


def test_by_hand():
    """π = (1/2, 1/4, 1/4), y = 2, h = 4 log 2: π' = (64, 16, 1) / 81, see the docstring."""
    logits = np.log([0.5, 0.25, 0.25]) + 3  # a constant changes nothing
    step = squeeze_step(logits, 2, 4 * np.log(2))
    assert step.probs == pytest.approx(np.array([64, 16, 1]) / 81)
    assert step.ratio == pytest.approx(np.array([4, 2, 1 / 8]) * 32 / 81)
    assert step.threshold == pytest.approx(np.log(81 / 32) / (4 * np.log(2)))
    assert step.first_order_threshold == pytest.approx(1 / 8)
    assert step.ratio[1] < 1 and 1 / 8 < 1 / 4 < step.threshold  # to first order it would gain


@pytest.mark.parametrize("negative", [True, False])
def test_is_the_gradient_step_of_autograd(negative):
    """Softmax regression on features φ, learning rate η: h = η ‖φ‖²."""
    rng = np.random.default_rng(0)
    features, rate = torch.from_numpy(rng.standard_normal(4)), 0.7
    weight = torch.from_numpy(rng.standard_normal((4, 30))).requires_grad_()
    (-(features @ weight).log_softmax(-1)[5]).backward()
    after = features @ (weight + (rate if negative else -rate) * weight.grad)
    step = squeeze_step((features @ weight).detach().numpy(), 5, rate * float(features @ features), negative)
    assert step.logits == pytest.approx(after.detach().numpy())
    assert step.probs == pytest.approx(softmax(step.logits), rel=1e-9)
    assert step.ratio == pytest.approx(step.probs / step.probs_before)


def test_claims_one_to_three_and_the_threshold_law():
    for logits, target, h in random_cases():
        step = squeeze_step(logits, target, h)
        others = np.delete(np.arange(len(logits)), target)
        order = others[np.argsort(step.probs_before[others])]
        assert step.ratio[target] < 1  # 1: the target falls
        assert step.ratio[order[-1]] > 1  # 2: the most likely other token gains
        assert (np.diff(step.ratio[order]) >= 0).all()  # 3: the rich get richer
        assert ((step.ratio[others] > 1) == (step.probs_before[others] > step.threshold)).all()
        # and the other way round for a positive gradient
        up = squeeze_step(logits, target, h, negative=False)
        assert up.ratio[target] > 1
        assert ((up.ratio[others] > 1) == (up.probs_before[others] < up.threshold)).all()


def test_claim_four_peakier_squeezes_harder():
    """The same logits sharpened, the target the same token of middling rank: more tokens lose, and they lose more."""
    for logits, _, h in random_cases(300):
        target = int(np.argsort(logits)[len(logits) // 2])
        steps = [squeeze_step(sharpness * logits / logits.std(), target, h) for sharpness in (0.1, 1, 3, 6)]
        losing = [(step.ratio < 1).mean() for step in steps]
        assert losing == sorted(losing) and losing[-1] > losing[0]
        medians = [np.median(step.ratio) for step in steps]
        assert medians == sorted(medians, reverse=True)


def test_claim_five_a_valley_squeezes_harder():
    """The other probabilities in fixed proportions, the target ever less likely: τ and the gain of the peak rise."""
    for logits, target, h in random_cases(300):
        others = np.delete(np.arange(len(logits)), target)
        rest = softmax(logits[others])
        steps = []
        for probability in (0.3, 0.1, 0.01, 1e-4):
            probs = np.insert((1 - probability) * rest, target, probability)
            steps.append(squeeze_step(np.log(probs), target, h))
        thresholds = [step.threshold for step in steps]
        assert thresholds == sorted(thresholds)
        losing = [(step.ratio[others] < 1).sum() for step in steps]
        assert losing == sorted(losing)


def test_threshold_tends_to_its_first_order():
    for logits, target, _ in random_cases(200):
        errors = []
        for h in (1e-2, 1e-3, 1e-4):
            step = squeeze_step(logits, target, h)
            errors.append(abs(step.threshold - step.first_order_threshold))
        assert errors[0] < 1e-2 and errors[1] < errors[0] / 9 and errors[2] < errors[1] / 9


def test_huge_steps_stay_finite():
    step = squeeze_step(np.array([50.0, 0.0, -50.0]), 2, 1e4)
    assert np.isfinite(step.ratio).all() and step.probs.sum() == pytest.approx(1)


def test_panels():
    panels = {panel.title[0]: panel for panel in squeeze_panels()}
    assert list(panels) == list("ABCDE")
    share = {
        name: (np.delete(panel.step.ratio, panel.target) < 1).mean() for name, panel in panels.items()
    }  # of the others that lose
    assert panels["A"].step.ratio[panels["A"].target] > 1
    assert share["B"] < 0.1 and share["C"] < 0.1  # benign: flat, or on the peak
    assert share["D"] > 0.8 and share["E"] > 0.9  # squeezed: in a valley
    valley = panels["D"]
    third = np.delete(valley.with_chosen / valley.step.probs_before, [valley.target, valley.chosen])
    assert np.ptp(third) < 1e-12  # the two gradients of one context cancel
    figure = plot_squeeze_panels()
    assert len(figure.axes) == 5 and "49 others lose" in figure.axes[3].get_title()


@pytest.mark.parametrize(
    ("logits", "target", "step_size", "message"),
    [
        ([0.0, np.nan], 0, 1, "logits must be a vector of at least two finite numbers"),
        ([[0.0, 1.0]], 0, 1, "logits must be a vector"),
        ([0.0, 1.0], 2, 1, "target must be in 0 .. 1, got 2"),
        ([0.0, 1.0], 0, 0, "step_size must be positive, got 0"),
        ([0.0, 1.0], 0, np.nan, "step_size must be positive, got nan"),
    ],
)
def test_bad_input(logits, target, step_size, message):
    with pytest.raises(ValueError, match=message):
        squeeze_step(logits, target, step_size)
