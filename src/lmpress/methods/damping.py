"""Per-channel damping of an input Hessian, and a Cholesky factorization that mends itself.

Damping by a fraction of the *mean* diagonal is ruled by the few channels with massive activations: it drowns
the ordinary ones. Damping every channel by a fraction of its own diagonal entry leaves them all alike.

Solvers that go column by column have a factor of their own, `hessian.damped_inverse_factor`. It treats
degenerate Hessians in another way: inputs that are never active count as average ones, float32 is tried
before float64, and where no damping helps, the diagonal alone is taken instead of an error. One function for
both would change the numbers of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-8
"""Added to every channel, as a fraction of the mean diagonal: it keeps dead channels invertible."""


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
    used = damping
    while used <= 100:
        factor, info = torch.linalg.cholesky_ex(damped(hessian, used))
        if not int(info):
            return factor, used
        used = max(10 * used, 1e-6)
    raise ValueError(
        "the Hessian cannot be factored with any damping: it is not finite or not positive semidefinite"
    )
