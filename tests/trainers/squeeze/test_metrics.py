"""The metrics against numbers worked out by hand, and against the full softmax."""

import math

import pytest
import torch

from hf_iclr.trainers.squeeze.argmax import ArgmaxLogProbs
from hf_iclr.trainers.squeeze.metrics import (
    NUM_SUMS,
    TOKEN_METRICS,
    batch_sums,
    metrics_from_sums,
    squeeze_pressure,
    token_quantities,
)
from tests.trainers.squeeze.pairs_and_logs import fused_outputs


# Two pairs of length 5: answers of 3, 1 (chosen) and 2, 4 (rejected) tokens over a vocabulary of 7.
LABELS = torch.tensor(
    [[-100, -100, 3, 1, 6], [-100, 2, -100, -100, -100], [-100, -100, 5, 5, -100], [-100, 0, 1, 2, 3]]
)


def random_outputs(spread=3.0):
    logits = spread * torch.randn(*LABELS.shape, 7)
    return logits, fused_outputs(logits, LABELS)


def quantities_of(logits, labels):
    outputs = fused_outputs(logits, labels)
    values = token_quantities(
        outputs.log_probs, outputs.entropy, outputs.log_sum_sq_probs, outputs.is_top1, logits.size(-1)
    )
    return dict(zip(TOKEN_METRICS, values, strict=True))


def test_token_quantities_by_hand():
    """π = (.5, .3, .2), y the second: s = .25 + .09 + .04 = .38 and V = 3."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(1, 2, 3)
    values = {name: value.item() for name, value in quantities_of(logits, torch.tensor([[-100, 1]])).items()}
    expected = {
        "logp_tok": math.log(0.3),
        "entropy": 0.5 * math.log(2) - 0.3 * math.log(0.3) + 0.2 * math.log(5),
        "renyi2": -math.log(0.38),
        "top1_rate": 0.0,
        "A_norm": math.sqrt(3 - 2 + 3 * 0.38),
        "G_norm": math.sqrt(0.38 - 0.6 + 1),
        "energy": 0.7,
        "pressure": 0.08,
        "valley_frac": 1.0,
    }
    assert values == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_token_quantities_are_the_norms_of_the_matrices(spread):
    """A = I - 1πᵀ and G = π - e_y of proposition 1, written out."""
    logits = spread * torch.randn(8, 6, 20, dtype=torch.float64)
    labels = torch.randint(20, (8, 6))
    values = quantities_of(logits, labels)
    probs, targets = logits[:, :-1].softmax(-1), labels[:, 1:]
    one_hot = torch.nn.functional.one_hot(targets, 20)
    matrix = torch.eye(20) - probs[..., None, :].expand(8, 5, 20, 20)
    torch.testing.assert_close(values["A_norm"], matrix.norm(dim=(-2, -1)).float())
    squares = (probs - one_hot).square().sum(-1).float()
    torch.testing.assert_close(values["G_norm"].square(), squares, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(values["energy"], (one_hot * (1 - probs)).sum(-1).float())
    pressure = (probs.square().sum(-1) - (probs * one_hot).sum(-1)).float()
    torch.testing.assert_close(values["pressure"], pressure, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(values["renyi2"], -probs.square().sum(-1).log().float(), atol=1e-6, rtol=1e-5)


def test_tokens_below_the_pressure_lose_mass():
    """A small step of gradient ascent on -log π(y): z' = z + h (π - e_y), and the losers are those with π < S."""
    logits, step = 3 * torch.randn(200, 50, dtype=torch.float64), 1e-5
    targets = torch.randint(50, (200, 1))
    log_p = logits.log_softmax(-1)
    one_hot = torch.zeros_like(log_p).scatter_(1, targets, 1)
    change = (logits + step * (log_p.exp() - one_hot)).log_softmax(-1) - log_p
    pressure = squeeze_pressure(log_p.gather(1, targets), (2 * log_p).logsumexp(-1, keepdim=True))
    others = (one_hot == 0) & ((log_p.exp() - pressure).abs() > 1e-4)  # off the bar, where second order decides
    assert torch.equal((change < 0)[others], (log_p.exp() < pressure)[others])
    torch.testing.assert_close(change[others], (step * (log_p.exp() - pressure))[others], rtol=0, atol=step**2)


def test_own_samples_are_under_no_pressure():
    """Σ_y π(y) S(y) = s - Σ_y π(y)² = 0."""
    log_p = torch.randn(50, 30, dtype=torch.float64).log_softmax(-1)
    pressure = squeeze_pressure(log_p, (2 * log_p).logsumexp(-1, keepdim=True))
    torch.testing.assert_close((log_p.exp() * pressure).sum(-1), torch.zeros(50, dtype=torch.float64))


