"""The best low-rank approximation of a residual in the metric of the inputs: exact, or warm-started and
cheap.

With H = E[x x^T], `min ||(E - L) X||_F` over rank r has the solution `L = P P^T E`, P = the top r
eigenvectors of `E H E^T` (Eckart-Young on E M for any M M^T = H; as in EoRA, arXiv 2410.21271, without its
inverse). Subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4) finds P with a few
thin products, and where E moves little from one call to the next, the last P is so good a start that one
step is enough.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmpress.methods.damping import eigenvectors

OVERSAMPLING = 8
"""Directions beyond the rank: they make the wanted ones converge faster."""


def project_exactly(residual: Tensor, matrix: Tensor | None, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best factors of `residual` E in the metric of `matrix` H, in float64.

    Args:
        residual: E (m, n).
        matrix: H (n, n), positive semidefinite; None for the identity.
        rank: r, at most min(m, n).

    Returns:
        P (m, r) with orthonormal columns and P^T E (r, n), float64; and the damping that it took, 0 unless an
        eigenvalue iteration had to be mended.
    """
    E = residual.double()
    m, n = E.shape
    image = E if matrix is None else E @ matrix.double()
    if m <= n:
        _, vectors, used = eigenvectors(image @ E.T)
        basis = vectors[:, :rank]
        return basis, basis.T @ E, used
    # E H E^T P = P S has the eigenvalues of (E^T E) H; with H = M M^T, P spans E M V, V those of M^T E^T E M
    half, first = E, 0.0
    if matrix is not None:
        values, vectors, first = eigenvectors(matrix.double())
        half = E @ (vectors * values.clamp_min(0).sqrt())
    _, vectors, second = eigenvectors(half.T @ half)
    basis = torch.linalg.qr(half @ vectors[:, :rank]).Q
    return basis, basis.T @ E, max(first, second)


class Subspace:
    """Output directions of a residual that changes from call to call.

    Args:
        rows: m.
        rank: r.
        seed: of the first directions.
    """

    def __init__(self, rows: int, columns: int, rank: int, seed: int, device: torch.device) -> None:
        self.rank, self.damping = rank, 0.0  # the most that an eigenvalue iteration took
        width = min(rank + OVERSAMPLING, rows, columns)
        start = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
        self.basis = torch.linalg.qr(start.to(device)).Q  # (m, r + oversampling)

    def project(self, residual: Tensor, matrix: Tensor | None, steps: int) -> tuple[Tensor, Tensor]:
        """Nearly the best factors of `residual` E (m, n) in the metric of `matrix` (n, n) or the identity.

        Returns:
            left (m, r) with orthonormal columns, and right = left^T E (r, n).
        """
        basis = self.basis
        for _ in range(steps):
            back = residual.T @ basis  # (n, r + oversampling)
            basis = torch.linalg.qr(residual @ (back if matrix is None else matrix @ back)).Q
        right = basis.T @ residual
        inner = right @ right.T if matrix is None else right @ matrix @ right.T
        _, turn, used = eigenvectors(inner)  # the most energetic first
        self.damping = max(self.damping, used)
        self.basis = basis @ turn
        return self.basis[:, : self.rank], turn[:, : self.rank].T @ right


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, `left` (m, r) orthonormal so far, with the size of each component shared between
    both.

    `left D` and `D^-1 right` with D the fourth root of the rows' norms of `right`, and one scalar for equal
    root mean squares: what is quantized per channel then meets components of like sizes in both factors.
    """
    norms = right.norm(dim=1)
    if not norms.numel() or not bool(norms.max() > 0):
        return left.contiguous(), right.contiguous()
    scale = (norms / norms.max()).clamp_min(1e-6).pow(0.25)
    left, right = left * scale, right / scale[:, None]
    scalar = (right.square().mean().sqrt() / left.square().mean().sqrt()).sqrt()
    return (left * scalar).contiguous(), (right / scalar).contiguous()
