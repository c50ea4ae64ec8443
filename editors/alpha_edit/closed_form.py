"""Null spaces, and closed-form updates of a linear layer as factors: with residuals R an update is `R @ factor`."""

import torch
from torch.nn.functional import pad


PAPERS_THRESHOLD = 2e-2  # eigenvalues of at least this are preserved
_WEAK = 0.01  # of a key's squared norm outside of the preserved directions
_MASSIVE = 100.0  # times the median squared norm: such keys are multiplied in float64


def project_out(keys: torch.Tensor, preserved: torch.Tensor) -> torch.Tensor:
    """P K = K - U (U^T K), the part of keys of shape `(d, n)` outside of U, orthonormal columns of shape `(d, m)`."""
    return keys - preserved @ (preserved.T @ keys)


def sum_of_squares(keys: torch.Tensor) -> torch.Tensor:
    """Sum of k k^T over float32 keys of shape `(n, d)`; those much longer than usual are multiplied in float64."""
    size = keys.square().sum(1)
    massive = size > _MASSIVE * size.median()
    huge, usual = keys[massive].double(), keys[~massive]
    return (usual.T @ usual).double() + huge.T @ huge


def main_eigenvectors(moment: torch.Tensor, factor: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Eigenvalues of a symmetric matrix and its eigenvectors in columns, the largest first. With `factor`, of F F^T where
    F is eigenvectors times the roots of their eigenvalues: only these.
    """
    if factor:
        values = moment.square().sum(0)
        return values, moment / values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()
    values, vectors = torch.linalg.eigh(moment)
    return values.flip(0).clamp_min(0), vectors.flip(1)


class EditedKeys:
    """
    The update of one layer in its exact low-rank form, with the keys of earlier edits kept as the next solve needs
    them. AlphaEdit's R K^T P (Kp Kp^T P + K K^T P + l2 I)^-1 (https://huggingface.co/papers/2410.02355; it prints 1
    for what its code calls `L2`) equals `R @ factor` with

        M = [Kp | K],  factor^T = P M (M^T P M + l2 I)^-1 E,  E the columns of K in M,

    by the push-through identity. P Kp and the Cholesky factor of Kp^T P Kp + l2 I stay from batch to batch, so a batch
    costs one system of as many equations as it has keys. With more keys than d the same is solved in d dimensions.
    Each key may have a ridge of its own on that diagonal: the smaller, the closer its residual is reached.

    MEMIT's R K^T (S + Kp Kp^T + K K^T)^-1 (equation 14 of https://huggingface.co/papers/2210.07229, with previous
    keys) is the same of the keys L^-1 K, S = L L^T, with nothing preserved and l2 = 1, times L^-1.

    Args:
        preserved (`torch.Tensor` of shape `(d, m)`):
            Orthonormal directions that must not change; m may be 0, which is ridge regression.
        l2 (`float`):
            Ridge, in squared key units.
        cholesky (`torch.Tensor` of shape `(d, d)`, *optional*):
            MEMIT's lower Cholesky factor L of the weighted second moment of the preserved keys.
    """

    def __init__(self, preserved: torch.Tensor, l2: float, cholesky: torch.Tensor | None = None) -> None:
        self.preserved, self.l2, self.whitening, self._count = preserved, l2, cholesky, 0
        self._projected = preserved.new_zeros(0, len(preserved))  # (P Kp)^T, with room for more rows
        self._ridge = preserved.new_zeros(0)  # of the same rows
        self._cholesky = preserved.new_zeros(0, 0)  # of the same rows, while they are no more than d

    def add(self, keys: torch.Tensor, weak: torch.Tensor | None = None) -> torch.Tensor:
        """
        The factor, of shape `(n, d)`, of an update at new keys K of shape `(d, n)`, which then count to the earlier
        edits. `weak`, n booleans, are keys whose ridge is at most a hundredth of their squared norm outside of the
        preserved directions. Raises `ValueError` when the system is singular; the keys are not added then.
        """
        old, new = self._count, self._count + keys.shape[1]
        if new > len(self._projected):
            self._projected = pad(self._projected, (0, 0, 0, 2 * new - len(self._projected)))
            self._ridge = pad(self._ridge, (0, 2 * new - len(self._ridge)))
            room = min(2 * new, len(keys)) - len(self._cholesky)
            self._cholesky = pad(self._cholesky, (0, room, 0, room))
        if self.whitening is not None:
            keys = torch.linalg.solve_triangular(self.whitening, keys, upper=False)
        self._projected[old:new] = project_out(keys, self.preserved).T
        earlier, projected = self._projected[:old], self._projected[old:new]
        ridge = self._ridge[old:new].fill_(self.l2)
        if weak is not None:
            ridge[weak] = (_WEAK * projected[weak].square().sum(1)).clamp_max(self.l2)
        if new > len(keys):
            ridges = self._ridge[:new, None]
            weight = torch.where(ridges < self.l2, self.l2 / ridges, 1.0)
            gram = self._projected[:new].T @ (weight * self._projected[:new])
            factor = torch.cholesky_solve((weight[old:] * projected).T, _cholesky_of_ridge(gram, self.l2)).T
        else:
            triangle = self._cholesky[:old, :old]
            below = torch.linalg.solve_triangular(triangle, earlier @ projected.T, upper=False)
            corner = _cholesky_of_ridge(projected @ projected.T - below.T @ below, ridge)
            own = torch.cholesky_inverse(corner)
            factor = own @ projected - torch.linalg.solve_triangular(triangle.T, below @ own, upper=True).T @ earlier
            self._cholesky[old:new, :old], self._cholesky[old:new, old:new] = below.T, corner
        self._count = new
        if self.whitening is not None:
            factor = torch.linalg.solve_triangular(self.whitening, factor, upper=False, left=False)
        return factor

    def keep_first(self, count: int) -> None:
        """Forget all but the first `count` keys."""
        self._count = count


def null_space_rule(
    threshold: float | None, energy: float | None, rank: int | None, default: float | None = None
) -> tuple[float | None, float | None, int | None]:
    """
    The one rule for the null space that is given: the smallest eigenvalue that is preserved, the share of the sum of
    eigenvalues, or the number of directions. Where none is, it is the threshold `default`, if there is one.

    Raises:
        ValueError: when none or several are given, or one is out of range.
    """
    if (threshold, energy, rank) == (None, None, None):
        threshold = default
    rules = {"nullspace_threshold": threshold, "nullspace_energy": energy, "nullspace_rank": rank}
    given = {name: value for name, value in rules.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"Expected exactly one of {', '.join(rules)}, got {given or 'none'}.")
    (name, value), upper = next(iter(given.items())), 1.0 if energy is not None else float("inf")
    if not isinstance(value, int | float) or not 0 <= value <= upper:
        raise ValueError(f"Expected {name} between 0 and {upper:g}, got {value}.")
    return threshold, energy, rank


def count_preserved(
    values: torch.Tensor,
    threshold: float | None = None,
    energy: float | None = None,
    rank: int | None = None,
    total: float | None = None,
) -> int:
    """
    How many of the eigenvalues, the largest first, one of the three rules of [`null_space_rule`] keeps. `total`
    is the sum of all of them where `values` are only the largest.
    """
    if threshold is not None:
        return int((values >= threshold).sum())
    if energy is not None:
        least = energy * (float(values.sum()) if total is None else total) * (1 - 1e-12)
        rank = int((values.cumsum(0) < least).sum()) + 1 if energy > 0 else 0
    return min(rank or 0, len(values))


def keep_relative_changes(delta: torch.Tensor, weight: torch.Tensor, share: float = 0.4) -> torch.Tensor:
    """
    RECT (https://huggingface.co/papers/2401.04700): keep the entries of an update that change a weight most, relative
    to it, and drop the others; 40 % are kept in the paper.
    """
    change = (delta / weight).abs().nan_to_num(posinf=torch.inf)
    kept = change.flatten().topk(max(1, round(share * change.numel()))).indices
    result = torch.zeros_like(delta).flatten()
    result[kept] = delta.flatten()[kept]
    return result.view_as(delta)


def low_rank_factors(delta: torch.Tensor, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Residuals `(o, r)` and factor `(r, d)` of a dense update by its singular value decomposition, of this rank at most,
    or of all singular values that are not rounding.
    """
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    nonzero = int((values > values[0] * max(delta.shape) * torch.finfo(delta.dtype).eps).sum())
    rank = max(1, nonzero if rank is None else min(rank, nonzero))
    return left[:, :rank] * values[:rank], right[:rank]


def _cholesky_of_ridge(gram: torch.Tensor, ridge: torch.Tensor | float) -> torch.Tensor:
    gram.diagonal().add_(ridge)
    factor, info = torch.linalg.cholesky_ex(gram)
    if info.any() or not torch.isfinite(factor).all():
        raise ValueError(
            f"Expected a system of {len(gram)} equations that can be solved, got a singular or non-finite one. Raise "
            f"the ridge (`l2`, now {torch.as_tensor(ridge).max():g}), or look for two edits with the same keys and "
            "for statistics with NaN."
        )
    return factor
