"""ASVD: Activation-aware Singular Value Decomposition for Compressing LLMs (arXiv 2312.05821).

    W S = U Sigma V^T,   S = diag(a_j^alpha),   a_j = E|x_j|,   W ~ (U_r Sigma_r^1/2) (Sigma_r^1/2 V_r^T S^-1)

Inputs of large magnitude are scaled up before the SVD, so that their columns are approximated better. It
sees no correlation between the inputs; `svd` with `whiten` does, and is the better one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lmpress.forms import Dense, LowRank
from lmpress.methods.checks import check_layer
from lmpress.methods.damping import singular_vectors
from lmpress.methods.result import Rewritten
from lmpress.methods.svd import relative_error
from lmpress.statistics import InputStatistics


@dataclass(frozen=True)
class AsvdOptions:
    """Options of `asvd`.

    Attributes:
        ratio: the share of the parameters to keep, rank = floor(ratio * mn / (m + n)).
        alpha: the power of E|x_j|, 0.5 in the paper; 0 is a plain SVD.
        multiple_of: align the rank, downwards.
    """

    ratio: float = 0.8
    alpha: float = 0.5
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1 or self.multiple_of < 1:
            raise ValueError("the ratio lies in (0, 1], and multiple_of is at least 1")


def asvd(weight: Tensor, statistics: InputStatistics, options: AsvdOptions) -> Rewritten:
    """Factor `weight` by an SVD in scaled inputs.

    Args:
        weight: (out, in) = (m, n), floating point.
        statistics: of the input; E|x|, or the root of E[x^2] where that is unknown.

    Returns:
        `LowRank(Dense (m, r), Dense (r, n))` in the weight's dtype. The report has `rank`, `damping`
        (0 unless the SVD itself had to be mended) and `relative_error`, ||(W - W') X|| / ||W X|| (of the
        weight alone without a Hessian).

    Raises:
        ValueError: statistics that do not fit, or numbers that are not finite.
    """
    check_layer(weight, statistics)
    m, n = weight.shape
    W = weight.double()
    size = statistics.second_moment.sqrt() if statistics.abs_mean is None else statistics.abs_mean
    scale = size.to(W).pow(options.alpha) + 1e-6  # (n,)
    rank = int(options.ratio * m * n / (m + n)) // options.multiple_of * options.multiple_of
    rank = min(max(rank, 1), m, n)
    U, sigma, Vt, used = singular_vectors(W * scale)
    root = sigma[:rank].sqrt()
    left = (U[:, :rank] * root).to(weight.dtype)
    right = (root[:, None] * Vt[:rank] / scale).to(weight.dtype)
    error = relative_error(W, left.double() @ right.double(), statistics.hessian)
    form = LowRank(Dense(left.contiguous()), Dense(right.contiguous()))
    report = {"rank": form.rank, "alpha": options.alpha, "damping": used, "relative_error": error}
    return Rewritten(form, report)
