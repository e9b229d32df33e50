"""Low-rank factors of a weight: plain SVD, or SVD in the metric of the activations.

SVD-LLM (arXiv 2403.07378, section 3.1) and, for the plain criterion, SPQ (arXiv 2602.18420, section 3.1).
With H = E[x x^T], the best rank-r weight in the sense of the outputs solves

    min || (W - W_r) X ||_F   ->   W_r = U_r U_r^T W,   U_r = the top r eigenvectors of W H W^T

which is Eckart-Young on W L for any L L^T = H, but needs no inverse of L and takes a singular H. Its loss is
the sum of the remaining eigenvalues. A plain SVD is the same with H = I. Where the weight has more rows than
columns, the eigenvectors come from the smaller side: L^T W^T W L = V S^2 V^T, and U_r spans W L V_r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmpress.forms import Dense, LowRank
from lmpress.methods.checks import check_layer
from lmpress.methods.damping import damped, damped_cholesky, eigenvectors, singular_vectors
from lmpress.methods.result import Rewritten
from lmpress.statistics import InputStatistics


@dataclass(frozen=True)
class SvdOptions:
    """Options of `svd`; exactly one of the three criteria is set.

    Attributes:
        keep_variance: in (0, 1]: the smallest rank whose squared singular values (of the whitened weight if
            `whiten`) make up this share of their sum.
        ratio: in (0, 1]: the share of the parameters to keep, rank = floor(ratio * mn / (m + n)).
        max_error: >= 0: the smallest rank with ||(W - W_r) X|| / ||W X|| at most this; without a Hessian and
            without `whiten`, ||W - W_r|| / ||W||.
        whiten: choose the directions by the outputs on calibration text; needs the Hessian.
        multiple_of: align the rank: upwards for keep_variance and max_error, downwards for ratio.
        damping: added to every channel of H, as a fraction of its own entry, to choose the directions.
        paper: the reference implementation of SPQ to the letter: `keep_variance` goes through a clamped
            ratio and back, and ranks above 0.8 of the full one stay dense. Only with `whiten=False`.
    """

    keep_variance: float | None = None
    ratio: float | None = None
    max_error: float | None = None
    whiten: bool = True
    multiple_of: int = 1
    damping: float = 1e-2
    paper: bool = False

    def __post_init__(self) -> None:
        criteria = {"keep_variance": self.keep_variance, "ratio": self.ratio, "max_error": self.max_error}
        given = [name for name, value in criteria.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"svd takes exactly one of {', '.join(criteria)}; got {', '.join(given) or 'none'}"
            )
        for name in ("keep_variance", "ratio"):
            value = criteria[name]
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} lies in (0, 1], not at {value}")
        if self.max_error is not None and self.max_error < 0:
            raise ValueError(f"max_error is not negative: {self.max_error}")
        if self.multiple_of < 1 or self.damping < 0:
            raise ValueError("multiple_of is at least 1, and damping at least 0")
        if self.paper and (self.whiten or self.keep_variance is None or self.multiple_of != 1):
            raise ValueError("paper goes with keep_variance, whiten=False and multiple_of=1")


def svd(weight: Tensor, statistics: InputStatistics | None, options: SvdOptions) -> Rewritten:
    """Factor `weight` where the factors take less than the weight itself.

    Args:
        weight: (out, in) = (m, n), floating point.
        statistics: of the input, with its Hessian where `options.whiten`; else it may be None.

    Returns:
        `LowRank(Dense (m, r), Dense (r, n))` in the weight's dtype, or `Dense(weight)` where the factors
        are not smaller. The report has `rank`, `full_rank`, `kept_variance` (in the criterion's metric),
        `relative_error` (of the outputs, with the factors as stored; of the weight without a Hessian),
        `damping` and `reason` (None, or why the weight stays dense: the other figures then tell of the
        factors that were turned down).

    Raises:
        ValueError: if whitening is asked for without a Hessian, or the weight is not finite.
    """
    check_layer(weight, statistics)
    W = weight.double()
    H = None if statistics is None or statistics.hessian is None else statistics.hessian.to(W)
    if options.whiten and H is None:
        raise ValueError("whitened svd needs the Hessian of the input (or whiten=False)")
    U, used = _directions(W, H if options.whiten else None, options.damping)  # (m, k)
    metric = H if options.whiten or options.max_error is not None else None
    energies = _energies(U.T @ W, metric)  # (k,)
    rank, reason = _rank(energies, W.shape, options)
    m, n = W.shape
    report: dict[str, Any] = {
        "rank": rank,
        "full_rank": min(m, n),
        "kept_variance": _share(energies, rank),
        "damping": used,
        "reason": reason,
    }
    left, right = _factors(W, U[:, :rank], energies[:rank], weight.dtype, options.paper)
    report["relative_error"] = relative_error(W, left.double() @ right.double(), H)
    if reason is not None:
        return Rewritten(Dense(weight), report)
    return Rewritten(LowRank(Dense(left), Dense(right)), report)


def relative_error(weight: Tensor, other: Tensor, hessian: Tensor | None) -> float:
    """||(W - W') X|| / ||W X||, or ||W - W'|| / ||W|| without a Hessian; 0 where W X is zero."""
    error = _energies(weight - other, hessian).sum()
    total = _energies(weight, hessian).sum()
    return float((error.clamp_min(0) / total).sqrt()) if float(total) > 0 else 0.0


def closed_form_left(
    weight: Tensor, right: Tensor, statistics: InputStatistics, damping: float = 1e-2
) -> tuple[Tensor, float]:
    """The best `left` for a given `right`: A = W H B^T (B H B^T)^-1, of min ||(W - A B) X|| (SVD-LLM, eq. 6).

    Args:
        weight: W (m, n).
        right: B (r, n), as it is stored (quantized, say).
        statistics: of the input, with its Hessian.
        damping: per channel, as in `svd`; times ten while B H B^T cannot be factored.

    Returns:
        A (m, r) in the weight's dtype, and what was added to B H B^T: a fraction of its diagonal.
    """
    W, B = weight.double(), right.to(weight.device, torch.float64)
    H = damped(statistics.require_hessian().to(weight.device), damping)
    factor, used = damped_cholesky(B @ H @ B.T, 0.0)
    return torch.cholesky_solve(B @ H @ W.T, factor).T.to(weight.dtype).contiguous(), used


def _directions(W: Tensor, H: Tensor | None, damping: float) -> tuple[Tensor, float]:
    """Orthonormal output directions (m, min(m, n)), the most energetic first; and the damping used."""
    m, n = W.shape
    if H is None:
        U, _, _, used = singular_vectors(W)
        return _fix_signs(U), used
    if m <= n:
        _, U, used = eigenvectors(W @ damped(H, damping) @ W.T)
        return _fix_signs(U), damping + used
    L, first = damped_cholesky(H, damping)  # (n, n)
    M = W @ L  # (m, n)
    _, V, second = eigenvectors(M.T @ M)
    # U S = M V; QR makes the columns orthonormal even where S is no more than rounding
    return _fix_signs(torch.linalg.qr(M @ V).Q), first + second


def _fix_signs(U: Tensor) -> Tensor:
    """Each column with its largest entry positive: eigenvectors have no sign of their own."""
    largest = U.abs().argmax(dim=0, keepdim=True)
    return U * torch.where(U.gather(0, largest) < 0, -1.0, 1.0)


def _energies(rows: Tensor, H: Tensor | None) -> Tensor:
    """E[(row @ x)^2] of every row, or its squared norm without a Hessian; (rows,), float64."""
    rows = rows.double()
    return (rows.square() if H is None else (rows @ H.to(rows)) * rows).sum(1).clamp_min(0)


def _share(energies: Tensor, rank: int) -> float:
    total = float(energies.sum())
    return float(energies[:rank].sum()) / total if total > 0 else 1.0


def _rank(energies: Tensor, shape: torch.Size, options: SvdOptions) -> tuple[int, str | None]:
    """The rank by the criterion, and why the weight is to stay dense (or None)."""
    m, n = shape
    full = min(m, n)
    if options.ratio is not None:
        rank = int(options.ratio * m * n / (m + n))
        rank = rank // options.multiple_of * options.multiple_of
    else:
        share = options.keep_variance if options.keep_variance is not None else None
        lost = 1 - share if share is not None else (options.max_error or 0.0) ** 2
        tails = energies.flip(0).cumsum(0).flip(0)  # tails[r] is what rank r loses
        # rounding alone must not cost a rank
        rank = int((tails > lost * tails[:1] + 1e-13 * tails[:1]).sum())
        rank = -(-rank // options.multiple_of) * options.multiple_of
    rank = min(max(rank, 1), full)
    if options.paper:
        stored = max(0.1, 1 - rank / full)
        rank = int((1 - stored) * full)
        if rank / full > 0.8:
            return rank, f"rank {rank} of {full} is above 0.8 of the full rank"
    if rank * (m + n) >= m * n:
        needed = f"rank {rank} of {full} would take more than the dense weight"
        return rank, f"{needed} (break-even {m * n / (m + n):.0f})"
    return rank, None


def _factors(
    W: Tensor, U: Tensor, energies: Tensor, dtype: torch.dtype, paper: bool
) -> tuple[Tensor, Tensor]:
    """`U D` and `D^-1 U^T W`: what the factors share of the size of each component, D = diag.

    D = S^(1/4), S the singular values, times a scalar that makes the root mean squares of the two equal.
    Quantized per channel, all components of a row of the left factor share a scale: with D = S the small
    ones drown, with D = 1 the noise on the large ones weighs most. On projections of SmolLM2-135M with
    synthetic inputs, 8-bit factors lost 5 % less with S^(1/4) than with 1 or S^(1/2), and half of what they
    lost with S. `paper`: D = S, as the reference stores it.
    """
    right = U.T @ W
    largest = energies.max()
    if not bool(largest > 0):
        return U.to(dtype).contiguous(), right.to(dtype).contiguous()
    sizes = (energies / largest).clamp_min(1e-12)  # S^2, up to a factor
    if paper:
        scale = (sizes * largest).sqrt()
    else:
        scale = sizes.pow(1 / 8)
        rms_left = (U * scale).square().mean().sqrt()
        rms_right = (right / scale[:, None]).square().mean().sqrt()
        scale = scale * (rms_right / rms_left).sqrt()
    return (U * scale).to(dtype).contiguous(), (right / scale[:, None]).to(dtype).contiguous()
