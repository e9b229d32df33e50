"""A low-rank term that makes up for what quantization or pruning took away.

LQER (arXiv 2402.02446) and EoRA (arXiv 2410.21271): with E = W - W' the error of a compressed
weight, `min ||(E - L) X||_F` over rank r in closed form, and the weight becomes `W' + L`.

Quantized factors: `right` first, in the metric of the input (the columns of `left` are orthonormal, so that
its error reaches the output as it is); then `left` is solved for anew, `A = E H B^T (B H B^T)^-1`, and
quantized in the metric of `B x`, so that each step makes up for the one before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lmpress.forms import Dense, Form, LowRank, Sum
from lmpress.methods.checks import check_finite, check_layer
from lmpress.methods.damping import damped
from lmpress.methods.gptq import GptqOptions, gptq
from lmpress.methods.hessian import relative_loss
from lmpress.methods.result import Rewritten
from lmpress.methods.subspace import balanced, project_exactly
from lmpress.methods.svd import closed_form_left
from lmpress.statistics import InputStatistics

METRICS = ("hessian", "diagonal", "none")


@dataclass(frozen=True)
class CorrectionOptions:
    """Options of `low_rank_correction`.

    Attributes:
        rank: of the correction.
        metric: `hessian` (EoRA), `diagonal` (L2QER, with second moments), or `none` (LQER).
        damping: added to every H_jj, relative to itself.
        bits: of the factors; None to leave them in floating point.
        granularity: of quantized factors: `tensor` or `channel`.
    """

    rank: int = 32
    metric: Literal["hessian", "diagonal", "none"] = "hessian"
    damping: float = 0.01
    bits: int | None = None
    granularity: Literal["tensor", "channel"] = "channel"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.damping < 0:
            raise ValueError("the rank of a correction is at least 1, and damping at least 0")
        if self.metric not in METRICS:
            raise ValueError(f"the metric is one of {', '.join(METRICS)}, not {self.metric!r}")
        if self.bits is not None and self.metric != "hessian":
            raise ValueError("factors are quantized in the metric of the Hessian alone")


def low_rank_correction(
    weight: Tensor, form: Form, statistics: InputStatistics | None, options: CorrectionOptions
) -> Rewritten:
    """Add the best low-rank term to `form`, an approximation of `weight`.

    Args:
        weight: (out, in), the weight to come back to.
        form: what it was compressed to, of the same shape.
        statistics: of the input; with its Hessian for the metric `hessian`, None allowed for `none`.

    Returns:
        `Sum(form, LowRank)`, the factors in weight's dtype or quantized; a `Sum` gets one more term. The
        report has `rank`, the `damping` that it took, `error_before` and `error_after`: relative squared
        errors of the output, or of the weight where there is no Hessian.

    Raises:
        ValueError: shapes that do not fit, or missing statistics.
    """
    if form.shape != tuple(weight.shape):
        raise ValueError(f"a correction of a form of {form.shape} towards a weight of {tuple(weight.shape)}")
    check_layer(weight, statistics)
    approximation = form.dense().to(weight.device)
    check_finite({"form to correct": approximation})
    residual = weight.float() - approximation
    rank = min(options.rank, *weight.shape)
    if options.bits is not None and statistics is not None:
        correction, used = quantized_factors(residual, statistics, rank, options)
    else:
        correction, used = _factors(residual, _metric(weight, statistics, options), rank, weight.dtype)
    hessian = None if statistics is None or statistics.hessian is None else statistics.hessian
    metric = torch.eye(weight.shape[1]) if hessian is None else hessian
    metric = metric.to(weight.device, torch.float32)
    terms = form.addends
    report: dict[str, Any] = {
        "rank": correction.rank,
        "metric": options.metric,
        "damping": used + (options.damping if options.metric == "hessian" else 0.0),
        "error_before": relative_loss(weight, approximation, metric),
        "error_after": relative_loss(weight, approximation + correction.dense(), metric),
    }
    return Rewritten(Sum((*terms, correction)), report)


def quantized_factors(
    residual: Tensor,
    statistics: InputStatistics,
    rank: int,
    options: CorrectionOptions,
    row_weights: Tensor | None = None,
) -> tuple[LowRank, float]:
    """The best factors of `residual` (out, in), quantized one after the other, each making up for the last.

    Args:
        row_weights: what an error of each output counts, (out,); None for all alike.

    Returns:
        the factors, and what damping they took beyond that of the options.
    """
    if options.bits is None:
        raise ValueError("quantized factors need a number of bits")
    metric = damped(statistics.require_hessian().to(residual.device), options.damping)
    weighted = residual if row_weights is None else residual * row_weights.to(residual)[:, None]
    left, right, projected = project_exactly(weighted, metric, rank)
    _, right = balanced(left.float(), right.float())
    how = GptqOptions(
        bits=options.bits,
        granularity=options.granularity,
        damping=options.damping,
        per_channel_damping=True,
        clip=True,
    )
    first = gptq(right, statistics, how)
    stored = first.form.dense()
    left, solved = closed_form_left(residual.float(), stored, statistics, options.damping)
    second = gptq(left, statistics.through(stored), how)
    grown = max(result.report["damping"] for result in (first, second)) - options.damping
    return LowRank(second.form, first.form), max(projected, solved, grown)


def _metric(weight: Tensor, statistics: InputStatistics | None, options: CorrectionOptions) -> Tensor | None:
    """H (n, n), or None for the identity."""
    if options.metric == "none":
        return None
    if statistics is None:
        raise ValueError(f"the metric {options.metric!r} needs statistics of the input")
    if options.metric == "diagonal":
        return torch.diag(statistics.second_moment.to(weight.device, torch.float64))
    return damped(statistics.require_hessian().to(weight.device), options.damping)


def _factors(residual: Tensor, metric: Tensor | None, rank: int, dtype: torch.dtype) -> tuple[LowRank, float]:
    left, right, used = project_exactly(residual, metric, rank)
    left, right = balanced(left, right)
    return LowRank(Dense(left.to(dtype)), Dense(right.to(dtype))), used
