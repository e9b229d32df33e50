"""Linear algebra that the layer-wise solvers share: the factor of the inverse Hessian, and error feedback.

The layer loss of a rewritten weight Q is `tr((W - Q) H (W - Q)^T)`, with H = E[x x^T]. Solvers that go
through the columns one by one (GPTQ, arXiv 2210.17323; SparseGPT, arXiv 2301.00774) need the upper triangular
U with `H^-1 = U^T U`: once the columns before j are fixed, `U_jj^2` is the conditional inverse-Hessian
diagonal, and an error e made in column j is best made up for by adding `-e U_jk / U_jj` to every later
column k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LARGEST_DAMPING = 10.0
"""Damping stops growing here (relative to the diagonal); beyond it the diagonal alone is taken."""


@dataclass(frozen=True)
class InverseFactor:
    """The Cholesky factor of the inverse of a damped Hessian.

    Attributes:
        upper: U (n, n), upper triangular with a positive diagonal, `U^T U = (H + damping)^-1`.
        energy: the diagonal of H, (n,), dead inputs counted as average ones.
        added: what damping added to it, (n,).
        dead: inputs that were never active (H_jj == 0), bool (n,); they count as average inputs, uncoupled.
        damping: the relative damping that worked.
        fallback: whether even the largest damping failed, so that only the diagonal of H was used.
    """

    upper: Tensor
    energy: Tensor
    added: Tensor
    dead: Tensor
    damping: float
    fallback: bool

    def report(self) -> dict[str, Any]:
        """JSON-able facts for a manifest."""
        facts: dict[str, Any] = {"damping": self.damping}
        if bool(self.dead.any()):
            facts["dead_inputs"] = int(self.dead.sum())
        if self.fallback:
            facts["fallback"] = "the Hessian could not be factored; its diagonal alone was used"
        return facts


def damped_inverse_factor(
    hessian: Tensor, damping: float = 0.01, *, per_channel: bool = False, growth: float = 10.0
) -> InverseFactor:
    """Factor `(H + damping)^-1 = U^T U`, with more damping at each failure.

    One Cholesky factorization and one triangular inverse do: with J the reversal of the order,
    `J H J = L L^T` gives `U = J L^-1 J`. Each damping is tried in float32 and then in float64.

    Args:
        hessian: H (n, n), symmetric positive semi-definite.
        damping: added to the diagonal, relative to its mean; >= 0.
        per_channel: relative to each H_jj instead of the mean.
        growth: factor of the damping after a failure (a damping of 0 becomes 1e-6).

    Raises:
        ValueError: H is not square or not finite, or an option is out of range.
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"a Hessian is square, not {tuple(hessian.shape)}")
    if damping < 0 or growth <= 1:
        raise ValueError("damping is at least 0, and grows by a factor above 1")
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the Hessian is not finite")
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not bool(dead.all()) else diagonal.new_ones(())
    diagonal = torch.where(dead, mean, diagonal)
    unit = diagonal if per_channel else mean
    while damping <= LARGEST_DAMPING:
        added = (damping * unit).expand_as(diagonal)
        for dtype in (torch.float32, torch.float64):
            if torch.finfo(dtype).bits < torch.finfo(hessian.dtype).bits:
                continue
            upper = _factor(hessian, diagonal + added, dead, dtype)
            if upper is not None:
                return InverseFactor(upper.to(hessian.dtype), diagonal, added, dead, damping, False)
        damping = max(damping * growth, 1e-6)
    nothing = torch.zeros_like(diagonal)
    return InverseFactor(torch.diag(diagonal.rsqrt()), diagonal, nothing, dead, LARGEST_DAMPING, True)


def _factor(hessian: Tensor, diagonal: Tensor, dead: Tensor, dtype: torch.dtype) -> Tensor | None:
    """U for H with another diagonal and dead inputs uncoupled; None where that is not positive definite."""
    matrix = hessian.to(dtype, copy=True)
    matrix[dead] = 0
    matrix[:, dead] = 0
    matrix.diagonal().copy_(diagonal)
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(failed):
        return None
    identity = torch.eye(len(matrix), dtype=dtype, device=matrix.device)
    upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return upper.contiguous() if bool(torch.isfinite(upper).all()) else None


def feed_back(
    columns: Tensor,
    upper: Tensor,
    snap: Callable[[int, Tensor], Tensor],
    *,
    align: int = 1,
    leaf: int = 32,
    first: int = 0,
) -> Tensor:
    """Replace the columns of a weight one by one, each error made up for by the columns not yet replaced.

    The updates are those of GPTQ, made late and in blocks: the columns are halved recursively, so almost all
    the work is in matrix products, whatever the size.

    Args:
        columns: W^T (n, m) in the order of processing; overwritten with the result.
        upper: U (n, n) with H^-1 = U^T U in the same order.
        snap: (j, column j as compensated so far (m,)) -> what column j becomes (m,).
        align: halves are cut at multiples of this, so that when a run of `align` columns starts, all of them
            hold every update so far.
        leaf: runs up to this long are updated column by column.
        first: the number of the first column, for `snap`.

    Returns:
        The errors (n, m), `(w_j - q_j) / U_jj`: the squares sum to the damped layer loss.
    """
    n = columns.shape[0]
    errors = torch.empty_like(columns)
    if n <= leaf and n <= max(align, leaf):
        for j in range(n):
            column = columns[j]
            snapped = snap(first + j, column)
            torch.div(column - snapped, upper[j, j], out=errors[j])
            columns[j] = snapped
            if j + 1 < n:
                columns[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
        return errors
    half = max(align, n // 2 // align * align) if n > align else n // 2
    options: dict[str, Any] = {"align": align, "leaf": leaf}
    errors[:half] = feed_back(columns[:half], upper[:half, :half], snap, first=first, **options)
    columns[half:].addmm_(upper[:half, half:].T, errors[:half], alpha=-1)
    errors[half:] = feed_back(columns[half:], upper[half:, half:], snap, first=first + half, **options)
    return errors


def layer_loss(difference: Tensor, hessian: Tensor) -> float:
    """`tr(D H D^T)` for D (m, n): the mean squared change of the output, summed over outputs."""
    return float(((difference @ hessian) * difference).sum(dtype=torch.float64))


def relative_loss(weight: Tensor, rewritten: Tensor, hessian: Tensor) -> float:
    """`tr((W-Q) H (W-Q)^T) / tr(W H W^T)`: the relative squared error of the layer's output."""
    weight, hessian = weight.float(), hessian.float()
    reference = layer_loss(weight, hessian)
    return layer_loss(weight - rewritten.float(), hessian) / reference if reference > 0 else 0.0
