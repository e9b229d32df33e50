"""Pivoted factors: a low-rank weight in r (m + n) - r^2 numbers without loss (PIFA, arXiv 2501.19090).

    A B = P^T [I; C] (A_p B),   A_p = r pivot rows of A,   C = A_rest A_p^-1

The r x r identity need not be stored, so that any rank below the full one saves something. All depends on the
choice of the rows: an error in a basis row reaches the other rows through C. LU with partial pivoting gives a
first choice, and then the largest coefficient above a bound is swapped into the basis until none is left
(maxvol; Goreinov, Tyrtyshnikov, Zamarashkin 1997). Each swap multiplies the volume of the basis by that
coefficient, so it ends; with `|C| <= 1.1`, `||[I; C]||_2` is at most `sqrt(1 + 1.21 r (m - r))`, and far
less in practice.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2, sqrt
from typing import Any

import torch
from torch import Tensor

from lmpress.forms import Dense, LowRank, Pivoted
from lmpress.methods.checks import check_finite
from lmpress.methods.result import Rewritten


@dataclass(frozen=True)
class PivotOptions:
    """Options of `pivot`.

    Attributes:
        largest_coefficient: rows are swapped until no |C_ij| is above this; > 1.
        largest_error: refuse where the pivoted product, as stored, is off by more than this, relative to
            its norm and beyond what rounding to the stored dtype costs the factors themselves.
        safe_bits: above this loss of precision, the report calls quantization unsafe.
    """

    largest_coefficient: float = 1.1
    largest_error: float = 1e-2
    safe_bits: float = 2.0

    def __post_init__(self) -> None:
        if self.largest_coefficient <= 1 or self.largest_error <= 0:
            raise ValueError("the largest coefficient is above 1, and the largest error above 0")


def pivot(low_rank: LowRank, options: PivotOptions | None = None) -> Rewritten:
    """Turn `low_rank` into `Pivoted`, the same matrix in fewer numbers.

    Args:
        low_rank: factors (m, r) and (r, n), r <= m. Quantized factors come out in floating point: pivot
            first, quantize afterwards.

    Returns:
        `Pivoted(Dense (r, n), Dense (m - r, r))` in the dtype of the left factor, or `low_rank` itself where
        pivoting is not safe, with the `reason`. The report has `rank`, `largest_coefficient`, `swaps`,
        `error` (relative, of the stored form in float64), `bits_lost` (of the basis when it is quantized:
        half the binary logarithm of how much more the outputs move than those of a dense weight with the
        same error in each entry), and `quantization_safe`.
    """
    options = options or PivotOptions()
    left, right = low_rank.left.dense(torch.float64), low_rank.right.dense(torch.float64)
    m, rank = left.shape
    check_finite({"left factor": left, "right factor": right})
    report: dict[str, Any] = {"rank": rank, "reason": None}
    if rank > m:
        return Rewritten(low_rank, report | {"reason": f"rank {rank} is above the {m} rows"})
    chosen, coefficients, swaps = pivot_rows(left, options.largest_coefficient)
    if coefficients is None:
        return Rewritten(low_rank, report | {"reason": "the left factor has not its full rank"})
    plain = low_rank.left.plain
    dtype = torch.float32 if plain is None else plain.dtype
    basis = left[chosen] @ right
    form = Pivoted.from_parts(Dense(basis.to(dtype)), Dense(coefficients.to(dtype)), chosen)
    exact = left @ right
    norm = float(exact.norm())
    error = float((form.dense(torch.float64) - exact).norm()) / norm if norm else 0.0
    gain = (rank + float(coefficients.square().sum())) / m if m else 1.0
    bits_lost = max(0.0, log2(gain) / 2) if gain > 0 else 0.0
    report |= {
        "largest_coefficient": float(coefficients.abs().max()) if coefficients.numel() else 0.0,
        "swaps": swaps,
        "error": error,
        "bits_lost": bits_lost,
        "quantization_safe": bits_lost <= options.safe_bits,
    }
    if not error <= options.largest_error:
        return Rewritten(low_rank, report | {"reason": f"the pivoted product would be off by {error:.1e}"})
    return Rewritten(form, report)


def pivot_rows(left: Tensor, largest: float) -> tuple[Tensor, Tensor | None, int]:
    """Rows of `left` (m, r) that span it well.

    Returns:
        The chosen rows as a bool mask (m,); C (m - r, r) with `left[~chosen] = C left[chosen]`, or None where
        `left` is numerically rank-deficient; and the number of swaps.
    """
    m, rank = left.shape
    basis, triangle = torch.linalg.qr(left)  # C is the same for any basis of the columns
    pivots = triangle.diagonal().abs()
    chosen = torch.zeros(m, dtype=torch.bool, device=left.device)
    smallest = float(pivots.min()) if rank else 1.0
    if not smallest > m * torch.finfo(left.dtype).eps * float(pivots.max() if rank else 1.0):
        return chosen, None, 0
    permutation, _, _ = torch.linalg.lu(basis)
    order = permutation.argmax(0)  # row order[i] of `left` is the i-th of P^T left
    inside, outside = order[:rank].clone(), order[rank:].clone()
    coefficients = torch.linalg.solve(basis[inside], basis[outside], left=False)  # (m - r, r)
    swaps = 0
    while coefficients.numel() and swaps < 10 * m:
        flat = int(coefficients.abs().argmax())
        i, j = divmod(flat, rank)
        value = coefficients[i, j]
        if float(value.abs()) <= largest:
            break
        row, column = coefficients[i].clone(), coefficients[:, j].clone()
        column[i] += 1
        row[j] -= 1
        coefficients.addr_(column, row, alpha=-1 / float(value))
        inside[j], outside[i] = outside[i].clone(), inside[j].clone()
        swaps += 1
    chosen[inside] = True
    # in the order of the matrix, and solved for once more: swaps round
    return chosen, torch.linalg.solve(basis[chosen], basis[~chosen], left=False), swaps


def pivoted_rank(shape: tuple[int, int], keep: float) -> int:
    """The largest rank whose pivoted factors take the share `keep` of the parameters, r (m + n) - r^2 <=
    keep m n.

    >>> pivoted_rank((4096, 4096), 0.5)
    1199
    """
    m, n = shape
    root = sqrt(max(0.0, (m + n) ** 2 - 4 * keep * m * n))
    return min(int((m + n - root) / 2 + 1e-9), m, n)
