"""SVD-LLM: truncation-aware low rank, with the left factor solved for anew (arXiv 2403.07378), and ranks
for a budget.

Truncation. With H = E[x x^T], rank r loses least in `||(W - W_r) X||_F` at `W_r = U_r U_r^T W`, U_r the top
eigenvectors of `W H W^T` (see `svd`).

Update. What reaches the layer in the compressed model is x, but its output should be that of the original,
`W x_fp`. With B = `right` fixed, `min E|W x_fp - A B x|^2` has the solution

    A = W (H + a C) B^T (B H B^T)^-1,   C = E[(x_fp - x) x^T],   a in 0..1

Ranks (PGSVD, arXiv 2510.05544): over many weights, one and the same relative error `||(W - W_r) X|| / ||W
X||` everywhere, as large as the budget makes it. Or by sensitivity: keep a component while what it adds to
the loss, sensitivity * sigma^2, is worth its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmpress.forms import Dense, LowRank
from lmpress.methods.checks import check_layer
from lmpress.methods.damping import damped, damped_cholesky, singular_values
from lmpress.methods.result import Rewritten
from lmpress.methods.subspace import balanced, project_exactly
from lmpress.methods.svd import relative_error
from lmpress.statistics import InputStatistics


@dataclass(frozen=True)
class SvdLlmOptions:
    """Options of `svd_llm`.

    Attributes:
        ratio: the share of the parameters to keep, rank = floor(ratio * mn / (m + n)); unused with a `rank`.
        rank: the rank itself, as `ranks_for_budget` gives it.
        damping: added to every H_jj, relative to itself.
        update: a, how far the left factor is moved towards the output of the original, 0 to 1.
        multiple_of: align the rank, downwards.
    """

    ratio: float = 0.8
    rank: int | None = None
    damping: float = 0.01
    update: float = 0.0
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1 or self.multiple_of < 1 or (self.rank is not None and self.rank < 1):
            raise ValueError("the ratio lies in (0, 1]; rank and multiple_of are at least 1")
        if self.damping < 0 or not 0 <= self.update <= 1:
            raise ValueError("damping is at least 0, and update lies in 0..1")


def svd_llm(
    weight: Tensor,
    statistics: InputStatistics,
    options: SvdLlmOptions,
    cross: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Rewritten:
    """Factor `weight` (out, in) = (m, n) in the metric of its input.

    Args:
        weight: (m, n), floating point.
        statistics: of the input in the compressed model, with its Hessian.
        cross: C = E[(x_fp - x) x^T] (n, n) to update the left factor with; None for no update.
        row_weights: (m,) positive, what an error of each output counts: sqrt(sensitivity) where q, k and v
            are stacked, so that the large outputs of q and k do not crowd out v. None for all alike.

    Returns:
        `LowRank(Dense (m, r), Dense (r, n))` in the weight's dtype. The report has `rank`, `relative_error`
        (against the output of W on the same inputs) and, with an update, `updated`.
    """
    check_layer(weight, statistics, cross=cross, row_weights=row_weights)
    m, n = weight.shape
    rank = options.rank or int(options.ratio * m * n / (m + n)) // options.multiple_of * options.multiple_of
    rank = min(max(rank, 1), m, n)
    H = damped(statistics.require_hessian().to(weight.device), options.damping)
    W = weight.double()
    importance = torch.ones(m, 1).to(W) if row_weights is None else row_weights.to(W)[:, None]
    left, right, used = project_exactly(W * importance, H, rank)
    left, right = balanced(left, right)
    left = left / importance
    report: dict[str, Any] = {"rank": rank, "damping": options.damping + used}
    moved: Tensor | None = None
    if cross is not None:
        right = right.to(weight.dtype).double()
        moment = W @ (H + options.update * cross.to(H))  # E[y x^T], (m, n)
        factor, solved = damped_cholesky(right @ H @ right.T, 0.0)
        left = torch.cholesky_solve(right @ moment.T, factor).T
        factor, aimed = damped_cholesky(H, 0.0)
        moved = torch.cholesky_solve(moment.T, factor).T.float()
        report |= {"updated": options.update, "damping": options.damping + max(used, solved, aimed)}
    left, right = left.to(weight.dtype).contiguous(), right.to(weight.dtype).contiguous()
    report["relative_error"] = relative_error(W, left.double() @ right.double(), statistics.hessian)
    return Rewritten(LowRank(Dense(left), Dense(right)), report, moved)


def row_weights(sensitivity: Tensor) -> Tensor:
    """What an error of each output counts, (out,), from the mean squared gradients by them: their root.

    Outputs that no gradient was seen for count a little, so that no row is given up.
    """
    mean = float(sensitivity.double().mean())
    return sensitivity.clamp_min(1e-4 * mean if mean > 0 else 1.0).sqrt()


def spectrum(weight: Tensor, hessian: Tensor | None, damping: float = 0.01) -> Tensor:
    """What each component adds to `||W X||^2`, largest first: the eigenvalues of `W H W^T`.

    Args:
        weight: W (m, n).
        hessian: H (n, n), or None for the identity.

    Returns:
        (min(m, n),) float64, not negative. Rank r loses the sum of what follows the first r.
    """
    W = weight.double()
    if hessian is not None:
        W = W @ damped_cholesky(hessian.to(W.device), damping)[0]
    return singular_values(W).square()


def factor_cost(shape: tuple[int, int], rank: int, pivoted: bool = False) -> int:
    """Parameters of a weight (m, n) at a rank: the least of dense, factors, and pivoted factors if
    allowed."""
    m, n = shape
    factors = rank * (m + n) - (rank * rank if pivoted else 0)
    return min(m * n, factors)


def ranks_for_budget(
    spectra: Sequence[Tensor],
    shapes: Sequence[tuple[int, int]],
    keep: float,
    *,
    sensitivities: Sequence[float] | None = None,
    pivoted: bool = False,
    multiple_of: int = 1,
) -> list[int | None]:
    """Ranks for several weights under one budget of parameters.

    Args:
        spectra: of each weight, as `spectrum` gives them.
        shapes: (m, n) of each weight.
        keep: the share of all their parameters to keep, in (0, 1].
        sensitivities: of each weight, what a unit of its squared output error adds to the loss; None for one
            uniform relative error (PGSVD).
        pivoted: whether factors will be pivoted, at r (m + n) - r^2 parameters.
        multiple_of: align ranks, upwards.

    Returns:
        A rank for each weight, at least 1, or None where it is better left dense. The budget is kept unless
        even rank 1 everywhere is too much.

    Raises:
        ValueError: for lists of different lengths or a `keep` out of range.
    """
    if not len(spectra) == len(shapes) == len(sensitivities if sensitivities is not None else shapes):
        raise ValueError("there must be one spectrum, one shape and one sensitivity a weight")
    if not 0 < keep <= 1:
        raise ValueError(f"the share to keep lies in (0, 1], not at {keep}")
    if not spectra:
        return []
    budget = keep * sum(m * n for m, n in shapes)
    energies = [s.double().cpu() for s in spectra]

    def aligned(ranks: list[int]) -> list[int]:
        full = [min(shape) for shape in shapes]
        return [min(max(1, -(-r // multiple_of) * multiple_of), f) for r, f in zip(ranks, full, strict=True)]

    if sensitivities is None:
        tails = [torch.cat([e, e.new_zeros(1)]).flip(0).cumsum(0).flip(0) for e in energies]  # after rank r

        def at(level: float) -> list[int]:  # the relative squared error 10^level
            return aligned([int((t > 10**level * t[0]).sum()) for t in tails])
    else:
        worth = [float(s) * e / (m + n) for s, e, (m, n) in zip(sensitivities, energies, shapes, strict=True)]

        def at(level: float) -> list[int]:  # the least worth of a parameter 10^level
            return aligned([int((w > 10**level).sum()) for w in worth])

    def cost(ranks: list[int]) -> int:
        return sum(factor_cost(s, r, pivoted) for s, r in zip(shapes, ranks, strict=True))

    ranks = _largest_within(budget, at, cost)
    return [
        None if factor_cost(s, r, pivoted) >= s[0] * s[1] else r for s, r in zip(shapes, ranks, strict=True)
    ]


def _largest_within(
    budget: float, at: Callable[[float], list[int]], cost: Callable[[list[int]], int]
) -> list[int]:
    """The ranks of the lowest level that costs no more than the budget; costs fall as the level rises."""
    low, high = -40.0, 40.0
    if cost(at(low)) <= budget:
        return at(low)
    for _ in range(60):
        middle = (low + high) / 2
        if cost(at(middle)) <= budget:
            high = middle
        else:
            low = middle
    return at(high)
