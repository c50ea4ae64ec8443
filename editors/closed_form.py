"""Closed-form updates of a linear layer, each as a factor: with residuals R the update is `R @ factor`."""

import torch


def project_out(keys: torch.Tensor, preserved: torch.Tensor) -> torch.Tensor:
    """
    P K = K - U (U^T K), the part of the keys that is orthogonal to the preserved directions.

    Args:
        keys (`torch.Tensor` of shape `(d, n)`):
            Inputs of the layer, one a column.
        preserved (`torch.Tensor` of shape `(d, m)`):
            Orthonormal columns U; P = I - U U^T.

    Returns:
        `torch.Tensor` of shape `(d, n)`.
    """
    return keys - preserved @ (preserved.T @ keys)


def null_space_factor(keys: torch.Tensor, previous: torch.Tensor, preserved: torch.Tensor, l2: float) -> torch.Tensor:
    """
    AlphaEdit's update in its exact low-rank form. The paper's R K^T P (Kp Kp^T P + K K^T P + l2 I)^-1
    (https://huggingface.co/papers/2410.02355; it prints 1 for what its code calls `L2`) equals `R @ factor` with

        M = [Kp | K],  factor^T = P M (M^T P M + l2 I)^-1 E,  E the columns of K in M,

    by the push-through identity: one Cholesky of as many rows as there are keys instead of d. With more keys than d
    the same is solved in d dimensions.

    Args:
        keys (`torch.Tensor` of shape `(d, n)`):
            Keys K of the new edits.
        previous (`torch.Tensor` of shape `(d, p)`):
            Keys Kp of the edits made before; p may be 0.
        preserved (`torch.Tensor` of shape `(d, m)`):
            Orthonormal directions that must not change; m may be 0, which is ridge regression.
        l2 (`float`):
            Ridge, in squared key units.

    Returns:
        `torch.Tensor` of shape `(n, d)`.

    Raises:
        ValueError: when the system is singular.
    """
    new = keys.shape[1]
    projected = project_out(torch.cat([previous, keys], 1), preserved)
    if projected.shape[1] <= projected.shape[0]:
        gram = projected.T @ projected
        columns = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)[:, -new:]  # E
        return (projected @ _solve_ridge(gram, l2, columns)).T
    return _solve_ridge(projected @ projected.T, l2, projected[:, -new:]).T


def covariance_factor(keys: torch.Tensor, previous: torch.Tensor, cholesky: torch.Tensor) -> torch.Tensor:
    """
    MEMIT's update R K^T (S + Kp Kp^T + K K^T)^-1 (equation 14 of https://huggingface.co/papers/2210.07229, with
    previous keys when p > 0) as a factor: with Y = S^-1 [Kp | K] it is the last n rows of (I + [Kp | K]^T Y)^-1 Y^T.

    Args:
        keys (`torch.Tensor` of shape `(d, n)`):
            Keys K of the new edits.
        previous (`torch.Tensor` of shape `(d, p)`):
            Keys Kp of the edits made before; p may be 0.
        cholesky (`torch.Tensor` of shape `(d, d)`):
            Lower Cholesky factor of S, the weighted second moment of the preserved keys.

    Returns:
        `torch.Tensor` of shape `(n, d)`.

    Raises:
        ValueError: when the system is singular.
    """
    both = torch.cat([previous, keys], 1)
    preconditioned = torch.cholesky_solve(both, cholesky)
    gram = both.T @ preconditioned
    return _solve_ridge((gram + gram.T) / 2, 1.0, preconditioned.T)[-keys.shape[1] :]


def cholesky_of_moment(second_moment: torch.Tensor, weight: float) -> torch.Tensor:
    """
    Lower Cholesky factor of `weight` times a second moment.

    Args:
        second_moment (`torch.Tensor` of shape `(d, d)`):
            Mean of k k^T over tokens.
        weight (`float`):
            MEMIT's lambda.

    Returns:
        `torch.Tensor` of shape `(d, d)`.

    Raises:
        ValueError: when the second moment is singular, as with fewer tokens than d.
    """
    factor, info = torch.linalg.cholesky_ex(weight * second_moment)
    if info.any():
        raise ValueError(
            "Expected a second moment of full rank for the solvers memit and memit_seq, got a singular one of "
            f"{len(second_moment)} x {len(second_moment)}. Collect statistics from more tokens: "
            "`KeyStatistics.from_dataset(..., max_tokens=...)`."
        )
    return factor


def keep_relative_changes(delta: torch.Tensor, weight: torch.Tensor, share: float = 0.4) -> torch.Tensor:
    """
    RECT (https://huggingface.co/papers/2401.04700): keep the entries of an update that change a weight most, relative
    to it, and drop the others.

    Args:
        delta (`torch.Tensor` of shape `(o, d)`):
            Update of the weight.
        weight (`torch.Tensor` of shape `(o, d)`):
            The weight before it.
        share (`float`, *optional*, defaults to 0.4):
            Share of the entries kept; 40 % in the paper.

    Returns:
        `torch.Tensor` of shape `(o, d)`.
    """
    change = (delta / weight).abs().nan_to_num(posinf=torch.inf)
    kept = change.flatten().topk(max(1, round(share * change.numel()))).indices
    result = torch.zeros_like(delta).flatten()
    result[kept] = delta.flatten()[kept]
    return result.view_as(delta)


def prune_singular_values(delta: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """
    PRUNE (https://huggingface.co/papers/2405.16821): singular values s of the update above the weight's largest, s0,
    become s0 + ln(s / s0), so that many edits cannot blow up the weight's condition number.

    Args:
        delta (`torch.Tensor` of shape `(o, d)`):
            Sum of the updates.
        weight (`torch.Tensor` of shape `(o, d)`):
            The weight before all of them.

    Returns:
        `torch.Tensor` of shape `(o, d)`.
    """
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    largest = torch.linalg.matrix_norm(weight, 2)
    values = torch.where(values > largest, largest + (values.clamp_min(largest) / largest).log(), values)
    return left * values @ right


def low_rank_factors(delta: torch.Tensor, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Factors of a dense update by its singular value decomposition.

    Args:
        delta (`torch.Tensor` of shape `(o, d)`):
            Update of a weight.
        rank (`int`, *optional*):
            Rank at most. Left out: all singular values that are not rounding.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: residuals of shape `(o, r)` and factor of shape `(r, d)`.
    """
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    nonzero = int((values > values[0] * max(delta.shape) * torch.finfo(delta.dtype).eps).sum())
    rank = max(1, nonzero if rank is None else min(rank, nonzero))
    return left[:, :rank] * values[:rank], right[:rank]


def _solve_ridge(gram: torch.Tensor, ridge: float, right: torch.Tensor) -> torch.Tensor:
    gram.diagonal().add_(ridge)
    factor, info = torch.linalg.cholesky_ex(gram)
    if info.any() or not torch.isfinite(factor).all():
        raise ValueError(
            f"Expected a system of {len(gram)} equations that can be solved, got a singular or non-finite one. Raise "
            f"the ridge (`l2`, now {ridge:g}), or look for two edits with the same keys and for statistics with NaN."
        )
    return torch.cholesky_solve(right, factor)
