"""Per-channel damping of an input Hessian, and factorizations that mend themselves.

Damping by a fraction of the *mean* diagonal is ruled by the few channels with massive activations: it drowns
the ordinary ones. Damping every channel by a fraction of its own diagonal entry leaves them all alike.

Every factorization that may fail goes through this file or `hessian.damped_inverse_factor`; what damping it
took comes back with it, so that reports can tell. Solvers that go column by column have the latter. It
treats degenerate Hessians in another way: inputs that are never active count as average ones, float32 is
tried before float64, and where no damping helps, the diagonal alone is taken instead of an error. One
function for both would change the numbers of one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # public, and not in its __all__

FLOOR = 1e-8
"""Added to every channel, as a fraction of the mean diagonal: it keeps dead channels invertible."""

FIRST, MOST = 1e-6, 100.0
"""Where a damping of nothing starts to grow, and where it ends."""


def growing(damping: float) -> Iterator[float]:
    """`damping`, and ten times as much from one to the next, up to `MOST`; from 0 on to `FIRST`."""
    while damping <= MOST:
        yield damping
        damping = max(10 * damping, FIRST)


def damping_terms(hessian: Tensor, damping: float) -> Tensor:
    """What damping adds to the diagonal of H (n, n): `damping * diag(H) + 1e-8 * mean(diag(H))`, (n,).

    A Hessian that is zero throughout gets ones, so that it can still be inverted.
    """
    diagonal = hessian.diagonal().double()
    mean = diagonal.mean()
    if not bool(mean > 0):
        return torch.ones_like(diagonal)
    return damping * diagonal.clamp_min(0) + FLOOR * mean


def damped(hessian: Tensor, damping: float) -> Tensor:
    """`H + diag(damping_terms(H))` in float64, a new tensor (n, n)."""
    result = hessian.to(torch.float64, copy=True)
    result.diagonal().add_(damping_terms(hessian, damping))
    return result


def damped_cholesky(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """The lower Cholesky factor of the damped Hessian, and the damping that it took.

    Args:
        hessian: (n, n), symmetric, positive semidefinite up to rounding.
        damping: the fraction of each diagonal entry to start with, >= 0; times ten until it works.

    Returns:
        (n, n) float64 lower triangular, and the fraction in the end.

    Raises:
        ValueError: if no damping up to 100 helps: the matrix is not finite or far from semidefinite.
    """
    for used in growing(damping):
        factor = _cholesky(damped(hessian, used))
        if factor is not None:
            return factor, used
    raise ValueError(
        "the Hessian cannot be factored with any damping: it is not finite or not positive semidefinite"
    )


def shifted_cholesky(matrix: Tensor, shift: float, damping: float = 0.0) -> tuple[Tensor, float]:
    """The lower Cholesky factor of `A + shift I`, damped where it must be; and the damping that it took.

    Args:
        matrix: A (n, n), symmetric; the factor has its dtype.
        damping: to start with, as of an earlier call, relative to the mean of the diagonal; times ten until
            it works.

    Raises:
        ValueError: as `damped_cholesky`.
    """
    mean = float(matrix.diagonal().mean()) if len(matrix) else 0.0
    for used in growing(damping):
        shifted = matrix.clone()
        shifted.diagonal().add_(shift + used * mean)
        factor = _cholesky(shifted)
        if factor is not None:
            return factor, used
    raise ValueError(
        "a matrix cannot be factored with any damping: it is not finite or not positive semidefinite"
    )


def _cholesky(matrix: Tensor) -> Tensor | None:
    """The lower factor; None where the matrix is not positive definite, or not finite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return None if int(failed) or not bool(torch.isfinite(factor).all()) else factor


def eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor, float]:
    """Eigenvalues (n,), the largest first, and eigenvectors (n, n) of a symmetric matrix; its damping.

    Damping by a multiple of the identity moves no eigenvector, and is taken from the eigenvalues again; but
    it can save an iteration that does not converge.

    Args:
        matrix: (n, n); only its symmetric part counts.

    Raises:
        ValueError: if no damping up to 100, relative to the mean of the diagonal, helps.
    """
    symmetric = (matrix + matrix.T) / 2
    unit = symmetric.diagonal().abs().mean() if len(symmetric) else symmetric.new_ones(())
    for used in growing(0.0):
        shifted = symmetric.clone()
        shifted.diagonal().add_(used * unit)
        try:
            values, vectors = torch.linalg.eigh(shifted)
        except LinAlgError:
            continue
        return values.flip(0) - used * unit, vectors.flip(1), used
    raise ValueError("a symmetric matrix has no eigenvectors with any damping: it is not finite")


def singular_values(matrix: Tensor) -> Tensor:
    """S (min(m, n),) of a matrix (m, n), the largest first; mended as `singular_vectors` are."""
    try:
        values: Tensor = torch.linalg.svdvals(matrix)
    except LinAlgError:
        values = singular_vectors(matrix)[1]
    return values


def singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """U (m, k), S (k,), V^T (k, n) of a matrix (m, n), k = min(m, n), the largest first; its damping.

    Where the iteration of LAPACK does not converge, they come from the eigenvectors of the smaller Gram
    matrix.

    Raises:
        ValueError: as `eigenvectors`.
    """
    try:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, values, right, 0.0
    except LinAlgError:
        pass
    if matrix.shape[0] > matrix.shape[1]:
        right, values, left, used = singular_vectors(matrix.T)
        return left.T, values, right.T, used
    _, left, used = eigenvectors(matrix @ matrix.T)
    values = (left.T @ matrix).norm(dim=1)  # S V^T by its rows
    right = torch.linalg.qr(matrix.T @ left).Q.T
    signs = (right * (left.T @ matrix)).sum(1).sign()
    return left, values, torch.where(signs[:, None] < 0, -right, right), used
