"""Wanda: A Simple and Effective Pruning Approach for Large Language Models (arXiv 2306.11695, equation 1).

The score of a weight is `|W_ij| * sqrt(E[x_j^2])`; within each output row (or each group of an n:m pattern)
the lowest scores are removed, and nothing else changes. Magnitude pruning, the baseline, scores by `|W_ij|`
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmpress.methods.checks import check_layer
from lmpress.methods.hessian import relative_loss
from lmpress.methods.patterns import density_of, keep_largest, parse_pattern, sparse_form
from lmpress.methods.result import Rewritten
from lmpress.statistics import InputStatistics

SCORES = ("wanda", "magnitude")


@dataclass(frozen=True)
class WandaOptions:
    """Options of `wanda`.

    Attributes:
        sparsity: the share of each row that is removed; an n:m pattern has its own.
        pattern: `unstructured`, or `n:m` with n kept of every m.
        score: `wanda`, or `magnitude`, which needs no statistics.
        per_row: compare within each row, as Wanda does; else over the whole matrix, usual for magnitude.
    """

    sparsity: float = 0.5
    pattern: str = "unstructured"
    score: str = "wanda"
    per_row: bool = True

    def __post_init__(self) -> None:
        density_of(self.pattern, self.sparsity)
        if self.score not in SCORES:
            raise ValueError(f"the score is one of {', '.join(SCORES)}, not {self.score!r}")


def wanda(weight: Tensor, statistics: InputStatistics | None, options: WandaOptions) -> Rewritten:
    """Remove the entries of `weight` (out, in) that contribute least to the output.

    Args:
        weight: (out, in), floating point.
        statistics: of the input; its second moments. May be None for magnitude.

    Returns:
        `Sparse(pattern, Dense)` in the weight's dtype. The report has `density`, and `output_error`, the
        relative squared error of the output, where a Hessian is there.

    Raises:
        ValueError: no statistics for Wanda's score, statistics that do not fit or are not finite, or an m
            that does not divide the columns.
    """
    check_layer(weight, statistics)
    group = parse_pattern(options.pattern)
    density = density_of(options.pattern, options.sparsity)
    scores = weight.float().abs()
    if options.score == "wanda":
        scores = wanda_scores(weight, statistics)
    mask = keep_largest(scores, density, group, options.per_row)
    form = sparse_form(weight, mask, group, weight.dtype)
    report: dict[str, Any] = {"density": form.density, "score": options.score}
    if statistics is not None and statistics.hessian is not None:
        hessian = statistics.hessian.to(weight.device)
        report["output_error"] = relative_loss(weight, form.dense(), hessian)
    return Rewritten(form, report)


def wanda_scores(weight: Tensor, statistics: InputStatistics | None) -> Tensor:
    """`|W_ij| * sqrt(E[x_j^2])`, (out, in) float32. ValueError without statistics."""
    if statistics is None:
        raise ValueError("Wanda needs the second moments of the input")
    return weight.float().abs() * statistics.second_moment.to(weight.device, torch.float32).sqrt()
