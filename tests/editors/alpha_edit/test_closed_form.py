"""The low-rank forms against the dense systems that the papers print."""

import pytest
import torch

from hf_iclr.editors.alpha_edit.closed_form import (
    EditedKeys,
    keep_relative_changes,
    low_rank_factors,
    project_out,
)


WIDTH, OUT = 24, 10


@pytest.fixture
def system():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(WIDTH, 5, dtype=torch.float64))[0]
    batches = [torch.randn(WIDTH, n, dtype=torch.float64) for n in (3, 4, 2)]
    residuals = [torch.randn(OUT, keys.shape[1], dtype=torch.float64) for keys in batches]
    return basis, batches, residuals


def null_space_factor(keys, previous, basis, l2, cholesky=None):
    edited = EditedKeys(basis, l2, cholesky)
    edited.add(previous)
    return edited.add(keys)


def dense_official(keys, cache, basis, residuals, l2):
    """[P (K K^T + C) + l2 I] X = P K R^T, the update is X^T: the reference's own dense system."""
    projector = torch.eye(WIDTH, dtype=torch.float64) - basis @ basis.T
    left = projector @ (keys @ keys.T + cache) + l2 * torch.eye(WIDTH, dtype=torch.float64)
    return torch.linalg.solve(left, projector @ keys @ residuals.T).T


@pytest.mark.parametrize("l2", [1e-2, 1.0, 10.0])
def test_sequential_batches_equal_the_dense_system(system, l2):
    basis, batches, residuals = system
    cache = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    previous = torch.zeros(WIDTH, 0, dtype=torch.float64)
    for keys, wanted in zip(batches, residuals, strict=True):
        update = wanted @ null_space_factor(keys, previous, basis, l2)
        torch.testing.assert_close(update, dense_official(keys, cache, basis, wanted, l2), rtol=1e-9, atol=1e-11)
        assert torch.linalg.matrix_rank(update) <= keys.shape[1]
        assert (update @ basis).abs().max() < 1e-12  # what is preserved does not move
        cache, previous = cache + keys @ keys.T, torch.cat([previous, keys], 1)


def test_keys_kept_from_batch_to_batch_and_forgotten_again(system):
    basis, batches, residuals = system
    edited = EditedKeys(basis, 1.0)
    everything = [*batches, torch.randn(WIDTH, 14, dtype=torch.float64), torch.randn(WIDTH, 6, dtype=torch.float64)]
    cache, caches = torch.zeros(WIDTH, WIDTH, dtype=torch.float64), []
    for keys in everything:  # the last two are more than d together
        wanted = torch.randn(OUT, keys.shape[1], dtype=torch.float64)
        torch.testing.assert_close(wanted @ edited.add(keys), dense_official(keys, cache, basis, wanted, 1.0))
        caches.append(cache)
        cache = cache + keys @ keys.T
    keys, wanted = batches[2], residuals[2]
    for count, cache in ((23, caches[4]), (7, caches[2]), (0, caches[0])):
        edited.keep_first(count)
        torch.testing.assert_close(wanted @ edited.add(keys), dense_official(keys, cache, basis, wanted, 1.0))


def test_more_keys_than_dimensions(system):
    basis, _, _ = system
    previous, keys = torch.randn(WIDTH, 60, dtype=torch.float64), torch.randn(WIDTH, 7, dtype=torch.float64)
    wanted = torch.randn(OUT, 7, dtype=torch.float64)
    update = wanted @ null_space_factor(keys, previous, basis, 0.5)
    torch.testing.assert_close(update, dense_official(keys, previous @ previous.T, basis, wanted, 0.5))


@pytest.mark.parametrize("num_previous", [0, 3, 30])
def test_keys_with_a_ridge_of_their_own(system, num_previous):
    """Weighted least squares: the update X has the least sum over keys of |r - X P k|^2 / ridge, and |X|^2."""
    basis, (_, keys, _), (_, wanted, _) = system
    previous = torch.randn(WIDTH, num_previous, dtype=torch.float64)
    weak = torch.tensor([True, False, False, True])
    edited = EditedKeys(basis, 2.0)
    edited.add(previous)
    update = wanted @ edited.add(keys, weak)
    projected = keys - basis @ (basis.T @ keys)
    ridge = torch.where(weak, 0.01 * projected.square().sum(0), 2.0)
    both = torch.cat([previous - basis @ (basis.T @ previous), projected], 1)
    weights = 1 / torch.cat([torch.full((num_previous,), 2.0), ridge])
    left = (both * weights) @ both.T + torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(update, torch.linalg.solve(left, (projected / ridge) @ wanted.T).T)


def test_nothing_preserved_is_ridge_and_all_preserved_is_no_update(system):
    _, (keys, *_), (wanted, *_) = system
    empty = keys[:, :0]
    ridge = torch.linalg.solve(keys @ keys.T + 2.0 * torch.eye(WIDTH, dtype=torch.float64), keys @ wanted.T).T
    torch.testing.assert_close(wanted @ null_space_factor(keys, empty, empty, 2.0), ridge)
    everything = torch.eye(WIDTH, dtype=torch.float64)
    assert not null_space_factor(keys, empty, everything, 2.0).any()


@pytest.mark.parametrize("num_previous", [0, 3, 30])
def test_memit_equals_its_dense_system(system, num_previous):
    _, (_, keys, _), (_, wanted, _) = system
    previous = torch.randn(WIDTH, num_previous, dtype=torch.float64)
    samples = torch.randn(WIDTH, 100, dtype=torch.float64)
    moment = samples @ samples.T / 100
    dense = torch.linalg.solve(1.5 * moment + previous @ previous.T + keys @ keys.T, keys @ wanted.T).T
    update = wanted @ null_space_factor(keys, previous, keys[:, :0], 1.0, torch.linalg.cholesky(1.5 * moment))
    torch.testing.assert_close(update, dense)


def test_a_singular_system_gets_a_sentence(system):
    basis, (keys, *_), _ = system
    twice = torch.cat([keys, keys], 1)
    with pytest.raises(ValueError, match="Raise the ridge"):
        null_space_factor(twice, twice[:, :0], basis, 0.0)
    with pytest.raises(ValueError, match="non-finite"):
        null_space_factor(keys * float("nan"), keys[:, :0], basis, 1.0)


def test_projection_is_idempotent_and_leaves_the_complement(system):
    basis, (keys, *_), _ = system
    once = project_out(keys, basis)
    torch.testing.assert_close(project_out(once, basis), once)
    assert (basis.T @ once).abs().max() < 1e-12
    torch.testing.assert_close(once + basis @ (basis.T @ keys), keys)


def test_rect_keeps_the_largest_relative_changes():
    weight = torch.tensor([[1.0, 10.0], [2.0, 0.1]])
    delta = torch.tensor([[0.5, 1.0], [0.2, 0.2]])  # relative: .5, .1, .1, 2
    assert keep_relative_changes(delta, weight, 0.5).tolist() == [[0.5, 0.0], [0.0, pytest.approx(0.2)]]


def test_factors_of_a_dense_update():
    torch.manual_seed(0)
    delta = torch.randn(OUT, 3, dtype=torch.float64) @ torch.randn(3, WIDTH, dtype=torch.float64)
    left, right = low_rank_factors(delta)
    assert right.shape == (3, WIDTH)
    torch.testing.assert_close(left @ right, delta)
    left, right = low_rank_factors(delta, rank=2)
    best = torch.linalg.svdvals(delta)[2]
    torch.testing.assert_close(torch.linalg.matrix_norm(delta - left @ right, 2), best)
