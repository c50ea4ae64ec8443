"""A gradient as Adam would use it, computed block by block."""

import pytest
import torch

from hf_iclr.trainers.data_shapley.gradients import direction as directions
from hf_iclr.trainers.data_shapley.gradients.direction import precondition, sketch, squared_norm


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("cached", [7, 2**16])
def test_a_gradient_is_divided_by_the_root_of_the_second_moment_in_whatever_blocks(cached, amsgrad, monkeypatch):
    """`g / (sqrt(v / (1 - beta2^t)) + eps)`, 0 where there has been no gradient; also of one laid out by columns."""
    monkeypatch.setattr(directions, "_CACHED", cached)
    torch.manual_seed(0)
    for shape in ((), (5,), (6, 4), (3, 2, 4)):
        weight = torch.nn.Parameter(torch.randn(shape).double())
        optimizer = torch.optim.AdamW([weight], betas=(0.9, 0.99), eps=1e-3, amsgrad=amsgrad)
        second, largest = torch.rand(shape).double(), torch.rand(shape).double()
        if second.dim():
            second[0] = largest[0] = 0
        optimizer.state[weight] = {"step": torch.tensor(4.0), "exp_avg_sq": second, "max_exp_avg_sq": largest}
        gradient = torch.randn(shape[::-1]).double().permute(tuple(reversed(range(len(shape)))))
        v = largest if amsgrad else second
        expected = torch.where(v > 0, gradient / ((v / (1 - 0.99**4)).sqrt() + 1e-3), 0.0)
        kept = second.clone()
        found = precondition(gradient, optimizer, optimizer.param_groups[0], weight)
        assert found is gradient and torch.equal(second, kept)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        assert squared_norm(found).item() == pytest.approx(expected.square().sum().item(), rel=1e-12)


def test_momentum_hands_on_a_sum_of_shares_and_plain_descent_all_of_a_gradient():
    weight = torch.nn.Parameter(torch.ones(3))
    for momentum, dampening, factor in ((0.0, 0.0, 1.0), (0.9, 0.0, 10.0), (0.8, 0.5, 2.5)):
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=momentum, dampening=dampening)
        found = precondition(torch.ones(3), optimizer, optimizer.param_groups[0], weight)
        torch.testing.assert_close(found, torch.full((3,), factor))


def test_the_left_factor_of_a_sketch_is_orthonormal_to_the_last_bits():
    """Also of a matrix whose singular values fall by eight orders of magnitude."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(rows, 40).double()).Q for rows in (60, 40))
    matrix = left @ torch.logspace(0, -8, 40).double().diag() @ right.T
    found = sketch(matrix, 12, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.left.T @ found.left, torch.eye(12).double(), rtol=0, atol=1e-13)
    start = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)).double()
    basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ start).Q).Q).Q
    torch.testing.assert_close(found.left @ found.right, basis @ basis.T @ matrix, rtol=0, atol=1e-10)