def test_batch_against_the_full_softmax():
    logits, outputs = random_outputs()
    gradients = torch.rand(4, 4)
    argmax = ArgmaxLogProbs(*torch.rand(3, 4, 4))
    reference = outputs.log_probs.sum(1) + torch.tensor([1.0, -1.0, 1.0, 1.0])
    metrics = metrics_from_sums(batch_sums(outputs, LABELS, 7, gradients, reference, argmax))
    probs = logits[:, :-1].softmax(-1)
    own = {side: [] for side in ("chosen", "rejected")}
    force = 0.0
    for row in range(4):
        for position in range(4):
            token = LABELS[row, position + 1].item()
            if token == -100:
                continue
            pi = probs[row, position]
            pressure = (pi.square().sum() - pi[token]).item()
            own["chosen" if row < 2 else "rejected"].append(
                (pi[token].log().item(), pressure, argmax.rest_logmass[row, position].item())
            )
            force += (row >= 2) * gradients[row, position].item() * max(pressure, 0)
    for side, tokens in own.items():
        assert metrics[f"squeeze/logp_tok_{side}"] == pytest.approx(sum(t[0] for t in tokens) / len(tokens), rel=1e-5)
        assert metrics[f"squeeze/rest_logmass_{side}"] == pytest.approx(sum(t[2] for t in tokens) / len(tokens))
    rejected = [token[1] for token in own["rejected"]]
    assert metrics["squeeze/pressure_rejected"] == pytest.approx(sum(rejected) / 6, abs=1e-6)
    assert metrics["squeeze/valley_frac"] == pytest.approx(sum(value > 0 for value in rejected) / 6)
    assert metrics["squeeze/force"] == pytest.approx(force, rel=1e-4)  # two pairs: 2 / 2
    down = {name: metrics[f"squeeze/{name}_down"] for name in ("chosen", "rejected", "both")}
    assert down == {"chosen": 0.5, "rejected": 1.0, "both": 0.5}
    assert "squeeze/pressure_chosen" not in metrics


def test_force_of_sigmoid_dpo_by_hand():
    """One rejected token with π = (.5, .3, .2) and y the third: S = .38 - .2 = .18. The margin is 0, β = .1, so
    ∂L/∂log π(y⁻) = β (1 - σ(0)) = .05 and the force is .05 · .18 = .009."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(2, 2, 3)
    labels = torch.tensor([[-100, 0], [-100, 2]])
    outputs = fused_outputs(logits, labels)
    log_probs = outputs.log_probs.requires_grad_()
    chosen, rejected = log_probs.sum(1)
    margin = (chosen - rejected) - (chosen - rejected).detach()
    (gradients,) = torch.autograd.grad(-torch.nn.functional.logsigmoid(0.1 * margin), log_probs)
    metrics = metrics_from_sums(batch_sums(outputs, labels, 3, gradients))
    assert metrics["squeeze/force"] == pytest.approx(0.009, rel=1e-5)
    assert not any("argmax" in name or "down" in name for name in metrics)  # neither was measured


def test_batches_add_up_and_repeated_pairs_do_not_count():
    _, outputs = random_outputs()
    gradients, reference = torch.rand(4, 4), torch.randn(4)
    whole = batch_sums(outputs, LABELS, 7, gradients, reference)
    parts = torch.zeros(NUM_SUMS)
    for pair in (torch.tensor([0, 2]), torch.tensor([1, 3])):
        part = type(outputs)(**{name: field[pair] for name, field in outputs.items()})
        # the mean loss of one pair has twice the gradient of the mean over two
        parts += batch_sums(part, LABELS[pair], 7, 2 * gradients[pair], reference[pair])
    torch.testing.assert_close(parts, whole)
    first = torch.tensor([0, 2])
    alone = type(outputs)(**{name: field[first] for name, field in outputs.items()})
    torch.testing.assert_close(
        batch_sums(outputs, LABELS, 7, gradients, reference, num_rows=1),
        batch_sums(alone, LABELS[first], 7, 2 * gradients[first], reference[first]),
    )
    assert torch.equal(batch_sums(outputs, LABELS, 7, gradients, reference, num_rows=0), torch.zeros(NUM_SUMS))


def test_virtual_tokens_in_front_are_left_out():
    _, outputs = random_outputs()
    longer = {name: torch.cat([torch.ones_like(field[:, :3]), field], dim=1) for name, field in outputs.items()}
    torch.testing.assert_close(
        batch_sums(type(outputs)(**longer), LABELS, 7), batch_sums(outputs, LABELS, 7), rtol=0, atol=0
    )


def test_not_finite_and_empty_are_errors():
    _, outputs = random_outputs()
    outputs.log_probs[2, 1] = math.nan
    with pytest.raises(ValueError, match="log-probabilities of the rejected answers should be finite.*nan"):
        metrics_from_sums(batch_sums(outputs, LABELS, 7))
    labels = LABELS.clone()
    labels[1] = -100
    with pytest.raises(ValueError, match="1 of 4 chosen and rejected answers have not a single token"):
        metrics_from_sums(batch_sums(random_outputs()[1], labels, 7))
